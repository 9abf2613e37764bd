"""Many matrices factorised side by side: each as by itself, and in a number of steps that does not grow with theirs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from semu_peft import SemuConfig, gather, initialize_semu_weights
from semu_peft.gradients import DenseGradient, GradientSum, Sketch, sketch
from semu_peft.linalg.factorize import SingularFactors, leading_factors, leading_factors_of_each
from semu_peft.linalg.gram import where_quick
from semu_peft.linalg.orthonormal import orthonormal, orthonormal_beyond
from semu_peft.subspace.directions import find_directions
from semu_peft.subspace.ranks import RankBudget, plan_ranks
from semu_peft.subspace.retain import RetainRule
from semu_peft.tuner.adapted import semu_layers

DECOMPOSITIONS = ("linalg_svd", "linalg_qr", "linalg_eigh", "linalg_eigvalsh", "linalg_cholesky_ex", "linalg_lstsq")
WAITS = ("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal")


def counts(call: Callable[[], object]) -> dict[str, int]:
    """How often the host decomposes something or waits for a number."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    wanted = {*WAITS, *(f"aten::{name}" for name in DECOMPOSITIONS)}
    return {event.key: event.count for event in profiler.key_averages() if event.key in wanted}


def matrix_of(values: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), generator=draw, dtype=torch.float64))[0] for size in (m, n)
    )
    return ((left * values.double()) @ right.mT).float()


def spectra(count: int) -> dict[str, Tensor]:
    index = torch.arange(1, count + 1).double()
    power = index**-0.8
    return {
        "power": power,
        "repeated": torch.where(index <= 20, 3.0, torch.where(index <= 60, 1.0, 0.01 / index)),
        "clustered": torch.where(index <= 40, 1 + 1e-5 / index, 1e-2 / index),
        "low rank": torch.where(index <= 5, 6 - index, 0.0),
        "flat": torch.ones(count).double(),
        "steep": 10.0 ** (-index),
        "tiny": 1e-20 * power,
        "huge": 1e15 * power,
        "zero": torch.zeros(count).double(),
    }


def check(matrix: Tensor, factors: SingularFactors) -> None:
    """Orthonormal, and of the energy of the best directions of that rank."""
    exact = matrix.double()
    best = torch.linalg.svdvals(exact)[: factors.rank].square().sum()
    held = (factors.left.double().mT @ exact @ factors.right.double()).square().sum()
    assert held >= 0.999 * best
    for basis in (factors.left, factors.right):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(factors.rank), atol=2e-6, rtol=0)
        assert basis.untyped_storage().nbytes() == basis.numel() * basis.element_size()


@pytest.mark.parametrize("shape", [(272, 330), (330, 272), (50, 90), (90, 50)])
@pytest.mark.parametrize(("gamma", "max_rank"), [(0.9, None), (0.99, None), (1.0, 16)])
def test_each_as_by_itself(shape: tuple[int, int], gamma: float, max_rank: int | None) -> None:
    """Matrices that need unlike numbers of blocks, other decompositions or none do not touch each other."""
    matrices = [matrix_of(values, *shape, seed) for seed, values in enumerate(spectra(min(shape)).values())]
    together = leading_factors_of_each(matrices, gamma, max_rank)
    for matrix, factors in zip(matrices, together, strict=True):
        alone = leading_factors(matrix, gamma, max_rank)
        assert factors.rank == alone.rank
        torch.testing.assert_close(factors.energy, alone.energy, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            factors.singular_values[: factors.rank], alone.singular_values[: factors.rank], rtol=1e-4, atol=0
        )
        check(matrix, factors)


def test_batches_of_matrices_keep_one_rank_each() -> None:
    batches = [torch.stack([matrix_of(values, 20, 12, seed) for seed in range(3)]) for values in spectra(12).values()]
    for gamma in (0.9, 1.0):
        for batch, factors in zip(batches, leading_factors_of_each(batches, gamma), strict=True):
            alone = leading_factors(batch, gamma)
            assert factors.left.shape == alone.left.shape and factors.right.shape == alone.right.shape
            torch.testing.assert_close(factors.singular_values, alone.singular_values, rtol=1e-4, atol=0)


def test_the_same_again() -> None:
    """Bit for bit."""
    matrices = [matrix_of(values, 280, 300) for values in spectra(280).values()]
    first, second = (leading_factors_of_each(matrices, 0.9) for _ in range(2))
    assert all(
        torch.equal(a.left, b.left) and torch.equal(a.right, b.right) for a, b in zip(first, second, strict=True)
    )


def test_what_cannot_be_factorised_together() -> None:
    assert leading_factors_of_each([], 0.9) == []
    with pytest.raises(ValueError, match=r"`matrices` must have one shape, got \[\(2, 3\), \(3, 2\)\]"):
        leading_factors_of_each([torch.ones(2, 3), torch.ones(3, 2)], 0.9)
    with pytest.raises(ValueError, match="NaN or infinite"):
        leading_factors_of_each([torch.ones(2, 3), torch.full((2, 3), torch.nan)], 0.9)


@pytest.mark.parametrize("shape", [(280, 300), (60, 80)])
def test_steps_do_not_grow_with_the_number_of_matrices(shape: tuple[int, int]) -> None:
    matrices = [matrix_of(spectra(shape[0])["power"], *shape, seed) for seed in range(12)]
    few, many = (counts(partial(leading_factors_of_each, matrices[:number], 0.9)) for number in (3, 12))
    assert few == many
    assert sum(many.values()) < 60


class Equal(nn.Module):
    """So many layers of one shape."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(300, 280) for _ in range(number))


@pytest.mark.parametrize(("kind", "orthogonal"), [("exact", False), ("exact", True), ("sketch", False)])
def test_steps_do_not_grow_with_the_number_of_layers(kind: str, orthogonal: bool) -> None:
    """From sums of gradients to ranks, also under a budget; 12 layers are as many as one portion on a CPU takes."""

    def run(number: int) -> dict[str, int]:
        config = SemuConfig(target_modules="all-linear", explained_variance=0.9, orthogonal_to_weight=orthogonal)
        layers = semu_layers(get_peft_model(Equal(number), config))
        make = GradientSum if kind == "exact" else Sketch.of_size(20)
        sums = {}
        for seed, name in enumerate(layers):
            sums[name] = make((280, 300), torch.float32, torch.device("cpu"))
            sums[name].add(DenseGradient(matrix_of(spectra(280)["power"], 280, 300, seed)))

        def plan() -> None:
            found, _ = find_directions(
                layers, dict(sums), None, RetainRule("project"), keep_explained_variance=None, progress=False,
                adapter_name="default",
            )  # fmt: skip
            assert isinstance(sums[name], Sketch) == (kind == "sketch")
            ranks = plan_ranks(found, layers)
            assert min(ranks.values()) > 0 and sum(plan_ranks(found, layers, budget=RankBudget(9)).values()) == 9

        return counts(plan)

    assert run(3) == run(12)


def test_a_look_at_cores_before_they_start_afresh_does_not_grow_with_the_number_of_layers() -> None:
    def run(number: int) -> dict[str, int]:
        config = SemuConfig(target_modules="all-linear", min_parameters=0)
        model = get_peft_model(nn.Sequential(*(nn.Linear(8, 8) for _ in range(number))), config)
        sums = gather(
            model,
            [torch.randn(16, 8)],
            lambda model, batch: model(batch).square().mean(),
            progress=False,
            adapter_name="default",
        )
        initialize_semu_weights(model, sums, progress=False)
        model.add_adapter("other", config)
        model.set_adapter("other")  # the first is off then, so it is looked at too
        initialize_semu_weights(model, sums, adapter_name="other", progress=False)
        return counts(partial(initialize_semu_weights, model, sums, adapter_name="other", progress=False))

    assert run(3) == run(12)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
def test_small_decompositions_on_several_cores(batch: tuple[int, ...]) -> None:
    """Shared among threads, each is the very one that it is by itself, and torch has its threads back."""
    columns = torch.randn(*batch, 40, 40, dtype=torch.float64)
    gram, threads = columns @ columns.mT, torch.get_num_threads()
    found, expected = where_quick(torch.linalg.eigh, gram, cores=4), torch.linalg.eigh(gram)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    assert torch.get_num_threads() == threads


def blocks() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    block = torch.randn(300, 32, generator=draw)
    dependent = block.clone()
    dependent[:, 20:] = block[:, :12] @ torch.randn(12, 12, generator=draw)
    return {
        "random": block,
        "dependent": dependent,
        "nearly dependent": dependent + 1e-7 * torch.randn(300, 32, generator=draw),
        "uneven": block * torch.logspace(-15, 15, 32),
        "zeros": torch.zeros(300, 32),
        "some zeros": block * (torch.arange(32) % 3 > 0),
    }


@pytest.mark.parametrize("size", [0, 40])
def test_orthonormal_columns(size: int) -> None:
    """Whatever the block: orthonormal or zero, of each other and of the basis, and nothing of the block is lost."""
    basis = torch.linalg.qr(torch.randn(300, size))[0]
    each = torch.stack([*blocks().values(), torch.cat([basis, blocks()["random"]], 1)[:, :32]])
    columns, sound = orthonormal_beyond(basis.expand(len(each), -1, -1), each)
    assert sound.all()
    for block, found in zip(each, columns, strict=True):
        kept = found[:, found.any(0)]
        torch.testing.assert_close(kept.mT @ kept, torch.eye(kept.shape[1]), atol=2e-6, rtol=0)
        torch.testing.assert_close(basis.mT @ kept, torch.zeros(size, kept.shape[1]), atol=2e-6, rtol=0)
        spanned = torch.cat([basis, kept], 1)
        rest = block - spanned @ (spanned.mT @ block)
        assert (rest.norm(dim=0) <= 1e-5 * block.norm(dim=0)).all()


def test_a_block_that_is_not_finite_is_not_sound() -> None:
    block = torch.randn(2, 40, 8)
    block[1, 3, 4] = torch.nan
    assert orthonormal_beyond(block[..., :0], block).sound.tolist() == [True, False]


@pytest.mark.parametrize("rank", [3, 20, 200])
def test_sketches_by_products_recover_the_same(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerators do, beside what CPUs do; also where the sketches' columns depend on each other."""
    sums = []
    for seed in range(3):
        total = Sketch.of_size(24)((280, 300), torch.float32, torch.device("cpu"))
        total.add(DenseGradient(matrix_of(torch.logspace(0, -3, rank), 280, 300, seed)))
        sums.append(total)
    by_reflections = Sketch.factorize_each(sums, 0.95)
    monkeypatch.setattr(sketch, "orthonormal", partial(orthonormal, by_products=True))
    for total, expected, factors in zip(sums, by_reflections, Sketch.factorize_each(sums, 0.95), strict=True):
        assert factors.rank == expected.rank == total.factorize(0.95).rank
        torch.testing.assert_close(factors.energy, expected.energy, rtol=1e-3, atol=0)
        overlap = torch.linalg.svdvals(factors.left.mT @ expected.left)
        torch.testing.assert_close(overlap, torch.ones(factors.rank), atol=1e-3, rtol=0)
        for basis in (factors.left, factors.right):
            torch.testing.assert_close(basis.mT @ basis, torch.eye(factors.rank), atol=2e-6, rtol=0)


def test_a_space_that_would_have_to_be_too_large_is_given_up_early() -> None:
    flat, steep = (matrix_of(spectra(600)[name], 600, 700) for name in ("flat", "power"))
    products = {"flat": 0, "steep": 0}
    for name, matrix in (("flat", flat), ("steep", steep)):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            check(matrix, leading_factors(matrix, explained_variance=0.8))
        events = [event for event in profiler.key_averages() if event.key == "aten::linalg_cholesky_ex"]
        products[name] = sum(event.count for event in events) // 3  # blocks, each made orthonormal in three rounds
    assert products["steep"] >= 2
    assert products["flat"] == 4  # of the nine that fit
