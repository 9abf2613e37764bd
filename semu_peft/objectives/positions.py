"""Where the tokens of a row stand that is padded on the left, for models whose positions are absolute."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from .adapter_parts import modules_of
from .packing import transformer_of

_ROTARY = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_emb_base")


def has_rotary_positions(config: Any) -> bool:
    """Whether a decoder's configuration says that its positions are rotary: relative ones, without an end.

    Examples:
        >>> from transformers import GPT2Config
        >>> has_rotary_positions(decoder.config), has_rotary_positions(GPT2Config())
        (True, False)
    """
    return any(getattr(config, name, None) is not None for name in _ROTARY)


def counted_from_first(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs, with positions that count from the first real token of each row where padding stands before one.

    A decoder with absolute positions (GPT-2, GPT-Neo) counts padding too unless it is told them, as transformers'
    `generate` does. Everything else is left as it is: rows that begin with a token, positions that are given already,
    rotary ones, models that take none or count by the mask or the tokens themselves, and prompt learning, to which
    PEFT gives none.

    Args:
        model: The model, bare or in wrappers.
        inputs: Its inputs by name.

    Examples:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> small = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1))
        >>> counted_from_first(small, {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 0]])})["position_ids"]
        tensor([[0, 0, 1],
                [0, 1, 1]])
    """
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or inputs.get("position_ids") is not None:
        return dict(inputs)
    if not _counts_padding(model) or bool(mask[:, :1].all()):  # asking the mask waits for a GPU
        return dict(inputs)
    return {**inputs, "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}


def _counts_padding(model: nn.Module) -> bool:
    """Whether positions are absolute, and may be told from outside the wrappers."""
    inner = transformer_of(model)
    if inner is None or not inner.can_generate() or getattr(inner.config, "is_encoder_decoder", False):
        return False
    if has_rotary_positions(inner.config.get_text_config(decoder=True)):
        return False
    if not _takes_positions(inner) or not _takes_positions(model, by_any_name=True):
        return False
    return not _counts_itself(inner) and not _learns_prompts(model)


def _takes_positions(model: nn.Module, by_any_name: bool = False) -> bool:
    known = inspect.signature(model.forward).parameters.values()
    return any(each.name == "position_ids" or (by_any_name and each.kind is each.VAR_KEYWORD) for each in known)


def _counts_itself(model: nn.Module) -> bool:
    """Whether tokens are numbered behind the number of padding, by what they are: RoBERTa and its kin."""
    return any(
        isinstance(module, nn.Embedding) and module.padding_idx is not None and name.endswith("position_embeddings")
        for name, module in model.named_modules()
    )


def _learns_prompts(model: nn.Module) -> bool:
    wrappers = [module for module in modules_of(model) if isinstance(module, PeftModel)]
    return any(wrapper.active_peft_config.is_prompt_learning for wrapper in wrappers)
