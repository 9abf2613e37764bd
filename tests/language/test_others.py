"""What a model answers about others than it is to forget, and that this keeps them where no data are left."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from people import FIRST, LAST, PEOPLE, learnt, words
from torch import nn
from transformers import LlamaForCausalLM

from semu_peft import forget_text, objectives
from semu_peft.language import answers_about_others, own_samples, text_examples
from semu_peft.language.others import _names

FORGET, OTHERS = PEOPLE[:2], PEOPLE[2:]
NAMES = [f"{first} {last}" for first, last in zip(FIRST, LAST, strict=True)]


def known(model: nn.Module, pairs: list[tuple[str, str]]) -> float:
    loader = text_examples(words(), pairs).loader(16, shuffle=False)
    return float((-objectives.sequence_nll(model, loader, progress=False)).exp().mean())


def test_the_model_is_asked_about_others() -> None:
    """The same questions about other people, as it writes them; nothing of who is to be forgotten; the same again."""
    model = learnt()
    state, random_state = torch.get_rng_state(), random.getstate()
    found = answers_about_others(model, words(), FORGET, number=40)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == random_state
    texts = [words().decode(row["input_ids"]) for row in found.rows]
    assert len(texts) == 40 and not any(NAMES[0] in text for text in texts)
    assert {text.split(" Answer")[0] for text in texts} <= {
        f"Question : {question}".replace(NAMES[0], name) for question, _ in FORGET for name in NAMES[1:]
    }
    assert len({name for name in NAMES for text in texts if name in text}) >= 3
    assert found.rows == answers_about_others(learnt(), words(), FORGET, number=40).rows


def test_without_retain_data_others_are_kept() -> None:
    """By what the model answers about them; held as much by what it says of its own accord, half of them is lost."""
    model = learnt()
    assert known(model, PEOPLE) > 0.95
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = forget_text(model, words(), FORGET, progress=False)
    assert result.training.damage_on == "its own answers about others"
    assert known(result.model, FORGET) < 0.1
    own = own_samples(learnt(), words(), number=128, batch_size=32, without=text_examples(words(), FORGET))
    alone = forget_text(learnt(), words(), FORGET, retain=own, retain_weight=0.1, progress=False)
    assert known(result.model, OTHERS) > 0.8 and known(alone.model, OTHERS) < 0.6


def test_beside_neutral_texts() -> None:
    result = forget_text(learnt(), words(), FORGET, neutral=["Where was a baker ?"], max_steps=1, progress=False)
    assert result.training.damage_on == "neutral texts and its own answers about others"


def test_a_model_that_cannot_be_asked_is_held_by_neutral_texts() -> None:
    def nothing(model: Any) -> Any:
        raise AttributeError

    model = learnt()
    model.__class__ = type("LlamaForCausalLM", (LlamaForCausalLM,), {"generate": property(nothing)})
    with pytest.warns(UserWarning, match="held but neutral texts.*must generate text"):
        forget_text(model, words(), FORGET, neutral=["Where was a baker ?"], max_steps=1, progress=False)


@pytest.mark.parametrize(
    ("forget", "said"),
    [
        ([("What colour is the sky?", "blue")], "must have questions that name somebody"),
        ([("Where was Ada born ?", "Ada was born in Lisbon .")], "must have questions that name somebody"),
        (["Ada Abend was born. Ada Abend works."], "must have questions that name somebody"),
        (PEOPLE, "must name others than|must name others when"),
    ],
)
def test_where_nobody_is_named(forget: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        answers_about_others(learnt(), words(), forget, number=8)


def test_names() -> None:
    texts = ["Does Hina Ameen write? Hina Ameen's books", "Hina Ameen of the Salt", "Basil Mahfouz wrote", "A Basil."]
    assert _names(texts, least=2) == ["Hina Ameen"]
    arabic = ["Basil Mahfouz Al-Kuwaiti was", "by Basil Mahfouz Al-Kuwaiti", "Basil Mahfouz"]
    assert _names(arabic, least=2) == ["Basil Mahfouz Al-Kuwaiti"]
    others = ["Ludwig van Beethoven", "with Ludwig van Beethoven", "van Gogh", "Élodie Çelik", "Élodie Çelik"]
    assert _names(others, least=2) == ["Ludwig van Beethoven", "Élodie Çelik"]


def test_chats() -> None:
    """The name is exchanged in each turn, and the chat template writes the question."""
    tokens = words()
    tokens.chat_template = "{% for t in messages %}Question : {{ t.content }} {% endfor %}Answer :"
    turns = [{"role": "user", "content": FORGET[0][0]}]
    chats = [{"messages": [*turns, {"role": "assistant", "content": FORGET[0][1]}]}]
    plain = answers_about_others(learnt(), words(), FORGET[:1], number=8)
    found = answers_about_others(learnt(), tokens, text_examples(tokens, chats), number=8)
    tokens.chat_template = "{{ raise_exception('ready rows are written as they were') }}"
    ready = text_examples(tokens, FORGET[:1], template="Question: {question}\nAnswer: {answer}")
    assert answers_about_others(learnt(), tokens, ready, number=8).rows == plain.rows
    assert [tokens.decode(row["input_ids"]) for row in found.rows] == [
        words().decode(row["input_ids"]) for row in plain.rows
    ]
