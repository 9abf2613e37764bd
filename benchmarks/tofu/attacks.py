"""Every attack on a text that a model has forgotten, by three carriers of one objective, beside gold and the original.

    python benchmarks/tofu/attacks.py --models MODELS --data TOFU --neutral TEXTS

Each model forgets TOFU's forget05 by weighted ascent until the mean answer is as unlikely as unseen ones, and is then
asked in other ways, trained again on 20 and on all 200 of the answers and on as many others, and rounded to 4 bits.
SEMU holds retain answers by the KL to the original, the others by their cross entropy, as weighted ascent has it.
Gold never saw the answers, and goes through the same: only what exceeds its column was still there. A column takes some
four minutes of a CPU core, and six for forgetting; run again, the command goes on with the columns that are missing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from cells import ALL, LORA_8, NATURAL_99, Cell
from machine import TOGETHER, about
from measure import damage, probability, rounded_probability, write
from methods import forget
from subjects import TEMPLATE, Subject, ask_for_folders, evenly, load, read_subject
from torch import nn

from semu_peft.evaluation import prompt_attacks, relearn_text
from semu_peft.objectives import Attacker

SHOTS, SAMPLES = 3, 8
STEPS, AT_ONCE = 20, 20
FEW, MANY = 20, 200  # answers that an attacker has
REFERENCES = ("gold", "doing nothing")
WGA = Cell("WGA", ALL, "both", steps=60, batch_size=20, kept_at_once=20)
CELLS = {
    "SEMU, γ 0.99": replace(WGA, carrier=NATURAL_99, hold="KL", weight=1.0, kl=(0.5,)),
    "LoRA, rank 8": replace(WGA, carrier=LORA_8),
    "all weights": WGA,
}


def attacked(subject: Subject, model: nn.Module, questions: int) -> dict[str, float]:
    """What each attack finds: mean ROUGE-L recalls, and mean probabilities of an answer at the end of relearning."""
    others = subject.retain[SHOTS : SHOTS + MANY]
    asked: Any = {"template": TEMPLATE, "batch_size": 8 * TOGETHER, "progress": False}
    found = prompt_attacks(
        model, subject.tokenizer, evenly(subject.forget, questions), shots=subject.retain[:SHOTS], samples=SAMPLES,
        max_new_tokens=60, **asked,
    ).found  # fmt: skip
    few, many = (
        Attacker("adam", 1e-4, steps=STEPS, forget_examples=number, batch_size=AT_ONCE) for number in (FEW, MANY)
    )
    trained = {
        f"relearnt from {FEW} answers, the others": (subject.forget, None, few),
        "relearnt from all answers, these": (subject.forget, None, many),
        "relearnt from as many others": (others, subject.forget, many),
    }
    curves = {
        name: relearn_text(
            model, subject.tokenizer, train, probes, attacker=attacker, steps=(STEPS,), seed=1_000, **asked
        ).probability
        for name, (train, probes, attacker) in trained.items()
    }
    relearnt = {name: curve[-1] for name, curve in curves.items()}
    at = {"probability": probability(subject, model), "at 4 bits": rounded_probability(subject, model)}
    return {**found, **at, **relearnt}


def lines(table: dict[str, dict[str, float]]) -> list[str]:
    """The table in Markdown, a column a model; of a probability how many times gold's it is, too."""
    names = [name for name in (*REFERENCES, *CELLS) if name in table]
    found = [f"| | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for attack in table["gold"]:
        cells = [_cell(attack, table[name].get(attack), table["gold"][attack]) for name in names]
        found.append(f"| {attack} | {' | '.join(cells)} |")
    return found


def _cell(attack: str, value: float | None, gold: float) -> str:
    if value is None:
        return "–"
    is_probability = attack.startswith(("probability", "at 4 bits", "relearnt"))
    return f"{value:.3f}, {value / gold:.2g}×" if is_probability and value != gold else f"{value:.3f}"


def main() -> None:
    args = _arguments()
    subject = read_subject(args.models, args.data, args.neutral)
    table: dict[str, Any] = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    if (known := table.get("about", {}).get("questions", args.questions)) != args.questions:
        raise SystemExit(
            f"{args.output} has {known} questions, got --questions {args.questions}. Give another `--output`."
        )
    command = shlex.join(["benchmarks/tofu/attacks.py", *sys.argv[1:]])
    table["about"] = {**about(), "questions": args.questions, "command": command}
    original = load(subject.original)
    for name in (*REFERENCES, *CELLS):
        if name in table:
            continue
        row: dict[str, Any] = {}
        model = load(subject.gold) if name == "gold" else original
        if name in CELLS:
            done = forget(subject, CELLS[name], damage=lambda now: damage(subject, original, now))
            model, row = done.go_to("end"), {"steps": done.steps["end"], "seconds": round(done.seconds, 1)}
        found = attacked(subject, model, args.questions)
        table[name] = {**found, **row, "neutral KL": round(damage(subject, original, model), 5)}
        print(name, table[name], flush=True)
        write(args.output, table)
    print("\n".join(lines(table)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask_for_folders(parser)
    parser.add_argument("--questions", type=int, default=60, help="so many of the 200 are asked in other ways")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tofu_attacks.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
