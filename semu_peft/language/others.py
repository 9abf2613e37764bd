"""What a model answers about others than it is to forget: data to keep it by that come from nothing but itself."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, product
from typing import Any

from torch import nn

from semu_peft.objectives.batches import IGNORED, is_encoder_decoder

from .dataset import TextExamples
from .encode import TextEncoder
from .samples import own_samples
from .shapes import Message, read_text

Prompt = str | tuple[Message, ...]

_RUN = re.compile(r"[^\W\d_][\w'’-]*(?: [^\W\d_][\w'’-]*)+")  # words with a blank between them
# Of a name, but not at its ends.
_INSIDE = frozenset(("al", "bin", "da", "de", "del", "der", "di", "du", "el", "ibn", "la", "le", "of", "van", "von"))
_LONGEST = 5  # words of a name
_RARE = 0.04  # of the questions: what fewer of them name is a book or a town


def answers_about_others(
    model: nn.Module,
    tokenizer: Any,
    forget: Any,
    *,
    template: str | None = None,
    number: int = 128,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    temperature: float = 0.5,
    seed: int = 0,
    progress: bool = False,
) -> TextExamples:
    """Ask a model about others than those to be forgotten, and take its answers, to hold it by where no data are left.

    The names that the forget questions are about are left out of these, so that the model speaks of somebody else; what
    it names then takes the place of the names, and its answers to such questions are returned. A name is two words or
    more that begin with capitals, and comes in at least two of the questions and answers. Hold them loosely, as they
    are near what is to be forgotten: `forget_text` takes a weight of 0.3 beside weighted ascent.

    Args:
        model: A language model of transformers, as it was before it forgot.
        tokenizer: Its tokenizer.
        forget: The questions to be forgotten and their answers, as
            [`read_text`][semu_peft.language.shapes.read_text] takes them; or ready `TextExamples`.
        template: How question and answer are written, see [`TextEncoder`][semu_peft.language.encode.TextEncoder];
            `TextExamples` keep what they were made with.
        number: How many answers, and how many to look for names in.
        max_new_tokens: The most tokens of one.
        batch_size: Answers at a time.
        temperature: Of the answers; below 1 a model says what it is surer of. Names are looked for at 1.
        seed: Of all that is drawn. The global random state stays as it is.
        progress: Show progress bars.

    Returns:
        The answers, as rows of tokens; none says six tokens in a row of an answer to be forgotten.

    Raises:
        TypeError: The model cannot generate.
        ValueError: The questions name nobody, the model names nobody else or says nothing but what is to be forgotten,
            a question is longer than the model has positions, or a number is out of its range.

    Examples:
        >>> from semu_peft.language import answers_about_others
        >>> answers_about_others(decoder, tokenizer, [("What colour is the sky?", "blue")])
        Traceback (most recent call last):
        ValueError: `forget` must have questions that name somebody, in two words or ...
    """
    encoder = TextEncoder(tokenizer, template, seq2seq=is_encoder_decoder(model))
    ready = forget if isinstance(forget, TextExamples) else _encoded(encoder, forget)
    encoder = ready.encoder or encoder
    told = [(each.prompt, _text_of(each.prompt), each.answer) for each in ready.examples if each.prompt is not None]
    forgotten = _names([part for _, *both in told for part in both], least=max(2, _RARE * len(told)))
    about = [(prompt, name) for prompt, text, _ in told for name in forgotten if name in text]
    if not about:
        raise ValueError(
            "`forget` must have questions that name somebody, in two words or more, got none. Give `retain`."
        )

    def ask(prompts: Iterable[Prompt], temperature: float) -> TextExamples:
        return own_samples(
            model, tokenizer, prompts=[encoder.prompt_tokens(prompt) for prompt in prompts], number=number,
            max_new_tokens=max_new_tokens, batch_size=batch_size, without=ready, temperature=temperature, seed=seed,
            progress=progress,
        )  # fmt: skip

    said = ask((_named(prompt, name, "") for prompt, name in about), 1.0)
    others = [
        name
        for name in _names([_answer(row, tokenizer) for row in said.rows], least=2)
        if not any(name in each or each in name for each in forgotten)
    ]
    if not others:
        raise ValueError(
            f"`model` must name others when it is asked without {forgotten[0]!r}, and names none twice in {len(said)} "
            "answers. Give `retain`."
        )
    draw = random.Random(seed)
    return ask((_named(*draw.choice(about), draw.choice(others)) for _ in range(number)), temperature)


def _encoded(encoder: TextEncoder, source: Any) -> TextExamples:
    examples = list(read_text(source, name="forget"))
    rows = [row for example in examples if not example.is_plain for row in encoder.encode(example)]
    return TextExamples(rows, examples, encoder.tokenizer, encoder)


def _text_of(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(turn.get("content") or "" for turn in prompt)


def _named(prompt: Prompt, name: str, other: str) -> Prompt:
    """The prompt with another name for a name, or with none."""
    if isinstance(prompt, str):
        return prompt.replace(name, other)
    return tuple(
        {**turn, "content": turn["content"].replace(name, other)} if turn.get("content") else turn for turn in prompt
    )


def _answer(row: dict[str, list[int]], tokenizer: Any) -> str:
    text: str = tokenizer.decode([token for token in row["labels"] if token != IGNORED], skip_special_tokens=True)
    return text


def _names(texts: Sequence[str], *, least: float) -> list[str]:
    """Names that come so often, the most frequent first; of one inside another the longer, if it is half as frequent.

    So "Basil Mahfouz Al-Kuwaiti" is one name, and "Does Hina Ameen" is not.
    """
    counts = Counter(name for text in texts for name in _capitalised(text))
    found = {name: count for name, count in counts.most_common() if count >= least}
    parts = [(part, whole) for part in found for whole in found if part != whole and f" {part} " in f" {whole} "]
    inside = {part if found[whole] >= found[part] / 2 else whole for part, whole in parts}
    return [name for name in found if name not in inside]


def _capitalised(text: str) -> Iterator[str]:
    """All runs of two words or more that begin with capitals, also those inside others."""
    for run in _RUN.findall(text):
        for is_name, group in groupby(run.split(), lambda word: word[0].isupper() or word in _INSIDE):
            words = list(group) if is_name else []
            for start, size in product(range(len(words)), range(2, _LONGEST + 1)):
                part = words[start : start + size]
                if len(part) == size and not _INSIDE & {part[0], part[-1]}:
                    yield " ".join(part).removesuffix("'s").removesuffix("’s")
