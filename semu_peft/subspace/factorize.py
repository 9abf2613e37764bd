"""The leading singular directions of a gradient, and no more of them than are wanted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .ranks import check_explained_variance, rank_for_energy

# Below this side a full decomposition is quick; above it, directions are found in growing blocks until they suffice.
_SMALL_SIDE = 384
_FIRST_BLOCK = 32
_OVERSAMPLING = 8
_POWER_ITERATIONS = 2
# The Gram matrix squares the condition number: in float64 this still leaves half of float32's digits.
_GRAM_RESOLUTION = 1e-5


@dataclass(frozen=True)
class Factors:
    """Leading singular triplets of a matrix, or of each matrix in a batch, in float32 or float64.

    Attributes:
        left: `U`, `(m, r)` or `(batch, m, r)`, orthonormal columns.
        right: `V`, `(n, r)` or `(batch, n, r)`, orthonormal columns.
        singular_values: All that are known, `(k,)` or `(batch, k)`, `k ≥ r`, descending; numerically zero ones are 0.
        energy: `‖G‖_F²` of the whole matrix, `()` or `(batch,)`, float64.
        estimated: Whether all of this comes from a sketch, so that the energy is an estimate.
    """

    left: Tensor
    right: Tensor
    singular_values: Tensor
    energy: Tensor
    estimated: bool = False

    @property
    def rank(self) -> int:
        return self.left.shape[-1]

    @property
    def explained_variance(self) -> float:
        """The share of the energy that these directions hold (of the worst matrix in a batch)."""
        kept = self.singular_values[..., : self.rank].double().square().sum(-1)
        shares = torch.where(self.energy > 0, kept / self.energy.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
        return min(float(shares.min()), 1.0) if shares.numel() else 1.0

    def leading(self, rank: int) -> Factors:
        """The first `rank` directions of these."""
        return replace(
            self,
            left=self.left[..., :rank].clone(memory_format=torch.contiguous_format),
            right=self.right[..., :rank].clone(memory_format=torch.contiguous_format),
        )

    def reaching(self, explained_variance: float, max_rank: int | None = None) -> Factors:
        """As many directions as explain the share of the energy, `max_rank` at the most; none for a matrix of zeros."""
        rank = rank_for_energy(self.singular_values, explained_variance, self.energy)
        return self.leading(rank if max_rank is None else min(rank, max_rank))


def leading_factors(matrix: Tensor, explained_variance: float, max_rank: int | None = None) -> Factors:
    """Factorise a matrix, or a batch of matrices with one common rank, and keep what explains its energy.

    Three ways, by what is quickest: the eigenvectors of the small side's Gram matrix in float64; for large matrices a
    randomised subspace iteration (Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithm 4.4), in blocks that grow
    until the wanted share is reached, with a fixed seed; a full decomposition where directions are wanted that the
    others do not resolve.

    Args:
        matrix: `(m, n)` or `(batch, m, n)`, any floating dtype; half precision is factorised in float32.
        explained_variance: γ in (0, 1], see [`rank_for_energy`][semu_peft.subspace.ranks.rank_for_energy].
        max_rank: Upper bound on the rank.

    Raises:
        ValueError: The matrix holds NaN or infinite values, or γ is outside (0, 1].
    """
    check_explained_variance(explained_variance)
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if not torch.isfinite(matrix).all():
        raise ValueError("`matrix` holds NaN or infinite values.")
    small = min(matrix.shape[-2:], default=0)
    if matrix.dim() == 2 and small > _SMALL_SIDE:
        found = _growing_blocks(matrix, explained_variance, max_rank)
        if found is not None:
            return found
    if small > 0 and explained_variance < 1:
        found = _through_gram_matrix(matrix).reaching(explained_variance, max_rank)
        if _resolved(found):
            return found
    return _full(matrix).reaching(explained_variance, max_rank)


def without_noise(values: Tensor, shape: tuple[int, ...], resolution: float) -> Tensor:
    """Singular values with zeros for what rounding alone would give: it must not count as a direction (at γ = 1)."""
    noise = max(shape[-2:], default=0) * resolution * values[..., :1]
    return torch.where(values > noise, values, torch.zeros_like(values))


def _full(matrix: Tensor) -> Factors:
    left, values, right_transposed = torch.linalg.svd(matrix, full_matrices=False)
    values = without_noise(values, matrix.shape, torch.finfo(matrix.dtype).eps)
    return Factors(left, right_transposed.mT, values, values.double().square().sum(-1))


def _through_gram_matrix(matrix: Tensor) -> Factors:
    if matrix.shape[-2] > matrix.shape[-1]:
        turned = _through_gram_matrix(matrix.mT)
        return replace(turned, left=turned.right, right=turned.left)
    exact = matrix.double()
    squares, left = torch.linalg.eigh(exact @ exact.mT)
    squares, left = squares.flip(-1).clamp_min(0), left.flip(-1)
    # Rounding of the squares leaves half of float64's digits to their roots.
    resolution = max(torch.finfo(torch.float64).eps ** 0.5, torch.finfo(matrix.dtype).eps)
    values = without_noise(squares.sqrt(), matrix.shape, resolution)
    noise = _GRAM_RESOLUTION * values[..., :1]
    right = exact.mT @ left / torch.where(values > noise, values, torch.inf).unsqueeze(-2)
    energy = exact.square().sum((-2, -1))
    return Factors(left.to(matrix), right.to(matrix), values.to(matrix), energy)


def _resolved(factors: Factors) -> bool:
    """Whether all directions stand clear of what the Gram matrix rounds away."""
    if factors.rank == 0:
        return True
    largest, smallest = factors.singular_values[..., 0], factors.singular_values[..., factors.rank - 1]
    return bool((smallest > _GRAM_RESOLUTION * largest).all())


def _growing_blocks(matrix: Tensor, explained_variance: float, max_rank: int | None) -> Factors | None:
    """The leading directions by subspace iteration; None where so many are wanted that a decomposition is quicker."""
    m, n = matrix.shape
    if m > n:
        turned = _growing_blocks(matrix.mT, explained_variance, max_rank)
        return turned and replace(turned, left=turned.right, right=turned.left)
    energy = matrix.square().sum(dtype=torch.float64)
    if energy == 0:
        return _none(matrix)
    generator = torch.Generator().manual_seed(0)
    basis = matrix.new_empty(m, 0)
    width = _FIRST_BLOCK if max_rank is None else min(_FIRST_BLOCK, max_rank + _OVERSAMPLING)
    while width <= m // 4:
        fresh = torch.randn(n, width - basis.shape[1], generator=generator).to(matrix)
        basis = torch.linalg.qr(torch.cat([basis, matrix @ fresh], 1))[0]
        for _ in range(_POWER_ITERATIONS):
            rows = torch.linalg.qr(matrix.mT @ basis)[0]
            basis = torch.linalg.qr(matrix @ rows)[0]
        factors = _within(matrix, basis, energy)
        # The last directions of a block are the least exact, so they only help to find the others.
        factors = factors.leading(width - _OVERSAMPLING)
        if factors.explained_variance >= explained_variance or factors.rank >= (max_rank or m):
            found = factors.reaching(explained_variance, max_rank)
            return found if _resolved(found) else None
        if not _resolved(factors):
            return None
        width *= 2
    return None


def _within(matrix: Tensor, basis: Tensor, energy: Tensor) -> Factors:
    """The singular triplets of `Q Qᵀ G` for an orthonormal `Q`, `(m, q)`."""
    inside = _through_gram_matrix(basis.mT @ matrix)
    return replace(inside, left=basis @ inside.left, energy=energy)


def _none(matrix: Tensor) -> Factors:
    m, n = matrix.shape
    energy = matrix.new_zeros((), dtype=torch.float64)
    return Factors(matrix.new_zeros(m, 0), matrix.new_zeros(n, 0), matrix.new_zeros(0), energy)
