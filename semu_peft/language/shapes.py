"""Rows of text as data sets have them (TOFU, MUSE, WMDP, RWKU, chats, plain text), read one by one into one shape.

A row is told by its columns, so that no data set needs a reader of its own:

| columns | read as | found in |
| --- | --- | --- |
| `question`, `answer` | prompt and answer | TOFU, MUSE knowmem |
| `query`, `answer` | the same | RWKU |
| `prompt` and `answer`, `response`, `completion` or `gt` | the same, texts or turns of a chat | TRL, MUSE verbmem |
| `instruction`, `output`, perhaps `input` | the same | RWKU's training pairs |
| `question`, `choices` or `option`, `answer` as an index | the chosen one; the others are wrong answers | WMDP, MMLU |
| `messages` | a chat, of which the last turn is the answer | TRL |
| `text` | plain text | MUSE raw, WMDP corpora, RWKU passages |

Turns of a chat are kept whole, with a tool turn's `name` and an assistant's `tool_calls`; content in parts is read if
all of them are text. Beside an answer `paraphrased_question`, `paraphrased_answer` and `perturbed_answer` (one or
several) are kept, as TOFU has them.
"""

from __future__ import annotations

import json
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
    paraphrased_prompt: str | None = None
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
            f"'text', got {columns}. Rename them, or say which they are: `read_text(..., columns={{'question': ..., "
            "'answer': ...})`, whose rows can be given instead."
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
        TypeError: The source or a row is of no such kind.
        ValueError: A row has none of the columns, or a file is not what its name says.
        FileNotFoundError: There is no such file.
        ImportError: pyarrow is missing, which reads parquet.

    Examples:
        >>> list(read_text([("Where was she born?", "In Karachi.")]))
        [TextExample(answer='In Karachi.', prompt='Where was she born?', ...)]
        >>> next(read_text([{"query": "Who?", "answer": "She."}])).prompt
        'Who?'
    """
    for index, row in enumerate(_rows(source, name)):
        yield as_example(row, columns=columns, name=f"{name}[{index}]")


def as_example(row: Any, *, columns: Mapping[str, str] | None = None, name: str = "row") -> TextExample:
    """Read one row: a string, a pair (prompt, answer), a mapping, or an example already.

    Raises:
        TypeError: It is none of these.
        ColumnsError: A mapping has none of the known columns; it is a `ValueError`.
        ValueError: A chat does not end with an answer, or a turn of it cannot be kept.

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
        raise TypeError(
            f"`{name}` must be a text, a pair (prompt, answer) or a mapping, got {type(row).__name__}. Write "
            '`{"question": ..., "answer": ...}`.'
        )
    given = {**row, **{ours: row[theirs] for ours, theirs in (columns or {}).items() if theirs in row}}
    if given.get("messages") is not None:
        return _chat(given["messages"], name)
    prompt = next((key for key in _PROMPTS if given.get(key) is not None), None)
    answer = next((key for key in _ANSWERS if given.get(key) is not None), None)
    if prompt is not None and answer is not None:
        return _question_and_answer(given, prompt, answer, name)
    if isinstance(given.get("text"), str):
        return TextExample(given["text"])
    raise ColumnsError(name, sorted(map(str, row)))


def _question_and_answer(row: Mapping[str, Any], prompt: str, answer: str, name: str) -> TextExample:
    question, right = _as_prompt(row[prompt], name), _as_answer(row[answer], answer, name)
    if row.get("input") and isinstance(question, str):
        question = f"{question}\n{row['input']}"
    wrong = _as_texts(row.get("perturbed_answer"))
    choices = _as_texts(next((row[key] for key in _CHOICES if row.get(key) is not None), None))
    if choices and isinstance(right, Integral):
        index = int(right)
        if not 0 <= index < len(choices):
            raise ValueError(f"`{name}`: `answer` must be an index of its {len(choices)} choices, got {index}.")
        right = choices[index]
    if not isinstance(right, str):
        raise TypeError(f"`{name}`: `{answer}` must be a text, got {type(right).__name__}. Write it as a string.")
    wrong += tuple(choice for choice in choices if choice != right)
    return TextExample(
        right, question, row.get("paraphrased_question"), _first(row.get("paraphrased_answer")), wrong
    )  # fmt: skip


def _chat(messages: Any, name: str) -> TextExample:
    turns = _as_prompt(messages, name)
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


def _as_prompt(prompt: Any, name: str) -> str | tuple[Message, ...]:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence) and prompt and all(isinstance(turn, Mapping) for turn in prompt):
        return tuple(_turn(turn, f"`{name}`: turn {index}") for index, turn in enumerate(prompt))
    raise TypeError(
        f"`{name}`: a prompt must be a text, or the turns of a chat with 'role' and 'content', got "
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
    said: str = turn["content"]
    return said


def _as_texts(value: Any) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def _first(value: Any) -> str | None:
    texts = _as_texts(value)
    return texts[0] if texts else None


def _rows(source: Any, name: str) -> Iterator[Any]:
    if isinstance(source, (str, Path)):
        return _rows_of_path(source, name)
    if isinstance(source, Mapping):
        splits = [key for key, value in source.items() if not isinstance(value, (str, int, float))]
        raise TypeError(
            f"`{name}` must be a list of rows, a data set or a path, got one {type(source).__name__} of "
            f"{list(source)[:5]}. " + (f"Choose a split: `[{splits[0]!r}]`." if splits else "Write `[row]`.")
        )
    if callable(getattr(source, "itertuples", None)):  # a pandas `DataFrame`, which goes through its columns' names
        rows = source.astype(object).where(source.notna(), None).itertuples(index=False, name=None)
        return (dict(zip(source.columns, row, strict=True)) for row in rows)
    if not isinstance(source, Iterable):
        raise TypeError(
            f"`{name}` must be a list of texts or of pairs (prompt, answer), a data set or a path, got "
            f"{type(source).__name__}. Write `[(prompt, answer)]`."
        )
    return iter(source)


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
            where = "" if beginning.startswith("[") else f", line {number}"
            raise ValueError(
                f"`{name}`: {path}{where} must be one array, or one object a line, but {error}. Rewrite it so."
            ) from error


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError('Parquet files need pyarrow: `pip install ".[examples]"` in a clone of semu-peft.') from error
    with ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()
