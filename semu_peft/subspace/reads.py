"""Who reads a layer's weight past the layer, where its correction does not reach: observed in a pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from semu_peft.tuner.layer import SemuLayer


@contextmanager
def watched(layers: Mapping[str, SemuLayer]) -> Iterator[set[str]]:
    """Note while the context lasts which layers' weights a loss depends on through a read of `layer.weight`.

    A parent may score with `embedding.weight`, or call `F.linear(x, layer.weight)`. A look at its dtype or device does
    not count, only what a gradient comes back from; the gradient goes no further, as the correction is not in there.

    Args:
        layers: Layers by name, as the pass will run them.

    Yields:
        Names, as backward passes find them.

    Examples:
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.tuner import Linear
        >>> layer = Linear(torch.nn.Linear(4, 3), "default", SemuConfig(), "layer")
        >>> with watched({"layer": layer}) as read:
        ...     _ = layer.weight.dtype
        ...     print(read)
        ...     (torch.ones(4) @ layer.weight.T).sum().backward()
        ...     print(read)
        set()
        {'layer'}
    """
    found: set[str] = set()
    try:
        for name, layer in layers.items():
            layer.watch = _watch(name, found)
        yield found
    finally:
        for layer in layers.values():
            layer.watch = None


def _watch(name: str, found: set[str]) -> Callable[[Tensor], Tensor]:
    def watch(weight: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or weight.is_meta or not weight.is_floating_point():
            return weight
        anchor = torch.zeros((), requires_grad=True, device=weight.device)
        read: Tensor = _Read.apply(weight.detach(), anchor, lambda: found.add(name))
        return read

    return watch


class _Read(torch.autograd.Function):
    """A weight as it is, and a note when a gradient comes back to it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, anchor: Tensor, note: Callable[[], None]) -> Tensor:
        ctx.note = note
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.note()
        return None, None, None
