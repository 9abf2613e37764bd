"""What an objective is, and how objectives add up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


class Objective(ABC):
    """A callable `(model, batch) -> scalar loss` that is to be minimised.

    Objectives add and scale, `forget + 0.5 * other`, and save their random state with
    [`state_dict`][semu_peft.objectives.base.Objective.state_dict], so that a resumed run draws what an uninterrupted
    one would have drawn. Any other callable with this signature serves as well.
    """

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of one batch as a scalar tensor, in float32 or better."""

    def state_dict(self) -> dict[str, Any]:
        """What must be saved to go on exactly: the random state, where there is one."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - most objectives have no state
        """Restore what `state_dict` returned."""

    def __mul__(self, weight: float) -> WeightedSum:
        return WeightedSum(((float(weight), self),))

    __rmul__ = __mul__

    def __add__(self, other: Objective) -> WeightedSum:
        if not isinstance(other, Objective):
            return NotImplemented
        return WeightedSum((*_terms(self), *_terms(other)))


@dataclass(frozen=True)
class WeightedSum(Objective):
    """`Σ weight · objective`, made by adding and scaling objectives. All terms see the same batch."""

    terms: tuple[tuple[float, Objective], ...]

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        losses = [weight * objective(model, batch) for weight, objective in self.terms]
        return torch.stack(losses).sum()

    def __mul__(self, weight: float) -> WeightedSum:
        return WeightedSum(tuple((float(weight) * own, objective) for own, objective in self.terms))

    __rmul__ = __mul__

    def state_dict(self) -> dict[str, Any]:
        return {str(index): objective.state_dict() for index, (_, objective) in enumerate(self.terms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, (_, objective) in enumerate(self.terms):
            objective.load_state_dict(state[str(index)])


def _terms(objective: Objective) -> tuple[tuple[float, Objective], ...]:
    return objective.terms if isinstance(objective, WeightedSum) else ((1.0, objective),)


@dataclass
class RandomObjective(Objective):
    """An objective that draws from a generator of its own, on the CPU, so that the draws do not depend on the device.

    Args:
        seed: Seed of the generator.
    """

    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
