"""Forget a CIFAR-10 class, or a random tenth of the training set, by SEMU and its rivals; write the table.

    python benchmarks/cifar10/run.py --data DIR --task class
    python benchmarks/cifar10/run.py --data DIR --task random

`DIR` holds CIFAR-10 as train.parquet and test.parquet with JPEG or PNG bytes. The original and the retrained (gold)
models are trained on the first run and read from `--cache` afterwards. `--attacks` adds a second table, of what attacks
on each row's merged weights bring back; gold stands in it as a row, attacked alike. It works on the first GPU, or on
the CPU where there is none.

Each row is written when it is there. With `--only` the file keeps its other rows, so that several processes may fill
it, each with classes of its own; rows of other models or of another machine are refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import attack_columns
from dataset import DEVICE, batches, subset
from methods import Method, all_weights, best_objective, best_objective_with_copy, lora, ranked_objective, semu
from pretrain import only_process
from tasks import ForgettingTask, class_tasks, random_tasks
from torch import nn

from semu_peft import NaturalGradient, objectives
from semu_peft.evaluation import ForgettingMetrics, evaluate_forgetting
from semu_peft.files import written_whole

RETAIN_IMAGES = 4_000
GOLD = "retrained (gold)"
METRICS = ("unlearning_accuracy", "retain_accuracy", "test_accuracy", "membership_inference")


def random_label(task: ForgettingTask) -> objectives.Objective:
    return objectives.RandomLabel(seed=task.seed)


def gradient_ascent(task: ForgettingTask) -> objectives.Objective:
    return objectives.GradientAscent()


def methods(kind: str, budget: Callable[[ForgettingTask], int]) -> list[Method]:
    """The rows, most wanted first, with the settings chosen on the first class or seed (see the results page).

    Args:
        kind: The task's.
        budget: What LoRA may train: as much as the first row does.
    """
    if kind == "class":
        return [
            Method("SEMU, all layers", semu(best_objective)),
            Method("LoRA of the same size, same objective", lora(best_objective, 0.0, budget), 1e-2, 1),
            Method("all weights, same objective", all_weights(best_objective_with_copy), 1e-4, 1),
            Method("SEMU, classifier only", semu(best_objective, target_modules="classifier")),
            Method("SEMU, all layers, with retain data", semu(best_objective, retain=1.0)),
            Method("SalUn, with retain data", all_weights(random_label, saliency=True, retain=1.0), 1e-4, 1),
            Method("SEMU, all layers, by AdamW", semu(best_objective), 3e-2, 2),
            Method("SEMU, all layers, random labels (paper)", semu(random_label)),
            Method("all weights, random labels", all_weights(random_label), 1e-4, 1),
            Method("all weights, gradient ascent", all_weights(gradient_ascent), 1e-5, 1),
        ]
    wide = {"explained_variance": 0.99}
    # Quantiles of 64 examples are coarse, and a natural step is as good as what its batch says.
    large = {**wide, "batch_size": 256}
    patient = {**large, "natural": NaturalGradient(tolerance=0.002)}
    unseen = {"keep": objectives.KLToOriginal, "on_unseen": True}
    return [
        Method("SEMU", semu(best_objective, **large)),
        Method("SEMU, with retain data", semu(best_objective, retain=4.0, **large)),
        Method("SEMU, tolerance 0.002, with unseen images", semu(ranked_objective, retain=1.0, **unseen, **patient)),
        Method("SEMU, tolerance 0.002, with retain data", semu(ranked_objective, retain=4.0, **patient)),
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


class ResultFile:
    """The file of results, a row at a time; several processes may fill it.

    Args:
        path: The file.
        said: What is said of the run in it.
        adds: Keep its other rows; else the first row begins it anew.
    """

    def __init__(self, path: Path, said: Mapping[str, Any], adds: bool) -> None:
        self.path, self.said, self.adds = path, said, adds
        found = self._found()
        if found and (found["machine"], found["versions"]) != (machine(), versions()):
            raise SystemExit(
                f"{path} has rows of {found['machine']} with {found['versions']}, and this is {machine()} with "
                f"{versions()}. Give another `--output`, or run without `--only`."
            )

    @property
    def rows(self) -> Rows:
        """What it has."""
        return merged(self._found().get("rows", {}), {})

    @property
    def attacks(self) -> Attacked:
        """What attacks found, by method, by task."""
        return dict(self._found().get("attacks", {}))

    def enter(self, name: str, task: str, metrics: ForgettingMetrics, attacks: dict[str, Any] | None) -> None:
        """Put in a row of a task, with what attacks found."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with only_process(self.path.with_suffix(".lock")):
            known, attacked = self.rows, self.attacks
            if name == GOLD and task in known.get(name, {}) and not _is_alike(known[name][task], metrics):
                raise SystemExit(
                    f"{self.path} has rows of other models: its retrained model of {task} gave {known[name][task]}, "
                    f"this one {metrics}. Give another `--output`, or the `--cache` of that run."
                )
            if attacks is not None:
                attacked[name] = attacked.get(name, {}) | {task: attacks}
            rows = known | {name: known.get(name, {}) | {task: metrics}}
            tried = {"attack_table": attack_columns.table(attacked), "attacks": attacked} if attacked else {}
            write(self.path, self.said, rows, tried)
        self.adds = True

    def _found(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.path.read_text()) if self.adds and self.path.exists() else {}
        return found


def _is_alike(one: ForgettingMetrics, other: ForgettingMetrics) -> bool:
    """Whether these are one model's, measured twice: kernels round, images are a tenth of a point or less."""
    return all(abs(getattr(one, key) - getattr(other, key)) <= 0.1 for key in METRICS[:3])


def references(task: ForgettingTask) -> list[tuple[str, nn.Module, ForgettingTask]]:
    """What rows are compared with: the retrained model, the original, and what the original says of unseen images.

    The last is what `UnseenConfidence` makes of the forget images: a run that reached it and moved nothing else would
    have that row's gap.
    """
    known = [(GOLD, task.gold, task), ("original (do nothing)", task.original, task)]
    if task.held_out is None:
        return known
    unseen = dataclasses.replace(task, forget=task.held_out)
    return [*known, ("original, of unseen images (the target)", task.original, unseen)]


def run(tasks: Iterable[ForgettingTask], kind: str, results: ResultFile, only: Sequence[str], attacks: bool) -> None:
    """All methods on all tasks, or `only` some: metrics and, where asked for, what attacks find."""

    def budget(task: ForgettingTask) -> int:
        row = results.rows.get(first.name, {}).get(task.name)
        if row is None:
            raise LookupError(f"LoRA has as many parameters as {first.name!r} of {task.name}, which was not run.")
        return int(row.trainable_parameters or 0)

    first, *others = methods(kind, budget)
    for task in tasks:
        for name, model, judged in references(task):
            is_known = task.name in results.attacks.get(name, {})
            tried = attacked(model, task, name) if attacks and not is_known else None
            results.enter(name, task.name, evaluate(model, judged, 0, None, name), tried)
        for method in (first, *others):
            if only and method.name not in only:
                continue
            try:
                done = method.run(task, method.learning_rate, method.epochs)
                metrics = evaluate(done.model, task, done.trainable_parameters, done.seconds, method.name)
                tried = attacked(done.model, task, method.name) if attacks else None
            except Exception:  # one row is not worth the others
                print(f"{task.name}: {method.name}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                continue
            results.enter(method.name, task.name, metrics, tried)


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
    gold = rows[GOLD]
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
    path = arguments.output / f"cifar10_{arguments.task}{'_attacks' if arguments.attacks else ''}.json"
    results = ResultFile(path, {"task": arguments.task}, adds=bool(arguments.only))
    run(tasks, arguments.task, results, arguments.only, arguments.attacks)
    print(*tables(results.rows), sep="\n\n")
    if arguments.attacks:
        print(attack_columns.table(results.attacks))
    print(f"Written to {path}")


def machine() -> str:
    """What the models were trained and attacked on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU"


def versions() -> dict[str, str]:
    """Of what figures depend on."""
    return {"torch": torch.__version__, "peft": peft.__version__, "python": platform.python_version()}


def write(path: Path, said: Mapping[str, Any], rows: Rows, attacks: Mapping[str, Any]) -> None:
    """The file of results, whole or as it was: what is `said` of the run, its machine, tables, rows and attacks."""
    document = {
        **said,
        "machine": machine(),
        "versions": versions(),
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
