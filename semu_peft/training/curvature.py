"""The curvature of what is minimised, as cores see it: the whole matrix where they are few numbers, else factors.

Both are running means of Gauss–Newton matrices `F = Jᵀ H J`, gathered from probes
([`probe`][semu_peft.objectives.distributions.probe]). Their damping `λ` has no unit: it is relative to the mean of the
diagonal of what it is added to, the matrix or each of the factors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from semu_peft.gradients.core_rows import Rows
from semu_peft.gradients.processes import sum_over_processes

_LEAST = 1e-20  # where there is no curvature at all


@dataclass(frozen=True)
class CoreSlot:
    """Where one core lies in the vector of all.

    Attributes:
        name: Its parameter's name.
        start: Of its first number.
        shape: `(r, r)`, `(r,)` for a diagonal core, or with a leading dimension for a batch of cores.
        has_rows: Whether its gradient is known example by example.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    has_rows: bool

    @property
    def size(self) -> int:
        """How many numbers it is."""
        return int(torch.Size(self.shape).numel())

    @property
    def place(self) -> slice:
        """Its numbers in the vector of all."""
        return slice(self.start, self.start + self.size)

    @property
    def is_diagonal(self) -> bool:
        """Whether only a diagonal is trained."""
        return len(self.shape) == 1


class Probe(NamedTuple):
    """What one backward pass from a random seed leaves.

    Attributes:
        rows: By core, the rows of each call of its layer.
        gradient: The gradient of all cores, `(P,)`.
        examples: How many examples the batch had.
    """

    rows: Mapping[str, list[Rows]]
    gradient: Tensor
    examples: int


class Curvature(ABC):
    """A running mean of curvatures over the vector of all cores.

    Args:
        slots: The cores.
        decay: What a new batch leaves of the mean's weight.
        device: Where it is computed.
    """

    def __init__(self, slots: Sequence[CoreSlot], decay: float, device: torch.device) -> None:
        self.slots, self.decay = list(slots), decay
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.size = sum(slot.size for slot in slots)

    @property
    @abstractmethod
    def wanted_seeds(self) -> float:
        """How many examples' random seeds a step should bring."""

    @abstractmethod
    def observe(self, probes: Sequence[Probe]) -> None:
        """Add the sum of one step's probes."""

    @abstractmethod
    def times(self, vector: Tensor) -> Tensor:
        """`F vector`, `(P,)`."""

    @abstractmethod
    def solve(self, vector: Tensor, damping: float) -> Tensor:
        """`F⁻¹ vector` with `F` damped, `(P,)`."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the running means."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def _age(self) -> float:
        """Let the mean age by one batch, and return what is left of its unnormalised sum."""
        self.weight = self.weight * self.decay + 1.0
        return self.decay


class WholeMatrix(Curvature):
    """`F` itself over all cores together, `(P, P)`, from the gradients of single examples.

    Cores without rows have one gradient a probe, of the whole batch; its square has the same mean, for these cores
    alone.
    """

    def __init__(self, slots: Sequence[CoreSlot], decay: float, device: torch.device) -> None:
        super().__init__(slots, decay, device)
        self.total = torch.zeros(self.size, self.size, device=device)

    @property
    def wanted_seeds(self) -> float:
        # Each is one row of a root of the matrix; the mean runs over a few steps.
        return max(32, self.size / 4)

    def observe(self, probes: Sequence[Probe]) -> None:
        new = torch.zeros_like(self.total)
        without_rows = [slot for slot in self.slots if not slot.has_rows]
        for probe in probes:
            by_example = self._by_example(probe)
            new.addmm_(by_example.mT, by_example)
            if without_rows:
                vector = torch.zeros_like(probe.gradient)
                for slot in without_rows:
                    vector[slot.place] = probe.gradient[slot.place]
                new.add_(torch.outer(vector, vector))
        self.total = self.total * self._age() + sum_over_processes(new)

    def _by_example(self, probe: Probe) -> Tensor:
        """The gradients of single examples, `(N, P)`."""
        result = torch.zeros(probe.examples, self.size, device=self.total.device)
        for slot in self.slots:
            for rows in probe.rows.get(slot.name, ()):
                left, right = (_in_groups(side, probe.examples).to(result) for side in rows)
                if slot.is_diagonal:
                    part = (left * right).sum(1)
                else:
                    part = torch.einsum("nsi,nsj->nij", left, right).flatten(1)
                result[: len(part), slot.place] += part
        return result

    @property
    def scale(self) -> float:
        """What an average direction costs, the mean of the diagonal."""
        return self.mean.diagonal().mean().item()

    @property
    def mean(self) -> Tensor:
        """`F`, `(P, P)`."""
        return self.total / self.weight.clamp_min(1e-12).to(self.total.dtype)

    def times(self, vector: Tensor) -> Tensor:
        return self.mean @ vector

    def solve(self, vector: Tensor, damping: float) -> Tensor:
        matrix = self.mean
        diagonal = matrix.diagonal()
        scale = diagonal.mean().clamp_min(_LEAST)
        matrix.diagonal().add_(damping * scale)
        for attempt in range(8):
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if not failed.item():
                return torch.cholesky_solve(vector.unsqueeze(1), factor).squeeze(1)
            matrix.diagonal().add_(scale * 1e-6 * 10.0**attempt)  # rounding made it indefinite
        return vector / (diagonal.mean() + damping * scale)

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "total": self.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weight, self.total = state["weight"].to(self.total.device), state["total"].to(self.total)


class KroneckerFactors(Curvature):
    """K-FAC's approximation layer by layer: `B ⊗ A`, the second moments of the core's rows on either side.

    A diagonal core has the exact restriction `B ∘ A` of it, and a core without rows the diagonal alone. Each factor has
    damping of its own, relative to its own mean, so that no layer's scale decides over another's.

    Source: Martens and Grosse 2015, arXiv 1503.05671, sections 3 and 6.3.
    """

    def __init__(self, slots: Sequence[CoreSlot], decay: float, device: torch.device) -> None:
        super().__init__(slots, decay, device)
        self.totals: dict[str, Tensor] = {}
        for slot in slots:
            if slot.has_rows:
                rank = slot.shape[-1]
                self.totals[f"{slot.name}.left"] = torch.zeros(rank, rank, device=device)
                self.totals[f"{slot.name}.right"] = torch.zeros(rank, rank, device=device)
            else:
                self.totals[f"{slot.name}.squares"] = torch.zeros(slot.size, device=device)
        self._inverses: dict[str, Tensor] = {}
        self._inverted_at: float | None = None  # the damping that they are of

    @property
    def wanted_seeds(self) -> float:
        return 8  # an example brings a row for each of its tokens or windows

    def observe(self, probes: Sequence[Probe]) -> None:
        new = {key: torch.zeros_like(total) for key, total in self.totals.items()}
        places = {slot.name: torch.zeros((), device=self.weight.device) for slot in self.slots if slot.has_rows}
        for probe in probes:
            for slot in self.slots:
                if not slot.has_rows:
                    new[f"{slot.name}.squares"] += probe.gradient[slot.place].square()
                for rows in probe.rows.get(slot.name, ()):
                    left, right = (side.flatten(0, 1).to(self.weight.device, torch.float32) for side in rows)
                    new[f"{slot.name}.left"] += left.mT @ left
                    new[f"{slot.name}.right"] += right.mT @ right
                    places[slot.name] += len(right)
        new = {key: sum_over_processes(part) for key, part in new.items()}
        for name, count in places.items():
            new[f"{name}.right"] /= sum_over_processes(count).clamp_min(1.0)
        left_over = self._age()
        self.totals = {key: total * left_over + new[key] for key, total in self.totals.items()}
        self._inverted_at = None

    def _mean(self, key: str) -> Tensor:
        total = self.totals[key]
        return total / self.weight.clamp_min(1e-12).to(total.dtype)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self._mean(f"{name}.left"), self._mean(f"{name}.right")

    def times(self, vector: Tensor) -> Tensor:
        result = torch.empty_like(vector)
        for slot in self.slots:
            part = vector[slot.place]
            if not slot.has_rows:
                result[slot.place] = self._mean(f"{slot.name}.squares") * part
                continue
            left, right = self._factors(slot.name)
            if slot.is_diagonal:
                result[slot.place] = (left * right) @ part
            else:
                result[slot.place] = (left @ part.view(slot.shape) @ right).flatten()
        return result

    def solve(self, vector: Tensor, damping: float) -> Tensor:
        self._invert(damping)
        result = torch.empty_like(vector)
        for slot in self.slots:
            part = vector[slot.place]
            if not slot.has_rows:
                result[slot.place] = part / _damped(self._mean(f"{slot.name}.squares"), damping)
            elif slot.is_diagonal:
                result[slot.place] = self._inverses[slot.name] @ part
            else:
                left, right = self._inverses[f"{slot.name}.left"], self._inverses[f"{slot.name}.right"]
                result[slot.place] = (left @ part.view(slot.shape) @ right).flatten()
        return result

    def _invert(self, damping: float) -> None:
        """Invert what has rows, damped: matrices of one size together, and without waiting for a device in between."""
        if self._inverted_at == damping:
            return
        by_size: dict[int, dict[str, Tensor]] = {}
        for slot in self.slots:
            if slot.has_rows:
                left, right = self._factors(slot.name)
                sides = {"": left * right} if slot.is_diagonal else {".left": left, ".right": right}
                by_size.setdefault(len(left), {}).update({slot.name + side: each for side, each in sides.items()})
        stacks = {size: torch.stack(list(named.values())) for size, named in by_size.items()}
        inverses, failed = {}, []
        for size, stack in stacks.items():
            factor, wrong = torch.linalg.cholesky_ex(_damped_matrices(stack, damping))
            inverses[size] = torch.cholesky_inverse(factor)
            failed.append(wrong.any())
        if failed and torch.stack(failed).any().item():  # rounding has made some of them indefinite
            inverses = {size: _inverse_by_eigenvalues(stack, damping) for size, stack in stacks.items()}
        self._inverses = {
            name: inverse
            for size, named in by_size.items()
            for name, inverse in zip(named, inverses[size], strict=True)
        }
        self._inverted_at = damping

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "totals": dict(self.totals)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weight = state["weight"].to(self.weight.device)
        self.totals = {key: state["totals"][key].to(total) for key, total in self.totals.items()}
        self._inverted_at = None


def _damped(eigenvalues: Tensor, damping: float) -> Tensor:
    """Eigenvalues `(…, n)`, raised by a share of their mean; rounding has made none of them negative."""
    eigenvalues = eigenvalues.clamp_min(0)
    return eigenvalues + (damping * eigenvalues.mean(-1, keepdim=True)).clamp_min(_LEAST)


def _damped_matrices(matrices: Tensor, damping: float) -> Tensor:
    """Symmetric matrices `(N, n, n)`, raised by a share of the mean of their eigenvalues."""
    raised = matrices.clone()
    diagonal = raised.diagonal(dim1=1, dim2=2)
    diagonal += (damping * diagonal.mean(1, keepdim=True)).clamp_min(_LEAST)
    return raised


def _inverse_by_eigenvalues(matrices: Tensor, damping: float) -> Tensor:
    """The inverses of damped matrices `(N, n, n)` whose smallest eigenvalues are rounding's."""
    values, vectors = torch.linalg.eigh(matrices)
    return (vectors / _damped(values, damping).unsqueeze(1)) @ vectors.mT


def _in_groups(rows: Tensor, examples: int) -> Tensor:
    """`(M, places, r)` as `(N, …, r)` for `N` examples.

    Windows of an image, as in Swin, are more rows than examples, and follow one another. Rows that cannot be told apart
    by example, as those sent to one expert, are all put into one group: as the probes' signs are independent, its
    square has the mean of the sum of squares.
    """
    number = examples if len(rows) % examples == 0 else 1
    return rows.reshape(number, -1, rows.shape[-1])
