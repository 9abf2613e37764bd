"""What must be so before a run by natural gradients takes a step, and of each batch: numbers, and outputs to go by."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch

from semu_peft.objectives.base import Objective

from .progress import Position
from .trials import Tried


def check_first_look(start: Tried, objective: Objective, limit: float | None) -> None:
    """Check what the model does with the batches that are held; warn where it does more damage than may be done.

    Args:
        start: That, where the run begins.
        objective: The forget objective.
        limit: The damage that may be done; None for no budget.

    Raises:
        ValueError: A loss is not finite, or no objective tells the model's outputs.
    """
    if not math.isfinite(start.values["loss"]):
        wrong = [term for term, evaluation in start.terms if not torch.isfinite(evaluation.loss).all()]
        of = f" of a `{'forget' if wrong[0].is_forget else 'retain'}` batch" if wrong else ""  # or of another process
        raise ValueError(
            f"The loss{of} is {start.values['loss']} before any step. Look for a number in the batches, or in the "
            "model's weights, that is not finite."
        )
    if not any(evaluation.outputs for _, evaluation in start.terms):
        raise ValueError(
            f"`objective` must tell the model's outputs, got None of {type(objective).__name__}.outputs. Return "
            "them, or give a `learning_rate`, by which AdamW trains."
        )
    if limit is not None and start.damage > limit:
        warnings.warn(
            f"The run begins above `max_retain_kl`={limit:g}: the model is {start.damage:.3g} from the original "
            "already. Steps that lower this are taken, and others on batches where it is within.",
            stacklevel=5,
        )


def check_data(at_start: dict[str, float], at: Position, number: int = 1) -> None:
    """Check that a batch whose loss is not finite has a finite one where the run began.

    Args:
        at_start: What the model does with it there.
        at: Where the batch stands.
        number: How many there are, of a step that accumulates several.

    Raises:
        ValueError: It has not.

    Examples:
        >>> check_data({"loss": float("nan")}, Position(batch=3))
        Traceback (most recent call last):
        ValueError: The loss is nan on batch 3 of epoch 0, where the run began as well. Look for a number there, ...
    """
    if not math.isfinite(at_start["loss"]):
        which = f"batch {at.batch}" if number == 1 else f"batches {at.batch} to {at.batch + number - 1}"
        raise ValueError(
            f"The loss is {at_start['loss']} on {which} of epoch {at.epoch}, where the run began as well. "
            "Look for a number there, or in the retain data beside it, that is not finite."
        )


def check_shards(batches: int | None, mean_over_processes: Callable[[dict[str, float]], dict[str, float]]) -> None:
    """Refuse forget data that some processes have more batches of, as each step is agreed on by all of them.

    Args:
        batches: How many this process has; None of a stream.
        mean_over_processes: Agrees on numbers.

    Raises:
        ValueError: On each process, where they are not as many.

    Examples:
        >>> check_shards(3, lambda values: values)
        >>> check_shards(3, lambda values: {"batches": 2.5, "squares": 6.5})
        Traceback (most recent call last):
        ValueError: `forget` must have as many batches on each process, got 3 on this one and 2.5 on average. Leave...
    """
    own = float(batches or 0)
    told = mean_over_processes({"batches": own, "squares": own**2})
    if told["squares"] - told["batches"] ** 2 > 1e-9 * told["squares"]:
        raise ValueError(
            f"`forget` must have as many batches on each process, got {own:g} on this one and {told['batches']:g} on "
            "average. Leave Accelerate's `even_batches` on, drop the last batch, or give a `learning_rate`, by which "
            "AdamW trains."
        )
