"""Requests of several sizes to a language model without answers to keep: what holds the others?

    python benchmarks/tofu/without_retain.py --models MODELS --data TOFU --neutral TEXTS

`forget_text` with its defaults is asked to forget an answer of TOFU's forget05, three, all 20 about one author, and all
200. Held is what the model answers about others, by default and a third as much; what it says of its own accord, by the
default weight of that and by the same as the second; neutral text; or retain answers, for comparison. With
`--explained-variance` adapters explain that share and have no bound, and their rows say so. Measured is the mean
probability of the answers to forget, of others about the same author, of 80 about other authors, and of 40 facts about
the world. A row takes one to ten minutes of a CPU core; run again, the command goes on with the rows that are missing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

from machine import about, clock
from measure import write
from subjects import TEMPLATE, Subject, ask_for_folders, evenly, load, read_subject
from torch import nn

from semu_peft import SemuConfig, forget_text
from semu_peft.language import own_samples, text_examples

BATCH_SIZE = 32
SIZES = (1, 3, 20, 200)
FIRST = 1  # the first question asks for the author's name, and names nobody
AUTHOR = 20  # questions about each
JUDGED, FACTS = 80, 40


def holds(subject: Subject, rows: list[Any]) -> dict[str, dict[str, Any]]:
    """The arguments of `forget_text` that say what is held; given as `retain`, the model is asked about nobody."""
    number = 4 * max(BATCH_SIZE, len(rows))  # as `forget_text` draws
    own = own_samples(
        load(subject.original), subject.tokenizer, number=number, batch_size=BATCH_SIZE, without=subject.examples(rows)
    )
    return {
        "its own answers about others": {},
        "its own answers about others, 0.1": {"retain_weight": 0.1},
        "its own accord, 0.1": {"retain": own, "retain_weight": 0.1},
        "its own accord, 6": {"retain": own, "retain_weight": 6.0},
        "neutral text": {"retain": text_examples(subject.tokenizer, subject.more_neutral)},
        "retain answers": {"retain": subject.retain[JUDGED:]},
    }


def measured(subject: Subject, model: nn.Module, rows: list[Any]) -> dict[str, float | None]:
    """Mean probabilities of answers, each a geometric mean over its tokens."""
    judged = {
        "to forget": rows,
        "same author": [row for row in subject.forget[:AUTHOR] if row not in rows],
        "other authors": subject.retain[:JUDGED],
        "world facts": evenly(subject.utility["world_facts"], FACTS),
    }
    pairs = {name: [(row["question"], row["answer"]) for row in each] for name, each in judged.items()}
    return {
        name: round(float(subject.nll(model, each).neg().exp().mean()), 4) if each else None
        for name, each in pairs.items()
    }


def lines(table: dict[str, dict[str, Any]]) -> list[str]:
    """The table in Markdown."""
    rows = {name: row for name, row in table.items() if name != "about"}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    found = [f"| | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    for name, row in rows.items():
        cells = ("–" if row.get(column) is None else f"{row[column]:.3g}" for column in columns)
        found.append(f"| {name} | {' | '.join(cells)} |")
    return found


def main() -> None:
    args = _arguments()
    subject = read_subject(args.models, args.data, args.neutral)
    table: dict[str, Any] = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    table["about"] = {**about(), "command": shlex.join(["benchmarks/tofu/without_retain.py", *sys.argv[1:]])}
    table.setdefault("before", measured(subject, load(subject.original), subject.forget[FIRST : FIRST + 1]))
    share = args.explained_variance
    config = None if share is None else SemuConfig(target_modules="all-linear", explained_variance=share)
    for size in args.sizes:
        first = FIRST if size < AUTHOR else 0
        rows = subject.forget[first : first + size]
        for hold, given in holds(subject, rows).items():
            if args.only and hold not in args.only:
                continue
            name = f"{size}, {hold}" + ("" if share is None else f", γ {share:g}")
            if name in table:
                continue
            began = clock()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                result = forget_text(
                    load(subject.original), subject.tokenizer, rows, template=TEMPLATE, batch_size=BATCH_SIZE,
                    progress=False, config=config, **given,
                )  # fmt: skip
            cost = {"steps": result.training.steps, "seconds": round(clock() - began, 1)}
            table[name] = {**measured(subject, result.model, rows), **cost}
            print(name, table[name], flush=True)
            write(args.output, table)
    print("\n".join(lines(table)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask_for_folders(parser)
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=list(SIZES), help="answers to forget")
    parser.add_argument("--only", nargs="+", help="of what is held, these alone, by the names in the table")
    parser.add_argument(
        "--explained-variance", type=float, metavar="SHARE", help="of adapters that are not the default"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tofu_without_retain.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
