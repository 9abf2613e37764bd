"""What the gradient of a trained core is made of, example by example: thin rows from both sides of its layer.

With `∇R = Uᵀ G V` and `G = Σ dyᵀ x` over the places of a batch (tokens, or windows of a convolution), the core's
gradient is a sum of outer products of `r` numbers each, `(dy U)ᵀ (x V)`. They cost next to nothing beside the layer
itself, and tell the examples of a batch apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from semu_peft.model_state import is_aside
from semu_peft.tuner.conv import ConvNd
from semu_peft.tuner.embedding import Embedding
from semu_peft.tuner.layer import SemuLayer
from semu_peft.tuner.linear import Linear
from semu_peft.tuner.tied import TiedLayer
from semu_peft.tuner.weight_use import WeightUse

from .batch_gradient import ConvGradient
from .padding import SeenMask, watch_mask
from .processes import whole


class Rows(NamedTuple):
    """One call's share of a core's gradient, `Σ left rightᵀ` over its rows.

    Attributes:
        left: `(N, places, r)`, the core's rows; in the dtype of the bases.
        right: `(N, places, r)`, the core's columns.
        counts: `(N, places)`, bool: which of them are no padding; None where all are or nobody said so.
    """

    left: Tensor
    right: Tensor
    counts: Tensor | None = None


class CaughtRows:
    """The rows of the backward passes since they were last taken, by layer.

    Attributes:
        watching: Whether forward passes keep what the rows need of them; one whose rows nobody asks for has no need to.
        catching: Whether backward passes leave their rows here; a pass for the plain gradient has no need to.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.watching, self.catching = True, False
        self._calls: dict[str, list[Rows]] = {name: [] for name in names}

    def __contains__(self, name: str) -> bool:
        return name in self._calls

    def add(self, name: str, rows: Rows) -> None:
        """Keep the rows of one call of a layer."""
        self._calls[name].append(rows)

    def take(self) -> dict[str, list[Rows]]:
        """Return what is here, and be empty again."""
        taken, self._calls = self._calls, {name: [] for name in self._calls}
        return taken


@contextmanager
def catch_core_rows(
    model: nn.Module, layers: Mapping[str, SemuLayer], adapter_name: str = "default"
) -> Iterator[CaughtRows]:
    """Catch the rows of cores while the context lasts, in passes with gradients through the model.

    Layers whose rows cannot be told from their inputs and outputs (attention and fused experts, which read weights
    without calling their layers, layers with a `forward` of their own, grouped convolutions and those in `per_channel`
    mode) are left out.

    Args:
        model: The model with the adapter, whose tied layers share cores.
        layers: The layers by name, as `semu_layers` gives them.
        adapter_name: The adapter.

    Yields:
        Where the rows are taken from.

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.tuner.adapted import semu_layers
        >>> config = SemuConfig(target_modules=["0"], r=2, init_weights=False)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> layers = semu_layers(model)
        >>> with catch_core_rows(model, layers) as caught:
        ...     caught.catching = True
        ...     model(torch.ones(5, 4)).sum().backward()
        >>> ((left, right, _),) = caught.take()["0"]
        >>> gradient = torch.einsum("nsi,nsj->ij", left, right)
        >>> torch.allclose(gradient, layers["0"].semu_core["default"].grad, atol=1e-5)
        True
    """
    sources = {name: layer for name, layer in layers.items() if _has_rows(layer, adapter_name)}
    caught = CaughtRows(list(sources))
    names = {id(layer): name for name, layer in sources.items()}
    tied = [module for module in model.modules() if isinstance(module, TiedLayer) and id(module.source) in names]
    called = [*sources.items(), *((names[id(module.source)], module) for module in tied)]
    with watch_mask(model) as mask, ExitStack() as handles:
        for name, layer in called:
            handles.callback(_hook(layer, name, adapter_name, caught, mask).remove)
        yield caught


def _has_rows(layer: SemuLayer, adapter_name: str) -> bool:
    if layer.weight_use is WeightUse.OWN:  # what stands between its inputs and its outputs is its own affair
        return False
    if isinstance(layer, ConvNd):
        return layer.conv.groups == 1 and layer.configs[adapter_name].conv_mode != "per_channel"
    return isinstance(layer, (Linear, Embedding))


def _hook(layer: SemuLayer, name: str, adapter_name: str, caught: CaughtRows, mask: SeenMask) -> Any:
    def after_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        if not caught.watching or not torch.is_grad_enabled() or not output.requires_grad or is_aside():
            return None
        # A hook on a view is lost when the model changes the view in place.
        changed = torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else None
        x = (args or tuple(kwargs.values()))[0]
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            known = _input_rows(layer, x, adapter_name)
            counts = mask.of(known)

        def on_gradient(gradient: Tensor) -> None:
            if caught.catching:
                with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                    caught.add(name, _rows(layer, known, gradient, adapter_name)._replace(counts=counts))

        (output if changed is None else changed).register_hook(on_gradient)
        return changed

    return layer.register_forward_hook(after_forward, with_kwargs=True)


def _input_rows(layer: SemuLayer, x: Tensor, adapter_name: str) -> Tensor:
    """What is known of the rows before the backward pass: `x V`, or the rows of `U` that tokens look up."""
    right = whole(layer.semu_V[adapter_name])  # FSDP2 may have left the layer's shards alone by now
    if isinstance(layer, Embedding):
        return _by_example(whole(layer.token_basis(adapter_name))[x])
    if isinstance(layer, ConvNd):
        # Only the inputs are looked at here, so that the outputs' place is taken by what is of the right shape.
        hidden = ConvGradient.of(layer.conv, x, x).project_inputs(right)
        return hidden.flatten(2).mT
    return _by_example(torch.atleast_2d(x).to(right.dtype) @ right)


def _rows(layer: SemuLayer, known: Tensor, gradient: Tensor, adapter_name: str) -> Rows:
    left, right = (whole(bases[adapter_name]) for bases in (layer.semu_U, layer.semu_V))
    scale = layer.scaling[adapter_name]
    if isinstance(layer, Embedding):
        embed_scale = layer._get_embed_scale()
        scale = scale if embed_scale is None else scale * embed_scale.to(left)
        return Rows(known * scale, _by_example(gradient.to(right.dtype) @ right))
    if isinstance(layer, ConvNd):
        return Rows(gradient.flatten(2).mT.to(left.dtype) @ left * scale, known)
    return Rows(_by_example(torch.atleast_2d(gradient).to(left.dtype) @ left) * scale, known)


def _by_example(rows: Tensor) -> Tensor:
    """`(N, …, r)` as `(N, places, r)`."""
    return rows.reshape(len(rows), -1, rows.shape[-1])
