"""What a model says by itself: data to keep it by, where none are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from semu_peft.arguments import check_count, check_kind, check_positive
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
    prompts: Sequence[str] = (),
    temperature: float = 1.0,
    seed: int = 0,
) -> TextExamples:
    """Sample texts from a model, from its beginning token on, with labels on each token that it chose.

    Held close to the original on them, a model keeps what it says of its own accord; no data are needed. A model that
    was trained on answers alone says little of them by itself: ask it, by `prompts`.

    Args:
        model: A decoder of transformers, bare or with adapters.
        tokenizer: Its tokenizer; texts begin with its BOS token, or its EOS where it has none.
        number: How many texts.
        max_new_tokens: The most tokens of one.
        batch_size: Texts at a time.
        without: What is to be forgotten. Texts that say six tokens in a row of one of its answers, or all of a shorter
            one, are left out: held, they would keep it. There may then be fewer than `number`.
        prompts: What the texts begin with instead, in turn, written as the model was trained, with the beginning token.
        temperature: Of the samples; below 1 a model says what it is surer of.
        seed: Seed of the samples. The global random state stays as it is.

    Returns:
        The texts, as rows of tokens.

    Raises:
        TypeError: The model cannot generate.
        ValueError: The tokenizer has no token to begin with, a prompt is empty, a number is out of its range, or the
            model says nothing but what is to be left out.

    Examples:
        >>> from semu_peft.language import own_samples
        >>> samples = own_samples(decoder, tokenizer, number=3, max_new_tokens=5)
        >>> len(samples), samples[0]["labels"][0]
        (3, -100)
        >>> own_samples(decoder, tokenizer, number=2, prompts=["What colour?"], max_new_tokens=1)[0]["labels"][:-1]
        [-100, -100, -100]
    """
    for name, count in (("number", number), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        check_count(name, count)
    check_positive("temperature", temperature)
    if not hasattr(model, "generate"):
        raise TypeError(f"`model` must generate text, got {type(model).__name__}. Give `neutral` texts instead.")
    begins = _begins(tokenizer, prompts)
    pad = begins[0][0]
    device, generate = device_of(model), cast(Any, model.generate)
    devices = [device] if device.type == "cuda" else []
    rows: list[dict[str, list[int]]] = []
    forgotten = [] if without is None else without.rows
    banned = {run for row in forgotten for run in token_runs(_answer(row, tokenizer.eos_token_id), _RUN)}
    lengths = {len(run) for run in banned}
    drawn = 0
    with eval_mode(model), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        while len(rows) < number and drawn < _MOST_DRAWS * number:
            size = min(batch_size, number - len(rows))
            begun = [begins[place % len(begins)] for place in range(drawn, drawn + size)]
            drawn += size
            longest = max(map(len, begun))
            ids = [[pad] * (longest - len(each)) + each for each in begun]
            mask = [[0] * (longest - len(each)) + [1] * len(each) for each in begun]
            texts = generate(
                input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device),
                do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
                pad_token_id=pad, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            for begin, text in zip(begun, texts.tolist(), strict=True):
                said = _until_end(text[longest:], tokenizer.eos_token_id)
                if banned.isdisjoint(run for length in lengths for run in token_runs(said, length)):
                    rows.append({"input_ids": [*begin, *said], "labels": [IGNORED] * len(begin) + said})
    if not rows:
        raise ValueError(
            f"`model` must say something beside what is to be forgotten, but does in none of {drawn} samples of its "
            "own. Give `retain` or `neutral` texts."
        )
    return TextExamples(rows, [], tokenizer)


def _begins(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """What texts begin with, in tokens."""
    if not prompts:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if start is None:
            raise ValueError("`tokenizer` must have a BOS or an EOS token to begin with. Give `neutral` texts instead.")
        return [[start]]
    check_kind("prompts", prompts, (list, tuple), "a list of texts", "Write ['Question: What colour?'].")
    begins = [list(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
    if not all(begins):
        raise ValueError(
            f"`prompts` must have a token each, got {prompts[begins.index([])]!r}. Leave `prompts` out to begin with "
            "nothing."
        )
    return begins


def _until_end(said: list[int], end: int | None) -> list[int]:
    """Without what was generated after the end of the text, for the sake of longer ones beside it."""
    return said[: said.index(end) + 1] if end in said else said


def _answer(row: dict[str, Any], end: int | None) -> list[int]:
    """The tokens that a row teaches, without the end."""
    return [label for label in row["labels"] if label not in (IGNORED, end)]
