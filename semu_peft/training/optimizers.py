"""The optimiser and the schedule of a run, from what the user gave to make them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from .batches import batches_in
from .settings import Settings

_FEWEST_STEPS = 100  # below that many, AdamW has not got anywhere
_LEARNING_RATE = 3e-2

OptimizerFactory = Callable[[list[Any]], Optimizer]
"""`(parameters) -> Optimizer`, or `(named_parameters) -> Optimizer` with pairs of a name and a parameter."""
SchedulerFactory = Callable[[Optimizer, int], LRScheduler]
"""`(optimizer, total_steps) -> LRScheduler`."""


def default_epochs(batches: int | None, accumulation: int) -> int:
    """Two passes over the forget set, or as many as make 100 steps of AdamW.

    Examples:
        >>> default_epochs(80, 1), default_epochs(3, 1)
        (2, 34)
    """
    if batches is None:
        return 2
    return max(2, math.ceil(_FEWEST_STEPS / math.ceil(batches / accumulation)))


def default_learning_rate(loader: DataLoader[Any], settings: Settings) -> float:
    """AdamW moves each number by up to its rate a step, so a longer run takes a smaller one."""
    batches, accumulation = batches_in(loader), settings.gradient_accumulation_steps
    if batches is None:
        steps = settings.max_steps or _FEWEST_STEPS
    else:
        epochs = settings.epochs or default_epochs(batches, accumulation)
        steps = min(epochs * math.ceil(batches / accumulation), settings.max_steps or 10**9)
    return _LEARNING_RATE * min(1.0, _FEWEST_STEPS / steps)


def make_optimizer(
    factory: OptimizerFactory | None, parameters: Mapping[str, nn.Parameter], learning_rate: float
) -> Optimizer:
    """Make the optimiser of a run; without a factory AdamW.

    Args:
        factory: Gets a list of the parameters; or, where its argument is called `named_parameters`, pairs of a name and
            a parameter.
        parameters: What is trained, by name.
        learning_rate: Of AdamW.

    Raises:
        TypeError: The factory is something else, or returned something else.
        ValueError: It returned an optimiser of other parameters.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> type(make_optimizer(torch.optim.SGD, dict(layer.named_parameters()), 0.1)).__name__
        'SGD'
    """
    if factory is None:
        # AdamW's weight decay would pull the core back to zero, that is, towards remembering.
        return torch.optim.AdamW(list(parameters.values()), lr=learning_rate, weight_decay=0.0)
    if not callable(factory):
        raise TypeError(
            f"`optimizer` must be a function (parameters) -> Optimizer, got {type(factory).__name__}. Write, for "
            "example, `optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)`."
        )
    given = list(parameters.items()) if _takes_names(factory) else list(parameters.values())
    optimizer = factory(given)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"`optimizer` must return a torch Optimizer, got {type(optimizer).__name__}. Check that the function ends "
            "with `return`."
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if held.isdisjoint(map(id, parameters.values())):
        raise ValueError(
            f"`optimizer` must hold the parameters that it is given, got {type(optimizer).__name__} of others, which "
            "would train nothing. Hand on what the function gets."
        )
    return optimizer


def _takes_names(factory: OptimizerFactory) -> bool:
    try:
        return "named_parameters" in inspect.signature(factory).parameters
    except (TypeError, ValueError):  # a callable without a signature
        return False


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether an optimiser's `step` must be given a function that evaluates the loss, as that of L-BFGS.

    Examples:
        >>> import torch
        >>> weight = [torch.nn.Parameter(torch.zeros(1))]
        >>> needs_closure(torch.optim.LBFGS(weight)), needs_closure(torch.optim.SGD(weight))
        (True, False)
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def linear_decay(optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """The learning rate falls linearly to zero over the run, as in transformers' Trainer."""
    return LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=total_steps)


def make_schedule(factory: SchedulerFactory | None, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """Make the schedule of a run; without a factory the learning rate falls linearly to zero.

    Raises:
        TypeError: The factory is something else, or returned something else.

    Examples:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> type(make_schedule(None, optimizer, 10)).__name__
        'LinearLR'
    """
    if factory is not None and not callable(factory):
        raise TypeError(
            f"`scheduler` must be a function (optimizer, total_steps) -> LRScheduler, got {factory!r}. Write, for "
            "example, `scheduler=lambda optimizer, steps: CosineAnnealingLR(optimizer, steps)`."
        )
    schedule = (linear_decay if factory is None else factory)(optimizer, total_steps)
    if not callable(getattr(schedule, "step", None)):
        raise TypeError(
            f"`scheduler` must return a schedule of torch, got {type(schedule).__name__}. Check that the function ends "
            "with `return`."
        )
    if isinstance(schedule, ReduceLROnPlateau):
        raise TypeError(
            "`scheduler` must be stepped without a metric, got ReduceLROnPlateau. Take another, such as "
            "`CosineAnnealingLR`, and `EarlyStopping` to go by a metric."
        )
    return schedule
