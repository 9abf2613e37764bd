"""Names of experts from transformers 4 mean the parameters that transformers 5 has fused them into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from semu_peft import SemuConfig, initialize_semu_weights, unlearn
from semu_peft.tuner.adapted import semu_layers

if Version(transformers.__version__) < Version("5"):
    pytest.skip("experts are layers of their own before transformers 5", allow_module_level=True)

SMALL: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
ATTENTION = {f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"}
ROUTER = {"model.layers.0.mlp.gate.weight"}
EXPERTS = {f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
SHARED = {f"model.layers.0.mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2))


def qwen() -> nn.Module:
    config = {**SMALL, "num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    torch.manual_seed(0)
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**config))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ATTENTION | ROUTER | EXPERTS),
        (["w1", "w2", "w3"], EXPERTS),
        (
            ["q_proj", "w2", "gate"],
            {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.down_proj"} | ROUTER,
        ),
        (r".*\.(w1|w2|w3|q_proj)", EXPERTS | {"model.layers.0.self_attn.q_proj"}),
        (["q_proj"], {"model.layers.0.self_attn.q_proj"}),
    ],
    ids=["all-linear", "experts", "some", "pattern", "none"],
)
def test_what_lora_corrects(targets: Any, expected: set[str], tmp_path: Path) -> None:
    """SEMU corrects what PEFT's LoRA does by the same names, and the saved adapter says so."""
    lora = get_peft_model(mixtral(), LoraConfig(target_modules=targets)).base_model
    assert {*lora.targeted_module_names, *lora.targeted_parameter_names} == expected
    model = get_peft_model(mixtral(), SemuConfig(target_modules=targets))
    assert set(semu_layers(model)) == expected
    batch = torch.tensor([[1, 2, 3, 4]])
    initialize_semu_weights(model, [batch], lambda m, b: m(b, labels=b).loss, progress=False)
    unlearn(model, [batch], lambda m, b: -m(b, labels=b).loss, progress=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mixtral(), tmp_path)
    assert torch.equal(loaded.eval()(batch).logits, model.eval()(batch).logits)


def test_a_name_that_a_layer_still_goes_by() -> None:
    """Shared experts are layers as before: their names mean them, which PEFT's LoRA would move to the fused ones."""
    assert set(semu_layers(get_peft_model(qwen(), SemuConfig(target_modules=["gate_proj", "up_proj"])))) == {
        name for name in SHARED if "down" not in name
    }
    everything = set(semu_layers(get_peft_model(qwen(), SemuConfig(target_modules="all-linear"))))
    assert everything >= ATTENTION | ROUTER | EXPERTS | SHARED


def test_a_pattern_that_counts_the_experts() -> None:
    model = get_peft_model(mixtral(), SemuConfig(target_modules=r"model\.layers\.0\..*\.experts\.\d+\.w2"))
    assert set(semu_layers(model)) == {"model.layers.0.mlp.experts.down_proj"}


def test_a_part_of_what_is_fused() -> None:
    with pytest.raises(ValueError, match=r"\['w1'\], which transformers 5 has fused with \['w3'\].*'gate_up_proj'"):
        get_peft_model(mixtral(), SemuConfig(target_modules=["w1"]))


def test_a_second_adapter_of_other_parameters() -> None:
    model = get_peft_model(mixtral(), SemuConfig(target_modules=["w1", "w2", "w3"]))
    model.add_adapter("same", SemuConfig(target_modules=["w1", "w2", "w3"]))
    assert set(semu_layers(model, "same")) == EXPERTS
    with pytest.raises(ValueError, match="same `target_parameters`"):
        model.add_adapter("other", SemuConfig(target_modules=["w2"]))
