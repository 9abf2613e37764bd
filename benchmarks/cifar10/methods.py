"""The methods compared: SEMU and its rivals, each from the original model to an unlearned one through one loop."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from dataset import batches
from peft import LoraConfig, get_peft_model
from tasks import ForgettingTask
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from semu_peft import NaturalGradient, Retain, SemuConfig, UnlearnResult, initialize_semu_weights, objectives, unlearn
from semu_peft.evaluation import predict
from semu_peft.gradients import GradientSum, WeightSource
from semu_peft.gradients.gather import stream_gradients
from semu_peft.objectives import Objective

# Every convolution and the classifier of the ResNet.
TARGET_MODULES = r".*(conv1|conv2|stem|shortcut\.0|classifier)"
BATCH_SIZE = 64
PROGRESS = sys.stderr.isatty()  # bars are for a terminal, not for a log


@dataclass
class Unlearned:
    """A model after unlearning, with what it cost."""

    model: nn.Module
    trainable_parameters: int
    seconds: float
    result: UnlearnResult | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Method:
    """One row of the table: how the original model is changed, and the settings that were chosen for it."""

    name: str
    run: Callable[[ForgettingTask, float | None, int | None], Unlearned]
    learning_rate: float | None = None  # without: the defaults of `unlearn`
    epochs: int | None = None


def loader(dataset: TensorDataset, seed: int, batch_size: int = BATCH_SIZE) -> DataLoader[tuple[Tensor, ...]]:
    """Shuffled batches, in an order that `seed` fixes."""
    return batches(dataset, batch_size, torch.Generator().manual_seed(seed))


def weight_layers(model: nn.Module) -> dict[str, int]:
    """Every convolution and linear layer by name, with what LoRA of rank 1 trains in it."""
    return {
        name: module.weight[0].numel() + module.weight.shape[0]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }


def best_objective(task: ForgettingTask) -> Objective:
    """A class is struck out; random examples are treated as unseen ones. The original is the adapter switched off."""
    return _best_objective(task, None)


def ranked_objective(task: ForgettingTask) -> Objective:
    """The same for random examples, each ranked among all of them, not within its batch."""
    odds = predict(task.original, batches(task.forget), progress=False).log_odds
    return _best_objective(task, None, odds)


def best_objective_with_copy(task: ForgettingTask) -> Objective:
    """The same for a model without an adapter, with the original model as a second copy."""
    return _best_objective(task, task.original)


def _best_objective(task: ForgettingTask, reference: nn.Module | None, odds: Tensor | None = None) -> Objective:
    if task.held_out is None:
        return objectives.DecoupledDistillation(reference)
    confidences = predict(task.original, batches(task.held_out), progress=False).confidence
    return objectives.UnseenConfidence(confidences, reference, forget_log_odds=odds)


def _train(
    model: nn.Module,
    task: ForgettingTask,
    objective: Objective,
    learning_rate: float | None,
    epochs: int | None,
    retain: float,
    batch_size: int = BATCH_SIZE,
    forget: Iterable[Any] | None = None,
    keep: type[Objective] = objectives.CrossEntropy,
    on_unseen: bool = False,
    **settings: Any,
) -> UnlearnResult:
    held = task.held_out if on_unseen else task.retain
    assert held is not None
    kept = Retain(loader(held, task.seed, batch_size), keep(), retain) if retain else None
    return unlearn(
        model,
        loader(task.forget, task.seed, batch_size) if forget is None else forget,
        objective,
        retain=kept,
        epochs=epochs,
        learning_rate=learning_rate,
        seed=task.seed,
        progress=PROGRESS,
        **settings,
    )


def semu(
    objective: Callable[[ForgettingTask], Objective],
    retain: float = 0.0,
    batch_size: int = BATCH_SIZE,
    keep: type[Objective] = objectives.CrossEntropy,
    natural: NaturalGradient | None = None,
    max_steps: int | None = None,
    on_unseen: bool = False,
    **settings: object,
) -> Callable[[ForgettingTask, float | None, int | None], Unlearned]:
    """SEMU with an objective, and `retain` times what is asked of retain data, or of images that no model has seen."""

    def run(task: ForgettingTask, learning_rate: float | None, epochs: int | None) -> Unlearned:
        started = time.perf_counter()
        loss = objective(task)
        config = SemuConfig(**{"target_modules": list(weight_layers(task.original)), **settings})
        model = get_peft_model(copy.deepcopy(task.original), config)
        initialize_semu_weights(model, loader(task.forget, task.seed, batch_size), loss, progress=PROGRESS)
        result = _train(
            model, task, loss, learning_rate, epochs, retain, batch_size, keep=keep, optimizer=natural,
            max_steps=max_steps, on_unseen=on_unseen,
        )  # fmt: skip
        return Unlearned(model, result.trainable_parameters, time.perf_counter() - started, result)

    return run


def all_weights(
    objective: Callable[[ForgettingTask], Objective],
    saliency: bool = False,
    retain: float = 0.0,
    batch_size: int = BATCH_SIZE,
) -> Callable[[ForgettingTask, float | None, int | None], Unlearned]:
    """Every weight is trained, or with `saliency` the half with the largest forget gradients (SalUn, 2310.12508)."""

    def run(task: ForgettingTask, learning_rate: float | None, epochs: int | None) -> Unlearned:
        started = time.perf_counter()
        model = copy.deepcopy(task.original)
        weights = dict(model.named_parameters())
        count = sum(weight.numel() for weight in weights.values())
        if saliency:
            sources = {name: WeightSource(weight) for name, weight in weights.items()}
            sums = {name: GradientSum(source.shape, source.dtype, source.device) for name, source in sources.items()}
            forget = loader(task.forget, task.seed, batch_size)
            stream_gradients(model, sources, sums, forget, objectives.GradientAscent(), progress=PROGRESS)
            magnitudes = {name: total.total.abs() for name, total in sums.items()}
            threshold = torch.cat([magnitude.flatten() for magnitude in magnitudes.values()]).median()
            count = 0
            for name, weight in weights.items():
                mask = (magnitudes[name] >= threshold).to(weight.dtype)
                weight.register_hook(lambda gradient, mask=mask: gradient * mask)
                count += int(mask.sum())
        _train(model, task, objective(task), learning_rate, epochs, retain, batch_size)
        return Unlearned(model, count, time.perf_counter() - started)

    return run


def amun(
    retain: float, batch_size: int = BATCH_SIZE
) -> Callable[[ForgettingTask, float | None, int | None], Unlearned]:
    """All weights learn the forget images beside their nearest adversarial ones (AMUN, ICML 2025)."""

    def run(task: ForgettingTask, learning_rate: float | None, epochs: int | None) -> Unlearned:
        started = time.perf_counter()
        model = copy.deepcopy(task.original)
        # In units of normalised pixels, where most boundaries are about one away; 15 steps of a tenth reach the radius.
        forget = loader(task.forget, task.seed, batch_size)
        pairs = objectives.adversarial_examples(model, forget, radius=0.4, steps=15)
        objective = objectives.AdversarialUnlearning()
        result = _train(model, task, objective, learning_rate, epochs, retain, batch_size, pairs)
        return Unlearned(model, result.trainable_parameters, time.perf_counter() - started)

    return run


def lora(
    objective: Callable[[ForgettingTask], Objective],
    retain: float,
    budget: Callable[[ForgettingTask], int],
    batch_size: int = BATCH_SIZE,
    keep: type[Objective] = objectives.CrossEntropy,
) -> Callable[[ForgettingTask, float | None, int | None], Unlearned]:
    """PEFT's LoRA with the same objective and about as many trained parameters as the budget says.

    On all layers, at the rank that comes nearest to the budget. Where rank 1 on all of them is too dear, rank 1 on
    layers from the classifier backwards, at least one, until the next would exceed the budget.
    """

    def run(task: ForgettingTask, learning_rate: float | None, epochs: int | None) -> Unlearned:
        started = time.perf_counter()
        model = copy.deepcopy(task.original)
        costs = weight_layers(model)
        rank, names = round(budget(task) / sum(costs.values())), list(costs)
        if rank == 0:
            rank, names, left = 1, [], budget(task)
            for name, cost in reversed(costs.items()):
                if names and cost > left:
                    break
                names, left = [*names, name], left - cost
        torch.manual_seed(task.seed)
        adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
        result = _train(adapted, task, objective(task), learning_rate, epochs, retain, batch_size, keep=keep)
        return Unlearned(adapted, result.trainable_parameters, time.perf_counter() - started)

    return run
