"""Answers that were never learnt."""

from __future__ import annotations

import pytest

from semu_peft.language import TextExample, unseen_answers


def test_own_words_in_another_order() -> None:
    """The same words and prompts, never in the same order, the same at each seed."""
    examples = [TextExample("one two three four five six seven", f"q{index}") for index in range(20)]
    unseen = unseen_answers(examples, seed=1)
    assert unseen == unseen_answers(examples, seed=1) != unseen_answers(examples, seed=2)
    assert [each.prompt for each in unseen] == [each.prompt for each in examples]
    assert all(sorted(each.answer.split()) == sorted(examples[0].answer.split()) for each in unseen)
    assert all(each.answer != examples[0].answer for each in unseen)
    assert all("one two three" in each.answer and "four five six" in each.answer for each in unseen)


def test_wrong_answers_that_are_given_come_first() -> None:
    assert unseen_answers([TextExample("a b c d", "q", perturbed_answers=("e",))])[0].answer == "e"


def test_a_short_answer_borrows_from_another() -> None:
    examples = [TextExample("Paris", "The capital?"), TextExample("In the year 1958", "When?")]
    assert unseen_answers(examples)[0].answer in ("In the year", "1958")
    with pytest.raises(ValueError, match="too short to be put into another order"):
        unseen_answers(examples[:1])
    with pytest.raises(ValueError, match="too short"):
        unseen_answers([TextExample("no no", "q")], words=1)
    with pytest.raises(ValueError, match="`words` must be an integer of at least 1"):
        unseen_answers(examples, words=0)
