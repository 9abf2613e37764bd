"""Where a run stands."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Position:
    """Where a run stands in a loader that is gone through again and again.

    Attributes:
        epoch: Passes finished.
        batch: Batches of the present pass already seen.
        generators: The states that the loader's own generators had at the beginning of the present pass.
        first_generators: Those that they had at the beginning of the run.
    """

    epoch: int = 0
    batch: int = 0
    generators: list[Any] | None = field(default=None, repr=False)
    first_generators: list[Any] | None = field(default=None, repr=False)

    def next_epoch(self) -> None:
        """Go to the beginning of the next pass."""
        self.epoch, self.batch = self.epoch + 1, 0


@dataclass
class Progress:
    """Where a run stands, as callbacks see it and checkpoints keep it.

    Attributes:
        step: Optimiser steps taken.
        examples: Forget examples seen, on all processes.
        forget: The position in the forget batches.
        retain: The position in the batches of each `Retain`.
        history: One entry a step, see [`UnlearnResult`][semu_peft.training.unlearn.UnlearnResult].

    Examples:
        >>> Progress(step=3).step
        3
    """

    step: int = 0
    examples: int = 0
    forget: Position = field(default_factory=Position)
    retain: list[Position] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list, repr=False)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, lists and dictionaries."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.step, self.examples, self.history = state["step"], state["examples"], state["history"]
        self.forget = Position(**state["forget"])
        self.retain = [Position(**position) for position in state["retain"]]
