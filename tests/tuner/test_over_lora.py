"""SEMU together with LoRA: injected over it, as `PeftMixedModel` has a fixed list of methods."""

from __future__ import annotations

import copy
from typing import Any

import torch
from models import Cnn, llama, run, sample_input
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from semu_peft import (
    SemuConfig,
    SemuLayer,
    initialize_semu_weights,
    set_scale,
)
from semu_peft.tuner.adapted import semu_layers


def both(make: Any, lora_targets: list[str], semu_targets: list[str]) -> tuple[Any, Any]:
    """A bare model, and one with a LoRA and SEMU over it."""
    torch.manual_seed(0)
    base = make().eval()
    lora = LoraConfig(target_modules=lora_targets, init_lora_weights=False, r=2)
    model = inject_adapter_in_model(lora, copy.deepcopy(base), "lora")
    config = SemuConfig(target_modules=semu_targets, r=3, init_weights=False)
    return base, get_peft_model(model, config).eval()


def test_each_adds_its_part() -> None:
    """The output is that of the base weight plus both corrections; SEMU's part can be dialled and switched alone."""
    base, model = both(llama, ["q_proj", "v_proj"], ["q_proj", "down_proj"])
    x = sample_input(base)
    dense = copy.deepcopy(base)
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, SemuLayer):
            weight = dense.get_submodule(name.removesuffix(".base_layer")).weight
            weight.data += module.get_delta_weight("lora").detach()
    set_scale(model, 0.0)
    torch.testing.assert_close(run(model, *x), run(dense, *x), atol=1e-5, rtol=1e-4)
    set_scale(model, 1.0)
    for name, layer in semu_layers(model).items():
        dense.get_submodule(name).weight.data += layer.get_delta_weight("default").detach()
    torch.testing.assert_close(run(model, *x), run(dense, *x), atol=1e-5, rtol=1e-4)


def test_merging_takes_both() -> None:
    """`merge_and_unload` gives a stock model with both corrections, `unload` the base model."""
    for make, lora_targets, semu_targets in (
        (llama, ["q_proj", "v_proj"], ["q_proj", "down_proj"]),
        (Cnn, ["conv1", "head"], ["conv1", "conv2"]),
    ):
        base, model = both(make, lora_targets, semu_targets)
        x = sample_input(base)
        expected = run(model, *x)
        model.merge_adapter()
        torch.testing.assert_close(run(model, *x), expected, atol=1e-5, rtol=1e-4)
        model.unmerge_adapter()
        merged = copy.deepcopy(model).merge_and_unload()
        assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
        torch.testing.assert_close(run(merged, *x), expected, atol=1e-5, rtol=1e-4)
        assert {type(module) for module in merged.modules()} == {type(module) for module in base.modules()}
        torch.testing.assert_close(run(model.unload(), *x), run(base, *x), atol=1e-6, rtol=1e-5)


def test_forgetting_what_a_lora_has_learned() -> None:
    """The forget gradient is taken at the model with its LoRA, and the LoRA's weights stay as they are."""
    base, model = both(llama, ["q_proj"], ["q_proj", "up_proj"])
    before = {key: value.clone() for key, value in model.state_dict().items() if ".lora_" in key}
    tokens = sample_input(base)[0]

    def loss_of(model: Any, batch: Any) -> Any:
        return model(input_ids=batch, labels=batch).loss

    spectra = []
    for scale in (1.0, 0.0):
        for module in model.modules():
            if isinstance(module, BaseTunerLayer) and not isinstance(module, SemuLayer):
                module.set_scale("lora", scale)
        profile = initialize_semu_weights(model, [tokens], loss_of, overwrite=True, progress=False)
        spectra.append(next(iter(profile.layers.values())).singular_values)
    assert not torch.allclose(spectra[0], spectra[1])
    assert before and all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
