"""From sums of gradients to each layer's directions: factorised, and kept away from the retain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from semu_peft.gradients.processes import from_main_process, in_several_processes
from semu_peft.gradients.statistics import MatrixSum
from semu_peft.linalg.factorize import SingularFactors
from semu_peft.tuner.layer import SemuLayer

from .base_weight import whole_weight
from .ranks import explained_variance_of
from .retain import Overlap, RetainRule


def find_directions(
    layers: Mapping[str, SemuLayer],
    sums: dict[str, MatrixSum],
    retained: dict[str, MatrixSum] | None,
    rule: RetainRule,
    *,
    keep_explained_variance: float | None,
    progress: bool,
    adapter_name: str,
) -> tuple[dict[str, SingularFactors], dict[str, Overlap | None]]:
    """The leading directions of each layer's forget gradient, and how far they lay in the retain subspace.

    Args:
        layers: The adapter's layers by name.
        sums: The forget gradients' sums; taken out one by one, so that each is gone when it has been factorised.
        retained: Those of the retain gradients, where there are any.
        rule: How to keep away from these.
        keep_explained_variance: γ of the directions to find, where it is larger than the configuration's.
        progress: Show a progress bar.
        adapter_name: The adapter's name.
    """
    first: dict[int, str] = {}
    aliases = {name: first.setdefault(id(sums[name]), name) for name in layers}
    found: dict[str, SingularFactors] = {}
    overlaps: dict[str, Overlap | None] = {}
    for name in tqdm(list(first.values()), desc="Factorising", disable=not progress, leave=False):
        layer, total = layers[name], sums.pop(name)
        if layer.configs[adapter_name].orthogonal_to_weight:
            total = total.copy()  # it may have been gathered by the user, to be used again
            total.remove_component(layer.weight_to_matrix(whole_weight(layer), adapter_name))
        gamma, least, most = _extent(layer, name, retained is not None, keep_explained_variance, adapter_name)
        factors, overlaps[name] = total.factorize(least, most), None
        if retained is not None:
            kept = retained.pop(name).factorize(rule.explained_variance)
            overlaps[name] = Overlap.between(factors, kept)
            factors = rule.apply(factors, kept, gamma)
        found[name] = _agreed(factors)
    return {name: found[aliases[name]] for name in layers}, {name: overlaps[aliases[name]] for name in layers}


def _extent(
    layer: SemuLayer, name: str, retain: bool, keep_explained_variance: float | None, adapter_name: str
) -> tuple[float, float, int | None]:
    """A layer's γ, and how many directions to look for: up to which share of the energy, and at most how many."""
    config = layer.configs[adapter_name]
    gamma = explained_variance_of(config, name)
    requested = layer.requested_ranks[adapter_name]
    if requested is not None:
        return gamma, 1.0, max(requested, 1)
    least = max(gamma, keep_explained_variance or 0.0)
    if retain:  # its rules choose among more directions than will be kept
        return gamma, max(least, (1.0 + gamma) / 2), None
    return gamma, least, config.r


def _agreed(factors: SingularFactors) -> SingularFactors:
    """The main process's factors on every process: rounding on unlike devices must not part them."""
    if not in_several_processes():
        return factors
    rank, known = from_main_process(torch.tensor([factors.rank, factors.singular_values.shape[-1]])).tolist()

    def agreed(tensor: Tensor, size: int) -> Tensor:
        same = tensor.shape[-1] == size
        return from_main_process(tensor if same else tensor.new_zeros(*tensor.shape[:-1], size))

    return replace(
        factors,
        left=agreed(factors.left, rank),
        right=agreed(factors.right, rank),
        singular_values=agreed(factors.singular_values, known),
    )
