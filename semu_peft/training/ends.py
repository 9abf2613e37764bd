"""Where a run by natural gradients is left: at its best place within the damage budget, or at the one chosen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor

from .loop import Losses
from .natural import Choose
from .proximal import Proximal

_HALVINGS = 6  # of the way back from a place that does more damage than may be done

End = tuple[Tensor, Losses]
"""A place, all cores in one, and what the model does there with the held batches."""


class Ends:
    """Compares places on the batches that the start was measured on.

    Args:
        proximal: With the start; what it costs to be away from it is a part of the loss.
        start_values: What the model does there.
        values_at: Measures another place.
        limit: The damage that may be done; None for no budget.

    Examples:
        >>> from semu_peft.training.proximal import Proximal
        >>> start = Proximal(torch.zeros(1))
        >>> ends = Ends(start, {"loss": 1.0}, lambda place: {"loss": (place.item() - 1) ** 2}, limit=None)
        >>> ends.best([torch.tensor([0.5]), torch.tensor([3.0])])
        (tensor([0.5000]), {'loss': 0.25})
    """

    def __init__(
        self,
        proximal: Proximal,
        start_values: Losses,
        values_at: Callable[[Tensor], Losses],
        limit: float | None,
    ) -> None:
        self.proximal, self.start_values, self.values_at, self.limit = proximal, start_values, values_at, limit

    def best(self, places: Sequence[Tensor]) -> End:
        """The one with the lowest loss of these and the start, the last of equals.

        Each step has kept to the budget on a batch of its own alone. Where the last place does not keep to it on these,
        the farthest one that does on the straight way from the start stands in for it.
        """
        ends = [(self.proximal.start, self.start_values)]
        for place in places:
            known = next((values for other, values in ends if torch.equal(other, place)), None)
            ends.append((place, self.values_at(place) if known is None else known))
        within = [end for end in ends if self._is_within_budget(end)]
        if not self._is_within_budget(ends[-1]):
            within += self._on_the_way_to(places[-1])
        return min(reversed(within), key=self._loss)

    def chosen(self, choose: Choose, path: Sequence[Tensor], history: Sequence[Mapping[str, float]]) -> End:
        """The place of the entry that is chosen, or the farthest one on the way to it that keeps to the budget.

        Raises:
            ValueError: `choose` returned no index of the history.
        """
        index = choose(history)
        if isinstance(index, bool) or not isinstance(index, Integral) or not -len(path) <= index < len(path):
            raise ValueError(
                f"`choose` must return an index of the history, from 0 to {len(path) - 1} or counted from its end, got "
                f"{index!r}. The cores are as the last step left them."
            )
        place = path[int(index)]
        end = place, self.values_at(place)
        if self._is_within_budget(end):
            return end
        warnings.warn(
            f"`choose` took a point with a damage of {end[1]['damage']:.3g} on the batches that the run is compared "
            f"on, above `max_retain_kl={self.limit}`: the farthest one on the way there that keeps to it is taken.",
            stacklevel=7,
        )
        return ([(self.proximal.start, self.start_values)] + self._on_the_way_to(place))[-1]

    def _on_the_way_to(self, place: Tensor) -> list[End]:
        """The farthest end within the budget that halving finds between the start and a place, if there is one."""
        found: list[End] = []
        near, far = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (near + far) / 2
            between = torch.lerp(self.proximal.start, place, middle)
            end = between, self.values_at(between)
            if self._is_within_budget(end):
                near, found = middle, [end]
            else:
                far = middle
        return found

    def _is_within_budget(self, end: End) -> bool:
        """Or no farther from the original than the start, which may be above it already."""
        if self.limit is None:
            return True
        return end[1].get("damage", 0.0) <= max(self.limit, self.start_values.get("damage", 0.0))

    def _loss(self, end: End) -> float:
        loss = end[1]["loss"] + self.proximal.at(end[0])
        return loss if math.isfinite(loss) else math.inf
