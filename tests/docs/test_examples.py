"""Every public name shows in its docstring how it is used; pytest runs these examples where they stand."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
from pages import ROOT

import semu_peft

MODULES = sorted((ROOT / "semu_peft").rglob("*.py"))
ROOMS = [room.name for room in pkgutil.iter_modules(semu_peft.__path__, "semu_peft.") if room.ispkg]


def public_names() -> dict[str, object]:
    """Return each class and function that the package or a room offers in `__all__`, once, by where it is written."""
    rooms = [semu_peft, *map(importlib.import_module, ROOMS)]
    offered = [getattr(room, name) for room in rooms for name in getattr(room, "__all__", ())]
    return {
        f"{thing.__module__}.{thing.__qualname__}": thing
        for thing in offered
        if inspect.isclass(thing) or inspect.isfunction(thing)
    }


@pytest.mark.parametrize("name", sorted(public_names()))
def test_a_public_name_has_an_example(name: str) -> None:
    document = public_names()[name].__doc__
    assert document and ">>> " in document, f"{name} has no example: show its use in about six lines of `>>>`"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_stand_in_a_section_of_their_own(path: Path) -> None:
    """Elsewhere `>>>` is a quotation in Markdown, and the page of the name is a heap of it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.Module)):
            before, shown, _ = (ast.get_docstring(node) or "").partition(">>> ")
            assert not shown or "Examples:\n" in before, getattr(node, "name", path.stem)
