"""Where a weight's gradient is caught: at the weight, or between a layer's inputs and its output gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .batch_gradient import BatchGradient, ConvGradient, DenseGradient, TokenGradient

Fold = Callable[[BatchGradient], None]

_TOKENS_AT_ONCE = 8192  # bounds the float32 copies of half-precision activations


def carries_gradient(weight: Tensor) -> bool:
    """Whether autograd can differentiate by this weight: it is there, and of a dtype with arithmetic of its own."""
    return weight.is_floating_point() and weight.dtype.itemsize >= 2 and not weight.is_meta


class GradientSource(ABC):
    """One weight whose gradient is wanted, and the way to get at it."""

    weight: nn.Parameter | None = None
    """The parameter that autograd must differentiate by, if any."""

    @abstractmethod
    def attach(self, fold: Fold) -> RemovableHandle:
        """Call `fold` with each part of the gradient as the backward pass makes it, until the handle is removed."""


class WeightSource(GradientSource):
    """The gradient that autograd makes for a parameter: of all its uses, whoever they are by.

    Args:
        weight: The parameter; its dtype must carry gradients.
        as_matrix: Reads a tensor shaped like the weight as the matrix, or batch of matrices, that is summed.
    """

    weight: nn.Parameter

    def __init__(self, weight: nn.Parameter, as_matrix: Callable[[Tensor], Tensor] = lambda weight: weight) -> None:
        self.weight = weight
        self._as_matrix = as_matrix

    def attach(self, fold: Fold) -> RemovableHandle:
        def take(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            if gradient is None:
                return
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            fold(DenseGradient(self._as_matrix(gradient)))

        return self.weight.register_post_accumulate_grad_hook(take)


class LayerSource(GradientSource):
    """The gradient of a layer's weight from what goes into the layer and the gradient of what comes out.

    The weight needs no gradient, so it may be quantised, offloaded or sharded, and the dense gradient is never made
    unless the sum is dense. The inputs are kept for the backward pass as autograd would keep them, and so are
    recomputed where the model is checkpointed.

    Args:
        layer: The layer; called with its input as the first argument.
        parts: Splits `(output gradient, input)` of one call into the gradients to fold.
    """

    def __init__(self, layer: nn.Module, parts: Callable[[Tensor, Tensor], list[BatchGradient]]) -> None:
        self._layer = layer
        self._parts = parts

    def attach(self, fold: Fold) -> RemovableHandle:
        def after_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            anchor = torch.zeros((), requires_grad=True, device=output.device)
            changed = None
            if not output.requires_grad:  # nothing before this layer is differentiated
                output = changed = _BeginGraph.apply(output, anchor)
            elif output._is_view():  # a hook on a view is lost when the model changes the view in place
                output = changed = torch.ops.aten._unsafe_view(output, output.shape)
            inputs = (args or tuple(kwargs.values()))[0]
            kept = [_Keep.apply(inputs.detach(), anchor)]

            def on_gradient(gradient: Tensor) -> None:
                holder = kept.pop()  # of the node: before torch 2.12 a node is freed with its tensor
                (inputs,) = holder.grad_fn.saved_tensors
                del holder  # with its node the inputs go, layer by layer
                with torch.no_grad():
                    for part in self._parts(gradient, inputs):
                        fold(part)

            output.register_hook(on_gradient)
            return changed

        return self._layer.register_forward_hook(after_forward, with_kwargs=True)


def token_gradients(outputs: Tensor, inputs: Tensor) -> list[BatchGradient]:
    """The gradient of a linear layer, `(..., m)` and `(..., n)`, in parts of some thousands of tokens."""
    outputs, inputs = outputs.reshape(-1, outputs.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
    inputs = inputs.to(outputs.dtype)  # autocast casts inside the layer
    parts = zip(outputs.split(_TOKENS_AT_ONCE), inputs.split(_TOKENS_AT_ONCE), strict=True)
    return [TokenGradient(*part) for part in parts]


def conv_gradients(conv: nn.Module) -> Callable[[Tensor, Tensor], list[BatchGradient]]:
    """The same for a convolution, whose settings are `conv`'s."""
    return lambda outputs, inputs: [ConvGradient.of(conv, outputs, inputs.to(outputs.dtype))]


class _BeginGraph(torch.autograd.Function):
    """A copy of a tensor that the backward pass reaches, and where it ends."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None


class _Keep(torch.autograd.Function):
    """A node beside the graph that holds a tensor as autograd holds what it saves: packed and recomputed with it."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return kept.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None
