"""Keep the forget subspace away from what the retain data would change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from semu_peft.linalg.core import LowRank, eckart_young, orthonormal
from semu_peft.linalg.energy import check_explained_variance, rank_for_energy
from semu_peft.linalg.factorize import SingularFactors

# A direction this much smaller than the largest was removed whole, but for rounding.
_REMOVED = 1e-6


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
        if forget.rank == 0 or retain.rank == 0:
            return forget
        if self.kind == "project":
            return _project(forget, retain, self.side)
        return _best_ratios(forget, retain, explained_variance)


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
        return cls(_cosines(forget.right, retain.right), _cosines(forget.left, retain.left))


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    return torch.linalg.svdvals(first.double().mT @ second.double()).clamp_max(1.0).float().cpu()


def _project(forget: SingularFactors, retain: SingularFactors, side: str) -> SingularFactors:
    left, right = forget.left.double(), forget.right.double()
    values = forget.singular_values[..., : forget.rank].double()
    if side in ("output", "both"):
        left = _outside(left, retain.left.double())
    if side in ("input", "both"):
        right = _outside(right, retain.right.double())
    return _refactored(forget, left * values.unsqueeze(-2), right)


def apart_from(factors: SingularFactors, left: Tensor, right: Tensor) -> SingularFactors:
    """The directions that are left of a gradient outside two subspaces, `(I − P Pᵀ) G (I − Q Qᵀ)`.

    Args:
        factors: The gradient's leading directions.
        left: `P`, `(m, p)`, orthonormal columns, or zeros.
        right: `Q`, `(n, q)`.

    Examples:
        >>> from semu_peft.linalg.factorize import leading_factors
        >>> factors = leading_factors(torch.diag(torch.tensor([3.0, 2.0])), 1.0)
        >>> apart_from(factors, torch.eye(2)[:, :1], torch.eye(2)[:, :1]).singular_values
        tensor([2., 0.])
    """
    if factors.rank == 0:
        return factors
    values = factors.singular_values[..., : factors.rank].double()
    outputs = _outside(factors.left.double(), left.double())
    inputs = _outside(factors.right.double(), right.double())
    return _refactored(factors, outputs * values.unsqueeze(-2), inputs)


def _outside(basis: Tensor, other: Tensor) -> Tensor:
    """Each column less its part in the span of `other`; twice, for the rounding of the first time."""
    for _ in range(2):
        basis = basis - other @ (other.mT @ basis)
    return basis


def _refactored(origin: SingularFactors, left: Tensor, right: Tensor) -> SingularFactors:
    """The singular value decomposition of `left rightᵀ`, `(m, q)` and `(n, q)`, as what is left of `origin`."""
    identity = torch.eye(left.shape[-1], dtype=left.dtype, device=left.device)
    found = eckart_young(orthonormal(LowRank(left, right, identity)))
    noise = _REMOVED * origin.singular_values[..., :1].double()
    values = torch.where(found.singular_values > noise, found.singular_values, 0.0)
    known = origin.singular_values[..., : origin.rank].double().square().sum(-1)
    energy = (origin.energy - known).clamp_min(0) + values.square().sum(-1)
    dtype = origin.left.dtype
    return replace(
        origin,
        left=found.left.to(dtype),
        right=found.right.to(dtype),
        singular_values=values.to(dtype),
        energy=energy,
    )


def _best_ratios(forget: SingularFactors, retain: SingularFactors, explained_variance: float) -> SingularFactors:
    values = forget.singular_values[..., : forget.rank].double()
    right = forget.right.double()
    seen = (right.mT @ retain.right.double()) * retain.singular_values[..., : retain.rank].double().unsqueeze(-2)
    size = right.shape[-2]
    floor = (retain.energy / size).clamp_min(torch.finfo(torch.float64).tiny)
    penalty = seen @ seen.mT + floor[..., None, None] * torch.eye(forget.rank, dtype=seen.dtype, device=seen.device)
    # max over x of (x' S² x) / (x' penalty x): whiten by the penalty, then an ordinary eigenproblem.
    lower = torch.linalg.cholesky(penalty)
    scaled = torch.linalg.solve_triangular(lower, torch.diag_embed(values), upper=False)
    directions = torch.linalg.eigh(scaled @ scaled.mT)[1].flip(-1)
    chosen = torch.linalg.qr(torch.linalg.solve_triangular(lower.mT, directions, upper=True))[0]
    weighted = values.unsqueeze(-1) * chosen  # G V = U S, along the chosen directions
    caught = weighted.square().sum(-2).sqrt()
    rank = rank_for_energy(caught, explained_variance, forget.energy)
    return _refactored(forget, forget.left.double() @ weighted[..., :rank], right @ chosen[..., :rank])
