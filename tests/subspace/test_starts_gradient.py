"""Starts along the gradient: LoRA-SB's first step and SLUG's ascent, against the dense formulas."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import Mlp, run, vector_batches
from peft import get_peft_model
from torch import nn

from semu_peft import SemuConfig, Sketch, initialize_semu_weights, objectives, starts
from semu_peft.tuner.adapted import semu_layers

LOSS = objectives.CrossEntropy()


def gradient_of(model: nn.Module, batches: Any, weight: Any) -> Any:
    return sum(torch.autograd.grad(LOSS(model.eval(), batch), [weight])[0] for batch in batches)


@pytest.mark.parametrize("transform", ["none", "sign"])
def test_the_first_step_is_the_best_of_its_rank(transform: Any) -> None:
    """`‖−η G − U R Vᵀ‖² = η² Σ_{i>r} σ_i²` for `G` or its sign; off is the original; η = 0 is it as well."""
    base, batches, eta = Mlp().double(), [(x.double(), y) for x, y in vector_batches()], 0.02
    gradient = gradient_of(base, batches, base.fc1.weight)
    gradient = gradient.sign() if transform == "sign" else gradient
    x = batches[0][0]
    expected = run(base, x)
    model = get_peft_model(base, SemuConfig(target_modules=["fc1"], r=2, explained_variance=1.0))
    start = starts.FirstStep(eta, transform=transform)
    initialize_semu_weights(model, batches, LOSS, start=start, progress=False)
    layer = semu_layers(model)["fc1"]
    missed = -eta * gradient - layer.get_delta_weight("default")
    rest = torch.linalg.svdvals(eta * gradient)[2:].square().sum()
    assert layer.r["default"] == 2 and rest > 0
    torch.testing.assert_close(missed.square().sum(), rest, rtol=1e-9, atol=1e-15)
    assert not torch.equal(run(model, x), expected)
    with model.disable_adapter():
        assert torch.equal(run(model, x), expected)
    nothing = starts.FirstStep(0.0, transform=transform)
    initialize_semu_weights(model, batches, LOSS, start=nothing, overwrite=True, progress=False)
    assert torch.equal(run(model, x), expected)


def test_sgd_on_the_core_is_the_projected_step_of_all_weights() -> None:
    base, batches = Mlp().double(), [(x.double(), y) for x, y in vector_batches(1)]
    model = get_peft_model(base, SemuConfig(target_modules=["fc1"], r=2))
    initialize_semu_weights(model, batches, LOSS, start=starts.FirstStep(0.1), progress=False)
    layer = semu_layers(model)["fc1"]
    u, v, core = (getattr(layer, part)["default"] for part in ("semu_U", "semu_V", "semu_core"))
    dense = copy.deepcopy(model).merge_and_unload()
    dense.requires_grad_(True)
    gradient = gradient_of(dense, batches, dense.fc1.weight)
    LOSS(model.eval(), batches[0]).backward()
    before = layer.get_delta_weight("default").detach()
    torch.optim.SGD([core], lr=0.3).step()
    moved = layer.get_delta_weight("default").detach() - before
    torch.testing.assert_close(moved, -0.3 * u @ u.T @ gradient @ v @ v.T, rtol=1e-9, atol=1e-12)


def test_a_first_step_needs_what_it_steps_along() -> None:
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"]))
    start, batches = starts.FirstStep(0.1, transform="sign"), vector_batches()
    with pytest.raises(ValueError, match="needs the gradient itself, got a Sketch"):
        wide = get_peft_model(nn.Sequential(nn.Linear(64, 64)), SemuConfig(target_modules=["0"]))
        data, sketch = [(torch.randn(4, 64), torch.arange(4))], Sketch.of_size(4)
        initialize_semu_weights(wide, data, LOSS, statistic=sketch, start=start, progress=False)
    profile = initialize_semu_weights(model, batches, LOSS, progress=False)
    with pytest.raises(ValueError, match="a profile no longer has"):
        initialize_semu_weights(model, profile, start=start)
    with pytest.raises(TypeError, match="`forget` must be batches"):
        initialize_semu_weights(model, start=start)
    with pytest.raises(TypeError, match="`forget` must be batches"):
        initialize_semu_weights(model)
    with pytest.raises(ValueError, match="`transform` must be 'none' or 'sign'"):
        starts.FirstStep(0.1, transform="adam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`learning_rate`"):
        starts.FirstStep(-0.1)


def test_ascent_starts_at_a_tenth_of_the_weight() -> None:
    """SLUG: `θ = (3, 4)`, `g = (0, 1/2)` gives `λ = 5 / (10 · 1/2) = 1`, and `R = +λ σ`, up the gradient."""
    base = nn.Sequential(nn.Linear(2, 1, bias=False))
    base[0].weight.data = torch.tensor([[3.0, 4.0]])
    x = torch.tensor([[0.0, 0.5]])

    def output(model: nn.Module, batch: Any) -> Any:  # its gradient by the weight is the input
        return model(batch).sum()

    model = get_peft_model(base, SemuConfig(target_modules=["0"], r=1))
    initialize_semu_weights(model, [x], output, start=starts.Ascent(), progress=False)
    delta = semu_layers(model)["0"].get_delta_weight("default")
    torch.testing.assert_close(delta, torch.tensor([[0.0, 0.5]]))  # λ = 1
    with model.disable_adapter():
        assert model(x).item() == 2.0
    assert model(x).item() > 2.0
    start = starts.Ascent(scale=-2.0)
    initialize_semu_weights(model, [x], output, start=start, overwrite=True, progress=False)
    torch.testing.assert_close(semu_layers(model)["0"].get_delta_weight("default"), torch.tensor([[0.0, -1.0]]))


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_ascent_raises_the_loss_at_the_rank_of_its_layer(core: Any) -> None:
    """Of rank 1 it is `λ σ₁ u₁ v₁ᵀ` with `λ` from the whole gradient's norm."""
    base, batches = Mlp().double(), [(x.double(), y) for x, y in vector_batches()]
    gradient, norm = gradient_of(base, batches, base.head.weight), base.head.weight.norm()
    model = get_peft_model(base, SemuConfig(target_modules=["head"], r=1, core=core))
    before = LOSS(model, batches[0])
    initialize_semu_weights(model, batches, LOSS, start=starts.Ascent(), progress=False)
    u, s, vh = torch.linalg.svd(gradient)
    expected = norm / (10 * gradient.norm()) * s[0] * u[:, :1] @ vh[:1]
    torch.testing.assert_close(semu_layers(model)["head"].get_delta_weight("default"), expected, rtol=1e-6, atol=1e-9)
    assert LOSS(model, batches[0]) > before
