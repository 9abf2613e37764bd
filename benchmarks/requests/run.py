"""Forget a class or a handful of examples with the defaults and nothing else, on data that scikit-learn brings along.

    OMP_NUM_THREADS=1 python benchmarks/requests/run.py

Parts: `classes` (a class, at batches of 8, 32 and 64), `choices` (the same with one setting other than the default),
`examples` (requests of one, five and ten examples) and `dials` (what the ways to set it do at worst). AdamW at a fixed
rate stands beside the default.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import get_peft_model
from subjects import SUBJECTS, train
from torch import nn

from semu_peft import NaturalGradient, Retain, SemuConfig, UnlearnResult, initialize_semu_weights, objectives, unlearn
from semu_peft.evaluation import ForgettingMetrics, evaluate_forgetting, predict
from semu_peft.files import written_whole

WAYS: dict[str, dict[str, Any]] = {"default": {}, "AdamW 3e-2, 2 epochs": {"learning_rate": 3e-2, "epochs": 2}}
CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "`min_parameters=0`": {"min_parameters": 0},
    "`proximal=0`": {"optimizer": NaturalGradient(proximal=0)},
    "`proximal=0.03`": {"optimizer": NaturalGradient(proximal=0.03)},
    "`damping=1`": {"optimizer": NaturalGradient(damping=1.0)},
    "all batches in a step": {"gradient_accumulation_steps": 100},
}
BATCH_SIZES = (8, 32, 64)
SEEDS = (0, 1, 2)
REQUEST_SIZES = (1, 5, 10)
DRAWS = 5


def forget(
    original: nn.Module, batches: Any, objective: objectives.Objective, targets: Any = "all-linear", gamma: float = 0.9,
    min_parameters: int = SemuConfig.min_parameters, **settings: Any,
) -> tuple[nn.Module, UnlearnResult]:  # fmt: skip
    """A copy of the model that has forgotten."""
    config = SemuConfig(target_modules=targets, explained_variance=gamma, min_parameters=min_parameters)
    model = get_peft_model(copy.deepcopy(original), config)
    initialize_semu_weights(model, batches, objective, progress=False)
    return model, unlearn(model, batches, objective, progress=False, **settings)


def accuracy(model: nn.Module, batches: Any) -> float:
    return predict(model, batches, progress=False).accuracy


def classes(names: Sequence[str], ways: dict[str, dict[str, Any]] = WAYS) -> Iterable[dict[str, Any]]:
    """One class, from its own examples alone."""
    for name in names:
        subject = SUBJECTS[name]
        for seed in SEEDS:
            data = subject.read(seed)
            own = data.labels[data.train] == subject.forget_class
            forgotten, kept = data.train[own], data.loader(data.train[~own])
            original = train(subject.build, data, data.train, seed)
            before = {
                "UA before": 100 - accuracy(original, data.loader(forgotten)),
                "RA before": accuracy(original, kept),
            }
            for batch_size in BATCH_SIZES:
                for way, settings in ways.items():
                    batches = data.loader(forgotten, batch_size)
                    model, result = forget(original, batches, objectives.DecoupledDistillation(), **settings)
                    yield {
                        "subject": name, "batch size": batch_size, "way": way, "seed": seed, **before,
                        "UA": 100 - accuracy(model, batches), "RA": accuracy(model, kept), "steps": result.steps,
                        "seconds": result.seconds, "stop reason": result.stop_reason,
                        "loss left": result.history[-1]["loss"],
                    }  # fmt: skip


def examples(names: Sequence[str]) -> Iterable[dict[str, Any]]:
    """A few examples of a model that knows all by heart. They are to become as good as the held-out ones."""
    for name in names:
        subject = SUBJECTS[name]
        data = subject.read(0, held_out_share=2 / 3)
        original = train(subject.build, data, data.train, 0, steps=800)
        unseen = predict(original, data.loader(data.test), progress=False).confidence
        objective = objectives.UnseenConfidence(unseen)
        for size in REQUEST_SIZES:
            target = torch.quantile(unseen, (torch.arange(size) + 0.5) / size).mean().item()
            for draw in range(DRAWS):
                order = data.train[torch.randperm(len(data.train), generator=torch.Generator().manual_seed(draw))]
                request, kept = data.loader(order[:size]), data.loader(order[size:])
                before = accuracy(original, kept)
                retain = Retain(kept, objectives.CrossEntropy())
                for way, settings in (WAYS | {"default, with retain data": {"retain": retain}}).items():
                    model, result = forget(original, request, objective, "all-layers", **settings)
                    yield {
                        "subject": name, "examples": size, "way": way, "draw": draw, "RA before": before,
                        "RA": accuracy(model, kept), "confidence before": confidence(original, request),
                        "confidence": confidence(model, request), "target": target, "unseen": unseen.mean().item(),
                        "steps": result.steps, "seconds": result.seconds, "stop reason": result.stop_reason,
                    }  # fmt: skip


def choices(names: Sequence[str]) -> Iterable[dict[str, Any]]:
    """The same with one setting other than the default."""
    return classes(names, CHOICES)


def confidence(model: nn.Module, batches: Any) -> float:
    return predict(model, batches, progress=False).confidence.mean().item()


def dials(names: Sequence[str]) -> Iterable[dict[str, Any]]:
    """One class at every γ, step size and choice of layers, beside the model retrained without it."""
    subject = SUBJECTS[names[0]]
    data = subject.read(0)
    own = data.labels[data.train] == subject.forget_class
    original, gold = (train(subject.build, data, chosen, 0) for chosen in (data.train, data.train[~own]))
    batches, kept = data.loader(data.train[own]), data.loader(data.train[~own])
    test = data.loader(data.test[data.labels[data.test] != subject.forget_class])

    def judge(model: nn.Module) -> ForgettingMetrics:
        return evaluate_forgetting(model, batches, kept, test, progress=False)

    reference = judge(gold)
    for targets, modules in {"all layers": "all-linear", "head only": ["4"]}.items():
        for gamma in (0.8, 0.9, 0.95, 0.99, 1.0):
            for kl in (0.02, 0.1, 0.3):
                natural = NaturalGradient(kl=kl)
                model, result = forget(
                    original, batches, objectives.DecoupledDistillation(), modules, gamma, optimizer=natural
                )
                yield {
                    "targets": targets, "γ": gamma, "kl": kl, **figures(judge(model), reference),
                    "trained": result.trainable_parameters, "steps": result.steps, "seconds": result.seconds,
                    "stop reason": result.stop_reason,
                }  # fmt: skip


def figures(metrics: ForgettingMetrics, gold: ForgettingMetrics) -> dict[str, float]:
    named = {"UA": metrics.unlearning_accuracy, "RA": metrics.retain_accuracy, "TA": metrics.test_accuracy}
    return named | {"MIA": metrics.membership_inference, "gap": metrics.average_gap(gold)}


# ---- tables ----


def rows_by(rows: Iterable[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def most(rows: list[dict[str, Any]], key: str, before: str) -> float:
    """The largest fall of a figure below what it was."""
    return max(row[before] - row[key] for row in rows)


def classes_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| forgets a class | batch | trained by | UA, mean and worst | RA before | RA | worst fall | steps | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (subject, batch_size, way), group in rows_by(rows, "subject", "batch size", "way").items():
        worst = min(row["UA"] for row in group)
        lines.append(
            f"| {subject} | {batch_size} | {way} | {mean(group, 'UA'):.1f}, {worst:.1f} | "
            f"{mean(group, 'RA before'):.1f} | {mean(group, 'RA'):.1f} | {most(group, 'RA', 'RA before'):.1f} | "
            f"{mean(group, 'steps'):.0f} | {mean(group, 'seconds'):.1f} |"
        )
    return lines


def examples_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model | examples | trained by | RA before | RA, mean and worst | confidence before | wanted | after | worst "
        "miss | steps |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (subject, size, way), group in rows_by(rows, "subject", "examples", "way").items():
        worst, miss = min(row["RA"] for row in group), max(abs(row["confidence"] - row["target"]) for row in group)
        lines.append(
            f"| {subject} | {size} | {way} | {mean(group, 'RA before'):.2f} | {mean(group, 'RA'):.2f}, {worst:.2f} | "
            f"{mean(group, 'confidence before'):.3f} | {mean(group, 'target'):.3f} | {mean(group, 'confidence'):.3f} | "
            f"{miss:.3f} | {mean(group, 'steps'):.0f} |"
        )
    return lines


def choices_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| forgets a class | set | UA, worst | RA, change | worst fall | falls > 0.5 | loss left, worst | steps |",
        "| --- " * 8 + "|",
    ]
    for (subject, way), group in rows_by(rows, "subject", "way").items():
        falls = [row["RA before"] - row["RA"] for row in group]
        change = round(-statistics.fmean(falls), 1) + 0.0  # never "-0.0"
        lines.append(
            f"| {subject} | {way} | {min(row['UA'] for row in group):.1f} | {change:+.1f} | "
            f"{max(falls):.1f} | {sum(fall > 0.5 for fall in falls)} of {len(falls)} | "
            f"{max(row['loss left'] for row in group):.3f} | {mean(group, 'steps'):.0f} |"
        )
    return lines


def dials_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| layers | γ | kl | trained | UA | RA | TA | MIA | gap | steps |", "| --- " * 10 + "|"]
    for row in rows:
        numbers = " | ".join(f"{row[key]:.1f}" for key in ("UA", "RA", "TA", "MIA"))
        lines.append(
            f"| {row['targets']} | {row['γ']} | {row['kl']} | {row['trained']:,} | {numbers} | {row['gap']:.2f} | "
            f"{row['steps']} |"
        )
    return lines


Row = dict[str, Any]
Part = tuple[Callable[[Sequence[str]], Iterable[Row]], Callable[[list[Row]], list[str]], tuple[str, ...]]
# How it is measured, its table, and its subjects.
PARTS: dict[str, Part] = {
    "classes": (
        classes, classes_table,
        ("digits, MLP", "wine, MLP", "breast cancer, MLP", "digits, ViT", "digits, the demo's ViT"),
    ),
    "choices": (choices, choices_table, ("digits, MLP", "wine, MLP", "digits, ViT")),
    "examples": (
        examples, examples_table, ("digits, MLP", "digits, conv net", "digits, ViT", "digits, the demo's ViT"),
    ),
    "dials": (dials, dials_table, ("digits, MLP",)),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="measure these alone")
    parser.add_argument(
        "--subjects", nargs="+", choices=list(SUBJECTS), help="these alone, and keep the file's rows of the others"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the result file")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    path = arguments.output / "requests.json"
    document = json.loads(path.read_text()) if path.exists() else {}
    for part in arguments.parts:
        measure, table, subjects = PARTS[part]
        names = [name for name in subjects if not arguments.subjects or name in arguments.subjects]
        if not names:
            continue
        before = document.get(part) if arguments.subjects else None
        others = before["rows"] if before else []
        rows = [row for row in others if row.get("subject", names[0]) not in names]
        for row in measure(names):
            rows.append({**row, "measured by": provenance()} if before else row)
            measured = before["measured by"] if before else provenance()
            document[part] = {"measured by": measured, "table": table(rows), "rows": rows}
            write(document, path)
        print(*document[part]["table"], "", sep="\n", flush=True)
    print(f"Written to {path}")


def provenance() -> dict[str, str]:
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU"
    return {
        "command": " ".join(["python benchmarks/requests/run.py", *sys.argv[1:]]),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "versions": f"torch {torch.__version__}, peft {peft.__version__}, python {platform.python_version()}",
    }


def write(document: dict[str, Any], path: Path) -> None:
    with written_whole(path) as file:
        file.write_text(json.dumps(document, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
