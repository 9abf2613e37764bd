"""Models that are to forget a class so that it stays forgotten, those that never saw it, and who attacks them."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from semu_peft.objectives import Attacker
from semu_peft.objectives.attackers import flip

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RETAINED = 16_000  # CIFAR-10's retain images, half of them for unlearning
TESTED = 2_000
WIDTHS = (64, 128, 256)
Side = tuple[Tensor, ...]
Network = Literal["ResNet-14", "ResNet-8", "wide", "plain"]


@dataclass(frozen=True)
class Asked:
    """Which subject: it is made where it is needed, also in another process.

    Attributes:
        index: The class that is forgotten.
        seed: Of the models and of what is drawn.
        data: Folder of CIFAR-10; None for digits.
        models: Folder of its models.
        network: Of CIFAR-10: the benchmark's ResNet-14, one of half the blocks, one of twice the width, or a plain one
            without shortcuts.
        is_smoke: Few images and few steps, to see that everything runs.
    """

    index: int
    seed: int
    data: Path | None = None
    models: Path | None = None
    network: Network = "ResNet-14"
    is_smoke: bool = False

    @property
    def name(self) -> str:
        """What rows call it."""
        kind = "digits" if self.data is None else "CIFAR-10"
        kind += "" if self.network == "ResNet-14" else f", {self.network}"
        return f"{kind}, class {self.index}, seed {self.seed}"


@dataclass(frozen=True)
class Subject:
    """A model that is to forget a class, the model that never saw it, and the data of both sides.

    Attributes:
        index: The class that is forgotten.
        targets: The layers of the adapter.
        gamma: The share of the gradient's energy in its subspace; `more` is a higher one.
        simulated: Attackers of one kind to simulate; `several` are of two kinds and of several lengths.
        attackers: Who attacks in the end.
        steps: Of unlearning.
    """

    name: str
    index: int
    original: nn.Module
    gold: nn.Module
    targets: Any
    gamma: float
    more: float
    forget: Side
    retain: Side
    forget_test: Side
    retain_test: Side
    simulated: list[Attacker]
    several: list[Attacker]
    attackers: list[Attacker]
    steps: int

    def halves(self, side: Side) -> tuple[Side, Side]:
        """What unlearning sees, and what attackers have."""
        cut = len(side[1]) // 2
        return tuple(part[:cut] for part in side), tuple(part[cut:] for part in side)


def batches(side: Side, size: int) -> list[Side]:
    """A side as batches of this size."""
    return list(zip(*(part.split(size) for part in side), strict=True))


def shaken(batch: Any, generator: torch.Generator) -> Any:
    """Vectors have no left and right: noise of a tenth of their spread stands for flips."""
    inputs, labels = batch
    noise = torch.randn(inputs.shape, generator=generator).to(inputs)
    return inputs + 0.1 * inputs.std() * noise, labels


def five(rates: tuple[float, float], adam: float, head: str, varied: Any, steps: int) -> list[Attacker]:
    """SGD at two rates, Adam, the head alone, and SGD on inputs that are varied."""
    fast, slow = rates
    return [
        Attacker("sgd", fast, steps=steps, name=f"SGD {fast:g}"),
        Attacker("sgd", slow, steps=4 * steps, name=f"SGD {slow:g}"),
        Attacker("adam", adam, steps=steps, name=f"Adam {adam:g}"),
        Attacker("adam", 1e-3, steps=4 * steps, layers=head, name="head alone, Adam 0.001"),
        Attacker("sgd", fast, steps=steps, augment=varied, name=f"SGD {fast:g}, {varied.__name__}"),
    ]


def subject_of(asked: Asked) -> Subject:
    """Make, or read, what was asked for."""
    return digits(asked) if asked.data is None else cifar10(asked)


# ---- digits ----


def digits(asked: Asked) -> Subject:
    """An MLP of three layers on scikit-learn's 8×8 digits."""
    from sklearn.datasets import load_digits

    images, labels = (torch.tensor(column) for column in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(asked.seed))
    x, y = images[order].float() / 16, labels[order]
    train, test = (x[:1200], y[:1200]), (x[1200:], y[1200:])
    original = trained_mlp(train, asked.seed)
    (forget, retain), (forget_test, retain_test) = (divided(side, asked.index) for side in (train, test))
    return Subject(
        asked.name, asked.index, original.to(DEVICE), trained_mlp(retain, asked.seed).to(DEVICE),
        "all-linear", 0.9999, 1.0,
        *map(placed, (forget, retain, forget_test, retain_test)),
        [Attacker("sgd", 1e-2, steps=10), Attacker("sgd", 1e-2, steps=20, forget_examples=10)],
        [
            Attacker("sgd", 1e-2, steps=10), Attacker("adam", 1e-3, steps=15),
            Attacker("sgd", 1e-2, steps=20, forget_examples=10), Attacker("adam", 1e-3, steps=25, forget_examples=10),
        ],
        five((1e-2, 3e-3), 1e-3, "4", shaken, 5 if asked.is_smoke else 50), steps=4 if asked.is_smoke else 20,
    )  # fmt: skip


def divided(side: Side, index: int) -> tuple[Side, Side]:
    """The examples of a class, and all others."""
    chosen = side[1] == index
    return tuple(part[chosen] for part in side), tuple(part[~chosen] for part in side)


def placed(side: Side) -> Side:
    """On the device, once: a loader that moves batches costs more than a step of networks as small as these."""
    return tuple(part.to(DEVICE) for part in side)


def trained_mlp(side: Side, seed: int) -> nn.Module:
    """A fresh network, trained for 250 steps."""
    x, y = side
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(250):
        rows = torch.randint(len(y), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


# ---- CIFAR-10 ----


def cifar10(asked: Asked) -> Subject:
    """The ResNet of the class benchmark, or another network."""
    sys.path.insert(0, str(Path(__file__).parent / "cifar10"))
    from methods import TARGET_MODULES

    assert asked.data is not None
    (forget, retain), (forget_test, retain_test) = (
        divided(images_of(asked.data, split), asked.index) for split in ("test" if asked.is_smoke else "train", "test")
    )
    most, tested, shown = (400, 100, 200) if asked.is_smoke else (RETAINED, TESTED, None)
    order = torch.randperm(len(retain[1]), generator=torch.Generator().manual_seed(asked.seed))[:most]
    return Subject(
        asked.name, asked.index, *networks(asked), TARGET_MODULES, 0.99, 0.999,
        placed(tuple(part[:shown] for part in forget)), placed(tuple(part[order] for part in retain)),
        placed(tuple(part[:shown] for part in forget_test)), placed(tuple(part[:tested] for part in retain_test)),
        [Attacker("sgd", 1e-2, steps=20), Attacker("sgd", 1e-2, steps=10, forget_examples=100)],
        [
            Attacker("sgd", 1e-2, steps=20), Attacker("adam", 1e-3, steps=15),
            Attacker("sgd", 1e-2, steps=10, forget_examples=100), Attacker("adam", 1e-3, steps=25),
        ],
        five((1e-2, 1e-3), 1e-3, "classifier", flip, 5 if asked.is_smoke else 50), steps=4 if asked.is_smoke else 40,
    )  # fmt: skip


@lru_cache(maxsize=2)
def images_of(data: Path, split: str) -> Side:
    """CIFAR-10's images and labels, decoded once a process."""
    from dataset import load_cifar10

    found: Side = load_cifar10(data, split).tensors
    return found


def networks(asked: Asked) -> tuple[nn.Module, nn.Module]:
    """The original and the gold model, on the device: read, or trained there (some seconds on a GPU) and kept."""
    original, gold = (network(asked, *each).to(DEVICE).requires_grad_(False) for each in _kinds(asked))
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()  # of the images; other processes want the memory
    return original, gold


def _kinds(asked: Asked) -> list[tuple[str, int | None]]:
    """The two models of a subject by name, with the class that each never sees."""
    return [("original", None), (f"without-{asked.index}", asked.index)]


def network(asked: Asked, name: str, without: int | None) -> nn.Module:
    """One model, trained on all images or on those of the other classes, in eval mode."""
    from plain import PlainNet
    from pretrain import cached_model, train
    from resnet import ResNet
    from tasks import CLASS_RECIPE

    assert asked.data is not None and asked.models is not None
    build: Callable[[], nn.Module] = {
        "ResNet-14": ResNet, "ResNet-8": partial(ResNet, blocks=1), "wide": partial(ResNet, widths=WIDTHS),
        "plain": PlainNet,
    }[asked.network]  # fmt: skip
    kind = "class" if asked.network == "ResNet-14" else f"class-{asked.network}"
    side = images_of(asked.data, "test" if asked.is_smoke else "train")
    if without is not None:
        side = divided(side, without)[1]
    if asked.is_smoke:
        few, recipe = TensorDataset(*placed(tuple(part[:512] for part in side))), replace(CLASS_RECIPE, epochs=1)
        return train(few, recipe, asked.seed, False, name, build).eval()
    return cached_model(
        asked.models, f"{kind}-{name}", TensorDataset(*placed(side)), CLASS_RECIPE, asked.seed, build=build
    ).eval()


@contextmanager
def training_begun(asked: list[Asked]) -> Iterator[None]:
    """Meanwhile the models of all subjects are trained at once, each in a process of its own; who needs one waits."""
    wanted = {
        (each.seed, each.network, name): (each, name, without) for each in asked for name, without in _kinds(each)
    }
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(wanted), context, max_tasks_per_child=1) as pool:
        for each in wanted.values():
            pool.submit(_train_one, *each)
        yield


def _train_one(asked: Asked, name: str, without: int | None) -> None:
    sys.path.insert(0, str(Path(__file__).parent / "cifar10"))
    torch.set_num_threads(1)
    network(asked, name, without)
