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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from machine import DEVICE, about, clock
from results import gap, mean, write
from rows import Outcome, Row, blended, merged_weights, share_within
from schedule import GOLD, NOTHING, Plan, Run, complete, told, whole
from subjects import Subject, ask_for_folders, evenly, load, read_subject
from text_rows import BUDGET, LEFT_OUT, TextCase, text_rows
from torch import nn

from semu_peft.evaluation import LanguageMetrics, separation
from semu_peft.evaluation.drift import token_kl
from semu_peft.evaluation.memorisation import probability_with_options
from semu_peft.model_state import eval_mode
from semu_peft.objectives.tokens import call_model

PER_AUTHOR, AUTHORS = 20, 5  # questions of forget05 about one author, authors of a case
SHOWN = 50  # retain answers, and questions of each set of facts, that a model is judged by
SECONDS = "GPU seconds" if DEVICE.type == "cuda" else "seconds"  # which are not to be averaged with one another
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
        for given in case.subject.examples(case.subject.retain[:SHOWN]).loader(10, shuffle=False):
            batch = send_to_device(given, DEVICE)
            before, after = (call_model(each, batch)[0] for each in (case.original, model))
            found.append(token_kl(before, after))
    return float(torch.cat(found).mean())


def measured(row: Row, case: TextCase, settings: Any, gold: Mapping[str, Any], *, full: bool) -> dict[str, Any]:
    """One run: the metrics, the gap and the damage; in full with the forget quality, and the same at the budget."""
    started = clock()
    try:
        outcome: Outcome = row.run(case, settings)  # type: ignore[arg-type]
    except torch.OutOfMemoryError:  # which is the machine's fault
        raise
    except (ValueError, RuntimeError) as error:  # a method that finds nothing to do, or diverges, says so
        return {"failed": str(error).splitlines()[0], "gap": float("inf")}
    seconds = clock() - started
    found: dict[str, Any] = judged(outcome.model, case)
    if any(value != value for value in found.values()):
        return {"failed": "its weights are not finite", "gap": float("inf")}
    found |= {"gap": gap(found, gold, METRICS), "kl": retain_kl(outcome.model, case), SECONDS: seconds}
    if full:
        found |= {"trained": outcome.trained, "shipped": outcome.shipped, "at_budget": at_budget(case, outcome)}
        found["forget_quality"] = quality(outcome.model, case, gold)
    return found


def quality(model: nn.Module, case: TextCase, gold: Mapping[str, Any]) -> float:
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
    nothing |= {"gap": gap(nothing, gold, METRICS), "kl": 0.0, "forget_quality": quality(case.original, case, gold)}
    return {GOLD: gold | {"gap": 0.0, "kl": retain_kl(case.gold, case)}, NOTHING: nothing}


def table(rows: dict[str, Any]) -> list[str]:
    """Means over the cases, the smallest gap first; of seconds over those that were run on a CPU."""
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
        timed = {case: each for case, each in rows[name]["cases"].items() if "seconds" in each}
        values = [mean(timed if key == ("seconds",) else rows[name]["cases"], *key) for key in keys]
        cells = ["–" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


# ---- the command ----


@dataclass(frozen=True)
class Asked:
    """What every process has to know.

    Attributes:
        models: Folder of the decoders.
        data: Folder of TOFU's JSON lines.
        neutral: File of neutral texts.
        questions: Of each author's twenty.
        steps: Of methods that train.
    """

    models: Path
    data: Path
    neutral: Path
    questions: int
    steps: int


HALVES = ("authors 1 to 5", "authors 6 to 10")


def made(asked: Asked, run: Run) -> dict[str, Any]:
    """A run of the table."""
    torch.set_num_threads(1)
    case = kept(asked, *run.key)
    if run.row is None:
        return references(case)
    row = next(row for row in text_rows() if row.name == run.row)
    assert run.gold is not None
    return measured(row, case, run.settings, run.gold, full=run.full)


@lru_cache
def kept(asked: Asked, half: int, seed: int) -> TextCase:
    """The case, kept for the next run."""
    subject, original, gold = _read(asked)
    own = _subject(subject, half, asked.questions)
    return TextCase(f"{HALVES[half]}, seed {seed}", own, original, gold, asked.steps, seed)


@lru_cache
def _read(asked: Asked) -> tuple[Subject, nn.Module, nn.Module]:
    subject = read_subject(asked.models, asked.data, asked.neutral)
    return subject, load(subject.original), load(subject.gold)


def main() -> None:
    args = _arguments()
    asked = Asked(args.models, args.data, args.neutral, args.questions, args.steps)
    keys = {
        f"{HALVES[half]}, seed {seed}": (half, seed) for half, seed in [(0, 0), *((1, each) for each in args.seeds)]
    }
    wanted = [row for row in text_rows() if not args.only or args.only in row.name]
    plan = Plan(wanted, f"{HALVES[0]}, seed 0", keys)
    size = {"questions": args.questions, "steps": args.steps}
    document: dict[str, Any] = (
        json.loads(args.output.read_text()) if args.output.exists() else {"asked": size, "rows": {}}
    )
    if document["asked"] != size:
        raise SystemExit(f"{args.output} was made with {document['asked']}, got {size}. Give another `--output`.")
    told_by = about(args.workers)
    document.setdefault("machines", {})[SECONDS] = f"{told_by['machine']}, {told_by['seconds']}"
    document["versions"] = {key: told_by[key] for key in ("torch", "python")}
    document["left out"] = LEFT_OUT

    def done() -> None:
        document["table"] = table(whole(document, plan))
        write(args.output, document)

    complete(document, plan, partial(made, asked), done=done, workers=args.workers, seconds=args.seconds)
    told(document, plan)
    print("\n".join(table(whole(document, plan))))


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
    ask_for_folders(parser)
    parser.add_argument("--questions", type=int, default=10, help="of each author's twenty")
    parser.add_argument("--steps", type=int, default=16, help="of methods that train")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/zoo_text.json"))
    parser.add_argument("--workers", type=int, default=1, help="processes side by side")
    parser.add_argument("--seconds", type=float, help="begin no run that would not be done by then")
    parser.add_argument("--only", help="only the methods whose name contains this")
    return parser.parse_args()


if __name__ == "__main__":
    main()
