"""What the damage weighs in the steps of a run that has come to the edge of its budget."""

from __future__ import annotations

from dataclasses import dataclass

_RISE, _FALL, _MOST = 1.4, 0.5, 100.0
_ROOM = 0.8  # of the budget: with less spent, the pressure falls
_NONE = 0.1


@dataclass
class Pressure:
    """Leads a run along the edge of its budget where single steps only ran against it.

    A step that would spend more than there is gets shorter and shorter, so that a run which has come to the edge stands
    still, though there may be a way along it, or back and then on. So with each step that the budget made shorter, the
    damage weighs more in the next ones, and less again where there is room.

    Args:
        limit: The budget; None for none, and no pressure.
        times: How many times its weight in the loss the damage weighs beyond it.

    Examples:
        >>> pressure = Pressure(limit=1.0)
        >>> for damage, was_refused in [(0.9, True), (0.95, True), (0.7, False), (0.2, False)]:
        ...     pressure.follow(damage, was_refused=was_refused)
        ...     print(round(pressure.times, 2))
        0.4
        0.96
        0.48
        0.24
    """

    limit: float | None
    times: float = 0.0

    def follow(self, damage: float, *, was_refused: bool) -> None:
        """Take what a step has led to, and whether the budget refused it at first, or at all."""
        if self.limit is None:
            return
        if was_refused:
            self.times = min(_RISE * (1 + self.times) - 1, _MOST)  # of the weight in all
        elif damage < _ROOM * self.limit:
            self.times = _FALL * self.times if self.times > _NONE else 0.0
