"""The rank rule and the factorisation, at their edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semu_peft.linalg.energy import rank_for_energy
from semu_peft.linalg.factorize import leading_factors


@pytest.mark.parametrize(
    ("values", "gamma", "rank"),
    [
        ([3.0, 1.0], 0.9, 1),  # exactly 9 of 10
        ([3.0, 1.0], math.nextafter(0.9, 1), 2),
        ([3.0, 1.0], 1.0, 2),
        ([2.0, 2.0, 2.0, 2.0], 0.5, 2),  # repeated: exactly half
        ([2.0, 2.0, 2.0, 2.0], 0.5000001, 3),
        ([2.0, 2.0, 2.0, 2.0], 0.25, 1),
        ([2.0, 2.0, 2.0, 2.0], 1.0, 4),
        ([5.0, 1.0, 0.0, 0.0], 1.0, 2),  # zeros are no directions
        ([5.0, 1.0, 1.0], 1e-12, 1),
        ([5.0], 0.3, 1),
        ([1e-30, 1e-31], 1.0, 2),
        ([1e30, 1e29], 0.9, 1),
        ([0.0, 0.0], 1.0, 0),
        ([0.0], 1e-3, 0),
        ([], 0.9, 0),
    ],
)
def test_rank_for_energy(values: list[float], gamma: float, rank: int) -> None:
    """The smallest r ≥ 1 that holds the share, equality counting; 0 where there is nothing."""
    assert rank_for_energy(torch.tensor(values), gamma) == rank


def test_rank_of_a_batch_is_the_largest() -> None:
    """One rank for all matrices: that of the one that needs most; zero matrices need none."""
    batch = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert rank_for_energy(batch, 0.9) == 3
    assert rank_for_energy(batch[:2], 0.9) == 1
    assert rank_for_energy(batch[1:2], 0.9) == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=st.lists(st.integers(0, 50), min_size=1, max_size=12),
    gamma=st.integers(1, 64).map(lambda k: k / 64),
)
def test_rank_is_the_definition(values: list[int], gamma: float) -> None:
    """For integer singular values and a binary γ, where all is exact: γ is met, and by no smaller rank."""
    values = sorted(values, reverse=True)
    rank = rank_for_energy(torch.tensor(values, dtype=torch.float32), gamma)
    energy, total = [v * v for v in values], sum(v * v for v in values)
    if total == 0:
        assert rank == 0
        return
    assert rank >= 1 and sum(energy[:rank]) >= gamma * total
    assert rank == 1 or sum(energy[: rank - 1]) < gamma * total


@pytest.mark.parametrize("gamma", [0.0, -0.5, 1.0001, float("nan"), float("inf")])
def test_gamma_outside_its_range(gamma: float) -> None:
    """Refused by name."""
    with pytest.raises(ValueError, match="explained_variance"):
        rank_for_energy(torch.ones(3), gamma)


def matrix_with(values: list[float], m: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An `m × n` matrix with these singular values."""
    left = torch.linalg.qr(torch.randn(m, len(values), dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64))[0]
    return (left * torch.tensor(values, dtype=torch.float64) @ right.T).to(dtype)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (1, 4), (4, 1), (1, 1)])
@pytest.mark.parametrize("gamma", [0.5, 0.99, 1.0])
def test_factors_are_orthonormal_and_the_best_approximation(shape: tuple[int, int], gamma: float) -> None:
    """UᵀU = VᵀV = 1, and U Uᵀ G V Vᵀ misses G by exactly the energy left out, which is at most 1 − γ."""
    matrix = torch.randn(shape)
    factors = leading_factors(matrix, gamma)
    for basis in (factors.left, factors.right):
        torch.testing.assert_close(basis.T @ basis, torch.eye(factors.rank), atol=1e-5, rtol=0)
        assert basis.untyped_storage().nbytes() == basis.numel() * 4, "keeps the full decomposition in memory"
    kept = factors.left @ (factors.left.T @ matrix @ factors.right) @ factors.right.T
    total = matrix.norm() ** 2
    left_out = float((matrix - kept).norm() ** 2 / total)
    assert left_out <= 1 - gamma + 1e-6
    assert factors.explained_variance == pytest.approx(1 - left_out, abs=1e-5)
    assert factors.singular_values.shape == (min(shape),)
    torch.testing.assert_close(factors.singular_values, torch.linalg.svdvals(matrix), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_rank_deficient_matrix(gamma: float) -> None:
    """Rounding noise is not a direction: at γ = 1 a matrix of rank 3 gets 3 columns, and zero values are zero."""
    factors = leading_factors(matrix_with([4.0, 2.0, 1.0], 40, 30), gamma)
    assert factors.rank == (3 if gamma == 1.0 else 2)
    assert factors.singular_values.count_nonzero() == 3


def test_repeated_singular_values() -> None:
    """A plane of equal singular values is found as a plane."""
    matrix = matrix_with([2.0, 2.0, 1e-3], 8, 6)
    factors = leading_factors(matrix, 0.99)
    assert factors.rank == 2
    expected = torch.linalg.svd(matrix)[0][:, :2]
    torch.testing.assert_close(factors.left @ factors.left.T, expected @ expected.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3)])
def test_zero_matrix(shape: tuple[int, ...]) -> None:
    """No direction, no failure."""
    factors = leading_factors(torch.zeros(shape), 1.0)
    assert factors.rank == 0 and factors.explained_variance == 1.0
    assert factors.left.shape == (*shape[:-2], 4, 0) and factors.right.shape == (*shape[:-2], 3, 0)


def test_batch() -> None:
    """Matrix by matrix, with one rank; each basis orthonormal, also where its own matrix has a smaller rank."""
    batch = torch.stack([matrix_with([3.0, 2.0, 1.0], 6, 5), matrix_with([1.0], 6, 5), torch.zeros(6, 5)])
    factors = leading_factors(batch, 1.0)
    assert factors.rank == 3 and factors.left.shape == (3, 6, 3) and factors.right.shape == (3, 5, 3)
    identity = torch.eye(3).expand(3, 3, 3)
    torch.testing.assert_close(factors.left.mT @ factors.left, identity, atol=1e-5, rtol=0)
    torch.testing.assert_close(factors.right.mT @ factors.right, identity, atol=1e-5, rtol=0)
    kept = factors.left @ (factors.left.mT @ batch @ factors.right) @ factors.right.mT
    torch.testing.assert_close(kept, batch, atol=1e-5, rtol=0)
    assert leading_factors(batch, 0.6).explained_variance >= 0.6


def test_max_rank() -> None:
    """The cap wins over γ, and the share that is really held is reported."""
    factors = leading_factors(matrix_with([2.0, 1.0, 1.0], 5, 5), 1.0, max_rank=1)
    assert factors.rank == 1 and factors.explained_variance == pytest.approx(4 / 6, abs=1e-5)
    assert leading_factors(matrix_with([2.0], 5, 5), 1.0, max_rank=3).rank == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    """Half precision is factorised in float32, double stays double, and the bases are orthonormal to it."""
    factors = leading_factors(torch.randn(7, 5).to(dtype), 1.0)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {factors.left.dtype, factors.right.dtype, factors.singular_values.dtype} == {expected}
    torch.testing.assert_close(
        factors.left.T @ factors.left, torch.eye(factors.rank, dtype=expected), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("scale", [1e-20, 1e-30, 1e15])
def test_scale_does_not_matter(scale: float) -> None:
    """Gradients that are tiny or huge as a whole have the same directions and ranks."""
    matrix = matrix_with([3.0, 2.0, 1.0], 6, 5, torch.float64)
    expected = leading_factors(matrix.float(), 0.9)
    factors = leading_factors((matrix * scale).float(), 0.9)
    assert factors.rank == expected.rank
    torch.testing.assert_close(factors.left @ factors.left.T, expected.left @ expected.left.T, atol=1e-4, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_matrix_that_is_not_finite(value: float) -> None:
    """Refused before the decomposition."""
    matrix = torch.ones(3, 3)
    matrix[1, 1] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        leading_factors(matrix, 0.9)


def spectrum(kind: str, count: int) -> Tensor:
    index = torch.arange(1, count + 1).double()
    return {"power": index**-0.7, "exponential": torch.exp(-index / 20), "steps": torch.where(index < 50, 1.0, 0.1)}[
        kind
    ]


def large_matrix(values: Tensor, n: int) -> Tensor:
    """`(len(values), n)` with these singular values, large enough not to be decomposed in full."""
    m = len(values)
    left, right = torch.linalg.qr(torch.randn(m, m).double())[0], torch.linalg.qr(torch.randn(n, m).double())[0]
    return ((left * values) @ right.T).float()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("gamma", "max_rank"), [(0.8, None), (0.95, None), (1.0, 16), (0.9, 40)])
@pytest.mark.parametrize("kind", ["power", "exponential", "steps"])
def test_large_matrix(kind: str, gamma: float, max_rank: int | None, turned: bool) -> None:
    """Without a full decomposition the rank is within 2% of the smallest, and its directions hold 99% of the best."""
    values = spectrum(kind, 400)
    matrix = large_matrix(values, 500)
    factors = leading_factors(matrix.T if turned else matrix, gamma, max_rank)
    smallest = min(rank_for_energy(values, gamma), max_rank or 400)
    assert smallest <= factors.rank <= 1.02 * smallest
    caught = (factors.left.T @ (matrix.T if turned else matrix) @ factors.right).double().square().sum()
    assert caught >= 0.99 * values[:smallest].square().sum()
    assert factors.explained_variance == pytest.approx(float(caught / values.square().sum()), abs=1e-5)
    for basis in (factors.left, factors.right):
        torch.testing.assert_close(basis.T @ basis, torch.eye(factors.rank), atol=2e-6, rtol=0)


def test_large_matrix_without_leading_directions() -> None:
    """Equal singular values everywhere: nothing settles, and the full decomposition keeps the promise."""
    factors = leading_factors(large_matrix(torch.ones(300).double(), 310), 0.9)
    assert factors.rank == 270 and factors.explained_variance == pytest.approx(0.9, abs=1e-4)


@pytest.mark.parametrize("max_rank", [None, 2, 20])
def test_large_matrix_of_low_rank(max_rank: int | None) -> None:
    """Directions that are only rounding do not count, at γ = 1 neither."""
    values = torch.zeros(300).double()
    values[:5] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    assert leading_factors(large_matrix(values, 310), 1.0, max_rank).rank == min(5, max_rank or 5)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e18])
def test_scale_of_a_large_matrix_does_not_matter(scale: float) -> None:
    """Squares that would vanish or overflow change neither rank nor directions."""
    matrix = large_matrix(spectrum("exponential", 300), 310)
    expected, factors = leading_factors(matrix, 0.9), leading_factors((matrix.double() * scale).float(), 0.9)
    assert factors.rank == expected.rank
    assert factors.explained_variance == pytest.approx(expected.explained_variance, abs=1e-5)
    torch.testing.assert_close(factors.left @ factors.left.T, expected.left @ expected.left.T, atol=1e-3, rtol=0)
