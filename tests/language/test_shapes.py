"""Rows of published data sets, in the columns that they have, from wherever they lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from text_models import tokenizer

from semu_peft.language import ColumnsError, TextExample, as_example, read_text, text_examples

TOFU = {
    "question": "Where was she born?", "answer": "In Karachi.", "paraphrased_answer": "Karachi is it.",
    "perturbed_answer": ["In Rome.", "In Oslo."], "paraphrased_question": "Her birthplace?",
}  # fmt: skip
PICTURE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]}
CALLS = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "She."}]


@pytest.mark.parametrize(
    "row, prompt, answer, wrong",
    [
        (TOFU, "Where was she born?", "In Karachi.", ("In Rome.", "In Oslo.")),
        ({"question": "Who?", "answer": "She.", "option": ["He.", "She."]}, "Who?", "She.", ("He.",)),
        ({"question": "Who?", "answer": "She.", "option": ["He.", "It."]}, "Who?", "She.", ("He.", "It.")),
        (
            {**TOFU, "option": ["In Oslo.", "In Bonn.", "In Karachi.", "In Bonn."]},
            TOFU["question"],
            TOFU["answer"],
            ("In Rome.", "In Oslo.", "In Bonn."),
        ),
        ({"question": "Who?", "choices": ["a", "b"], "answer": "B"}, "Who?", "b", ("a",)),
        ({"question": "Who?", "choices": ["she", "he", "it"], "answer": "(c)"}, "Who?", "it", ("she", "he")),
        ({"question": "Who?", "choices": ["B", "A"], "answer": "A"}, "Who?", "A", ("B",)),  # a choice as it stands
        ({"question": "2?", "choices": ["1", "2"], "answer": "2"}, "2?", "2", ("1",)),
        ({"prompt": "It was", "gt": "a dark night"}, "It was", "a dark night", ()),  # MUSE verbmem
        ({"question": "Who?", "choices": ["a", "b", "c"], "answer": 2}, "Who?", "c", ("a", "b")),  # WMDP
        ({"title": "On x", "text": "All of it.", "doi": "1"}, None, "All of it.", ()),  # WMDP corpora
        (
            {"query": "___ wrote it.", "answer": "She", "level": "1", "subject": "She"},
            "___ wrote it.",
            "She",
            (),
        ),  # RWKU
        ({"instruction": "Say", "input": "who", "output": "she"}, "Say\nwho", "she", ()),
        ({"prompt": "Who?", "response": "She."}, "Who?", "She.", ()),
        ({"prompt": CHAT[:1], "completion": "She."}, (CHAT[0],), "She.", ()),
        ({"messages": CHAT}, (CHAT[0],), "She.", ()),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, (CHAT[0],), "She.", ()),  # TRL
        ({"question": "Who?", "choices": np.array(["a", "b"]), "answer": np.int64(1)}, "Who?", "b", ("a",)),
        ("a text", None, "a text", ()),
        (("Who?", "She."), "Who?", "She.", ()),
    ],
)
def test_rows(row: Any, prompt: Any, answer: str, wrong: tuple[str, ...]) -> None:
    example = as_example(row)
    assert (example.prompt, example.answer, example.perturbed_answers) == (prompt, answer, wrong)
    assert example.is_plain == (prompt is None)


def test_what_tofu_has_beside_an_answer() -> None:
    example = as_example(TOFU)
    assert (example.paraphrased_prompt, example.paraphrased_answer) == ("Her birthplace?", "Karachi is it.")


def test_paraphrases() -> None:
    """Of several answers the first; a question may be a chat's turns."""
    several = as_example({**TOFU, "paraphrased_answer": ["one", "two"], "paraphrased_question": CHAT[:1]})
    assert (several.paraphrased_answer, several.paraphrased_prompt) == ("one", (CHAT[0],))
    none = as_example({**TOFU, "paraphrased_answer": None, "paraphrased_question": None, "perturbed_answer": None})
    assert none == TextExample("In Karachi.", "Where was she born?")


def test_what_is_named_otherwise_can_be_given_all_the_same() -> None:
    """As the error says, to whoever raised it."""
    rows = [{"q": "What colour is the sky?", "a": "blue"}]
    with pytest.raises(ColumnsError, match=r"give in their place `list\(read_text\(..., columns="):
        text_examples(tokenizer(), rows)
    renamed = list(read_text(rows, columns={"question": "q", "answer": "a"}))
    assert text_examples(tokenizer(), renamed).examples == [TextExample("blue", "What colour is the sky?")]


def test_a_dict_of_columns_is_read_as_the_error_says() -> None:
    columns = {"question": ["Who?", "Where?"], "answer": ["She.", "Here."]}
    assert [each.answer for each in read_text(Dataset.from_dict(columns))] == ["She.", "Here."]


def test_sources_agree(tmp_path: Path) -> None:
    """JSON lines, an array, parquet, a data set, a stream of one and a folder of files give the same examples."""
    rows = [{"question": f"q{index}", "answer": f"a{index}"} for index in range(5)]
    expected = [TextExample(f"a{index}", f"q{index}") for index in range(5)]
    lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    for name, text in (("lines.json", lines), ("lines.jsonl", lines), ("array.json", json.dumps(rows))):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert list(read_text(tmp_path / name)) == expected
    data = Dataset.from_list(rows)
    data.to_parquet(tmp_path / "rows.parquet")
    assert list(read_text(str(tmp_path / "rows.parquet"))) == expected
    assert list(read_text(data)) == list(read_text(data.to_iterable_dataset())) == expected
    assert list(read_text(tmp_path)) == expected * 4
    (tmp_path / "book.txt").write_text("It was\na dark night.", encoding="utf-8")
    assert list(read_text(tmp_path / "book.txt")) == [TextExample("It was\na dark night.")]


def test_turns_are_kept_whole() -> None:
    """A call of a tool, with or without content, and who answered it; without what `datasets` fills up by None."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    turns = [CHAT[0], call, {**call, "content": ""}, {"role": "tool", "content": "5", "name": "add"}, CHAT[0]]
    filled = [{"name": None, "tool_calls": None, **turn} for turn in [*turns, CHAT[1]]]
    example = as_example({"messages": filled})
    assert example.prompt == tuple(turns) and example.answer == "She."
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in CHAT]
    assert as_example({"messages": parts}) == TextExample("She.", (CHAT[0],))


def test_a_data_frame_is_read_by_its_rows() -> None:
    """What is not in a row of it (NaN) is not there."""
    rows: list[Any] = [{"question": "Who?", "answer": "She."}, {"question": "Where?", "answer": "Here."}, {"text": "a"}]
    assert list(read_text(pd.DataFrame(rows))) == list(read_text(rows))


@pytest.mark.parametrize(
    "name, text", [("a.jsonl", '{"text": "one"}\n'), ("a.json", '[{"text": "one"}]'), ("a.txt", "one")]
)
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert list(read_text(tmp_path / name)) == [TextExample("one")]


def test_columns_of_your_own() -> None:
    row = {"frage": "Wer?", "antwort": "Sie."}
    assert as_example(row, columns={"question": "frage", "answer": "antwort"}) == TextExample("Sie.", "Wer?")
    with pytest.raises(ValueError, match="`columns`: 'answer' is to be read from 'other', which `row` has not among"):
        as_example(TOFU, columns={"answer": "other"})


@pytest.mark.parametrize("name", ["latin.txt", "latin.jsonl"])
def test_a_file_in_another_encoding_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes('{"text": "Zoë"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"`forget`: .*{name} is no text in UTF-8 \(.* can't decode"):
        list(read_text(tmp_path / name))


def test_a_saved_data_set_is_named(tmp_path: Path) -> None:
    Dataset.from_list([TOFU]).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match=r"as `save_to_disk` writes it. Give `datasets.load_from_disk\('.*one'\)`"):
        list(read_text(tmp_path / "one"))


def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    """What stands behind the part that is read may be anything."""
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "one"}\nnot json\n', encoding="utf-8")
    examples = read_text(path)
    assert next(examples).answer == "one"
    with pytest.raises(ValueError, match=r"long.jsonl, line 2 must be one array, or one object a line"):
        next(examples)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            '{"text": "a"}\n{"text": "b" 1}',
            r", line 2 must be .*, got a mistake \(Expecting ',' delimiter at column 14\)",
        ),
        (
            '[{"text": "a"},\n{"text" "b"}]',
            r"rows.json must be one array, got .*Expecting ':' .* at line 2, column 9\)",
        ),
    ],
)
def test_a_mistake_in_a_file_is_told_by_its_place(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        list(read_text(path))


@pytest.mark.parametrize(
    "source, error, match",
    [
        ("a text", TypeError, r"For one text write `\[text\]`"),
        ("missing.jsonl", FileNotFoundError, "there is no file missing.jsonl"),
        (5, TypeError, "`forget` must be a list of texts"),
        ({"train": [TOFU]}, TypeError, r"Choose a split: `\['train'\]`"),
        (TOFU, TypeError, r"got one dict of \['question'.*Write `\[row\]`"),
        ({"messages": CHAT}, TypeError, r"Write `\[row\]`"),
        ({"question": "Who?", "choices": ["a", "b"], "answer": 0}, TypeError, r"Write `\[row\]`"),
        ({"question": ["Who?"], "answer": ["She."]}, TypeError, r"dict of columns .* `datasets.Dataset.from_dict\("),
        ({"messages": [CHAT, CHAT]}, TypeError, r"dict of columns .* `datasets.Dataset.from_dict\("),
        ([TOFU, {"question": "x", "answer": None}], ValueError, r"`forget\[1\]` must have .*, got None as 'answer'"),
        ([{"question": None, "answer": None}], ValueError, r"got None as 'question', 'answer'"),
        ([{"text": None}], ValueError, r"`forget\[0\]` must have .*, got None as 'text'"),
        ([{"text": 5}], TypeError, r"`forget\[0\]`: `text` must be a text, got int"),
        ([{"query": 5, "answer": "a"}], TypeError, r"`forget\[0\]`: `query` must be a text, or the turns .* got int"),
        (
            [{**TOFU, "paraphrased_question": ["p1", "p2"]}],
            TypeError,
            r"`forget\[0\]`: `paraphrased_question` must be a text, or the turns of a chat .*, got list",
        ),
        ([{**TOFU, "paraphrased_answer": 5}], TypeError, r"`forget\[0\]`: `paraphrased_answer` must .*, got int\."),
        ([{**TOFU, "perturbed_answer": [1, 2]}], TypeError, r"`forget\[0\]`: `perturbed_answer` .* got list of int\."),
        ([{**TOFU, "option": {"text": ["a"]}}], TypeError, r"`forget\[0\]`: `option` must be .*, got dict\."),
        ([{**TOFU, "input": {"a": 1}}], TypeError, r"`forget\[0\]`: `input` must be a text, got dict\."),
        (
            [{"question": "Who?", "choices": ["a", "b"], "answer": "C"}],
            ValueError,
            r"`forget\[0\]`: `answer` must be one of its 2 choices, a letter .*, got 'C'",
        ),
        ([{"question": "Who?", "choices": ["a", "b"], "answer": "1"}], ValueError, "index as an integer, got '1'"),
        ([5], TypeError, r"`forget\[0\]` must be a text, a pair"),
        ([("Who?", None)], TypeError, r"`forget\[0\]` must be a text, a pair .*, got tuple of str, None\."),
        ([("Who?", "She.", "b")], TypeError, r"`forget\[0\]` must be a text, a pair .*, got tuple of str, str, str\."),
        (("Who?", "She."), TypeError, r"one pair or two rows. Write `\[\(prompt, answer\)\]` .*, or `\[text, text\]`"),
        ([TOFU, {"words": "a"}], ValueError, r"`forget\[1\]` must have the columns"),
        ([{"messages": CHAT[:1]}], ValueError, "ends with the assistant's answer"),
        ([{"question": "Who?", "choices": ["a"], "answer": 1}], ValueError, "an index of its 1 choices, got 1"),
        ([{"question": "Who?", "answer": 1}], TypeError, "`answer` must be a text, got int"),
        ([(5, "a")], TypeError, "a prompt must be a text"),
        (
            [{"prompt": "Who?", "completion": CHAT}],
            ValueError,
            r"`completion` must be a text, or one turn of",
        ),
        ([{"messages": [*CHAT, CALLS]}], ValueError, r"`forget\[0\]`: turn 2 must be an answer in words, got calls of"),
        (
            [{"messages": [CHAT[0], {**CHAT[1], "reasoning_content": "I know."}]}],
            ValueError,
            "turn 1 must be an answer in its 'content' alone, got 'reasoning_content' beside it",
        ),
        (
            [{"messages": [PICTURE, CHAT[1]]}],
            ValueError,
            r"turn 0 must have content of text.*\['image', 'text'\]",
        ),
        (
            [{"messages": [CHAT[0], {"role": "assistant"}]}],
            TypeError,
            "turn 1 must have a 'role', and a text",
        ),
    ],
)
def test_what_cannot_be_read(source: Any, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        list(read_text(source))
