"""The pages name what is there: pictures with a text for those who do not see them, modules, rooms."""

from __future__ import annotations

import pkgutil
import re
import runpy
from pathlib import Path

import pytest
from pages import PAGES, ROOT, name, pictures

import semu_peft

ILLUSTRATED = [page for page in PAGES if pictures(page)]


def test_there_are_pictures() -> None:
    shown = {path.resolve() for page in ILLUSTRATED for _, path in pictures(page)}
    drawn = {path for path in (ROOT / "docs" / "pictures").iterdir() if path.suffix in (".png", ".svg")}
    assert shown == drawn


@pytest.mark.parametrize("page", ILLUSTRATED, ids=name)
def test_pictures_exist_are_small_and_have_a_text(page: Path) -> None:
    for text, path in pictures(page):
        assert path.is_file(), path
        assert path.stat().st_size < 150_000, path
        assert len(text) > 30, f"{path.name} is described as {text!r}: say what is to be seen"


def test_the_house_is_drawn_from_the_contract() -> None:
    drawing = runpy.run_path(str(ROOT / "docs" / "pictures.py"))["house"]
    drawn = (ROOT / "docs" / "pictures" / "house.svg").read_text(encoding="utf-8")
    assert drawn == drawing(ROOT / "setup.cfg", ROOT / "semu_peft"), "the rooms have changed: run `make pictures`"


def test_the_reference_names_every_module() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    modules = {module.name for module in pkgutil.walk_packages(semu_peft.__path__, "semu_peft.") if not module.ispkg}
    shown = set(re.findall(r"^::: (\S+)", page, re.M))
    inside = set(re.findall(r"^\| `(semu_peft\.[\w.]+)` \|", page, re.M))
    assert modules - shown - inside == set(), "show a public module with `:::`, and name the others in the last table"
    assert (shown | inside) - modules == set(), "these modules are gone"


def test_contributors_find_every_room() -> None:
    floors = runpy.run_path(str(ROOT / "docs" / "pictures.py"))["read_floors"](ROOT / "setup.cfg")
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    built = {room for floor in floors for room in floor if list((ROOT / "semu_peft").glob(f"{room}*"))}
    assert {room for room in built if not any(f"`{room}`" in row.split("|")[1] for row in rows)} == set()


def test_flags_on_the_examples_page_are_the_programs() -> None:
    for section in (ROOT / "examples" / "README.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        named = re.search(r"\]\((\S+\.py)\)", section.splitlines()[0])
        program = "" if named is None else (ROOT / "examples" / named[1]).read_text(encoding="utf-8")
        if '"--output-dir"' in program:  # it has flags of its own
            shown = set(re.findall(r"(?<![\w-])--[a-z-]+", section)) - {"--help"}
            assert {flag for flag in shown if f'"{flag}"' not in program} == set(), named
