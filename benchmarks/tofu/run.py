"""Forgetting 5% of TOFU's authors: objectives and carriers at equal damage, one table.

Run it again to complete the table: rows that are in the file of results already are not run anew, and the measures of
gold and of the original are taken once. A row takes some fifteen minutes of one CPU core with the 5.1M decoders that
`pretrain.py` makes, half a minute of them for each moment that is measured.

Model utility is over `--utility-rows` of each of its three sets. The attacks, relearning after 20 steps on 20 forget
answers and rounding to 4 bits, are on the model at the end of its run; `--attack-all` has them at each moment.
`--repair 60` goes on with 60 steps of `methods.repair`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from measure import Judge, write
from methods import CARRIERS, OBJECTIVES, RETAIN, run
from subjects import Subject, load, read_subject

COLUMNS = {
    "forget_quality": "forget quality", "model_utility": "utility", "probability": "P(answer)",
    "paraphrased_probability": "paraphrased", "truth_ratio": "truth ratio", "extraction_strength": "extraction",
    "privacy_leakage": "PrivLeak %", "neutral_kl": "neutral KL", "relearnt_others": "relearnt, others",
    "relearnt_all": "relearnt, all", "relearnt_over_gold": "over gold", "probability_4bit": "P at 4 bits",
    "steps": "steps", "trained_share": "trained", "seconds": "CPU s",
}  # fmt: skip
REFERENCES = ("gold", "doing nothing")


def main() -> None:
    args = _arguments()
    subject = read_subject(args.models, args.data, args.neutral, utility_rows=args.utility_rows or None)
    table: dict[str, dict[str, Any]] = json.loads(args.output.read_text()) if args.output.exists() else {}
    judge = _judge(subject, table, args)
    write(args.output, table)
    size = sum(parameter.numel() for parameter in judge.original.parameters())
    cells = itertools.product(args.carriers, args.objectives, args.retain, args.seeds)
    for carrier, objective, retain, seed in cells:
        last = "repaired" if args.repair else "end"
        name = f"{objective} | {carrier} | {retain} | seed {seed}"
        if f"{name} | {last}" in table:
            continue
        done = run(
            subject, carrier, objective, retain, weight=args.weight, seed=seed, steps=args.steps, repair=args.repair,
            damage=judge.damage,
        )  # fmt: skip
        seen: dict[int, dict[str, Any]] = {}
        for moment, step in sorted(done.steps.items(), key=lambda each: each[0] != last):  # the last first: attacked
            if step not in seen:
                seen[step] = judge.row(done.go_to(moment), attacks=args.attack_all or moment == last)
            cost = {"steps": step, "seconds": round(done.seconds, 1)}
            row = {**seen[step], **cost, "trained_share": done.trainable_parameters / size}
            table[f"{name} | {moment}"] = row
            print(f"{name} | {moment}", {key: row.get(key) for key in COLUMNS}, flush=True)
        table[f"{name} | path"] = {"path": done.path}
        write(args.output, table)
    print("\n".join(lines(table)))


def _judge(subject: Subject, table: dict[str, dict[str, Any]], args: argparse.Namespace) -> Judge:
    """The judge with gold's row, and both references in the table, from there where they are in it already."""
    about = {"torch": torch.__version__, "machine": f"{os.cpu_count()} CPU cores", "python": platform.python_version()}
    asked = {"questions": len(subject.forget), "utility_rows": args.utility_rows}
    known = table.get("about", {})
    if "gold" in table and {key: known.get(key) for key in asked} != asked:
        raise SystemExit(
            f"{args.output} was made with {known}, and {asked} is asked for. Give another `--output`, or the same."
        )
    table["about"] = {**about, **asked}
    judge = Judge(subject, load(subject.original))
    if "gold" not in table:
        table["gold"] = judge.reference(load(subject.gold))
    judge = Judge(subject, judge.original, table["gold"])
    if "doing nothing" not in table:
        table["doing nothing"] = judge.row(judge.original)
    return judge


def lines(table: dict[str, dict[str, Any]]) -> list[str]:
    """The table in Markdown: the references, then the best forget quality first."""
    names = [name for name in table if name != "about" and not name.endswith("| path")]
    names.sort(key=lambda name: (name not in REFERENCES, -(table[name].get("forget_quality") or 0.0)))
    found = [f"| | {' | '.join(COLUMNS.values())} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    for name in names:
        cells = [_cell(table[name].get(column)) for column in COLUMNS]
        found.append(f"| {name.replace(' | ', ', ')} | {' | '.join(cells)} |")
    return found


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder with the decoders full and retain95")
    parser.add_argument("--data", type=Path, required=True, help="folder of TOFU's JSON lines")
    parser.add_argument("--neutral", type=Path, required=True, help="JSON lines with neutral text")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tofu.json"))
    parser.add_argument("--carriers", nargs="+", default=list(CARRIERS), choices=list(CARRIERS))
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument("--retain", nargs="+", default=list(RETAIN), choices=list(RETAIN))
    parser.add_argument("--weight", type=float, help="of what is held, by default the objective's")
    parser.add_argument("--steps", type=int, help="at most; by default the carrier's")
    parser.add_argument("--repair", type=int, default=0, help="steps of `methods.repair` behind it")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--utility-rows", type=int, default=100, help="of each set of model utility; 0 for all")
    parser.add_argument("--attack-all", action="store_true", help="attack the model at every moment, not the last")
    return parser.parse_args()


if __name__ == "__main__":
    main()
