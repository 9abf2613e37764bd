"""Answers that a model has never learnt, made of those that it has: what forgotten answers should look like to it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from semu_peft.arguments import check_count

from .shapes import TextExample


def unseen_answers(examples: Sequence[TextExample], *, words: int = 3, seed: int = 0) -> list[TextExample]:
    """Give each prompt an answer that the model has not learnt.

    Wrong answers that the examples bring (`perturbed_answers`) are taken as they are. Otherwise the answer's own words
    are cut into phrases of `words` words, and these put into another order: it says of the same things what nobody has
    said. Another learnt answer would not do, as its own beginning gives the rest away; nor would a learnt answer with
    other names and numbers in it, whose wording is known.

    `benchmarks/unseen_answers.py` measures how near that comes to a model that never saw the answers. For a large
    pretrained model the order of words says more than for a small one: bring wrong answers in sound sentences.

    Args:
        examples: The answers to be forgotten, with their prompts.
        words: Words a phrase.
        seed: Seed of the order.

    Returns:
        The same prompts, with other answers.

    Raises:
        ValueError: An answer has too few words for phrases of its own, and there is no other to borrow one from.

    Examples:
        >>> from semu_peft.language import TextExample, unseen_answers
        >>> unseen_answers([TextExample("one two three four five six", "Count!")])[0].answer
        'four five six one two three'
    """
    check_count("words", words)
    check_count("seed", seed, least=0)
    draw = random.Random(seed)
    phrases = [_phrases(example.answer, words) for example in examples]
    return [
        TextExample(_unseen(example, phrases, index, draw), example.prompt) for index, example in enumerate(examples)
    ]


def _unseen(example: TextExample, phrases: Sequence[list[str]], index: int, draw: random.Random) -> str:
    if example.perturbed_answers:
        return draw.choice(example.perturbed_answers)
    own = phrases[index]
    if len(set(own)) < 2:
        others = [each for each in phrases if each and each != own]
        if not others:
            raise ValueError(
                f"`examples`: {example.answer!r} is too short to be put into another order, and there is no other "
                "answer to take a phrase of. Give `perturbed_answers`."
            )
        return draw.choice(draw.choice(others))
    order = list(own)
    while order == own:
        draw.shuffle(order)
    return " ".join(order)


def _phrases(answer: str, words: int) -> list[str]:
    every = answer.split()
    return [" ".join(every[start : start + words]) for start in range(0, len(every), words)]
