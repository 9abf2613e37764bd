"""The leading singular directions of a gradient, and no more of them than are wanted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .energy import (
    check_explained_variance,
    largest_magnitude,
    rank_for_energy,
    squared_norm,
    without_noise,
)

# Below this side a decomposition of the Gram matrix is quick; above it, directions are found block by block.
_SMALL_SIDE = 256
_BLOCK = 32
_OVERSAMPLING = 8
# Directions have settled once one more block changes neither their number nor their energy by more than this.
_SETTLED = 0.02
# The Gram matrix squares the condition number: in float64 this still leaves half of float32's digits.
_GRAM_RESOLUTION = 1e-5


@dataclass(frozen=True)
class SingularFactors:
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

    def leading(self, rank: int) -> SingularFactors:
        """The first `rank` directions of these."""
        return replace(
            self,
            left=self.left[..., :rank].clone(memory_format=torch.contiguous_format),
            right=self.right[..., :rank].clone(memory_format=torch.contiguous_format),
        )

    def reaching(self, explained_variance: float, max_rank: int | None = None) -> SingularFactors:
        """As many directions as explain the share of the energy, `max_rank` at the most; none for a matrix of zeros."""
        rank = rank_for_energy(self.singular_values, explained_variance, self.energy)
        return self.leading(rank if max_rank is None else min(rank, max_rank))


def leading_factors(matrix: Tensor, explained_variance: float, max_rank: int | None = None) -> SingularFactors:
    """Factorise a matrix, or a batch of matrices with one common rank, and keep what explains its energy.

    Three ways, by what is quickest: the eigenvectors of the small side's Gram matrix in float64; for large matrices a
    randomised block Krylov space (Musco and Musco 2015, arXiv 1504.05477, algorithm 2) that grows until the directions
    of the wanted share have settled, with a fixed seed; a full decomposition where directions are wanted that the
    others do not resolve.

    Args:
        matrix: `(m, n)` or `(batch, m, n)`, any floating dtype; half precision is factorised in float32.
        explained_variance: γ in (0, 1], see [`rank_for_energy`][semu_peft.linalg.energy.rank_for_energy].
        max_rank: Upper bound on the rank.

    Raises:
        ValueError: The matrix holds NaN or infinite values, or γ is outside (0, 1].
    """
    check_explained_variance(explained_variance)
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    largest = largest_magnitude(matrix)
    if not math.isfinite(largest):
        raise ValueError("`matrix` must be finite, got NaN or infinite values.")
    small = min(matrix.shape[-2:], default=0)
    if matrix.dim() == 2 and small > _SMALL_SIDE:
        # So that squares neither vanish nor overflow: 1 for all but the strangest gradients.
        scale = 1.0 if largest == 0 or 1e-10 < largest < 1e10 else largest
        scaled = matrix if scale == 1 else matrix / scale
        found = _block_krylov(scaled, squared_norm(scaled), explained_variance, max_rank)
        if found is not None:
            return replace(found, singular_values=found.singular_values * scale, energy=found.energy * scale**2)
    if small > 0 and explained_variance < 1:
        found = _through_gram_matrix(matrix).reaching(explained_variance, max_rank)
        if _resolved(found.singular_values, found.rank):
            return found
    return _full(matrix).reaching(explained_variance, max_rank)


def _full(matrix: Tensor) -> SingularFactors:
    left, values, right_transposed = torch.linalg.svd(matrix, full_matrices=False)
    values = without_noise(values, matrix.shape, torch.finfo(matrix.dtype).eps)
    return SingularFactors(left, right_transposed.mT, values, values.double().square().sum(-1))


def _through_gram_matrix(matrix: Tensor) -> SingularFactors:
    if matrix.shape[-2] > matrix.shape[-1]:
        turned = _through_gram_matrix(matrix.mT)
        return replace(turned, left=turned.right, right=turned.left)
    exact = matrix.double()
    values, left = _spectrum(exact @ exact.mT, matrix)
    right = exact.mT @ (left * _inverse(values).unsqueeze(-2))
    return SingularFactors(left.to(matrix), right.to(matrix), values.to(matrix), values.square().sum(-1))


def _spectrum(gram: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, descending, and left vectors of the matrix `A` from `A Aᵀ`, all in float64."""
    squares, left = torch.linalg.eigh(gram)
    # Rounding of the squares leaves half of float64's digits to their roots.
    resolution = max(torch.finfo(torch.float64).eps ** 0.5, torch.finfo(matrix.dtype).eps)
    values = without_noise(squares.flip(-1).clamp_min(0).sqrt(), matrix.shape, resolution)
    return values, left.flip(-1)


def _inverse(values: Tensor) -> Tensor:
    """One over each singular value; zero for those that the Gram matrix does not resolve."""
    return torch.where(values > _GRAM_RESOLUTION * values[..., :1], 1 / values, 0)


def _resolved(values: Tensor, rank: int) -> bool:
    """Whether the first `rank` singular values stand clear of what the Gram matrix rounds away."""
    return rank == 0 or bool((values[..., rank - 1] > _GRAM_RESOLUTION * values[..., 0]).all())


def _block_krylov(
    matrix: Tensor, energy: Tensor, explained_variance: float, max_rank: int | None
) -> SingularFactors | None:
    """The leading directions within a growing Krylov space; None where a full decomposition is quicker or needed.

    Each block costs one product with the matrix and one with its transpose, which also is what the next block starts
    from: nothing is ever multiplied again.
    """
    m, n = matrix.shape
    if m > n:
        turned = _block_krylov(matrix.mT, energy, explained_variance, max_rank)
        return turned and replace(turned, left=turned.right, right=turned.left)
    if energy == 0:
        return _none(matrix)
    if explained_variance == 1 and (max_rank or m) > m // 2:
        return None
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(n, _BLOCK, generator=generator).to(matrix)
    basis, rows = matrix.new_empty(m, 0), matrix.new_empty(n, 0, dtype=torch.float64)
    gram = rows.mT @ rows
    last = None
    while basis.shape[1] + _BLOCK <= m // 2:
        fresh = _orthonormal_beyond(basis, matrix @ torch.nn.functional.normalize(seen, dim=0))
        seen = (fresh.mT @ matrix).mT
        basis, rows = torch.cat([basis, fresh], 1), torch.cat([rows, seen.double()], 1)
        beside = rows.mT @ rows[:, -_BLOCK:]
        gram = torch.cat([torch.cat([gram, beside[:-_BLOCK].mT]), beside], 1)
        if gram.trace() < explained_variance * energy and basis.shape[1] < (max_rank or m) + _OVERSAMPLING:
            continue
        values, inside = _spectrum(gram, matrix)
        rank = min(rank_for_energy(values, explained_variance, energy), max_rank or m)
        if not _resolved(values, rank):
            return None
        now = (rank, float(values[:rank].square().sum()))
        if last is not None and _settled(now, last):
            right = rows @ (inside * _inverse(values))[:, :rank]
            left = basis @ inside[:, :rank].to(matrix)
            return SingularFactors(left, right.to(matrix), values.to(matrix), energy)
        last = now
    return None


def _settled(now: tuple[int, float], last: tuple[int, float]) -> bool:
    """Whether one more block found the same number of directions, with the same energy, but for a small share."""
    return now[0] >= (1 - _SETTLED) * last[0] and now[1] <= (1 + _SETTLED) * last[1]


def _orthonormal_beyond(basis: Tensor, block: Tensor) -> Tensor:
    """Orthonormal columns for what `block` adds to `basis`.

    The second projection takes off what rounding left in the first. The third is for a block that adds next to nothing,
    as where singular values repeat: its columns are rounding errors, scaled up.
    """
    for _ in range(3):
        block = torch.linalg.qr(block - basis @ (basis.mT @ block))[0]
    return block


def _none(matrix: Tensor) -> SingularFactors:
    m, n = matrix.shape
    energy = matrix.new_zeros((), dtype=torch.float64)
    return SingularFactors(matrix.new_zeros(m, 0), matrix.new_zeros(n, 0), matrix.new_zeros(0), energy)
