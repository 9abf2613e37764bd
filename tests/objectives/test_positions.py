"""Rows that are padded on the left, in models with absolute positions; and all that positions must not be told to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from language_batches import packed, padded
from models import gpt2, llama
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from semu_peft import SemuConfig
from semu_peft.objectives.positions import counted_from_first
from semu_peft.objectives.tokens import read_tokens

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
WINDOWS = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
LEFT = padded("left", more=2)


def made(family: str, options: dict[str, Any]) -> Any:
    """A tiny model in which positions make a difference."""
    kind = getattr(transformers, family)
    torch.manual_seed(0)
    model = kind(kind.config_class(**{**SIZES, **options})).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def told(model: nn.Module, batch: Any = LEFT) -> bool:
    """Whether positions are given to a model beside a batch that has none."""
    return "position_ids" in counted_from_first(model, {key: batch[key] for key in ("input_ids", "attention_mask")})


@pytest.mark.parametrize(
    "family, options, is_told",
    [
        ("GPT2LMHeadModel", {}, True),
        ("GPTNeoForCausalLM", WINDOWS, True),
        ("GPTBigCodeForCausalLM", {}, True),
        ("BertLMHeadModel", {"is_decoder": True}, True),
        ("OPTForCausalLM", {"ffn_dim": 24, "word_embed_proj_dim": 16}, True),  # counts the same by itself
        ("BioGptForCausalLM", {}, True),  # and so does this
        ("RobertaForCausalLM", {"is_decoder": True}, False),  # counts from behind the number of padding
        ("BloomForCausalLM", {}, False),  # has none
        ("LlamaForCausalLM", {}, False),  # has relative ones
    ],
)
def test_padding_on_the_left_is_not_counted(family: str, options: dict[str, Any], is_told: bool) -> None:
    model = made(family, options)
    assert told(model) is is_told
    expected, found = (
        read_tokens(model, padded("right"), shift_labels=True),
        read_tokens(model, LEFT, shift_labels=True),
    )
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_positions_are_told_through_wrappers_that_hand_them_on() -> None:
    """One that would not take them is called as before, and prompt learning, whose PEFT model refuses them."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = gpt2()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits

    adapted = get_peft_model(gpt2(), SemuConfig(target_modules="all-linear", r=2, init_weights=False))
    assert told(adapted) and told(nn.DataParallel(adapted))
    assert not told(Reads())
    assert read_tokens(Reads(), LEFT, shift_labels=True).logits.isfinite().all()
    assert not told(get_peft_model(gpt2(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)))


def test_rows_that_begin_with_a_token_are_left_as_they_are() -> None:
    """Padded on the right, packed, without a mask, or with positions of their own."""
    model = gpt2()
    own = torch.arange(LEFT["input_ids"].shape[1]).expand_as(LEFT["input_ids"])
    for batch in (padded("right", more=2), packed(), {"input_ids": own}, {**LEFT, "position_ids": own}):
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "token_mask")}
        found = counted_from_first(model, inputs)
        assert found.keys() == inputs.keys() and all(found[key] is inputs[key] for key in inputs)
    assert not told(llama())
