"""Which layers of a model gradients are gathered at, and the source of each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from semu_peft.tuner.adapted import base_model, semu_layers
from semu_peft.tuner.layer import SemuLayer
from semu_peft.tuner.linear import NEVER_CALLED, Linear
from semu_peft.tuner.parameter import ParamWrapper
from semu_peft.tuner.weight_use import WeightUse, is_stock, read_weight

from .processes import in_several_processes
from .sources import (
    CalledWeightSource,
    GradientSource,
    LayerSource,
    WeightSource,
    carries_gradient,
    dense_gradients,
    registered_source,
    token_gradients,
    use_of,
)

_LARGE = 2**24  # numbers of a weight, 4096 × 4096: above, an accelerator's memory sets the pace


def find_sources(
    model: nn.Module,
    targets: Sequence[str] | str | None = None,
    adapter_name: str | None = None,
    by_weight: bool | None = None,
) -> tuple[dict[str, GradientSource], dict[str, str]]:
    """The sources of the targets' gradients.

    Layers are differentiated between their inputs and output gradients where their type allows it; weights that
    several layers share, once, as parameters.

    Args:
        model: See [`gather`][semu_peft.gradients.gather.gather], as the rest.
        targets: Names, name endings, or a regular expression.
        adapter_name: The SEMU adapter whose layers are meant.
        by_weight: Whether an adapter's layers also say where autograd adds up the gradient by itself (`summed`); by
            default where that is quicker, on an accelerator.

    Returns:
        The sources by layer name, and the layers whose weight another one brings already, by that one's name.

    Raises:
        ValueError: No layer matches; a weight that must carry a gradient cannot.
    """
    plain = base_model(model)
    layers = _supported_layers(plain) if adapter_name is None else semu_layers(model, adapter_name)
    uses = Counter(id(parameter) for module in plain.modules() for parameter in module.parameters(recurse=False))
    sources: dict[str, GradientSource] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, layer in _matching(layers, targets, adapter_name).items():
        weight: Any = layer.base_weight if isinstance(layer, SemuLayer) else read_weight(layer)
        if uses[id(weight)] > 1 and carries_gradient(weight):
            if id(weight) in first:
                aliases[name] = first[id(weight)]
                continue
            first[id(weight)] = name
            sources[name] = WeightSource(weight, _reading(layer, adapter_name))
        else:
            sources[name] = _source_of(layer, adapter_name)
            if (
                sources[name].weight is None
                and adapter_name is not None
                and _may_go_by_weight(layer, weight, by_weight)
            ):
                sources[name].summed = CalledWeightSource(layer, _reading(layer, adapter_name))  # type: ignore[arg-type]
        if sources[name].weight is not None and not carries_gradient(weight):
            raise ValueError(
                f"The weight of layer {name!r} has dtype {weight.dtype} on {weight.device}, which cannot carry a "
                "gradient. Load this layer unquantised and not offloaded, or leave it out of `target_modules`."
            )
    return sources, aliases


def layers_with_inputs(model: nn.Module, adapter_name: str | None = None) -> str:
    """The layers whose inputs and output gradients can be seen, as a pattern for `targets`: all but embeddings.

    Weights that are differentiated as parameters have none: embeddings, those that several layers share, grouped
    convolutions and experts in one tensor; nor do batches of matrices. Layers in which an adapter was left with rank 0
    are no part of it.

    Args:
        model: See [`gather`][semu_peft.gradients.gather.gather].
        adapter_name: The SEMU adapter whose layers are meant; by default all layers of the model.

    Raises:
        ValueError: No layer has any.

    Examples:
        >>> import re
        >>> pattern = layers_with_inputs(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)))
        >>> bool(re.fullmatch(pattern, "0")), bool(re.fullmatch(pattern, "1"))
        (False, True)
    """
    sources, _ = find_sources(model, None, adapter_name)
    names = [name for name, source in sources.items() if source.weight is None and len(source.shape) == 2]
    if adapter_name is not None:
        layers = semu_layers(model, adapter_name)
        names = [n for n in names if layers[n].r[adapter_name] or not layers[n].is_initialized(adapter_name)]
    if not names:
        raise ValueError(
            "`model` must have a layer with inputs and output gradients, such as a linear one, got "
            f"{list(sources)[:3]} ({len(sources)} in all), which have none. Take another method."
        )
    return "|".join(map(re.escape, names))


def _may_go_by_weight(layer: Any, weight: Any, by_weight: bool | None) -> bool:
    """Whether autograd's gradient of the stored weight is that of the layer's calls, and may be taken.

    The layer must be just the operation of its type, which is known to have a gradient by its weight. A sum of products
    in float16 overflows where its factors do not. Among several processes weights may be sharded.
    """
    return (
        (_goes_quicker_by_weight(weight) if by_weight is None else by_weight)
        and not isinstance(layer, ParamWrapper)
        and type(weight) is nn.Parameter
        and carries_gradient(weight)
        and weight.dtype != torch.float16
        and is_stock(_called(layer)[1])
        and not in_several_processes()
    )


def _goes_quicker_by_weight(weight: Tensor) -> bool:
    """Whether launching work takes longer than doing it: on an accelerator, but for the largest of linear layers.

    Their products are added to a sum as they are made, or never made for a sketch, which saves writing and reading.
    """
    return weight.device.type not in ("cpu", "meta") and not (weight.dim() == 2 and weight.numel() >= _LARGE)


def _supported_layers(plain: nn.Module) -> dict[str, nn.Module]:
    """Layers of registered types, each as the module that is called in its place.

    Adapters' own layers are left out, and those that an adapter trains in full (`modules_to_save`).
    """
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in plain.named_modules():
        if name.startswith(inside) and inside:
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside = (*inside, f"{name}.")
        base = _called(module)[1]
        if isinstance(base, NEVER_CALLED) or registered_source(base) is None:
            continue
        if use_of(base) is not WeightUse.UNKNOWN:
            found[name] = module
    return found


def _matching(
    layers: Mapping[str, nn.Module], targets: Sequence[str] | str | None, adapter_name: str | None
) -> dict[str, nn.Module]:
    if targets is None:
        found = dict(layers)
        odd: list[str] = []
    elif isinstance(targets, str):
        found = {name: layer for name, layer in layers.items() if re.fullmatch(targets, name)}
        odd = []
    else:
        found = {name: layer for name, layer in layers.items() if any(_ends_in(name, target) for target in targets)}
        odd = [target for target in targets if not any(_ends_in(name, target) for name in layers)]
    if odd or not found:
        whose = "of a type whose gradient can be gathered" if adapter_name is None else f"of adapter {adapter_name!r}"
        raise ValueError(
            f"`targets`: no layer {whose} is called {odd[:3] or targets!r}. The layers are {list(layers)[:5]} "
            f"({len(layers)} in all); `register_source` adds a layer type."
        )
    return found


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _called(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The module to watch for a layer with adapters, and the bare layer.

    A SEMU layer may run with the corrected weight instead of its base layer; other methods always call theirs.
    """
    called: Any = layer
    while isinstance(called, BaseTunerLayer) and not isinstance(called, SemuLayer):
        called = called.base_layer  # type: ignore[attr-defined]
    base = called.get_base_layer() if isinstance(called, SemuLayer) else called
    return called, base


def _source_of(layer: nn.Module, adapter_name: str | None) -> GradientSource:
    if adapter_name is not None:
        return _of_adapted(layer, adapter_name)
    called, base = _called(layer)
    source, use = registered_source(base), use_of(base)
    assert source is not None  # as `_supported_layers` asked for it
    if use is WeightUse.OWN:
        return WeightSource(base.weight, _reading(layer, None))  # type: ignore[arg-type]
    if use is WeightUse.COMPUTED and source.weight is not None:
        return LayerSource(called, dense_gradients(base, _reading(layer, None)), source.shape)
    return source.around(called)


def _of_adapted(layer: Any, adapter_name: str) -> GradientSource:
    base = _called(layer)[1]
    source = None if isinstance(layer, ParamWrapper) else registered_source(base)
    use, shape, reading = layer.weight_use, layer.matrix_shape(adapter_name), _reading(layer, adapter_name)
    if use is not WeightUse.OWN:
        if isinstance(layer, Linear):  # whatever quantised the base layer
            return LayerSource(layer, token_gradients, shape)
        if source is not None and source.shape == shape and (use is WeightUse.PLAIN or source.weight is None):
            return source.around(layer)
        if use is WeightUse.COMPUTED:
            return LayerSource(layer, dense_gradients(base, reading), shape)
    return WeightSource(layer.base_weight, reading)


def _reading(layer: Any, adapter_name: str | None) -> Callable[[Tensor], Tensor]:
    """How the weight is read as a matrix."""
    if adapter_name is not None:
        return partial(layer.weight_to_matrix, adapter_name=adapter_name)
    if isinstance(_called(layer)[1], Conv1D):
        return lambda weight: weight.mT
    return lambda weight: weight.flatten(1)
