"""A benchmark that goes on where it was interrupted does so for the same question alone."""

from __future__ import annotations

import importlib.util
import json
import operator
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from semu_peft.evaluation import relearning

PATH = Path(__file__).parents[2] / "benchmarks" / "deep_forgetting.py"


@pytest.fixture(scope="module")
def benchmark() -> Any:

    spec = importlib.util.spec_from_file_location("deep_forgetting_of_digits", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_rows_of_other_classes_or_seeds_are_not_averaged_in(benchmark: Any, tmp_path: Path) -> None:
    path, asked = tmp_path / "rows.partial", {"classes": [3], "seeds": [0], "models": None}
    begun = benchmark.resumed(path, asked)
    begun["rows"]["a way"] = {"class 3, seed 0": {"seconds": 1.0}}
    benchmark.write(path, begun)
    assert benchmark.resumed(path, asked)["rows"] == begun["rows"]
    with pytest.raises(SystemExit, match=r"was made with .*\[0\].* got .*\[0, 1\].* Give another `--output`"):
        benchmark.resumed(path, {**asked, "seeds": [0, 1]})
    path.write_text(json.dumps(begun["rows"]))  # as it was written before settings stood in it
    with pytest.raises(SystemExit, match="other settings"):
        benchmark.resumed(path, asked)


def test_a_way_can_be_asked_for_by_its_whole_name_though_others_begin_with_it(benchmark: Any) -> None:
    name = "several, retain KL × 10, margin 3"
    assert [way for way in benchmark.WAYS if benchmark.asks_for(name, way)] == [name]
    assert len([way for way in benchmark.WAYS if benchmark.asks_for("several, retain KL × 10", way)]) > 3


def _row(accuracy: float, steps: list[int | None]) -> dict[str, Any]:
    attacks = {
        f"attacker {number}": {"steps to half": step, "of steps": 50, "retained at the end": 90.0}
        for number, step in enumerate(steps)
    }
    names = ("unlearning_accuracy", "retain_accuracy", "test_accuracy", "membership_inference")
    metrics = dict.fromkeys(names, 100.0) | {"test_accuracy": accuracy}
    numbers = {"trained": 1, "seconds": 1.0, "unlearning accuracy": 100.0, "test accuracy": accuracy}
    return {"metrics": metrics, "attacks": attacks, **numbers}


def test_the_goal_is_a_small_gap_and_half_of_golds_steps_with_every_attacker(benchmark: Any) -> None:
    rows = {
        benchmark.GOLD: {"class 3": _row(90.0, [20, None])},
        "deep": {"class 3": _row(88.0, [10, 25])},  # a gap of 2 / 4, and half of the steps, where gold never came back
        "shallow": {"class 3": _row(90.0, [20, 24])},
        "dear": {"class 3": _row(87.0, [50, None])},
    }
    assert {way: line.split("|")[8].strip() for way, line in zip(rows, benchmark.table(rows)[2:], strict=True)} == {
        benchmark.GOLD: "1 of 1", "deep": "1 of 1", "shallow": "0 of 1", "dear": "0 of 1",
    }  # fmt: skip
    assert [line.split("|")[-2].strip() for line in benchmark.verdicts(rows)[2:]] == ["met", "met", "missed", "missed"]


def test_a_row_that_fails_or_comes_too_late_costs_no_other_row(benchmark: Any) -> None:
    made = list(benchmark.side_by_side(_half, [4, "odd", 6], workers=1))
    assert [each.row for each in made] == [2, None, 3]
    assert made[1].error.rstrip().endswith("TypeError: unsupported operand type(s) for //: 'str' and 'int'")
    assert list(benchmark.side_by_side(_half, [4], workers=1, seconds=0.0)) == []


def test_processes_make_every_row_once(benchmark: Any) -> None:
    made = list(benchmark.side_by_side(operator.neg, [1, 2, 3], workers=2))
    assert sorted((each.task, each.row) for each in made) == [(1, -1), (2, -2), (3, -3)]


def test_only_rows_of_a_kind_that_takes_too_long_are_left_out(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setitem(benchmark.side_by_side.__globals__, "time", clock)

    def make(seconds: float) -> float:
        now[0] += seconds
        return now[0]

    made = benchmark.side_by_side(make, [1.0, 30.0, 30.0, 1.0], workers=1, seconds=60.0, kind=lambda task: task)
    assert [each.row for each in made] == [1.0, 31.0, 32.0]


@pytest.mark.parametrize("way", ["original", "gold"])
def test_a_curve_that_looks_at_the_rest_where_it_must_is_the_curve(benchmark: Any, way: str) -> None:
    subject = benchmark.subject_of(benchmark.Asked(3, 0, is_smoke=True))
    model, attacker = getattr(subject, way), subject.attackers[0]
    forget, retain = ([subject.halves(side)[1]] for side in (subject.forget, subject.retain))
    tests = {"forget_test": [subject.forget_test], "retain_test": [subject.retain_test]}
    seed, steps = benchmark.ATTACK_SEED, range(6)
    expected = relearning(model, forget, retain, attacker=attacker, seed=seed, steps=steps, progress=False, **tests)
    curve = benchmark.attacked(subject, model, attacker)
    assert (curve.steps, curve.forget) == (expected.steps, expected.forget)
    assert (curve.steps_to_half, curve.retain[-1]) == (expected.steps_to_half, expected.retain[-1])


@pytest.mark.parametrize("workers", [1, 2])
def test_what_comes_next_may_depend_on_what_is_being_made(benchmark: Any, workers: int) -> None:
    """None is to wait: 3 and 4 are begun when 2 is made, and the rows end when nothing more can come."""
    made: dict[int, int] = {}

    def in_turn() -> Iterator[int | None]:
        yield 2
        while 2 not in made:
            yield None
        yield from (3, 4)
        while True:
            yield None

    for task, row, _, _ in benchmark.side_by_side(operator.neg, in_turn(), workers):
        made[task] = row
    assert made == {2: -2, 3: -3, 4: -4}


def test_the_zoo_makes_what_its_file_lacks_and_no_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings with the smallest gap on the case to choose on are reported on the others; what fails is left out."""
    for folder in (PATH.parent, PATH.parent / "zoo", PATH.parent / "tofu"):
        monkeypatch.syspath_prepend(str(folder))
    schedule, rows = importlib.import_module("schedule"), importlib.import_module("rows")
    gold, nothing, runs = schedule.GOLD, schedule.NOTHING, []

    def make(run: Any) -> dict[str, Any]:
        runs.append((run.row, run.case, run.settings))
        if run.row is None:
            return {gold: {"gap": 0.0, "of": run.case}, nothing: {"gap": 9.0}}
        assert run.gold["of"] == run.case and run.full == (run.case != "first")
        if run.row == "broken":
            raise RuntimeError("no memory")
        return {"gap": abs(run.settings["rate"] - 2) + 1}

    def row(name: str, *rates: int) -> Any:
        return rows.Row(name, None, [{"rate": rate} for rate in rates])

    plan = schedule.Plan([row("broken", 1), row("tuned", 1, 2, 3)], "first", {"first": 0, "a": 1, "b": 2})
    document: dict[str, Any] = {"rows": {}}
    written = []
    schedule.complete(document, plan, make, done=lambda: written.append(json.dumps(document)))
    assert document["rows"]["tuned"]["settings"] == {"rate": 2}
    assert set(schedule.whole(document, plan)) == {gold, nothing, "tuned"}
    assert len(runs) == len({str(run) for run in runs}) == 3 + 2 + 3 + 2 and len(written) == len(runs) - 2
    for text in written:  # interrupted anywhere, and gone on with, it ends with the same
        runs.clear()
        again = json.loads(text)
        before = len(written) - written.index(text) - 1
        schedule.complete(again, plan, make, done=lambda: None)
        assert again == document and len(runs) == before + 2


def _half(number: int) -> int:
    return number // 2
