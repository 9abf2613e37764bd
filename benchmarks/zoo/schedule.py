"""Which runs a table still needs, the best first: each when what it is held against is there, side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from results import mean
from rows import Row, Settings
from side_by_side import side_by_side

GOLD, NOTHING = "retrained (gold)", "original (do nothing)"
CHOSEN_WITH = "gold on the case to choose on"


@dataclass(frozen=True)
class Plan:
    """What a table is to hold.

    Attributes:
        rows: The methods, those first whose rows are wanted most.
        tuning: The name of the case that settings are chosen on.
        keys: What a process makes each case of, by its name; `tuning` is one of them, and the others are reported.
    """

    rows: list[Row]
    tuning: str
    keys: Mapping[str, Any]

    @property
    def reported(self) -> list[str]:
        return [name for name in self.keys if name != self.tuning]


@dataclass(frozen=True)
class Run:
    """One of them, as plain as it has to be for another process.

    Attributes:
        row: The method's title; None for both references.
        case: The name of its case.
        key: What the case is made of.
        settings: The method's.
        gold: What the retrained model was measured at on this case.
        full: Whether it is reported, or only to choose by.
    """

    row: str | None
    case: str
    key: Any
    settings: Settings | None = None
    gold: Mapping[str, Any] | None = None
    full: bool = False

    @property
    def name(self) -> tuple[Any, ...]:
        return self.row, self.case, str(self.settings)


def complete(
    document: dict[str, Any],
    plan: Plan,
    make: Callable[[Run], dict[str, Any]],
    *,
    done: Callable[[], None],
    workers: int = 1,
    seconds: float | None = None,
) -> None:
    """Make the runs that are not in the document yet; those that fail are told of, and left out.

    Args:
        document: The file's; `rows` are filled in.
        plan: What is wanted.
        make: A function of a module: what was measured in a run; of references by name.
        done: Called after each run, to write the file.
        workers: How many processes; with 1 it is this one.
        seconds: Begin nothing that would not be done within so many seconds.
    """
    for run, found, error, lasted in side_by_side(make, _in_turn(document, plan), workers, seconds):
        if error:
            print(f"{run.row}, {run.case}: failed\n{error}", file=sys.stderr, flush=True)
            continue
        _record(document, plan, run, found)
        print(f"{run.row or 'references'}, {run.case}, {run.settings}: {lasted:.0f} s", file=sys.stderr, flush=True)
        done()


def whole(document: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The rows that have all of the reported cases."""
    return {name: row for name, row in document["rows"].items() if {*plan.reported} <= {*row["cases"]}}


def told(document: dict[str, Any], plan: Plan) -> None:
    """Say which rows are not whole, and how those that are came out."""
    found = whole(document, plan)
    for row in plan.rows:
        entry = found.get(row.name)
        last = "not whole" if entry is None else f"{entry['settings']}, gap {mean(entry['cases'], 'gap')}"
        print(f"{row.name}: {last}", file=sys.stderr, flush=True)


def _in_turn(document: dict[str, Any], plan: Plan) -> Iterator[Run | None]:
    """The first run that can be made and was not begun; None while there is none."""
    begun: set[tuple[Any, ...]] = set()
    while True:
        run = next((run for run in _possible(document, plan) if run.name not in begun), None)
        if run is not None:
            begun.add(run.name)
        yield run


def _possible(document: dict[str, Any], plan: Plan) -> Iterator[Run]:
    """Those that the document lacks and whose settings and gold it has."""
    rows = document["rows"]
    golds = {**document.setdefault(CHOSEN_WITH, {}), **rows.get(GOLD, {"cases": {}})["cases"]}
    for case, key in plan.keys.items():
        if case not in golds:
            yield Run(None, case, key)
    for row in plan.rows:
        entry = rows.get(row.name, {"cases": {}})
        settings = _settings(row, entry)
        if settings is None and plan.tuning in golds:
            tried = [each["settings"] for each in entry.get("tried", [])]
            for each in row.grid:
                if each not in tried:
                    yield Run(row.name, plan.tuning, plan.keys[plan.tuning], each, golds[plan.tuning])
        for case in plan.reported if settings is not None else ():
            if case in golds and case not in entry["cases"]:
                yield Run(row.name, case, plan.keys[case], settings, golds[case], full=True)


def _settings(row: Row, entry: dict[str, Any]) -> Settings | None:
    """Those with the smallest gap where all have been tried; where there is one only, that."""
    tried = entry.get("tried", [])
    if "settings" in entry or len(row.grid) == 1:
        return entry.get("settings", row.grid[0])
    if len(tried) < len(row.grid):
        return None
    best: Settings = min(tried, key=lambda each: float("inf") if each["gap"] is None else each["gap"])["settings"]
    return best


def _record(document: dict[str, Any], plan: Plan, run: Run, found: dict[str, Any]) -> None:
    rows = document["rows"]
    if run.row is None:
        if run.case == plan.tuning:
            document[CHOSEN_WITH][run.case] = found[GOLD]
            return
        for name, each in found.items():
            rows.setdefault(name, {"cases": {}})["cases"][run.case] = each
        return
    entry = rows.setdefault(run.row, {"tried": [], "cases": {}})
    if run.full:
        entry["settings"] = dict(run.settings or {})
        entry["cases"][run.case] = found
    else:
        entry["tried"].append({"settings": dict(run.settings or {}), **found})
