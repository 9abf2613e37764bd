"""What is remembered of a forget request: a few vectors of its prompts' states, and how near others are to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

Metric = Literal["cosine", "mahalanobis", "box"]


@dataclass(frozen=True, eq=False)
class Signature:
    """The states of a request's prompts, as a metric remembers them.

    Attributes:
        tensors: What is remembered, by name; float32, on the CPU.
        own: The largest score of the request's own prompts, each without itself where the metric compares examples.
        threshold: Up to which score a state counts as near.

    Examples:
        >>> Signature({}, own=1.0, threshold=2.0)
        Signature(own 1, threshold 2)
    """

    tensors: dict[str, Tensor]
    own: float
    threshold: float

    def __repr__(self) -> str:
        return f"Signature(own {self.own:.4g}, threshold {self.threshold:.4g})"


class Cosine:
    """`1 − max_j cos(h, h_j)`: the distance to the nearest of the request's prompts.

    Examples:
        >>> tensors = Cosine.fit(torch.tensor([[3.0, 4.0]]))
        >>> Cosine.score(tensors, torch.tensor([[6.0, 8.0], [4.0, -3.0]]))
        tensor([0., 1.])
    """

    least: ClassVar[int] = 1

    @staticmethod
    def fit(states: Tensor) -> dict[str, Tensor]:
        """Remember the directions of states `(n, D)`."""
        return {"directions": torch.nn.functional.normalize(states, dim=-1)}

    @staticmethod
    def score(tensors: dict[str, Tensor], states: Tensor) -> Tensor:
        """The score of states `(…, D)`, `(…)`."""
        cosines = torch.nn.functional.normalize(states, dim=-1) @ tensors["directions"].mT
        return 1 - cosines.amax(-1)

    @classmethod
    def own_scores(cls, tensors: dict[str, Tensor], states: Tensor) -> Tensor:
        """The scores of the request's own states, each compared with the others alone."""
        if len(states) == 1:
            return torch.zeros(1)
        cosines = tensors["directions"] @ tensors["directions"].mT
        return 1 - cosines.fill_diagonal_(-1.0).amax(-1)


class Mahalanobis:
    """`√((h − μ)ᵀ Σ⁻¹ (h − μ))` with the covariance of the request's prompts, shrunk as they are fewer than dimensions.

    `Σ = (1 − λ) S + λ (tr S / D) I`, held by the `n − 1` directions that `S` has: no matrix `(D, D)` is formed.

    Examples:
        >>> tensors = Mahalanobis.fit(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> Mahalanobis.score(tensors, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))  # λ = 0.1: Σ₂₂ = 0.05
        tensor([0.0000, 4.4721])
    """

    least: ClassVar[int] = 2
    shrinkage: ClassVar[float] = 0.1

    @classmethod
    def fit(cls, states: Tensor) -> dict[str, Tensor]:
        """Remember mean and covariance of states `(n, D)`."""
        mean = states.double().mean(0)
        _, values, directions = torch.linalg.svd(states.double() - mean, full_matrices=False)
        variances = values.square() / len(states)
        floor = cls.shrinkage * variances.sum() / states.shape[1]
        scaled = (1 - cls.shrinkage) * variances
        held = scaled > 1e-12 * scaled.sum()
        return {
            "mean": mean.float(),
            "directions": directions[held].float().contiguous(),
            "variances": (scaled[held] + floor).float(),
            "floor": floor.clamp_min(torch.finfo(torch.float32).tiny).float(),
        }

    @staticmethod
    def score(tensors: dict[str, Tensor], states: Tensor) -> Tensor:
        """The score of states `(…, D)`, `(…)`."""
        away = states.double() - tensors["mean"].double()
        inside = away @ tensors["directions"].double().mT
        outside = (away.square().sum(-1) - inside.square().sum(-1)).clamp_min(0)
        squares = (inside.square() / tensors["variances"].double()).sum(-1) + outside / tensors["floor"].double()
        return squares.sqrt().float()

    @classmethod
    def own_scores(cls, tensors: dict[str, Tensor], states: Tensor) -> Tensor:
        """The scores of the request's own states."""
        return cls.score(tensors, states)


class Box:
    """`max_d |h_d − μ_d| / σ_d`, KSD's box around a request's prompts: its `k` is the largest of their own scores.

    Source: Effective skill unlearning, arXiv 2503.21730, where `k` is searched by bisection.

    Examples:
        >>> states = torch.tensor([[1.0, 2.0], [3.0, 2.0], [2.0, 6.0]])
        >>> Box.score(Box.fit(states), states)  # k = √2
        tensor([1.2247, 1.2247, 1.4142])
    """

    least: ClassVar[int] = 2

    @staticmethod
    def fit(states: Tensor) -> dict[str, Tensor]:
        """Remember mean and standard deviation of states `(n, D)`."""
        return {"mean": states.mean(0), "deviation": states.std(0, correction=0)}

    @staticmethod
    def score(tensors: dict[str, Tensor], states: Tensor) -> Tensor:
        """The score of states `(…, D)`, `(…)`; what never varied may be 1e-6 of its size away."""
        mean = tensors["mean"]
        deviation = torch.maximum(tensors["deviation"], 1e-6 * mean.abs().clamp_min(1e-6))
        return ((states - mean).abs() / deviation).amax(-1)

    @classmethod
    def own_scores(cls, tensors: dict[str, Tensor], states: Tensor) -> Tensor:
        """The scores of the request's own states."""
        return cls.score(tensors, states)


METRICS: dict[str, type[Cosine] | type[Mahalanobis] | type[Box]] = dict(
    zip(get_args(Metric), (Cosine, Mahalanobis, Box), strict=True)
)
"""How near a state is to a request, by the metric's name."""
