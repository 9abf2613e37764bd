"""Files of texts, questions and answers, and how they are written out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from .verbs import usage


def check_texts(columns: str | None, **paths: str | None) -> None:
    """Raise a usage error unless the files, by flag, are there and `--columns` can be read; nothing is loaded."""
    columns_of(columns)
    for flag, path in paths.items():
        if path is not None and not Path(path).exists():
            raise typer.BadParameter(f"`--{flag}`: there is no file {path}. Give one with texts or questions.")


def read_texts(path: str, flag: str, columns: str | None = None) -> list[Any]:
    """The rows of a file, as `TextExample`s.

    Args:
        path: The file, or a folder of such.
        flag: The flag, for errors.
        columns: As `--columns` has them.

    Raises:
        typer.BadParameter: There is no such file, it is empty, no text, broken or of another kind, or a row of it
            cannot be read, as where its columns have other names.

    Examples:
        >>> import tempfile
        >>> from semu_cli.text_file import read_texts
        >>> path = Path(tempfile.mkdtemp(), "facts.jsonl")
        >>> _ = path.write_text('{"q": "What colour?", "a": "blue"}')
        >>> read_texts(str(path), "forget", "question=q,answer=a")[0].answer
        'blue'
    """
    check_texts(columns, **{flag: path})
    from semu_peft.language import ColumnsError, read_text

    try:
        rows = list(read_text(path, columns=columns_of(columns), name=flag))
    except ColumnsError as error:
        raise typer.BadParameter(
            f"`--{flag}`: rows of {path} have the columns {', '.join(error.columns)}, and not question and answer, "
            "prompt and response, messages, or text. Say which they are: `--columns question=NAME,answer=NAME`."
        ) from None
    except (TypeError, ValueError) as error:  # nothing was begun, whatever is wrong with it
        if not isinstance(error.__cause__, UnicodeDecodeError):
            raise typer.BadParameter(str(error)) from None
        why = f"{path} is no text in UTF-8 ({error.__cause__})"
        raise typer.BadParameter(f"`--{flag}`: {why}. Give a text file.") from None
    if not rows:
        raise typer.BadParameter(f"`--{flag}`: {path} is empty. Give a file with at least one text or question.")
    return rows


def read_apart(files: Mapping[str, str | None], columns: str | None) -> dict[str, Any]:
    """The rows of each file, None where none is given; nothing may be both forgotten and kept.

    Raises:
        typer.BadParameter: As `read_texts`, or a row is in both.
    """
    data: dict[str, Any] = {}
    for flag, path in files.items():
        data[flag] = None if path is None else read_texts(path, flag, columns)
    from semu_peft.language.shapes import check_apart

    with usage():
        for flag in [flag for flag in files if flag != "forget"]:
            check_apart(data["forget"], data[flag] or (), flag)
    return data


def check_plain(path: str | None, rows: list[Any] | None) -> None:
    """Raise a usage error unless what is given as `--neutral` is texts, which answer no question."""
    if rows is not None and not all(row.is_plain for row in rows):
        raise typer.BadParameter(
            f"`--neutral` must be texts, got {path} with answers to questions. Give a .txt file, or a .jsonl file with "
            "text in each line; what was to be kept of answers is --retain."
        )


def columns_of(columns: str | None) -> dict[str, str]:
    """The data's names for columns, by ours.

    Raises:
        typer.BadParameter: It is no list of pairs.

    Examples:
        >>> from semu_cli.text_file import columns_of
        >>> columns_of("question=prompt, answer=reply")
        {'question': 'prompt', 'answer': 'reply'}
    """
    pairs = [part.partition("=") for part in (columns or "").split(",") if part.strip()]
    named = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    if len(named) < len(pairs) or not all(ours and theirs for ours, theirs in named.items()):
        raise typer.BadParameter(f"`--columns` must be like question=prompt,answer=reply, got {columns!r}.")
    return named


def written_out(template: str | None) -> str | None:
    """A template with the line breaks that a shell passes on as two signs.

    Raises:
        typer.BadParameter: It has no place for a question, or none for the answer after it.
    """
    if template is None:
        return None
    from semu_peft.language.encode import check_template

    written = template.replace("\\n", "\n")
    with usage():
        check_template(written)
    return written
