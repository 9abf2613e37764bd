"""Weights that a parent reads past their layer: observed while an adapter is initialised, and left out aloud."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft import SemuConfig, initialize_semu_weights, objectives, unlearn

OBJECTIVE = objectives.RandomLabel()


class Factorised(nn.Module):
    """Scores all items with the embedding that it also looks items up in, as matrix factorisation does."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.hidden = nn.Embedding(20, 6), nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.hidden(self.items(tokens).mean(1).to(self.hidden.weight.dtype))  # only looks at the dtype
        return hidden @ self.items.weight.T


class Windowed(nn.Module):
    """Calls none of its projections, as torchvision's shifted windows do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(6, 18), nn.Linear(6, 20)
        self.items = nn.Embedding(20, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = F.linear(self.items(tokens), self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean(1))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(20, (8, 4), generator=generator), torch.randint(20, (8,), generator=generator))]


def initialised(base: nn.Module, **config: Any) -> tuple[Any, list[str]]:
    """The model, and what was warned of while it was initialised."""
    torch.manual_seed(0)
    model = get_peft_model(base, SemuConfig(**config))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        initialize_semu_weights(model, batches(), OBJECTIVE, progress=False)
    return model, [str(warning.message) for warning in caught]


def test_a_layer_that_is_called_and_read_past_is_left_out_aloud() -> None:
    model, said = initialised(Factorised().eval(), target_modules=["items", "hidden"])
    ranks = model.peft_config["default"].ranks
    assert ranks["items"] == 0 and ranks["hidden"] > 0
    assert len(said) == 1 and "1 target layers (items)" in said[0] and "target_parameters` ('items.weight')" in said[0]
    unlearn(model, batches(), OBJECTIVE, epochs=3, progress=False)
    tokens = batches()[0][0]
    trained = model(tokens).detach()
    assert torch.allclose(model.merge_and_unload()(tokens), trained, atol=1e-5)


def test_a_layer_that_is_never_called_is_left_out_aloud() -> None:
    model, said = initialised(Windowed().eval(), target_modules=["qkv", "head"])
    assert model.peft_config["default"].ranks["qkv"] == 0
    assert len(said) == 1 and "qkv" in said[0] and "target_parameters" in said[0]


def test_it_is_an_error_where_nothing_else_is_left() -> None:
    model = get_peft_model(Factorised(), SemuConfig(target_modules=["items"]))
    with (
        pytest.raises(ValueError, match=r"No target layer is left: .*'items'.*target_parameters"),
        pytest.warns(UserWarning, match="read past"),
    ):
        initialize_semu_weights(model, batches(), OBJECTIVE, progress=False)
    with pytest.raises(ValueError, match=r"does not call them.*target_parameters"):
        initialised(Windowed(), target_modules=["qkv"])


@pytest.mark.parametrize(("make", "name"), [(Factorised, "items.weight"), (Windowed, "qkv.weight")])
def test_the_mend_that_it_names_corrects_every_read(make: Any, name: str) -> None:
    tokens = batches()[0][0]
    model, said = initialised(make().eval(), target_modules=[], target_parameters=[name])
    assert said == []
    before = model(tokens).detach()
    unlearn(model, batches(), OBJECTIVE, epochs=3, learning_rate=3e-2, progress=False)
    trained = model(tokens).detach()
    assert (trained - before).abs().max() > 1e-3
    assert torch.allclose(model.merge_and_unload()(tokens), trained, atol=1e-5)


def test_nothing_is_watched_afterwards() -> None:
    model, _ = initialised(Factorised(), target_modules=["items", "hidden"])
    assert model.base_model.model.items.weight is model.base_model.model.items.base_layer.weight
