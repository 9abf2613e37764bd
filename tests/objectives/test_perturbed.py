"""Objectives at the worst hidden states nearby."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusion_models import diffusion_batch, text_unet
from language_batches import padded
from models import Mlp, llama, vector_batches
from peft import get_peft_model
from torch import Tensor, nn

from semu_peft import SemuConfig, gather, methods
from semu_peft.objectives import NPO, CrossEntropy, DenoisingAscent, PerturbedLatents


def test_the_worst_point_of_a_linear_loss_is_on_the_ball() -> None:
    """`w · (h + δ)` is largest at `δ = ρ ‖h‖ w / ‖w‖`, for each example by its own size; the draws stay."""
    model, weight = nn.Sequential(nn.Identity(), nn.Linear(3, 1, bias=False)), torch.tensor([[1.0, 2.0, 2.0]])
    model[1].weight.data = weight
    x = torch.tensor([[3.0, 0.0, 4.0], [0.0, 1.0, 0.0]])
    loss = PerturbedLatents(lambda model, batch: model(batch).mean(), "0", radius=0.2)
    expected = (x @ weight.mT).squeeze(1) + 0.2 * torch.tensor([5.0, 1.0]) * 3
    torch.testing.assert_close(loss(model, x), expected.mean())


def test_it_raises_the_loss_and_leaves_the_model_alone() -> None:
    """More of a push is worse; no hook and no gradient stays behind, whatever carries the hidden states."""
    torch.manual_seed(0)
    model = get_peft_model(llama(), SemuConfig(target_modules="all-linear", r=2, init_weights=False)).eval()
    batch, losses = padded(), [CrossEntropy()(model, padded()).item()]
    for radius in (0.01, 0.1, 0.5):
        losses.append(PerturbedLatents(CrossEntropy(), 0, radius=radius)(model, batch).item())
    assert losses == sorted(losses) and losses[-1] > losses[0] + 0.05
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_gathered_is_the_gradient_at_the_worst_point_alone() -> None:
    """The passes of the search are no part of it."""
    torch.manual_seed(0)
    model, (batch, *_) = Mlp().eval(), vector_batches(1)
    objective = PerturbedLatents(CrossEntropy(), "fc1", radius=0.3)
    seen = gather(model, [batch], objective, progress=False)
    model.zero_grad()
    objective(model, batch).backward()
    for name in ("fc1", "fc2", "head"):
        exact = model.get_submodule(name).weight.grad
        torch.testing.assert_close(seen[name].total, exact, atol=1e-6, rtol=1e-4)


def test_draws_are_those_of_the_inner_objective() -> None:
    """A denoiser's timesteps and noise are the same in the search and at its end, and go on from call to call."""
    torch.manual_seed(0)
    from semu_peft.objectives import NoiseSchedule

    schedule = NoiseSchedule(torch.linspace(1, 0.1, 10), torch.linspace(0, 1, 10), torch.arange(10))
    inner = DenoisingAscent(schedule, seed=3)
    batch = diffusion_batch("text_unet", 2)
    objective, plain = PerturbedLatents(inner, "conv_in", radius=1e-6), DenoisingAscent(schedule, seed=3)
    model = text_unet().eval()
    for _ in range(2):
        torch.testing.assert_close(objective(model, batch), plain(model, batch), rtol=1e-3, atol=1e-3)
    assert torch.equal(objective.state_dict()["generator"], plain.state_dict()["generator"])


def test_lat_is_its_sentence() -> None:
    """The method trains an adapter by NPO at the worst hidden states, beside retain data."""
    torch.manual_seed(0)
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1", "fc2"]))
    forget, retain = vector_batches(2), vector_batches(2, seed=4)
    result = methods.lat(model, forget, retain, layer="fc2", max_steps=4, progress=False)
    assert result.history[-1]["loss"] < result.history[0]["loss"]


@pytest.mark.parametrize(
    ("options", "told"),
    [({"radius": 0}, "`radius` must"), ({"steps": 0}, "`steps` must"), ({"layer": "other"}, "`layer` must")],
)
def test_arguments(options: dict[str, Any], told: str) -> None:
    arguments = {"layer": "fc1", **options}
    with pytest.raises(ValueError, match=told):
        PerturbedLatents(CrossEntropy(), **arguments)(Mlp(), vector_batches(1)[0])


def test_a_layer_without_a_say() -> None:
    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.side, self.head = nn.Linear(6, 2), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.side(x)
            return self.head(x)

    with pytest.raises(ValueError, match="`layer` must have a say in the loss, got 'side'"):
        PerturbedLatents(CrossEntropy(), "side")(Side(), vector_batches(1)[0])


def test_npo_beside_its_reference() -> None:
    """What the original says is prepared without the push."""
    torch.manual_seed(0)
    model = get_peft_model(Mlp().eval(), SemuConfig(target_modules=["fc1"], r=2, init_weights=False)).eval()
    batch = vector_batches(1)[0]
    inner = NPO()
    assert torch.equal(PerturbedLatents(inner, "fc2").prepare(model, batch)[0], inner.prepare(model, batch))
