"""The methods compared: SEMU and its rivals, each from the original model to an unlearned one through one loop."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from tasks import ForgettingTask
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from semu_peft import Retain, SemuConfig, initialize_semu_weights, objectives, unlearn
from semu_peft.evaluation import predict
from semu_peft.gradients import GradientSum, WeightSource
from semu_peft.gradients.gather import stream_gradients
from semu_peft.objectives import Objective

# Every convolution and the classifier of the ResNet.
TARGET_MODULES = r".*(conv1|conv2|stem|shortcut\.0|classifier)"
BATCH_SIZE = 64


@dataclass
class Unlearned:
    """A model after unlearning, with what it cost."""

    model: nn.Module
    trainable_parameters: int
    seconds: float


@dataclass(frozen=True)
class Method:
    """One row of the table: how the original model is changed, and the settings that were chosen for it."""

    name: str
    run: Callable[[ForgettingTask, float | None, int | None], Unlearned]
    learning_rate: float | None = None  # without: the defaults of `unlearn`
    epochs: int | None = None


def loader(dataset: TensorDataset, seed: int, batch_size: int = BATCH_SIZE) -> DataLoader[tuple[Tensor, ...]]:
    """Shuffled batches, in an order that `seed` fixes."""
    return DataLoader(dataset, batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))


def best_objective(task: ForgettingTask) -> Objective:
    """A class is struck out; random examples are treated as unseen ones. The original is the adapter switched off."""
    return _best_objective(task, None)


def best_objective_with_copy(task: ForgettingTask) -> Objective:
    """The same for a model without an adapter, with the original model as a second copy."""
    return _best_objective(task, task.original)


def _best_objective(task: ForgettingTask, reference: nn.Module | None) -> Objective:
    if task.held_out is None:
        return objectives.DecoupledDistillation(reference)
    confidences = predict(task.original, DataLoader(task.held_out, 1000), progress=False).confidence
    return objectives.UnseenConfidence(confidences, reference)


def _train(
    model: nn.Module,
    task: ForgettingTask,
    objective: Objective,
    learning_rate: float | None,
    epochs: int | None,
    retain: float,
    batch_size: int = BATCH_SIZE,
) -> int:
    kept = Retain(loader(task.retain, task.seed, batch_size), objectives.CrossEntropy(), retain) if retain else None
    result = unlearn(
        model,
        loader(task.forget, task.seed, batch_size),
        objective,
        retain=kept,
        epochs=epochs,
        learning_rate=learning_rate,
        seed=task.seed,
    )
    return result.trainable_parameters


def semu(
    objective: Callable[[ForgettingTask], Objective],
    retain: float = 0.0,
    batch_size: int = BATCH_SIZE,
    **settings: object,
) -> Callable[[ForgettingTask, float | None, int | None], Unlearned]:
    """SEMU with an objective, and `retain` times the loss on retain data."""

    def run(task: ForgettingTask, learning_rate: float | None, epochs: int | None) -> Unlearned:
        started = time.perf_counter()
        loss = objective(task)
        config = SemuConfig(**{"target_modules": TARGET_MODULES, **settings})
        model = get_peft_model(copy.deepcopy(task.original), config)
        initialize_semu_weights(model, loader(task.forget, task.seed), loss)
        count = _train(model, task, loss, learning_rate, epochs, retain, batch_size)
        return Unlearned(model, count, time.perf_counter() - started)

    return run


def all_weights(
    objective: Callable[[ForgettingTask], Objective], saliency: bool = False, retain: float = 0.0
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
            stream_gradients(model, sources, sums, loader(task.forget, task.seed), objectives.GradientAscent())
            magnitudes = {name: total.total.abs() for name, total in sums.items()}
            threshold = torch.cat([magnitude.flatten() for magnitude in magnitudes.values()]).median()
            count = 0
            for name, weight in weights.items():
                mask = (magnitudes[name] >= threshold).to(weight.dtype)
                weight.register_hook(lambda gradient, mask=mask: gradient * mask)
                count += int(mask.sum())
        _train(model, task, objective(task), learning_rate, epochs, retain)
        return Unlearned(model, count, time.perf_counter() - started)

    return run


def lora(
    objective: Callable[[ForgettingTask], Objective], retain: float, budget: Callable[[ForgettingTask], int]
) -> Callable[[ForgettingTask, float | None, int | None], Unlearned]:
    """PEFT's LoRA with the same objective and about as many trained parameters as the budget says.

    On all layers, at the rank that comes nearest to the budget. Where rank 1 on all of them is too dear, rank 1 on
    layers from the classifier backwards, at least one, until the next would exceed the budget.
    """

    def run(task: ForgettingTask, learning_rate: float | None, epochs: int | None) -> Unlearned:
        started = time.perf_counter()
        model = copy.deepcopy(task.original)
        costs = {
            name: module.weight[0].numel() + module.weight.shape[0]
            for name, module in model.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))
        }
        rank, names = round(budget(task) / sum(costs.values())), list(costs)
        if rank == 0:
            rank, names, left = 1, [], budget(task)
            for name, cost in reversed(costs.items()):
                if names and cost > left:
                    break
                names, left = [*names, name], left - cost
        torch.manual_seed(task.seed)
        adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
        count = _train(adapted, task, objective(task), learning_rate, epochs, retain)
        return Unlearned(adapted, count, time.perf_counter() - started)

    return run
