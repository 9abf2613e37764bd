"""The notebooks run as they stand, hold no outputs, and end with a check; the documentation lists them."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from notebook_program import code_cells
from pages import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BY_NAME = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


@BY_NAME
def test_notebooks_are_stripped_and_end_with_a_check(notebook: Path) -> None:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4 and content["cells"][0]["cell_type"] == "markdown"
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, "clear all outputs before saving"
    *_, last = map(ast.parse, code_cells(notebook))  # and there is no magic: plain Python
    assert any(isinstance(statement, ast.Assert) for statement in last.body)


def test_the_documentation_lists_all_notebooks() -> None:
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert NOTEBOOKS and all(f"(../notebooks/{notebook.name})" in page for notebook in NOTEBOOKS)


@pytest.mark.slow
@BY_NAME
def test_notebooks_run(notebook: Path, tmp_path: Path) -> None:
    program = Path(__file__).with_name("notebook_program.py")
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, program, notebook], cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
