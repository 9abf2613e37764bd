"""What a model says by itself: data to keep it by, where none are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from tqdm.auto import tqdm

from semu_peft.arguments import check_count, check_kind, check_positive
from semu_peft.model_state import device_of, eval_mode
from semu_peft.objectives.batches import IGNORED, is_encoder_decoder, token_runs

from .dataset import TextExamples
from .decoding import most_positions, only_settings, padded_prompts, padding_of, plain_settings

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
    prompts: Sequence[str] | Sequence[list[int]] = (),
    temperature: float = 1.0,
    seed: int = 0,
    progress: bool = False,
) -> TextExamples:
    """Sample texts from a model, from its beginning token on, with labels on each token that it chose.

    Held close to the original on them, a model keeps what it says of its own accord; no data are needed. A model that
    was trained on answers alone says little of them by itself: ask it, by `prompts`. The model's own generation
    settings (beams, penalties, temperature) are left aside. The encoder of an encoder-decoder reads what a text begins
    with, and its decoder says the rest.

    Args:
        model: A language model of transformers, bare or with adapters.
        tokenizer: Its tokenizer; texts begin with its BOS token, or its EOS where it has none.
        number: How many texts.
        max_new_tokens: The most tokens of one; less where the model's positions end.
        batch_size: Texts at a time.
        without: What is to be forgotten. Texts that say six tokens in a row of one of its answers, or all of a shorter
            one, are left out: held, they would keep it. So are empty ones, but as answers to `prompts`. There may then
            be fewer than `number`.
        prompts: What the texts begin with instead, in turn, written as the model was trained, with the beginning token;
            or the tokens of that.
        temperature: Of the samples; below 1 a model says what it is surer of.
        seed: Seed of the samples. The global random state stays as it is.
        progress: Show a progress bar.

    Returns:
        The texts, as rows of tokens.

    Raises:
        TypeError: The model cannot generate.
        ValueError: The tokenizer has no token to begin with, a prompt is empty or longer than the model has positions,
            a number is out of its range, or the model says nothing but what is to be left out.

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
    decodes = is_encoder_decoder(model)
    room = _room(model, max(map(len, begins)))
    room = most_positions(model) if decodes else room  # an encoder has positions of its own
    settings = plain_settings(model, tokenizer, do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    settings.max_new_tokens = max_new_tokens if room is None else min(max_new_tokens, room)
    device, generate = device_of(model), cast(Any, model.generate)
    devices = [device] if device.type == "cuda" else []
    rows: list[dict[str, list[int]]] = []
    forgotten = [] if without is None else without.rows
    banned = {run for row in forgotten for run in token_runs(_answer(row, tokenizer.eos_token_id), _RUN)}
    lengths = {len(run) for run in banned}
    drawn = 0
    bar = tqdm(total=number, desc="Sampling", unit="text", leave=False, disable=not progress)
    with bar, eval_mode(model), torch.random.fork_rng(devices), only_settings(settings, model):
        torch.manual_seed(seed)
        while len(rows) < number and drawn < _MOST_DRAWS * number:
            size = min(batch_size, number - len(rows))
            begun = [begins[place % len(begins)] for place in range(drawn, drawn + size)]
            drawn += size
            read = padded_prompts(begun, padding_of(tokenizer), on_the_left=not decodes)
            batch = {name: each.to(device) for name, each in read.items()}
            start = 1 if decodes else batch["input_ids"].shape[1]
            for begin, text in zip(begun, generate(**batch, generation_config=settings).tolist(), strict=True):
                ends = settings.eos_token_id or ()
                said = _until_end(text[start:], ends)
                if not prompts and said[0] in ends:  # of a text that says nothing there is nothing to hold
                    continue
                if not banned.isdisjoint(run for length in lengths for run in token_runs(said, length)):
                    continue
                row = {"input_ids": begin, "labels": said}
                if not decodes:
                    row = {"input_ids": [*begin, *said], "labels": [IGNORED] * len(begin) + said}
                rows.append(row)
                bar.update()
    if not rows:
        raise ValueError(
            f"`model` must say something beside what is to be forgotten, but does in none of {drawn} samples of its "
            "own. Give `retain` or `neutral` texts."
        )
    return TextExamples(rows, [], tokenizer)


def _begins(tokenizer: Any, prompts: Sequence[str] | Sequence[list[int]]) -> list[list[int]]:
    """What texts begin with, in tokens."""
    if not prompts:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if start is None:
            raise ValueError("`tokenizer` must have a BOS or an EOS token to begin with. Give `neutral` texts instead.")
        return [[start]]
    check_kind("prompts", prompts, (list, tuple), "a list of texts", "Write ['Question: What colour?'].")
    begins = [
        list(tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else prompt)
        for prompt in prompts
    ]
    if not all(begins):
        raise ValueError(
            f"`prompts` must have a token each, got {prompts[begins.index([])]!r}. Leave `prompts` out to begin with "
            "nothing."
        )
    return begins


def _room(model: nn.Module, begun: int) -> int | None:
    """How many tokens have a position behind so many others."""
    positions = most_positions(model)
    if positions is not None and begun >= positions:
        raise ValueError(
            f"`prompts` must leave room for an answer in the model's {positions} positions, got one of {begun} tokens. "
            "Ask in fewer words."
        )
    return None if positions is None else positions - begun


def _until_end(said: list[int], ends: Sequence[int]) -> list[int]:
    """Without what was generated after the end of the text, for the sake of longer ones beside it."""
    return said[: next((place for place, token in enumerate(said) if token in ends), len(said)) + 1]


def _answer(row: dict[str, Any], end: int | None) -> list[int]:
    """The tokens that a row teaches, without the end."""
    return [label for label in row["labels"] if label not in (IGNORED, end)]
