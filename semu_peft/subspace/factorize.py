"""The leading singular directions of a gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .ranks import rank_for_energy


@dataclass(frozen=True)
class Factors:
    """The leading part of a singular value decomposition, in float32 or float64.

    Attributes:
        left: `U`, `(m, r)` or `(batch, m, r)`, orthonormal columns.
        right: `V`, `(n, r)` or `(batch, n, r)`, orthonormal columns.
        singular_values: All of them, `(min(m, n),)` or `(batch, min(m, n))`, descending; numerically zero ones are 0.
        explained_variance: The share of the energy that the kept directions hold (of the worst matrix in a batch).
    """

    left: Tensor
    right: Tensor
    singular_values: Tensor
    explained_variance: float

    @property
    def rank(self) -> int:
        return self.left.shape[-1]


def leading_factors(matrix: Tensor, explained_variance: float, max_rank: int | None = None) -> Factors:
    """Factorise a matrix, or a batch of matrices with one common rank, and keep what explains its energy.

    Args:
        matrix: `(m, n)` or `(batch, m, n)`, any floating dtype; half precision is factorised in float32.
        explained_variance: γ in (0, 1], see [`rank_for_energy`][semu_peft.subspace.ranks.rank_for_energy].
        max_rank: Upper bound on the rank.

    Raises:
        ValueError: The matrix holds NaN or infinite values, or γ is outside (0, 1].
    """
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if not torch.isfinite(matrix).all():
        raise ValueError("`matrix` holds NaN or infinite values.")
    left, values, right_transposed = torch.linalg.svd(matrix, full_matrices=False)
    # What rounding alone would give must not count as a direction of its own (it would at γ = 1).
    noise = max(matrix.shape[-2:], default=0) * torch.finfo(matrix.dtype).eps * values[..., :1]
    values = torch.where(values > noise, values, torch.zeros_like(values))
    rank = rank_for_energy(values, explained_variance)
    rank = rank if max_rank is None else min(rank, max_rank)
    return Factors(left[..., :rank].clone(), right_transposed.mT[..., :rank].clone(), values, _share(values, rank))


def _share(values: Tensor, rank: int) -> float:
    energy = values.double().square()
    total = energy.sum(-1)
    shares = torch.where(total > 0, energy[..., :rank].sum(-1) / total.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    return float(shares.min()) if shares.numel() else 1.0
