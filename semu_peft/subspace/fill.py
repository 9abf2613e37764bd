"""The layers of an adapter: checked before they are given bases, and filled at once when all is found."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from itertools import compress
from typing import Any

import torch
from torch import nn

from semu_peft.arguments import check_kind
from semu_peft.gradients.processes import whole
from semu_peft.linalg.core import LowRank, eckart_young
from semu_peft.linalg.energy import largest_magnitudes
from semu_peft.linalg.factorize import SingularFactors
from semu_peft.tuner.adapted import semu_layers
from semu_peft.tuner.layer import SemuLayer
from semu_peft.tuner.tensors import is_sharded

from .ranks import RankBudget
from .starts import LayerStart, Start, Zero


def layers_to_fill(
    model: nn.Module, adapter_name: str, overwrite: bool, apart_from: Collection[str] = ()
) -> dict[str, SemuLayer]:
    """The layers of an adapter by name, if all of them can be given bases.

    Args:
        model: A model with the adapter.
        adapter_name: The adapter's name.
        overwrite: Whether an adapter that has been trained may lose what it has learned.
        apart_from: Other adapters that are meant to be off.

    Raises:
        ValueError: There is no such adapter; it is merged, sharded, or trained.
    """
    layers = semu_layers(model, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"The adapter {adapter_name!r} is merged into the weights; call `unmerge_adapter` first.")
    if any(is_sharded(layer.semu_core[adapter_name]) for layer in layers.values()):
        raise ValueError(
            f"The cores of the adapter {adapter_name!r} are sharded, and the initialisation gives them other shapes. "
            "Shard the base model first and add the adapter then, or initialise before sharding."
        )
    looked_at = {} if overwrite else layers
    are_trained = _are_trained([(layer, adapter_name) for layer in looked_at.values()])
    if trained := list(compress(looked_at, are_trained)):
        raise ValueError(
            f"The adapter {adapter_name!r} has been trained: its cores are not at their start at {trained[:3]} "
            f"({len(trained)} of {len(layers)} layers). To start again would bring back what it has forgotten: add "
            "another adapter for another request (`add_adapter`), or pass `overwrite=True` to start it afresh."
        )
    _warn_of_inactive(layers, adapter_name, apart_from)
    return layers


def _warn_of_inactive(layers: Mapping[str, SemuLayer], adapter_name: str, apart_from: Collection[str]) -> None:
    """Say when another adapter is switched off, so that what it has forgotten is there again."""
    inactive = [
        (layer, name)
        for layer in layers.values()
        for name in layer.semu_core
        if name not in (adapter_name, *apart_from, *layer.active_adapters, *layer.merged_adapters)
    ]
    if off := {name for _, name in compress(inactive, _are_trained(inactive))}:
        active = [*sorted(off), adapter_name]
        warnings.warn(
            f"The trained adapters {sorted(off)} are not active, so that what they have forgotten is there again. To "
            f"forget {adapter_name!r} on top of them: `model.base_model.set_adapter({active})` before this, and "
            f"`unlearn(..., adapter_name={adapter_name!r})`, which trains the new one alone.",
            stacklevel=4,
        )


def fill(
    layers: Mapping[str, SemuLayer],
    directions: Mapping[str, SingularFactors],
    start: Start | None,
    adapter_name: str,
    apart_from: Collection[str] = (),
) -> dict[str, SingularFactors]:
    """Give the layers what they start from, bases and a core, and write ranks and parents into the configuration.

    Args:
        layers: The adapter's layers by name.
        directions: The directions of each, as many as its rank.
        start: What they start from; by default the directions and cores of zeros.
        adapter_name: The adapter's name.
        apart_from: Other adapters that the directions are orthogonal to.

    Returns:
        What the start brought instead where that is of another rank than the directions.

    Raises:
        ValueError: A start does not fit its layer. All layers are unchanged then.
    """
    start = start or Zero()
    _check_named(getattr(start, "layer_names", set()), layers)
    starts = {name: start(layer, directions[name], adapter_name) for name, layer in layers.items()}
    for name, begin in starts.items():
        mend = "Check that the function ends with `return`."
        check_kind("start", begin, LayerStart, f"a function that returns a `LayerStart`, as for layer {name!r}", mend)
        _check_shapes(begin, layers[name].tensor_shapes(adapter_name, begin.left.shape[-1]), name)
    parents = _parents(layers, adapter_name, apart_from)
    for name, begin in starts.items():
        layers[name].set_basis(adapter_name, begin.left, begin.right, begin.core, offset=begin.offset)
        layers[name].configs[adapter_name].parents = parents
    return {name: _brought(begin) for name, begin in starts.items() if begin.left.shape[-1] != directions[name].rank}


def _parents(layers: Mapping[str, SemuLayer], adapter_name: str, apart_from: Collection[str]) -> list[str]:
    """The other adapters that a new one is made on top of, or apart from."""
    on = {
        name
        for layer in layers.values()
        for name in (*layer.active_adapters, *layer.merged_adapters)
        if layer.r.get(name)  # those that have been given a basis
    }
    return sorted((on | set(apart_from)) - {adapter_name})


def _brought(begin: LayerStart) -> SingularFactors:
    """The singular directions of what a start writes."""
    core = begin.offset if begin.core is None else begin.core
    core = begin.left.new_zeros(begin.left.shape[-1]) if core is None else core
    core = torch.diag_embed(core) if core.dim() < begin.left.dim() else core
    return eckart_young(LowRank(begin.left, begin.right, core))


def _check_named(names: Collection[str], layers: Mapping[str, SemuLayer]) -> None:
    if unknown := sorted(set(names) - set(layers)):
        raise ValueError(
            f"`start` names layers that the adapter does not have: {unknown[:3]} ({len(unknown)} in all). Its layers "
            f"are {list(layers)[:3]} ({len(layers)} in all): name them in full."
        )


def check_plan(rank_budget: Any, start: Any) -> None:
    """Check the arguments that say how many directions there are, and what they start from.

    Raises:
        TypeError: One of them is of another kind.
    """
    if rank_budget is not None:
        check_kind("rank_budget", rank_budget, RankBudget, "a `RankBudget` or None", "Write `RankBudget(total)`.")
    if start is not None and (isinstance(start, type) or not callable(start)):
        raise TypeError(
            f"`start` must be a start such as `starts.Zero()`, or a function (layer, directions, adapter_name), got "
            f"{start!r}. Make one, or leave it out to start from zero."
        )


def _check_shapes(begin: LayerStart, shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    parts = {"left": begin.left, "right": begin.right, "core": begin.core, "offset": begin.offset}
    for (part, tensor), shape in zip(parts.items(), shapes.values(), strict=True):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"`start`: the {part} of layer {name!r} must have shape {shape}, got {tuple(tensor.shape)}. Return a "
                "`LayerStart` that fits the layer."
            )


def _are_trained(cores: Sequence[tuple[SemuLayer, str]]) -> list[bool]:
    """Whether each layer's core of that adapter is no longer at its start; the host waits once for all of them."""
    moved = []
    for layer, name in cores:
        core = layer.semu_core[name]
        if core.is_meta or not core.numel():
            moved.append(torch.zeros(0))
            continue
        start = layer.semu_offset[name] if name in layer.semu_offset else torch.zeros_like(core)
        moved.append(whole((core != start).any()).float())  # another adapter's core may be sharded
    return [largest > 0 for largest in largest_magnitudes(moved)]
