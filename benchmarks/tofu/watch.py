"""What is seen of a run on its way, and the values that it had at the moments that count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from cells import BUDGETS
from machine import clock
from torch import Tensor, nn

from semu_peft import Callback

EVERY = 5  # steps between two looks
CLOSELY = 3  # and where a run is to end at its budgets
HALVINGS = 4  # of the way between two looks

Values = dict[str, Tensor]
"""Values of what is trained, by name: what a run does not train, as a core of rank 0, need not be there."""


@torch.no_grad()
def put(model: nn.Module, values: Values) -> None:
    """Put values into the model."""
    for name, value in values.items():
        model.get_parameter(name).copy_(value)


def values_of(model: nn.Module) -> Values:
    """Copies of what is trained."""
    return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}


@dataclass
class Watch(Callback):
    """Look at the damage on neutral text and at the forget answers, and keep the values at the moments that count.

    It stops the run once the mean answer is as unlikely as answers that the model never learnt: no gold is needed.
    """

    damage: Callable[[nn.Module], float]
    answers: Callable[[nn.Module], float]
    unseen: float
    moments: dict[str, Values] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    looks: dict[float, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    before: int = 0  # steps of runs before this one

    @property
    def every(self) -> int:
        """Steps between two looks."""
        return EVERY

    @property
    def is_over(self) -> bool:
        """Whether the answers were as unlikely as unseen ones when they were last looked at."""
        return bool(self.looks) and list(self.looks.values())[-1]["answer_nll"] >= self.unseen

    def on_step_end(self, context: Any) -> None:
        if context.progress.step % self.every:
            return
        self.look(context.model, self.before + context.progress.step)
        if self.is_over:
            context.control.stop("the answers are as unlikely as unseen ones, or the damage is beyond the budgets")

    def look(self, model: nn.Module, step: int) -> None:
        """Measure the model as it is now; its values are the end of the run until the next look."""
        began = clock()
        damage, _ = self._seen(model, step)
        for budget in BUDGETS:
            if damage <= budget:
                self._keep(f"KL {budget}", values_of(model), step)
        self._keep("end", values_of(model), step)
        self.seconds += clock() - began

    def _seen(self, model: nn.Module, step: float) -> tuple[float, float]:
        damage, nll = self.damage(model), self.answers(model)
        self.looks[step] = {"step": step, "neutral_kl": damage, "answer_nll": nll}
        return damage, nll

    def _keep(self, moment: str, values: Values, step: float) -> None:
        self.moments[moment], self.steps[moment] = values, step


@dataclass
class WatchToBudgets(Watch):
    """Follow a run to where its damage meets each budget, or its answers are as unlikely as unseen ones.

    Between the last look before that and the first beyond, the place is found by halving the straight way between
    their values, so that runs of long and of short steps are compared at the same damage. Steps then have a fraction.
    """

    met: set[float] = field(default_factory=set)
    _last: tuple[Values, int] | None = None  # values at the last look, and its step

    @property
    def every(self) -> int:
        return CLOSELY

    @property
    def is_over(self) -> bool:
        """Whether all budgets were met."""
        return len(self.met) == len(BUDGETS)

    def on_train_begin(self, context: Any) -> None:
        if self._last is None:
            self.look(context.model, 0)

    def look(self, model: nn.Module, step: int) -> None:
        """Measure the model as it is now, and look back for the budgets that it is beyond."""
        if self.is_over:
            return
        began = clock()
        damage, nll = self._seen(model, step)
        now = values_of(model)
        for budget in sorted(set(BUDGETS) - self.met):
            if damage <= budget and nll <= self.unseen:
                self._keep(f"KL {budget}", now, step)
            else:
                self._keep(f"KL {budget}", *self._last_within(model, budget, now, step, forgotten=nll > self.unseen))
                self.met.add(budget)
        put(model, now)
        self._last = now, step
        self.seconds += clock() - began

    def _last_within(
        self, model: nn.Module, budget: float, now: Values, step: int, *, forgotten: bool
    ) -> tuple[Values, float]:
        """The values furthest on the way from the last look to now that are within the budget, and their step."""
        assert self._last is not None, "the first look is at the model before training, which is within every budget"
        before, first = self._last
        share, found = 0.0, before
        for halving in range(1, HALVINGS + 1):
            tried = share + 0.5**halving
            values = {name: before[name].lerp(end, tried) for name, end in now.items() if name in before}
            put(model, values)
            if self.damage(model) <= budget and not (forgotten and self.answers(model) > self.unseen):
                share, found = tried, values
        return found, round(first + share * (step - first), 3)
