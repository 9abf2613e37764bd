"""How far a natural-gradient step goes, and what its outcome says about the next one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .curvature import Curvature

_OVERSHOOT = 1.5  # times what a step may move the outputs, before it is taken back
_AIM = 0.8  # of what a step may move: what the next one is to, as batches differ
_RETAIN_SHARE = 0.1  # of what a step may move on forget data; what it moves on retain data is damage
_FIRST_LENGTH = 0.01  # of Gauss–Newton's


class Outcome(NamedTuple):
    """What a step that was tried did.

    Attributes:
        fall: By how much the loss fell.
        predicted: By how much the curvature said that it would.
        kl: How far the outputs on the forget batch moved.
        retain_kl: How far those on the retain batch did.
        is_over_budget: Whether the damage budget was exceeded.
    """

    fall: float
    predicted: float
    kl: float
    retain_kl: float
    is_over_budget: bool

    @property
    def is_finite(self) -> bool:
        """Whether nothing overflowed."""
        return all(math.isfinite(value) for value in (self.fall, self.kl, self.retain_kl))


class StepControl(ABC):
    """Proposes steps and learns from their outcomes.

    Args:
        kl: How far a step may move the outputs.
        damping: The first damping.
    """

    updates_a_batch: ClassVar[int]
    patience: ClassVar[int]  # times the run's: how much longer a loss that does not fall is waited for
    numbers: ClassVar[tuple[str, ...]]  # that follow the run, for its checkpoints

    def __init__(self, kl: float, damping: float) -> None:
        self.kl, self.damping = kl, damping

    @abstractmethod
    def propose(self, curvature: Curvature, gradient: Tensor) -> tuple[Tensor, float]:
        """A step `(P,)` against the gradient, and the fall of the loss that the curvature promises."""

    def share_of_kl(self, outcome: Outcome) -> float:
        """How much of what a step may move the outputs this one took; it grows with the square of the length."""
        return outcome.kl / self.kl

    def is_too_long(self, outcome: Outcome) -> bool:
        """Whether it moved them too far, whatever else it did."""
        return not outcome.is_finite or self.share_of_kl(outcome) > _OVERSHOOT

    @abstractmethod
    def is_good(self, outcome: Outcome) -> bool:
        """Judge a step that was proposed and tried, and set how far the next one goes."""

    def told(self) -> dict[str, float]:
        """What the history says of the step."""
        return {name: getattr(self, name) for name in self.numbers}

    def state_dict(self) -> dict[str, Any]:
        """Return what follows the run."""
        return {name: getattr(self, name) for name in self.numbers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name in self.numbers:
            setattr(self, name, state[name])


class LevenbergMarquardt(StepControl):
    """Whole steps of a curvature that is exact: its damping follows the ratio of the actual to the promised fall."""

    updates_a_batch = 2  # the second begins with the forward pass that tried the first
    patience = 1
    numbers = ("damping",)

    def propose(self, curvature: Curvature, gradient: Tensor) -> tuple[Tensor, float]:
        step = -curvature.solve(gradient, self.damping)
        return step, -(gradient @ step + 0.5 * step @ curvature.times(step)).item()

    def is_good(self, outcome: Outcome) -> bool:
        if not outcome.is_finite:
            self.damping *= 100.0
        elif self.is_too_long(outcome):
            self.damping *= min(max(2.0 * math.sqrt(outcome.kl / self.kl), 2.0), 1e3)
        elif outcome.is_over_budget or outcome.fall <= 0:
            self.damping *= 4.0
        else:
            ratio = outcome.fall / outcome.predicted if outcome.predicted > 0 else 0.0
            if ratio > 0.75 and outcome.kl < 0.5 * self.kl:
                self.damping = max(self.damping / (10.0 if outcome.kl < 0.05 * self.kl else 3.0), 1e-9)
            elif ratio < 0.25:
                self.damping *= 2.0
            return True
        return False


class TrustRegion(StepControl):
    """Steps along the direction of an approximate curvature, as long as the outputs allow.

    Kronecker factors give good directions and bad lengths. Damping them until the length is right turns the direction
    into the gradient's; here the damping stays and the length alone follows from what the last step moved. No step is
    longer than Gauss–Newton's, and what it moves on retain data is held to a tenth of `kl`.

    Args:
        kl: How far a step may move the outputs.
        damping: The damping of each factor.
        first_fall: The fall of the loss that the first step is to promise, where a hundredth of Gauss–Newton's step
            promises less: a model that is sure of what it knows has next to no gradient there.
    """

    updates_a_batch = 1  # cores of many numbers fit one batch at the cost of others
    patience = 4  # its steps are short by design, so batches differ by more than a step gains
    numbers = ("length", "radius")

    def __init__(self, kl: float, damping: float, first_fall: float = 0.0) -> None:
        super().__init__(kl, damping)
        self.first_fall = first_fall
        self.length = _FIRST_LENGTH  # as a share of Gauss–Newton's
        self.radius = 0.0  # √(step · F step), the unit in which it is carried from step to step; zero before the first

    def propose(self, curvature: Curvature, gradient: Tensor) -> tuple[Tensor, float]:
        direction = -curvature.solve(gradient, self.damping)
        slope, bend = torch.stack([gradient @ direction, direction @ curvature.times(direction)]).tolist()
        bend = max(bend, 1e-30)
        newton = -slope / bend
        if not self.radius:
            promised = -slope * newton  # a small share of the step has that share of it
            first = min(max(_FIRST_LENGTH, self.first_fall / promised), 1.0) if promised > 0 else _FIRST_LENGTH
            self.radius = first * newton * math.sqrt(bend)
        length = min(self.radius / math.sqrt(bend), newton)
        self.radius, self.length = length * math.sqrt(bend), length / newton if newton else 0.0
        return length * direction, -(slope * length + 0.5 * bend * length**2)

    def share_of_kl(self, outcome: Outcome) -> float:
        return max(outcome.kl, outcome.retain_kl / _RETAIN_SHARE) / self.kl

    def is_good(self, outcome: Outcome) -> bool:
        spent = self.share_of_kl(outcome)
        if not outcome.is_finite:
            self.radius *= 0.1
        elif self.is_too_long(outcome):
            self.radius *= min(max(0.8 / math.sqrt(spent), 0.1), 0.5)
        elif outcome.is_over_budget or outcome.fall <= 0:
            self.radius *= 0.3
        else:
            ratio = outcome.fall / outcome.predicted if outcome.predicted > 0 else 0.0
            if ratio < 0.25:
                self.radius *= 0.5
            else:
                most = 2.0 if spent > 0.02 else 4.0
                self.radius *= min(math.sqrt(_AIM / spent), most) if spent > 0 else most
            return True
        return False
