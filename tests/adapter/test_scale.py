"""The dial: how much of its forgetting an adapter applies."""

from __future__ import annotations

import math

import pytest
import torch
from models import Cnn, Mlp, run, sample_input
from peft import get_peft_model

from semu_peft import SemuConfig, set_scale, to_lora
from semu_peft.tuner.adapted import semu_layers


@pytest.mark.parametrize("conv_mode", ["flatten", "per_channel"])
def test_the_weight_moves_in_proportion(conv_mode: str) -> None:
    """At scale `s` the model is the one with `W + s ΔW`, also at 0, beyond 1 and below 0, and merged."""
    config = SemuConfig(target_modules=Cnn.targets, r=2, init_weights=False, conv_mode=conv_mode)
    model = get_peft_model(Cnn(), config).eval()
    x = sample_input(Cnn())
    deltas = {name: layer.get_delta_weight("default").detach() for name, layer in semu_layers(model).items()}
    with model.disable_adapter():
        bare = run(model, *x)
    for scale in (0, 0.25, 1, 3.0, -1.0):
        set_scale(model, scale)
        dense = Cnn()
        dense.load_state_dict(
            {key.replace("base_layer.", ""): value for key, value in model.get_base_model().state_dict().items()},
            strict=False,
        )
        for name, delta in deltas.items():
            dense.get_submodule(name).weight.data.add_(delta, alpha=scale)
        torch.testing.assert_close(run(model, *x), run(dense, *x), atol=1e-5, rtol=1e-4)
        model.merge_adapter()
        torch.testing.assert_close(run(model, *x), run(dense, *x), atol=1e-5, rtol=1e-4)
        model.unmerge_adapter()
        if scale == 0:
            assert torch.equal(run(model, *x), bare)


def test_one_adapter_of_two() -> None:
    """Only the named adapter is scaled; an exported LoRA has the scale in it."""
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"], r=2, init_weights=False))
    model.add_adapter("other", SemuConfig(target_modules=["fc1"], r=2, init_weights=False))
    _, whole = to_lora(model, adapter_name="other")
    set_scale(model, -0.5, adapter_name="other")
    layer = model.base_model.model.fc1
    assert layer.scaling == {"default": 1.0, "other": -0.5}
    _, scaled = to_lora(model, adapter_name="other")
    key = "base_model.model.fc1.lora_B.weight"
    torch.testing.assert_close(scaled[key], -0.5 * whole[key])
    layer.set_adapter(["other"])
    layer.scale_layer(4.0)
    assert layer.scaling == {"default": 1.0, "other": -2.0}
    layer.unscale_layer(2.0)
    assert layer.scaling["other"] == -1.0
    layer.unscale_layer()
    assert layer.scaling["other"] == 1.0


def test_refused() -> None:
    """Numbers that are none, unknown adapters, and merged ones, whose weights hold the old scale."""
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"], r=2, init_weights=False))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="`scale`"):
            set_scale(model, bad)
    with pytest.raises(ValueError, match="'none'"):
        set_scale(model, 0.5, adapter_name="none")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        set_scale(model, 0.5)
    assert model.base_model.model.fc1.scaling == {"default": 1.0}
