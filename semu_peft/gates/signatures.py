"""What is remembered of a forget request: a few vectors of its prompts' states, and how near others are to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

Metric = Literal["cosine", "mahalanobis", "box", "one-class"]


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
    def fit(states: Tensor, layers: int = 1) -> dict[str, Tensor]:
        """Remember the directions of states `(n, D)`, of several layers as of one."""
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
    def fit(cls, states: Tensor, layers: int = 1) -> dict[str, Tensor]:
        """Remember mean and covariance of states `(n, D)`, of several layers as of one."""
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
    def fit(states: Tensor, layers: int = 1) -> dict[str, Tensor]:
        """Remember mean and standard deviation of states `(n, D)`, of several layers as of one."""
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


class OneClass:
    """How far beyond the border of a one-class SVM a state is, `(ρ − w·s) / ‖w‖`, by its nearness in several layers.

    `s_l = max_j cos(h_l, h_lj) − m_l² / (2 c_l)`, with `m_l` the
    [`Mahalanobis`][semu_peft.gates.signatures.Mahalanobis] distance, both in layer `l`. The SVM is linear and leaves a
    share ν of the request's own prompts outside, each of which is compared with the others alone; what is remembered is
    `w`, `ρ`, and what the two distances need.

    Source: O3, arXiv 2407.10223, in the layers of another encoder, with c 1000 and ν .1. Its release has
    `−m² / 2 − 1000 max_j cos`, of which one term grows and the other falls as a state comes nearer; here both grow. A
    linear SVM tells its examples from the origin, so `c` is ten times the largest `m²` where that is above 1000: all
    examples are then on one side.

    Examples:
        >>> states = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)) + 4
        >>> tensors = OneClass.fit(states, layers=2)
        >>> (OneClass.score(tensors, torch.stack([states[0], -states[0]])) < 0).tolist()
        [True, False]
    """

    least: ClassVar[int] = 2
    nu: ClassVar[float] = 0.1
    scale: ClassVar[float] = 1000.0

    @classmethod
    def fit(cls, states: Tensor, layers: int = 1) -> dict[str, Tensor]:
        """Remember states `(n, layers · D)`.

        Raises:
            ImportError: scikit-learn is not installed.
        """
        try:
            from sklearn.svm import OneClassSVM
        except ImportError as error:
            raise ImportError(
                "'one-class' needs scikit-learn: run `pip install \".[evaluation]\"` in a clone of semu-peft."
            ) from error
        tensors = {"scales": torch.empty(layers)}
        for number, part in enumerate(states.chunk(layers, -1)):
            held = {"cosine": Cosine.fit(part), "mahalanobis": Mahalanobis.fit(part)}
            tensors |= {f"{number}.{name}.{key}": each for name, found in held.items() for key, each in found.items()}
            largest = float(Mahalanobis.score(held["mahalanobis"], part).square().max())
            tensors["scales"][number] = max(cls.scale, 10 * largest)
        machine = OneClassSVM(kernel="linear", nu=cls.nu, tol=1e-6)
        machine.fit(cls.nearness(tensors, states, own=True).numpy())
        weight, offset = torch.tensor(machine.coef_[0]), torch.tensor(float(machine.offset_[0])).double()
        length = weight.norm().clamp_min(torch.finfo(weight.dtype).tiny)
        return {**tensors, "weight": weight / length, "offset": offset / length}

    @staticmethod
    def nearness(tensors: dict[str, Tensor], states: Tensor, *, own: bool = False) -> Tensor:
        """`s` of states `(…, layers · D)`, `(…, layers)`; the request's `own` are compared with the others alone."""
        found = []
        for number, part in enumerate(states.chunk(len(tensors["scales"]), -1)):
            cosine, away = (_under(tensors, f"{number}.{name}.") for name in ("cosine", "mahalanobis"))
            near = 1 - (Cosine.own_scores(cosine, part) if own else Cosine.score(cosine, part))
            found.append(near - Mahalanobis.score(away, part).square() / (2 * tensors["scales"][number]))
        return torch.stack(found, -1).double()

    @classmethod
    def score(cls, tensors: dict[str, Tensor], states: Tensor) -> Tensor:
        """The score of states `(…, layers · D)`, `(…)`, negative inside."""
        return (tensors["offset"] - cls.nearness(tensors, states) @ tensors["weight"]).float()

    @classmethod
    def own_scores(cls, tensors: dict[str, Tensor], states: Tensor) -> Tensor:
        """The scores of the request's own states, each compared with the others alone."""
        return (tensors["offset"] - cls.nearness(tensors, states, own=True) @ tensors["weight"]).float()


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): each for key, each in tensors.items() if key.startswith(prefix)}


METRICS: dict[str, type[Cosine] | type[Mahalanobis] | type[Box] | type[OneClass]] = dict(
    zip(get_args(Metric), (Cosine, Mahalanobis, Box, OneClass), strict=True)
)
"""How near a state is to a request, by the metric's name."""
