"""A matrix `U R Vᵀ` by its small core `R`: orthonormal bases for it, and its leading singular directions."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .energy import without_noise
from .factorize import SingularFactors


class LowRank(NamedTuple):
    """A matrix `U R Vᵀ`, or a batch of them.

    Attributes:
        left: `U`, `(m, p)` or `(batch, m, p)`.
        right: `V`, `(n, q)` or `(batch, n, q)`.
        core: `R`, `(p, q)` or `(batch, p, q)`.
    """

    left: Tensor
    right: Tensor
    core: Tensor


def orthonormal(product: LowRank) -> LowRank:
    """The same matrix with orthonormal bases, in float64.

    With `U = Q_u T_u` and `V = Q_v T_v` it is `Q_u (T_u R T_vᵀ) Q_vᵀ`. The new core is square unless one of the bases
    has more columns than its space has dimensions.

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.core import LowRank, orthonormal
        >>> product = LowRank(torch.ones(3, 2), torch.eye(4, 2), torch.eye(2))
        >>> left, right, core = orthonormal(product)
        >>> torch.allclose(left.mT @ left, torch.eye(2).double())
        True
        >>> torch.allclose(left @ core @ right.mT, (torch.ones(3, 2) @ torch.eye(2, 4)).double())
        True
    """
    left, left_mix = torch.linalg.qr(product.left.double())
    right, right_mix = torch.linalg.qr(product.right.double())
    return LowRank(left, right, left_mix @ product.core.double() @ right_mix.mT)


def exact_svd(matrix: Tensor) -> SingularFactors:
    """The singular value decomposition of a small matrix, or a batch of them, in float64.

    Singular values below the rounding of the dtype that the matrix comes in, float32 at the best, are 0.

    Args:
        matrix: `(m, n)` or `(batch, m, n)`, any floating dtype.

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.core import exact_svd
        >>> exact_svd(torch.diag(torch.tensor([3.0, 2.0, 1e-9]))).singular_values
        tensor([3., 2., 0.], dtype=torch.float64)
    """
    left, values, right_transposed = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = without_noise(values, matrix.shape, torch.finfo(torch.float32).eps)
    return SingularFactors(left, right_transposed.mT, values, values.square().sum(-1))


def eckart_young(product: LowRank) -> SingularFactors:
    """The singular value decomposition of `U R Vᵀ` with orthonormal bases, from that of its core alone, in float64.

    With `R = P Σ Qᵀ` it is `(U P) Σ (V Q)ᵀ`. Its leading directions are the best approximation of that rank (Eckart
    and Young, *The approximation of one matrix by another of lower rank*, 1936).

    Args:
        product: The matrix; see [`orthonormal`][semu_peft.linalg.core.orthonormal] where its bases are not.

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.core import LowRank, diagonal, eckart_young
        >>> basis = torch.linalg.qr(torch.randn(5, 2))[0]
        >>> factors = eckart_young(LowRank(basis, basis, torch.diag(torch.tensor([1.0, 2.0]))))
        >>> diagonal(factors.leading(1)).core
        tensor([[2.]], dtype=torch.float64)
    """
    inner = exact_svd(product.core)
    return replace(inner, left=product.left.double() @ inner.left, right=product.right.double() @ inner.right)


def diagonal(factors: SingularFactors) -> LowRank:
    """Singular directions as `U Σ Vᵀ` with the diagonal core `Σ` of those that are kept."""
    return LowRank(factors.left, factors.right, torch.diag_embed(factors.singular_values[..., : factors.rank]))


def polar_factor(matrix: Tensor) -> Tensor:
    """The matrix with orthonormal columns that is nearest to a given one, `(m, r)` or `(batch, m, r)`, `m ≥ r`.

    With `A = U Σ Vᵀ` it is `U Vᵀ`, in float32 or better.

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.core import polar_factor
        >>> polar_factor(torch.tensor([[2.0, 0.0], [0.0, 0.5]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    left, _, right_transposed = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right_transposed
