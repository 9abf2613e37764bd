"""Cut a trained adapter down to fewer directions, with a known error or none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from semu_peft.arguments import check_adapter_name, check_count, check_model, check_share
from semu_peft.linalg.core import LowRank, eckart_young
from semu_peft.tuner.adapted import initialized_layers
from semu_peft.tuner.layer import SemuLayer


@dataclass(frozen=True, repr=False)
class RerankReport:
    """What re-ranking did to each layer.

    Attributes:
        ranks_before: Rank by layer name.
        ranks_after: Rank by layer name.
        relative_error: `‖ΔW − ΔW'‖_F / ‖ΔW‖_F` by layer name.
        total_relative_error: The same over all layers together.

    Examples:
        >>> from semu_peft import RerankReport
        >>> report = RerankReport({"fc": 8}, {"fc": 2}, relative_error={"fc": 0.05}, total_relative_error=0.05)
        >>> report
        RerankReport(8 -> 2 directions in 1 layers, error 5.00%)
    """

    ranks_before: dict[str, int]
    ranks_after: dict[str, int]
    relative_error: dict[str, float]
    total_relative_error: float

    def __repr__(self) -> str:
        before, after = sum(self.ranks_before.values()), sum(self.ranks_after.values())
        return (
            f"RerankReport({before} -> {after} directions in {len(self.ranks_after)} layers, "
            f"error {self.total_relative_error:.2%})"
        )


def rerank(
    model: nn.Module,
    *,
    explained_variance: float | None = None,
    r: int | None = None,
    adapter_name: str = "default",
) -> RerankReport:
    """Cut a trained adapter down, in place, to the best approximation of lower rank (Eckart–Young).

    As `U` and `V` are orthonormal, an SVD of the small core, `R = P Σ Qᵀ`, is one of the whole correction:
    `ΔW = (U P) Σ (V Q)ᵀ`. Each layer keeps its leading directions; the new core is diagonal and the bases stay
    orthonormal. An optimiser made before has momenta of the old shape: make a new one.

    Args:
        model: A model with a trained SEMU adapter.
        explained_variance: Keep the fewest directions that hold this share of each layer's `‖ΔW‖²`.
        r: Keep this many directions at the most; both bounds may be given.
        adapter_name: The adapter to re-rank.

    Raises:
        ValueError: Neither bound is given, one is out of range, or the adapter is unknown or merged.
        NotInitializedError: The adapter has no bases yet.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, rerank
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 5))
        >>> model = get_peft_model(base, SemuConfig(target_modules=["0"], r=3, init_weights=False))
        >>> model.base_model.model[0].semu_core["default"].data = torch.diag(torch.tensor([3.0, 4.0, 0.0]))
        >>> rerank(model, r=1)
        RerankReport(3 -> 1 directions in 1 layers, error 60.00%)
    """
    check_model(model)
    check_adapter_name(adapter_name)
    if explained_variance is None and r is None:
        raise ValueError("`explained_variance` or `r` must say how far to cut down, got neither. Give one or both.")
    check_count("r", r, optional=True)
    check_share("explained_variance", explained_variance, optional=True)
    gamma = 1.0 if explained_variance is None else explained_variance
    layers = initialized_layers(model, adapter_name)
    _check_not_merged(layers, adapter_name)
    before, after, errors = {}, {}, {}
    lost_total = energy_total = 0.0
    for name, layer in layers.items():
        before[name] = layer.r[adapter_name]
        lost, energy = _rerank_layer(layer, adapter_name, gamma, r) if before[name] else (0.0, 0.0)
        after[name] = layer.r[adapter_name]
        errors[name] = math.sqrt(lost / energy) if energy > 0 else 0.0
        lost_total, energy_total = lost_total + lost, energy_total + energy
    total = math.sqrt(lost_total / energy_total) if energy_total > 0 else 0.0
    return RerankReport(before, after, errors, total)


def prune(model: nn.Module, *, adapter_name: str = "default") -> RerankReport:
    """Drop the directions of a trained adapter that its cores do not use, in place and without any error.

    Direction `i` is dropped where row and column `i` of the core (the entry `i` of a diagonal one) are exactly zero, as
    [`SoftThreshold`][semu_peft.training.rules.soft_threshold.SoftThreshold] leaves them: `U R Vᵀ` is the same sum
    without its zeros. A layer may lose them all, and stays as it was before the adapter.

    Args:
        model: A model with a trained SEMU adapter.
        adapter_name: The adapter to prune.

    Raises:
        ValueError: The adapter is unknown or merged, or no core uses anything, as before training.
        NotInitializedError: The adapter has no bases yet.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, prune
        >>> config = SemuConfig(target_modules=["0"], r=3, core="diagonal", init_weights=False)
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config)
        >>> model.base_model.model[0].semu_core["default"].data = torch.tensor([3.0, 0.0, 4.0])
        >>> prune(model)
        RerankReport(3 -> 2 directions in 1 layers, error 0.00%)
    """
    check_model(model)
    check_adapter_name(adapter_name)
    layers = initialized_layers(model, adapter_name)
    _check_not_merged(layers, adapter_name)
    used = {name: _used(layer, adapter_name) for name, layer in layers.items()}
    if not any(len(kept) for kept in used.values()):
        raise ValueError(
            f"`adapter_name`: every core of {adapter_name!r} is zero, so that nothing would be left. Train it first, "
            "or take the adapter away by `delete_adapter`."
        )
    before = {name: layer.r[adapter_name] for name, layer in layers.items()}
    for name, layer in layers.items():
        if len(used[name]) < before[name]:
            _keep(layer, used[name], adapter_name)
    after = {name: layer.r[adapter_name] for name, layer in layers.items()}
    return RerankReport(before, after, dict.fromkeys(before, 0.0), 0.0)


def _check_not_merged(layers: Mapping[str, SemuLayer], adapter_name: str) -> None:
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"The adapter {adapter_name!r} is merged into the weights; call `unmerge_adapter` first.")


def _parts(layer: SemuLayer, adapter_name: str) -> list[Tensor]:
    """The core, and its offset where it has one."""
    held = [layer.semu_core, layer.semu_offset]
    return [tensors[adapter_name].detach() for tensors in held if adapter_name in tensors]


def _used(layer: SemuLayer, adapter_name: str) -> Tensor:
    """The directions that a layer's core or its offset uses in one of its matrices, `(≤ r,)`, in order."""
    used = torch.zeros(layer.r[adapter_name], dtype=torch.bool)
    for part in _parts(layer, adapter_name):
        nonzero = (part != 0).cpu()
        if layer.configs[adapter_name].core != "diagonal":
            nonzero = nonzero.any(-1) | nonzero.any(-2)
        used |= nonzero.reshape(math.prod(nonzero.shape[:-1]), len(used)).any(0)
    return used.nonzero().flatten()


@torch.no_grad()
def _keep(layer: SemuLayer, chosen: Tensor, adapter_name: str) -> None:
    bases = layer.semu_U[adapter_name], layer.semu_V[adapter_name]
    left, right = (basis.index_select(-1, chosen.to(basis.device)) for basis in bases)
    parts = []
    for part in _parts(layer, adapter_name):
        kept = part.index_select(-1, chosen.to(part.device))
        diagonal = layer.configs[adapter_name].core == "diagonal"
        parts.append(kept if diagonal else kept.index_select(-2, chosen.to(part.device)))
    layer.set_basis(adapter_name, left, right, parts[0], offset=parts[1] if len(parts) > 1 else None)


@torch.no_grad()
def _rerank_layer(layer: SemuLayer, adapter_name: str, gamma: float, r: int | None) -> tuple[float, float]:
    """Re-rank one layer; return the squared norm of what was lost and of what there was."""
    core = layer.get_core(adapter_name, scaled=False)
    factors = eckart_young(LowRank(layer.semu_U[adapter_name], layer.semu_V[adapter_name], core))
    kept = factors.reaching(gamma, r)
    if kept.rank == 0:  # an untrained core keeps one direction to be trained in
        kept = factors.leading(1)
    values = kept.singular_values[..., : kept.rank]
    is_diagonal = layer.configs[adapter_name].core == "diagonal"
    layer.set_basis(adapter_name, kept.left, kept.right, values if is_diagonal else torch.diag_embed(values))
    return float(factors.singular_values[..., kept.rank :].square().sum()), float(factors.energy.sum())
