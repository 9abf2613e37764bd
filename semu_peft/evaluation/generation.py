"""Answers that a language model writes, and how much of the expected text is in them (ROUGE-L)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from semu_peft.arguments import check_count, check_model, check_number
from semu_peft.language.decoding import (
    check_fits,
    most_positions,
    only_settings,
    padded_prompts,
    padding_of,
    plain_settings,
)
from semu_peft.model_state import device_of, eval_mode
from semu_peft.objectives.batches import is_encoder_decoder

from .prompts import encoder_for

# Thai, Lao, Burmese, Khmer, Japanese and Chinese are written without blanks: their letters are the words.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[^\W_])+")
_LAST_LATIN = "\u024f"


@dataclass(frozen=True, eq=False, repr=False)
class Rouge:
    """ROUGE-L of N texts, each `(N,)`, float64: shares of the longest common subsequence of stemmed words.

    Attributes:
        recall: Of the words that were expected, those found in order; TOFU's and RWKU's measure.
        precision: Of the words that were written.
        f1: Their harmonic mean; MUSE's measure.

    Examples:
        >>> from semu_peft.evaluation import rouge_l
        >>> rouge_l(["the cat sat"], ["cats"])
        Rouge(1 texts, recall 0.333, precision 1.000, F1 0.500)
    """

    recall: Tensor
    precision: Tensor
    f1: Tensor

    def __repr__(self) -> str:
        means = (float(values.mean()) for values in (self.recall, self.precision, self.f1))
        return "Rouge({} texts, recall {:.3f}, precision {:.3f}, F1 {:.3f})".format(len(self.recall), *means)


def rouge_l(expected: Sequence[str], written: Sequence[str], *, stem: bool = True) -> Rouge:
    """ROUGE-L (Lin 2004) of written texts against the expected ones, by Google's `rouge_score`.

    With `L` the length of the longest common subsequence of words, recall is `L / |expected|` and precision
    `L / |written|`. Words are lower-cased runs of letters and digits, and stemmed (Porter) as TOFU (arXiv 2401.06121)
    and MUSE (arXiv 2407.06460) do; without the stemmer "cats" is not "cat". The package `rouge` counts otherwise.
    Google's knows the letters a to z alone, of which other scripts have none: where the expected text has letters of
    another, words are those of Unicode, or single letters where no blanks are written, and are not stemmed.

    Args:
        expected: The true answers.
        written: The model's.
        stem: Compare stems of words.

    Raises:
        ImportError: rouge_score is not installed.
        TypeError: They are single texts.
        ValueError: There are none, or not equally many.

    Examples:
        >>> from semu_peft.evaluation import rouge_l
        >>> rouge_l(["x y"], ["x"]).recall.item()
        0.5
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(
            'rouge_l needs rouge_score: run `pip install ".[evaluation]"` in a clone of semu-peft.'
        ) from error
    if isinstance(expected, str) or isinstance(written, str):
        raise TypeError("`expected` and `written` must be lists of texts, got one text. Write `[text]`.")
    if len(expected) != len(written) or not len(expected):
        raise ValueError(
            f"`written` must be one text for each one expected, got {len(written)} for {len(expected)}. Give both "
            "lists in the same order."
        )
    latin, other = RougeScorer(["rougeL"], use_stemmer=stem), RougeScorer(["rougeL"], tokenizer=_Words())
    scores = [
        (latin if _is_latin(target) else other).score(target, text)["rougeL"]
        for target, text in zip(expected, written, strict=True)
    ]
    parts = ([getattr(score, kind) for score in scores] for kind in ("recall", "precision", "fmeasure"))
    return Rouge(*(torch.tensor(part, dtype=torch.float64) for part in parts))


def _is_latin(text: str) -> bool:
    return all(letter <= _LAST_LATIN for letter in text if letter.isalpha())


class _Words:
    """Splits texts of any script, as rouge_score asks for it."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


def generate_answers(
    model: nn.Module,
    tokenizer: Any,
    questions: Iterable[Any],
    *,
    template: str | None = None,
    max_new_tokens: int = 200,
    samples: int | None = None,
    temperature: float = 1.0,
    start: str = "",
    stop: Sequence[str] = (),
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
    name: str = "questions",
) -> list[Any]:
    """Let a language model answer questions: greedily, or several times at random.

    The model's own generation settings (beams, penalties, temperature) are left aside, as the published metrics are of
    greedy answers. It is in eval mode, and the global random generators are left as they were.

    Args:
        model: A causal language model of transformers, with any adapter or none.
        tokenizer: Its tokenizer.
        questions: What is asked: texts, or chats of several turns.
        template: See [`TextEncoder`][semu_peft.language.encode.TextEncoder].
        max_new_tokens: Longest answer; TOFU 200, MUSE verbatim 128 and knowledge 32, RWKU 30. Less where the positions
            of the model end (GPT-2); rotary ones do not.
        samples: Draw this many answers to each question; by default one, greedily.
        temperature: Of the draws.
        start: What each answer is made to begin with, such as `"Sure, here is the answer:"`; it is not returned.
        stop: Strings that an answer ends before.
        batch_size: Answers at a time.
        seed: Of the draws.
        progress: Show a progress bar.
        name: What to call the questions in the progress bar.

    Returns:
        One text a question, or a list of `samples` texts a question.

    Raises:
        TypeError: The model cannot generate.
        ValueError: There are no questions, or one leaves no position to write into.

    Examples:
        >>> from semu_peft.evaluation import generate_answers
        >>> len(generate_answers(decoder, tokenizer, ["What colour?", "How many?"], max_new_tokens=4, progress=False))
        2
    """
    check_model(model)
    for argument, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        check_count(argument, value)
    check_count("samples", samples, optional=True)
    check_number("temperature", temperature, low=1e-6)
    if not callable(getattr(model, "generate", None)):
        raise TypeError(
            f"`model` must be one that generates, got {type(model).__name__}. Give a causal language model of "
            "transformers, or the PEFT model around it."
        )
    encoder = encoder_for(model, tokenizer, template)
    prompts = [encoder.prompt_tokens(question, start) for question in questions]
    if not prompts:
        raise ValueError(f"`{name}` must hold at least one question, got none. Check the file it was read from.")
    check_fits(model, [{"input_ids": prompt} for prompt in prompts], name, room=0 if encoder.seq2seq else 1)
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "num_return_sequences": samples}
    settings = plain_settings(model, tokenizer, **({} if samples is None else drawn))
    texts = _generate(model, tokenizer, prompts, settings, max_new_tokens, max(1, batch_size // (samples or 1)),
                      seed, progress, name)  # fmt: skip
    cut = [[_cut(text, stop) for text in group] for group in texts]
    return cut if samples is not None else [group[0] for group in cut]


def _generate(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], settings: GenerationConfig, longest: int, batch_size: int,
    seed: int, progress: bool, name: str,
) -> list[list[str]]:  # fmt: skip
    device, skip = device_of(model), not is_encoder_decoder(model)  # a decoder's output begins with the prompt
    batches: Iterable[tuple[int, list[int]]] = _alike(prompts, longest, most_positions(model), skip, batch_size)
    if progress:
        from tqdm.auto import tqdm

        batches = tqdm(batches, desc=name, unit="batch", leave=False)
    texts: list[list[str]] = [[] for _ in prompts]
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), eval_mode(model), torch.random.fork_rng(devices=devices), only_settings(settings, model):
        torch.manual_seed(seed)
        for room, places in batches:
            batch = padded_prompts([prompts[place] for place in places], padding_of(tokenizer), on_the_left=skip)
            length = batch["input_ids"].shape[1]
            settings.max_new_tokens = room
            inputs = {key: tensor.to(device) for key, tensor in batch.items()}
            written = model.generate(**inputs, generation_config=settings)[:, skip * length :]
            decoded = tokenizer.batch_decode(written, skip_special_tokens=True)
            each = len(decoded) // len(places)
            for number, place in enumerate(places):
                texts[place] = decoded[number * each : (number + 1) * each]
    return texts


def _alike(
    prompts: Sequence[list[int]], longest: int, positions: int | None, skip: bool, batch_size: int
) -> list[tuple[int, list[int]]]:
    """How much may be written, and after which prompts: the longest first, and together only those with equal room."""

    def room(place: int) -> int:
        return longest if positions is None else min(longest, positions - skip * len(prompts[place]))

    order = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), place))
    groups = ((size, list(group)) for size, group in groupby(order, room))
    return [
        (size, group[start : start + batch_size])
        for size, group in groups
        for start in range(0, len(group), batch_size)
    ]


def _cut(text: str, stop: Sequence[str]) -> str:
    for end in stop:
        text = text.lstrip().split(end)[0]  # a blank line before the answer ends none
    return text.strip()
