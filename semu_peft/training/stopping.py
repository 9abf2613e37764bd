"""When a run by natural gradients ends: how forgotten is enough, and how long a loss that stays is waited for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from semu_peft.objectives.base import Objective, WeightedSum

from .loop import Losses
from .natural import NaturalGradient

FORGOTTEN = "the forget data are forgotten"
LAST_FORGOTTEN = "the last batches are forgotten, and others are not"
ALREADY_FORGOTTEN = "the forget data were forgotten already"
AT_MINIMUM = {FORGOTTEN: "the loss is at its minimum", ALREADY_FORGOTTEN: "the loss was at its minimum already"}
"""What is said in their place of an objective whose minimum does not mean that anything is forgotten."""
BUDGET_SPENT = "the damage budget is spent"
NO_LONGER_IMPROVES = "the loss no longer falls"
NOT_FINITE = "the loss was not finite any more, or its gradient, so the best cores before were put back"

_FALL_THAT_COUNTS = 0.5  # of the tolerance
_TOLERANCE = 0.01  # by default
_PATIENCE = 4  # by default, or as many batches as bring
_PATIENT_EXAMPLES = 64
_SHARE_OF_THE_WAY = 0.02  # from the start to the minimum, that may be left by default
_MEMORY = 0.5  # of the running loss, which follows it fast
_MUCH = 0.1  # of the way back to the start, or of an answer's probability: a batch that is still remembered


class Stopping:
    """Follows the loss of a run over its batches.

    Args:
        natural: Its tolerance and patience.
        objective: The forget objective.
        has_retain_data: Whether any hold what the last steps would be paid for by.
        turns: What is minimised may change from batch to batch, in so many turns: the running loss is over all of them.

    Attributes:
        tolerance: How forgotten is enough.
        start_loss: That of the batches that are held, where the run began; NaN until it is known.
        start_forget_loss: The forget loss in it.
        lowest_forget_loss: That of the batch where it was at its lowest.
        failures: Batches in a row of which no step was good.
        stalled: Batches since the running loss was at its lowest.
        lowest: Where that was.
        running: The running loss of each turn, the oldest first.
        forgotten_batches: Batches in a row that were forgotten.
        waiting: For how many batches the run goes on whatever they say.
        budget_was_hit: Whether a step was taken back for the damage budget since the running loss was at its lowest.

    Examples:
        >>> from semu_peft.objectives import CrossEntropy
        >>> stopping = Stopping(NaturalGradient(tolerance=0.1, patience=2), CrossEntropy(), has_retain_data=False)
        >>> [stopping.follow(loss) for loss in (2.0, 1.0, 1.6)]  # whether the running loss is at its lowest
        [True, True, False]
        >>> stopping.reason({"forget_loss": 1.6}, patience=1, forgotten_in_a_row=2)
        'the loss no longer falls'
    """

    def __init__(
        self, natural: NaturalGradient, objective: Objective, *, has_retain_data: bool, turns: int = 1
    ) -> None:
        self.natural, self.objective, self.has_retain_data, self.turns = natural, objective, has_retain_data, turns
        self.tolerance = natural.tolerance or _TOLERANCE
        self.start_loss = self.start_forget_loss = math.nan
        self.lowest_forget_loss, self.budget_was_hit = math.inf, False
        self.failures = self.forgotten_batches = self.waiting = 0
        self.begin_again()

    def begin(self, values: Losses) -> None:
        """Take what the model does where the run begins."""
        self.start_loss, self.start_forget_loss = values["loss"], values["forget_loss"]

    def begin_again(self) -> None:
        """Forget what was seen on the way: the run goes back to its start."""
        self.stalled, self.lowest = 0, math.inf
        self.running: list[float] = []

    def follow(self, loss: float) -> bool:
        """Take the loss of a batch; returns whether the running loss is at its lowest, by enough to count."""
        if len(self.running) == self.turns:
            loss = _MEMORY * self.running.pop(0) + (1 - _MEMORY) * loss
        self.running.append(loss)
        if len(self.running) < self.turns:
            return False  # until each has had its turn
        running = sum(self.running) / len(self.running)
        if math.isinf(self.lowest) or running < self.lowest - _FALL_THAT_COUNTS * self.enough(self.lowest):
            self.lowest, self.stalled, self.budget_was_hit = running, 0, False
            return True
        self.stalled += 1
        return False

    def reason(self, values: Losses, *, patience: int, forgotten_in_a_row: int, stretch: int = 1) -> str | None:
        """Why to end here, at a batch of these values, or None.

        Args:
            values: What the model does with its cores on the batch.
            patience: How many batches to wait.
            forgotten_in_a_row: After how many batches that are forgotten all are.
            stretch: How many times longer a loss that does not fall is waited for, where steps are short by design.
        """
        is_forgotten = self.is_forgotten(values, self.enough())
        self.forgotten_batches = self.forgotten_batches + 1 if is_forgotten else 0
        self.lowest_forget_loss = min(self.lowest_forget_loss, values["forget_loss"])
        if self.waiting:
            self.waiting -= 1
            return None
        if self.forgotten_batches >= max(self.turns, forgotten_in_a_row):
            return FORGOTTEN
        if max(self.stalled / stretch, self.failures) >= patience:
            return BUDGET_SPENT if self.budget_was_hit else NO_LONGER_IMPROVES
        return None

    def patience(self, examples: int, batches: int | None, *, is_exact: bool) -> int:
        """How many batches to wait for a lower loss, of so many examples each: a few images are not all alike.

        Args:
            examples: Of a batch, of all processes.
            batches: How many the forget data have, where that is known.
            is_exact: Whether steps are by the whole matrix, and so end where one batch ends.
        """
        if self.natural.patience is not None:
            return self.natural.patience
        if not is_exact or self.objective.distribution != "categorical":
            return self.turns * _PATIENCE
        wanted = math.ceil(_PATIENT_EXAMPLES / max(examples, 1))
        return self.turns * max(_PATIENCE, min(wanted, batches or wanted))

    def enough(self, scale: float | None = None) -> float:
        """How forgotten is enough, in the unit of the loss; by default a share of the way where the way is short.

        Not without retain data: the last steps would be paid for by data that nothing holds.
        """
        tolerated = self.tolerated(self.start_loss if scale is None else scale)
        minimum = self.objective.minimum
        by_the_way = self.natural.tolerance is None and self.has_retain_data
        if not by_the_way or minimum is None or not self.start_loss > minimum:
            return tolerated
        return min(tolerated, _SHARE_OF_THE_WAY * (self.start_loss - minimum))

    def tolerated(self, scale: float) -> float:
        """The tolerance, in the unit of the loss; a squared error has none of its own, so it is a share of `scale`."""
        return self.tolerance * self.unit(scale)

    def unit(self, scale: float) -> float:
        """What a nat is to the objective: itself, or of a squared error the loss at the start, `scale`.

        Of an objective that is scaled down it is as much less, or one that is remembered whole would be forgotten.
        """
        if self.objective.distribution == "categorical" or not math.isfinite(scale):
            terms = self.objective.terms if isinstance(self.objective, WeightedSum) else ()
            return min(max((abs(weight) for weight, _ in terms), default=1.0) or 1.0, 1.0)
        return abs(scale)

    def is_forgotten(self, values: Losses, enough: float) -> bool:
        """Whether the objective is at its end, or what knows no end has left no answer."""
        minimum = self.objective.minimum
        if minimum is None:
            return values.get("answer_probability", math.inf) <= self.tolerance
        return values["forget_loss"] - minimum <= enough

    def is_remembered(self, values: Losses) -> bool:
        """Whether a batch is far from its end, by more than batches differ."""
        minimum = self.objective.minimum
        if minimum is None:
            return values.get("answer_probability", 0.0) > max(_MUCH, self.tolerance)
        return values["forget_loss"] - minimum > max(self.enough(), _MUCH * (self.start_forget_loss - minimum))

    def has_fallen(self) -> bool:
        """Whether the forget loss has gone some of the way, on a batch at least."""
        minimum, start = self.objective.minimum, self.start_forget_loss
        return minimum is not None and start - self.lowest_forget_loss > _MUCH * (start - minimum)

    def wait(self, batches: int) -> None:
        """Go on for so many batches, as others than those seen are still remembered."""
        self.waiting, self.stalled, self.failures = batches, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Return what follows the run."""
        return {name: getattr(self, name) for name in _FOLLOWED}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name in _FOLLOWED:
            setattr(self, name, state.get(name, getattr(self, name)))  # of a version that followed less
        if isinstance(self.running, float):  # of a version that knew no turns
            self.running = [] if math.isnan(self.running) else [self.running]


_FOLLOWED = (
    "failures", "stalled", "running", "lowest", "forgotten_batches", "budget_was_hit", "waiting", "start_loss",
    "start_forget_loss", "lowest_forget_loss",
)  # fmt: skip
