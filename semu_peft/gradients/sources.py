"""Where a weight's gradient is caught: at the weight, or between a layer's inputs and its output gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from semu_peft.model_state import is_aside
from semu_peft.tuner.layer import SemuLayer
from semu_peft.tuner.weight_use import WeightUse, read_weight, weight_use

from .batch_gradient import BatchGradient, ConvGradient, DenseGradient, TokenGradient
from .padding import SeenMask
from .processes import whole

Fold = Callable[[BatchGradient], None]


class Handle(Protocol):
    """What ends the catching of gradients."""

    def remove(self) -> None: ...


def carries_gradient(weight: Tensor) -> bool:
    """Whether autograd can differentiate by this weight: it is there, and of a dtype with arithmetic of its own."""
    return weight.is_floating_point() and weight.dtype.itemsize >= 2 and not weight.is_meta


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that gradients of weights of this dtype are summed in: float32 or better."""
    wide = dtype.is_floating_point and dtype.itemsize >= 2  # float8 promotes to nothing
    return torch.promote_types(dtype, torch.float32) if wide else torch.float32


class GradientSource(ABC):
    """One weight whose gradient is wanted, and the way to get at it.

    Attributes:
        shape: Of the weight read as a matrix, `(m, n)` or `(batch, m, n)`.
        dtype: The dtype that its gradients are summed in.
        device: Where the weight is; the execution device of one that is offloaded.
        weight: The parameter that autograd must differentiate by, if any.
        summed: Where to take the same gradient from if nothing but its sum is wanted and that is quicker there.

    Examples:
        >>> import torch
        >>> from semu_peft.gradients import GradientSource, LayerSource, WeightSource
        >>> issubclass(LayerSource, GradientSource), issubclass(WeightSource, GradientSource)
        (True, True)
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    weight: nn.Parameter | None = None
    summed: WeightSource | None = None

    def around(self, layer: nn.Module) -> GradientSource:
        """This source, for an adapter's layer that is called in the place of the one it was made for."""
        return self

    @abstractmethod
    def attach(self, fold: Fold) -> Handle:
        """Call `fold` with each part of the gradient as the backward pass makes it, until the handle is removed."""


class WeightSource(GradientSource):
    """The gradient that autograd makes for a parameter: of all its uses, whoever they are by.

    Args:
        weight: The parameter; its dtype must carry gradients.
        as_matrix: Reads a tensor shaped like the weight as the matrix, or batch of matrices, that is summed.

    Examples:
        >>> import torch
        >>> from semu_peft.gradients import WeightSource
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> seen = []
        >>> handle = WeightSource(weight).attach(seen.append)
        >>> (2 * weight).sum().backward()
        >>> seen[0].dense().tolist(), weight.grad
        ([[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]], None)
    """

    weight: nn.Parameter

    def __init__(self, weight: nn.Parameter, as_matrix: Callable[[Tensor], Tensor] = lambda weight: weight) -> None:
        self.weight = weight
        self.shape = tuple(as_matrix(weight.detach()).shape)
        self.dtype, self.device = sum_dtype(weight.dtype), weight.device
        self._as_matrix = as_matrix

    def attach(self, fold: Fold) -> Handle:
        def take(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            if gradient is None:
                return
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            fold(DenseGradient(self._as_matrix(whole(gradient))))

        return self.weight.register_post_accumulate_grad_hook(take)


class CalledWeightSource(WeightSource):
    """The gradient that autograd makes for the weight of an adapter's layer, of the layer's calls alone.

    It is what a [`LayerSource`][semu_peft.gradients.sources.LayerSource] gives, added up over the calls. An accelerator
    waits for the host to launch its work: autograd launches this by itself, where the other takes two hooks a call.
    Whoever reads the weight past the layer meanwhile is given one without a gradient.

    Args:
        layer: The adapter's layer, which is called in its base layer's place.
        as_matrix: See `WeightSource`.

    Examples:
        >>> import torch
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.gradients.sources import CalledWeightSource
        >>> from semu_peft.tuner import Linear
        >>> layer, seen = Linear(torch.nn.Linear(3, 2), "default", SemuConfig(r=1, init_weights=False), ""), []
        >>> handle = CalledWeightSource(layer).attach(seen.append)
        >>> (layer(torch.ones(1, 3)).sum() + layer.weight.sum()).backward()
        >>> seen[0].dense().tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
        >>> handle.remove()
    """

    def __init__(self, layer: SemuLayer, as_matrix: Callable[[Tensor], Tensor] = lambda weight: weight) -> None:
        weight = cast(nn.Parameter, layer.base_weight)
        super().__init__(weight, as_matrix)
        self._layer = layer
        matrix = as_matrix(weight.detach())
        if matrix.is_contiguous() and weight.is_contiguous() and matrix.data_ptr() == weight.data_ptr():
            # The matrix is the weight in its own order: the layer need not be asked each time.
            same, shape = matrix.shape == weight.shape, self.shape
            self._as_matrix = (lambda gradient: gradient) if same else (lambda gradient: gradient.reshape(shape))

    def attach(self, fold: Fold) -> Handle:
        def take(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            if gradient is not None:
                fold(DenseGradient(self._as_matrix(gradient)))

        return _CalledWeightHandle(self.weight.register_post_accumulate_grad_hook(take), self._layer)


class _CalledWeightHandle:
    """Ends the hook, and the watch that was set where nobody watches already."""

    def __init__(self, hook: Handle, layer: SemuLayer) -> None:
        self._hook, self._layer, self._watches = hook, layer, layer.watch is None
        if self._watches:
            layer.watch = Tensor.detach

    def remove(self) -> None:
        self._hook.remove()
        if self._watches:
            self._layer.watch = None


class LayerSource(GradientSource):
    """The gradient of a layer's weight from what goes into the layer and the gradient of what comes out.

    The weight needs no gradient, so it may be quantised, offloaded or sharded, and the dense gradient is never made
    unless the sum is dense. The inputs are kept for the backward pass as autograd would keep them, and so are
    recomputed where the model is checkpointed.

    Args:
        layer: The layer; called with its input as the first argument.
        parts: Splits `(output gradient, input)` of one call into the gradients to fold.
        shape: Of the weight read as a matrix; by default its rows, flattened.

    Attributes:
        mask: What forward passes are told of padding, if anybody looks.

    Examples:
        >>> import torch
        >>> from semu_peft.gradients import LayerSource, TokenGradient
        >>> layer, seen = torch.nn.Linear(3, 2).requires_grad_(False), []
        >>> source = LayerSource(layer, lambda outputs, inputs: [TokenGradient(outputs, inputs)])
        >>> handle = source.attach(seen.append)
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> seen[0].dense().tolist(), layer.weight.grad
        ([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], None)
    """

    def __init__(
        self,
        layer: nn.Module,
        parts: Callable[[Tensor, Tensor], list[BatchGradient]],
        shape: tuple[int, ...] | None = None,
    ) -> None:
        self._layer = layer
        self._parts = parts
        self.mask: SeenMask | None = None
        weight: Any = getattr(layer, "base_weight", None)
        weight = read_weight(layer) if weight is None else weight
        self.shape = shape or tuple(weight.flatten(1).shape)
        self.dtype, self.device = sum_dtype(weight.dtype), _home(layer, weight)

    def around(self, layer: nn.Module) -> LayerSource:
        return LayerSource(layer, self._parts, self.shape)

    def attach(self, fold: Fold) -> Handle:
        anchors: dict[torch.device, Tensor] = {}  # which no gradient comes to: one is enough for all calls

        def after_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled() or is_aside():
                return None
            anchor = anchors.get(output.device)
            if anchor is None:
                anchor = anchors[output.device] = torch.zeros((), requires_grad=True, device=output.device)
            changed = None
            if not output.requires_grad:  # nothing before this layer is differentiated
                output = changed = _BeginGraph.apply(output, anchor)
            elif output._is_view():  # a hook on a view is lost when the model changes the view in place
                output = changed = torch.ops.aten._unsafe_view(output, output.shape)
            inputs = (args or tuple(kwargs.values()))[0]
            counts = None if self.mask is None else self.mask.of(inputs)
            kept = [_Keep.apply(inputs.detach(), anchor)]

            def on_gradient(gradient: Tensor) -> None:
                holder = kept[0]  # of the node: before torch 2.12 a node is freed with its tensor
                (inputs,) = holder.grad_fn.saved_tensors
                del holder  # with its node the inputs go, layer by layer, unless the backward pass comes again
                if not torch._C._autograd._get_current_graph_task_keep_graph():
                    kept.clear()
                with torch.no_grad():
                    for part in self._parts(gradient, inputs):
                        is_counted = counts is not None and isinstance(part, TokenGradient)
                        fold(replace(part, counts=counts) if is_counted else part)  # type: ignore[type-var]

            output.register_hook(on_gradient)
            return changed

        return self._layer.register_forward_hook(after_forward, with_kwargs=True)


def token_gradients(outputs: Tensor, inputs: Tensor) -> list[BatchGradient]:
    """The gradient of a linear layer, from `(N, …, m)` and `(N, …, n)` for `N` examples."""
    inputs = inputs.to(outputs.dtype)  # autocast casts inside the layer
    if outputs.dim() < 2:
        outputs, inputs = outputs[None], inputs[None]
    return [TokenGradient(outputs, inputs)]


def conv_gradients(conv: nn.Module) -> Callable[[Tensor, Tensor], list[BatchGradient]]:
    """Make the function that takes the gradient of a convolution with the settings of `conv`."""
    return lambda outputs, inputs: [ConvGradient.of(conv, outputs, inputs.to(outputs.dtype))]


def dense_gradients(
    layer: Any, as_matrix: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, Tensor], list[BatchGradient]]:
    """Make the function that takes the whole gradient of a weight that no parameter holds: one that is computed.

    Args:
        layer: The bare convolution or embedding.
        as_matrix: Reads a tensor shaped like its weight as the matrix, or batch of matrices, that is summed.
    """
    shape = read_weight(layer).shape

    def of_convolution(outputs: Tensor, inputs: Tensor) -> list[BatchGradient]:
        gradient = ConvGradient.of(layer, outputs, inputs.to(outputs.dtype)).dense()
        return [DenseGradient(as_matrix(gradient.reshape(shape)))]

    def of_embedding(outputs: Tensor, tokens: Tensor) -> list[BatchGradient]:
        outputs, tokens = outputs.flatten(0, -2) * getattr(layer, "embed_scale", 1.0), tokens.flatten()
        if layer.padding_idx is not None:
            outputs = outputs * (tokens != layer.padding_idx).unsqueeze(-1)
        gradient = outputs.new_zeros(shape).index_add_(0, tokens, outputs)
        return [DenseGradient(as_matrix(gradient))]

    return of_embedding if isinstance(layer, nn.Embedding) else of_convolution


# ---- which layer types there are ----

SourceFactory = Callable[[Any], GradientSource]

_FACTORIES: dict[type[nn.Module], SourceFactory] = {}


def register_source(layer_type: type[nn.Module], factory: SourceFactory) -> None:
    """Let gradients of a layer type be gathered: say where the gradient of its weight is caught.

    Subclasses are meant as well, unless one has a source of its own. The built-in layer types are registered in the
    same way.

    Args:
        layer_type: The type of the layer.
        factory: Makes the source from a layer of that type: a
            [`LayerSource`][semu_peft.gradients.sources.LayerSource] where the layer's inputs and output gradients are
            enough, else a [`WeightSource`][semu_peft.gradients.sources.WeightSource].

    Examples:
        >>> class Scaled(nn.Module):  # y = x (2 W)ᵀ
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.ones(3, 5))
        ...     def forward(self, x):
        ...         return 2 * x @ self.weight.T
        >>> def gradients(outputs, inputs):  # of one call: a list of `BatchGradient`
        ...     return [TokenGradient(2 * outputs, inputs)]
        >>> register_source(Scaled, lambda layer: LayerSource(layer, gradients))
        >>> registered_source(Scaled()).shape
        (3, 5)
    """
    _FACTORIES[layer_type] = factory


def registered_source(layer: nn.Module) -> GradientSource | None:
    """The source for a layer, by its type or the nearest registered type that it inherits from; else `None`."""
    kind = _registered_kind(layer)
    return None if kind is None else _FACTORIES[kind](layer)


def use_of(layer: nn.Module) -> WeightUse:
    """What a layer does with its weight; a type that the user registered is taken to do what its source says.

    Examples:
        >>> use_of(nn.Linear(3, 2))
        <WeightUse.PLAIN: 'plain'>
    """
    kind = _registered_kind(layer)
    if kind not in _STOCK:
        return WeightUse.PLAIN
    return weight_use(layer) or WeightUse.PLAIN


def _registered_kind(layer: nn.Module) -> type[nn.Module] | None:
    return next((kind for kind in type(layer).__mro__ if kind in _FACTORIES), None)


def _conv_source(conv: Any) -> GradientSource:
    if conv.groups == 1:
        return LayerSource(conv, conv_gradients(conv))
    return _weight_source(conv)


def _weight_source(layer: Any) -> GradientSource:
    return WeightSource(read_weight(layer), lambda weight: weight.flatten(1))


register_source(nn.Linear, lambda layer: LayerSource(layer, token_gradients, (layer.out_features, layer.in_features)))
register_source(Conv1D, lambda layer: LayerSource(layer, token_gradients, tuple(layer.weight.mT.shape)))
register_source(nn.Embedding, _weight_source)
for _kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register_source(_kind, _conv_source)
_STOCK = frozenset(_FACTORIES)


def _home(layer: nn.Module, weight: Tensor) -> torch.device:
    hook: Any = getattr(layer, "_hf_hook", None)
    device = getattr(layer, "execution_device", None) or getattr(hook, "execution_device", None)
    return torch.device(device) if weight.is_meta and device is not None else weight.device


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
        return anchor.new_empty(0)  # also where whole numbers are kept, which have no gradient

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None
