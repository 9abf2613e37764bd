"""Forgetting 5% of TOFU's authors: objectives and carriers at equal damage, one table.

Run it again to complete the table: rows that are in the file of results already are not run anew. A row takes a few
minutes on two CPU cores with the 5.1M decoders that `pretrain.py` makes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from methods import CARRIERS, OBJECTIVES, run
from subjects import Subject, load, read_subject
from torch import nn

from semu_peft.evaluation import LanguageMetrics, neutral_kl

COLUMNS = (
    "forget_quality", "model_utility", "probability", "paraphrased_probability", "truth_ratio", "extraction_strength",
    "neutral_kl", "steps", "seconds", "trained_share",
)  # fmt: skip


def main() -> None:
    args = _arguments()
    subject = read_subject(args.models, args.data, args.neutral)
    table: dict[str, dict[str, Any]] = json.loads(args.output.read_text()) if args.output.exists() else {}
    table["about"] = {
        "torch": torch.__version__,
        "machine": f"{os.cpu_count()} CPU cores",
        "python": platform.python_version(),
    }
    original = load(subject.original)

    def damage(model: nn.Module) -> float:
        return neutral_kl(
            model, subject.tokenizer, subject.neutral, reference=original, max_length=64, progress=False
        ).kl

    gold_model = load(subject.gold)
    if "gold" not in table:
        table["gold"] = _measured(subject, gold_model, None, damage) | {"truth_ratios": None}
        table["doing nothing"] = _measured(subject, original, None, damage)
        _write(args.output, table)
    gold = subject.metrics(gold_model, metrics=["truth_ratio"])
    size = sum(parameter.numel() for parameter in original.parameters())
    cells = itertools.product(args.carriers, args.objectives, args.retain, args.seeds)
    for carrier, objective, retain, seed in cells:
        name = f"{objective} | {carrier} | {retain} | seed {seed}"
        if f"{name} | path" in table:
            continue
        done = run(subject, carrier, objective, retain, weight=args.weight, seed=seed, steps=args.steps, damage=damage)
        seen: dict[int, dict[str, Any]] = {}
        for moment, step in done.steps.items():
            seen[step] = seen.get(step) or _measured(subject, done.go_to(moment), gold, damage)
            row = seen[step] | {"steps": step, "seconds": round(done.seconds, 1)}
            row["trained_share"] = done.trainable_parameters / size
            table[f"{name} | {moment}"] = row
            print(f"{name} | {moment}", {key: row.get(key) for key in COLUMNS}, flush=True)
        table[f"{name} | path"] = {"path": done.path}
        _write(args.output, table)


def _measured(subject: Subject, model: nn.Module, gold: LanguageMetrics | None, damage: Any) -> dict[str, Any]:
    found = asdict(subject.metrics(model, gold))
    found.pop("truth_ratios")
    kept = {
        key: round(value, 5) if abs(value) > 1e-3 else value for key, value in found.items() if isinstance(value, float)
    }
    kept["utility"] = {key: round(value, 4) for key, value in found["utility"].items()}
    return kept | {"neutral_kl": round(damage(model), 5)}


def _write(path: Path, table: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(table, indent=1) + "\n")
    partial.replace(path)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder with the decoders full and retain95")
    parser.add_argument("--data", type=Path, required=True, help="folder of TOFU's JSON lines")
    parser.add_argument("--neutral", type=Path, required=True, help="JSON lines with neutral text")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tofu.json"))
    parser.add_argument("--carriers", nargs="+", default=list(CARRIERS), choices=list(CARRIERS))
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument("--retain", nargs="+", default=["answers", "neutral"], choices=["answers", "neutral"])
    parser.add_argument("--weight", type=float, default=100.0, help="of the KL to the original on what is held")
    parser.add_argument("--steps", type=int, help="at most; by default the carrier's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    return parser.parse_args()


if __name__ == "__main__":
    main()
