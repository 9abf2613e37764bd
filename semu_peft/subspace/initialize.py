"""Give a SEMU adapter its bases: the leading singular directions of the forget gradients."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from semu_peft.tuner.adapted import semu_layers
from semu_peft.tuner.layer import SemuLayer

from .factorize import leading_factors
from .gradients import Objective, accumulate_gradients
from .profile import LayerSpectrum, SubspaceProfile


def initialize_semu_weights(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective,
    *,
    adapter_name: str = "default",
    progress: bool = True,
) -> SubspaceProfile:
    """Initialise a SEMU adapter from forget data, in one pass of forward and backward.

    For each target weight `W` the gradient `G` of the objective, at the model without this adapter (other active
    adapters stay on) and in eval mode, is summed over the batches, optionally made orthogonal to `W`, and factorised,
    `G = U S Vᵀ`. The leading columns that explain the configured share of its energy become the adapter's frozen
    bases; the core starts at zero, so the model's output does not change. Ranks are written into the configuration's
    `rank_pattern`. A layer with a gradient of zeros gets rank 0, with a warning.

    Source: SEMU, arXiv 2502.07587, section 3. The projection there divides by `‖W‖²`, as it must to be one.

    Args:
        model: A model with a SEMU adapter (`get_peft_model`, `add_adapter` or `inject_adapter_in_model`).
        batches: The forget set in batches, a DataLoader or any iterable.
        objective: `(model, batch) -> scalar loss`, for example one of [`semu_peft.objectives`].
        adapter_name: The adapter to initialise. Doing so again starts it afresh.
        progress: Show progress bars.

    Returns:
        The spectra and ranks of all layers.

    Raises:
        ValueError: The model has no such adapter, or the data cannot give a gradient; see
            [`accumulate_gradients`][semu_peft.subspace.gradients.accumulate_gradients]. The adapter is unchanged then.
    """
    layers = semu_layers(model, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"The adapter {adapter_name!r} is merged into the weights; call `unmerge_adapter` first.")
    weights = {name: cast(nn.Parameter, layer.weight) for name, layer in layers.items()}
    with _switched_off(layers, adapter_name):
        gradients, count = accumulate_gradients(model, weights, batches, objective, progress=progress)

    factors = {}
    spectra = {}
    for name, layer in tqdm(layers.items(), desc="Factorising", disable=not progress, leave=False):
        config = layer.configs[adapter_name]
        gradient = gradients.pop(name)
        if config.orthogonal_to_weight:
            gradient = remove_component(gradient, weights[name])
        matrix = layer.weight_to_matrix(gradient, adapter_name)
        factors[name] = leading_factors(matrix, config.explained_variance, config.r)
        spectra[name] = LayerSpectrum(
            factors[name].singular_values.cpu(),
            factors[name].rank,
            factors[name].explained_variance,
            tuple(matrix.shape),
        )
    profile = SubspaceProfile(spectra, count)
    _check_ranks(profile)
    for name, layer in layers.items():
        layer.set_basis(adapter_name, factors[name].left, factors[name].right)
        layer.configs[adapter_name].rank_pattern[name] = factors[name].rank
    return profile


def remove_component(gradient: Tensor, weight: Tensor) -> Tensor:
    """The part of a gradient that is orthogonal to the weights, `G − (⟨G, W⟩ / ‖W‖²) W`, shaped like `G`."""
    direction = weight.detach().to(gradient)
    squared_norm = direction.square().sum()
    if squared_norm == 0:
        return gradient
    return gradient - (torch.sum(gradient * direction) / squared_norm) * direction


def _check_ranks(profile: SubspaceProfile) -> None:
    empty = [name for name, rank in profile.ranks.items() if rank == 0]
    if len(empty) == len(profile.ranks):
        raise ValueError(
            "All target layers have a gradient of zeros: the objective is already at a stationary point on this forget "
            "data, so it names no direction to forget along. Use another objective for the initialisation."
        )
    if empty:
        warnings.warn(
            f"The forget gradient is zero at {len(empty)} target layers ({empty[:3]} …): they get rank 0 and stay as "
            "they are.",
            stacklevel=3,
        )


@contextmanager
def _switched_off(layers: Mapping[str, SemuLayer], adapter_name: str) -> Iterator[None]:
    active = [(layer, layer._active_adapter) for layer in layers.values()]
    for layer in layers.values():
        layer._active_adapter = [name for name in layer.active_adapters if name != adapter_name]
    try:
        yield
    finally:
        for layer, names in active:
            layer._active_adapter = names
