"""How many directions a layer gets: by its own energy, by the user's wish, or from one budget for all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from semu_peft.linalg.factorize import SingularFactors
from semu_peft.tuner.config import SemuConfig
from semu_peft.tuner.layer import SemuLayer
from semu_peft.tuner.patterns import match_pattern


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

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import RankBudget, SemuConfig, initialize_semu_weights, objectives
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> model = get_peft_model(base, SemuConfig(target_modules=["0", "2"], explained_variance=1.0))
        >>> forget = [(torch.randn(8, 6), torch.arange(8) % 4)]
        >>> profile = initialize_semu_weights(
        ...     model, forget, objectives.RandomLabel(), rank_budget=RankBudget(3), progress=False
        ... )
        >>> sum(layer.rank for layer in profile.layers.values())
        3
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


def explained_variance_of(config: SemuConfig, name: str) -> float:
    """γ of the layer of that name."""
    return match_pattern(config.explained_variance_pattern, name) or config.explained_variance


def plan_ranks(
    found: Mapping[str, SingularFactors],
    layers: Mapping[str, SemuLayer],
    *,
    explained_variance: float | None = None,
    budget: RankBudget | None = None,
    adapter_name: str = "default",
) -> dict[str, int]:
    """The rank of each layer, from the directions that were found and all that has been asked for.

    A layer gets the rank that `SemuConfig.rank_pattern` names for it, or else as many directions as explain γ of its
    energy, `SemuConfig.r` at the most; in any case no more than were found. A budget is then spread over the layers,
    with these ranks as upper bounds.

    Args:
        found: Each layer's directions by name.
        layers: The adapter's layers by name.
        explained_variance: γ for all layers, instead of the configuration's and the wish in `rank_pattern`.
        budget: One budget for all layers.
        adapter_name: The adapter's name.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.linalg.factorize import leading_factors
        >>> from semu_peft.tuner.adapted import semu_layers
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), SemuConfig(target_modules=["0"]))
        >>> found = {"0": leading_factors(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])), 1.0)}
        >>> plan_ranks(found, semu_layers(model)), plan_ranks(found, semu_layers(model), budget=RankBudget(1))
        ({'0': 3}, {'0': 1})
    """
    ranks = {}
    for name, factors in found.items():
        config = layers[name].configs[adapter_name]
        requested = layers[name].requested_ranks[adapter_name] if explained_variance is None else None
        if requested is not None:
            ranks[name] = min(requested, factors.rank)
            continue
        rank = factors.reaching(explained_variance or explained_variance_of(config, name)).rank
        ranks[name] = rank if config.r is None else min(rank, config.r)
    if budget is None:
        return ranks
    bids = {
        name: _candidate(factors.leading(ranks[name]), layers[name].configs[adapter_name].core == "diagonal")
        for name, factors in found.items()
    }
    return spread_budget(bids, budget)


def _candidate(factors: SingularFactors, diagonal: bool) -> Candidate:
    energies = factors.singular_values[..., : factors.rank].double().square()
    batched = energies.dim() == 2
    return Candidate(
        energies.sum(0) if batched else energies,
        float(factors.energy.sum()),
        diagonal,
        energies.shape[0] if batched else 1,
    )
