"""Keep the forget subspace away from what the retain data would change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from semu_peft.linalg.core import LowRank, eckart_young, orthonormal
from semu_peft.linalg.energy import check_explained_variance, ranks_for_energy
from semu_peft.linalg.factorize import SingularFactors

T = TypeVar("T")

# A direction this much smaller than the largest was removed whole, but for rounding.
_REMOVED = 1e-6
# Layers are taken side by side, with so many numbers of bases in float64.
_NUMBERS_AT_ONCE = 2**26


@dataclass(frozen=True)
class RetainRule:
    """How a forget subspace keeps away from the retained data's gradients.

    - `"project"` removes from the forget basis what lies in the leading retain subspace, so that to first order a
      step of the core leaves the retain loss as it is (the idea of Geometric-disentanglement Unlearning, Zhou et al.
      2025, arXiv 2511.17100, applied to a subspace). It is enough to do so on one side: with `V ⊥ V_retain`,
      `⟨U R Vᵀ, G_retain⟩ = 0` for every core `R`.
    - `"ratio"` keeps the forget directions with the largest ratio of forget to retain energy,
      `‖G v‖² / (‖G_retain v‖² + λ)`, `λ = ‖G_retain‖² / n`: a generalised eigenproblem within the forget basis.

    Args:
        kind: `"project"` or `"ratio"`.
        explained_variance: Share of the retain gradient's energy that the retain subspace explains.
        side: For `"project"`: remove it from the `"input"` basis `V`, from the `"output"` basis `U`, or from `"both"`.

    Raises:
        ValueError: A value is outside its range.

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.factorize import leading_factors
        >>> forget = leading_factors(torch.diag(torch.tensor([3.0, 2.0, 0.0])), 1.0)
        >>> retain = leading_factors(torch.diag(torch.tensor([5.0, 0.0, 0.0])), 1.0)
        >>> RetainRule("project").apply(forget, retain, explained_variance=1.0).singular_values
        tensor([2., 0.])
    """

    kind: Literal["project", "ratio"] = "project"
    explained_variance: float = 0.9
    side: Literal["input", "output", "both"] = "input"

    def __post_init__(self) -> None:
        check_explained_variance(self.explained_variance)
        for name, choices in (("kind", ("project", "ratio")), ("side", ("input", "output", "both"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` of a RetainRule must be one of {choices}, got {getattr(self, name)!r}.")

    def apply(self, forget: SingularFactors, retain: SingularFactors, explained_variance: float) -> SingularFactors:
        """The forget directions that this rule leaves, by their energy.

        Args:
            forget: The forget gradient's leading directions, those to choose from.
            retain: The retain gradient's leading directions.
            explained_variance: γ; the ratio rule keeps the fewest directions that explain it, or all.
        """
        return self.apply_each([forget], [retain], explained_variance)[0]

    def apply_each(
        self, forget: Sequence[SingularFactors], retain: Sequence[SingularFactors], explained_variance: float
    ) -> list[SingularFactors]:
        """As [`apply`][semu_peft.subspace.retain.RetainRule.apply], for layers of one shape side by side."""
        change: Callable[..., list[SingularFactors]]
        change = (
            partial(_project, side=self.side) if self.kind == "project" else partial(_best_ratios, explained_variance)
        )
        return _side_by_side(change, forget, retain, [each.rank for each in retain], forget)


def as_rule(rule: RetainRule | str) -> RetainRule:
    """Read an argument `retain_rule`, which may be a rule or the name of one.

    Raises:
        ValueError: There is no rule of that name.
    """
    if isinstance(rule, RetainRule):
        return rule
    if rule not in ("project", "ratio"):
        raise ValueError(f"`retain_rule` must be 'project', 'ratio' or a `RetainRule`, got {rule!r}.")
    return RetainRule(rule)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Overlap:
    """How much of a forget basis lies in a retain subspace, as the cosines of their principal angles.

    Attributes:
        inputs: Between the two bases of input directions, `(min(r, r_retain),)`, descending.
        outputs: Between the two bases of output directions.

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.factorize import leading_factors
        >>> from semu_peft.subspace import Overlap
        >>> forget = leading_factors(torch.diag(torch.tensor([3.0, 2.0, 0.0])), 1.0)
        >>> retain = leading_factors(torch.diag(torch.tensor([5.0, 0.0, 0.0])), 1.0)
        >>> Overlap.between(forget, retain).inputs  # the retain direction lies in the forget basis
        tensor([1.])
    """

    inputs: Tensor
    outputs: Tensor

    @classmethod
    def between(cls, forget: SingularFactors, retain: SingularFactors) -> Overlap:
        return cls.between_each([forget], [retain])[0]

    @classmethod
    def between_each(cls, forget: Sequence[SingularFactors], retain: Sequence[SingularFactors]) -> list[Overlap]:
        """For layers of one shape side by side."""
        none = [cls(*(torch.zeros(*own.left.shape[:-2], 0) for _ in range(2))) for own in forget]
        return _side_by_side(_overlaps, forget, retain, [each.rank for each in retain], none)


def _side_by_side(
    call: Callable[[list[SingularFactors], list[Any]], list[T]],
    factors: Sequence[SingularFactors],
    others: Sequence[Any],
    ranks: Sequence[int],
    without: Sequence[T],
) -> list[T]:
    """What a function gives of layers of one shape, as many at a time as may be in memory together.

    Layers that have no directions, or whose `others`, of these ranks, have none, are left `without` it.
    """
    places = [place for place, (own, rank) in enumerate(zip(factors, ranks, strict=True)) if own.rank and rank]
    if not places:
        return list(without)
    widest = max(max(factors[place].rank, ranks[place]) for place in places)
    first = factors[places[0]]
    column = first.left[..., 0].numel() + first.right[..., 0].numel()
    step = max(1, _NUMBERS_AT_ONCE // (widest * column))
    found: dict[int, T] = {}
    for start in range(0, len(places), step):
        portion = places[start : start + step]
        each = call([factors[place] for place in portion], [others[place] for place in portion])
        found |= zip(portion, each, strict=True)
    return [found.get(place, usual) for place, usual in enumerate(without)]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """In float64, with zeros behind those that have fewer columns."""
    widest = max(tensor.shape[-1] for tensor in tensors)
    return torch.stack([pad(tensor.double(), (0, widest - tensor.shape[-1])) for tensor in tensors])


def _values(factors: Sequence[SingularFactors]) -> Tensor:
    return _stacked([each.singular_values[..., : each.rank] for each in factors])


def _overlaps(forget: Sequence[SingularFactors], retain: Sequence[SingularFactors]) -> list[Overlap]:
    inputs = _cosines([each.right for each in forget], [each.right for each in retain])
    outputs = _cosines([each.left for each in forget], [each.left for each in retain])
    return [Overlap(*pair) for pair in zip(inputs, outputs, strict=True)]


def _cosines(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    found = torch.linalg.svdvals(_stacked(first).mT @ _stacked(second)).clamp_max(1.0).float().cpu()
    numbers = [min(own.shape[-1], other.shape[-1]) for own, other in zip(first, second, strict=True)]
    return [cosines[..., :number].clone() for cosines, number in zip(found, numbers, strict=True)]


def _project(forget: Sequence[SingularFactors], retain: Sequence[SingularFactors], side: str) -> list[SingularFactors]:
    left, right = _stacked([each.left for each in forget]), _stacked([each.right for each in forget])
    if side in ("output", "both"):
        left = _outside(left, _stacked([each.left for each in retain]))
    if side in ("input", "both"):
        right = _outside(right, _stacked([each.right for each in retain]))
    return _refactored(forget, left * _values(forget).unsqueeze(-2), right, [each.rank for each in forget])


def apart_from(factors: Sequence[SingularFactors], subspaces: Sequence[tuple[Tensor, Tensor]]) -> list[SingularFactors]:
    """The directions that are left of gradients of one shape outside two subspaces, `(I − P Pᵀ) G (I − Q Qᵀ)`.

    Args:
        factors: The leading directions of each gradient.
        subspaces: Of each `P`, `(m, p)`, and `Q`, `(n, q)`: orthonormal columns, or zeros.

    Examples:
        >>> from semu_peft.linalg.factorize import leading_factors
        >>> factors = leading_factors(torch.diag(torch.tensor([3.0, 2.0])), 1.0)
        >>> apart_from([factors], [(torch.eye(2)[:, :1], torch.eye(2)[:, :1])])[0].singular_values
        tensor([2., 0.])
    """
    widths = [max(left.shape[-1], right.shape[-1]) for left, right in subspaces]
    return _side_by_side(_apart, factors, subspaces, widths, factors)


def _apart(factors: Sequence[SingularFactors], subspaces: Sequence[tuple[Tensor, Tensor]]) -> list[SingularFactors]:
    left, right = (_stacked(bases) for bases in zip(*subspaces, strict=True))
    left = _outside(_stacked([each.left for each in factors]), left)
    right = _outside(_stacked([each.right for each in factors]), right)
    return _refactored(factors, left * _values(factors).unsqueeze(-2), right, [each.rank for each in factors])


def _outside(basis: Tensor, other: Tensor) -> Tensor:
    """Each column less its part in the span of `other`; twice, for the rounding of the first time."""
    for _ in range(2):
        basis = basis - other @ (other.mT @ basis)
    return basis


def _refactored(
    origins: Sequence[SingularFactors], left: Tensor, right: Tensor, ranks: Sequence[int]
) -> list[SingularFactors]:
    """The singular value decompositions of `left rightᵀ`, `(…, m, q)` and `(…, n, q)`, as what is left of `origins`.

    Of each its first directions, as many as its rank; columns of zeros make the others.
    """
    identity = torch.eye(left.shape[-1], dtype=left.dtype, device=left.device)
    found = eckart_young(orthonormal(LowRank(left, right, identity)))
    before = _values(origins)
    values = torch.where(found.singular_values > _REMOVED * before[..., :1], found.singular_values, 0.0)
    energies = torch.stack([each.energy for each in origins]) - before.square().sum(-1)
    energies = energies.clamp_min(0) + values.square().sum(-1)
    dtype = origins[0].left.dtype
    return [
        replace(
            origin,
            left=found.left[nth, ..., :rank].to(dtype).clone(memory_format=torch.contiguous_format),
            right=found.right[nth, ..., :rank].to(dtype).clone(memory_format=torch.contiguous_format),
            singular_values=values[nth, ..., :rank].to(dtype, copy=True),
            energy=energies[nth],
        )
        for nth, (origin, rank) in enumerate(zip(origins, ranks, strict=True))
    ]


def _best_ratios(
    explained_variance: float, forget: Sequence[SingularFactors], retain: Sequence[SingularFactors]
) -> list[SingularFactors]:
    values, right = _values(forget), _stacked([each.right for each in forget])
    seen = (right.mT @ _stacked([each.right for each in retain])) * _values(retain).unsqueeze(-2)
    size, rank = right.shape[-2:]
    energies = torch.stack([each.energy for each in retain])
    floor = (energies / size).clamp_min(torch.finfo(torch.float64).tiny)
    penalty = seen @ seen.mT + floor[..., None, None] * torch.eye(rank, dtype=seen.dtype, device=seen.device)
    # max over x of (x' S² x) / (x' penalty x): whiten by the penalty, then an ordinary eigenproblem.
    lower = torch.linalg.cholesky(penalty)
    scaled = torch.linalg.solve_triangular(lower, torch.diag_embed(values), upper=False)
    directions = torch.linalg.eigh(scaled @ scaled.mT)[1].flip(-1)
    chosen = torch.linalg.qr(torch.linalg.solve_triangular(lower.mT, directions, upper=True))[0]
    weighted = values.unsqueeze(-1) * chosen  # G V = U S, along the chosen directions
    caught = weighted.square().sum(-2).sqrt()
    needed = ranks_for_energy(caught, explained_variance, torch.stack([each.energy for each in forget]))
    needed = needed.flatten(1).amax(1) if needed.dim() > 1 else needed  # channels have one rank
    is_kept = torch.arange(rank, device=needed.device) < needed.view(-1, *[1] * (weighted.dim() - 1))
    left = _stacked([each.left for each in forget]) @ weighted
    kept = _refactored(forget, left * is_kept, right @ chosen * is_kept, needed.tolist())
    # What is not chosen is still a part of the gradient.
    return [replace(each, energy=own.energy) for each, own in zip(kept, forget, strict=True)]
