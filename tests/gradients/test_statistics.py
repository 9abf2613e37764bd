"""Exact sums and sketches: linear, equal to the dense gradient, and honest about what they missed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft.gradients import sketch as sketch_module
from semu_peft.gradients.batch_gradient import (
    BatchGradient,
    ConvGradient,
    DenseGradient,
    TokenGradient,
)
from semu_peft.gradients.sketch import RandomMatrixPool, Sketch
from semu_peft.gradients.statistics import GradientSum, MatrixSum

CPU = torch.device("cpu")


def decaying(m: int, n: int, rate: float = 0.7) -> Tensor:
    """A matrix whose singular values fall geometrically."""
    left, right = torch.linalg.qr(torch.randn(m, m))[0], torch.linalg.qr(torch.randn(n, n))[0]
    size = min(m, n)
    return left[:, :size] * rate ** torch.arange(size) @ right[:, :size].T


def sketch(m: int, n: int, size: int = 24, seed: int = 0) -> Sketch:
    return Sketch((m, n), size, RandomMatrixPool(seed), CPU)


CONVS = {
    "plain": nn.Conv2d(6, 40, 3, padding=1),
    "strided_dilated": nn.Conv2d(6, 40, 3, stride=2, padding=2, dilation=2),
    "circular": nn.Conv2d(6, 40, 3, padding=1, padding_mode="circular"),
    "same": nn.Conv2d(6, 40, (3, 4), padding="same"),
    "grouped": nn.Conv2d(6, 40, 3, groups=2),
    "one_dimension": nn.Conv1d(6, 40, 5, stride=2, padding=1),
    "three_dimensions": nn.Conv3d(6, 40, 2, padding=1),
}


def conv_gradient(conv: nn.Module) -> tuple[ConvGradient, Tensor]:
    """A convolution's gradient in factors, and autograd's own, as a matrix."""
    x = torch.randn(4, 6, *(7,) * (conv.weight.dim() - 2))
    output = conv(x)
    slope = torch.randn_like(output)
    (expected,) = torch.autograd.grad((output * slope).sum(), [conv.weight])
    return ConvGradient.of(conv, slope, x), expected.flatten(1)


@pytest.mark.parametrize("name", CONVS)
def test_convolution_gradient_is_autograds(name: str) -> None:
    """Any stride, padding, padding mode, dilation, groups and number of dimensions."""
    gradient, expected = conv_gradient(CONVS[name])
    torch.testing.assert_close(gradient.dense(), expected, atol=1e-4, rtol=1e-4)


def forms() -> dict[str, tuple[BatchGradient, Tensor]]:
    outputs, inputs = torch.randn(50, 40), torch.randn(50, 54)
    return {
        "dense": (DenseGradient(outputs.T @ inputs), outputs.T @ inputs),
        "tokens": (TokenGradient(outputs, inputs), outputs.T @ inputs),
        "convolution": conv_gradient(CONVS["plain"]),
    }


@pytest.mark.parametrize("form", ["dense", "tokens", "convolution"])
def test_thin_products_are_those_of_the_matrix(form: str) -> None:
    """`Aᵀ (B Ω) = G Ω`, `(A Ψ)ᵀ B = Ψᵀ G`, `(A Ψ)ᵀ (B Ω) = Ψᵀ G Ω`, whichever factors G comes in."""
    gradient, matrix = forms()[form]
    left, right = torch.randn(40, 5), torch.randn(54, 5)
    outputs, inputs = gradient.project(left, right)
    torch.testing.assert_close(gradient.times(inputs), matrix @ right, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(gradient.transposed_times(outputs), left.T @ matrix, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(outputs.T @ inputs, left.T @ matrix @ right, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("form", ["dense", "tokens", "convolution"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_exact_sums_are_float32_or_better(form: str, dtype: torch.dtype) -> None:
    """Half-precision gradients are added in float32: many small ones after a large one are not lost."""
    gradient, matrix = forms()[form]
    total = GradientSum((40, 54), torch.promote_types(dtype, torch.float32), CPU)
    total.add(DenseGradient(torch.full((40, 54), 4096.0)))
    halves = DenseGradient(torch.ones(40, 54, dtype=dtype))
    for _ in range(8):
        halves.add_to(total.total)
    assert (total.total == 4104).all()
    total.add(gradient)
    torch.testing.assert_close(total.total, 4104 + matrix.to(total.total), atol=1e-2, rtol=1e-5)


@pytest.mark.parametrize("kind", ["exact", "sketch"])
def test_sums_are_linear(kind: str) -> None:
    """Adding batch by batch, with weights, is adding the sum: what distributed and accumulated runs rely on."""

    def fresh() -> MatrixSum:
        return GradientSum((40, 54), torch.float32, CPU) if kind == "exact" else sketch(40, 54, 8)

    first, second = torch.randn(40, 54), torch.randn(40, 54)
    apart, together, half = fresh(), fresh(), fresh()
    apart.add(DenseGradient(first))
    apart.add(TokenGradient(torch.eye(40), second), scale=-0.5)
    together.add(DenseGradient(first - 0.5 * second))
    half.add(DenseGradient(first))
    for mine, other, part in zip(apart.tensors(), together.tensors(), half.tensors(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-4)
        assert not torch.allclose(mine, part)


@pytest.mark.parametrize("form", ["dense", "tokens", "convolution"])
def test_a_sum_leaves_its_first_gradient_alone(form: str) -> None:
    gradient, matrix = forms()[form]
    total = GradientSum((40, 54), torch.float32, CPU)
    for _ in range(3):
        total.add(gradient)
    torch.testing.assert_close(total.total, 3 * matrix.to(total.total), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(gradient.dense(), matrix, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_sketch_finds_the_leading_directions(shape: tuple[int, int]) -> None:
    """Directions, singular values and energy are the matrix's; what was missed is estimated, and small."""
    matrix = decaying(*shape)
    found = sketch(*shape)
    found.add(DenseGradient(matrix))
    factors = found.factorize(0.99)
    u, s, vh = torch.linalg.svd(matrix)
    rank = factors.rank
    assert factors.estimated and rank == int((s.square().cumsum(0) < 0.99 * s.square().sum()).sum()) + 1
    torch.testing.assert_close(factors.singular_values[:rank], s[:rank], atol=1e-3, rtol=1e-3)
    for basis, expected in ((factors.left, u), (factors.right, vh.T)):
        torch.testing.assert_close(basis.T @ basis, torch.eye(rank), atol=1e-5, rtol=0)
        assert (basis * expected[:, :rank]).sum(0).abs().min() > 0.999
    assert float(factors.energy) == pytest.approx(float(s.square().sum()), rel=1e-3)
    assert factors.explained_variance >= 0.99


@pytest.mark.parametrize(("rate", "least"), [(0.8, 0.99), (0.95, 0.95)])
def test_sketch_captures_what_an_exact_decomposition_captures(rate: float, least: float) -> None:
    """At the exact rank for γ = 0.9, by a sketch four times as wide, nearly the same energy; mean over matrices."""
    shares = []
    for seed in range(5):
        torch.manual_seed(seed)
        matrix = decaying(150, 190, rate)
        energy = torch.linalg.svdvals(matrix).square()
        rank = int((energy.cumsum(0) < 0.9 * energy.sum()).sum()) + 1
        found = sketch(150, 190, 4 * rank, seed)
        found.add(DenseGradient(matrix))
        factors = found.factorize(1.0).leading(rank)
        captured = (factors.left.T @ matrix @ factors.right).square().sum()
        shares.append(float(captured / energy[:rank].sum()))
    assert sum(shares) / len(shares) >= least


def test_sketch_knows_what_it_missed() -> None:
    """Few directions cannot catch a flat spectrum; the estimate of what is missed is right, as a mean over seeds."""
    matrix = torch.linalg.qr(torch.randn(100, 100))[0]
    estimates, errors = [], []
    for seed in range(20):
        found = sketch(100, 100, 10, seed)
        found.add(DenseGradient(matrix))
        factors = found.factorize(1.0)
        recovered = factors.left * factors.singular_values @ factors.right.T
        estimates.append(float(factors.energy - factors.singular_values.double().square().sum()))
        errors.append(float((matrix - recovered).square().sum()))
    assert sum(estimates) == pytest.approx(sum(errors), rel=0.15)
    assert found.factorize(0.5).explained_variance < 0.5


def test_sketch_of_a_matrix_of_low_rank_is_exact() -> None:
    """With as few directions as the sketch can hold nothing is missed, and none are invented."""
    matrix = torch.randn(70, 3) @ torch.randn(3, 80)
    found = sketch(70, 80, 8)
    found.add(DenseGradient(matrix))
    factors = found.factorize(1.0)
    assert factors.rank == 3 and factors.singular_values.count_nonzero() == 3
    kept = factors.left * factors.singular_values[:3] @ factors.right.T
    torch.testing.assert_close(kept, matrix, atol=1e-3, rtol=1e-3)


def test_sketch_of_nothing() -> None:
    """No gradient, no direction."""
    assert sketch(50, 60).factorize(1.0).rank == 0


def test_sketches_draw_alike() -> None:
    """The test matrices depend on the seed and the shape alone, so that sketches of several processes add up."""
    matrix = decaying(60, 90)
    one, two, other = sketch(60, 90), sketch(60, 90), sketch(60, 90, seed=1)
    for accumulator in (one, two, other):
        torch.randn(3)
        accumulator.add(DenseGradient(matrix))
    assert all(torch.equal(a, b) for a, b in zip(one.tensors(), two.tensors(), strict=True))
    assert not torch.equal(one.left, other.left)


@pytest.mark.parametrize("kind", ["exact", "sketch"])
def test_component_along_the_weights_is_removed(kind: str) -> None:
    """Also from a sketch, as far as it knows the gradient."""
    weight, rest = decaying(60, 90, 0.5), decaying(60, 90, 0.5)
    total: MatrixSum = GradientSum((60, 90), torch.float32, CPU) if kind == "exact" else sketch(60, 90)
    total.add(DenseGradient(rest + 3 * weight))
    total.remove_component(weight)
    expected = rest - (rest * weight).sum() / weight.square().sum() * weight
    factors = total.factorize(0.9999)
    kept = factors.left * factors.singular_values[: factors.rank] @ factors.right.T
    assert float((kept - expected).norm() / expected.norm()) < 0.02
    assert abs(float((kept * weight).sum() / weight.norm() / kept.norm())) < 0.01


def test_component_along_half_precision_weights_is_removed_in_float32() -> None:
    weight = decaying(60, 90, 0.5).bfloat16()
    total = GradientSum((60, 90), torch.float32, CPU)
    total.add(DenseGradient(torch.randn(60, 90) + 100 * weight.float()))
    total.remove_component(weight)
    cosine = (total.total.double() * weight.double()).sum() / total.total.double().norm() / weight.double().norm()
    assert abs(float(cosine)) < 1e-5


def test_a_sketch_is_smaller_than_the_matrix_or_not_used() -> None:
    """Memory is O((m + n) k), and a layer that would not gain is summed exactly."""
    assert Sketch.pays((768, 3072), 64)
    assert not Sketch.pays((10, 3072), 64) and not Sketch.pays((100, 100), 64) and not Sketch.pays((3, 768, 768), 64)
    held = sum(tensor.numel() for tensor in sketch(768, 3072, 64).tensors())
    assert held <= 64 * (768 + 3072) + 129**2 + 16 * 3072 < 768 * 3072 / 5


def test_linear_layer_of_many_tokens_in_half_precision() -> None:
    """The thin products of bfloat16 activations are taken in float32."""
    outputs, inputs = torch.randn(30, 40).bfloat16(), torch.randn(30, 54).bfloat16()
    found = sketch(40, 54, 8)
    found.add(TokenGradient(outputs, inputs))
    exact = sketch(40, 54, 8)
    exact.add(DenseGradient(outputs.float().T @ inputs.float()))
    for mine, expected in zip(found.tensors(), exact.tensors(), strict=True):
        torch.testing.assert_close(mine, expected, atol=2e-2, rtol=1e-4)
    assert F.cosine_similarity(found.left.flatten(), exact.left.flatten(), dim=0) > 0.99999


@pytest.mark.parametrize("form", ["tokens", "dense"])
def test_sketch_of_bfloat16_that_is_multiplied_as_it_is(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where what is projected is rounded again: ranks are the same, directions as good to a thousandth."""
    inputs = (torch.randn(400, 90) @ decaying(90, 90, 0.8)).bfloat16()
    outputs = (torch.randn(400, 60) @ decaying(60, 60, 0.8)).bfloat16()
    gradient = TokenGradient(outputs, inputs)
    given = DenseGradient(gradient.dense()) if form == "dense" else gradient
    exact, rounded = sketch(60, 90), sketch(60, 90)
    exact.add(given)
    monkeypatch.setattr(sketch_module, "_kind", lambda factor: factor.dtype)
    rounded.add(given)
    assert form == "dense" or not torch.equal(exact.left, rounded.left)
    matrix, one, two = gradient.dense().float(), exact.factorize(0.95), rounded.factorize(0.95)
    assert one.rank == two.rank > 2
    captured = [float((factors.left.T @ matrix @ factors.right).square().sum()) for factors in (one, two)]
    assert captured[1] >= 0.999 * captured[0]


def test_random_matrices_are_normal_and_the_same_in_any_dtype() -> None:
    pool = RandomMatrixPool(seed=0)
    half, full = (pool.of(700, 900, 24, CPU, dtype) for dtype in (torch.bfloat16, torch.float32))
    for few, many in ((half.of_outputs, full.of_outputs), (half.of_inputs, full.of_inputs)):
        assert few.dtype == torch.bfloat16 and torch.equal(few.float(), many)
        assert many.shape[1] % 8 == 0, "as GPUs want it"
        assert abs(float(many.mean())) < 0.02 and float(many.std()) == pytest.approx(1.0, rel=0.02)
    parts = torch.cat([full.of_outputs[:, :24], full.probes, full.rest], 1)
    assert torch.equal(parts, full.of_outputs[:, : 2 * 24 + 1 + 16])
