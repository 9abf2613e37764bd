"""Another answer to each prompt, for objectives that compare two: a refusal, a wrong answer, one in other words."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from .shapes import TextExample, as_texts

REFUSALS = (
    "I don't know.",
    "I'm not sure about that.",
    "I have no information on this.",
    "I can't help you with that question.",
    "That is something I know nothing about.",
    "I'm afraid the answer escapes me.",
    "I haven't learnt anything about this topic.",
    "No answer comes to my mind.",
    "I would need to look that up, as I do not know it.",
    "This lies outside of what I know.",
    "I couldn't tell you.",
    "Unfortunately I have never heard of that.",
)
"""Ways to say that one does not know."""

_KINDS = ("refusals", "perturbed", "paraphrased")


def choose_alternates(
    examples: Sequence[TextExample], alternates: str | Sequence[Any] | None, seed: int = 0
) -> list[str | None]:
    """Choose another answer for each example.

    Args:
        examples: The examples.
        alternates: `"refusals"` (of the list here), `"perturbed"` or `"paraphrased"` (what the examples bring); or a
            list of your own: a text for each example, several texts for each of which one is drawn, or else a list of
            any length to draw from.
        seed: Seed of the draws.

    Returns:
        A text for each example; None for all where there are to be none.

    Raises:
        ValueError: An example brings no such answer, or the list is empty.
        TypeError: It is no list of texts.

    Examples:
        >>> choose_alternates([TextExample("blue", "What colour?", perturbed_answers=("red",))], "perturbed")
        ['red']
    """
    if alternates is None:
        return [None] * len(examples)
    draw = random.Random(seed)
    if isinstance(alternates, str):
        return [draw.choice(_brought(example, alternates)) for example in examples]
    if not isinstance(alternates, Sequence) or not alternates:
        raise TypeError(
            f"`alternates` must be one of {', '.join(map(repr, _KINDS))}, a list of texts or None, got {alternates!r}. "
            "Write `['I do not know.']`."
        )
    given = [as_texts(each, f"`alternates[{index}]`") for index, each in enumerate(alternates)]
    if () in given:
        index = given.index(())
        raise TypeError(
            f"`alternates[{index}]` must be a text, or a list of at least one, got {alternates[index]!r}. Give one, or "
            "leave `alternates` out where there are to be none."
        )
    if len(given) == len(examples):
        return [draw.choice(each) for each in given]
    pool = [text for each in given for text in each]
    return [draw.choice(pool) for _ in examples]


def _brought(example: TextExample, kind: str) -> Sequence[str]:
    if kind not in _KINDS:
        raise ValueError(
            f"`alternates` must be one of {', '.join(map(repr, _KINDS))}, a list of texts or None, got {kind!r}. For "
            "one text for all write `[text]`."
        )
    if kind == "refusals":
        return REFUSALS
    found = example.perturbed_answers if kind == "perturbed" else as_texts(example.paraphrased_answer)
    if not found:
        raise ValueError(
            f"`alternates`={kind!r} must stand beside each answer, in a column {kind + '_answer'!r}, and "
            f"{example.answer[:60]!r} has none. Add it, or take 'refusals'."
        )
    return found
