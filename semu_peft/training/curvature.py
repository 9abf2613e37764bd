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
from torch.nn import functional as F

from semu_peft.gradients.core_rows import Rows
from semu_peft.gradients.processes import sum_over_processes

_LEAST = 1e-20  # where there is no curvature at all
_FLAT = 1e-6  # of the strongest layer's curvature: those of trained models are some 1e-3 of it, and more
_SMALL = 2**18  # numbers; rows above it keep a device busy by themselves, and copies of them would fill it


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
        self.total = torch.zeros(self.size, self.size, dtype=torch.float32, device=device)

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
        result = self.total.new_zeros(probe.examples, self.size)
        for slot in self.slots:
            for rows in probe.rows.get(slot.name, ()):
                left, right = (_in_groups(side, probe.examples).to(result) for side in rows[:2])
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
    damping of its own, relative to its own mean, so that no layer's scale decides over another's; but a layer that next
    to nothing depends on any more (one of saturated attention) is held back, as its gradient falls with the root of its
    curvature and its step would have no bound. Cores of one size are computed with together: there are many of them,
    and each is small.

    Source: Martens and Grosse 2015, arXiv 1503.05671, sections 3 and 6.3.
    """

    def __init__(self, slots: Sequence[CoreSlot], decay: float, device: torch.device) -> None:
        super().__init__(slots, decay, device)
        alike: dict[tuple[int, bool], list[CoreSlot]] = {}
        for slot in slots:
            if slot.has_rows:
                alike.setdefault((slot.shape[-1], slot.is_diagonal), []).append(slot)
        self._stacks = [_Stack(each, device) for each in alike.values()]
        self._squares = {
            slot.name: torch.zeros(slot.size, dtype=torch.float32, device=device) for slot in slots if not slot.has_rows
        }
        self._inverted_at: float | None = None  # the damping that the inverses are of
        self._least = torch.zeros((), dtype=torch.float32, device=device)

    @property
    def wanted_seeds(self) -> float:
        return 8  # an example brings a row for each of its tokens or windows

    def observe(self, probes: Sequence[Probe]) -> None:
        left_over = self._age()
        for stack in self._stacks:
            stack.add(probes, left_over, self.weight)
        for slot in self._slots_without_rows():
            new = torch.stack([probe.gradient[slot.place].square() for probe in probes]).sum(0)
            self._squares[slot.name] = self._squares[slot.name] * left_over + sum_over_processes(new)
        self._inverted_at = None

    def _slots_without_rows(self) -> list[CoreSlot]:
        return [slot for slot in self.slots if not slot.has_rows]

    def _mean_squares(self, slot: CoreSlot) -> Tensor:
        return self._squares[slot.name] / self.weight.clamp_min(1e-12).to(self._squares[slot.name].dtype)

    def times(self, vector: Tensor) -> Tensor:
        result = torch.empty_like(vector)
        for stack in self._stacks:
            result[stack.places] = stack.times(vector[stack.places])
        for slot in self._slots_without_rows():
            result[slot.place] = self._mean_squares(slot) * vector[slot.place]
        return result

    def solve(self, vector: Tensor, damping: float) -> Tensor:
        self._invert(damping)
        result = torch.empty_like(vector)
        for stack in self._stacks:
            result[stack.places] = stack.solve(vector[stack.places])
        for slot in self._slots_without_rows():
            result[slot.place] = vector[slot.place] / _damped(self._mean_squares(slot).clamp_min(self._least), damping)
        return result

    def _invert(self, damping: float) -> None:
        """Invert what has rows, damped, without waiting for a device in between."""
        if self._inverted_at == damping:
            return
        failed = [stack.invert(damping) for stack in self._stacks]
        if failed and torch.stack(failed).any().item():  # rounding has made some of them indefinite
            for stack in self._stacks:
                stack.invert_by_eigenvalues(damping)
        curvatures = [stack.curvature() for stack in self._stacks]
        means = [self._mean_squares(slot).mean().view(1) for slot in self._slots_without_rows()]
        self._least = _FLAT * torch.cat([*curvatures, *means]).max()
        for stack, curvature in zip(self._stacks, curvatures, strict=True):
            # As if an average direction of a core that nothing depends on cost this.
            stack.inverses[0] *= (curvature / self._least.clamp_min(_LEAST)).clamp_max(1).view(-1, 1, 1)
        self._inverted_at = damping

    def state_dict(self) -> dict[str, Any]:
        totals = {f"{name}.squares": total for name, total in self._squares.items()}
        for stack in self._stacks:
            totals |= stack.state_dict()
        return {"weight": self.weight, "totals": totals}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weight, totals = state["weight"].to(self.weight.device), state["totals"]
        self._squares = {name: totals[f"{name}.squares"].to(total) for name, total in self._squares.items()}
        for stack in self._stacks:
            stack.load_state_dict(totals, self.weight)
        self._inverted_at = None


class _Stack:
    """The factors of cores of one size, all diagonal or none.

    Attributes:
        places: `(n, r, r)`, or `(n, r)` of diagonal cores: where their numbers are in the vector of all.
    """

    def __init__(self, slots: Sequence[CoreSlot], device: torch.device) -> None:
        self.names, self.is_diagonal = [slot.name for slot in slots], slots[0].is_diagonal
        shape, self.rank = slots[0].shape, slots[0].shape[-1]
        self.places = torch.stack([torch.arange(slot.place.start, slot.place.stop).view(shape) for slot in slots])
        self.places = self.places.to(device)
        # Of the left and the right rows.
        self.totals = torch.zeros(2, len(slots), self.rank, self.rank, dtype=torch.float32, device=device)
        self.means = self.totals.clone()
        self.inverses = self.totals.clone()

    def add(self, probes: Sequence[Probe], left_over: float, weight: Tensor) -> None:
        """Add the rows of one step's probes to what is left of the sums; `weight` is that of all sums together."""
        new, counts = torch.zeros_like(self.totals), [0] * len(self.names)
        unpadded = self.totals.new_zeros(len(self.names))
        waiting: dict[torch.Size, list[tuple[int, Tensor, Tensor]]] = {}
        for probe in probes:
            for index, name in enumerate(self.names):
                for rows in probe.rows.get(name, ()):
                    left, right = (side.flatten(0, 1).to(new) for side in rows[:2])
                    if rows.counts is None:
                        counts[index] += len(right)
                    else:
                        is_token = rows.counts.reshape(-1, 1).to(new.device)
                        # An attention without a token to look at may give no number there.
                        left, right = (torch.where(is_token, side, 0.0) for side in (left, right))
                        unpadded[index] += is_token.sum()
                    if left.numel() <= _SMALL and left.shape == right.shape:
                        waiting.setdefault(left.shape, []).append((index, left, right))
                    else:
                        new[0, index] += left.mT @ left
                        new[1, index] += right.mT @ right
        for group in waiting.values():  # a product of each would take longer to be asked for than to be computed
            indices, lefts, rights = zip(*group, strict=True)
            sides = torch.stack([torch.stack(lefts), torch.stack(rights)])
            # A product with zeros and ones: `index_add_` adds in another order each time on a GPU.
            of = F.one_hot(torch.tensor(indices, device=new.device), len(self.names)).to(new)
            new += torch.einsum("gn,sgij->snij", of, sides.mT @ sides)
        new = sum_over_processes(new)
        number = sum_over_processes(torch.tensor(counts, device=new.device) + unpadded)
        new[1] /= number.clamp_min(1).view(-1, 1, 1)
        self.totals = self.totals * left_over + new
        self._take_means(weight)

    def _take_means(self, weight: Tensor) -> None:
        means = self.totals / weight.clamp_min(1e-12).to(self.totals.dtype)
        self.means = means[:1] * means[1:] if self.is_diagonal else means

    def invert(self, damping: float) -> Tensor:
        """Invert the damped means; returns whether any of them was indefinite, `()`."""
        factor, wrong = torch.linalg.cholesky_ex(_damped_matrices(self.means, damping))
        ones = torch.eye(self.rank, device=factor.device).expand_as(factor)
        root = torch.linalg.solve_triangular(factor, ones, upper=False)
        self.inverses = root.mT @ root
        return wrong.any()

    def invert_by_eigenvalues(self, damping: float) -> None:
        """Invert the damped means, whose smallest eigenvalues are rounding's."""
        values, vectors = torch.linalg.eigh(self.means)
        self.inverses = (vectors / _damped(values, damping).unsqueeze(-2)) @ vectors.mT

    def curvature(self) -> Tensor:
        """What an average direction of each core costs, `(n,)`."""
        return self.means.diagonal(dim1=-2, dim2=-1).mean(-1).prod(0)

    def times(self, parts: Tensor) -> Tensor:
        """The means on the cores' numbers, of the shape of `places`."""
        return self._between(self.means, parts)

    def solve(self, parts: Tensor) -> Tensor:
        """The inverses on them."""
        return self._between(self.inverses, parts)

    def _between(self, matrices: Tensor, parts: Tensor) -> Tensor:
        if self.is_diagonal:
            return (matrices[0] @ parts.unsqueeze(-1)).squeeze(-1)
        return matrices[0] @ parts @ matrices[1]

    def state_dict(self) -> dict[str, Tensor]:
        sides = zip(("left", "right"), self.totals.unbind(), strict=True)
        return {f"{name}.{side}": each.clone() for side, n in sides for name, each in zip(self.names, n, strict=True)}

    def load_state_dict(self, totals: Mapping[str, Tensor], weight: Tensor) -> None:
        sides = [torch.stack([totals[f"{name}.{side}"] for name in self.names]) for side in ("left", "right")]
        self.totals = torch.stack(sides).to(self.totals)
        self._take_means(weight)


def _damped(eigenvalues: Tensor, damping: float) -> Tensor:
    """Eigenvalues `(…, n)`, raised by a share of their mean; rounding has made none of them negative."""
    eigenvalues = eigenvalues.clamp_min(0)
    return eigenvalues + (damping * eigenvalues.mean(-1, keepdim=True)).clamp_min(_LEAST)


def _damped_matrices(matrices: Tensor, damping: float) -> Tensor:
    """Symmetric matrices `(…, n, n)`, raised by a share of the mean of their eigenvalues."""
    raised = matrices.clone()
    diagonal = raised.diagonal(dim1=-2, dim2=-1)
    diagonal += (damping * diagonal.mean(-1, keepdim=True)).clamp_min(_LEAST)
    return raised


def _in_groups(rows: Tensor, examples: int) -> Tensor:
    """`(M, places, r)` as `(N, …, r)` for `N` examples.

    Windows of an image, as in Swin, are more rows than examples, and follow one another. Where the tokens come first,
    as in torch's own transformers, the examples are the second dimension; a multiple of them would be windows. Rows
    that cannot be told apart by example, as those sent to one expert, are all put into one group: as the probes' signs
    are independent, its square has the mean of the sum of squares.
    """
    if len(rows) % examples and rows.shape[1] == examples:
        rows = rows.transpose(0, 1)
    number = examples if len(rows) % examples == 0 else 1
    return rows.reshape(number, -1, rows.shape[-1])
