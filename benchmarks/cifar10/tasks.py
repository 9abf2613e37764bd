"""The two forgetting tasks: which images are forgotten, kept and tested, and the models that saw them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from dataset import load_cifar10, subset
from pretrain import Recipe, cached_model
from torch import nn
from torch.utils.data import TensorDataset

CLASS_RECIPE = Recipe(epochs=6, augment=True)
# No augmentation and few images: the models memorise, so that there is something to forget.
RANDOM_RECIPE = Recipe(epochs=20, augment=False)
RANDOM_IMAGES = 10_000
RANDOM_SHARE = 0.1
HELD_OUT_IMAGES = 5_000


@dataclass
class ForgettingTask:
    """One forget request with its data and its two reference models."""

    kind: str
    name: str
    forget: TensorDataset
    retain: TensorDataset
    test: TensorDataset
    test_forgotten: TensorDataset | None
    held_out: TensorDataset | None  # for random forgetting: labelled images that no model trains or is tested on
    original: nn.Module
    gold: nn.Module
    seed: int


def class_tasks(
    data: Path,
    cache: Path,
    classes: list[int],
    seed: int,
    compile_model: bool = False,
    device: torch.device | str = "cpu",
) -> Iterator[ForgettingTask]:
    """Forget one class of the full training set; the test set is split the same way."""
    train, test = (load_cifar10(data, split, device) for split in ("train", "test"))
    original = cached_model(cache, "class-original", train, CLASS_RECIPE, seed, compile_model)
    for index in classes:
        forgotten, test_forgotten = train.tensors[1] == index, test.tensors[1] == index
        retain = subset(train, ~forgotten)
        gold = cached_model(cache, f"class-without-{index}", retain, CLASS_RECIPE, seed, compile_model)
        yield ForgettingTask(
            "class", f"class {index}, seed {seed}", subset(train, forgotten), retain, subset(test, ~test_forgotten),
            subset(test, test_forgotten), None, original, gold, seed,
        )  # fmt: skip


def random_tasks(
    data: Path, cache: Path, seeds: list[int], compile_model: bool = False, device: torch.device | str = "cpu"
) -> Iterator[ForgettingTask]:
    """Forget a random tenth of a 10,000-image training set that the model has memorised."""
    train, test = (load_cifar10(data, split, device) for split in ("train", "test"))
    for seed in seeds:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        held_out = subset(train, order[RANDOM_IMAGES : RANDOM_IMAGES + HELD_OUT_IMAGES])
        order = order[:RANDOM_IMAGES]
        cut = int(RANDOM_SHARE * RANDOM_IMAGES)
        forget, retain, everything = subset(train, order[:cut]), subset(train, order[cut:]), subset(train, order)
        original = cached_model(cache, "random-original", everything, RANDOM_RECIPE, seed, compile_model)
        gold = cached_model(cache, "random-gold", retain, RANDOM_RECIPE, seed, compile_model)
        yield ForgettingTask(
            "random", f"seed {seed}", forget, retain, test, None, held_out, original, gold, seed
        )  # fmt: skip
