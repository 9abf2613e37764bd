"""The forms that the change of one parameter comes in: all of it, a few numbers, two thin factors, or factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Delta(ABC):
    """The change of a parameter, or of a weight read as a matrix.

    Attributes:
        kind: The form's name in files.

    Examples:
        >>> from semu_peft.edits.deltas import Delta, Dense
        >>> issubclass(Dense, Delta), Dense(torch.ones(2, 3)).shape
        (True, (2, 3))
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of what is changed."""

    @property
    def places(self) -> Tensor | None:
        """Where it changes something, as indices into the flattened parameter; `None` for everywhere."""
        return None

    @abstractmethod
    def applied(self, values: Tensor) -> Tensor:
        """The new values, from those at `places`, flat, or from all of the parameter; in their (wide) dtype."""

    @abstractmethod
    def viewed(self, shape: tuple[int, ...]) -> Delta:
        """The same change of a parameter that is stored with its trailing dimensions apart."""

    @abstractmethod
    def transposed(self) -> Delta:
        """The same change of the transposed matrix."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What it consists of, by the names of its fields."""

    def change(self, weight: Tensor) -> Tensor:
        """The change itself, shaped like the weight, in float32 or wider."""
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        if self.places is None:
            return self.applied(wide) - wide
        places = self.places.to(wide.device)
        values = wide.reshape(-1)[places]
        return torch.zeros_like(wide).reshape(-1).scatter(0, places, self.applied(values) - values).reshape(wide.shape)


@dataclass(frozen=True, eq=False)
class Dense(Delta):
    """`W + Δ`.

    Attributes:
        values: `Δ`, shaped like the parameter.

    Examples:
        >>> Dense(torch.ones(2)).applied(torch.tensor([1.0, 2.0]))
        tensor([2., 3.])
    """

    kind = "dense"
    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def applied(self, values: Tensor) -> Tensor:
        return values + self.values.to(values)

    def viewed(self, shape: tuple[int, ...]) -> Dense:
        return Dense(self.values.reshape(shape))

    def transposed(self) -> Dense:
        return Dense(self.values.mT.contiguous())

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}


@dataclass(frozen=True, eq=False)
class _AtPlaces(Delta):
    """What changes a few numbers of a parameter.

    Attributes:
        indices: Into the flattened parameter, ascending.
        values: One for each.
        size: The parameter's shape.
    """

    indices: Tensor
    values: Tensor
    size: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def places(self) -> Tensor:
        return self.indices.long()

    def viewed(self, shape: tuple[int, ...]) -> _AtPlaces:
        return replace(self, size=tuple(shape))

    def transposed(self) -> _AtPlaces:
        m, n = self.size
        turned = (self.places % n) * m + self.places // n
        order = turned.argsort()
        return replace(self, indices=turned[order].to(self.indices), values=self.values[order], size=(n, m))

    def tensors(self) -> dict[str, Tensor]:
        return {"indices": self.indices, "values": self.values}


@dataclass(frozen=True, eq=False)
class Sparse(_AtPlaces):
    """`W + Δ` with few numbers in `Δ` that are not zero.

    Attributes:
        indices: Of these numbers in the flattened parameter, ascending.
        values: The numbers.
        size: The parameter's shape.

    Examples:
        >>> Sparse(torch.tensor([1]), torch.tensor([5.0]), (2, 2)).change(torch.zeros(2, 2))
        tensor([[0., 5.],
                [0., 0.]])
    """

    kind = "sparse"

    def applied(self, values: Tensor) -> Tensor:
        return values + self.values.to(values)


@dataclass(frozen=True, eq=False)
class Scaled(_AtPlaces):
    """`W ∘ β` with few factors in `β` that are not one: it fits any weights, and a factor of 0 leaves exact zeros.

    Attributes:
        indices: Of these factors in the flattened parameter, ascending.
        values: The factors.
        size: The parameter's shape.

    Examples:
        >>> Scaled(torch.tensor([0]), torch.tensor([0.5]), (2,)).change(torch.tensor([4.0, 4.0]))
        tensor([-2.,  0.])
    """

    kind = "scaled"

    def applied(self, values: Tensor) -> Tensor:
        return values * self.values.to(values)


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """`W + L Rᵀ`, for a weight read as a matrix, `(m, n)`.

    Attributes:
        left: `L`, `(m, k)`.
        right: `R`, `(n, k)`.

    Examples:
        >>> LowRank(torch.ones(2, 1), torch.ones(3, 1)).shape
        (2, 3)
    """

    kind = "low_rank"
    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.left), len(self.right)

    def applied(self, values: Tensor) -> Tensor:
        product = self.left.to(values.device) @ self.right.to(values.device).mT
        return values + product.to(values).reshape(values.shape)

    def viewed(self, shape: tuple[int, ...]) -> LowRank:
        return self

    def transposed(self) -> LowRank:
        return LowRank(self.right, self.left)

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}


KINDS: dict[str, type[Delta]] = {kind.kind: kind for kind in (Dense, Sparse, Scaled, LowRank)}


def read_delta(kind: str, parts: dict[str, Tensor], size: tuple[int, ...]) -> Delta:
    """Make a change of what a file holds of it.

    Raises:
        ValueError: The parts are not those of such a change, or do not fit the shape.

    Examples:
        >>> read_delta("dense", {"values": torch.ones(2)}, (2,)).shape
        (2,)
    """
    maker = KINDS.get(kind)
    if maker is None:
        raise ValueError(f"the kind must be one of {list(KINDS)}, got {kind!r}")
    try:
        delta = maker(**parts, size=size) if issubclass(maker, _AtPlaces) else maker(**parts)
    except TypeError as error:
        raise ValueError(f"a {kind} change does not consist of {sorted(parts)}") from error
    if isinstance(delta, _AtPlaces):
        total = torch.Size(size).numel()
        outside = len(delta.indices) and not (0 <= int(delta.indices.min()) <= int(delta.indices.max()) < total)
        if outside or delta.indices.shape != delta.values.shape or delta.indices.dim() != 1:
            raise ValueError(f"the indices do not fit the shape {size} and the values")
    elif delta.shape != size:
        raise ValueError(f"its tensors have the shape {delta.shape}, the header says {size}")
    return delta


def at_places(kind: type[_AtPlaces], chosen: Tensor, values: Tensor) -> _AtPlaces:
    """A change of the chosen numbers alone, with the values that they have in a tensor of the parameter's shape."""
    indices = chosen.reshape(-1).nonzero().squeeze(1)
    kept = values.reshape(-1)[indices].contiguous()
    small = chosen.numel() < 2**31
    return kind(indices.to(torch.int32) if small else indices, kept, tuple(chosen.shape))
