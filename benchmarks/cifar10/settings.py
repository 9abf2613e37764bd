"""Forget a CIFAR-10 class at every γ, step size and choice of layers: does any setting destroy or fail?

    OMP_NUM_THREADS=1 python benchmarks/cifar10/settings.py --data DIR

SEMU by natural gradients without retain data, everything else at its default. The gap is to the model retrained without
the class. Run again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from dataset import DEVICE
from methods import TARGET_MODULES, best_objective, loader
from peft import get_peft_model
from run import evaluate
from tasks import ForgettingTask, class_tasks

from semu_peft import NaturalGradient, SemuConfig, initialize_semu_weights, unlearn
from semu_peft.evaluation import ForgettingMetrics
from semu_peft.files import written_whole

LAYERS = {"all layers": TARGET_MODULES, "classifier only": "classifier"}
GAMMAS = (0.8, 0.9, 0.95, 0.99, 1.0)
KLS = (0.02, 0.1, 0.3)
SETTINGS = tuple(itertools.product(LAYERS, GAMMAS, KLS))


def forget(task: ForgettingTask, gold: ForgettingMetrics, layers: str, gamma: float, kl: float) -> dict[str, Any]:
    """One run, what it left, and how far that is from the retrained model."""
    started, objective = time.process_time(), best_objective(task)
    config = SemuConfig(target_modules=LAYERS[layers], explained_variance=gamma)
    model = get_peft_model(copy.deepcopy(task.original), config)
    initialize_semu_weights(model, loader(task.forget, task.seed), objective, progress=False)
    result = unlearn(
        model, loader(task.forget, task.seed), objective, optimizer=NaturalGradient(kl=kl), seed=task.seed,
        progress=False,
    )  # fmt: skip
    seconds = time.process_time() - started
    metrics = evaluate(model, task, result.trainable_parameters, seconds, f"{layers}, γ {gamma}, kl {kl}")
    return {
        **figures(metrics), "trained": result.trainable_parameters, "steps": result.steps, "seconds": seconds,
        "stop reason": result.stop_reason, "gap": metrics.average_gap(gold), "machine": machine(),
    }  # fmt: skip


def figures(metrics: ForgettingMetrics) -> dict[str, float]:
    named = {"UA": metrics.unlearning_accuracy, "RA": metrics.retain_accuracy, "TA": metrics.test_accuracy}
    return named | {"MIA": metrics.membership_inference}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Gaps by class, a line for each setting."""
    names = sorted({key.split(" | ")[0] for key in rows})
    lines = [
        f"| layers | γ | kl | {' | '.join(f'gap, {name}' for name in names)} | trained | steps |",
        "| --- " * (5 + len(names)) + "|",
    ]
    for layers, gamma, kl in SETTINGS:
        found = [rows.get(f"{name} | {layers} | {gamma} | {kl}") for name in names]
        if not any(found):
            continue
        gaps = [f"{row['gap']:.2f}" if row else "–" for row in found]
        trained, steps = (", ".join(f"{row[key]:,}" for row in found if row) for key in ("trained", "steps"))
        lines.append(f"| {layers} | {gamma} | {kl} | {' | '.join(gaps)} | {trained} | {steps} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with CIFAR-10's train.parquet and test.parquet"
    )
    parser.add_argument("--classes", type=int, nargs="+", default=[0, 3, 8], help="classes to forget, one at a time")
    parser.add_argument("--cache", type=Path, default=Path("runs/cifar10"), help="folder of the trained models")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the result file")
    arguments = parser.parse_args()
    path = arguments.output / "cifar10_settings.json"
    rows: dict[str, dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else {}
    for task in class_tasks(arguments.data, arguments.cache, arguments.classes, 0, device=DEVICE):
        name = task.name.split(",")[0]
        keys = {f"{name} | {layers} | {gamma} | {kl}": (layers, gamma, kl) for layers, gamma, kl in SETTINGS}
        missing = {key: setting for key, setting in keys.items() if key not in rows}
        if not missing:
            continue
        gold = evaluate(task.gold, task, 0, None, "retrained (gold)")
        rows[f"{name} | retrained (gold)"] = figures(gold)
        for key, setting in missing.items():
            rows[key] = forget(task, gold, *setting)
            write(rows, path)
    print(table(rows))


def machine() -> str:
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU"
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else cpu


def write(rows: dict[str, dict[str, Any]], path: Path) -> None:
    document = {
        "machine": "that of each row",
        "torch": torch.__version__,
        "seconds": "processor time",
        "table": table(rows),
        "rows": rows,
    }
    with written_whole(path) as file:
        file.write_text(json.dumps(document, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
