"""How well a score tells two sets of examples apart, and how sure that is, as of a mean: the one AUC and bootstrap."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_QUANTILE = 1.96  # of the normal distribution, two-sided 95%
_DRAWN_AT_ONCE = 1_000_000  # examples, of all redraws together: 16 MB of places and values


def auc(higher: Tensor, lower: Tensor) -> float:
    """`P(higher > lower) + ½ P(higher = lower)` over all pairs: 1 where each of the first is above each of the second.

    Args:
        higher: Scores that should be the higher ones, `(N,)`.
        lower: Those that should be the lower ones, `(M,)`.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation.auc import auc
        >>> auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 3.0]))
        0.625
    """
    return float(_wins(*_places(higher, lower), torch.ones(len(higher)), torch.ones(len(lower))))


def auc_with_interval(
    higher: Tensor, lower: Tensor, *, redraws: int = 1000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """The AUC, and between which values 95% of those of examples drawn again lie (the percentile bootstrap).

    Both sets are drawn with replacement. Scores are ranked once; a draw counts how often it took each of them. At 0 or
    1, or where all scores are one, all draws agree, of however few examples: there the interval is Wilson's of as many
    as the smaller set has.

    Args:
        higher: Scores that should be the higher ones, `(N,)`.
        lower: Those that should be the lower ones, `(M,)`.
        redraws: How many draws.
        seed: Of the draws.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation.auc import auc_with_interval
        >>> value, (low, high) = auc_with_interval(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]), redraws=10)
        >>> value, round(low, 2), high
        (1.0, 0.34, 1.0)
    """
    generator = torch.Generator().manual_seed(seed)
    left, right = _places(higher, lower)
    drawn = []
    for _ in range(redraws):
        rows, columns = (
            torch.randint(len(side), (len(side),), generator=generator).bincount(minlength=len(side))
            for side in (higher, lower)
        )
        drawn.append(_wins(left, right, rows, columns))
    low, high = torch.stack(drawn).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    value = auc(higher, lower)
    if low == high:
        return value, share_interval(value, min(len(higher), len(lower)))
    return value, (low, high)


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of so many examples, which holds at 0 and 1 as well (Wilson 1927).

    Args:
        share: From 0 to 1.
        count: Of how many examples.

    Examples:
        >>> from semu_peft.evaluation.auc import share_interval
        >>> [round(bound, 3) for bound in share_interval(0.0, 6)]
        [0.0, 0.39]
    """
    squared = _QUANTILE**2
    middle = share + squared / (2 * count)
    half = _QUANTILE * math.sqrt(share * (1 - share) / count + squared / (4 * count**2))
    low, high = ((middle + side) / (1 + squared / count) for side in (-half, half))
    return max(0.0, low), min(1.0, high)


def mean_interval(values: Tensor, *, redraws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Between which values 95% of the means of examples drawn again lie (the percentile bootstrap).

    Args:
        values: One number an example, `(N,)`.
        redraws: How many draws.
        seed: Of the draws.

    Raises:
        ValueError: There is no number, or one is NaN.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation.auc import mean_interval
        >>> mean_interval(torch.tensor([0.0, 1.0] * 50))
        (0.4, 0.6)
    """
    numbers = values.detach().cpu().double()
    if not len(numbers) or numbers.isnan().any():
        raise ValueError(
            f"`values` must hold a number for each example, got {len(numbers)} with {int(numbers.isnan().sum())} NaN. "
            "Leave out examples that have none."
        )
    generator, means = torch.Generator().manual_seed(seed), []
    at_once = max(1, _DRAWN_AT_ONCE // len(numbers))
    for start in range(0, redraws, at_once):
        size = (min(at_once, redraws - start), len(numbers))
        means.append(numbers[torch.randint(len(numbers), size, generator=generator)].mean(1))
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _places(higher: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """Of each high score, how many of the low ones are below it, and how many are not above it."""
    below, scores = lower.detach().cpu().double().sort().values, higher.detach().cpu().double()
    return torch.searchsorted(below, scores), torch.searchsorted(below, scores, right=True)


def _wins(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The share of pairs won where score `i` of the high ones counts `rows[i]` times, and sorted low ones alike."""
    until = torch.cat([torch.zeros(1, dtype=torch.float64), columns.double().cumsum(0)])
    won = (until[left] + until[right]) / 2
    return rows.double() @ won / (rows.sum() * columns.sum()).double()
