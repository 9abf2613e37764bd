"""What a model says by itself: data to keep it by, where none are given."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from semu_peft.arguments import check_count
from semu_peft.model_state import device_of, eval_mode
from semu_peft.objectives.batches import IGNORED, token_runs

from .dataset import TextExamples

_MOST_DRAWS = 4  # times the number asked for, where texts are left out
_RUN = 6  # tokens in a row that give an answer away


@torch.no_grad()
def own_samples(
    model: nn.Module,
    tokenizer: Any,
    *,
    number: int = 64,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    without: TextExamples | None = None,
    seed: int = 0,
) -> TextExamples:
    """Sample texts from a model, from its beginning token on, with labels on each token that it chose.

    Held close to the original on them, a model keeps what it says of its own accord; no data are needed.

    Args:
        model: A decoder of transformers, bare or with adapters.
        tokenizer: Its tokenizer; texts begin with its BOS token, or its EOS where it has none.
        number: How many texts.
        max_new_tokens: The most tokens of one.
        batch_size: Texts at a time.
        without: What is to be forgotten. Texts that say six tokens in a row of one of its answers, or all of a shorter
            one, are left out: held, they would keep it. There may then be fewer than `number`.
        seed: Seed of the samples. The global random state stays as it is.

    Returns:
        The texts, as rows of tokens.

    Raises:
        TypeError: The model cannot generate.
        ValueError: The tokenizer has no token to begin with, or the model says nothing but what is to be left out.

    Examples:
        >>> from semu_peft.language import own_samples
        >>> samples = own_samples(decoder, tokenizer, number=3, max_new_tokens=5)
        >>> len(samples), samples[0]["labels"][0]
        (3, -100)
    """
    for name, count in (("number", number), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        check_count(name, count)
    if not hasattr(model, "generate"):
        raise TypeError(f"`model` must generate text, got {type(model).__name__}. Give `neutral` texts instead.")
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ValueError("`tokenizer` must have a BOS or an EOS token to begin with. Give `neutral` texts instead.")
    device, generate = device_of(model), cast(Any, model.generate)
    devices = [device] if device.type == "cuda" else []
    rows: list[list[int]] = []
    forgotten = [] if without is None else without.rows
    banned = {run for row in forgotten for run in token_runs(_answer(row, tokenizer.eos_token_id), _RUN)}
    lengths = {len(run) for run in banned}
    drawn = 0
    with eval_mode(model), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        while len(rows) < number and drawn < _MOST_DRAWS * number:
            begun = torch.full((min(batch_size, number - len(rows)), 1), start, device=device)
            drawn += len(begun)
            texts = generate(
                input_ids=begun, attention_mask=torch.ones_like(begun), do_sample=True, temperature=1.0, top_k=0,
                top_p=1.0, max_new_tokens=max_new_tokens, pad_token_id=start, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            for text in (_until_end(text, tokenizer.eos_token_id) for text in texts.tolist()):
                if banned.isdisjoint(run for length in lengths for run in token_runs(text, length)):
                    rows.append(text)
    if not rows:
        raise ValueError(
            f"`model` must say something beside what is to be forgotten, but does in none of {drawn} samples of its "
            "own. Give `retain` or `neutral` texts."
        )
    return TextExamples([{"input_ids": row, "labels": [IGNORED, *row[1:]]} for row in rows], [], tokenizer)


def _until_end(text: list[int], end: int | None) -> list[int]:
    """Without what was generated after the end of the text, for the sake of longer ones beside it."""
    return text[: text.index(end, 1) + 1] if end in text[1:] else text


def _answer(row: dict[str, Any], end: int | None) -> list[int]:
    """The tokens that a row teaches, without the end."""
    return [label for label in row["labels"] if label not in (IGNORED, end)]
