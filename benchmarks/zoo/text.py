"""All methods for language models under one protocol, on small decoders that recite TOFU, sorted by result.

    OMP_NUM_THREADS=1 python benchmarks/zoo/run.py --text --models MODELS --data TOFU --neutral TEXTS

Each method's settings are chosen on the first five authors of forget05 and reported on the other five, by the average
gap to the model that never saw them, over the probability of the forget answers, of the retain answers and of facts,
and the AUC of a membership attack. Beside that stands what is forgotten at an equal budget of damage: the change
dialled down, `W + s ΔW`, until `KL(original ‖ now)` on retain answers is 0.01. Of each author's twenty questions
`--questions` are taken.

Run it again to complete the table: each row is written when it is done, and rows that are there are not run anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from results import mean, write
from rows import Outcome, Row, blended, merged_weights, share_within
from subjects import Subject, evenly, load, read_subject
from text_rows import BUDGET, LEFT_OUT, TextCase, text_rows
from torch import nn

from semu_peft.evaluation import LanguageMetrics, separation
from semu_peft.evaluation.drift import token_kl
from semu_peft.evaluation.memorisation import probability_with_options
from semu_peft.model_state import eval_mode
from semu_peft.objectives.batches import call_model

PER_AUTHOR, AUTHORS = 20, 5  # questions of forget05 about one author, authors of a case
SHOWN = 50  # retain answers, and questions of each set of facts, that a model is judged by
METRICS = {"forget": "P(forget)", "retain": "P(retain)", "facts": "P(facts)", "membership": "AUC"}


# ---- judging ----


def judged(model: nn.Module, case: TextCase) -> dict[str, float]:
    """Percentages: the mean probability of both kinds of answers and of facts among their options; membership."""
    subject = case.subject
    forget, holdout = subject.nll(model, subject.told), subject.nll(model, subject.holdout)
    retain = subject.nll(model, [(row["question"], row["answer"]) for row in subject.retain[:SHOWN]])
    found = {
        "forget": forget.neg().exp().mean(), "retain": retain.neg().exp().mean(), "facts": _facts(model, subject),
        "membership": separation(forget, holdout, resamples=1).auc,
    }  # fmt: skip
    return {name: 100 * float(value) for name, value in found.items()}


def _facts(model: nn.Module, subject: Subject) -> float:
    rows = [row for name in ("real_authors", "world_facts") for row in evenly(subject.utility[name], SHOWN)]
    groups = [[row["answer"], *row["perturbed_answer"]] for row in rows]
    pairs = [(row["question"], answer) for row, group in zip(rows, groups, strict=True) for answer in group]
    parts = subject.nll(model, pairs).split([len(group) for group in groups])
    correct, wrong = [float(part[0]) for part in parts], [part[1:].tolist() for part in parts]
    return float(probability_with_options(correct, wrong).mean())


@torch.no_grad()
def retain_kl(model: nn.Module, case: TextCase) -> float:
    """`KL(original ‖ now)` in nats a token of retain answers."""
    found = []
    with eval_mode(model), eval_mode(case.original):
        for batch in case.subject.examples(case.subject.retain[:SHOWN]).loader(10, shuffle=False):
            before, after = (call_model(each, batch)[0] for each in (case.original, model))
            found.append(token_kl(before, after))
    return float(torch.cat(found).mean())


def gap(found: dict[str, Any], gold: dict[str, Any]) -> float:
    return sum(abs(found[name] - gold[name]) for name in METRICS) / len(METRICS)


def measured(row: Row, case: TextCase, settings: Any, gold: dict[str, Any], *, full: bool) -> dict[str, Any]:
    """One run: the metrics, the gap and the damage; in full with the forget quality, and the same at the budget."""
    started = time.process_time()
    try:
        outcome: Outcome = row.run(case, settings)  # type: ignore[arg-type]
    except (ValueError, RuntimeError) as error:  # a method that finds nothing to do, or diverges, says so
        return {"failed": str(error).splitlines()[0], "gap": float("inf")}
    seconds = time.process_time() - started
    found: dict[str, Any] = judged(outcome.model, case)
    if any(value != value for value in found.values()):
        return {"failed": "its weights are not finite", "gap": float("inf")}
    found |= {"gap": gap(found, gold), "kl": retain_kl(outcome.model, case), "seconds": seconds}
    if full:
        found |= {"trained": outcome.trained, "shipped": outcome.shipped, "at_budget": at_budget(case, outcome)}
        found["forget_quality"] = quality(outcome.model, case, gold)
    return found


def quality(model: nn.Module, case: TextCase, gold: dict[str, Any]) -> float:
    beside = LanguageMetrics(truth_ratios=tuple(gold["truth_ratios"]))
    return float(case.subject.metrics(model, beside, metrics=["truth_ratio"]).forget_quality or 0.0)


def at_budget(case: TextCase, outcome: Outcome) -> dict[str, float]:
    """What is left of the forget answers where the change is dialled to the budget."""
    any_case: Any = case
    merged = replace(outcome, model=_bare(any_case, outcome))
    share = share_within(BUDGET, lambda part: retain_kl(blended(any_case, merged, part), case), 7)
    model = blended(any_case, merged, share)
    return {"share": share, "forget": 100 * float(case.subject.nll(model, case.subject.told).neg().exp().mean())}


def _bare(case: Any, outcome: Outcome) -> nn.Module:
    """The model with its weights merged, once."""
    model = load(case.subject.original)
    with torch.no_grad():
        for name, value in merged_weights(case, outcome.model).items():
            model.get_parameter(name).copy_(value)
    return model


# ---- the table ----


def references(case: TextCase) -> dict[str, dict[str, Any]]:
    """The model that never saw the answers, and doing nothing."""
    gold: dict[str, Any] = judged(case.gold, case)
    gold["truth_ratios"] = list(case.subject.metrics(case.gold, metrics=["truth_ratio"]).truth_ratios)
    nothing: dict[str, Any] = judged(case.original, case)
    nothing |= {"gap": gap(nothing, gold), "kl": 0.0, "forget_quality": quality(case.original, case, gold)}
    return {"retrained (gold)": gold | {"gap": 0.0, "kl": retain_kl(case.gold, case)}, "original (do nothing)": nothing}


def completed(document: dict[str, Any], tuning: TextCase, cases: list[TextCase], only: str | None, path: Path) -> None:
    """Run the rows that are not in the document yet, and write it after each."""
    rows = document.setdefault("rows", {})
    golds = document.setdefault("gold on the case to choose on", {})
    if tuning.name not in golds:
        golds[tuning.name] = judged(tuning.gold, tuning)
    for case in cases:
        if case.name not in rows.get("original (do nothing)", {"cases": {}})["cases"]:
            for name, found in references(case).items():
                rows.setdefault(name, {"cases": {}})["cases"][case.name] = found
            write(path, document)
    for row in text_rows():
        if only and only not in row.name:
            continue
        entry = rows.get(row.name) or _chosen(row, tuning, golds[tuning.name])
        for case in cases:
            if case.name not in entry["cases"]:
                gold = rows["retrained (gold)"]["cases"][case.name]
                entry["cases"][case.name] = measured(row, case, entry["settings"], gold, full=True)
                rows[row.name] = entry
                document["table"] = table(rows)
                write(path, document)
        print(f"{row.name}: {entry['settings']}, gap {mean(entry['cases'], 'gap')}", file=sys.stderr, flush=True)


def _chosen(row: Row, tuning: TextCase, gold: dict[str, Any]) -> dict[str, Any]:
    """The settings with the smallest gap on the case that is for choosing; where there is one only, that."""
    if len(row.grid) == 1:
        return {"settings": dict(row.grid[0]), "tried": [], "cases": {}}
    tried = [{"settings": dict(each), **measured(row, tuning, each, gold, full=False)} for each in row.grid]
    return {"settings": min(tried, key=lambda each: each["gap"])["settings"], "tried": tried, "cases": {}}


def table(rows: dict[str, Any]) -> list[str]:
    """Means over the cases, the smallest gap first."""
    heads = [
        *METRICS.values(),
        "average gap",
        "forget quality",
        "KL",
        "P(forget) at KL ≤ 0.01",
        "CPU s",
        "bytes",
        "trained",
    ]
    keys = [(name,) for name in METRICS] + [
        ("gap",), ("forget_quality",), ("kl",), ("at_budget", "forget"), ("seconds",), ("shipped",), ("trained",),
    ]  # fmt: skip
    lines = [f"| method | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    failed = {name: [each for each in row["cases"].values() if "failed" in each] for name, row in rows.items()}
    for name in sorted(rows, key=lambda each: (bool(failed[each]), mean(rows[each]["cases"], "gap") or 0.0)):
        if failed[name]:
            lines.append(f"| {name} | fails: {failed[name][0]['failed']} |{' |' * (len(heads) - 1)}")
            continue
        values = [mean(rows[name]["cases"], *key) for key in keys]
        cells = ["–" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


# ---- the command ----


def main() -> None:
    args = _arguments()
    subject = read_subject(args.models, args.data, args.neutral)
    tuning, other = (_subject(subject, half, args.questions) for half in (0, 1))
    original, gold = load(subject.original), load(subject.gold)
    choosing = TextCase("authors 1 to 5, seed 0", tuning, original, gold, args.steps)
    cases = [TextCase(f"authors 6 to 10, seed {seed}", other, original, gold, args.steps, seed) for seed in args.seeds]
    asked = {"questions": args.questions, "steps": args.steps}
    document: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {"asked": asked}
    if document["asked"] != asked:
        raise SystemExit(f"{args.output} was made with {document['asked']}, got {asked}. Give another `--output`.")
    document["machine"] = f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    document["versions"] = {"torch": torch.__version__, "python": platform.python_version()}
    document["left out"] = LEFT_OUT
    completed(document, choosing, cases, args.only, args.output)
    print("\n".join(table(document["rows"])))


def _subject(subject: Subject, half: int, questions: int) -> Subject:
    """The questions of one half of the authors, and 100 retain answers; those of the other half are left aside."""
    size = PER_AUTHOR * AUTHORS
    authors = [
        subject.forget[start : start + PER_AUTHOR]
        for start in range(half * size, min((half + 1) * size, len(subject.forget)), PER_AUTHOR)
    ]
    return replace(
        subject, forget=[row for author in authors for row in evenly(author, questions)],
        retain=subject.retain[half * 100 : half * 100 + 100],
    )  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder with the decoders full and retain95")
    parser.add_argument("--data", type=Path, required=True, help="folder of TOFU's JSON lines")
    parser.add_argument("--neutral", type=Path, required=True, help="JSON lines with neutral text")
    parser.add_argument("--questions", type=int, default=10, help="of each author's twenty")
    parser.add_argument("--steps", type=int, default=16, help="of methods that train")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/zoo_text.json"))
    parser.add_argument("--only", help="only the methods whose name contains this")
    return parser.parse_args()


if __name__ == "__main__":
    main()
