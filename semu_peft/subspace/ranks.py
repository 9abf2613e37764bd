"""How many directions a layer gets: by its own energy, by the user's wish, or from one budget for all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from semu_peft.linalg.energy import check_explained_variance, ranks_for_energy
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
        return _numbers(rank, self.diagonal, self.matrices)


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
    energy, `SemuConfig.r` at the most; in any case no more than were found. Where that leaves all cores together fewer
    numbers than `SemuConfig.min_parameters`, the lowest ranks are raised. A budget is spread over the layers instead,
    with the ranks by γ as upper bounds.

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
        ({'0': 4}, {'0': 1})
    """
    wishes = (
        {} if explained_variance is not None else {name: layers[name].requested_ranks[adapter_name] for name in found}
    )
    shares = {
        name: explained_variance or explained_variance_of(layers[name].configs[adapter_name], name) for name in found
    }
    for share in {*shares.values()}:
        check_explained_variance(share)
    ranks, most = {}, {}
    for name, rank in _ranks_by_energy(found, shares).items():
        wished = wishes.get(name)
        config = layers[name].configs[adapter_name]
        upper = found[name].rank if config.r is None or wished is not None else min(config.r, found[name].rank)
        ranks[name] = min(rank if wished is None else wished, upper)
        most[name] = ranks[name] if wished is not None else upper
    if not found:
        return ranks
    if budget is None:
        return _raised(ranks, most, found, layers, adapter_name)
    energies, totals = (
        _on_host({name: getattr(factors, part).double() for name, factors in found.items()})
        for part in ("singular_values", "energy")
    )
    bids = {
        name: _candidate(
            energies[name][..., : ranks[name]].square(),
            sum(totals[name].flatten().tolist()),
            layers[name].configs[adapter_name].core == "diagonal",
        )
        for name in found
    }
    return spread_budget(bids, budget)


def _numbers(rank: int, diagonal: bool, matrices: int) -> int:
    """How many numbers a layer's cores are."""
    return matrices * (rank if diagonal else rank * rank)


def least_rank(layers: Mapping[str, SemuLayer], adapter_name: str = "default") -> int:
    """The rank of every layer that gives all cores together the numbers that `SemuConfig.min_parameters` wants."""
    config = next(iter(layers.values())).configs[adapter_name]
    share = config.min_parameters / len(layers)
    return math.ceil(share if config.core == "diagonal" else math.sqrt(share))


def _raised(
    ranks: dict[str, int],
    upper: Mapping[str, int],
    found: Mapping[str, SingularFactors],
    layers: Mapping[str, SemuLayer],
    adapter_name: str,
) -> dict[str, int]:
    """The ranks, none below the smallest one at which the cores have the numbers that are wanted at least."""
    config = next(iter(layers.values())).configs[adapter_name]
    matrices = {name: math.prod(factors.singular_values.shape[:-1]) for name, factors in found.items()}

    def numbers(ranks: Mapping[str, int]) -> int:
        return sum(_numbers(rank, config.core == "diagonal", matrices[name]) for name, rank in ranks.items())

    if numbers(ranks) >= config.min_parameters:
        return ranks
    raised = ranks
    # A direction that the gradient does not have, or that was taken out of it, is none.
    there = _on_host({name: (factors.singular_values > 0).sum(-1).amax() for name, factors in found.items()})
    for least in range(2, least_rank(layers, adapter_name) + 1):
        raised = {name: rank and max(rank, min(least, upper[name], int(there[name]))) for name, rank in ranks.items()}
        if numbers(raised) >= config.min_parameters:
            break
    return raised


def _ranks_by_energy(found: Mapping[str, SingularFactors], shares: Mapping[str, float]) -> dict[str, int]:
    """The rank of each layer that explains its share; all at once, so that the host waits once for a device."""
    if not found:
        return {}
    rows = {
        name: factors.singular_values.flatten(end_dim=-2)
        if factors.singular_values.dim() > 1
        else factors.singular_values[None]
        for name, factors in found.items()
    }
    device, longest = next(iter(rows.values())).device, max(values.shape[-1] for values in rows.values())
    padded = torch.cat([pad(values.to(device), (0, longest - values.shape[-1])) for values in rows.values()])
    energies = torch.cat([factors.energy.reshape(-1).to(device) for factors in found.values()])
    gammas = [shares[name] for name, values in rows.items() for _ in range(len(values))]
    each = iter(ranks_for_energy(padded, torch.tensor(gammas, dtype=torch.float64, device=device), energies).tolist())
    return {name: max((next(each) for _ in range(len(values))), default=0) for name, values in rows.items()}


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, all in one copy."""
    device = next(iter(tensors.values())).device
    copied = torch.cat([tensor.reshape(-1).to(device) for tensor in tensors.values()]).cpu()
    parts = copied.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}


def _candidate(energies: Tensor, energy: float, diagonal: bool) -> Candidate:
    batched = energies.dim() == 2
    return Candidate(energies.sum(0) if batched else energies, energy, diagonal, energies.shape[0] if batched else 1)
