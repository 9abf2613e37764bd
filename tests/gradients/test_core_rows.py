"""The rows that a core's gradient is made of: their sum is autograd's gradient, and each example's is its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import gpt2
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from semu_peft import SemuConfig
from semu_peft.gradients.core_rows import Rows, catch_core_rows
from semu_peft.tuner.adapted import semu_layers


class Logits(nn.Module):
    """A language model with a tied head, as a function of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = gpt2()
        self.config = self.language_model.config

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.language_model(input_ids=tokens).logits


IMAGES, VECTORS = torch.randn(5, 3, 6, 6), torch.randn(5, 4, 6)
CASES: dict[str, tuple[nn.Module, Tensor, dict[str, Any]]] = {
    "linear over tokens": (nn.Sequential(nn.Linear(6, 5)), VECTORS, {}),
    "transposed linear": (nn.Sequential(Conv1D(5, 6)), VECTORS, {}),
    "diagonal core": (nn.Sequential(nn.Linear(6, 5)), VECTORS, {"core": "diagonal"}),
    "convolution": (nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding="valid", dilation=2)), IMAGES, {}),
    "padded convolution": (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), IMAGES, {}),
    "embedding": (nn.Sequential(nn.Embedding(11, 6, padding_idx=0)), torch.randint(11, (5, 7)), {}),
    "tied weights": (Logits(), torch.randint(11, (5, 7)), {"target_modules": ["wte"], "ensure_weight_tying": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_make_up_the_gradient_of_every_example(case: str) -> None:
    net, inputs, options = CASES[case]
    config = SemuConfig(**{"target_modules": ["0"], "r": 3, "init_weights": False, **options})
    model = get_peft_model(net, config)
    layers = semu_layers(model)
    (name,) = layers
    core, loss = layers[name].semu_core["default"], lambda x: (model(x).float().sin() ** 2).sum()

    with catch_core_rows(model, layers) as caught:
        caught.catching = True
        loss(inputs).backward()
        examples = sum(_gradients(rows, core) for rows in caught.take()[name])
        assert not any(caught.take().values())
    assert torch.allclose(examples.sum(0), core.grad, rtol=1e-3, atol=1e-4)
    for index in range(len(inputs)):
        core.grad = None
        loss(inputs[index : index + 1]).backward()
        assert torch.allclose(examples[index], core.grad, rtol=1e-3, atol=1e-4)


def _gradients(rows: Rows, core: Tensor) -> Tensor:
    whole = torch.einsum("nsi,nsj->nij", *rows[:2])
    return whole.diagonal(dim1=1, dim2=2) if core.dim() == 1 else whole


def test_layers_whose_rows_are_not_to_be_seen_are_left_out() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3))
    model = get_peft_model(net, SemuConfig(target_modules=["0", "1"], r=1, init_weights=False))
    with catch_core_rows(model, semu_layers(model)) as caught:
        assert "0" not in caught and "1" in caught
    assert not any(module._forward_hooks for module in model.modules())


def test_a_pass_that_is_not_watched_keeps_nothing() -> None:
    config = SemuConfig(target_modules=["0"], r=2, init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
    with catch_core_rows(model, semu_layers(model)) as caught:
        caught.catching = True
        for watching in (False, True):
            caught.watching = watching
            model(VECTORS).sum().backward()
            assert bool(caught.take()["0"]) is watching
