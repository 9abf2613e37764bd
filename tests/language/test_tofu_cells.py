"""The cells of TOFU's benchmark: a row's name tells its settings, so that no two runs write the same row."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
from collections.abc import Iterator
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


@pytest.mark.parametrize("name", ["ahead", "closer", "goals", "longer"])
def test_no_two_cells_write_the_same_row(cells: ModuleType, name: str) -> None:
    declared = getattr(cells, name)()
    assert len(declared) == len(set(declared)) == len({(cell.name, cell.last) for cell in declared})


def test_a_name_tells_what_differs_from_the_default(cells: ModuleType) -> None:
    plain = cells.Cell("WGA", cells.ALL)
    assert plain.name == "WGA | all weights | answers | seed 0"
    assert plain.last == "end"
    dialled = replace(plain, hold="KL", weight=0.5, kl=(0.5, 0.1), repair=40, seed=2)
    said = "answers, held by KL, weight 0.5, steps of 0.5 then 0.1, repair of 40"
    assert dialled.name == f"WGA | all weights | {said} | seed 2"
    assert dialled.last == "repaired"


def test_a_name_tells_how_it_was_held_and_what_was_left_out(cells: ModuleType) -> None:
    cell = cells.Cell("WGA", cells.NATURAL_99, "own", kept_at_once=9, attackers=2, skip=8, without_shared=True)
    assert cell.name == f"WGA | {cells.NATURAL_99} | own, 9 at once, 2 attackers, first 8 skipped, CIR | seed 0"


def test_cells_that_forget_alike_are_run_together(cells: ModuleType) -> None:
    plain = cells.Cell("WGA", cells.ALL)
    repairs = [replace(plain, repair=60), replace(plain, repair=60, repair_rate=1e-3, repair_hold="KL")]
    other = replace(plain, seed=1)
    assert {each.forgetting for each in [plain, *repairs]} == {plain}
    assert cells.together([plain, *repairs, other]) == [[plain, *repairs], [other]]
    assert cells.together([plain, *repairs, other], most=2) == [[plain, repairs[0]], [repairs[1]], [other]]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark's modules, whose short names others of this run may have too."""
    before = set(sys.modules)
    for folder in (CELLS.parents[1], CELLS.parent):
        monkeypatch.syspath_prepend(folder)
    for path in CELLS.parent.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    yield importlib.import_module("methods")
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(CELLS.parents[1])):
            del sys.modules[name]


def test_the_grid_is_every_objective_in_every_carrier(cells: ModuleType, benchmark: ModuleType) -> None:
    declared = [(cell.objective, cell.carrier, cell.retain) for cell in cells.grid()]
    assert len(declared) == len(set(declared))
    assert set(declared) == set(itertools.product(benchmark.OBJECTIVES, benchmark.CARRIERS, benchmark.RETAIN))


def test_equal_damage_counts_looks_within_the_budget_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(CELLS.parent)
    equal_damage = importlib.import_module("equal_damage")
    looks = [(0.004, 1.0), (0.009, 2.0), (0.03, 3.0), (0.008, 1.5), (0.2, 9.0)]
    path = [{"neutral_kl": kl, "answer_nll": nll} for kl, nll in looks]
    ran = {"WGA | SEMU | both, at most 9 | seed 1 | path": {"path": path}, "WGA | SEMU | seed 1 | end": {"steps": 9}}
    repaired = {"WGA | SEMU | both, at most 9, repair of 40 | seed 1 | path": {"path": path}}
    at_once = {"NPO | all weights | answers | seed 0 | path": {"path": [{"neutral_kl": 0.06, "answer_nll": 4.0}]}}
    assert equal_damage.lines([ran, repaired, at_once])[2:] == [
        "| WGA, SEMU, both, at most 9, seed 1 | 2.00 | 3.00 |",
        "| NPO, all weights, answers, seed 0 | – | – |",
    ]
    assert equal_damage.least_likely(path, 0.01) == 2.0
    assert equal_damage.least_likely(path, 1e-3) is None


def test_a_table_shows_the_aucs_of_membership(benchmark: ModuleType) -> None:
    """Each under its own head; a row that was made without them shows none."""
    lines = importlib.import_module("run").lines
    table = {"gold": {"membership": {"loss": 0.7306, "zlib": 0.5633, "min_k": 0.7019}}, "WGA | end": {"steps": 3}}
    heads, _, gold, other = ([cell.strip() for cell in line.split("|")] for line in lines(table))
    assert (gold[heads.index("Min-K% AUC")], gold[heads.index("loss AUC")]) == ("0.702", "0.731")
    assert (other[heads.index("Min-K% AUC")], other[heads.index("steps")]) == ("–", "3")
