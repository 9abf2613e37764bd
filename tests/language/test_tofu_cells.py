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
from typing import Any

import pytest
import torch

from semu_peft.training.callbacks import TrainingContext
from semu_peft.training.progress import Progress

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


def test_a_published_run_is_of_whole_epochs_and_takes_what_its_paper_has(
    cells: ModuleType, benchmark: ModuleType
) -> None:
    declared = cells.papers()
    assert len(declared) == len({cell.name for cell in declared})
    ours = {"NPO 0.03", "unseen answers", "uniform"}
    assert {cell.objective for cell in declared} == set(benchmark.OBJECTIVES) - ours
    assert all(cell.steps % cells.EPOCH == 0 and "as published" in cell.name for cell in declared)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = benchmark._up_and_down(optimizer, 2 * cells.EPOCH)
    rates = []
    for _ in range(2 * cells.EPOCH):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[cells.EPOCH - 1] == max(rates) == 1 and rates[-1] == pytest.approx(1 / cells.EPOCH)


def test_at_equal_damage_all_are_held_alike_but_what_brings_its_own_hold(
    cells: ModuleType, benchmark: ModuleType
) -> None:
    declared = cells.equal()
    assert len(declared) == len({(cell.name, cell.last) for cell in declared})
    every = itertools.product(benchmark.OBJECTIVES, benchmark.CARRIERS, ("both", "own and neutral"))
    wanted = {each for each in every if each[1] != cells.ADAMW_99}
    assert {(cell.objective, cell.carrier, cell.retain) for cell in declared} == wanted
    assert {cell.last for cell in declared} == {"KL 0.05"}
    own = {cell.objective for cell in declared if cell.hold is None}
    assert own == {"Adaptive RMU", "PDU"}
    assert {cell.weight for cell in declared if cell.objective not in own} == {1.0}


def test_a_run_is_followed_to_where_its_damage_meets_the_budgets(benchmark: ModuleType) -> None:
    """Damage is the square of the one weight: 0.01 is met at 0.1, 0.05 at 0.2236, in steps of 0.04."""
    model = torch.nn.Linear(1, 1, bias=False)
    watch = benchmark.WatchToBudgets(lambda now: now.weight.item() ** 2, lambda now: now.weight.item(), unseen=9.0)
    context = TrainingContext(model, Progress(0), total_steps=20)
    with torch.no_grad():
        model.weight.zero_()
        watch.on_train_begin(context)
        for step in range(1, 21):
            model.weight += 0.04
            context.progress.step = step
            watch.on_step_end(context)
            if context.control.should_stop:
                break
    assert context.control.should_stop and step == 6
    assert model.weight.item() == pytest.approx(0.24)  # training goes on from where it was
    assert list(watch.looks) == [0, 3, 6]
    for moment, met in (("KL 0.01", 0.1), ("KL 0.05", 0.05**0.5)):
        value = watch.moments[moment]["weight"].item()
        assert met - 0.12 / 16 <= value <= met
        assert watch.steps[moment] == pytest.approx(value / 0.04, abs=1e-3)
    watch.look(model, 7)  # it is over
    assert 7 not in watch.looks


def test_a_run_is_not_followed_past_unseen_answers(benchmark: ModuleType) -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    watch = benchmark.WatchToBudgets(lambda now: 0.0, lambda now: now.weight.item(), unseen=0.5)
    with torch.no_grad():
        for step, value in enumerate((0.0, 0.4, 0.8)):
            model.weight.fill_(value)
            watch.look(model, step)
    assert {moment: values["weight"].item() for moment, values in watch.moments.items()} == pytest.approx(
        {"KL 0.01": 0.5, "KL 0.05": 0.5}
    )
    assert watch.steps == {"KL 0.01": 1.25, "KL 0.05": 1.25}


def test_moments_are_kept_of_what_is_trained_then(benchmark: ModuleType) -> None:
    """A run takes cores of rank 0 out of what is trained while it lasts, and gives them back."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
    watch = benchmark.WatchToBudgets(lambda now: now[0].weight.item() ** 2, lambda now: 0.0, unseen=9.0)
    model[1].requires_grad_(False)
    with torch.no_grad():
        model[0].weight.zero_()
        watch.look(model, 0)
        model[0].weight.fill_(0.2)
        watch.look(model, 1)
        model[1].requires_grad_(True)
        model[0].weight.fill_(0.4)
        watch.look(model, 2)
    done = benchmark.Unlearned(model, watch.moments, watch.steps, 1, 0.0)
    assert 0.08 < done.go_to("KL 0.01")[0].weight.item() < 0.1
    assert 0.2 < done.go_to("KL 0.05")[0].weight.item() < 0.05**0.5


def test_a_table_of_attacks_tells_how_much_more_than_of_gold_comes_back(benchmark: ModuleType) -> None:
    lines = importlib.import_module("attacks").lines
    rows = {"doing nothing": {"plain": 0.99, "probability": 0.95}, "gold": {"plain": 0.25, "probability": 0.01}}
    assert lines({"about": {}, **rows, "LoRA, rank 8": {"plain": 0.3}}) == [
        "| | gold | doing nothing | LoRA, rank 8 |",
        "| --- | --- | --- | --- |",
        "| plain | 0.250 | 0.990 | 0.300 |",
        "| probability | 0.010 | 0.950, 95× | – |",
    ]


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


def test_runs_that_were_followed_to_their_budgets_have_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(CELLS.parent)
    equal_damage = importlib.import_module("equal_damage")
    table: dict[str, Any] = {"doing nothing": {"model_utility": 0.8}}
    for objective, probability in (("NPO", 0.5), ("WGA", 0.25)):
        run = f"{objective} | all weights | both, at most 9, at equal damage | seed 0"
        row = {"neutral_kl": 0.01, "probability": probability, "model_utility": 0.4, "forget_quality": 1e-3}
        table |= {f"{run} | KL 0.01": row, f"{run} | KL 0.05": {**row, "relearnt_over_gold": 2.0, "steps": 1.25}}
        table[f"{run} | path"] = {"path": [{"neutral_kl": 0.01, "answer_nll": 1.0}]}
    same = "0.010 | {0} | 0.500 | 0.001 | 0.010 | {0} | 0.500 | 0.001 | 2.0 | 1.25 |"
    assert equal_damage.followed([table])[2:] == [
        f"| WGA, all weights, both, seed 0 | {same.format('0.250')}",
        f"| NPO, all weights, both, seed 0 | {same.format('0.500')}",
    ]
    assert equal_damage.side_by_side([table]) == [
        "| held: both, seed 0 | all weights |",
        "| --- | --- |",
        "| NPO | 0.50; 0.50, 0.50, 2 |",
        "| WGA | 0.25; 0.25, 0.50, 2 |",
    ]
    assert equal_damage.lines([table])[2:] == []  # they are in the others


def test_a_table_shows_the_aucs_of_membership(benchmark: ModuleType) -> None:
    """Each under its own head; a row that was made without them shows none."""
    lines = importlib.import_module("run").lines
    table = {"gold": {"membership": {"loss": 0.7306, "zlib": 0.5633, "min_k": 0.7019}}, "WGA | end": {"steps": 3}}
    heads, _, gold, other = ([cell.strip() for cell in line.split("|")] for line in lines(table))
    assert (gold[heads.index("Min-K% AUC")], gold[heads.index("loss AUC")]) == ("0.702", "0.731")
    assert (other[heads.index("Min-K% AUC")], other[heads.index("steps")]) == ("–", "3")
