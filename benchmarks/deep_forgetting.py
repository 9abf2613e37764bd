"""How deep a class is forgotten, and what that costs: damage against steps of relearning, beside the retrained model.

    OMP_NUM_THREADS=1 python benchmarks/deep_forgetting.py                     # scikit-learn's digits, a few minutes
    python benchmarks/deep_forgetting.py --data DIR --models runs/cifar10 --classes 0 3 8      # CIFAR-10, hours

Struck-out distillation at the weights alone, and under simulated relearning with several weights of the retain KL and
several margins. Five attackers, none with an image or a seed of the simulation: SGD at two rates (one simulated, with
another number of steps, and one not), Adam and the head alone (kinds that were not simulated), and SGD on inputs that
are varied. Forget and retain images are split in two: the first half is for unlearning, the other for the attackers.

A run that was interrupted goes on where it was, if it is asked for the same: finished rows are in the result file's
`.partial`. For answers of language models: `tofu/deep_forgetting.py`.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import get_peft_model
from torch import Tensor, nn

from semu_peft import NaturalGradient, Retain, SemuConfig, initialize_semu_weights, unlearn
from semu_peft.evaluation import RelearningCurve, evaluate_forgetting, predict, relearning
from semu_peft.objectives import Attacker, DecoupledDistillation, KLToOriginal, SimulatedRelearning
from semu_peft.objectives.attackers import flip

KL_WEIGHTS, MARGINS = (3.0, 10.0, 30.0), (0.0, 3.0)
SHOWN = (0, 5, 10, 20, 50, 100, 200)
SIMULATION_SEED, ATTACK_SEED = 0, 1_000
METRICS = ("unlearning_accuracy", "retain_accuracy", "test_accuracy", "membership_inference")


@dataclass(frozen=True)
class Subject:
    """A model that is to forget a class, the model that never saw it, and the data of both sides."""

    name: str
    original: nn.Module
    gold: nn.Module
    targets: Any
    gamma: float
    head: str
    forget: tuple[Tensor, Tensor]
    retain: tuple[Tensor, Tensor]
    forget_test: tuple[Tensor, Tensor]
    retain_test: tuple[Tensor, Tensor]
    simulated: list[Attacker]
    attackers: list[Attacker]
    steps: int

    def halves(self, side: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
        """What unlearning sees, and what attackers have."""
        cut = len(side[1]) // 2
        return batches(tuple(part[:cut] for part in side)), batches(tuple(part[cut:] for part in side))


def batches(side: tuple[Tensor, ...], size: int = 256) -> list[tuple[Tensor, ...]]:
    return list(zip(*(part.split(size) for part in side), strict=True))


def shaken(batch: Any, generator: torch.Generator) -> Any:
    """Vectors have no left and right: noise of a tenth of their spread stands for flips."""
    inputs, labels = batch
    return inputs + 0.1 * inputs.std() * torch.randn(inputs.shape, generator=generator), labels


def five(rates: tuple[float, float], adam: float, head: str, varied: Any, steps: int) -> list[Attacker]:
    fast, slow = rates
    return [
        Attacker("sgd", fast, steps=steps, name=f"SGD {fast:g}"),
        Attacker("sgd", slow, steps=4 * steps, name=f"SGD {slow:g}"),
        Attacker("adam", adam, steps=steps, name=f"Adam {adam:g}"),
        Attacker("adam", 1e-3, steps=4 * steps, layers=head, name="head alone, Adam 0.001"),
        Attacker("sgd", fast, steps=steps, augment=varied, name=f"SGD {fast:g}, {varied.__name__}"),
    ]


# ---- subjects ----


def digits(classes: list[int], seeds: list[int]) -> Iterator[Subject]:
    """An MLP of three layers on scikit-learn's 8×8 digits."""
    from sklearn.datasets import load_digits

    images, labels = (torch.tensor(column) for column in load_digits(return_X_y=True))
    for seed in seeds:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        x, y = images[order].float() / 16, labels[order]
        train, test = (x[:1200], y[:1200]), (x[1200:], y[1200:])
        original = trained_mlp(train, seed)
        for index in classes:
            (forget, retain), (forget_test, retain_test) = (divided(side, index) for side in (train, test))
            yield Subject(
                f"digits, class {index}, seed {seed}", original, trained_mlp(retain, seed), "all-linear", 0.9999, "4",
                forget, retain, forget_test, retain_test,
                [Attacker("sgd", 1e-2, steps=10), Attacker("sgd", 1e-2, steps=20, forget_examples=10)],
                five((1e-2, 3e-3), 1e-3, "4", shaken, 50), steps=20,
            )  # fmt: skip


def divided(side: tuple[Tensor, Tensor], index: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    x, y = side
    return (x[y == index], y[y == index]), (x[y != index], y[y != index])


def trained_mlp(side: tuple[Tensor, Tensor], seed: int) -> nn.Module:
    x, y = side
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(250):
        rows = torch.randint(len(y), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def cifar10(data: Path, models: Path, classes: list[int], seeds: list[int]) -> Iterator[Subject]:
    """The ResNets of the class benchmark."""
    sys.path.insert(0, str(Path(__file__).parent / "cifar10"))
    from methods import TARGET_MODULES
    from tasks import class_tasks

    for seed in seeds:
        for task in class_tasks(data, models, classes, seed):
            assert task.test_forgotten is not None
            draw = torch.randperm(len(task.retain), generator=torch.Generator().manual_seed(seed))[:8000]
            yield Subject(
                f"CIFAR-10, {task.name}", task.original, task.gold, TARGET_MODULES, 0.99, "classifier",
                task.forget.tensors, tuple(part[draw] for part in task.retain.tensors), task.test_forgotten.tensors,
                tuple(part[:2000] for part in task.test.tensors),
                [Attacker("sgd", 1e-2, steps=20), Attacker("sgd", 1e-2, steps=10, forget_examples=100)],
                five((1e-2, 1e-3), 1e-3, "classifier", flip, 50), steps=40,
            )  # fmt: skip


# ---- ways ----


def ways() -> dict[str, Callable[[Subject], tuple[nn.Module, int]]]:
    """How each row's model is made, with the number of trained parameters."""
    rows: dict[str, Callable[[Subject], tuple[nn.Module, int]]] = {
        "retrained (gold)": lambda subject: (subject.gold, 0),
        "original (do nothing)": lambda subject: (subject.original, 0),
        "struck-out distillation": lambda subject: unlearned(subject, None, 0.0, is_deep=False),
        "struck-out, retain KL × 10, margin 3": lambda subject: unlearned(subject, 10.0, 3.0, is_deep=False),
        "simulated, no retain KL, margin 3": lambda subject: unlearned(subject, None, 3.0, is_deep=True),
    }
    for weight in KL_WEIGHTS:
        for margin in MARGINS:
            rows[f"simulated, retain KL × {weight:g}, margin {margin:g}"] = lambda subject, at=(weight, margin): (
                unlearned(subject, *at, is_deep=True)
            )
    return rows


def unlearned(subject: Subject, kl_weight: float | None, margin: float, *, is_deep: bool) -> tuple[nn.Module, int]:
    forget, retain = subject.halves(subject.forget)[0], subject.halves(subject.retain)[0]
    config = SemuConfig(target_modules=subject.targets, explained_variance=subject.gamma)
    model = get_peft_model(copy.deepcopy(subject.original), config)
    objective: Any = DecoupledDistillation(margin=margin)
    initialize_semu_weights(model, forget, DecoupledDistillation(), progress=False)
    if is_deep:
        objective = SimulatedRelearning(objective, forget, retain, subject.simulated, seed=SIMULATION_SEED)
    result = unlearn(
        model, forget, objective, retain=None if kl_weight is None else Retain(retain, KLToOriginal(), kl_weight),
        optimizer=NaturalGradient(patience=subject.steps), max_steps=subject.steps, progress=False,
    )  # fmt: skip
    return model.merge_and_unload(), result.trainable_parameters


def measured(subject: Subject, model: nn.Module, trained: int, seconds: float) -> dict[str, Any]:
    forget, retain = (subject.halves(side)[1] for side in (subject.forget, subject.retain))
    on_forget, on_retain = batches(subject.forget_test), batches(subject.retain_test)
    curves = [
        relearning(
            model, forget, retain, attacker=attacker, forget_test=on_forget, retain_test=on_retain,
            steps=[*range(0, 20), *range(20, 400, 5)], seed=ATTACK_SEED, progress=False,
        )
        for attacker in subject.attackers
    ]  # fmt: skip
    judged = evaluate_forgetting(
        model, batches(subject.forget), batches(subject.retain), on_retain, forgotten_test=on_forget,
        progress=False,
    )  # fmt: skip
    return {
        "metrics": {name: getattr(judged, name) for name in METRICS},
        "unlearning accuracy": 100 - predict(model, on_forget, progress=False).accuracy,
        "test accuracy": predict(model, on_retain, progress=False).accuracy,
        "trained": trained,
        "seconds": seconds,
        "attacks": {curve.attacker: told(curve) for curve in curves},
    }


def told(curve: RelearningCurve) -> dict[str, Any]:
    return {
        "steps to half": curve.steps_to_half,
        "of steps": curve.steps[-1],
        "area": curve.area,
        "retained at the end": curve.retain[-1],
        "curve": {step: known for step, known in zip(curve.steps, curve.forget, strict=True) if step in SHOWN},
    }


# ---- the table ----


def table(rows: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Means over the subjects: damage, the steps to half of each attacker, and how many hold half of gold's steps."""
    gold = rows["retrained (gold)"]
    names = list(next(iter(gold.values()))["attacks"])
    lines = [
        f"| way | UA | TA | gap | {' | '.join(names)} | held | trained | seconds |",
        f"| --- | --- | --- | --- | {' | '.join('---' for _ in names)} | --- | --- | --- |",
    ]
    for way, by_subject in rows.items():
        each = list(by_subject.values())
        steps = [mean([reached(row["attacks"][name]) for row in each]) for name in names]
        held = sum(
            reached(row["attacks"][name]) >= reached(gold[subject]["attacks"][name]) / 2
            for subject, row in by_subject.items()
            for name in names
        )
        lines.append(
            f"| {way} | {mean([row['unlearning accuracy'] for row in each]):.1f} | "
            f"{mean([row['test accuracy'] for row in each]):.1f} | "
            f"{mean([gap(row, gold[subject]) for subject, row in by_subject.items()]):.2f} | "
            f"{' | '.join(f'{step:.0f}' for step in steps)} | "
            f"{held} of {len(each) * len(names)} | {mean([row['trained'] for row in each]):.0f} | "
            f"{mean([row['seconds'] for row in each]):.1f} |"
        )
    return lines


def gap(row: dict[str, Any], gold: dict[str, Any]) -> float:
    """The mean distance to gold over UA, RA, TA and MIA."""
    return mean([abs(row["metrics"][name] - gold["metrics"][name]) for name in METRICS])


def reached(attack: dict[str, Any]) -> float:
    """Steps to half; where it never came back, those that were tried."""
    return attack["of steps"] if attack["steps to half"] is None else attack["steps to half"]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10's train.parquet and test.parquet")
    parser.add_argument("--models", type=Path, default=Path("runs/cifar10"), help="folder of its trained models")
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the result file")
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.data is None else torch.get_num_threads())
    subjects = (
        digits(arguments.classes, arguments.seeds)
        if arguments.data is None
        else cifar10(arguments.data, arguments.models, arguments.classes, arguments.seeds)
    )
    name = f"deep_forgetting_{'digits' if arguments.data is None else 'cifar10'}.json"
    path = arguments.output / name
    temporary = path.with_suffix(".partial")
    models = None if arguments.data is None else str(arguments.models)
    asked = {"classes": arguments.classes, "seeds": arguments.seeds, "models": models}
    begun = resumed(temporary, asked)
    rows: dict[str, dict[str, dict[str, Any]]] = begun["rows"]
    for subject in subjects:
        for way, make in ways().items():
            if subject.name in rows.get(way, {}):
                continue
            started = time.perf_counter()
            model, trained = make(subject)
            row = measured(subject, model, trained, time.perf_counter() - started)
            rows.setdefault(way, {})[subject.name] = row
            steps = {name: attack["steps to half"] for name, attack in row["attacks"].items()}
            print(subject.name, way, f"TA {row['test accuracy']:.1f}", steps, sep=", ", flush=True)
            write(temporary, begun)
    lines = table(rows)
    print(*lines, sep="\n")
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU"
    document = {
        "command": " ".join(["python benchmarks/deep_forgetting.py", *sys.argv[1:]]),
        "asked": asked,
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "python": platform.python_version()},
        "table": lines,
        "rows": rows,
    }
    write(path, document)
    temporary.unlink()
    print(f"Written to {path}")


def resumed(path: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The finished rows of a run that was interrupted, or none; of a run that was asked for the same alone."""
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"asked": asked, "rows": {}}
    if (known := document.get("asked", "other settings")) != asked:
        raise SystemExit(f"{path} was made with {known}, got {asked}. Give another `--output`, or remove it.")
    return document


def write(path: Path, document: Any) -> None:
    """Write a file whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(document, indent=1, ensure_ascii=False))
    new.rename(path)


if __name__ == "__main__":
    main()
