"""The cells of TOFU's benchmark: a row's name tells its settings, so that no two runs write the same row."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

CELLS = Path(__file__).parents[2] / "benchmarks" / "tofu" / "cells.py"


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("tofu_cells", CELLS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tofu_cells", module)
    spec.loader.exec_module(module)
    return module


def test_no_two_cells_write_the_same_row(cells: ModuleType) -> None:
    declared = cells.goals()
    assert len(declared) == len(set(declared)) == len({(cell.name, cell.last) for cell in declared})


def test_a_name_tells_what_differs_from_the_default(cells: ModuleType) -> None:
    plain = cells.Cell("WGA", cells.ALL)
    assert plain.name == "WGA | all weights | answers | seed 0"
    assert plain.last == "end"
    dialled = replace(plain, hold="KL", weight=0.5, kl=(0.5, 0.1), repair=40, seed=2)
    said = "answers, held by KL, weight 0.5, steps of 0.5 then 0.1, repair of 40"
    assert dialled.name == f"WGA | all weights | {said} | seed 2"
    assert dialled.last == "repaired"
