"""What a layer does with its weight: is its output the plain operation of its type on a stored parameter?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from semu_peft.model_state import eval_mode


class WeightUse(Enum):
    """What the output of a layer is.

    Attributes:
        PLAIN: The operation of the layer's type on a stored parameter: a correction beside it is one of the weight.
        OWN: Something else that a `forward` of its own makes of a stored parameter (it pads, standardises, masks …):
            the correction is added to the parameter, and the layer runs with the sum.
        COMPUTED: The operation of its type on a weight that is made anew from others for each pass (parametrisations,
            weight and spectral norm, pruning): the correction stands beside it, and no parameter could take it in.
        UNKNOWN: None of these.

    Examples:
        >>> from semu_peft.tuner.weight_use import WeightUse, weight_use
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
        >>> weight_use(torch.nn.Linear(3, 2)), weight_use(layer)
        (<WeightUse.PLAIN: 'plain'>, <WeightUse.COMPUTED: 'computed'>)
    """

    PLAIN = "plain"
    OWN = "own"
    COMPUTED = "computed"
    UNKNOWN = "unknown"


_FORWARDS = ("forward", "_conv_forward")


class _Operation(NamedTuple):
    """What a type of layer computes: `output(layer, x, weight)`, to be tried on `inputs(layer)`."""

    inputs: Callable[[Any], Tensor]
    output: Callable[[Any, Tensor, Tensor], Tensor]


def weight_use(layer: nn.Module) -> WeightUse | None:
    """Find out what a layer does with its weight.

    Layers of the stock types are known. Any other whose weight is stored is run once, alone and in eval mode, on a
    small input and with another weight: what a `forward` does cannot be read off its class.

    Args:
        layer: A bare layer.

    Returns:
        What its output is; `None` as long as its weight is on the meta device. Types without a stock type among their
        ancestors, and weights without arithmetic of their own (quantised, sharded), are taken for plain.
    """
    kind = next((kind for kind in _OPERATIONS if isinstance(layer, kind)), None)
    stored, forward = _is_stored(layer), _forward_of(layer)
    own = _has_own(layer)
    if kind is None or (stored and type(layer) is kind and not own):
        return WeightUse.PLAIN
    if not stored:
        inherited = all(getattr(type(layer), name, None) is getattr(kind, name, None) for name in _FORWARDS)
        return WeightUse.COMPUTED if inherited and not own else WeightUse.UNKNOWN
    with torch.no_grad(), eval_mode(layer), align_module_device(layer):
        weight: Any = layer.weight
        if not _has_arithmetic(weight):
            return WeightUse.PLAIN
        if weight.is_meta:
            return None
        run = forward if forward is not None and own else MethodType(type(layer).forward, layer)
        return WeightUse.PLAIN if _is_plain(_OPERATIONS[kind], layer, run, weight.detach()) else WeightUse.OWN


def is_stock(layer: nn.Module) -> bool:
    """Whether a layer is of a stock type itself, with its weight stored and the type's own `forward`.

    Examples:
        >>> is_stock(nn.Linear(3, 2)), is_stock(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
        (True, False)
    """
    return type(layer) in _OPERATIONS and _is_stored(layer) and not _has_own(layer)


def read_weight(layer: nn.Module) -> Any:
    """A layer's weight as it is now, `None` where it has none; a computed one without what that does in train mode.

    Examples:
        >>> layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(3, 2))
        >>> before = layer.parametrizations.weight[0]._u.clone()
        >>> _ = read_weight(layer)  # `layer.weight` would take a step of the power iteration
        >>> torch.equal(layer.parametrizations.weight[0]._u, before)
        True
    """
    if not is_parametrized(layer, "weight"):
        return getattr(layer, "weight", None)
    with eval_mode(cast(nn.Module, layer.parametrizations)):
        return layer.weight


def no_place_for(use: WeightUse | None, name: str, verb: str) -> str | None:
    """Why a correction cannot become part of the layer's stored weight, and the mend; `None` where it can."""
    if use is not WeightUse.COMPUTED:
        return None
    return (
        f"The adapter cannot be {verb} at layer {name!r}: its weight is computed anew for each pass (a "
        "parametrisation, weight norm, spectral norm or pruning), so that no stored parameter can take the correction "
        "in. Store it first: `parametrize.remove_parametrizations(layer, 'weight')`, `prune.remove(layer, 'weight')` "
        "or `remove_weight_norm(layer)` of `torch.nn.utils`, on the layer's `base_layer`; or keep the adapter beside "
        "the model."
    )


def _forward_of(layer: nn.Module) -> Any:
    """The `forward` that was put on the layer itself, if any; Accelerate's hook keeps the one before."""
    return vars(layer).get("_old_forward", vars(layer).get("forward"))


def _has_own(layer: nn.Module) -> bool:
    """Whether that is another one than its type's."""
    forward = _forward_of(layer)
    return forward is not None and getattr(forward, "__func__", None) is not type(layer).forward


def _is_stored(layer: nn.Module) -> bool:
    if "weight" in vars(layer)["_parameters"]:
        return True
    # A sharding library may keep the parameter elsewhere; a computed one has a property or a hook that makes it.
    return not (isinstance(getattr(type(layer), "weight", None), property) or layer._forward_pre_hooks)


def _has_arithmetic(weight: Any) -> bool:
    plain = isinstance(weight, Tensor) and type(weight.data) is Tensor
    return plain and weight.is_floating_point() and weight.dtype.itemsize >= 2


def _is_plain(operation: _Operation, layer: Any, run: Callable[..., Any], weight: Tensor) -> bool:
    x = operation.inputs(layer).to(weight.device)
    x = x.to(weight.dtype) if x.is_floating_point() else x
    with _another_weight(layer, weight) as tried:
        try:
            output = run(x)
        except (TypeError, ValueError, RuntimeError, IndexError):  # it wants more, or other inputs
            return False
        expected = operation.output(layer, x, tried)
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return False
    undefined = expected.isnan()  # a row of zeros that is divided by its norm
    if not torch.equal(output.isnan(), undefined):
        return False
    output, expected = output.masked_fill(undefined, 0.0), expected.masked_fill(undefined, 0.0)
    tolerance = max(1e-3, 4 * torch.finfo(weight.dtype).eps)
    return bool((output.double() - expected.double()).norm() <= tolerance * expected.double().norm())


@contextmanager
def _another_weight(layer: Any, weight: Tensor) -> Iterator[Tensor]:
    """Let the layer have another weight, which is neither of the norm nor of the mean that its own may be made to."""
    parameters = vars(layer)["_parameters"]
    kept = parameters.get("weight")
    if kept is None:  # kept elsewhere
        yield weight
        return
    other = 1.5 * weight + (0.1 * weight.float().std(correction=0) + 0.01).to(weight)
    try:
        parameters["weight"] = nn.Parameter(other, requires_grad=False)
        yield other
    finally:
        parameters["weight"] = kept


# ---- what the stock types compute ----


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _conv_inputs(conv: Any) -> Tensor:
    sizes = zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)
    # Of different extent in each dimension, so that an inner padding by the remainder shows.
    extents = [dilation * (size - 1) + 2 + step + place for place, (size, step, dilation) in enumerate(sizes)]
    return _drawn(2, conv.in_channels, *extents)


def _convolution(kind: Any) -> _Operation:
    return _Operation(_conv_inputs, lambda conv, x, weight: kind._conv_forward(conv, x, weight, conv.bias))


def _looked_up(embedding: Any, tokens: Tensor, weight: Tensor) -> Tensor:
    rows = F.embedding(tokens, weight, embedding.padding_idx)
    scale = getattr(embedding, "embed_scale", None)
    return rows if scale is None else rows * scale


_OPERATIONS: dict[Any, _Operation] = {
    nn.Linear: _Operation(
        lambda layer: _drawn(2, layer.in_features), lambda layer, x, weight: F.linear(x, weight, layer.bias)
    ),
    Conv1D: _Operation(lambda layer: _drawn(2, layer.nx), lambda layer, x, weight: x @ weight + layer.bias),
    nn.Conv1d: _convolution(nn.Conv1d),
    nn.Conv2d: _convolution(nn.Conv2d),
    nn.Conv3d: _convolution(nn.Conv3d),
    nn.Embedding: _Operation(lambda layer: torch.arange(min(layer.num_embeddings, 16)).unsqueeze(0), _looked_up),
}
