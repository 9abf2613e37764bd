"""What all verbs share: a configuration file, output for people or for machines, errors in one sentence, exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TextIO, get_args

import typer
from typer.core import TyperCommand

FAILED, STOPPED = 1, 130
_UNBOUNDED = 100_000  # columns
RUN = "Run and output"
"""Heading of the flags that all verbs have, and of those with a `--no-`, which would narrow the others' column."""
_UsageError: Any = typer.BadParameter.__mro__[1]  # click's, of which newer typers have a copy of their own
_OTHER_NAMES = {"holdout": "test", "utility": "retain"}  # arguments of the library that are called otherwise as flags
VERSION = 1
"""Of what `--json` writes; a key that goes away or changes its meaning raises it."""


@dataclass(frozen=True)
class Told:
    """What a verb has to say.

    Attributes:
        data: For machines.
        words: For people: lines, and what rich can print.
        code: The exit code.

    Examples:
        >>> Told({"steps": 3}, ["3 steps."]).code
        0
    """

    data: Mapping[str, Any]
    words: list[Any] = field(default_factory=list)
    code: int = 0


def verb(app: typer.Typer, name: str) -> Callable[[Callable[..., Told]], None]:
    """Enter a function in a program as a verb, with `--config`, `--json` and `--traceback`.

    Args:
        app: The program.
        name: The verb as a user writes it; its last word is the command in `app`.

    Examples:
        >>> import typer
        >>> from typer.testing import CliRunner
        >>> from semu_cli.verbs import Told, verb
        >>> def double(number: int) -> Told:
        ...     return Told({"twice": 2 * number})
        >>> app = typer.Typer()
        >>> verb(app, "double")(double)
        >>> print(CliRunner().invoke(app, ["4", "--json"]).stdout)
        {
          "command": "double",
          "version": 1,
          "status": "done",
          "twice": 8,
          "warnings": []
        }
    """

    def enter(function: Callable[..., Told]) -> None:
        own = inspect.signature(function, eval_str=True).parameters
        common = {
            "config": inspect.Parameter(
                "config",
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[
                    Path | None,
                    typer.Option(
                        "--config", metavar="FILE",
                        help="YAML, TOML or JSON file with the other flags by name; flags go before it.",
                        callback=_reader(own), is_eager=True, rich_help_panel=RUN,
                    ),
                ],
            ),
            "as_json": _switch("as_json", "--json", "Write the result as JSON to stdout, and words to stderr."),
            "traceback": _switch("traceback", "--traceback", "On an error, show where it happened."),
        }  # fmt: skip

        class Command(TyperCommand):  # what typer finds wrong with a line comes before `run`, and is for machines too
            def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
                as_json = "--json" in args
                try:
                    return super().parse_args(ctx, args)
                except _UsageError as error:
                    if as_json:
                        _write(name, "failed", {"error": {"kind": "usage", "message": error.format_message()}}, [])
                    raise

        def run(*, config: Path | None, as_json: bool, traceback: bool, **arguments: Any) -> None:
            _run(name, lambda: function(**arguments), as_json, traceback, _flags(own))

        parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own.values()]
        run.__signature__ = inspect.Signature([*parameters, *common.values()])  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in (*parameters, *common.values())}
        run.__doc__ = function.__doc__
        app.command(name.split()[-1], cls=Command)(run)

    return enter


def _switch(name: str, flag: str, words: str) -> inspect.Parameter:
    option = typer.Option(flag, help=words, rich_help_panel=RUN)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])


def _flags(own: Mapping[str, inspect.Parameter]) -> dict[str, str]:
    """How the parameters of a verb are written that are flags."""
    return flags_by_name(
        name
        for name, each in own.items()
        if not any(isinstance(part, typer.models.ArgumentInfo) for part in get_args(each.annotation))
    )


def flags_by_name(names: Iterable[str]) -> dict[str, str]:
    """How flags are written that are called so in Python, and those that the library calls otherwise.

    Examples:
        >>> from semu_cli.verbs import flags_by_name
        >>> flags_by_name(["max_steps", "test"])
        {'max_steps': '--max-steps', 'test': '--test', 'holdout': '--test'}
    """
    flags = {name: f"--{name.replace('_', '-')}" for name in names}
    return flags | {theirs: flags[ours] for theirs, ours in _OTHER_NAMES.items() if ours in flags}


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """What the library says against an argument here is a usage error: the flag is wrong, and nothing was begun.

    Raises:
        typer.BadParameter: With the library's words.

    Examples:
        >>> from semu_cli.verbs import usage
        >>> try:
        ...     with usage():
        ...         raise ValueError("`template` must be a text.")
        ... except typer.BadParameter as error:
        ...     print(error.message)
        `template` must be a text.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """The library's words with its arguments as flags.

    Examples:
        >>> from semu_cli.verbs import in_flags
        >>> in_flags("`max_steps` must be at least 1, and `forget[0]` a text.", {"max_steps": "--max-steps"})
        '`--max-steps` must be at least 1, and `forget[0]` a text.'
    """
    return re.sub(r"`(\w+)(?=(\[\d+\])?`)", lambda found: f"`{flags.get(found[1], found[1])}", message)


def in_flags_or_python(message: str, flags: Mapping[str, str], function: Callable[..., Any], place: str) -> str:
    """The same, and of an argument that there is no flag for, where it is one.

    Args:
        message: The library's words.
        flags: How flags are written, by name.
        function: The library's, whose other arguments are for Python alone.
        place: Where it is imported from.

    Examples:
        >>> from semu_cli.verbs import in_flags_or_python
        >>> def train(max_steps, learning_rate): ...
        >>> in_flags_or_python("Lower `learning_rate`.", {"max_steps": "--max-steps"}, train, "library.train")
        'Lower `learning_rate`. (from Python: `library.train`)'
    """
    further = inspect.signature(function).parameters.keys() - flags.keys()
    is_for_python = any(f"`{name}`" in message for name in further)
    return in_flags(message, flags) + (f" (from Python: `{place}`)" if is_for_python else "")


def _run(name: str, function: Callable[[], Told], as_json: bool, traceback: bool, flags: Mapping[str, str]) -> None:
    from rich.console import Console

    words = Console(stderr=True, highlight=False, soft_wrap=True, width=_width(sys.stderr))

    warned: list[str] = []

    def said(message: str) -> str:
        # What is not loaded yet has said nothing.
        training = getattr(sys.modules.get("semu_peft"), "unlearn", None) if name.startswith("unlearn ") else None
        if training is None:
            return in_flags(message, flags)
        return in_flags_or_python(message, flags, training, "semu_peft.unlearn")

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = " ".join(said(str(message)).split())
        if text not in warned:
            warned.append(text)
            words.print(f"[bold yellow]semu {name}: warning:[/] ", end="")
            words.print(text, markup=False)

    def failed(code: int, kind: str, message: str) -> typer.Exit:
        if as_json:
            _write(name, "failed", {"error": {"kind": kind, "message": message}}, warned)
        words.print(f"[bold red]semu {name}:[/] ", end="")
        words.print(message, markup=False)
        return typer.Exit(code)

    try:
        with contextlib.ExitStack() as around:
            around.enter_context(warnings.catch_warnings())
            warnings.showwarning = show
            for library in ("transformers", "diffusers", "peft"):  # what they are to drop some day is no affair here
                warnings.filterwarnings("ignore", category=FutureWarning, module=library)
            if as_json:
                around.enter_context(contextlib.redirect_stdout(sys.stderr))
            told = function()
    except typer.BadParameter as error:
        error.message = in_flags(error.message, flags)
        if as_json:
            _write(name, "failed", {"error": {"kind": "usage", "message": error.message}}, warned)
        raise
    except KeyboardInterrupt:
        raise failed(STOPPED, "stopped", "Stopped. No file is half-written.") from None
    except Exception as error:
        if traceback:
            raise
        message = said(f"{error or type(error).__name__}")
        raise failed(FAILED, type(error).__name__, f"{message}\n(--traceback shows where.)") from None
    if as_json:
        _write(name, "failed" if told.code else "done", told.data, warned)
    printed = words if as_json else Console(highlight=False, soft_wrap=True, width=_width(sys.stdout))
    for line in told.words:
        printed.print(line, markup=not isinstance(line, str))
    if told.code:
        raise typer.Exit(told.code)


def _width(stream: TextIO) -> int | None:
    """Of lines: a terminal's or what `COLUMNS` says; what is read by a program or a file is not wrapped."""
    return None if stream.isatty() or "COLUMNS" in os.environ else _UNBOUNDED


def _write(name: str, status: str, data: Mapping[str, Any], warned: list[str]) -> None:
    content = {"command": name, "version": VERSION, "status": status, **plain(data), "warnings": warned}
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(content, indent=2, ensure_ascii=not is_unicode, allow_nan=False))


def plain(value: Any) -> Any:
    """A value as JSON can have it: dataclasses as mappings, numbers that are not finite as null.

    Examples:
        >>> from semu_cli.verbs import plain
        >>> plain({"loss": float("nan"), "where": Path("a")})
        {'loss': None, 'where': 'a'}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each) for each in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _reader(own: Mapping[str, inspect.Parameter]) -> Callable[[typer.Context, Path | None], Path | None]:
    """Of a verb with these parameters, what reads its configuration file."""
    repeated = {name for name, each in own.items() if "list[" in str(each.annotation)}

    def read(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None:
            settings = read_settings(path, set(own))
            for name, value in settings.items():
                if name in repeated:  # one value is a list of one; a text would be taken letter by letter
                    settings[name] = value if isinstance(value, list) else [value]
                elif isinstance(value, list):
                    flag = f"--{name.replace('_', '-')}"
                    raise typer.BadParameter(f"`{flag}` in {path} takes one value, got {value}. Give one.")
            context.default_map = {**(context.default_map or {}), **settings}
        return path

    return read


def read_settings(path: Path, names: set[str]) -> dict[str, Any]:
    """Read flags from a YAML, TOML or JSON file; they are written with `-` or `_`, without the leading dashes.

    That it is `--config` that a mistake is in, says typer.

    Args:
        path: The file.
        names: The flags there are, with `_`.

    Raises:
        typer.BadParameter: It cannot be read, or has another flag or a nested value.

    Examples:
        >>> import tempfile
        >>> from semu_cli.verbs import read_settings
        >>> path = Path(tempfile.mkdtemp(), "semu.toml")
        >>> _ = path.write_text('model = "gpt2"\\nmax-steps = 3')
        >>> read_settings(path, {"model", "max_steps"})
        {'model': 'gpt2', 'max_steps': 3}
    """
    readers: dict[str, Callable[[str], Any]] = {
        ".json": json.loads, ".toml": tomllib.loads, ".yaml": _yaml, ".yml": _yaml
    }  # fmt: skip
    if path.suffix not in readers:
        raise typer.BadParameter(f"must be a .yaml, .toml or .json file, got {path.name!r}. Rename it.")
    try:
        content = readers[path.suffix](path.read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read ({error.strerror}). Check the path.") from None
    except ValueError as error:
        raise typer.BadParameter(f"{path} is damaged: {error}. Correct it.") from None
    if not isinstance(content, dict):
        raise typer.BadParameter(f"{path} must hold flags by name, got {type(content).__name__}.")
    found = {str(key).replace("-", "_"): value for key, value in content.items()}
    for name, value in found.items():
        flag = f"--{name.replace('_', '-')}"
        if name not in names:
            known = ", ".join(sorted(each.replace("_", "-") for each in names))
            raise typer.BadParameter(f"{path} has {name!r}, which is no flag here. There are: {known}.")
        parts = value if isinstance(value, list) else [value]
        if any(not isinstance(part, (str, int, float, bool)) for part in parts):
            raise typer.BadParameter(
                f"`{flag}` in {path} must be a value or a list of values, got {value!r}. Leave it out for its default."
            )
    return found


def _yaml(text: str) -> Any:
    import yaml  # comes with huggingface_hub

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
