"""Every block of Python in the pages runs as printed, a page's blocks in order and in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import PAGES, ROOT, blocks, name

WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
WITH_SHELL = [page for page in PAGES if blocks(page, "sh", "bash")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        # The lines before keep their number, so that a traceback points into the page.
        source = "\n" * (block.line - 1) + block.code
        exec(compile(source, str(page), "exec", dont_inherit=True), namespace)


@pytest.mark.parametrize("page", WITH_SHELL, ids=name)
def test_commands_name_targets_and_files_that_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    code = "\n".join(block.code for block in blocks(page, "sh", "bash"))
    called = set(re.findall(r"^make ([a-z-]+)", code, re.M))
    assert called <= targets
    programs = set(re.findall(r"python (\S+\.py)", code)) | set(re.findall(r"^(\.\w+/\S+)", code, re.M))
    assert not [program for program in programs if not (ROOT / program).is_file()]
    assert called or programs or "pip install" in code, "a block of commands that this test does not understand"
