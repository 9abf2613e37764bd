"""Sequences packed into one row: in which models of transformers they are apart, and that others are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from language_batches import packed, padded
from models import Snapshot
from torch import nn

from semu_peft.objectives.tokens import read_tokens

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_local_experts": 2, "num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8
}  # fmt: skip
SINCE_5 = int(transformers.__version__.partition(".")[0]) >= 5  # before, these left the borders out of their masks
WINDOWS = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}


@pytest.mark.parametrize(
    "family, options, apart",
    [
        ("GPT2", {}, True),
        ("GPTJ", {"rotary_dim": 4}, SINCE_5),
        ("GPTNeo", WINDOWS, SINCE_5),
        ("GPTNeoX", {}, True),
        ("Llama", {}, True),
        ("Qwen3", {"head_dim": 8, "num_key_value_heads": 2}, True),
        ("Gemma2", {"head_dim": 8, "num_key_value_heads": 2}, True),
        ("Mixtral", {**EXPERTS, "num_key_value_heads": 2}, True),
        ("Qwen2Moe", {**EXPERTS, "num_key_value_heads": 2}, SINCE_5),
        ("Bloom", {}, False),
        ("Falcon", {}, False),
        ("Mamba", {}, False),
        ("Mpt", {"d_model": 16, "n_heads": 2, "n_layers": 2}, False),
        ("OPT", {"ffn_dim": 24, "word_embed_proj_dim": 16}, False),
    ],
)
def test_packed_sequences_are_apart_or_refused(family: str, options: dict[str, Any], apart: bool) -> None:
    """Whatever is watching the model hears nothing of the trial, and it leaves no trace."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{family}ForCausalLM" if family != "GPT2" else "GPT2LMHeadModel")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    heard: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda *_: heard.append(1))
    before = Snapshot.of(model)
    if apart:
        tokens, expected = read_tokens(model, packed()), read_tokens(model, padded("right"))
        torch.testing.assert_close(tokens.logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert len(heard) == 2
    else:
        with pytest.raises(ValueError, match=f"`position_ids`: {family}ForCausalLM does not keep sequences apart"):
            read_tokens(model, packed())
        assert not heard
    before.assert_same(model)
