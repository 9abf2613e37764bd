"""PEFT renames targets of mixtures of experts on loading; an exported LoRA survives that, or is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from semu_peft import SemuConfig, save_as_lora, to_lora

conversion = pytest.importorskip(
    "peft.utils.transformers_weight_conversion",
    reason="PEFT renames for transformers 5 only",
    exc_type=ImportError,
)
TINY: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4, "n_routed_experts": 4, "num_experts": 4,
    "num_local_experts": 4, "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_experts": 4, "moe_k": 2,
    "moe_num_shared_experts": 1, "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2, "moe_topk": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_start_index": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "expert_ffn_hidden_size": 16, "ffn_hidden_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "zero_expert_num": 0,
}  # fmt: skip
MIXTURES = [
    "afmoe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe",
    "glm4_moe_lite", "hunyuan_v1_moe", "longcat_flash", "minimax", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe",
    "solar_open",
]  # fmt: skip


def mixture(kind: str) -> Any:
    default = AutoConfig.for_model(kind)
    config = AutoConfig.for_model(kind, **{key: value for key, value in TINY.items() if hasattr(default, key)})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    return model


@pytest.mark.parametrize("uniform_rank", [True, False])
@pytest.mark.parametrize("kind", MIXTURES)
def test_stock_peft_computes_as_the_adapter(kind: str, uniform_rank: bool, tmp_path: Path) -> None:
    base = mixture(kind)
    tokens = torch.randint(3, 60, (2, 6))
    ranks = {r".*\.layers\.0\..*": 1}
    config = SemuConfig(target_modules="all-linear", init_weights=False, r=3, rank_pattern=ranks)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        before, wanted = base(tokens).logits, model(tokens).logits
        save_as_lora(model, tmp_path, uniform_rank=uniform_rank)
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()(tokens).logits
    assert (wanted - before).abs().max() > 1e-4
    torch.testing.assert_close(loaded, wanted, atol=1e-6, rtol=1e-4)


def test_targets_that_peft_moves_go_by_the_name_of_their_weight() -> None:
    model = get_peft_model(mixture("dots1"), SemuConfig(target_modules="all-linear", init_weights=False, r=2))
    config, _ = to_lora(model)
    assert "model.layers.0.mlp.up_proj.weight" in config.target_parameters
    assert "model.layers.0.self_attn.q_proj" in config.target_modules
    moved = LoraConfig(target_modules=["model.layers.0.mlp.down_proj"])
    conversion.convert_peft_config_for_transformers(moved, model.get_base_model(), None)
    assert not moved.target_modules  # the fault is still there: without it, no name would have to change


def test_what_peft_would_rename_is_refused(tmp_path: Path) -> None:
    model = mixture("laguna")
    adapted = get_peft_model(model, SemuConfig(target_modules="all-linear", init_weights=False, r=2))
    with pytest.raises(ValueError, match="Laguna.*PEFT converts names.*merge_and_unload"):
        save_as_lora(adapted, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
