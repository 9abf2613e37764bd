"""Code around a model asks a corrected layer what it would ask its base layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from semu_peft import SemuConfig
from semu_peft.tuner.adapted import semu_layers

LAYERS: dict[str, tuple[Any, tuple[int, int], dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(4, 6), (4, 6), {}),
    "conv1d of gpt2": (lambda: Conv1D(6, 4), (4, 6), {"nf": 6}),
    "convolution": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        (4, 6),
        {"stride": (2, 2), "padding": (1, 1), "kernel_size": (3, 3), "groups": 2, "in_channels": 4, "dilation": (1, 1)},
    ),
    "embedding": (
        lambda: nn.Embedding(9, 4, padding_idx=1),
        (9, 4),
        {"num_embeddings": 9, "embedding_dim": 4, "padding_idx": 1, "sparse": False},
    ),
    "attention": (lambda: nn.MultiheadAttention(4, 2), (4, 12), {"embed_dim": 4, "num_heads": 2, "batch_first": False}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_the_base_layer_answers(name: str) -> None:
    """PEFT's `in_features` and `out_features` on every kind of layer, and the base layer's own settings; what it does
    not have is missing here too."""
    make, (inputs, outputs), settings = LAYERS[name]
    model = get_peft_model(nn.Sequential(make()), SemuConfig(target_modules=["0"], r=2, init_weights=False))
    layer = model.base_model.model[0]
    assert (layer.in_features, layer.out_features) == (inputs, outputs)
    assert {key: getattr(layer, key) for key in settings} == settings
    assert not hasattr(layer, "no_such_thing") and not hasattr(layer, "lora_A")
    again = copy.deepcopy(layer)
    assert again.get_base_layer() is not layer.get_base_layer() and again.in_features == inputs


def test_over_another_adapter() -> None:
    """The answers are the bare layer's; what another method keeps in its layer does not shine through."""
    base = inject_adapter_in_model(LoraConfig(target_modules=["0"], r=2), nn.Sequential(nn.Conv2d(4, 6, 3)), "lora")
    layer = semu_layers(get_peft_model(base, SemuConfig(target_modules=["0"])))["0"]
    assert layer.kernel_size == (3, 3) and not hasattr(layer, "lora_A")


def test_machinery_that_works_on_the_module_itself() -> None:
    """Accelerate's hooks and PyTorch's parametrisations of the base layer are not taken for the wrapper's."""
    base = nn.Sequential(nn.Linear(4, 4))
    add_hook_to_module(base[0], ModelHook())
    layer = semu_layers(get_peft_model(base, SemuConfig(target_modules=["0"], r=2, init_weights=False)))["0"]
    assert not hasattr(layer, "_hf_hook")
    remove_hook_from_module(layer, recurse=True)
    assert not hasattr(layer.base_layer, "_hf_hook")
    assert layer(torch.ones(1, 4)).shape == (1, 4)
    assert not parametrize.is_parametrized(layer)
