"""An edit as an adapter: exact where it fits, with its error stated where it does not."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Cnn, Mlp, gpt2
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from semu_peft import SemuConfig, to_lora
from semu_peft.edits import Edit
from semu_peft.edits.deltas import Dense, LowRank, Sparse


def edited(model: nn.Module, edit: Edit, x: Tensor) -> Tensor:
    with edit.apply(model), torch.no_grad():
        return model.eval()(x)


def test_a_low_rank_edit_comes_over_exactly(tmp_path: Path) -> None:
    base, x = Mlp().eval(), torch.randn(5, 6)
    edit = Edit({"fc1.weight": LowRank(torch.randn(10, 2), torch.randn(6, 2)),
                 "head": LowRank(torch.randn(4, 3), torch.randn(8, 3))})  # fmt: skip
    original, expected = base(x), edited(base, edit, x)
    carried = edit.to_semu(copy.deepcopy(base))
    assert (carried.ranks, carried.left_out) == ({"fc1": 2, "head": 3}, ())
    assert carried.error == 0
    assert torch.allclose(carried.model.eval()(x), expected, atol=1e-5)
    with carried.model.disable_adapter():
        assert torch.equal(carried.model(x), original)
    carried.model.save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(read(x), carried.model(x))
    config, state_dict = to_lora(carried.model)
    lora = get_peft_model(copy.deepcopy(base), config)
    set_peft_model_state_dict(lora, state_dict)
    assert torch.allclose(lora.eval()(x), expected, atol=1e-5)
    assert torch.allclose(carried.model.merge_and_unload()(x), expected, atol=1e-5)


def test_the_stated_error_is_what_is_missing() -> None:
    change, bias = torch.randn(10, 6), torch.randn(10)
    edit = Edit({"fc1": Dense(change), "fc1.bias": Dense(bias)})
    values = torch.linalg.svdvals(change)
    carried = edit.to_semu(Mlp(), r=2)
    assert carried.left_out == ("fc1.bias",)
    lost = values[2:].square().sum()
    assert math.isclose(carried.errors["fc1"], float((lost / values.square().sum()).sqrt()), rel_tol=1e-4)
    total = values.square().sum() + bias.square().sum()
    assert math.isclose(carried.error, float(((lost + bias.square().sum()) / total).sqrt()), rel_tol=1e-4)
    layer = carried.model.base_model.model.fc1
    assert math.isclose((change - layer.get_delta_weight("default")).norm().item(), float(lost.sqrt()), rel_tol=1e-4)
    share = edit.to_semu(Mlp(), explained_variance=0.5)
    assert share.errors["fc1"] ** 2 <= 0.5 and share.ranks["fc1"] < 6


def test_convolutions_and_other_adapters(tmp_path: Path) -> None:
    base, x = Cnn().eval(), torch.randn(2, 3, 8, 8)
    edit = Edit({"conv1": Dense(torch.randn(8, 27)), "conv2.weight": Dense(torch.randn(8, 4, 3, 3)),
                 "norm.weight": Dense(torch.zeros(8))})  # fmt: skip
    expected = edited(base, edit, x)
    model = get_peft_model(copy.deepcopy(base), SemuConfig(target_modules=["head"], r=1, init_weights=False))
    carried = edit.to_semu(model, adapter_name="second")
    assert carried.model is model and carried.left_out == ("norm.weight",)
    assert model.base_model.model.head.active_adapters == ["default", "second"]
    with torch.no_grad():
        model.base_model.model.head.semu_core["default"].zero_()
    assert torch.allclose(model.eval()(x), expected, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert {"second", "adapter_config.json"} <= {file.name for file in tmp_path.iterdir()}


def test_an_applied_edit_is_not_carried_a_second_time() -> None:
    model, edit = Mlp(), Edit({"fc1": Dense(torch.randn(10, 6))})
    with edit.apply(model), pytest.raises(ValueError, match="applied to its weights already"):
        edit.to_semu(model)
    with pytest.raises(ValueError, match="SEMU has no layer for any"):
        Edit({"fc1.bias": Dense(torch.ones(10))}).to_semu(model)
    assert isinstance(model.fc1, nn.Linear)


@pytest.mark.parametrize("name", ["transformer.wte.weight", "lm_head"])
def test_a_tied_weight_is_corrected_in_all_its_layers(name: str) -> None:
    base: Any = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, bos_token_id=0, eos_token_id=0)
    ).eval()
    edit, ids = Edit({name: LowRank(torch.randn(16, 2), torch.randn(8, 2))}), torch.arange(5)[None]
    with edit.apply(base), torch.no_grad():
        expected = base(ids).logits
    carried = edit.to_semu(copy.deepcopy(base))
    assert (carried.ranks, carried.error) == ({"transformer.wte": 2}, 0)
    assert torch.allclose(carried.model.eval()(ids).logits, expected, atol=1e-4)


@pytest.mark.parametrize("tying", [False, True])
def test_an_edit_follows_the_adapters_that_are_there_in_tying(tying: bool) -> None:
    """All adapters of a model have it alike, and nobody can say it to an edit."""
    base = gpt2()
    config = SemuConfig(target_modules=["wte", "c_fc"], r=2, init_weights=False, ensure_weight_tying=tying)
    model = get_peft_model(base, config)
    name, fc = "transformer.wte.weight", "transformer.h.0.mlp.c_fc"
    rows, width = base.get_input_embeddings().base_layer.weight.shape
    edit = Edit(
        {
            name: LowRank(torch.randn(rows, 1), torch.randn(width, 1)),
            fc: LowRank(torch.randn(4 * width, 1), torch.randn(width, 1)),
        }
    )
    both, one = edit.to_semu(model, adapter_name="both"), edit.only(fc).to_semu(model, adapter_name="one")
    assert both.left_out == (() if tying else (name,))
    assert (both.ranks[fc], one.ranks) == (1, {fc: 1})


def test_what_is_read_past_its_layer_or_shared_is_left_out_and_named() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(3, 3), nn.Linear(4, 4), nn.Linear(4, 4))
    model[3].weight = model[2].weight
    names = {"0.in_proj_weight": (24, 8), "0.out_proj.weight": (8, 8), "1.weight": (3, 3), "2.weight": (4, 4)}
    carried = Edit({name: Dense(torch.randn(shape)) for name, shape in names.items()}).to_semu(model)
    assert carried.left_out == ("0.in_proj_weight", "0.out_proj.weight", "2.weight")
    assert (carried.ranks, carried.errors["1"] < 1e-5, carried.error > 0.9) == ({"1": 3}, True, True)


def test_a_sparse_edit_is_a_shira_of_stock_peft(tmp_path: Path) -> None:
    base, x = Mlp().eval(), torch.randn(5, 6)
    first = Sparse(torch.arange(0, 60, 3), torch.randn(20), (10, 6))  # 20 of r (m + n) = 32 with r = 2
    second = Sparse(torch.tensor([79]), torch.tensor([5.0]), (8, 10))
    edit = Edit({"fc1.weight": first, "fc2": second})
    expected = edited(base, edit, x)
    config, state_dict = edit.to_shira(base)
    assert config.r == 2
    model = get_peft_model(copy.deepcopy(base), config)
    set_peft_model_state_dict(model, state_dict)
    assert torch.equal(model.eval()(x), expected)
    model.save_pretrained(tmp_path)
    read: Any = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(read(x), expected)
    assert int((read.base_model.model.fc1.get_delta_weight("default").to_dense() != 0).sum()) == 20


def test_what_shira_cannot_hold_is_refused() -> None:
    model = Mlp()
    for edit, message in (
        (Edit({"fc1.bias": Dense(torch.ones(10))}), "changes weights of `nn.Linear` alone"),
        (Edit({}), "this edit changes nothing"),
        (Edit({"fc1": Dense(torch.ones(10, 6))}), r"more than the 10 × 6 of 'fc1.weight'"),
    ):
        with pytest.raises(ValueError, match=message):
            edit.to_shira(model)
