"""How much of an answer a language model has by heart: truth ratio, extraction strength, exact memorisation, MUSE's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from semu_peft.arguments import check_number

from .token_scores import TokenScores

Numbers = Tensor | Sequence[float]

OPEN_UNLEARNING_EPSILON = 1e-10
"""What OpenUnlearning adds to denominators: the figures of its board are with it."""


def truth_ratio(
    correct_nll: Numbers, wrong_nll: Any, *, mean: str = "geometric", inverted: bool = False, epsilon: float = 0.0
) -> Tensor:
    """How likely wrong answers are beside the right one, TOFU's `R` (Maini et al. 2024, arXiv 2401.06121).

    `R = exp(−mean_j n(ŷ_j)) / exp(−n(ỹ))`, with n the mean negative log likelihood per token, ŷ_j the wrong answers and
    ỹ the paraphrased right one. It is near 0 where the model knows the answer, and about 1 where it cannot tell.

    A model that was destroyed finds all answers impossible, and their ratio may be that of gold. OpenUnlearning (arXiv
    2506.12618) adds 1e-10 to the denominator: below that a right answer counts as gone for bad, and R is near 0 again.

    Args:
        correct_nll: `n(ỹ)`, `(N,)`, see [`TokenScores.nll`][semu_peft.evaluation.token_scores.TokenScores].
        wrong_nll: `n(ŷ_j)`, `(N, K)` or N vectors of any lengths.
        mean: Over the wrong answers' probabilities: `"geometric"` as in TOFU's forget quality and in OpenUnlearning, or
            `"arithmetic"` as in the original model utility.
        inverted: Give `1 / R`, which FIUBench (arXiv 2411.03554) calls the truth ratio.
        epsilon: Added to the right answer's probability.

    Returns:
        `(N,)`, float64.

    Raises:
        ValueError: The two do not fit, `mean` is another word, or `epsilon` is negative.

    Examples:
        >>> from semu_peft.evaluation import truth_ratio
        >>> [round(truth_ratio([1.5], [[1.0, 3.0]], inverted=inverted).item(), 3) for inverted in (False, True)]
        [0.607, 1.649]
    """
    if mean not in ("geometric", "arithmetic"):
        raise ValueError(
            f"`mean` must be 'geometric' or 'arithmetic', got {mean!r}. TOFU's forget quality takes the first."
        )
    check_number("epsilon", epsilon, low=0.0)
    correct = _vector(correct_nll)
    wrong = [_vector(row) for row in wrong_nll]
    if len(wrong) != len(correct) or any(not len(row) for row in wrong):
        raise ValueError(
            f"`wrong_nll` must have one wrong answer or more for each of {len(correct)} right ones, got "
            f"{[len(row) for row in wrong][:5]} …. Leave rows without wrong answers out of both."
        )
    log_wrong = torch.stack([-row.mean() if mean == "geometric" else (-row).exp().mean().log() for row in wrong])
    log_ratio = log_wrong - torch.logaddexp(-correct, torch.tensor(epsilon).double().log())
    return (-log_ratio if inverted else log_ratio).exp()


def forget_truth_ratio(ratios: Numbers) -> float:
    """Mean of `min(R, 1/R)`: 1 where wrong answers are as likely as the right one, on a forget set.

    Examples:
        >>> from semu_peft.evaluation.memorisation import forget_truth_ratio
        >>> forget_truth_ratio([0.5, 2.0])
        0.5
    """
    return float(symmetric_ratio(ratios).mean())


def symmetric_ratio(ratios: Numbers) -> Tensor:
    """`min(R, 1/R)` of each row, `(N,)`: 1 where wrong answers are as likely as the right one.

    Examples:
        >>> from semu_peft.evaluation.memorisation import symmetric_ratio
        >>> symmetric_ratio([0.5, 4.0]).tolist()
        [0.5, 0.25]
    """
    values = _vector(ratios)
    return torch.minimum(values, 1 / values)


def retain_truth_ratio(ratios: Numbers) -> float:
    """Mean of `max(0, 1 − R)`: 1 where wrong answers are impossible, on what is to be kept.

    Examples:
        >>> from semu_peft.evaluation.memorisation import retain_truth_ratio
        >>> retain_truth_ratio([0.5, 2.0])
        0.25
    """
    return float((1 - _vector(ratios)).clamp(min=0).mean())


def forget_quality(ratios: Numbers, gold: Numbers) -> float:
    """TOFU's forget quality: the p-value of a two-sample Kolmogorov–Smirnov test (arXiv 2401.06121).

    It is 1 where the truth ratios on the forget set are those of a model that never saw it, and by custom above 0.05
    where the two cannot be told apart. Both must be ratios of one direction: of FIUBench's inverted ones against TOFU's
    the test says nothing. It sees their order alone, and on which side of gold's a model's lie it does not tell.

    Args:
        ratios: Of the unlearned model, `(N,)`, see [`truth_ratio`][semu_peft.evaluation.memorisation.truth_ratio].
        gold: Of the model trained without the forget set.

    Raises:
        ImportError: scipy is not installed.
        ValueError: One is empty or has a NaN.

    Examples:
        >>> from semu_peft.evaluation import forget_quality
        >>> forget_quality([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
        1.0
    """
    try:
        from scipy.stats import ks_2samp
    except ImportError as error:
        raise ImportError(
            'forget_quality needs scipy: run `pip install ".[evaluation]"` in a clone of semu-peft.'
        ) from error
    sides = {"ratios": _vector(ratios), "gold": _vector(gold)}
    for name, values in sides.items():
        if not len(values) or values.isnan().any():
            raise ValueError(
                f"`{name}` must be numbers without NaN, got {len(values)} with {int(values.isnan().sum())} NaN. A "
                "model that gives NaN has diverged: lower the learning rate."
            )
    return float(ks_2samp(sides["ratios"].numpy(), sides["gold"].numpy()).pvalue)


def probability_with_options(correct_nll: Numbers, wrong_nll: Any, *, epsilon: float = 0.0) -> Tensor:
    """`p(y) / (p(y) + Σ_j p(ŷ_j))` of length-normalised probabilities, TOFU's for real authors and world facts.

    Args:
        correct_nll: `n(y)`, `(N,)`.
        wrong_nll: `n(ŷ_j)`, N vectors of any lengths.
        epsilon: Added to the denominator, see [`truth_ratio`][semu_peft.evaluation.memorisation.truth_ratio].

    Returns:
        `(N,)`, float64.

    Examples:
        >>> from semu_peft.evaluation.memorisation import probability_with_options
        >>> probability_with_options([1.0], [[1.0, 1.0, 1.0]]).item()
        0.25
    """
    check_number("epsilon", epsilon, low=0.0)
    correct, added = _vector(correct_nll), -torch.tensor([epsilon]).double().log()
    every = [torch.cat([value.view(1), _vector(row), added]) for value, row in zip(correct, wrong_nll, strict=True)]
    return torch.stack([(-row).softmax(0)[0] for row in every])


def model_utility(parts: Mapping[str, float] | Sequence[float]) -> float:
    """TOFU's model utility: the harmonic mean of its nine numbers, 0 where one of them is 0.

    Args:
        parts: Probability, ROUGE-L recall and truth ratio on retain set, real authors and world facts.

    Raises:
        ValueError: There are none, or one is outside [0, 1].

    Examples:
        >>> from semu_peft.evaluation import model_utility
        >>> model_utility([0.5, 1.0])
        0.6666666666666666
    """
    values = [float(value) for value in (parts.values() if isinstance(parts, Mapping) else parts)]
    if not values or not all(-1e-9 <= value <= 1 + 1e-9 for value in values):
        raise ValueError(f"`parts` must be numbers from 0 to 1, got {values}. Give each set's three means.")
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def extraction_strength(scores: TokenScores) -> Tensor:
    """How little of an answer must be given for the rest to follow greedily (Carlini et al. 2021, arXiv 2012.07805).

    `1 − k/|y|`, k the smallest start from which every later token has the largest logit; at least `1/|y|`, as
    OpenUnlearning (arXiv 2506.12618) has it. The end of the sequence does not count.

    Returns:
        `(N,)`, float64; NaN for an answer without tokens, and where a log probability is NaN.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import TokenScores, extraction_strength
        >>> right, any_values = torch.tensor([True, False, True, True]), torch.zeros(4)
        >>> extraction_strength(TokenScores([any_values], [right], [any_values])).tolist()
        [0.5]
    """
    return torch.tensor([_strength(correct) for correct in _told(scores)], dtype=torch.float64)


def _strength(correct: Tensor) -> float:
    if not len(correct):
        return float("nan")
    wrong = (~correct).nonzero()
    start = int(wrong[-1]) + 1 if len(wrong) else 0
    return 1 - min(start, len(correct) - 1) / len(correct)


def exact_memorisation(scores: TokenScores) -> Tensor:
    """Share of an answer's tokens that have the largest logit when those before them are given (arXiv 2205.10770).

    The end of the sequence does not count, as in OpenUnlearning (arXiv 2506.12618).

    Returns:
        `(N,)`, float64; NaN for an answer without tokens, and where a log probability is NaN.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import TokenScores, exact_memorisation
        >>> right, any_values = torch.tensor([True, False, True, True]), torch.zeros(4)
        >>> exact_memorisation(TokenScores([any_values], [right], [any_values])).tolist()
        [0.75]
    """
    return torch.stack([correct.double().mean() for correct in _told(scores)])


def _told(scores: TokenScores) -> list[Tensor]:
    """Of each answer whether its tokens are right; none of one at which the model has diverged, which says nothing."""
    diverged = scores.nll.isnan().tolist()
    return [
        correct[:0] if bad else correct for correct, bad in zip(scores.without_eos().correct, diverged, strict=True)
    ]


def _vector(values: Any) -> Tensor:
    given = values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float64)
    return given.detach().cpu().double().reshape(-1)
