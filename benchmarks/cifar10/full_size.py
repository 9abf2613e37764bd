"""Forget at the scale of the papers, on one GPU: all of CIFAR-10, ResNet-18 and a small ViT.

    python benchmarks/cifar10/full_size.py --data DIR --task random
    python benchmarks/cifar10/full_size.py --data DIR --task class
    python benchmarks/cifar10/full_size.py --data DIR --task class --model vit
    python benchmarks/cifar10/full_size.py --data DIR --task random --choose --seeds 0 --part 1/2    # and 2/2

All may run side by side on one GPU: a model that two need is trained by one of them. 5,000 training images, drawn once,
are held out of everything, as `UnseenConfidence` needs labelled images that no model was trained on and the test images
are for testing: the training set has 45,000, and a random tenth of it 4,500. Models are trained in bfloat16;
forgetting and evaluation are in float32, with convolutions in TF32, as is PyTorch's default. Settings of the rivals are
those that were chosen at the smaller scale of `run.py`, at about as many steps, and AMUN's are SalUn's: none is chosen
here. SEMU's for a random tenth are chosen by the last command on one tenth, among the settings declared here, and
reported on others.

Each row is written when it is there, rows of the result file are not measured again, and with `--seconds` nothing is
begun that has no time left: the same command again goes on. What a row that failed said is in `*.errors.txt`. `--smoke`
goes through all of it with few images; on a CPU the models are narrow as well.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dataset import DEVICE, load_cifar10, subset
from methods import Method, all_weights, amun, best_objective, best_objective_with_copy, lora, semu
from pretrain import Recipe, cached_model, only_process
from resnet import ResNet
from run import Rows, evaluate, merged, random_label, table, write
from tasks import HELD_OUT_IMAGES, RANDOM_SHARE, ForgettingTask
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from semu_peft import NaturalGradient, UnlearnResult
from semu_peft.objectives import CrossEntropy, KLToOriginal, Objective

BATCH_SIZE = 256
# What was chosen for a random tenth: the start is a tenth of a nat from the end, batches differ by more than a step
# gains, and quantiles of few images are coarse.
CHOSEN_BATCH_SIZE = 1024
PATIENT: dict[str, Any] = {"tolerance": 0.002, "patience": 16}
SMOKE_IMAGES = 600
SHOWN_STEPS = 20  # of a run's losses, in the file of what was chosen
# Where the network keeps single images, and most of its weights are.
LAST_STAGE = r".*blocks\.[67]\.(conv1|conv2|shortcut\.0)|.*classifier"


@dataclass(frozen=True)
class FullSizeRecipe(Recipe):
    """The same with 512 images a batch, each flipped or not and shifted by up to 4 pixels on its own."""

    batch_size: int = 512

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        fused = next(model.parameters()).is_cuda
        return torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=self.weight_decay, fused=fused
        )

    def augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        count, _, height, width = images.shape
        device = images.device
        down, across = torch.randint(0, 9, (2, count, 1), generator=generator, device=device)
        rows, columns = down + torch.arange(height, device=device), across + torch.arange(width, device=device)
        flip = torch.rand(count, 1, generator=generator, device=device) < 0.5
        columns = torch.where(flip, columns.flip(1), columns)
        each = torch.arange(count, device=device).view(-1, 1, 1)
        # With the channels between the indices, these come first: channels last, as convolutions like it.
        shifted = F.pad(images, (4, 4, 4, 4))[each, :, rows.unsqueeze(2), columns.unsqueeze(1)]
        return shifted.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class TransformerRecipe(FullSizeRecipe):
    """The same by AdamW."""

    learning_rate: float = 1e-3
    batch_size: int = 1024
    weight_decay: float = 0.05

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        fused = next(model.parameters()).is_cuda
        return torch.optim.AdamW(model.parameters(), weight_decay=self.weight_decay, fused=fused)


def vit(width: int = 256, depth: int = 6) -> nn.Module:
    """A ViT of transformers with patches of 4 pixels: 4.8M parameters."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=32, patch_size=4, hidden_size=width, num_hidden_layers=depth, num_attention_heads=4,
            intermediate_size=4 * width, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Network:
    """What is trained, and how; and what stands for it where all of this is only tried."""

    build: Callable[[], nn.Module]
    recipe: Recipe
    narrow: Callable[[], nn.Module]


NETWORKS = {
    "resnet18": Network(
        partial(ResNet, widths=(64, 128, 256, 512), stem_stride=1),
        FullSizeRecipe(epochs=24, augment=True),
        partial(ResNet, widths=(8, 16, 16, 16), blocks=1),
    ),
    "vit": Network(vit, TransformerRecipe(epochs=30, augment=True), partial(vit, width=32, depth=2)),
}


class NoTimeLeft(Exception):
    """There is less time than what is to begin would take."""


class Clock:
    """Lets nothing begin that would not end in time, to go by the longest of its kind so far."""

    def __init__(self, seconds: float, training: float, row: float) -> None:
        self.end = time.monotonic() + seconds
        self.longest = {"training": training, "row": row}

    def check(self, kind: str) -> None:
        if time.monotonic() + self.longest[kind] > self.end:
            raise NoTimeLeft(f"No time is left for one more {kind}.")

    @contextmanager
    def watch(self, kind: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.longest[kind] = max(self.longest[kind], time.monotonic() - started)


class Models:
    """The data on the device, and the models of one network that were trained on parts of it."""

    def __init__(self, arguments: argparse.Namespace, clock: Clock) -> None:
        self.arguments, self.clock = arguments, clock
        self.network = NETWORKS[arguments.model]
        train, self.test = (self._load(split) for split in ("train", "test"))
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        held_out = len(train) // 10 if arguments.smoke else HELD_OUT_IMAGES
        self.held_out, self.train = subset(train, order[:held_out]), subset(train, order[held_out:])

    def _load(self, split: str) -> TensorDataset:
        whole = load_cifar10(self.arguments.data, split, DEVICE)
        count = SMOKE_IMAGES if self.arguments.smoke else len(whole)
        return TensorDataset(*(tensor[:count] for tensor in whole.tensors))

    def trained(self, name: str, dataset: TensorDataset) -> nn.Module:
        """The model called `name`, with every weight from the same start."""
        smoke, network = self.arguments.smoke, self.network
        recipe = replace(network.recipe, epochs=1, batch_size=64) if smoke else network.recipe
        if self.arguments.epochs and not smoke:
            recipe = replace(recipe, epochs=self.arguments.epochs)
        build = network.narrow if smoke and DEVICE.type == "cpu" else network.build
        with self.clock.watch("training"):
            return cached_model(
                self.arguments.cache, f"{self.arguments.model}-{name}", dataset, recipe, 0, build=build,
                before_training=lambda: self.clock.check("training"),
            )  # fmt: skip

    def class_tasks(self) -> Iterator[ForgettingTask]:
        """Forget one class."""
        for index in self.arguments.classes:
            forgotten, test_forgotten = (part.tensors[1] == index for part in (self.train, self.test))
            retain = subset(self.train, ~forgotten)
            gold = self.trained(f"without-class-{index}", retain)
            yield ForgettingTask(
                "class", f"class {index}, seed 0", subset(self.train, forgotten), retain,
                subset(self.test, ~test_forgotten), subset(self.test, test_forgotten), None,
                self.trained("original", self.train), gold, 0,
            )  # fmt: skip

    def random_tasks(self) -> Iterator[ForgettingTask]:
        """Forget a random tenth."""
        for seed in self.arguments.seeds:
            order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
            cut = int(RANDOM_SHARE * len(order))
            forget, retain = subset(self.train, order[:cut]), subset(self.train, order[cut:])
            needed = {"original": self.train, f"without-tenth-{seed}": retain}
            # The original is needed by other processes too, so all but one of them begin with the gold model.
            number, parts = self.arguments.part
            names = sorted(needed, reverse=parts == 1 or number % 2 == 0)
            models = {name: self.trained(name, needed[name]) for name in names}
            yield ForgettingTask(
                "random", f"seed {seed}", forget, retain, self.test, None, self.held_out, models["original"],
                models[f"without-tenth-{seed}"], seed,
            )  # fmt: skip


def methods(kind: str, budget: Callable[[ForgettingTask], int]) -> list[Method]:
    """The rows after gold and "do nothing", most wanted first; `budget` is what SEMU trains."""
    size = {"batch_size": BATCH_SIZE}
    if kind == "class":
        return [
            Method("SEMU, all layers", semu(best_objective, **size)),
            Method("LoRA of the same size, same objective", lora(best_objective, 0.0, budget, **size), 1e-2, 4),
            Method("SEMU, classifier only", semu(best_objective, target_modules="classifier", **size)),
            Method("all weights, same objective", all_weights(best_objective_with_copy, **size), 1e-4, 4),
            Method("SalUn, with retain data", all_weights(random_label, saliency=True, retain=1.0, **size), 1e-4, 4),
            Method("SEMU, all layers, random labels (paper)", semu(random_label, **size)),
            Method("SEMU, all layers, with retain data", semu(best_objective, retain=1.0, **size)),
            Method("SEMU, all layers, by AdamW", semu(best_objective, **size), 3e-2, 8),
        ]
    wide = {"explained_variance": 0.99, **size}
    chosen = {"explained_variance": 0.99, "batch_size": CHOSEN_BATCH_SIZE, "natural": NaturalGradient(**PATIENT)}
    return [
        Method("SEMU", semu(best_objective, **chosen)),
        Method("SEMU, defaults", semu(best_objective, **wide)),
        Method("SEMU, with retain data", semu(best_objective, retain=1.0, keep=KLToOriginal, **chosen)),
        Method("SalUn, with retain data", all_weights(random_label, saliency=True, retain=1.0, **size), 1e-4, 10),
        Method("SEMU, defaults, with retain data", semu(best_objective, retain=1.0, keep=KLToOriginal, **wide)),
        # Nine, as the paper trains on the union: the retain data are nine times the forget data.
        Method("AMUN, with retain data", amun(9.0, **size), 1e-4, 10),
        Method("all weights, same objective", all_weights(best_objective_with_copy, **size), 1e-4, 10),
        Method("LoRA, same objective, with retain data", lora(best_objective, 4.0, budget, **size), 1e-2, 36),
        Method("LoRA of the same size, same objective", lora(best_objective, 0.0, budget, **size), 1e-2, 36),
        Method("SEMU, with retain data, by AdamW", semu(best_objective, retain=4.0, **wide), 1e-2, 36),
        Method("AMUN", amun(0.0, **size), 1e-4, 10),
        Method(
            "all weights, same objective, with retain data",
            all_weights(best_objective_with_copy, retain=4.0, **size), 1e-4, 10,
        ),
    ]  # fmt: skip


def choices() -> list[Method]:
    """SEMU's settings for a random tenth, by turns with retain data and without, those of most promise first."""

    def kept(
        weight: float = 4.0, natural: dict[str, Any] | None = None, keep: type[Objective] = KLToOriginal, **changed: Any
    ) -> Method:
        settings = {"explained_variance": 0.99, "batch_size": BATCH_SIZE, **changed}
        shown = {"layers": "of the last stage"} if "target_modules" in changed else {}
        shown |= {key: value for key, value in {**changed, **(natural or {})}.items() if key != "target_modules"}
        said = ", ".join(f"{key} {value}" for key, value in shown.items())
        run = semu(best_objective, retain=weight, keep=keep, natural=NaturalGradient(**(natural or {})), **settings)
        data = f"{keep.__name__} × {weight:g}" if weight else "no retain data"
        return Method(f"SEMU, {data}{', ' if said else ''}{said}", run)

    def by_adamw(weight: float, rate: float, epochs: int) -> Method:
        run = semu(best_objective, weight, BATCH_SIZE, KLToOriginal, explained_variance=0.99)
        data = f"KLToOriginal × {weight:g}" if weight else "no retain data"
        return Method(f"SEMU, {data}, AdamW {rate}, {epochs} epochs", run, rate, epochs)

    patient = PATIENT
    wide, large = {"explained_variance": 0.999}, {"batch_size": CHOSEN_BATCH_SIZE}
    last = {"target_modules": LAST_STAGE, **wide}
    with_and_without = [
        (kept(1.0, patient), kept(0.0, patient)),
        (kept(4.0, patient), kept(0.0, patient, **wide)),
        (kept(1.0, patient, **wide), kept(0.0)),
        (kept(1.0, patient, **large), kept(0.0, patient, **large)),
        (kept(4.0), kept(0.0, patient, **wide, **large)),
        (by_adamw(4.0, 1e-2, 20), by_adamw(0.0, 1e-2, 20)),
        (kept(1.0, patient, **wide, **large), kept(0.0, {**patient, "kl": 0.02})),
        (kept(1.0, patient, **last), kept(0.0, patient, **last)),
        (kept(0.25, patient, CrossEntropy), kept(0.0, {**patient, "max_retain_kl": 0.1})),
        (kept(4.0, keep=CrossEntropy), kept(0.0, {"tolerance": 0.002})),
    ]
    return [method for pair in with_and_without for method in pair]


class Table:
    """The result file, a row at a time; several processes may write it.

    Args:
        path: Of the file.
        lock: Of a file that who writes it holds.
        said: What stands at its head.
        declared: The rows after gold and "do nothing", given what SEMU trains.
    """

    def __init__(
        self,
        path: Path,
        lock: Path,
        said: dict[str, str],
        declared: Callable[[Callable[[ForgettingTask], int]], Sequence[Method]],
    ) -> None:
        self.path, self.lock, self.said, self.declared = path, lock, said, declared
        self.rows: Rows = {}
        self.runs: dict[str, dict[str, Any]] = {}  # by method and task, how the run went
        self._read()

    def fill(self, task: ForgettingTask, kind: str, clock: Clock) -> None:
        """Measure what is missing of one task."""
        models = (("retrained (gold)", task.gold), ("original (do nothing)", task.original))
        for name, model in models:
            if not self._has(name, task):
                self._enter(name, task, model, 0, None)

        def budget(task: ForgettingTask) -> int:
            row = self.rows["SEMU" if kind == "random" else "SEMU, all layers"][task.name]
            return int(row.trainable_parameters or 0)

        for method in self.declared(budget):
            if self._has(method.name, task):
                continue
            clock.check("row")
            epochs = method.epochs
            if self.said["scale"] == "smoke":
                epochs = 1 if epochs else 5  # natural gradients stop by themselves, at the latest here
            try:
                with clock.watch("row"):
                    done = method.run(task, method.learning_rate, epochs)
                    if done.result is not None:
                        self.runs.setdefault(method.name, {})[task.name] = told(done.result)
                    self._enter(method.name, task, done.model, done.trainable_parameters, done.seconds)
            except Exception:  # one row is not worth the others
                self._note_failure(f"{task.name}: {method.name}\n{traceback.format_exc()}")

    def _has(self, name: str, task: ForgettingTask) -> bool:
        return task.name in self.rows.get(name, {})

    def _enter(self, name: str, task: ForgettingTask, model: nn.Module, trained: int, seconds: float | None) -> None:
        metrics = evaluate(model, task, trained, seconds, name)
        with only_process(self.lock):
            self._read()
            self.rows.setdefault(name, {})[task.name] = metrics
            write(self.path, self.said, self.rows, {"runs": self.runs})

    def _read(self) -> None:
        """Take in what others have written."""
        if self.path.exists():
            document = json.loads(self.path.read_text())
            self.rows = merged(document["rows"], self.rows)
            for name, by_task in document.get("runs", {}).items():
                self.runs[name] = by_task | self.runs.get(name, {})

    def _note_failure(self, text: str) -> None:
        print(text, flush=True)
        with self.path.with_suffix(".errors.txt").open("a") as file:
            file.write(f"{text}\n")


def part(text: str) -> tuple[int, int]:
    """Read `K/N`."""
    number, parts = (int(each) for each in text.split("/"))
    if not 1 <= number <= parts:
        raise argparse.ArgumentTypeError(f"K/N must have K from 1 to N, got {text}. Write 1/2.")
    return number, parts


def told(result: UnlearnResult) -> dict[str, Any]:
    """Steps, why they ended, and the losses on the way, of about twenty steps."""
    every = max(len(result.history) // SHOWN_STEPS, 1)
    shown = [*result.history[:-1:every], *result.history[-2:]]
    return {"steps": result.steps, "stop reason": result.stop_reason, "seconds": result.seconds, "history": shown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with CIFAR-10's train.parquet and test.parquet"
    )
    parser.add_argument("--task", choices=["class", "random"], required=True)
    parser.add_argument("--model", choices=list(NETWORKS), default="resnet18")
    parser.add_argument("--classes", type=int, nargs="+", default=[0, 3, 8], help="classes to forget, one at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds of random forgetting")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing that would end later")
    parser.add_argument("--cache", type=Path, default=Path("runs/cifar10"), help="folder of the trained models")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the result file")
    parser.add_argument("--choose", action="store_true", help="SEMU's settings for a random tenth, in a file of theirs")
    parser.add_argument("--part", type=part, default=(1, 1), metavar="K/N", help="every N-th of the rows alone")
    parser.add_argument("--only", nargs="+", default=[], help="rows whose name is one of these alone")
    parser.add_argument("--train", choices=["original"], help="train this model, and measure nothing")
    parser.add_argument("--epochs", type=int, help="of training the models; by default 24, and 30 of the ViT")
    parser.add_argument("--smoke", action="store_true", help="go through all of it with 600 images")
    arguments = parser.parse_args()
    if arguments.choose and arguments.task != "random":
        parser.error("--choose is for --task random")
    clock = Clock(arguments.seconds, *((5.0, 3.0) if arguments.smoke else (40.0, 15.0)))
    scale = "smoke" if arguments.smoke else "full size"
    said = {
        "task": arguments.task, "model": arguments.model, "scale": scale,
        "command": shlex.join(["python", *sys.argv]),
    }  # fmt: skip
    stem = f"cifar10_{arguments.model}_{arguments.task}{'_choice' if arguments.choose else ''}"

    def declared(budget: Callable[[ForgettingTask], int]) -> Sequence[Method]:
        rows = choices() if arguments.choose else methods(arguments.task, budget)
        number, parts = arguments.part
        return [row for row in rows if not arguments.only or row.name in arguments.only][number - 1 :: parts]

    if arguments.smoke:
        stem = f"{stem}_smoke"
    found = Table(arguments.output / f"{stem}.json", arguments.cache / f"{stem}.lock", said, declared)
    try:
        models = Models(arguments, clock)
        if arguments.train:
            models.trained(arguments.train, models.train)
            return
        for task in models.class_tasks() if arguments.task == "class" else models.random_tasks():
            found.fill(task, arguments.task, clock)
    except NoTimeLeft as none_left:
        print(none_left, flush=True)
    if found.rows:
        print(table(found.rows))


if __name__ == "__main__":
    main()
