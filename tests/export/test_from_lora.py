"""A LoRA as a SEMU adapter: the same correction, with orthonormal bases."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Cnn, Mlp, gpt2, llama, run, sample_input, vector_batches
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import nn

from semu_peft import SemuConfig, from_lora, objectives, to_lora, unlearn
from semu_peft.tuner.adapted import semu_layers

MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mlp": (Mlp, {"target_modules": ["fc1", "head"], "rank_pattern": {"head": 2}, "alpha_pattern": {"fc1": 3}}),
    "cnn": (Cnn, {"target_modules": ["conv1", "head"], "use_rslora": True}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "llama": (llama, {"target_modules": "all-linear", "r": 32}),
}


def lora_of(name: str, **options: Any) -> tuple[nn.Module, Any]:
    """The bare model, and a copy of it with a random LoRA."""
    torch.manual_seed(0)
    base, settings = MODELS[name]
    model = base().eval()
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings, **options})
    return copy.deepcopy(model), get_peft_model(model, config).eval()


@pytest.mark.parametrize("name", MODELS)
def test_the_correction_is_the_same(name: str, tmp_path: Path) -> None:
    """From a saved LoRA: outputs are equal, bases orthonormal, ranks no larger than the LoRA's or the layer's."""
    base, lora = lora_of(name)
    x = sample_input(base)
    lora.save_pretrained(tmp_path)
    config, state = from_lora(LoraConfig.from_pretrained(str(tmp_path)), load_peft_weights(str(tmp_path)))
    model = get_peft_model(base, config)
    assert not set_peft_model_state_dict(model, state).unexpected_keys
    torch.testing.assert_close(run(model, *x), run(lora, *x), atol=1e-5, rtol=1e-5)
    for key, layer in semu_layers(model).items():
        other = lora.get_submodule(f"base_model.model.{key}")
        assert layer.is_initialized("default")
        assert layer.r["default"] <= min(other.r["default"], *layer.semu_U["default"].shape[:1])
        torch.testing.assert_close(
            layer.get_delta_weight("default"), other.get_delta_weight("default"), atol=1e-5, rtol=1e-5
        )
        for basis in (layer.semu_U["default"], layer.semu_V["default"]):
            torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[-1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["norm"], "bias": "semu_only"}, {"bias": "all"}])
def test_there_and_back(options: dict[str, Any]) -> None:
    """`from_lora(*to_lora(model))` is the adapter again, with what else it trains."""
    torch.manual_seed(0)
    base = Cnn().eval()
    config = SemuConfig(target_modules=["conv1", "head"], r=3, init_weights=False, **options)
    model = get_peft_model(copy.deepcopy(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    x = sample_input(base)
    expected = run(model, *x)
    lora_config, lora_state = to_lora(model)
    stock = get_peft_model(copy.deepcopy(base), lora_config)
    set_peft_model_state_dict(stock, lora_state)
    torch.testing.assert_close(run(stock, *x), expected, atol=1e-5, rtol=1e-5)
    again_config, again_state = from_lora(lora_config, lora_state)
    assert again_config.bias == config.bias and again_config.modules_to_save == config.modules_to_save
    again = get_peft_model(copy.deepcopy(base), again_config)
    set_peft_model_state_dict(again, again_state)
    torch.testing.assert_close(run(again, *x), expected, atol=1e-5, rtol=1e-5)


def test_a_lora_saved_for_inference_is_trained_on(tmp_path: Path) -> None:
    """PEFT saves every LoRA for inference; the adapter made of it is there to be trained."""
    lora = get_peft_model(Mlp(), LoraConfig(target_modules=["fc1"], init_lora_weights=False))
    lora.save_pretrained(tmp_path)
    config, state_dict = from_lora(LoraConfig.from_pretrained(tmp_path), load_peft_weights(str(tmp_path)))
    model = get_peft_model(Mlp(), config)
    set_peft_model_state_dict(model, state_dict)
    before = semu_layers(model)["fc1"].semu_core["default"].clone()
    unlearn(model, vector_batches(), objectives.GradientAscent(), progress=False)
    assert not torch.equal(semu_layers(model)["fc1"].semu_core["default"], before)


def test_biases_of_layers_without_a_direction() -> None:
    """A layer of rank 0 has no LoRA; its trained bias is exported under the plain layer's name."""
    torch.manual_seed(0)
    base = Mlp().eval()
    config = SemuConfig(target_modules=["fc1", "head"], rank_pattern={"fc1": 0, "head": 2}, bias="all")
    model = get_peft_model(copy.deepcopy(base), config)
    layer = model.base_model.model.head
    layer.set_basis("default", torch.eye(4)[:, :2], torch.eye(8)[:, :2], torch.randn(2, 2))
    model.base_model.model.fc1.set_basis("default", torch.zeros(10, 0), torch.zeros(6, 0))
    model.base_model.model.fc1.base_layer.bias.data.add_(1.0)
    lora_config, state = to_lora(model)
    stock = get_peft_model(copy.deepcopy(base), lora_config)
    assert not set_peft_model_state_dict(stock, state).unexpected_keys
    x = sample_input(base)
    torch.testing.assert_close(run(stock, *x), run(model, *x), atol=1e-6, rtol=1e-6)


def test_cut_down_by_energy_and_rank() -> None:
    """Bounds give the Eckart–Young approximation of the dense correction."""
    base, lora = lora_of("mlp")
    weights = get_peft_model_state_dict(lora)
    for options in ({"explained_variance": 0.8}, {"r": 1}):
        config, state = from_lora(lora.peft_config["default"], weights, **options)
        model = get_peft_model(copy.deepcopy(base), config)
        set_peft_model_state_dict(model, state)
        for key, layer in semu_layers(model).items():
            dense = lora.get_submodule(f"base_model.model.{key}").get_delta_weight("default")
            values = torch.linalg.svdvals(dense.double())
            rank = layer.r["default"]
            lost = (dense - layer.get_delta_weight("default")).norm().item()
            assert lost == pytest.approx(values[rank:].norm().item(), abs=1e-5)
            assert rank == 1 if "r" in options else lost**2 <= 0.2 * dense.norm().item() ** 2 + 1e-6


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("mlp", {"use_dora": True}, "use_dora"),
        ("mlp", {"lora_bias": True}, "lora_bias"),
        ("cnn", {"target_modules": ["conv2"]}, "conv2.*grouped"),
        ("gpt2", {"target_modules": ["wte"]}, "LoRA"),
        ("gpt2", {"target_modules": ["wte", "c_attn"]}, "wte"),
    ],
)
def test_what_is_more_than_a_product(name: str, options: dict[str, Any], words: str) -> None:
    """Variants of LoRA that no `U R Vᵀ` equals are refused by name."""
    _, lora = lora_of(name, **options)
    with pytest.raises(ValueError, match=words):
        from_lora(lora.peft_config["default"], get_peft_model_state_dict(lora, save_embedding_layers=False))


def test_refused() -> None:
    """An empty file, another method's file, half a pair and impossible bounds."""
    _, lora = lora_of("mlp")
    config, state = lora.peft_config["default"], get_peft_model_state_dict(lora)
    half = {key: value for key, value in state.items() if "lora_A" in key}
    for weights, bounds, words in (
        ({}, {}, "nothing"),
        ({"base_model.model.fc1.semu_U.semu_U": torch.zeros(1)}, {}, "semu_U"),
        (half, {}, "lora_B"),
        (state, {"r": 0}, "`r`"),
        (state, {"explained_variance": 0.0}, "explained_variance"),
    ):
        with pytest.raises(ValueError, match=words):
            from_lora(config, weights, **bounds)


def test_peft_converts_ours() -> None:
    """`peft.convert_to_lora` takes linear layers, exactly at a rank that is large enough; convolutions it refuses."""
    from peft import convert_to_lora

    torch.manual_seed(0)
    base = llama()
    x = sample_input(base)
    model = get_peft_model(
        copy.deepcopy(base), SemuConfig(target_modules=["q_proj", "down_proj"], r=3, init_weights=False)
    ).eval()
    assert model.supports_lora_conversion()
    for rank in (3, 5, 1.0):
        config, state = convert_to_lora(model, rank=rank)
        lora = get_peft_model(copy.deepcopy(base), config)
        set_peft_model_state_dict(lora, state)
        torch.testing.assert_close(run(lora, *x), run(model, *x), atol=1e-5, rtol=1e-5)
    network = get_peft_model(Cnn(), SemuConfig(target_modules=["conv1"], r=2, init_weights=False))
    assert not network.supports_lora_conversion()
    with pytest.raises(TypeError, match="Conv2d"):
        convert_to_lora(network, rank=2)


def test_peft_saves_ours(tmp_path: Path) -> None:
    """`peft.save_as_lora` writes a folder that stock PEFT loads to the same output."""
    from peft import PeftModel, save_as_lora

    torch.manual_seed(0)
    base = gpt2()
    x = sample_input(base)
    model = get_peft_model(copy.deepcopy(base), SemuConfig(target_modules=["c_attn"], r=3, init_weights=False)).eval()
    save_as_lora(tmp_path, model, rank=3)
    torch.testing.assert_close(run(PeftModel.from_pretrained(base, tmp_path), *x), run(model, *x), atol=1e-5, rtol=1e-5)
