"""From sums of gradients to each layer's directions: factorised, and kept away from the retain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from semu_peft.gradients.processes import from_main_process, in_several_processes
from semu_peft.gradients.statistics import MatrixSum
from semu_peft.linalg.factorize import SingularFactors, leading_factors
from semu_peft.tuner.layer import SemuLayer

from .base_weight import whole_weight
from .ranks import explained_variance_of, least_rank
from .retain import Overlap, RetainRule, apart_from

# Side by side are so many numbers of gradients. What is needed beside them to factorise them is about as much at the
# most. A CPU gains by it only as far as its caches reach.
_NUMBERS_AT_ONCE = 2**30
_NUMBERS_ON_CPU = 2**20


def find_directions(
    layers: Mapping[str, SemuLayer],
    sums: dict[str, MatrixSum],
    retained: dict[str, MatrixSum] | None,
    rule: RetainRule,
    *,
    keep_explained_variance: float | None,
    progress: bool,
    adapter_name: str,
    prepare: Callable[[MatrixSum], MatrixSum] | None = None,
    skip: int = 0,
    taken: Mapping[str, tuple[Tensor, Tensor]] | None = None,
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
        prepare: What a start makes of a sum before it is factorised.
        skip: How many of the first directions to leave out.
        taken: By layer the output and input directions of other adapters, from which to stay apart.
    """
    taken = taken or {}
    first: dict[int, str] = {}
    aliases = {name: first.setdefault(id(sums[name]), name) for name in layers}
    extents = {
        name: _extent(layers[name], name, retained is not None, keep_explained_variance, adapter_name, taken.get(name))
        for name in first.values()
    }
    found: dict[str, SingularFactors] = {}
    overlaps: dict[str, Overlap | None] = dict.fromkeys(extents)
    few = least_rank(layers, adapter_name)
    bar = tqdm(total=len(extents), desc="Factorising", disable=not progress, leave=False)
    for names in _portions(extents, sums, retained):
        gamma, least, most = extents[names[0]]
        totals = [_prepared(sums.pop(name), layers[name], adapter_name) for name in names]
        totals = totals if prepare is None else [prepare(total) for total in totals]
        if skip:
            each = [_beyond(total, skip, least, most) for total in totals]
        else:
            each = type(totals[0]).factorize_each(totals, least, most)
            wanted = few if most is None else min(few, most)
            short = [index for index, factors in enumerate(each) if factors.rank < wanted]
            longer = type(totals[0]).factorize_each([totals[index] for index in short], 1.0, wanted) if short else []
            for index, factors in zip(short, longer, strict=True):
                each[index] = factors
        kept_ones = [retained.pop(name) for name in names] if retained is not None else []
        del totals
        if kept_ones:
            avoided = type(kept_ones[0]).factorize_each(kept_ones, rule.explained_variance)
            overlaps |= zip(names, Overlap.between_each(each, avoided), strict=True)
            each = rule.apply_each(each, avoided, gamma)
        del kept_ones
        here = dict(zip(names, each, strict=True))
        if crowded := [name for name in names if name in taken]:
            apart = apart_from([here[name] for name in crowded], [taken[name] for name in crowded])
            here |= zip(crowded, apart, strict=True)
        found |= {name: _agreed(factors) for name, factors in here.items()}
        bar.update(len(names))
    bar.close()
    return {name: found[aliases[name]] for name in layers}, {name: overlaps[aliases[name]] for name in layers}


def taken_directions(layers: Mapping[str, SemuLayer], adapter_names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Orthonormal bases of what other adapters write to and read from, by layer; zeros fill them up."""
    taken = {}
    for name, layer in layers.items():
        here = [other for other in adapter_names if layer.r.get(other)]
        if here:
            left, right = (
                torch.cat([tensors[other] for other in here], -1).double() for tensors in (layer.semu_U, layer.semu_V)
            )
            taken[name] = _span(left), _span(right)
    return taken


def _span(columns: Tensor) -> Tensor:
    basis, values, _ = torch.linalg.svd(columns, full_matrices=False)
    return basis * (values > 1e-6).to(basis).unsqueeze(-2)  # columns that say the same leave less than there are


def own_directions(layer: SemuLayer, adapter_name: str) -> SingularFactors:
    """The weight's own leading directions, as many as γ, or the rank that was asked for, takes of them."""
    matrix = layer.weight_to_matrix(whole_weight(layer).detach(), adapter_name)
    _, least, most = _extent(layer, layer.layer_name, False, None, adapter_name)
    return _agreed(leading_factors(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), least, most))


def _beyond(total: MatrixSum, skip: int, explained_variance: float, max_rank: int | None) -> SingularFactors:
    """The directions after the first `skip`, as many as explain that share of what these leave."""
    first = total.factorize(1.0, skip)
    if first.rank < skip:  # nothing is left
        return first.beyond(first.rank)
    held = first.singular_values[..., :skip].double().square().sum(-1)
    share = float((held / first.energy.clamp_min(torch.finfo(torch.float64).tiny)).max().clamp(0.0, 1.0))
    wanted = min(share + explained_variance * (1.0 - share), 1.0)
    return total.factorize(wanted, None if max_rank is None else max_rank + skip).beyond(skip)


def _prepared(total: MatrixSum, layer: SemuLayer, adapter_name: str) -> MatrixSum:
    """The sum to factorise: without its part along the weight, where that is asked for."""
    if layer.configs[adapter_name].orthogonal_to_weight:
        total = total.copy()  # it may have been gathered by the user, to be used again
        total.remove_component(layer.weight_to_matrix(whole_weight(layer), adapter_name))
    return total


def _portions(
    extents: Mapping[str, tuple[float, float, int | None]],
    sums: Mapping[str, MatrixSum],
    retained: Mapping[str, MatrixSum] | None,
) -> Iterator[list[str]]:
    """Layers that are factorised side by side: their sums are alike, as is what is wanted of them."""
    groups: dict[Hashable, list[str]] = {}
    for name, extent in extents.items():
        avoided = retained[name].alike if retained is not None else None
        groups.setdefault((sums[name].alike, avoided, extent), []).append(name)
    for names in groups.values():
        total = sums[names[0]]
        on_cpu = total.tensors()[0].device.type == "cpu"
        step = max(1, (_NUMBERS_ON_CPU if on_cpu else _NUMBERS_AT_ONCE) // max(1, math.prod(total.shape)))
        for start in range(0, len(names), step):
            yield names[start : start + step]


def _extent(
    layer: SemuLayer,
    name: str,
    retain: bool,
    keep_explained_variance: float | None,
    adapter_name: str,
    taken: tuple[Tensor, Tensor] | None = None,
) -> tuple[float, float, int | None]:
    """A layer's γ, and how many directions to look for: up to which share of the energy, and at most how many."""
    config = layer.configs[adapter_name]
    gamma = explained_variance_of(config, name)
    requested = layer.requested_ranks[adapter_name]
    if requested is not None:
        return gamma, 1.0, max(requested, 1) + (taken[0].shape[-1] + taken[1].shape[-1] if taken is not None else 0)
    least = max(gamma, keep_explained_variance or 0.0)
    if retain or taken is not None:  # what stays is chosen among more directions than will be kept
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
