"""What a model decodes by: settings of ours in the place of its own, and as many positions as it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from semu_peft.objectives.packing import transformer_of
from semu_peft.objectives.positions import has_rotary_positions

_STARTS = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id")


def plain_settings(model: nn.Module, tokenizer: Any, **drawn: Any) -> GenerationConfig:
    """How to decode: greedily, or as `drawn` says; of the model's own settings, only where a sequence starts and ends.

    Args:
        model: A model that generates.
        tokenizer: Its tokenizer, whose end of sequence ends one as well.
        drawn: Settings of draws, such as `do_sample=True`.

    Examples:
        >>> from semu_peft.language.decoding import plain_settings
        >>> plain_settings(decoder, tokenizer).eos_token_id
        [2]
    """
    own = getattr(model, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    known = [*(ends if isinstance(ends, (list, tuple)) else [ends]), tokenizer.eos_token_id]
    eos = sorted({token for token in known if token is not None})
    settings = {"do_sample": False, "num_beams": 1, "eos_token_id": eos or None, "pad_token_id": padding_of(tokenizer)}
    starts = {name: getattr(own, name, None) for name in _STARTS}
    return GenerationConfig(**{**settings, **starts, **drawn})


@contextmanager
def only_settings(settings: GenerationConfig, model: nn.Module) -> Iterator[None]:
    """Put settings in place of the model's own, which `generate` fills in for whatever is left at its default.

    Examples:
        >>> from semu_peft.language.decoding import only_settings, plain_settings
        >>> settings = plain_settings(decoder, tokenizer)
        >>> with only_settings(settings, decoder):
        ...     decoder.generation_config is settings
        True
        >>> decoder.generation_config is settings
        False
    """
    before = [(module, vars(module)["generation_config"]) for module in model.modules()
              if "generation_config" in vars(module)]  # fmt: skip
    try:
        for module, _ in before:
            vars(module)["generation_config"] = settings
        yield
    finally:
        for module, own in before:
            vars(module)["generation_config"] = own


def padding_of(tokenizer: Any) -> int:
    """What to fill up with, which a mask says is nothing: the padding token, or the end of sequence, or any.

    Examples:
        >>> padding_of(tokenizer)
        0
    """
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def padded_prompts(prompts: Sequence[list[int]], pad: int, *, on_the_left: bool) -> dict[str, Tensor]:
    """Prompts as a batch for `generate`: a decoder's end in one place, an encoder's positions count from the left.

    Examples:
        >>> padded_prompts([[5], [6, 7]], 0, on_the_left=True)["input_ids"]
        tensor([[0, 5],
                [6, 7]])
    """
    side, rows = "left" if on_the_left else "right", [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return {"input_ids": ids, "attention_mask": mask}


def most_positions(model: nn.Module) -> int | None:
    """How many tokens a model can read at all; None where its positions have no end, as rotary ones.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from semu_peft.language.decoding import most_positions
        >>> small = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=64, n_embd=4, n_layer=1, n_head=1))
        >>> most_positions(small), most_positions(decoder)
        (64, None)
    """
    inner = transformer_of(model)
    config = None if inner is None else inner.config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or has_rotary_positions(config):
        return None
    return positions if positions > 0 else None


def most_tokens(model: nn.Module, max_length: int) -> int:
    """The most tokens of a row: as many as are asked for, or as the model has positions.

    Examples:
        >>> from semu_peft.language.decoding import most_tokens
        >>> most_tokens(decoder, 512)
        512
    """
    positions = most_positions(model)
    return max_length if positions is None else min(max_length, positions)


def check_fits(model: nn.Module, rows: Sequence[Mapping[str, Any]], name: str, *, room: int = 0) -> None:
    """Check that the model has a position for each token.

    Args:
        model: The model.
        rows: `input_ids` each, and perhaps `labels`.
        name: The argument that they are of.
        room: How many positions to leave for what is to be written after them.

    Raises:
        ValueError: A row is too long.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from semu_peft.language.decoding import check_fits
        >>> small = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=2, n_embd=4, n_layer=1, n_head=1))
        >>> check_fits(small, [{"input_ids": [1, 2, 3]}], "forget")
        Traceback (most recent call last):
        ValueError: `forget` must fit into the model's 2 positions, got 3 tokens in row 0. Give a shorter text ...
    """
    positions = most_positions(model)
    if positions is None:
        return
    for number, row in enumerate(rows):
        length = max(len(row["input_ids"]), len(row.get("labels", ())))
        if length + room > positions:
            left = f" with {room} left to write into" if room else ""
            raise ValueError(
                f"`{name}` must fit into the model's {positions} positions{left}, got {length} tokens in row {number}. "
                "Give a shorter text there, or, to text_examples, a `max_length` of no more than that."
            )
