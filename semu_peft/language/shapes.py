"""Rows of text as data sets have them (TOFU, MUSE, WMDP, RWKU, chats, plain text), read one by one into one shape.

A row is told by its columns, so that no data set needs a reader of its own:

| columns | read as | found in |
| --- | --- | --- |
| `question`, `answer` | prompt and answer | TOFU, MUSE knowmem |
| `query`, `answer` | the same | RWKU |
| `prompt` and `answer`, `response`, `completion` or `gt` | the same, texts or turns of a chat | TRL, MUSE verbmem |
| `instruction`, `output`, perhaps `input` | the same | RWKU's training pairs |
| `question`, `choices` or `option`, `answer` | the chosen one; the others are wrong answers | WMDP, MMLU |
| `messages` | a chat, of which the last turn is the answer | TRL |
| `text` | plain text | MUSE raw, WMDP corpora, RWKU passages |

An answer beside choices is the index of one, from 0, its letter, `"A"` for the first, or written out; a letter that is
itself a choice is that one. Turns of a chat are kept whole, with a tool turn's `name` and an assistant's `tool_calls`;
content in parts is read if all of them are text. The answer is a turn's content, with its reasoning written in it.
Beside an answer `paraphrased_question`, `paraphrased_answer` (of several the first) and `perturbed_answer` (one or
several) are kept, as TOFU has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

Message = Mapping[str, Any]
"""One turn of a chat, `{"role": ..., "content": ...}`, with all else that the chat template reads of it."""

_PROMPTS = ("question", "query", "prompt", "instruction")
_ANSWERS = ("answer", "response", "completion", "gt", "output")
_CHOICES = ("choices", "option", "options")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_LABEL = re.compile(r"\(?([A-Za-z]|\d+)[).:]?")  # of a choice: B, (B), b) or 2.
_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".txt")


@dataclass(frozen=True)
class TextExample:
    """A text, or an answer to a prompt, with what the data set says beside it.

    Attributes:
        answer: The answer, or the whole of a plain text.
        prompt: What it answers: a question, or the turns of a chat; None for plain text.
        paraphrased_prompt: The question in other words.
        paraphrased_answer: The answer in other words.
        perturbed_answers: Wrong answers to the same prompt.

    Examples:
        >>> TextExample("In Karachi.", prompt="Where was she born?").is_plain
        False
    """

    answer: str
    prompt: str | tuple[Message, ...] | None = None
    paraphrased_prompt: str | tuple[Message, ...] | None = None
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether this is plain text, which no prompt goes before."""
        return self.prompt is None


class ColumnsError(ValueError):
    """A row has none of the known columns.

    Attributes:
        columns: Those that it has.

    Examples:
        >>> try:
        ...     as_example({"q": "What colour?", "a": "blue"})
        ... except ColumnsError as error:
        ...     error.columns
        ['a', 'q']
    """

    def __init__(self, name: str, columns: list[str]) -> None:
        self.columns = columns
        super().__init__(
            f"`{name}` must have the columns 'question' and 'answer' (or 'prompt' and 'response'), 'messages' or "
            f"'text', got {columns}. Rename them, or give in their place `list(read_text(..., columns={{'question': "
            "..., 'answer': ...}))`, which says what they are called."
        )


def read_text(source: Any, *, columns: Mapping[str, str] | None = None, name: str = "forget") -> Iterator[TextExample]:
    """Read text from wherever it lies, one example after the other, so that a large file is never held whole.

    Args:
        source: A list or other iterable of strings (plain text), of pairs (prompt, answer), of mappings with the
            columns above, or of `TextExample`s; a `datasets.Dataset`, streamed or not; a pandas `DataFrame`; or a path
            of a JSON (lines or one array), parquet or text file, or of a folder of these.
        columns: Your names for columns, `{"answer": "label_text"}`.
        name: The argument to name in errors.

    Yields:
        The examples, in order.

    Raises:
        TypeError: The source, a row or a value in it is of no such kind.
        ValueError: A row has none of the columns, or nothing in them; its answer is none of its choices; or a file is
            not what its name says.
        FileNotFoundError: There is no such file.
        ImportError: pyarrow is missing, which reads parquet.

    Examples:
        >>> list(read_text([("Where was she born?", "In Karachi.")]))
        [TextExample(answer='In Karachi.', prompt='Where was she born?', ...)]
        >>> next(read_text([{"query": "Who?", "answer": "She."}])).prompt
        'Who?'
    """
    for index, row in enumerate(_rows(source, columns, name)):
        yield as_example(row, columns=columns, name=f"{name}[{index}]")


def as_example(row: Any, *, columns: Mapping[str, str] | None = None, name: str = "row") -> TextExample:
    """Read one row: a string, a pair (prompt, answer), a mapping, or an example already.

    Raises:
        TypeError: It is none of these, or a value in it is no text.
        ColumnsError: A mapping has none of the known columns; it is a `ValueError`.
        ValueError: A mapping has nothing in these, a chat does not end with an answer, a turn of it cannot be kept, or
            an answer is none of its choices.

    Examples:
        >>> as_example({"question": "The capital?", "choices": ["Rome", "Paris"], "answer": 1}).answer
        'Paris'
    """
    if isinstance(row, TextExample):
        return row
    if isinstance(row, str):
        return TextExample(row)
    if isinstance(row, (tuple, list)) and len(row) == 2 and isinstance(row[1], str):
        return TextExample(row[1], prompt=_as_prompt(row[0], name))
    if not isinstance(row, Mapping):
        got = type(row).__name__
        if isinstance(row, (tuple, list)):  # what a pair is no text in, or something of another length
            got += f" of {', '.join(type(value).__name__ if value is not None else 'None' for value in row)}"
        raise TypeError(
            f"`{name}` must be a text, a pair (prompt, answer) or a mapping, got {got}. Write "
            '`{"question": ..., "answer": ...}`.'
        )
    for ours, theirs in (columns or {}).items():
        if ours in row and theirs not in row:  # or the other one would be read without a word
            raise ValueError(
                f"`columns`: {ours!r} is to be read from {theirs!r}, which `{name}` has not among "
                f"{sorted(map(str, row))}. Correct its name."
            )
    given = _named(row, columns)
    if given.get("messages") is not None:
        return _chat(given["messages"], name)
    prompt = next((key for key in _PROMPTS if given.get(key) is not None), None)
    answer = next((key for key in _ANSWERS if given.get(key) is not None), None)
    if prompt is not None and answer is not None:
        return _question_and_answer(given, prompt, answer, name)
    if isinstance(given.get("text"), str):
        return TextExample(given["text"])
    raise _nothing_to_read(given, sorted(map(str, row)), name)


def check_apart(forget: Iterable[TextExample], kept: Iterable[TextExample], name: str = "retain") -> None:
    """Check that nothing is both to be forgotten and to be kept: one would undo the other.

    Args:
        forget: What to forget.
        kept: What to keep.
        name: The argument that this is, for the error.

    Raises:
        ValueError: A row is in both, with the same prompt and answer.

    Examples:
        >>> from semu_peft.language.shapes import TextExample, check_apart
        >>> check_apart([TextExample("blue", "What colour?")], [TextExample("blue", "And the sea?")])
    """
    known = {(str(row.prompt), row.answer) for row in forget}
    both = [row for row in kept if (str(row.prompt), row.answer) in known]
    if both:
        raise ValueError(
            f"`{name}` holds {len(both)} of the rows to be forgotten, {both[0].answer[:60]!r} among the answers. Take "
            "them out of one of the two."
        )


def as_texts(value: Any, what: str = "value") -> tuple[str, ...]:
    """One text or several as several; none where there is None.

    Args:
        value: A text, an iterable of texts, or None.
        what: What to call it in errors.

    Raises:
        TypeError: It is of another kind.

    Examples:
        >>> from semu_peft.language.shapes import as_texts
        >>> as_texts("one"), as_texts(["one", "two"]), as_texts(None)
        (('one',), ('one', 'two'), ())
    """
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    is_list = isinstance(value, Iterable) and not isinstance(value, (Mapping, bytes))
    texts = tuple(value) if is_list else ()
    kinds = sorted({type(text).__name__ for text in texts if not isinstance(text, str)})
    if kinds or not is_list:
        got = type(value).__name__ + (f" of {', '.join(kinds)}" if kinds else "")
        raise TypeError(f"{what} must be a text or a list of texts, got {got}. Write strings.")
    return texts


def _named(row: Mapping[str, Any], columns: Mapping[str, str] | None) -> dict[str, Any]:
    """A row by our names for its columns."""
    return {**row, **{ours: row[theirs] for ours, theirs in (columns or {}).items() if theirs in row}}


def _nothing_to_read(given: Mapping[str, Any], columns: list[str], name: str) -> Exception:
    """Why a row is no example, though it may have columns of that name."""
    if given.get("text") is not None:
        return TypeError(f"`{name}`: `text` must be a text, got {type(given['text']).__name__}. Write it as a string.")
    asked, answered = ([key for key in keys if key in given] for keys in (_PROMPTS, _ANSWERS))
    known = [*(asked + answered if asked and answered else []), *(key for key in ("messages", "text") if key in given)]
    empty = [key for key in known if given[key] is None]
    if empty:
        return ValueError(
            f"`{name}` must have a question and its answer, a chat or a text, got None as "
            f"{', '.join(map(repr, empty))}. Fill it in, or leave the row out."
        )
    return ColumnsError(name, columns)


def _question_and_answer(row: Mapping[str, Any], prompt: str, answer: str, name: str) -> TextExample:
    def texts(column: str | None) -> tuple[str, ...]:
        return () if column is None else as_texts(row.get(column), f"`{name}`: `{column}`")

    question, right = _as_prompt(row[prompt], name, f"`{prompt}`"), _as_answer(row[answer], answer, name)
    if row.get("input") is not None and isinstance(question, str):
        beside = _as_text(row["input"], "input", name)
        question = f"{question}\n{beside}" if beside else question
    choices = texts(next((key for key in _CHOICES if row.get(key) is not None), None))
    right = _as_text(_chosen(right, choices, answer, name) if choices else right, answer, name)
    wrong = texts("perturbed_answer")
    wrong += tuple(choice for choice in dict.fromkeys(choices) if choice not in (right, *wrong))
    others = row.get("paraphrased_question")
    paraphrased = None if others is None else _as_prompt(others, name, "`paraphrased_question`")
    return TextExample(right, question, paraphrased, next(iter(texts("paraphrased_answer")), None), wrong)


def _chosen(answer: Any, choices: tuple[str, ...], column: str, name: str) -> Any:
    """The choice that an answer says by its index or its letter; or the answer, where it is written out."""
    if isinstance(answer, Integral):
        if not 0 <= int(answer) < len(choices):
            raise ValueError(
                f"`{name}`: `{column}` must be an index of its {len(choices)} choices, got {answer}. They count from 0."
            )
        return choices[int(answer)]
    label = _LABEL.fullmatch(answer.strip()) if isinstance(answer, str) and answer not in choices else None
    if label is None:
        return answer
    # A number in a text may count from 0 or from 1, so that it says nothing.
    place = ord(label[1].upper()) - ord("A") if label[1].isalpha() else len(choices)
    if place >= len(choices):
        raise ValueError(
            f"`{name}`: `{column}` must be one of its {len(choices)} choices, a letter from A on for one, or its index "
            f"as an integer, got {answer!r}. If all of them are wrong answers, call them 'perturbed_answer'."
        )
    return choices[place]


def _as_text(value: Any, column: str, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"`{name}`: `{column}` must be a text, got {type(value).__name__}. Write it as a string.")
    return value


def _chat(messages: Any, name: str) -> TextExample:
    turns = _as_prompt(messages, name, "`messages`")
    if isinstance(turns, str) or len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise ValueError(
            f"`{name}`: `messages` must be a chat that ends with the assistant's answer to a turn before it, got "
            f"{[turn['role'] for turn in turns] if not isinstance(turns, str) else turns!r}. Cut it after the answer."
        )
    return TextExample(_said(turns[-1], f"`{name}`: turn {len(turns) - 1}"), prompt=turns[:-1])


def _as_answer(answer: Any, column: str, name: str) -> Any:
    """An answer as it is, or what is said in the one turn that it is."""
    if isinstance(answer, (str, Mapping)) or not isinstance(answer, Sequence) or not answer:
        return answer
    if not all(isinstance(turn, Mapping) for turn in answer):
        return answer
    turns = _as_prompt(answer, name)
    roles = [turn["role"] for turn in turns if not isinstance(turn, str)]
    if roles != ["assistant"] or isinstance(turns, str):
        raise ValueError(
            f"`{name}`: `{column}` must be a text, or one turn of the assistant, got turns of {roles}. Write all turns "
            "as `messages`, of which the last is the answer."
        )
    return _said(turns[0], f"`{name}`: `{column}`")


def _as_prompt(prompt: Any, name: str, what: str = "a prompt") -> str | tuple[Message, ...]:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence) and prompt and all(isinstance(turn, Mapping) for turn in prompt):
        return tuple(_turn(turn, f"`{name}`: turn {index}") for index, turn in enumerate(prompt))
    raise TypeError(
        f"`{name}`: {what} must be a text, or the turns of a chat with 'role' and 'content', got "
        f"{type(prompt).__name__}. Write it as a string."
    )


def _turn(turn: Message, where: str) -> Message:
    """A turn with all that it has; of `datasets`, which fills up what other turns have, without what is None."""
    kept = {key: value for key, value in turn.items() if value is not None or key == "content"}
    content = kept.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        kinds = [part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in content]
        if set(kinds) != {"text"} or not all(isinstance(part.get("text"), str) for part in content):
            raise ValueError(f"{where} must have content of text alone, got parts of {kinds}. Leave the row out.")
        content = kept["content"] = "".join(part["text"] for part in content)
    if "role" not in kept or not (isinstance(content, str) or (content is None and kept.get("tool_calls"))):
        raise TypeError(
            f"{where} must have a 'role', and a text as 'content' or else 'tool_calls', got {turn!r:.200}. Write "
            '`{"role": "user", "content": ...}`.'
        )
    return kept


def _said(turn: Message, where: str) -> str:
    """What the assistant says in a turn."""
    if turn.get("tool_calls"):
        raise ValueError(
            f"{where} must be an answer in words, got calls of tools, which no text tells. Cut the chat after an "
            "answer."
        )
    if thought := next((key for key in _THOUGHTS if turn.get(key)), None):
        raise ValueError(
            f"{where} must be an answer in its 'content' alone, got {thought!r} beside it, of which nothing would be "
            "forgotten. Write it before the answer as the model does, such as `<think>…</think>`, or leave it out."
        )
    said: str = turn["content"]
    return said


def _rows(source: Any, columns: Mapping[str, str] | None, name: str) -> Iterator[Any]:
    if isinstance(source, (str, Path)):
        return _rows_of_path(source, name)
    if isinstance(source, Mapping):
        raise TypeError(
            f"`{name}` must be a list of rows, a data set or a path, got one {type(source).__name__} of "
            f"{list(source)[:5]}. {_mend_of_mapping(source, columns)}"
        )
    if callable(getattr(source, "itertuples", None)):  # a pandas `DataFrame`, which goes through its columns' names
        rows = source.astype(object).where(source.notna(), None).itertuples(index=False, name=None)
        return (dict(zip(source.columns, row, strict=True)) for row in rows)
    if isinstance(source, tuple) and len(source) == 2 and all(isinstance(text, str) for text in source):
        raise TypeError(
            f"`{name}` must be a list of rows, got a tuple of two texts, which may be one pair or two rows. Write "
            "`[(prompt, answer)]` for a pair, or `[text, text]` for two texts."
        )
    if not isinstance(source, Iterable):
        raise TypeError(
            f"`{name}` must be a list of texts or of pairs (prompt, answer), a data set or a path, got "
            f"{type(source).__name__}. Write `[(prompt, answer)]`."
        )
    return iter(source)


def _mend_of_mapping(source: Mapping[str, Any], columns: Mapping[str, str] | None) -> str:
    """What to write instead of a mapping, which may be one row, a table by its columns, or a data set by its splits."""
    given = _named(source, columns)
    if known := [given[key] for key in (*_PROMPTS, *_ANSWERS, "messages", "text") if key in given]:
        is_table = any(isinstance(value, Iterable) and not isinstance(value, (str, Mapping)) and not _is_chat(value)
                       for value in known)  # fmt: skip
        made = "A dict of columns is not read as it is: give `datasets.Dataset.from_dict(...)` of it."
        return made if is_table else "Write `[row]`."
    splits = [key for key, value in source.items() if not isinstance(value, (str, int, float))]
    return f"Choose a split: `[{splits[0]!r}]`." if splits else "Write `[row]`."


def _is_chat(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(turn, Mapping) for turn in value)


def _rows_of_path(source: str | Path, name: str) -> Iterator[Any]:
    path = Path(source)
    exists = len(str(source)) < 1024 and path.exists()
    if not exists and path.suffix not in _SUFFIXES:
        raise TypeError(
            f"`{name}` must be a list of texts, or the path of a file that exists, got {str(source)[:60]!r}. For one "
            "text write `[text]`."
        )
    if not exists:
        raise FileNotFoundError(f"`{name}`: there is no file {path}.")
    if any((path / each).exists() for each in ("state.json", "dataset_dict.json")):
        raise ValueError(
            f"`{name}`: {path} is a data set as `save_to_disk` writes it. Give `datasets.load_from_disk({str(path)!r})`"
            ", or of several splits one of them."
        )
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"`{name}`: the folder {path} must hold files that end with one of {', '.join(_SUFFIXES)}.")
    return (row for file in files for row in _rows_of_file(file, name))


def _rows_of_file(path: Path, name: str) -> Iterator[Any]:
    if path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.suffix == ".txt":
        with _text_in_utf8(path, name):
            yield path.read_text(encoding="utf-8-sig")
    elif path.suffix in _SUFFIXES:
        with _text_in_utf8(path, name):
            yield from _json(path, name)
    else:
        raise ValueError(f"`{name}` must end with one of {', '.join(_SUFFIXES)}, got {path}. Convert or rename it.")


@contextmanager
def _text_in_utf8(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"`{name}`: {path} is no text in UTF-8 ({error}). Convert it.") from error


def _json(path: Path, name: str) -> Iterator[Any]:
    """Rows of JSON lines, or of one array: published files of both kinds are called `.json`."""
    with path.open(encoding="utf-8-sig") as file:  # as some editors mark it
        beginning, number = "", 0
        try:
            beginning = file.read(1024).lstrip()
            file.seek(0)
            if beginning.startswith("["):
                yield from json.load(file)
                return
            for number, line in enumerate(file, start=1):  # noqa: B007 - an error tells it
                if line.strip():
                    yield json.loads(line)
        except UnicodeDecodeError:
            raise
        except ValueError as error:
            is_array, what = beginning.startswith("["), str(error)
            where, form = ("", "one array") if is_array else (f", line {number}", "one array, or one object a line")
            if isinstance(error, json.JSONDecodeError):  # its words count lines from the one that was read
                line = f"line {error.lineno}, " if is_array else ""
                what = f"{error.msg} at {line}column {error.colno}"
            raise ValueError(f"`{name}`: {path}{where} must be {form}, got a mistake ({what}). Correct it.") from error


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError('Parquet files need pyarrow: `pip install ".[examples]"` in a clone of semu-peft.') from error
    with ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()
