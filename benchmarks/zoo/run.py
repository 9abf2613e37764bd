"""All methods under one protocol, as one table sorted by result.

    OMP_NUM_THREADS=1 python benchmarks/zoo/run.py                       # scikit-learn's digits, a few minutes
    python benchmarks/zoo/run.py --data DIR --models runs/cifar10        # CIFAR-10: hours, or minutes of a GPU
    python benchmarks/zoo/run.py --text --models DIR --data DIR --neutral FILE    # language: text.py, two hours

Each method's settings are chosen on one case (class 0, seed 0) by the average gap to the model retrained without the
class, over UA, RA, TA and MIA, and reported on two other classes with three seeds. Beside that stands what is forgotten
at an equal budget of damage: the change dialled down, `W + s ΔW`, until `KL(original ‖ now)` on retain data is 0.01.
Edits take their statistics of 80 batches at most.

Each run is written when it is done, and the rows that are whole come into the table; `--resume` makes those that the
result file lacks. On a GPU, which one process with networks as small as these leaves idle, take several (`--workers`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "tofu"))

import attack_columns
from machine import DEVICE, about, clock
from protocol import Case, accuracy, cifar10_case, damage, digits_case, judged
from results import gap, mean, write
from rows import LEFT_OUT, Outcome, Row, blended, rows, share_within
from schedule import GOLD, NOTHING, Plan, Run, complete, told, whole

METRICS = ("unlearning_accuracy", "retain_accuracy", "test_accuracy", "membership_inference")
CHOSEN_ON, BUDGET = 0, 0.01


@dataclass(frozen=True)
class Asked:
    """What every process has to know.

    Attributes:
        data: Folder of CIFAR-10; None for digits.
        models: Folder of its trained models.
        attacks: Whether models are attacked.
    """

    data: Path | None
    models: Path
    attacks: bool

    def case(self, key: tuple[int, int]) -> Case:
        """Of a class and a seed; kept for the next run."""
        return digits_case(*key) if self.data is None else cifar10_case(self.data, self.models, *key)

    def name(self, index: int, seed: int) -> str:
        return f"{'digit' if self.data is None else 'class'} {index}, seed {seed}"


def made(asked: Asked, run: Run) -> dict[str, Any]:
    """A run of the table."""
    torch.set_num_threads(1)
    case = asked.case(run.key)
    if run.row is None:
        return references(case, asked.attacks)
    row = next(row for row in rows() if row.name == run.row)
    assert run.gold is not None
    found = measured(row, case, run.settings, run.gold, full=run.full, attacks=asked.attacks and run.full)
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()  # other processes want it
    return found


def attacked(model: Any, case: Case) -> dict[str, Any]:
    return attack_columns.attacked(model, case.forget, case.retain, case.test_forgotten, case.test, case.seed)


def measured(
    row: Row, case: Case, settings: Any, gold: Mapping[str, Any], *, full: bool, attacks: bool = False
) -> dict[str, Any]:
    """One run: the metrics, the gap and the damage; in full with the same at the budget and what attacks bring back."""
    started = clock()
    try:
        outcome = row.run(case, settings)
        seconds = clock() - started
        found = told_of(outcome.model, case)
    except (ValueError, torch.linalg.LinAlgError) as error:  # a method that finds nothing to do, or diverges, says so
        return {"failed": str(error), "gap": float("inf")}
    return {
        **found, "gap": gap(found, gold, METRICS), "seconds": seconds, "trained": outcome.trained,
        "shipped": outcome.shipped,
        **({"at_budget": at_budget(case, outcome, found["kl"])} if full else {}),
        **({"attacks": attacked(outcome.model, case)} if attacks else {}),
    }  # fmt: skip


def told_of(model: Any, case: Case) -> dict[str, Any]:
    """The metrics and the damage."""
    metrics, kl = judged(model, case)
    names = (*METRICS, "forgotten_test_accuracy")
    return {**{name: getattr(metrics, name) for name in names}, "kl": kl}


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
    models = {GOLD: case.gold, NOTHING: case.original}
    found = {name: told_of(model, case) for name, model in models.items()}
    return {
        name: {
            **each, "gap": gap(each, found[GOLD], METRICS),
            **({"attacks": attacked(models[name], case)} if attacks else {}),
        }
        for name, each in found.items()
    }  # fmt: skip


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
    parser.add_argument("--only", nargs="+", help="methods whose title has one of these; without --resume no file")
    parser.add_argument("--first", nargs="+", default=[], help="begin with those whose title begins so")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side, some 4 GB of a GPU each")
    parser.add_argument("--seconds", type=float, help="begin no run that would not be done by then")
    parser.add_argument("--resume", action="store_true", help="complete the result file")
    arguments = parser.parse_args()
    started = time.perf_counter()
    asked = Asked(arguments.data, arguments.models, arguments.attacks)
    tuning = asked.name(CHOSEN_ON, arguments.seeds[0])
    reported = {asked.name(index, seed): (index, seed) for seed in arguments.seeds for index in arguments.classes}
    wanted = [row for row in rows() if not arguments.only or any(each in row.name for each in arguments.only)]
    wanted.sort(key=lambda row: [not row.name.startswith(each) for each in arguments.first])
    plan = Plan(wanted, tuning, {tuning: (CHOSEN_ON, arguments.seeds[0]), **reported})
    what = {
        "data": "digits" if arguments.data is None else "cifar10",
        "classes": arguments.classes, "seeds": arguments.seeds, "chosen on": tuning, "budget": BUDGET,
        **{key: value for key, value in about(arguments.workers).items() if key in ("machine", "seconds")},
    }  # fmt: skip
    path = arguments.output / f"zoo_{what['data']}{'_gpu' if DEVICE.type == 'cuda' else ''}.json"
    document = begun(path, what, resume=arguments.resume)
    document["left out"] = LEFT_OUT
    keeps = arguments.resume or not arguments.only  # a few rows alone are not to take the place of a whole table
    before = document.get("minutes", 0.0)

    def done() -> None:
        document["minutes"] = before + (time.perf_counter() - started) / 60
        document["table"] = table(whole(document, plan))
        if arguments.attacks:
            document["attack_table"] = attack_table(whole(document, plan))
        if keeps:
            write(path, document)

    complete(
        document, plan, partial(made, asked), done=done, workers=arguments.workers, seconds=arguments.seconds
    )  # fmt: skip
    told(document, plan)
    print("\n".join(table(whole(document, plan))))
    if arguments.attacks:
        print(attack_table(whole(document, plan)))
    if keeps:
        print(f"Written to {path}")


def begun(path: Path, asked: dict[str, Any], *, resume: bool) -> dict[str, Any]:
    """What the results are written into: those of an earlier run that was asked the same, or nothing yet."""
    if resume and path.exists():
        document: dict[str, Any] = json.loads(path.read_text())
        if all(document.get(name) == value for name, value in asked.items()):
            return document
        raise SystemExit(
            f"{path} was made with other classes, seeds, data or machine than {asked}. Give another `--output`."
        )
    return {
        **asked,
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__},
        "rows": {},
    }


if __name__ == "__main__":
    main()
