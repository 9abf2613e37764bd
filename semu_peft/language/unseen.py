"""Answers that a model has never learnt, made of those that it has: what forgotten answers should look like to it."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from semu_peft.arguments import check_count

from .shapes import TextExample, read_text

_TRIES = 100  # of an order: two phrases that differ keep theirs so often once in 2^100
# Thai and Lao, Burmese, Khmer, kana, Han: written without blanks between words.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
_CHARACTERS = re.compile(rf"\s*(?:[{_UNSPACED}]|[^\s{_UNSPACED}]+)")


class _Phrases(NamedTuple):
    """A text in parts, and what stands between two of them."""

    parts: list[str]
    between: str

    @classmethod
    def of(cls, text: str, words: int) -> _Phrases:
        between, every = " ", text.split()
        if len(every) <= words and re.search(f"[{_UNSPACED}]", text):
            between, every = "", _CHARACTERS.findall(text)
        return cls([between.join(every[start : start + words]) for start in range(0, len(every), words)], between)


def unseen_answers(examples: Any, *, words: int = 3, seed: int = 0) -> list[TextExample]:
    """Give each prompt an answer that the model has not learnt.

    Wrong answers that the examples bring (`perturbed_answers`) are taken as they are, but for one that is the answer
    itself. Otherwise the answer's own words are cut into phrases of `words` words, and these put into another order: it
    says of the same things what nobody has said. Text that is written without blanks is cut by characters. An answer of
    a single phrase gets one of another answer; where all are as short, its own words in another order or a word of
    another. Another learnt answer would not do, as its own beginning gives the rest away, and none is made; nor would a
    learnt answer with other names and numbers in it, whose wording is known.

    `benchmarks/unseen_answers.py` measures how near that comes to a model that never saw the answers. For a large
    pretrained model the order of words says more than for a small one: bring wrong answers in sound sentences.

    Args:
        examples: The answers to be forgotten, with their prompts: `TextExample`s, pairs (prompt, answer), or what else
            [`read_text`][semu_peft.language.shapes.read_text] takes.
        words: Words a phrase, or characters.
        seed: Seed of the order.

    Returns:
        The same prompts, with other answers.

    Raises:
        TypeError: They are of no such kind.
        ValueError: An answer has too few words to be put into another order, and there is no phrase of another to
            borrow; or a row lacks its columns.

    Examples:
        >>> from semu_peft.language import TextExample, unseen_answers
        >>> unseen_answers([TextExample("one two three four five six", "Count!")])[0].answer
        'four five six one two three'
    """
    check_count("words", words)
    check_count("seed", seed, least=0)
    examples = list(read_text(examples, name="examples"))
    draw = random.Random(seed)
    learnt = {_plain(example.answer) for example in examples}
    cuts = [[_Phrases.of(example.answer, size) for example in examples] for size in (words, 1)]
    return [
        TextExample(_unseen(example, [(cut[index], cut) for cut in cuts], learnt, draw), example.prompt)
        for index, example in enumerate(examples)
    ]


def _unseen(
    example: TextExample,
    cuts: Sequence[tuple[_Phrases, Sequence[_Phrases]]],
    learnt: set[str],
    draw: random.Random,
) -> str:
    if wrong := [each for each in example.perturbed_answers if _plain(each) != _plain(example.answer)]:
        return draw.choice(wrong)
    for own, every in cuts:
        if (made := _in_another_order(own, learnt, draw)) is not None:
            return made
        others = [[part.strip() for part in each.parts if _plain(part) not in learnt] for each in every if each != own]
        if others := [each for each in others if each]:
            return draw.choice(draw.choice(others))
    raise ValueError(
        f"`examples`: {example.answer!r} is too short to be put into another order, and there is no other answer to "
        "take a phrase of. Give `perturbed_answers`."
    )


def _in_another_order(phrases: _Phrases, learnt: set[str], draw: random.Random) -> str | None:
    """The phrases as no learnt answer has them; None where every order is one."""
    if len(set(phrases.parts)) < 2:
        return None
    order = list(phrases.parts)
    for _ in range(_TRIES):
        draw.shuffle(order)
        text = phrases.between.join(order).strip()
        if _plain(text) not in learnt:
            return text
    return None


def _plain(text: str) -> str:
    return " ".join(text.split())
