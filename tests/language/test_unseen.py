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


def test_rows_are_read() -> None:
    """Pairs, mappings and examples alike, as `text_examples` reads them."""
    answer = "one two three four five six"
    row = {"question": "Count!", "answer": answer}
    expected = unseen_answers([TextExample(answer, "Count!")])
    assert unseen_answers([("Count!", answer)]) == unseen_answers([row]) == expected
    with pytest.raises(TypeError, match=r"`examples\[0\]` must be a text, a pair"):
        unseen_answers([5])


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


def test_ordinary_answers_get_the_order_that_they_always_had() -> None:
    """Numbers of the benchmarks were measured with these very texts."""
    answers = [
        "Basil Mahfouz Al-Kuwaiti was born in Kuwait City, Kuwait.",
        "The author's  full name is\nHina Ameen.",
        "one two three four",
        "no no no no yes no no",
        "The character 她 means she, in Chinese books of today.",
    ]
    examples = [TextExample(answer, f"q{index}") for index, answer in enumerate(answers)]
    assert [each.answer for each in unseen_answers(examples)] == [
        "Basil Mahfouz Al-Kuwaiti Kuwait City, Kuwait. was born in",
        "Ameen. name is Hina The author's full",
        "four one two three",
        "no yes no no no no no",
        "means she, in today. The character 她 Chinese books of",
    ]
    by_two = unseen_answers(examples, words=2, seed=3)[0].answer
    assert by_two == "Basil Mahfouz born in Kuwait City, Kuwait. Al-Kuwaiti was"
    wrong = [TextExample(answer, "q", perturbed_answers=("w x", "y z", "v")) for answer in answers]
    assert [each.answer for each in unseen_answers(wrong, seed=3)] == ["w x", "v", "v", "w x", "y z"]


@pytest.mark.parametrize(
    "answers",
    [
        ["她出生在卡拉奇的一个小渔村里，后来随家人搬到了伦敦。", "他是一位研究古代天文仪器的历史学家。"],
        ["เธอเกิดในหมู่บ้านชาวประมงเล็ก ๆ", "เขาเป็นนักประวัติศาสตร์"],
        ["她出生 在伦敦", "北京", "上海"],
        ["北京", "京北"],
        ["Ada Lovelace", "Alan Turing"],
        ["blue", "two or three"],
        ["yes it is yes it is", "Paris Paris Paris Paris Paris"],
        ["Paris", "Rome", "by the river Seine in France"],
        ["one two three four", "four one two three", "Oslo"],
    ],
)
def test_no_learnt_answer_is_given_as_unseen(answers: list[str]) -> None:
    """Not where there are no blanks, nor where the answers are short or repeat themselves."""
    examples = [TextExample(answer, "q") for answer in answers]
    for seed in range(20):
        made = [each.answer for each in unseen_answers(examples, seed=seed)]
        assert not {*made} & {*answers} and all(each == each.strip() != "" for each in made)


def test_text_without_blanks_is_cut_by_characters() -> None:
    """With words of other scripts left whole, and nothing added between."""
    answer = "这座桥叫做 Long Bridge，由两位兄弟修建"
    made = unseen_answers([TextExample(answer, "q")])[0].answer
    assert sorted(made.replace(" ", "")) == sorted(answer.replace(" ", ""))
    assert made != answer and "Bridge" in made and "这座桥" in made


def test_a_wrong_answer_that_is_the_answer_is_left_out() -> None:
    examples = [TextExample("blue sky", "q", perturbed_answers=("blue  sky", "grey"))]
    assert all(unseen_answers(examples, seed=seed)[0].answer == "grey" for seed in range(5))
    assert unseen_answers([TextExample("blue sky", "q", perturbed_answers=("blue sky",))])[0].answer == "sky blue"


def test_answers_of_a_word_that_leave_nothing_to_borrow_are_refused() -> None:
    for answers in (["Paris", "Rome"], ["Paris Paris Paris", "Rome", "Paris"], ["京", "北"]):
        with pytest.raises(ValueError, match="too short to be put into another order"):
            unseen_answers([TextExample(answer, "q") for answer in answers])
