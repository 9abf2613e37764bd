"""The leading singular directions of a gradient, and no more of them than are wanted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .energy import (
    check_explained_variance,
    largest_magnitudes,
    rank_for_energy,
    ranks_for_energy,
    squared_norm,
    without_noise,
)
from .gram import gram_spectrum, inverse, resolved
from .krylov import krylov_factors

# Below this side a decomposition of the Gram matrix is quick; above it, directions are found block by block.
_SMALL_SIDE = 256
# Matrices are copied, for a decomposition of all of them, so many numbers at a time.
_NUMBERS_AT_ONCE = 2**24


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
        return explained_variances([self])[0]

    def leading(self, rank: int) -> SingularFactors:
        """The first `rank` directions of these."""
        return replace(
            self,
            left=self.left[..., :rank].clone(memory_format=torch.contiguous_format),
            right=self.right[..., :rank].clone(memory_format=torch.contiguous_format),
        )

    def beyond(self, rank: int) -> SingularFactors:
        """What is left of the matrix without its first `rank` directions, and these of it that are known here.

        Examples:
            >>> import torch
            >>> left = leading_factors(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 1.0).beyond(1)
            >>> left.rank, left.singular_values.tolist(), float(left.energy)
            (2, [2.0, 1.0], 5.0)
        """
        squares = self.singular_values.double().square()
        known = squares[..., rank:].sum(-1)
        return replace(
            self,
            left=self.left[..., rank:].clone(memory_format=torch.contiguous_format),
            right=self.right[..., rank:].clone(memory_format=torch.contiguous_format),
            singular_values=self.singular_values[..., rank:].clone(),
            energy=torch.maximum(self.energy - squares[..., :rank].sum(-1), known),
        )

    def reaching(self, explained_variance: float, max_rank: int | None = None) -> SingularFactors:
        """As many directions as explain the share of the energy, `max_rank` at the most; none for a matrix of zeros."""
        rank = rank_for_energy(self.singular_values, explained_variance, self.energy)
        return self.leading(rank if max_rank is None else min(rank, max_rank))


def explained_variances(each: Sequence[SingularFactors]) -> list[float]:
    """The share of the energy that the directions hold, of each (of the worst matrix in a batch).

    The host waits once, where all are on one device.

    Examples:
        >>> import torch
        >>> both = [leading_factors(torch.diag(torch.tensor([2.0, 1.0])), share) for share in (0.5, 1.0)]
        >>> explained_variances(both)
        [0.8, 1.0]
    """
    if not each:
        return []
    worst = []
    for factors in each:
        kept = factors.singular_values[..., : factors.rank].double().square().sum(-1)
        tiny = torch.finfo(torch.float64).tiny
        shares = torch.where(factors.energy > 0, kept / factors.energy.clamp_min(tiny), 1.0)
        worst.append(shares.min() if shares.numel() else shares.new_ones(()))
    return [min(share, 1.0) for share in torch.stack([share.to(worst[0].device) for share in worst]).tolist()]


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
    return leading_factors_of_each([matrix], explained_variance, max_rank)[0]


def leading_factors_of_each(
    matrices: Sequence[Tensor], explained_variance: float, max_rank: int | None = None
) -> list[SingularFactors]:
    """Factorise many matrices of one shape side by side, each as `leading_factors` does, with a rank of its own.

    On an accelerator small decompositions one by one, and a host that waits for each, cost far more than the products.
    Here neither their number nor how often the host waits grows with the number of matrices, as long as these are
    alike and not so large that they are taken in several portions.

    Args:
        matrices: All `(m, n)`, or all `(batch, m, n)`, of one dtype on one device.
        explained_variance: γ in (0, 1].
        max_rank: Upper bound on the rank.

    Raises:
        ValueError: A matrix holds NaN or infinite values, their shapes differ, or γ is outside (0, 1].

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.factorize import leading_factors_of_each
        >>> each = [torch.diag(torch.tensor(values)) for values in ([3.0, 1.0], [1.0, 1.0])]
        >>> [factors.rank for factors in leading_factors_of_each(each, explained_variance=0.9)]
        [1, 2]
    """
    check_explained_variance(explained_variance)
    if len(shapes := {matrix.shape for matrix in matrices}) > 1:
        raise ValueError(f"`matrices` must have one shape, got {sorted(map(tuple, shapes))}. Group them by shape.")
    matrices = [matrix.to(torch.promote_types(matrix.dtype, torch.float32)) for matrix in matrices]
    largest = largest_magnitudes(matrices)
    if not all(math.isfinite(each) for each in largest):
        raise ValueError("`matrix` must be finite, got NaN or infinite values.")
    found: dict[int, SingularFactors] = {}
    small = min(matrices[0].shape[-2:], default=0) if matrices else 0
    if small > _SMALL_SIDE and matrices[0].dim() == 2:
        found = _through_krylov_spaces(matrices, largest, explained_variance, max_rank)
    if small > 0 and explained_variance < 1:
        for portion in _portions(matrices, found):
            found |= _through_gram_matrices(matrices, portion, explained_variance, max_rank)
    for portion in _portions(matrices, found):
        found |= _full(matrices, portion, explained_variance, max_rank)
    return [found[index] for index in range(len(matrices))]


def _portions(matrices: Sequence[Tensor], found: dict[int, SingularFactors]) -> Iterator[list[int]]:
    """The matrices that have not been factorised yet, as many at a time as may be copied together."""
    missing = [index for index in range(len(matrices)) if index not in found]
    step = max(1, _NUMBERS_AT_ONCE // max(1, matrices[0].numel())) if matrices else 1
    for start in range(0, len(missing), step):
        yield missing[start : start + step]


def _through_krylov_spaces(
    matrices: Sequence[Tensor], largest: Sequence[float], explained_variance: float, max_rank: int | None
) -> dict[int, SingularFactors]:
    found = {index: _none(matrices[index]) for index, each in enumerate(largest) if each == 0}
    wanted = [index for index in range(len(matrices)) if index not in found]
    if not wanted:
        return found
    # So that squares neither vanish nor overflow: 1 for all but the strangest gradients.
    scales = [1.0 if 1e-10 < largest[index] < 1e10 else largest[index] for index in wanted]
    scaled = [
        matrices[index] if scale == 1 else matrices[index] / scale for index, scale in zip(wanted, scales, strict=True)
    ]
    energies = torch.stack([squared_norm(matrix) for matrix in scaled])
    each = krylov_factors(scaled, energies, explained_variance, max_rank)
    for index, scale, energy, triplets in zip(wanted, scales, energies, each, strict=True):
        if triplets is not None:
            values = triplets.values if scale == 1 else triplets.values * scale
            found[index] = SingularFactors(triplets.left, triplets.right, values, energy * scale**2)
    return found


def _through_gram_matrices(
    matrices: Sequence[Tensor], portion: list[int], explained_variance: float, max_rank: int | None
) -> dict[int, SingularFactors]:
    """Those of the portion whose directions the Gram matrix of the small side resolves."""
    like = matrices[0]
    turned = like.shape[-2] > like.shape[-1]
    exact = torch.stack([matrices[index].mT if turned else matrices[index] for index in portion]).double()
    values, left = gram_spectrum(exact @ exact.mT, like.shape, like.dtype)
    ranks = ranks_for_energy(values, explained_variance)
    ranks = ranks.clamp_max(max_rank) if max_rank is not None else ranks
    common = ranks.flatten(1).amax(1) if ranks.dim() > 1 else ranks
    clear = resolved(values, common.view(-1, *[1] * (ranks.dim() - 1)))
    report = torch.stack([common, clear.flatten(1).all(1) if clear.dim() > 1 else clear], 1).tolist()
    weights = left * inverse(values).unsqueeze(-2)
    found = {}
    for nth, (index, (rank, is_clear)) in enumerate(zip(portion, report, strict=True)):
        if is_clear:
            bases = left[nth, ..., :rank], exact[nth].mT @ weights[nth, ..., :rank]
            found[index] = _factors(bases[::-1] if turned else bases, values[nth], like.dtype)
    return found


def _full(
    matrices: Sequence[Tensor], portion: list[int], explained_variance: float, max_rank: int | None
) -> dict[int, SingularFactors]:
    like = matrices[0]
    left, values, right_transposed = torch.linalg.svd(torch.stack([matrices[i] for i in portion]), full_matrices=False)
    values = without_noise(values, like.shape, torch.finfo(like.dtype).eps)
    ranks = ranks_for_energy(values, explained_variance)
    ranks = ranks.clamp_max(max_rank) if max_rank is not None else ranks
    common = (ranks.flatten(1).amax(1) if ranks.dim() > 1 else ranks).tolist()
    return {
        index: _factors((left[nth, ..., :rank], right_transposed.mT[nth, ..., :rank]), values[nth], like.dtype)
        for nth, (index, rank) in enumerate(zip(portion, common, strict=True))
    }


def _factors(bases: tuple[Tensor, Tensor], values: Tensor, dtype: torch.dtype) -> SingularFactors:
    """In memory of their own, so that they do not keep the whole decomposition alive."""
    left, right = (basis.to(dtype).clone(memory_format=torch.contiguous_format) for basis in bases)
    return SingularFactors(left, right, values.to(dtype, copy=True), values.double().square().sum(-1))


def _none(matrix: Tensor) -> SingularFactors:
    m, n = matrix.shape
    energy = matrix.new_zeros((), dtype=torch.float64)
    return SingularFactors(matrix.new_zeros(m, 0), matrix.new_zeros(n, 0), matrix.new_zeros(0), energy)
