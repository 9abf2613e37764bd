"""The program `semu`: its verbs, put together."""

from __future__ import annotations

import io
import logging
import os
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .adapters import compare, export, inspect, merge
from .audit import audit
from .catalogue import methods
from .judge import attack, evaluate
from .unlearn import concept, images, text
from .verbs import verb


class _UnlearnFirst(TyperGroup):
    """Lists what one begins with first; typer would put it last, as it has verbs of its own."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: name != "unlearn")


app = typer.Typer(
    name="semu",
    cls=_UnlearnFirst,
    help="Make a trained model forget, as a small adapter: a class of images, texts and facts, or a concept.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"semu {version('semu-peft')}")
        raise typer.Exit()


@app.callback()
def _before(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


forgetting = typer.Typer(help="Train an adapter that makes a model forget.", no_args_is_help=True)
app.add_typer(forgetting, name="unlearn")

verb(forgetting, "unlearn images")(images)
verb(forgetting, "unlearn text")(text)
verb(forgetting, "unlearn concept")(concept)
for _command in (evaluate, attack, audit, merge, export, inspect, compare, methods):
    verb(app, _command.__name__)(_command)


def main() -> None:
    """Run `semu` with the arguments of the process.

    Examples:
        >>> import sys
        >>> from semu_cli import main
        >>> sys.argv = ["semu", "methods", "--json"]  # what a shell gives
        >>> try:
        ...     main()
        ... except SystemExit as ended:
        ...     print("exit code", ended.code)
        {
        ...
        }
        exit code 0
    """
    for stream in (sys.stdout, sys.stderr):  # of an old code page: a sign that it lacks is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which kernels it misses; nothing here waits for them
    app()
