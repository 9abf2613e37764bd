"""KLOM: are an unlearned model's answers distributed as those of models that never saw the forget data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from semu_peft.arguments import check_count, check_kind, check_positive


@dataclass(frozen=True, eq=False, repr=False)
class Klom:
    """How far the margins of unlearned models are from those of retrained ones, example by example.

    Attributes:
        values: `KL(unlearned ‖ retrained)` of each example's margin, `(N,)`, in nats; 0 where they cannot be told
            apart.

    Examples:
        >>> import torch
        >>> Klom(torch.linspace(0, 1, 101))
        Klom(101 examples, median 0.5, 95th percentile 0.95)
    """

    values: Tensor

    def percentile(self, percent: float) -> float:
        """The value that this share of the examples, in percent, stays below."""
        return float(torch.quantile(self.values, percent / 100))

    def __repr__(self) -> str:
        median, high = self.percentile(50), self.percentile(95)
        return f"Klom({len(self.values)} examples, median {median:.3g}, 95th percentile {high:.3g})"


def klom(unlearned: Tensor, retrained: Tensor, *, bins: int = 20, clip: float = 100.0, smoothing: float = 1e-5) -> Klom:
    """Compare the margins of models that were unlearned with those of models that were retrained, over many seeds.

    The margin of an example is `z_y − log Σ_{k ≠ y} exp z_k`, which is
    [`Predictions.log_odds`][semu_peft.evaluation.classification.Predictions]. Both sets of margins are counted in the
    same bins between the smallest and the largest of them, and `KL(unlearned ‖ retrained)` of the counts is the value
    (Georgiev et al., ICLR 2025, arXiv 2410.23232). Report it for forget, retain and test examples, beside the row of
    the model that forgot nothing. The authors train 100 models of each kind. Their released histogram leaves the
    largest margin out; here the last bin is closed.

    Args:
        unlearned: Margins by unlearned models, `(models, N)`.
        retrained: Margins by retrained models, `(models, N)`; another number of models is fine.
        bins: How many.
        clip: Margins beyond it count as it.
        smoothing: Added to the share of every bin.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: The shapes do not fit, a margin is NaN, or a number is out of range.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import klom
        >>> retrained = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> klom(retrained, retrained).values.tolist(), bool((klom(retrained + 9, retrained).values > 5).all())
        ([0.0, 0.0, 0.0], True)
    """
    check_count("bins", bins)
    check_positive("clip", clip)
    check_positive("smoothing", smoothing)
    both = [_margins(name, each, clip) for name, each in (("unlearned", unlearned), ("retrained", retrained))]
    if both[0].shape[1] != both[1].shape[1]:
        raise ValueError(
            f"`retrained` must be of the same examples as `unlearned`, got {both[1].shape[1]} and {both[0].shape[1]}. "
            "Predict on one loader, in one order."
        )
    every = torch.cat(both)
    low, high = every.amin(0), every.amax(0)
    p, q = (_shares(each, low, high, bins, smoothing) for each in both)
    return Klom((p * (p / q).log()).sum(0).clamp(min=0))


def _margins(name: str, margins: Tensor, clip: float) -> Tensor:
    check_kind(name, margins, Tensor, "a tensor (models, N)", "Stack `Predictions.log_odds`: `torch.stack([...])`.")
    if margins.dim() != 2 or not margins.numel() or margins.isnan().any():
        raise ValueError(
            f"`{name}` must be margins (models, N) without NaN, got shape {tuple(margins.shape)}. Stack "
            "`Predictions.log_odds` of several models."
        )
    return margins.detach().cpu().double().clamp(-clip, clip)


def _shares(margins: Tensor, low: Tensor, high: Tensor, bins: int, smoothing: float) -> Tensor:
    """The share of models in each bin, `(bins, N)`; every margin is in one, the largest in the last."""
    width = (high - low).clamp(min=torch.finfo(low.dtype).tiny)
    places = ((margins - low) / width * bins).long().clamp(0, bins - 1)
    counts = torch.zeros(bins, margins.shape[1], dtype=margins.dtype)
    counts.scatter_add_(0, places, torch.ones_like(margins))
    shares = counts / len(margins) + smoothing
    return shares / shares.sum(0)
