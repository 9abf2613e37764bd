"""How deep a class is forgotten, and what that costs: damage against steps of relearning, beside the retrained model.

    OMP_NUM_THREADS=1 python benchmarks/deep_forgetting.py                     # scikit-learn's digits, a few minutes
    python benchmarks/deep_forgetting.py --data DIR --models runs/cifar10 --classes 0 3 8 --seeds 0 --workers 8

The second is CIFAR-10 with the ResNet-14 of the class benchmark (`cifar10/run.py` makes it): some minutes of a GPU, an
hour or two a row of a CPU core. `--networks` has one of twice the width, for four times as long, and two for less, of
half the blocks and without shortcuts. Struck-out distillation at the weights alone, and under simulated relearning by
several attackers, with several weights of the retain KL and several margins.

Five attackers, none with an image or a seed of the simulation: SGD at two rates, Adam, the head alone, and SGD on
inputs that are varied. *simulated* knows SGD at one of the rates, *several* Adam too; the other two kinds nobody does.
Forget and retain images are split in two: the first half is for unlearning, the other for the attackers.

The goal, a subject: a gap of at most 0.5 to the retrained model over UA, RA, TA and MIA, and under each of the five no
faster back than in half of its steps. Rows come in the order of what they are likely to show; missing models are
trained first, all at once. A run that was interrupted, or that `--seconds` ended, goes on where it was, if it is asked
for the same: finished rows are in the result file's `.partial`. For answers of language models:
`tofu/deep_forgetting.py`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import platform
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import peft
import torch
from peft import get_peft_model
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # also where this file is read by another's import
from deep_subjects import DEVICE, Asked, Network, Subject, batches, subject_of, training_begun
from side_by_side import side_by_side

from semu_peft import NaturalGradient, Retain, SemuConfig, initialize_semu_weights, unlearn
from semu_peft.evaluation import RelearningCurve, evaluate_forgetting, predict
from semu_peft.evaluation.knowledge import accuracy
from semu_peft.files import written_whole
from semu_peft.objectives import Attacker, CrossEntropy, DecoupledDistillation, KLToOriginal, SimulatedRelearning
from semu_peft.objectives.attackers import Relearner
from semu_peft.objectives.examples import Examples

SHOWN = (0, 5, 10, 20, 50, 100, 200)
SIMULATION_SEED, ATTACK_SEED = 0, 1_000
METRICS = ("unlearning_accuracy", "retain_accuracy", "test_accuracy", "membership_inference")
GAP, SHARE = 0.5, 0.5  # the goal: of gold, in points, and of gold's steps
AT_ONCE = 4096  # examples that are measured together


@dataclass(frozen=True)
class Way:
    """How a row's model is made.

    Attributes:
        kl_weight: Of the KL to the original on retain data; None does without.
        frees_class: Whether that KL is of the other classes among themselves, so that the forgotten one need not stay
            as likely on retain images as it was: gold never answers it.
        label_weight: Of the cross entropy of the retain labels beside it; None does without.
        margin: By which the struck logit is raised.
        attackers: Who is simulated, see `Subject`; None simulates nobody.
        weight: Of the objective at the weights that attackers make.
        length: Times the subject's steps.
        size: Of the forget batches; retain batches have twice as many where these are larger than usual.
        subspace: Chosen by the gradient of the plain objective, or of the simulated one.
        has_more: Whether the subspace holds a higher share of the gradient's energy.
        is_by_factors: Whether the curvature is two factors a layer, with shorter steps, instead of one matrix.
    """

    kl_weight: float | None = None
    margin: float = 0.0
    frees_class: bool = field(default=False, kw_only=True)
    label_weight: float | None = field(default=None, kw_only=True)
    attackers: Literal["simulated", "several"] | None = None
    weight: float = 1.0
    length: int = 1
    size: int = 256
    subspace: Literal["plain", "simulated"] = "plain"
    has_more: bool = False
    is_by_factors: bool = False


def several(kl_weight: float, **settings: Any) -> Way:
    """Attackers of two kinds and four lengths in turn, larger batches and three times the steps."""
    return Way(kl_weight, **{"margin": 3.0, "attackers": "several", "length": 3, "size": 512, **settings})


GOLD, NOTHING = "retrained (gold)", "original (do nothing)"
WAYS = {
    "several, KL × 10 of the other classes and labels, margin 3": several(10.0, frees_class=True, label_weight=1.0),
    "several, retain KL × 10, margin 3": several(10.0),
    "struck-out distillation": Way(),
    "several, KL × 20 of the other classes and labels, margin 3": several(20.0, frees_class=True, label_weight=2.0),
    "several, KL × 10 of the other classes, margin 3": several(10.0, frees_class=True),
    "several, retain KL × 10 and labels, margin 3": several(10.0, label_weight=1.0),
    "several, retain KL × 15, margin 3": several(15.0),
    "several, KL × 10 of the other classes and labels, margin 3, 80 steps": several(
        10.0, frees_class=True, label_weight=1.0, length=2
    ),
    "several, KL × 10 of the other classes and labels, margin 3, larger subspace": several(
        10.0, frees_class=True, label_weight=1.0, has_more=True
    ),
    "simulated, retain KL × 10, margin 3": Way(10.0, 3.0, "simulated"),
    "several, retain KL × 30, margin 3": several(30.0),
    "several, retain KL × 10, margin 3, factors": several(10.0, is_by_factors=True),
    "several, retain KL × 10, margin 3, simulated subspace": several(10.0, subspace="simulated"),
    "several, retain KL × 10, margin 3, larger subspace": several(10.0, has_more=True),
    "several × 3, retain KL × 30, margin 3": several(30.0, weight=3.0),
    "several, retain KL × 3, margin 3": several(3.0),
    "several, retain KL × 10, margin 6": several(10.0, margin=6.0),
    "simulated, retain KL × 30, margin 3": Way(30.0, 3.0, "simulated"),
    "simulated, retain KL × 10, margin 0": Way(10.0, 0.0, "simulated"),
    "struck-out, retain KL × 10, margin 3": Way(10.0, 3.0),
    "simulated, no retain KL, margin 3": Way(None, 3.0, "simulated"),
    "simulated, retain KL × 3, margin 3": Way(3.0, 3.0, "simulated"),
    "simulated, retain KL × 3, margin 0": Way(3.0, 0.0, "simulated"),
    "simulated, retain KL × 30, margin 0": Way(30.0, 0.0, "simulated"),
}


# ---- rows ----


def row(task: tuple[Asked, str]) -> dict[str, Any]:
    """A row of the table: the model of this way, measured and attacked."""
    torch.set_num_threads(1)
    asked, way = task
    subject = kept(asked)
    started = time.perf_counter()
    model, trained = (subject.original, 0) if way == NOTHING else (subject.gold, 0)
    if way in WAYS:
        model, trained = unlearned(subject, WAYS[way])
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    made = measured(subject, model, trained, time.perf_counter() - started)
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()  # other processes are on the card
    return made


@lru_cache(maxsize=6)
def kept(asked: Asked) -> Subject:
    """The subject, kept for the next row."""
    return subject_of(asked)


def unlearned(subject: Subject, way: Way) -> tuple[nn.Module, int]:
    """The model of a way, merged, and how many numbers were trained."""
    own_forget, own_retain = subject.halves(subject.forget)[0], subject.halves(subject.retain)[0]
    forget = batches(own_forget, way.size)
    retain = batches(own_retain, way.size if way.size == Way.size else 2 * way.size)
    gamma = subject.more if way.has_more else subject.gamma
    config = SemuConfig(target_modules=subject.targets, explained_variance=gamma)
    model = get_peft_model(copy.deepcopy(subject.original), config)
    plain: Any = DecoupledDistillation(margin=way.margin)
    objective, chooser = plain, DecoupledDistillation()
    if way.attackers is not None:
        # Of one batch each it is fast to draw.
        known, pools = getattr(subject, way.attackers), ([own_forget], [own_retain])
        simulated: dict[str, Any] = {"weight": way.weight, "copies": 4, "seed": SIMULATION_SEED}
        objective = SimulatedRelearning(plain, *pools, known, **simulated)
        if way.subspace == "simulated":
            chooser = SimulatedRelearning(chooser, *pools, known, **simulated)
    initialize_semu_weights(model, forget, chooser, progress=False)
    steps, held = way.length * subject.steps, []
    if way.kl_weight is not None:
        others = KLToOriginal(without=[subject.index] if way.frees_class else [])
        held.append(Retain(retain, others, way.kl_weight))
    if way.label_weight is not None:
        held.append(Retain(retain, CrossEntropy(), way.label_weight))
    result = unlearn(
        model, forget, objective, retain=held or None,
        optimizer=NaturalGradient(patience=steps, curvature="kronecker" if way.is_by_factors else "auto"),
        max_steps=steps, progress=False,
    )  # fmt: skip
    return model.merge_and_unload(), result.trainable_parameters


def measured(subject: Subject, model: nn.Module, trained: int, seconds: float) -> dict[str, Any]:
    """The metrics, and the curve of every attacker."""
    on_forget, on_retain = (batches(side, AT_ONCE) for side in (subject.forget_test, subject.retain_test))
    attacks = {attacker.label: told(attacked(subject, model, attacker)) for attacker in subject.attackers}
    judged = evaluate_forgetting(
        model, batches(subject.forget, AT_ONCE), batches(subject.retain, AT_ONCE), on_retain, forgotten_test=on_forget,
        progress=False,
    )  # fmt: skip
    return {
        "metrics": {name: getattr(judged, name) for name in METRICS},
        "unlearning accuracy": 100 - predict(model, on_forget, progress=False).accuracy,
        "test accuracy": predict(model, on_retain, progress=False).accuracy,
        "trained": trained,
        "seconds": seconds,
        "attacks": attacks,
    }


def attacked(subject: Subject, model: nn.Module, attacker: Attacker) -> RelearningCurve:
    """The curve of an attacker, as `relearning` gives it; the rest is looked at only where the curve asks for it.

    That is at both ends, and where half of the class is back: there the attack counts only if the rest was held.
    """
    forget, retain = (Examples([subject.halves(side)[1]]) for side in (subject.forget, subject.retain))
    on_forget, on_retain = (batches(side, AT_ONCE) for side in (subject.forget_test, subject.retain_test))
    at = [step for step in (*range(0, 20), *range(20, 401, 5)) if step <= attacker.steps]
    relearner = Relearner(model, attacker, forget, retain, CrossEntropy(), torch.Generator().manual_seed(ATTACK_SEED))
    looks = iter(at)

    def known(changed: nn.Module) -> tuple[float, float]:
        step = next(looks)
        if not torch.stack([value.isfinite().all() for value in relearner.values]).all():
            return 0.0, 0.0  # the attack has diverged
        of_forget = accuracy(changed, on_forget)
        is_asked = of_forget >= RelearningCurve.half or step in (at[0], at[-1])
        return of_forget, accuracy(changed, on_retain) if is_asked else math.nan

    of_forget, of_retain = zip(*relearner.curve(at, known), strict=True)
    return RelearningCurve(attacker.label, tuple(at), of_forget, of_retain)


def told(curve: RelearningCurve) -> dict[str, Any]:
    """What is written of a curve."""
    return {
        "steps to half": curve.steps_to_half,
        "of steps": curve.steps[-1],
        "area": curve.area,
        "retained at the end": curve.retain[-1],
        "curve": {step: known for step, known in zip(curve.steps, curve.forget, strict=True) if step in SHOWN},
    }


# ---- the table ----

Rows = dict[str, dict[str, dict[str, Any]]]


def table(rows: Rows) -> list[str]:
    """Means over the subjects, and how many of them reach the goal.

    A cell of an attacker: the steps to half, in brackets the least share of gold's over the subjects, and what is
    retained at the end.
    """
    gold = rows[GOLD]
    names = list(next(iter(gold.values()))["attacks"])
    lines = [
        f"| way | UA | TA | gap (worst) | {' | '.join(names)} | held | goal | trained | seconds |",
        f"| --- | --- | --- | --- | {' | '.join('---' for _ in names)} | --- | --- | --- | --- |",
    ]
    for way, found in rows.items():
        pairs = [(row, gold[subject]) for subject, row in found.items() if subject in gold]
        if not pairs:
            continue
        each, gaps = [row for row, _ in pairs], [gap(*pair) for pair in pairs]
        held = [sum(share(*pair, name) >= SHARE for name in names) for pair in pairs]
        goal = sum(far <= GAP and count == len(names) for far, count in zip(gaps, held, strict=True))
        cells = [
            f"{mean([reached(row['attacks'][name]) for row in each]):.0f} "
            f"({min(share(*pair, name) for pair in pairs):.2f}; "
            f"{mean([row['attacks'][name]['retained at the end'] for row in each]):.1f})"
            for name in names
        ]
        lines.append(
            f"| {way} | {mean([row['unlearning accuracy'] for row in each]):.1f} | "
            f"{mean([row['test accuracy'] for row in each]):.1f} | {mean(gaps):.2f} ({max(gaps):.2f}) | "
            f"{' | '.join(cells)} | {sum(held)} of {len(pairs) * len(names)} | {goal} of {len(pairs)} | "
            f"{mean([row['trained'] for row in each]):.0f} | {mean([row['seconds'] for row in each]):.1f} |"
        )
    return lines


def verdicts(rows: Rows) -> list[str]:
    """A line a way and subject: the gap, and of each attacker the share of gold's steps."""
    gold = rows[GOLD]
    names = list(next(iter(gold.values()))["attacks"])
    lines = [f"| way | subject | gap | {' | '.join(names)} | goal |", f"| {' | '.join(['---'] * (len(names) + 4))} |"]
    for way, found in rows.items():
        for subject, row in found.items():
            if subject in gold:
                shares, far = [share(row, gold[subject], name) for name in names], gap(row, gold[subject])
                cells = " | ".join(f"{each:.2f}" for each in shares)
                said = "met" if far <= GAP and min(shares) >= SHARE else "missed"
                lines.append(f"| {way} | {subject} | {far:.2f} | {cells} | {said} |")
    return lines


def gap(row: dict[str, Any], gold: dict[str, Any]) -> float:
    """The mean distance to gold over UA, RA, TA and MIA."""
    return mean([abs(row["metrics"][name] - gold["metrics"][name]) for name in METRICS])


def share(row: dict[str, Any], gold: dict[str, Any], name: str) -> float:
    """The steps of an attacker over those with gold."""
    return reached(row["attacks"][name]) / max(reached(gold["attacks"][name]), 1)


def reached(attack: dict[str, Any]) -> float:
    """Steps to half; where it never came back, those that were tried."""
    steps: float | None = attack["steps to half"]
    return attack["of steps"] if steps is None else steps  # type: ignore[no-any-return]


def mean(values: list[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


# ---- the run ----


def main() -> None:
    arguments = _arguments()
    subjects = _subjects(arguments)
    path = arguments.output / f"deep_forgetting_{'digits' if arguments.data is None else 'cifar10'}.json"
    temporary = path.with_suffix(".partial")
    models = None if arguments.data is None else str(arguments.models)
    asked = {"classes": arguments.classes, "seeds": arguments.seeds, "models": models}
    asked |= {} if arguments.networks == ["ResNet-14"] else {"networks": arguments.networks}
    asked |= {"smoke": True} if arguments.smoke else {}
    begun = resumed(temporary, asked)
    rows: Rows = begun["rows"]
    chosen = [way for way in WAYS if not arguments.only or any(asks_for(each, way) for each in arguments.only)]
    names = [GOLD, *chosen[:3], NOTHING, *chosen[3:]]
    tasks = [(subject, way) for way in names for subject in subjects if subject.name not in rows.get(way, {})]
    document = {"command": " ".join(["python benchmarks/deep_forgetting.py", *sys.argv[1:]]), "asked": asked}
    document |= {"workers": arguments.workers, **_environment()}
    needs_models = bool(tasks) and arguments.data is not None and not arguments.smoke
    with training_begun(subjects) if needs_models else nullcontext():
        made_rows = side_by_side(row, tasks, arguments.workers, arguments.seconds, kind=lambda task: task[1])
        for (subject, way), made, error, seconds in made_rows:
            if error:
                print(f"{subject.name}, {way}: failed\n{error}", flush=True)
                continue
            rows.setdefault(way, {})[subject.name] = made
            steps = [attack["steps to half"] for attack in made["attacks"].values()]
            print(f"{subject.name}, {way}: TA {made['test accuracy']:.1f}, {steps}, {seconds:.0f} s", flush=True)
            write(temporary, begun)
            if GOLD in rows:
                write(path, document | written(rows, names, subjects))
    if GOLD not in rows:
        raise SystemExit(f"Gold's rows are missing: give more `--seconds`. What was made is in {temporary}.")
    document |= written(rows, names, subjects)
    missing = document["missing"]
    print(*document["table"], "", *document["verdicts"], sep="\n")
    write(path, document)
    print(f"Written to {path}" + (f"; {len(missing)} rows are missing: run it again" if missing else ""))
    if not missing:
        temporary.unlink(missing_ok=True)


def written(rows: Rows, names: list[str], subjects: list[Asked]) -> dict[str, Any]:
    """The rows in their order, not as they were done, with what is told of them and what is missing."""
    rows = {name: rows[name] for name in names if name in rows} | rows
    missing = [f"{each.name}, {way}" for way in names for each in subjects if each.name not in rows.get(way, {})]
    return {"missing": missing, "table": table(rows), "verdicts": verdicts(rows), "rows": rows}


def asks_for(text: str, way: str) -> bool:
    """Whether `--only` with this text asks for a way: a whole name for that way alone, though others begin with it."""
    return text == way if text in WAYS else text in way


def _subjects(arguments: argparse.Namespace) -> list[Asked]:
    data, models = arguments.data, None if arguments.data is None else arguments.models
    every = itertools.product(arguments.classes, arguments.networks, arguments.seeds)
    return [Asked(index, seed, data, models, network, arguments.smoke) for index, network, seed in every]


def _environment() -> dict[str, Any]:
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU"
    return {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "python": platform.python_version()},
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10's train.parquet and test.parquet")
    parser.add_argument("--models", type=Path, default=Path("runs/cifar10"), help="folder of its trained models")
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--networks", nargs="+", default=["ResNet-14"], choices=get_args(Network), help="of CIFAR-10")
    parser.add_argument("--only", nargs="+", help="only the ways of these names, or whose name contains one of these")
    parser.add_argument("--workers", type=int, default=1, help="processes that make rows side by side")
    parser.add_argument("--seconds", type=float, help="begin no row that would not be done after so long")
    parser.add_argument("--smoke", action="store_true", help="few images and steps, to see that everything runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the result file")
    return parser.parse_args()


def resumed(path: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The finished rows of a run that was interrupted, or none; of a run that was asked for the same alone."""
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"asked": asked, "rows": {}}
    if (known := document.get("asked", "other settings")) != asked:
        raise SystemExit(f"{path} was made with {known}, got {asked}. Give another `--output`, or remove it.")
    return document


def write(path: Path, document: Any) -> None:
    with written_whole(path) as file:
        file.write_text(json.dumps(document, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
