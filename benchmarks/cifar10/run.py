"""Forget a CIFAR-10 class, or a random tenth of the training set, by SEMU and its rivals; write the table.

    python benchmarks/cifar10/run.py --data DIR --task class
    python benchmarks/cifar10/run.py --data DIR --task random

`DIR` holds CIFAR-10 as train.parquet and test.parquet with JPEG or PNG bytes. The original and the retrained (gold)
models are trained on the first run and read from `--cache` afterwards. `--attacks` adds a second table, of what attacks
on each row's merged weights bring back; gold stands in it as a row, attacked alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import attack_columns
from dataset import DEVICE, batches, subset
from methods import Method, all_weights, best_objective, best_objective_with_copy, lora, semu
from tasks import ForgettingTask, class_tasks, random_tasks
from torch import nn

from semu_peft import objectives
from semu_peft.evaluation import ForgettingMetrics, evaluate_forgetting
from semu_peft.files import written_whole

RETAIN_IMAGES = 4_000
METRICS = ("unlearning_accuracy", "retain_accuracy", "test_accuracy", "membership_inference")


def random_label(task: ForgettingTask) -> objectives.Objective:
    return objectives.RandomLabel(seed=task.seed)


def gradient_ascent(task: ForgettingTask) -> objectives.Objective:
    return objectives.GradientAscent()


def methods(kind: str, semu_parameters: dict[str, int]) -> list[Method]:
    """The rows, with the settings chosen on the first class or seed (see the results page)."""

    def budget(task: ForgettingTask) -> int:
        return semu_parameters[task.name]

    if kind == "class":
        return [
            Method("SEMU, all layers", semu(best_objective)),
            Method("SEMU, classifier only", semu(best_objective, target_modules="classifier")),
            Method("SEMU, all layers, with retain data", semu(best_objective, retain=1.0)),
            Method("SEMU, all layers, random labels (paper)", semu(random_label)),
            Method("SEMU, all layers, by AdamW", semu(best_objective), 3e-2, 2),
            Method("LoRA of the same size, same objective", lora(best_objective, 0.0, budget), 1e-2, 1),
            Method("all weights, same objective", all_weights(best_objective_with_copy), 1e-4, 1),
            Method("all weights, random labels", all_weights(random_label), 1e-4, 1),
            Method("all weights, gradient ascent", all_weights(gradient_ascent), 1e-5, 1),
            Method("SalUn, with retain data", all_weights(random_label, saliency=True, retain=1.0), 1e-4, 1),
        ]
    wide = {"explained_variance": 0.99}
    # Quantiles of 64 examples are coarse, and a natural step is as good as what its batch says.
    large = {**wide, "batch_size": 256}
    return [
        Method("SEMU", semu(best_objective, **large)),
        Method("SEMU, with retain data", semu(best_objective, retain=4.0, **large)),
        Method("SEMU, random labels (paper)", semu(random_label, **large)),
        Method("SEMU, by AdamW", semu(best_objective, **wide), 3e-3, 40),
        Method("SEMU, with retain data, by AdamW", semu(best_objective, retain=4.0, **wide), 1e-2, 40),
        Method("LoRA of the same size, same objective", lora(best_objective, 0.0, budget), 1e-2, 40),
        Method("LoRA, same objective, with retain data", lora(best_objective, 4.0, budget), 1e-2, 40),
        Method("all weights, same objective", all_weights(best_objective_with_copy), 1e-4, 10),
        Method("all weights, random labels", all_weights(random_label), 3e-5, 10),
        Method("all weights, gradient ascent", all_weights(gradient_ascent), 1e-5, 10),
        Method("SalUn, with retain data", all_weights(random_label, saliency=True, retain=1.0), 1e-4, 10),
    ]


def evaluate(
    model: nn.Module, task: ForgettingTask, trainable: int, seconds: float | None, label: str
) -> ForgettingMetrics:
    # 4,000 retained images give RA to about half a point; all of them would double the time of the benchmark.
    order = torch.randperm(len(task.retain), generator=torch.Generator().manual_seed(0))
    retain = subset(task.retain, order[:RETAIN_IMAGES])

    metrics = evaluate_forgetting(
        model,
        batches(task.forget),
        batches(retain),
        batches(task.test),
        forgotten_test=batches(task.test_forgotten) if task.test_forgotten is not None else None,
        seed=task.seed,
        trainable_parameters=trainable,
        seconds=seconds,
        progress=False,
    )
    total = sum(parameter.numel() for parameter in task.original.parameters())
    print(f"{task.name}: {label}: {metrics}", flush=True)
    return dataclasses.replace(metrics, total_parameters=total)


Rows = dict[str, dict[str, ForgettingMetrics]]
Attacked = dict[str, dict[str, dict[str, Any]]]


def merged(before: dict[str, dict[str, Any]], rows: Rows) -> Rows:
    """The rows of a file, with those measured now."""
    known = {name: {task: ForgettingMetrics(**row) for task, row in each.items()} for name, each in before.items()}
    return known | {name: known.get(name, {}) | each for name, each in rows.items()}


def attacked(model: nn.Module, task: ForgettingTask, label: str) -> dict[str, Any]:
    """What attacks bring back of a class, measured on its test images."""
    assert task.test_forgotten is not None
    found = attack_columns.attacked(model, task.forget, task.retain, task.test_forgotten, task.test, task.seed)
    print(f"{task.name}: {label}: {found['relearning']}, {found['quantised']}", flush=True)
    return found


def run(
    tasks: Iterable[ForgettingTask],
    kind: str,
    only: Sequence[str],
    attacks: bool = False,
    after_row: Callable[[Rows, Attacked], None] = lambda rows, found: None,
) -> tuple[Rows, Attacked]:
    """All methods on all tasks: metrics, and what attacks found, by method, by task."""
    rows: Rows = {}
    found: Attacked = {}
    semu_parameters: dict[str, int] = {}
    for task in tasks:
        if attacks:
            for name, model in (("retrained (gold)", task.gold), ("original (do nothing)", task.original)):
                found.setdefault(name, {})[task.name] = attacked(model, task, name)
        rows.setdefault("retrained (gold)", {})[task.name] = evaluate(task.gold, task, 0, None, "retrained (gold)")
        rows.setdefault("original (do nothing)", {})[task.name] = evaluate(task.original, task, 0, None, "original")
        for method in methods(kind, semu_parameters):
            if only and method.name not in only:
                continue
            done = method.run(task, method.learning_rate, method.epochs)
            semu_parameters.setdefault(task.name, done.trainable_parameters)
            rows.setdefault(method.name, {})[task.name] = evaluate(
                done.model, task, done.trainable_parameters, done.seconds, method.name
            )
            if attacks:
                found.setdefault(method.name, {})[task.name] = attacked(done.model, task, method.name)
            after_row(rows, found)
    return rows, found


def tables(rows: Rows) -> list[str]:
    """One table for each set of tasks that rows have in common: the rows that were measured on all of these."""
    sets = sorted({frozenset(by_task) for by_task in rows.values()}, key=len)
    return [
        table(
            {
                name: {task: by_task[task] for task in sorted(tasks)}
                for name, by_task in rows.items()
                if tasks <= set(by_task)
            }
        )
        for tasks in sets
    ]


def table(rows: Rows) -> str:
    """Means over the tasks, with the standard deviation of the average gap, as Markdown."""
    gold = rows["retrained (gold)"]
    lines = [
        "| method | UA | RA | TA | MIA | average gap | trained | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, by_task in rows.items():
        means = [statistics.fmean(getattr(metrics, key) for metrics in by_task.values()) for key in METRICS]
        gaps = [metrics.average_gap(gold[task]) for task, metrics in by_task.items()]
        spread = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
        share = statistics.fmean(metrics.trainable_share for metrics in by_task.values())
        timed = [metrics.seconds for metrics in by_task.values() if metrics.seconds is not None]
        lines.append(
            f"| {name} | {' | '.join(f'{mean:.1f}' for mean in means)} | {statistics.fmean(gaps):.2f} ± {spread:.2f} | "
            f"{f'{share:.3f}%' if share else '–'} | {f'{statistics.fmean(timed):.0f}' if timed else '–'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with CIFAR-10's train.parquet and test.parquet"
    )
    parser.add_argument("--task", choices=["class", "random"], required=True)
    parser.add_argument("--classes", type=int, nargs="+", default=[0, 3, 8], help="classes to forget, one at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of random forgetting")
    parser.add_argument("--cache", type=Path, default=Path("runs/cifar10"), help="folder of the trained models")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the result file")
    parser.add_argument("--compile", action="store_true", help="train the cached models with torch.compile")
    parser.add_argument("--attacks", action="store_true", help="attack each model too; for --task class")
    parser.add_argument("--only", nargs="+", default=[], help="run these methods alone, and keep the file's other rows")
    arguments = parser.parse_args()
    if arguments.attacks and arguments.task != "class":
        parser.error("--attacks is for --task class: random examples are no knowledge that relearning brings back")
    if arguments.task == "class":
        tasks = class_tasks(arguments.data, arguments.cache, arguments.classes, 0, arguments.compile, DEVICE)
    else:
        tasks = random_tasks(arguments.data, arguments.cache, arguments.seeds, arguments.compile, DEVICE)
    path = arguments.output / f"cifar10_{arguments.task}.json"
    before = json.loads(path.read_text())["rows"] if arguments.only and path.exists() else {}

    def save(rows: Rows, found: Attacked) -> None:
        attacks = {"attack_table": attack_columns.table(found), "attacks": found} if found else {}
        write(path, {"task": arguments.task}, merged(before, rows), attacks)

    rows, found = run(tasks, arguments.task, arguments.only, arguments.attacks, save)
    print(table(rows))
    if found:
        print(attack_columns.table(found))
    print(f"Written to {path}")


def write(path: Path, said: Mapping[str, Any], rows: Rows, attacks: Mapping[str, Any]) -> None:
    """The file of results, whole or as it was: what is `said` of the run, its machine, tables, rows and attacks."""
    threads = f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU"
    document = {
        **said,
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else threads,
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "python": platform.python_version()},
        "tables": tables(rows),
        "rows": {
            name: {task: dataclasses.asdict(metrics) for task, metrics in row.items()} for name, row in rows.items()
        },
        **attacks,
    }
    with written_whole(path) as file:
        file.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
