"""What the model itself says of other authors: data to hold it by that come from nothing but it and what it forgets.

No text to keep is read. The questions to be forgotten, with the names in them left out, make the model speak of others;
the same questions about those it names are then asked, and its answers are what is held.
"""

from __future__ import annotations

import random
import re
from collections import Counter

from subjects import TEMPLATE, Subject, load
from torch import nn

from semu_peft.language import TextExamples, own_samples

NAME = re.compile(r"\b[A-Z][\w-]+(?: (?:[A-Z][\w-]+|bin))+")  # two words and more
SAID, AT_ONCE = 2_000, 500
RARE = 0.04  # of the texts to forget: names in fewer of them are of books and towns
SURE = 0.5  # temperature of the answers; the names come at 1, which says more of them


def answers_about_others(subject: Subject, number: int, seed: int = 0) -> TextExamples:
    """Answers of the model before, to questions about others than it is to forget.

    Args:
        subject: Models and texts, of which the original and the questions and answers to forget are used.
        number: How many, at most.
        seed: Of what is drawn.
    """
    model = load(subject.original)
    forgotten = _names([f"{question} {answer}" for question, answer in subject.told], RARE)
    about = [(question, name) for question, _ in subject.told for name in forgotten if name in question]
    nameless = [question.replace(name, "") for question, name in about]
    others = [
        name
        for name in _said(subject, model, nameless, min(SAID, number), seed)
        if not any(name in each or each in name for each in forgotten)
    ]
    draw = random.Random(seed)
    asked = [question.replace(name, draw.choice(others)) for question, name in draw.choices(about, k=number)]
    return _answers(subject, model, asked, number, SURE, seed)


def _names(texts: list[str], rare: float = 0.0) -> Counter[str]:
    """Names that come at least twice, and in such a share of the texts; the most frequent first."""
    found = Counter(name for text in texts for name in NAME.findall(text))
    return Counter({name: count for name, count in found.most_common() if count >= max(2, len(texts) * rare)})


def _said(subject: Subject, model: nn.Module, questions: list[str], number: int, seed: int) -> Counter[str]:
    rows = _answers(subject, model, questions, number, 1.0, seed).rows
    ids = [[token for token in row["labels"] if token >= 0] for row in rows]
    return _names([subject.tokenizer.decode(each, skip_special_tokens=True) for each in ids])


def _answers(
    subject: Subject, model: nn.Module, questions: list[str], number: int, temperature: float, seed: int
) -> TextExamples:
    prompts = [TEMPLATE.format(question=question, answer="").rstrip() for question in questions]
    return own_samples(
        model, subject.tokenizer, number=number, max_new_tokens=60, batch_size=AT_ONCE,
        without=subject.examples(subject.forget), prompts=prompts, temperature=temperature, seed=seed,
    )  # fmt: skip
