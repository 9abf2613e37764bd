"""One expert of a mixture: its slice alone is corrected, saved, merged and exported; the others stay to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from semu_peft import NaturalGradient, SemuConfig, initialize_semu_weights, objectives, save_as_lora, unlearn
from semu_peft.tuner.adapted import semu_layers

if Version(transformers.__version__) < Version("5"):
    pytest.skip("experts are layers of their own before transformers 5", allow_module_level=True)

SMALL: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
IDS = torch.arange(24).reshape(3, 8)
EXPERTS = ["layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"]
ONE: dict[str, Any] = {
    "target_modules": [], "target_parameters": EXPERTS, "target_experts": {".*_proj": [2]}, "r": 2,
}  # fmt: skip


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    more = {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    if kind == "mixtral":
        model: Any = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2))
    else:
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**{**SMALL, **more}))
    for name, parameter in model.named_parameters():  # of 0.02 they hardly matter
        if "experts" in name:
            parameter.data.mul_(20)
    return model.eval()


def loss(model: nn.Module, batch: Any) -> Any:
    return model(input_ids=batch, labels=batch).loss


@pytest.mark.parametrize("kind", ["mixtral", "qwen"])
@pytest.mark.parametrize("optimizer", ["adamw", "natural"])
def test_the_others_stay_to_the_bit(kind: str, optimizer: str, tmp_path: Path) -> None:
    base = model_of(kind)
    before = copy.deepcopy(base.state_dict())
    model = get_peft_model(model_of(kind), SemuConfig(**ONE))
    gradient = torch.autograd.grad(loss(base, IDS), [base.model.layers[1].mlp.experts.down_proj])[0][2]
    initialize_semu_weights(model, [IDS], loss, progress=False)
    layers = semu_layers(model)
    assert {name.rpartition(".")[2]: tuple(layer.semu_core["default"].shape) for name, layer in layers.items()} == {
        "gate_up_proj": (1, 2, 2), "down_proj": (1, 2, 2),
    }  # fmt: skip
    down = layers[f"model.{EXPERTS[1]}"]
    u, s, _ = torch.linalg.svd(gradient)
    assert (down.semu_U["default"][0].T @ u[:, :2]).det().abs() > 0.999 and s[1] > 0
    chosen: Any = NaturalGradient() if optimizer == "natural" else lambda cores: torch.optim.AdamW(cores, lr=0.3)
    data, objective = [{"input_ids": IDS, "labels": IDS}], objectives.DecoupledDistillation()
    unlearn(model, data, objective, max_steps=3, optimizer=chosen, progress=False)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert not torch.allclose(expected, base(input_ids=IDS).logits, atol=1e-4)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)
    model.save_pretrained(tmp_path / "semu")
    loaded = PeftModel.from_pretrained(model_of(kind), tmp_path / "semu")
    assert torch.equal(loaded(input_ids=IDS).logits, expected)
    lora = PeftModel.from_pretrained(model_of(kind), save_as_lora(model, tmp_path / "lora"))
    torch.testing.assert_close(lora(input_ids=IDS).logits, expected, atol=1e-5, rtol=0)
    merged = model.merge_and_unload()
    assert torch.equal(merged(input_ids=IDS).logits, expected)
    for name, value in merged.state_dict().items():
        if name.endswith(tuple(EXPERTS)):
            assert torch.equal(value[[0, 1, 3]], before[name][[0, 1, 3]])
            assert not torch.equal(value[2], before[name][2])
        else:
            assert torch.equal(value, before[name])


def test_what_is_no_expert_is_refused() -> None:
    for message, change in {
        r"must be indices of experts .*\[4\] for its shape \(4, 16, 24\)": {"target_experts": {"down_proj": [4]}},
        r"must name parameters that are corrected, got \['w2'\]": {"target_experts": {"w2": [0]}},
        "lists of different indices": {"target_experts": {"down_proj": [1, 1]}},
        "lists of different indices, got": {"target_experts": {"down_proj": 1}},
        "must be indices of experts of .*gate.weight": {
            "target_parameters": ["layers.1.mlp.gate.weight"], "target_experts": {"gate.weight": [0]},
        },
    }.items():  # fmt: skip
        model = model_of("mixtral")
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, SemuConfig(**{**ONE, **change}))


def test_sums_of_adapters_of_different_experts_are_refused() -> None:
    model = get_peft_model(model_of("mixtral"), SemuConfig(**ONE, init_weights=False))
    other = SemuConfig(**{**ONE, "target_experts": {".*_proj": [0]}}, init_weights=False)
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    both = model(input_ids=IDS).logits
    with pytest.raises(ValueError, match="different `target_experts`"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=IDS).logits, both, atol=1e-5, rtol=0)
