"""The small core's algebra, against decompositions of the dense matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from semu_peft.linalg.core import LowRank, diagonal, eckart_young, exact_svd, orthonormal, polar_factor

BATCHES = [(), (3,)]


def dense(product: LowRank) -> Tensor:
    return product.left.double() @ product.core.double() @ product.right.double().mT


def random_product(batch: tuple[int, ...], p: int = 4, q: int = 4) -> LowRank:
    return LowRank(torch.randn(*batch, 9, p), torch.randn(*batch, 7, q), torch.randn(*batch, p, q))


def is_orthonormal(basis: Tensor) -> bool:
    return torch.allclose(basis.mT @ basis, torch.eye(basis.shape[-1], dtype=basis.dtype), atol=1e-10)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("p", "q"), [(4, 4), (3, 5), (12, 12), (1, 1), (0, 0)])
def test_orthonormal_bases_of_the_same_matrix(batch: tuple[int, ...], p: int, q: int) -> None:
    """Also with more columns than the space has dimensions, and with none."""
    product = random_product(batch, p, q)
    found = orthonormal(product)
    assert is_orthonormal(found.left) and is_orthonormal(found.right)
    assert found.core.shape == (*batch, min(p, 9), min(q, 7))
    torch.testing.assert_close(dense(found), dense(product), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("batch", BATCHES)
def test_the_core_gives_the_best_approximation(batch: tuple[int, ...]) -> None:
    """Values and errors are those of the dense matrix's own decomposition, at each rank (Eckart and Young)."""
    product = orthonormal(random_product(batch))
    matrix, factors = dense(product), eckart_young(product)
    values = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(factors.singular_values, values[..., :4])
    torch.testing.assert_close(factors.energy, matrix.square().sum((-2, -1)))
    for rank in range(1, 5):
        best = diagonal(factors.leading(rank))
        assert is_orthonormal(best.left) and is_orthonormal(best.right) and best.core.shape[-1] == rank
        error = (matrix - dense(best)).square().sum((-2, -1))
        torch.testing.assert_close(error, values[..., rank:].square().sum(-1), atol=1e-10, rtol=1e-10)


def test_rounding_is_no_direction() -> None:
    """A matrix of rank 2 that was multiplied in float32 has two directions, at γ = 1 too."""
    matrix = torch.randn(40, 2) @ torch.randn(2, 30)
    factors = exact_svd(matrix)
    assert factors.reaching(1.0).rank == 2 and not factors.singular_values[2:].any()
    assert exact_svd(torch.zeros(3, 3)).reaching(1.0).rank == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("batch", BATCHES)
def test_the_polar_factor_is_the_nearest_orthonormal_matrix(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    """It is a fixed point of itself, and no other orthonormal matrix is nearer."""
    matrix = torch.linalg.qr(torch.randn(*batch, 8, 3, dtype=torch.float64))[0].to(dtype)
    found = polar_factor(matrix)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    identity = torch.eye(3, dtype=found.dtype).expand(*batch, 3, 3)
    torch.testing.assert_close(found.mT @ found, identity, atol=1e-5, rtol=0)
    torch.testing.assert_close(polar_factor(found), found, atol=1e-5, rtol=0)
    distance = (found - matrix.to(found.dtype)).norm()
    for _ in range(20):
        other = torch.linalg.qr(found + 0.05 * torch.randn_like(found))[0]
        other = other * (other * found).sum(-2, keepdim=True).sign()
        assert (other - matrix.to(found.dtype)).norm() >= distance


def test_the_polar_factor_of_no_columns() -> None:
    """As an adapter has it that waits for its bases."""
    assert polar_factor(torch.zeros(5, 0)).shape == (5, 0)
