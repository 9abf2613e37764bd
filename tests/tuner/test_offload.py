"""Models whose weights are elsewhere while nobody needs them, and weights in eight bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from models import Mlp, llama, run, sample_input, unet_condition
from peft import PeftModel, get_peft_model
from torch import nn

from semu_peft import SemuConfig, initialize_semu_weights, objectives, unlearn
from semu_peft.adapter.whole_model import add_adapter, merge_and_remove
from semu_peft.tuner.adapted import semu_layers

WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, folder: disk_offload(model, str(folder), execution_device="cpu"),
    "some": lambda model, folder: dispatch_model(
        model,
        {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
         "model.rotary_emb": "cpu", "lm_head": "disk"},
        main_device="cpu", offload_dir=str(folder),
    ),
}  # fmt: skip


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(input_ids=batch, labels=batch).loss


def adapted(model: Any, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    config = SemuConfig(**{"target_modules": "all-linear", "r": 3, "init_weights": False, **options})
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("way", WAYS)
def test_offloaded_weights(way: str, tmp_path: Path) -> None:
    """The adapter stays in memory, and loading, running, training, merging and unloading do as on a model in memory."""
    base = llama()
    x = sample_input(base)
    reference = adapted(copy.deepcopy(base))
    expected, bare = run(reference, *x), run(base, *x)
    reference.save_pretrained(tmp_path / "adapter")

    def offloaded() -> Any:
        model = WAYS[way](copy.deepcopy(base), tmp_path / "weights")
        assert any(parameter.is_meta for parameter in model.parameters())
        return model

    for model in (PeftModel.from_pretrained(offloaded(), tmp_path / "adapter"), adapted(offloaded())):
        parts = [part["default"] for layer in semu_layers(model).values() for part in (layer.semu_U, layer.semu_core)]
        assert not any(part.is_meta for part in parts)
        torch.testing.assert_close(run(model, *x), expected, atol=1e-6, rtol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(run(model, *x), bare, atol=1e-6, rtol=1e-5)
    loss_of(model, x[0]).backward()
    loss_of(reference, x[0]).backward()
    for name, layer in semu_layers(model).items():
        wanted = semu_layers(reference)[name].semu_core["default"].grad
        torch.testing.assert_close(layer.semu_core["default"].grad, wanted, atol=1e-6, rtol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(run(model, *x), expected, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(run(model, *x), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(run(model.merge_and_unload(), *x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_offloaded_models_are_unlearned_and_merged(way: str, tmp_path: Path) -> None:
    """As the model in memory, whose weights can be moved to where it is trained."""
    base = llama()
    batch = {"input_ids": sample_input(base)[0], "labels": sample_input(base)[0]}
    outputs = []
    for model in (copy.deepcopy(base), WAYS[way](copy.deepcopy(base), tmp_path)):
        add_adapter(model, SemuConfig(target_modules=["q_proj", "down_proj"], r=3))
        initialize_semu_weights(model, [batch], objectives.GradientAscent(), progress=False)
        unlearn(model, [batch], objectives.GradientAscent(), max_steps=2, learning_rate=1e-2, progress=False)
        outputs.append(run(model.eval(), batch["input_ids"]))
        merge_and_remove(model)
        torch.testing.assert_close(run(model, batch["input_ids"]), outputs[-1], atol=1e-5, rtol=1e-4)
    assert (outputs[0] - run(base, batch["input_ids"])).abs().max() > 1e-3
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-4)


def test_bases_from_offloaded_weights(tmp_path: Path) -> None:
    """`init_weights="weight"` reads the weight from where it is."""
    base = llama()
    reference = adapted(copy.deepcopy(base), init_weights="weight")
    model = adapted(WAYS["disk"](copy.deepcopy(base), tmp_path), init_weights="weight")
    for name, layer in semu_layers(model).items():
        wanted = semu_layers(reference)[name]
        for ours, theirs in ((layer.semu_U, wanted.semu_U), (layer.semu_V, wanted.semu_V)):
            torch.testing.assert_close(
                ours["default"] @ ours["default"].T, theirs["default"] @ theirs["default"].T, atol=1e-4, rtol=0
            )


def test_a_base_model_on_the_meta_device(tmp_path: Path) -> None:
    """An adapter can be put onto a model without weights, and the whole be filled afterwards."""
    base = Mlp()
    x = sample_input(base)
    reference = adapted(copy.deepcopy(base))
    expected = run(reference, *x)
    with torch.device("meta"):
        empty = Mlp()
    model = adapted(empty)
    model.load_state_dict(reference.state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    torch.testing.assert_close(run(model, *x), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("init_weights", [False, "weight"])
def test_eight_bit_floats(init_weights: Any) -> None:
    """Weights stored as float8 (diffusers' layerwise casting): the adapter is float32, and merging keeps the dtype.

    The output is that of the same model with the rounded weights in float32.
    """
    torch.manual_seed(0)
    rounded = unet_condition()
    inputs = sample_input(rounded)
    stored = copy.deepcopy(rounded)
    stored.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    narrow = {name for name, weight in stored.named_parameters() if weight.dtype == torch.float8_e4m3fn}
    for name, weight in rounded.named_parameters():
        if name in narrow:
            weight.data = weight.data.to(torch.float8_e4m3fn).float()
    outputs = []
    for model in (rounded, stored):
        torch.manual_seed(1)
        model.add_adapter(SemuConfig(target_modules=["to_q", "conv1"], r=3, init_weights=init_weights))
        for layer in semu_layers(model).values():
            parts = (layer.semu_U["default"], layer.semu_V["default"], layer.semu_core["default"])
            assert {part.dtype for part in parts} == {torch.float32}
            layer.semu_core["default"].data = torch.eye(3)
        outputs.append(run(model, *inputs))
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-4)
    layer = next(iter(semu_layers(stored).values()))
    layer.merge(safe_merge=True)
    assert layer.get_base_layer().weight.dtype == torch.float8_e4m3fn
