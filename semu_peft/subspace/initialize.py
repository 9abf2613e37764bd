"""Give a SEMU adapter its bases: the leading singular directions of the forget gradients."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from accelerate.utils import align_module_device, extract_model_from_parallel
from torch import Tensor, nn
from tqdm.auto import tqdm

from semu_peft.gradients.gather import Objective, stream_gradients, sum_dtype
from semu_peft.gradients.processes import from_main_process, in_several_processes
from semu_peft.gradients.sources import (
    GradientSource,
    LayerSource,
    WeightSource,
    carries_gradient,
    conv_gradients,
    token_gradients,
)
from semu_peft.gradients.statistics import (
    Accumulator,
    ExactSum,
    RandomMatrixPool,
    Sketch,
)
from semu_peft.linalg.energy import check_explained_variance
from semu_peft.linalg.factorize import SingularFactors
from semu_peft.tuner.adapted import base_model, semu_layers
from semu_peft.tuner.config import SemuConfig
from semu_peft.tuner.conv import ConvNd
from semu_peft.tuner.layer import SemuLayer
from semu_peft.tuner.linear import Linear
from semu_peft.tuner.patterns import match_pattern

from .profile import (
    LayerSpectrum,
    SubspaceProfile,
    budget_ranks,
    give_basis,
)
from .ranks import RankBudget
from .retain import Overlap, RetainSubspace


def initialize_semu_weights(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective,
    *,
    accumulate: Literal["exact", "sketch"] = "exact",
    sketch_size: int = 192,
    accumulator_device: torch.device | str | None = None,
    rank_budget: RankBudget | None = None,
    retain: RetainSubspace | None = None,
    keep_explained_variance: float | None = None,
    seed: int = 0,
    adapter_name: str = "default",
    progress: bool = True,
) -> SubspaceProfile:
    """Initialise a SEMU adapter from forget data, in one pass of forward and backward.

    For each target weight `W` the gradient `G` of the objective, at the model without this adapter (other active
    adapters stay on) and in eval mode, is summed over the batches, optionally made orthogonal to `W`, and factorised,
    `G = U S Vᵀ`. The leading columns that explain the configured share of its energy become the adapter's frozen
    bases; the core starts at zero, so the model's output does not change. Ranks are written into the configuration's
    `ranks`. A layer with a gradient of zeros gets rank 0, with a warning.

    Linear layers and ungrouped convolutions are differentiated between their inputs and output gradients, so that their
    weights may be quantised, offloaded or sharded; weights that several layers share, once, as parameters. In a
    distributed run every process brings its own batches (prepare the loader with Accelerate to share the work), the
    sums of all are factorised, and every process gets the main process's bases.

    Source: SEMU, arXiv 2502.07587, section 3. The projection there divides by `‖W‖²`, as it must to be one.

    Args:
        model: A model with a SEMU adapter (`get_peft_model`, `add_adapter` or `inject_adapter_in_model`).
        batches: The forget set in batches, a DataLoader or any iterable.
        objective: `(model, batch) -> scalar loss`, for example one of [`semu_peft.objectives`].
        accumulate: `"exact"` keeps one float32 matrix a layer; `"sketch"` a random sketch of it, far smaller and
            cheaper to fill, from which the leading directions are recovered with an estimated error. Layers of which a
            sketch would not save most are exact either way.
        sketch_size: The most directions a sketch can recover; the first half of them well.
        accumulator_device: Where sums and sketches are kept; by default beside their weights. `"cpu"` takes exact sums
            off the accelerator.
        rank_budget: One budget of directions or parameters for all layers, instead of γ for each; γ and `r` stay upper
            bounds.
        retain: Keep away from what the retain data would change.
        keep_explained_variance: Keep directions up to this larger share in the profile, so that it can initialise the
            adapter again at a larger γ. By default the profile keeps those of the adapter.
        seed: Of the sketches' test matrices.
        adapter_name: The adapter to initialise. Doing so again starts it afresh.
        progress: Show progress bars.

    Returns:
        The spectra, directions and ranks of all layers.

    Raises:
        ValueError: The model has no such adapter, an argument is out of range, or the data cannot give a gradient; see
            [`stream_gradients`][semu_peft.gradients.gather.stream_gradients]. The adapter is unchanged then.
    """
    _check_arguments(accumulate, sketch_size, keep_explained_variance)
    layers = semu_layers(model, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"The adapter {adapter_name!r} is merged into the weights; call `unmerge_adapter` first.")
    plain = base_model(model)
    if any(hasattr(layer.semu_core[adapter_name], "full_tensor") for layer in layers.values()):
        raise ValueError(
            f"The cores of the adapter {adapter_name!r} are sharded, and the initialisation gives them other shapes. "
            "Shard the base model first and add the adapter then, or initialise before sharding."
        )
    # A distributed wrapper would wait for gradients of the cores, which this pass does not make.
    runner = extract_model_from_parallel(model)
    sources, aliases = _sources(plain, layers, adapter_name)
    pool = RandomMatrixPool(seed)

    def accumulators() -> dict[str, Accumulator]:
        size = sketch_size if accumulate == "sketch" else None
        return {name: _accumulator(layers[name], adapter_name, size, pool, accumulator_device) for name in sources}

    sums, retain_sums = accumulators(), accumulators() if retain is not None else {}
    with _switched_off(layers, adapter_name):
        count = stream_gradients(runner, sources, sums, batches, objective, progress=progress)
        if retain is not None:
            stream_gradients(
                runner, sources, retain_sums, retain.batches, retain.objective,
                description="Retain gradients", progress=progress,
            )  # fmt: skip

    found: dict[str, SingularFactors] = {}
    overlaps: dict[str, Overlap | None] = dict.fromkeys(layers)
    for name in tqdm(list(sources), desc="Factorising", disable=not progress, leave=False):
        layer, total = layers[name], sums.pop(name)
        config = layer.configs[adapter_name]
        share = _explained_variance(config, name)
        if config.orthogonal_to_weight:
            total.remove_component(layer.weight_to_matrix(_whole_weight(layer), adapter_name))
        wanted, most = max(share, keep_explained_variance or 0.0), config.r
        requested = _requested_rank(layer, adapter_name)
        if requested is not None:
            wanted, most = 1.0, max(requested, 1)
        elif retain is not None:  # its rules choose among more directions than will be kept
            wanted, most = max(wanted, (1.0 + share) / 2), None
        factors = total.factorize(wanted, most)
        if retain is not None:
            kept = retain_sums.pop(name).factorize(retain.explained_variance)
            overlaps[name] = Overlap.between(factors, kept)
            factors = retain.apply(factors, kept, share)
        found[name] = _agreed(factors)
    for name, first in aliases.items():
        found[name], overlaps[name] = found[first], overlaps[first]

    ranks = {name: _rank(layers[name], adapter_name, name, found[name]) for name in layers}
    if rank_budget is not None:
        ranks = budget_ranks({name: found[name] for name in layers}, layers, adapter_name, rank_budget, ranks)
    _check_ranks(ranks, found)
    spectra = {}
    for name, layer in layers.items():
        give_basis(layer, adapter_name, found[name].leading(ranks[name]))
        known = found[name] if keep_explained_variance is not None else found[name].leading(ranks[name])
        spectra[name] = LayerSpectrum(_on_cpu(known), ranks[name], layer.matrix_shape(adapter_name), overlaps[name])
    return SubspaceProfile(spectra, count)


def _check_arguments(accumulate: str, sketch_size: int, keep_explained_variance: float | None) -> None:
    if accumulate not in ("exact", "sketch"):
        raise ValueError(f"`accumulate` must be 'exact' or 'sketch', got {accumulate!r}.")
    if isinstance(sketch_size, bool) or not isinstance(sketch_size, int) or sketch_size < 2:
        raise ValueError(f"`sketch_size` must be an integer of 2 or more, got {sketch_size!r}.")
    if keep_explained_variance is not None:
        check_explained_variance(keep_explained_variance)


# ---- where gradients come from and go to ----


def _sources(
    plain: nn.Module, layers: Mapping[str, SemuLayer], adapter_name: str
) -> tuple[dict[str, GradientSource], dict[str, str]]:
    """The sources by layer, and layers whose weight another one brings already, by that one's name."""
    uses = Counter(id(parameter) for module in plain.modules() for parameter in module.parameters(recurse=False))
    sources: dict[str, GradientSource] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, layer in layers.items():
        weight: Any = layer.weight
        if uses[id(weight)] > 1 and carries_gradient(weight):
            if id(weight) in first:
                aliases[name] = first[id(weight)]
                continue
            first[id(weight)] = name
        elif isinstance(layer, Linear):
            sources[name] = LayerSource(layer, token_gradients)
            continue
        elif isinstance(layer, ConvNd) and len(layer.matrix_shape(adapter_name)) == 2 and layer.conv.groups == 1:
            sources[name] = LayerSource(layer, conv_gradients(layer.conv))
            continue
        if not carries_gradient(weight):
            raise ValueError(
                f"The weight of layer {name!r} has dtype {weight.dtype} on {weight.device}, which cannot carry a "
                "gradient. Load this layer unquantised and not offloaded, or leave it out of `target_modules`."
            )
        sources[name] = WeightSource(weight, partial(layer.weight_to_matrix, adapter_name=adapter_name))
    return sources, aliases


def _accumulator(
    layer: SemuLayer, adapter_name: str, sketch_size: int | None, pool: RandomMatrixPool, device: Any
) -> Accumulator:
    shape = layer.matrix_shape(adapter_name)
    weight: Any = layer.weight
    home = layer.semu_core[adapter_name].device if weight.is_meta else weight.device
    place = torch.device(device) if device is not None else home
    if sketch_size is not None and Sketch.pays(shape, sketch_size):
        return Sketch((shape[0], shape[1]), sketch_size, pool, place)
    return ExactSum(shape, sum_dtype(weight.dtype), place)


def _whole_weight(layer: SemuLayer) -> Tensor:
    with align_module_device(layer.get_base_layer()):  # brings an offloaded weight in for the moment
        weight: Any = layer.get_base_weight()
        return weight.full_tensor() if hasattr(weight, "full_tensor") else weight.clone()


# ---- ranks ----


def _explained_variance(config: SemuConfig, name: str) -> float:
    """γ of this layer."""
    return match_pattern(config.explained_variance_pattern, name) or config.explained_variance


def _requested_rank(layer: SemuLayer, adapter_name: str) -> int | None:
    """The rank that the user's `rank_pattern` asks for at this layer."""
    return layer.requested_ranks[adapter_name]


def _rank(layer: SemuLayer, adapter_name: str, name: str, factors: SingularFactors) -> int:
    requested = _requested_rank(layer, adapter_name)
    if requested is not None:
        return min(requested, factors.rank)
    config = layer.configs[adapter_name]
    rank = factors.reaching(_explained_variance(config, name)).rank
    return rank if config.r is None else min(rank, config.r)


def _check_ranks(ranks: Mapping[str, int], found: Mapping[str, SingularFactors]) -> None:
    empty = [name for name, factors in found.items() if factors.rank == 0]
    if len(empty) == len(found):
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
    if not any(ranks.values()):
        raise ValueError("`rank_budget` pays for no direction at all: raise its `total`.")


# ---- around it ----


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


def _on_cpu(factors: SingularFactors) -> SingularFactors:
    return replace(
        factors,
        left=factors.left.cpu(),
        right=factors.right.cpu(),
        singular_values=factors.singular_values.cpu(),
        energy=factors.energy.cpu(),
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
