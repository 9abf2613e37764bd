"""Callbacks look on at a run, step by step and epoch by epoch, and may stop it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from semu_peft.arguments import check_number, check_switch
from semu_peft.gradients.processes import whole

from .parameters import put_into, trained_parameters
from .progress import Progress

Event = Literal["on_train_begin", "on_step_end", "on_epoch_end", "on_train_end"]
EVENTS: tuple[Event, ...] = ("on_train_begin", "on_step_end", "on_epoch_end", "on_train_end")


@dataclass
class Control:
    """What a callback may ask of the run.

    Attributes:
        should_stop: Stop after this step.
        reason: Why, in words for `UnlearnResult.stop_reason`.
    """

    should_stop: bool = False
    reason: str = "a callback stopped the run"

    def stop(self, reason: str) -> None:
        """Stop after this step, and say why."""
        self.should_stop, self.reason = True, reason


@dataclass(eq=False)
class TrainingContext:
    """What a callback sees of a run.

    Attributes:
        model: The model, in eval mode.
        progress: Steps, epochs and history so far.
        total_steps: How many steps the run has if nobody stops it.
        control: Set `control.should_stop` to stop.
    """

    model: nn.Module = field(repr=False)
    progress: Progress
    total_steps: int
    control: Control = field(default_factory=Control)
    track: Callable[[dict[str, float], int], None] = field(default=lambda values, step: None, repr=False)

    def log(self, **values: float) -> None:
        """Add numbers to the history's last entry, and to the run's tracker."""
        if self.progress.history:
            self.progress.history[-1].update(values)
        self.track(dict(values), self.progress.step)


class Callback:
    """Looks on at a run; subclasses define what they need of these methods.

    They are called without gradients, and may put the model into whatever mode they like. Any other object that has
    some of the four events serves as well.

    Examples:
        >>> class Print(Callback):
        ...     def on_step_end(self, context):
        ...         print(context.progress.step, sorted(context.progress.history[-1]))
        >>> Print().on_step_end(TrainingContext(nn.Identity(), Progress(1, history=[{"loss": 0.5}]), total_steps=2))
        1 ['loss']
    """

    def on_train_begin(self, context: TrainingContext) -> None:
        """Before the first step, and after a checkpoint was loaded."""

    def on_step_end(self, context: TrainingContext) -> None:
        """After each optimiser step; with natural gradients after those on one batch, which may be two, or none."""

    def on_epoch_end(self, context: TrainingContext) -> None:
        """After each whole pass over the forget batches; `progress.forget.epoch` counts it already."""

    def on_train_end(self, context: TrainingContext) -> None:
        """After the last step of a run that did not fail."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must be saved to go on exactly: tensors, numbers, strings, lists and dictionaries."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


@dataclass
class EarlyStopping(Callback):
    """Stop a run when a metric gains no more, and put back what was best.

    The history has the metric's values as `metric`, at the last step of each epoch.

    Args:
        metric: `(model) -> float`, higher is better, called after every epoch.
        patience: Stop after this many epochs in a row without a gain of `min_delta`.
        min_delta: The least gain that counts.
        restore_best: At the end put back the trained parameters of the epoch with the highest metric.

    Raises:
        TypeError: `metric` cannot be called.
        ValueError: `patience` is not a positive integer.

    Examples:
        >>> EarlyStopping(metric=lambda model: 0.0, patience=3).patience
        3
    """

    metric: Callable[[nn.Module], float] = field(repr=False)
    patience: int = 2
    min_delta: float = 0.01
    restore_best: bool = True

    def __post_init__(self) -> None:
        if not callable(self.metric):
            raise TypeError(f"`metric` must be a function (model) -> float, got {type(self.metric).__name__}.")
        if not isinstance(self.patience, int) or isinstance(self.patience, bool) or self.patience < 1:
            raise ValueError(f"`patience` must be a positive integer, got {self.patience!r}. Give at least 1.")
        check_number("min_delta", self.min_delta)
        check_switch("restore_best", self.restore_best)
        self._forget_earlier_runs()

    def _forget_earlier_runs(self) -> None:
        self.last_gain = -math.inf  # the metric that the next gain is measured from
        self.epochs_without_gain = 0
        self.highest = -math.inf
        self.best: dict[str, Tensor] = {}

    def on_train_begin(self, context: TrainingContext) -> None:
        if context.progress.step == 0:
            self._forget_earlier_runs()
        context.control.should_stop |= self.epochs_without_gain >= self.patience

    def on_epoch_end(self, context: TrainingContext) -> None:
        value = self.metric(context.model)
        value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        check_number("metric", value)
        context.log(metric=value)
        if value >= self.last_gain + self.min_delta:
            self.last_gain, self.epochs_without_gain = value, 0
        else:
            self.epochs_without_gain += 1
        if self.restore_best and value > self.highest:
            self.highest = value
            self.best = {name: p.detach().clone() for name, p in trained_parameters(context.model).items()}
        context.control.should_stop |= self.epochs_without_gain >= self.patience

    def on_train_end(self, context: TrainingContext) -> None:
        parameters = trained_parameters(context.model)
        for name, value in self.best.items():
            put_into(parameters[name], value)
        self.best = {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "last_gain": self.last_gain,
            "epochs_without_gain": self.epochs_without_gain,
            "highest": self.highest,
            "best": {name: whole(value) for name, value in self.best.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_gain, self.epochs_without_gain = state["last_gain"], state["epochs_without_gain"]
        self.highest, self.best = state["highest"], dict(state["best"])


def as_callbacks(callbacks: Any) -> tuple[Any, ...]:
    """Read the argument `callbacks`, one or several objects with some of the events.

    Raises:
        TypeError: Something is a class, or has none of the events.
    """
    several = tuple(callbacks) if isinstance(callbacks, Iterable) else (callbacks,)
    for callback in several:
        if isinstance(callback, type) or not any(callable(getattr(callback, event, None)) for event in EVENTS):
            raise TypeError(
                f"`callbacks` must be objects with some of the methods {', '.join(EVENTS)}, got {callback!r}. Derive "
                "yours from `semu_peft.training.callbacks.Callback`, and give an object of it."
            )
    return several
