"""Small entries go to exactly zero: the proximal step of an L1 penalty, and its schedule."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from semu_peft.arguments import check_count, check_number, check_switch

from .base import Rule, Step


@dataclass(frozen=True)
class Ramp:
    """A number that goes linearly from `first` to `last` between two steps, and stays there.

    Args:
        first: Up to the step `begin`.
        last: From the step `end` on.
        begin: The step at which it leaves `first`.
        end: The step at which it reaches `last`.

    Raises:
        TypeError: A number is none.
        ValueError: One is negative, or the end does not lie behind the beginning.

    Examples:
        >>> [Ramp(0.0, 0.4, begin=2, end=4)(number) for number in range(6)]
        [0.0, 0.0, 0.0, 0.2, 0.4, 0.4]
    """

    first: float
    last: float
    begin: int
    end: int

    def __post_init__(self) -> None:
        check_number("first", self.first, low=0)
        check_number("last", self.last, low=0)
        check_count("begin", self.begin, least=0)
        check_count("end", self.end, least=self.begin + 1)

    def __call__(self, number: int) -> float:
        """The number at a step."""
        share = min(max((number - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return self.first + share * (self.last - self.first)


@dataclass
class SoftThreshold(Rule):
    """After each step bring every entry closer to zero by `ξ`, and those within `ξ` to zero: `sign(θ) max(|θ| − ξ, 0)`.

    This is the proximal operator of `ξ ‖θ‖₁`. On the diagonal core of a SEMU adapter it chooses the rank: a direction
    whose entry is zero is gone, and [`prune`][semu_peft.adapter.rerank.prune] drops it without changing an output. SoRA
    takes 3e-4 and 7e-4 on the gate of a LoRA; CoDyRA trains densely for half of the run and then lets `ξ` rise from 0
    to 5e-3, `Ramp(0, 5e-3, begin=steps // 2, end=steps)`. Both released codes subtract before they compare, so that all
    of `(−2ξ, 2ξ)` goes to zero; this does what their papers say. With `times_learning_rate` it is the proximal gradient
    step of the penalty `ξ ‖θ‖₁` beside the loss: l1-sparse unlearning with `Ramp(alpha, 0, begin=0, end=steps)`.

    Source: SoRA, Ding et al., EMNLP 2023, arXiv 2311.11696; CoDyRA, arXiv 2412.01004; l1-sparse, Jia et al., NeurIPS
    2023, arXiv 2304.04934.

    Args:
        threshold: `ξ`, or a [`Ramp`][semu_peft.training.rules.soft_threshold.Ramp] that gives it by step.
        times_learning_rate: Multiply it by the optimiser's learning rate at that step.
        parameters: A regular expression that is looked for in the names of those parameters that it is for; all by
            default.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: `threshold` is negative; in a run, `parameters` matches none of those that are trained.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([0.5, 1.5, 2.5, -1.5]))
        >>> with torch.no_grad():
        ...     SoftThreshold(1.0).update(Step(0, torch.nn.Identity(), {"weight": weight}))
        >>> weight.data
        tensor([ 0.0000,  0.5000,  1.5000, -0.5000])
    """

    threshold: float | Ramp
    times_learning_rate: bool = False
    parameters: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, Ramp):
            check_number("threshold", self.threshold, low=0)
        check_switch("times_learning_rate", self.times_learning_rate)
        if self.parameters is not None and not isinstance(self.parameters, str):
            raise TypeError(f"`parameters` must be a regular expression, got {self.parameters!r}. Join names by `|`.")

    def update(self, step: Step) -> None:
        threshold = self.threshold(step.number) if isinstance(self.threshold, Ramp) else self.threshold
        chosen = {name for name in step.parameters if self.parameters is None or re.search(self.parameters, name)}
        if not chosen:
            raise ValueError(
                f"`parameters` must match what is trained, got {self.parameters!r}, and the run trains "
                f"{list(step.parameters)[:3]} …. Leave it out for all."
            )
        rates = self._rates(step)
        for name in chosen:
            _shrink(step.parameters[name], threshold * rates.get(id(step.parameters[name]), 1.0))

    def _rates(self, step: Step) -> dict[int, float]:
        if not self.times_learning_rate:
            return {}
        groups = step.needed_optimizer(self, "with `times_learning_rate` reads a learning rate").param_groups
        return {id(parameter): float(group["lr"]) for group in groups for parameter in group["params"]}


def _shrink(parameter: Tensor, threshold: float) -> None:
    parameter.copy_(torch.nn.functional.softshrink(parameter.detach(), threshold))
