"""How well a score tells two sets of examples apart, and how sure that is: the one AUC of all membership attacks."""

from __future__ import annotations

import torch
from torch import Tensor


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

    Both sets are drawn with replacement. Scores are ranked once; a draw counts how often it took each of them.

    Args:
        higher: Scores that should be the higher ones, `(N,)`.
        lower: Those that should be the lower ones, `(M,)`.
        redraws: How many draws.
        seed: Of the draws.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation.auc import auc_with_interval
        >>> auc_with_interval(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]), redraws=10)
        (1.0, (1.0, 1.0))
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
    return auc(higher, lower), (low, high)


def _places(higher: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """Of each high score, how many of the low ones are below it, and how many are not above it."""
    below, scores = lower.detach().cpu().double().sort().values, higher.detach().cpu().double()
    return torch.searchsorted(below, scores), torch.searchsorted(below, scores, right=True)


def _wins(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The share of pairs won where score `i` of the high ones counts `rows[i]` times, and sorted low ones alike."""
    until = torch.cat([torch.zeros(1, dtype=torch.float64), columns.double().cumsum(0)])
    won = (until[left] + until[right]) / 2
    return rows.double() @ won / (rows.sum() * columns.sum()).double()
