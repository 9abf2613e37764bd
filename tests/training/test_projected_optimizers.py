"""GaLore and APOLLO, of their own packages, through `unlearn`'s `optimizer`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ConstantLR

from semu_peft import unlearn
from semu_peft.objectives import UniformDistribution

ROWS, COLUMNS = 6, 10


def galore(rank: int, **options: Any) -> Callable[[Any], Optimizer]:
    """GaLore on the matrices, plain AdamW on the rest."""
    package = pytest.importorskip("galore_torch")

    def make(named_parameters: list[tuple[str, nn.Parameter]]) -> Optimizer:
        matrices = [p for _, p in named_parameters if p.dim() == 2]
        others = [p for _, p in named_parameters if p.dim() != 2]
        low = {"params": matrices, "rank": rank, "update_proj_gap": 10**6, "scale": 1.0, "proj_type": "std"}
        groups = [low, *([{"params": others}] if others else [])]
        return package.GaLoreAdamW(groups, no_deprecation_warning=True, **options)

    return make


def as_sgd(rate: float) -> dict[str, Any]:
    """Settings with which Adam is SGD: no memory, and a denominator that is the same everywhere."""
    return {"betas": (0.0, 0.0), "eps": 1e6, "lr": rate * 1e6, "correct_bias": False}


def towards(target: Tensor) -> Callable[[nn.Module, Any], Tensor]:
    return lambda model, batch: 0.5 * (model.weight - target).square().sum()


def trained(objective: Any, factory: Any, steps: int = 8) -> tuple[nn.Linear, list[float]]:
    torch.manual_seed(0)
    model = nn.Linear(COLUMNS, ROWS, bias=False)
    result = unlearn(
        model, [(torch.zeros(1), torch.zeros(1))], objective, optimizer=factory, max_steps=steps, progress=False,
        scheduler=lambda optimizer, total: ConstantLR(optimizer, 1.0),
    )  # fmt: skip
    return model, [entry["loss"] for entry in result.history]


def start() -> Tensor:
    torch.manual_seed(0)
    return nn.Linear(COLUMNS, ROWS, bias=False).weight.detach().clone()


def test_full_rank_with_sgd_inside_is_sgd() -> None:
    target = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    projected, _ = trained(towards(target), galore(ROWS, **as_sgd(0.2)))
    plain, _ = trained(towards(target), lambda parameters: SGD(parameters, lr=0.2))
    assert torch.allclose(projected.weight, plain.weight, atol=1e-4) and not torch.allclose(plain.weight, start())


def test_below_full_rank_the_change_stays_in_the_projection_and_the_moments_are_small() -> None:
    kept: list[Optimizer] = []
    factory = galore(2, lr=0.05)

    def make(named_parameters: Any) -> Optimizer:
        kept.append(factory(named_parameters))
        return kept[0]

    target = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    model, losses = trained(towards(target), make)
    singular = torch.linalg.svdvals(model.weight.detach() - start())
    assert singular[1] > 1e-2 and (singular[2:] < 1e-5).all() and losses[-1] < losses[0]
    (state,) = kept[0].state.values()
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (2, COLUMNS)


@pytest.mark.parametrize(("rank", "reaches"), [(2, True), (1, False)])
def test_a_gradient_of_rank_two_needs_rank_two(rank: int, reaches: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    gap = torch.randn(ROWS, 2, generator=generator) @ torch.randn(2, COLUMNS, generator=generator)
    _, losses = trained(towards(start() + gap), galore(rank, **as_sgd(0.5)), steps=20)
    assert (losses[-1] < 1e-6 * losses[0]) == reaches


def test_apollo_trains_with_moments_of_its_rank() -> None:
    package = pytest.importorskip("apollo_torch")
    kept: list[Optimizer] = []

    def make(named_parameters: list[tuple[str, nn.Parameter]]) -> Optimizer:
        projection = {"proj": "random", "scale_type": "channel", "scale": 1.0, "update_proj_gap": 200}
        matrices = [p for name, p in named_parameters if "weight" in name]
        others = [p for name, p in named_parameters if "weight" not in name]
        groups = [{"params": matrices, "rank": 2, "proj_type": "std", **projection}, {"params": others}]
        kept.append(package.APOLLOAdamW(groups, lr=0.02))
        return kept[0]

    torch.manual_seed(0)
    model = nn.Linear(COLUMNS, ROWS)
    before = copy.deepcopy(model.state_dict())
    data = [(4 * torch.randn(32, COLUMNS), torch.randint(ROWS, (32,)))]
    result = unlearn(model, data, UniformDistribution(), optimizer=make, max_steps=20, progress=False)
    assert result.history[-1]["loss"] < 0.8 * result.history[0]["loss"]
    assert not torch.equal(model.weight, before["weight"])
    moments = [state["exp_avg"].shape for state in kept[0].state.values()]
    assert torch.Size((2, COLUMNS)) in moments
