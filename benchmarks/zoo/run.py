"""All methods under one protocol, as one table sorted by result.

    OMP_NUM_THREADS=1 python benchmarks/zoo/run.py                       # scikit-learn's digits, a few minutes
    python benchmarks/zoo/run.py --data DIR --models runs/cifar10        # CIFAR-10
    python benchmarks/zoo/run.py --text --models DIR --data DIR --neutral FILE    # language: text.py, two hours

Each method's settings are chosen on one case (class 0, seed 0) by the average gap to the model retrained without the
class, over UA, RA, TA and MIA, and reported on two other classes with three seeds. Beside that stands what is forgotten
at an equal budget of damage: the change dialled down, `W + s ΔW`, until `KL(original ‖ now)` on retain data is 0.01.
Edits take their statistics of 80 batches at most.

Each row is written when it is done; `--resume` leaves the rows that the result file has.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

import attack_columns
from protocol import Case, accuracy, cifar10_cases, damage, digits_cases, judged
from results import mean, write
from rows import Outcome, Row, blended, rows, share_within

METRICS = ("unlearning_accuracy", "retain_accuracy", "test_accuracy", "membership_inference")
CHOSEN_ON, BUDGET = 0, 0.01


def attacked(model: Any, case: Case) -> dict[str, Any]:
    return attack_columns.attacked(model, case.forget, case.retain, case.test_forgotten, case.test, case.seed)


def measured(row: Row, case: Case, settings: Any, *, full: bool, attacks: bool = False) -> dict[str, Any]:
    """One run: the metrics, the gap and the damage; in full with the same at the budget and what attacks bring back."""
    started = time.perf_counter()
    try:
        outcome = row.run(case, settings)
    except ValueError as error:  # a method that finds nothing to do says so
        return {"failed": str(error), "gap": float("inf")}
    seconds = time.perf_counter() - started
    metrics, kl = judged(outcome.model, case, trainable_parameters=outcome.trained, seconds=seconds)
    return {
        **{name: getattr(metrics, name) for name in METRICS},
        "forgotten_test_accuracy": metrics.forgotten_test_accuracy,
        "gap": metrics.average_gap(case.judged_gold), "kl": kl, "seconds": seconds, "trained": outcome.trained,
        "shipped": outcome.shipped,
        **({"at_budget": at_budget(case, outcome, kl)} if full else {}),
        **({"attacks": attacked(outcome.model, case)} if attacks else {}),
    }  # fmt: skip


def at_budget(case: Case, outcome: Outcome, kl: float) -> dict[str, float]:
    """UA and TA where the change is dialled to the budget."""
    share = 1.0 if kl <= BUDGET else share_within(BUDGET, lambda part: damage(blended(case, outcome, part), case))
    model = blended(case, outcome, share)
    return {
        "share": share,
        "unlearning_accuracy": 100 - accuracy(model, case.forget),
        "test_accuracy": accuracy(model, case.test),
    }


def references(case: Case, attacks: bool = False) -> dict[str, dict[str, Any]]:
    """What every table needs: the retrained model, and doing nothing."""
    found = {}
    for name, model in (("retrained (gold)", case.gold), ("original (do nothing)", case.original)):
        metrics, kl = judged(model, case)
        found[name] = {
            **{key: getattr(metrics, key) for key in METRICS},
            "forgotten_test_accuracy": metrics.forgotten_test_accuracy,
            "gap": metrics.average_gap(case.judged_gold), "kl": kl,
            **({"attacks": attacked(model, case)} if attacks else {}),
        }  # fmt: skip
    return found


def chosen_settings(row: Row, case: Case) -> tuple[Any, list[dict[str, Any]]]:
    """The settings with the smallest gap on the case that is for choosing."""
    tried = [{"settings": dict(settings), **measured(row, case, settings, full=False)} for settings in row.grid]
    return min(tried, key=lambda each: each["gap"])["settings"], tried


def table(results: dict[str, Any]) -> list[str]:
    """Means over the cases, the smallest gap first; the retrained model and doing nothing where they fall."""
    lines = [
        "| method | UA | RA | TA | MIA | average gap | KL | UA at KL ≤ 0.01 | seconds | bytes | trained |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    order = sorted(results, key=lambda name: mean(results[name]["cases"], "gap") or 0.0)
    for name in order:
        cases = results[name]["cases"]
        failed = [each for each in cases.values() if "failed" in each]
        if failed:
            lines.append(f"| {name} | fails on {len(failed)} of {len(cases)} | | | | | | | | | |")
            continue
        told = [f"{mean(cases, key):.1f}" for key in METRICS]
        gap, worst = mean(cases, "gap"), max(each["gap"] for each in cases.values())
        budget, seconds = mean(cases, "at_budget", "unlearning_accuracy"), mean(cases, "seconds")
        shipped, numbers = mean(cases, "shipped"), mean(cases, "trained")
        rest = [
            f"{mean(cases, 'kl'):.3f}", "–" if budget is None else f"{budget:.1f}",
            "–" if seconds is None else f"{seconds:.1f}", "–" if shipped is None else f"{shipped:,.0f}",
            "–" if numbers is None else f"{numbers:,.0f}",
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(told)} | {gap:.1f} (worst {worst:.1f}) | {' | '.join(rest)} |")
    return lines


def compared(
    results: dict[str, Any], tuning: Case, cases: list[Case], only: str | None, attacks: bool, done: Callable[[], None]
) -> None:
    """Run the rows that are not in the results yet; `done` is called after each."""
    for case in cases:
        if case.name in results.get("original (do nothing)", {"cases": {}})["cases"]:
            continue
        for name, found in references(case, attacks).items():
            results.setdefault(name, {"cases": {}})["cases"][case.name] = found
        done()
    for row in rows():
        if row.name in results or (only and only not in row.name):
            continue
        settings, tried = chosen_settings(row, tuning)
        by_case = {case.name: measured(row, case, settings, full=True, attacks=attacks) for case in cases}
        results[row.name] = {"settings": settings, "tried": tried, "cases": by_case}
        print(f"{row.name}: {settings}, gap {mean(by_case, 'gap')}", file=sys.stderr, flush=True)
        done()


def attack_table(results: dict[str, Any]) -> str:
    """Of the rows that were attacked."""
    found = {
        name: {case: each["attacks"] for case, each in row["cases"].items() if "attacks" in each}
        for name, row in results.items()
    }
    return attack_columns.table({name: by_case for name, by_case in found.items() if by_case})


def text() -> None:
    """The table for language models: the rest of the arguments are those of `text.py`."""
    sys.argv.remove("--text")
    sys.path.insert(0, str(Path(__file__).parents[1] / "tofu"))
    import text

    text.main()


def main() -> None:
    if "--text" in sys.argv:
        text()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10's train.parquet and test.parquet; else: digits")
    parser.add_argument("--models", type=Path, default=Path("runs/cifar10"), help="folder of its trained models")
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 8], help="classes to report on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the result file")
    parser.add_argument("--attacks", action="store_true", help="a second table: what attacks bring back")
    parser.add_argument("--only", help="only the methods whose name contains this; without --resume no file")
    parser.add_argument("--resume", action="store_true", help="complete the result file")
    arguments = parser.parse_args()
    started, used = time.perf_counter(), time.process_time()

    def cases(classes: list[int], seeds: list[int]) -> list[Case]:
        if arguments.data is None:
            return list(digits_cases(classes, seeds))
        return list(cifar10_cases(arguments.data, arguments.models, classes, seeds))

    (tuning,) = cases([CHOSEN_ON], arguments.seeds[:1])
    asked = {
        "data": "digits" if arguments.data is None else "cifar10",
        "classes": arguments.classes, "seeds": arguments.seeds, "chosen on": tuning.name, "budget": BUDGET,
    }  # fmt: skip
    path = arguments.output / f"zoo_{asked['data']}.json"
    document = begun(path, asked, resume=arguments.resume)
    keeps = arguments.resume or not arguments.only  # a few rows alone are not to take the place of a whole table
    before = document.get("minutes", 0.0), document.get("processor minutes", 0.0)

    def done() -> None:
        results = document["rows"]
        document["minutes"] = before[0] + (time.perf_counter() - started) / 60
        document["processor minutes"] = before[1] + (time.process_time() - used) / 60
        document["table"] = table(results)
        if arguments.attacks:
            document["attack_table"] = attack_table(results)
        if keeps:
            write(path, document)

    reported = cases(arguments.classes, arguments.seeds)
    compared(document["rows"], tuning, reported, arguments.only, arguments.attacks, done)
    print("\n".join(table(document["rows"])))
    if arguments.attacks:
        print(attack_table(document["rows"]))
    if keeps:
        print(f"Written to {path}")


def begun(path: Path, asked: dict[str, Any], *, resume: bool) -> dict[str, Any]:
    """What the results are written into: those of an earlier run that was asked the same, or nothing yet."""
    if resume and path.exists():
        document: dict[str, Any] = json.loads(path.read_text())
        if all(document.get(name) == value for name, value in asked.items()):
            return document
        raise SystemExit(f"{path} was made with other classes, seeds or data than {asked}. Give another `--output`.")
    return {
        **asked, "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU",
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__},
        "rows": {},
    }  # fmt: skip


if __name__ == "__main__":
    main()
