"""What is forgotten and by what it is judged: the digits of scikit-learn, or CIFAR-10; original and retrained."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from machine import DEVICE
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from semu_peft.evaluation import ForgettingMetrics, evaluate_forgetting
from semu_peft.evaluation.drift import token_kl

HERE = Path(__file__).parent
SHOWN = 2_000  # images of each kind that a model is judged on, at most


@dataclass(frozen=True, eq=False)
class Case:
    """One request: the data of both sides, the original model and the one retrained without what is forgotten."""

    name: str
    forget_class: int
    seed: int
    original: nn.Module
    gold: nn.Module
    forget: TensorDataset
    retain: TensorDataset
    test: TensorDataset
    test_forgotten: TensorDataset
    targets: Any
    embedding: str  # the layer behind which the head reads

    def batches(self, dataset: TensorDataset, size: int = 64) -> list[tuple[Tensor, Tensor]]:
        """In an order that the seed fixes."""
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.seed))
        return list(zip(*(part[order].split(size) for part in dataset.tensors), strict=True))

    @cached_property
    def retain_outputs(self) -> Tensor:
        """The original's, on the retain images that a model is judged on."""
        with torch.no_grad():
            return self.original.eval()(shown(self.retain).tensors[0])


@lru_cache
def digits_case(index: int, seed: int) -> Case:
    """An MLP of scikit-learn's digits, trained on the spot; a quarter of the images nobody trains on."""
    data, build, train, original = _digits(seed)
    is_forgotten = data.labels == index
    keep = data.train[~is_forgotten[data.train]]
    parts = {
        "forget": data.train[is_forgotten[data.train]], "retain": keep,
        "test": data.test[~is_forgotten[data.test]], "test_forgotten": data.test[is_forgotten[data.test]],
    }  # fmt: skip
    sets = {name: TensorDataset(data.inputs[chosen], data.labels[chosen]) for name, chosen in parts.items()}
    gold = train(build, data, keep, seed)
    return Case(f"digit {index}, seed {seed}", index, seed, original, gold, **sets, targets="all-linear", embedding="3")


@lru_cache
def _digits(seed: int) -> tuple[Any, Any, Any, nn.Module]:
    """The data, what makes and trains a model, and the original."""
    sys.path.insert(0, str(HERE.parent / "requests"))
    from subjects import digits, mlp, split, train

    data, build = split(*digits(), seed, 0.25), partial(mlp, 64, 10)
    return data, build, train, train(build, data, data.train, seed)


@lru_cache(maxsize=2)  # each holds a copy of most images
def cifar10_case(data: Path, cache: Path, index: int, seed: int) -> Case:
    """A ResNet of CIFAR-10 and the models of `benchmarks/cifar10`, trained on the first run; on a GPU where one is."""
    sys.path.insert(0, str(HERE.parent / "cifar10"))
    from methods import TARGET_MODULES
    from tasks import class_tasks

    (task,) = class_tasks(data, cache, [index], seed, device=DEVICE)
    return Case(
        task.name, index, seed, task.original, task.gold, task.forget, task.retain, task.test, task.test_forgotten,
        TARGET_MODULES, "blocks",
    )  # fmt: skip


def shown(dataset: TensorDataset) -> TensorDataset:
    """The images that a model is judged on."""
    return TensorDataset(*(part[:SHOWN] for part in dataset.tensors))


def judged(model: nn.Module, case: Case, **cost: Any) -> tuple[ForgettingMetrics, float]:
    """The four metrics, and `KL(original ‖ now)` in nats an image of the retain data."""

    def loader(dataset: TensorDataset) -> list[Any]:
        return list(zip(*(part.split(1000) for part in shown(dataset).tensors), strict=True))

    metrics = evaluate_forgetting(
        model, loader(case.forget), loader(case.retain), loader(case.test),
        forgotten_test=loader(case.test_forgotten), seed=case.seed, progress=False, **cost,
    )  # fmt: skip
    return metrics, damage(model, case)


@torch.no_grad()
def damage(model: nn.Module, case: Case) -> float:
    was_training = model.training
    after = model.eval()(shown(case.retain).tensors[0])
    model.train(was_training)
    return float(token_kl(case.retain_outputs, after).mean())


@torch.no_grad()
def accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    images, labels = shown(dataset).tensors
    return 100 * (model.eval()(images).argmax(1) == labels).float().mean().item()


def fresh(case: Case) -> nn.Module:
    return copy.deepcopy(case.original)
