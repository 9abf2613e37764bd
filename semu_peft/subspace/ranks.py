"""How many directions a layer gets: by its own energy, or from one budget for all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class RankBudget:
    """One budget for all layers, spent where a direction explains the most.

    Directions are taken in the order of the energy that they explain, per parameter that they cost, until the budget
    is spent. The configuration's `explained_variance` and `r` stay upper bounds of every layer; a layer may get none.

    Args:
        total: How many directions, or trainable parameters, all layers may have together.
        unit: What `total` counts: `"directions"`, or trainable `"parameters"` (a full core of rank `r` has `r²`).
        relative_to: What a direction's energy is measured against. `"layer"`: its own layer's gradient, so that every
            layer has a say; `"model"`: all layers' together, so that layers with large gradients get the most.

    Raises:
        ValueError: A value is outside its range.
    """

    total: int
    unit: Literal["directions", "parameters"] = "directions"
    relative_to: Literal["layer", "model"] = "layer"

    def __post_init__(self) -> None:
        if isinstance(self.total, bool) or not isinstance(self.total, int) or self.total < 1:
            raise ValueError(f"`total` of a RankBudget must be a positive integer, got {self.total!r}.")
        for name, choices in (("unit", ("directions", "parameters")), ("relative_to", ("layer", "model"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class Candidate:
    """What a layer bids with: the energy of each direction it may have, `(q,)`, of `energy` in all, and their cost.

    Args:
        energies: `s_i²`, descending; for a batch of matrices of one rank their sums.
        energy: `‖G‖²` of the layer.
        diagonal: Whether its core is diagonal, so that a direction costs one parameter (for each matrix).
        matrices: How many matrices the layer has, 1 unless a convolution is read channel by channel.
    """

    energies: Tensor
    energy: float
    diagonal: bool = False
    matrices: int = 1

    def cost(self, rank: int) -> int:
        """Trainable parameters at this rank."""
        return self.matrices * (rank if self.diagonal else rank * rank)


def spread_budget(candidates: Mapping[str, Candidate], budget: RankBudget) -> dict[str, int]:
    """The rank of each layer under a budget, greedily.

    Within a layer energies fall and costs rise, so the greedy order is the best one until the last direction that still
    fits. Ties go to the earlier layer.

    Args:
        candidates: By layer name, in the model's order.
        budget: What there is to spend.
    """
    bids: list[tuple[float, int, str, int, int]] = []
    for position, (name, candidate) in enumerate(candidates.items()):
        scale = candidate.energy if budget.relative_to == "layer" else 1.0
        for index, energy in enumerate(candidate.energies.tolist()):
            if energy <= 0:
                break
            price = candidate.cost(index + 1) - candidate.cost(index)
            price = price if budget.unit == "parameters" else 1
            bids.append((-energy / scale / price, position, name, index, price))
    ranks = dict.fromkeys(candidates, 0)
    left = budget.total
    for _, _, name, index, price in sorted(bids):
        # A layer whose next direction was too dear gets no later one either: ranks count leading directions.
        if price <= left and ranks[name] == index:
            ranks[name] += 1
            left -= price
    return ranks
