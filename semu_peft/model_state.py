"""Where a model is and in which mode: eval mode for a whole pass, with activations recomputed where it was told to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers.cache_utils import Cache

_ASIDE: ContextVar[bool] = ContextVar("semu_aside", default=False)


def device_of(model: nn.Module) -> torch.device:
    """The device that a model's inputs belong on: that of its first parameter which has its values at hand.

    Offloaded weights lie on the meta device; whatever moves them in moves the inputs as well. A model that has no other
    parameters, or none at all, takes its inputs on the CPU.

    Examples:
        >>> from torch import nn
        >>> device_of(nn.Linear(2, 2)), device_of(nn.Linear(2, 2, device="meta")), device_of(nn.ReLU())
        (device(type='cpu'), device(type='cpu'), device(type='cpu'))
    """
    at_hand = (parameter.device for parameter in model.parameters() if parameter.device.type != "meta")
    return next(at_hand, torch.device("cpu"))


def is_offloaded(model: nn.Module) -> bool:
    """Whether hooks bring weights in from elsewhere: on the meta device, where these lie, there is nothing to move.

    Examples:
        >>> from torch import nn
        >>> is_offloaded(nn.Linear(2, 2)), is_offloaded(nn.Linear(2, 2, device="meta"))
        (False, True)
    """
    return any(parameter.is_meta for parameter in model.parameters())


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that a model's inputs belong in, as diffusers and transformers know it (`model.dtype`).

    It is not that of the first parameter: some models keep a few weights in float32, and with layerwise casting weights
    are stored in float8 that are computed with in another dtype. Other models take the dtype of their first parameter
    that has arithmetic of its own, or float32.

    Examples:
        >>> from torch import nn
        >>> dtype_of(nn.Linear(2, 2).half()), dtype_of(nn.ReLU())
        (torch.float16, torch.float32)
    """
    inner: Any = out_of_wrappers(model)
    told = getattr(inner, "dtype", None)  # through a `PeftModel` and a compiled module
    if isinstance(told, torch.dtype) and told.is_floating_point and told.itemsize >= 2:
        return told
    own = (p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize >= 2)
    return next(own, torch.float32)


def out_of_wrappers(model: nn.Module) -> nn.Module:
    """The model out of the distributed wrappers around it; one that is compiled stays compiled.

    Accelerate looks at every module of a model before it answers, so that it is asked only where there may be wrappers.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> out_of_wrappers(nn.DataParallel(model)) is model, out_of_wrappers(model) is model
        (True, True)
    """
    inner: nn.Module = extract_model_from_parallel(model) if hasattr(model, "module") else model
    return inner


@contextmanager
def same_modes(model: nn.Module) -> Iterator[None]:
    """Put every module back into its own train or eval mode after the context.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Dropout()).train()
        >>> with same_modes(model):
        ...     _ = model.eval()
        >>> model.training
        True
    """
    with _same_modes(list(model.modules())):
        yield


@contextmanager
def _same_modes(modules: Sequence[nn.Module]) -> Iterator[None]:
    modes = [module.training for module in modules]
    try:
        yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.training = training


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and every module back into its own mode afterwards.

    Transformers recomputes activations (`model.gradient_checkpointing_enable()`) only in layers that are in train mode.
    Those layers are put into train mode just while they decide that, and are in eval mode while they compute, so that
    dropout is off in them as everywhere. Where no gradient is taken (`torch.no_grad`) there is nothing to recompute.
    Nor are 4-bit layers of bitsandbytes packed for a kernel of the CPU that has no backward pass, as they are in eval
    mode.

    Args:
        model: Any model. Backward passes belong inside the context, as they recompute in it.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> with eval_mode(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    modules = list(model.modules())
    recomputing = [vars(module) for module in modules if _recomputes(module)] if torch.is_grad_enabled() else []
    functions = [attributes["_gradient_checkpointing_func"] for attributes in recomputing]
    with _same_modes(modules):
        model.eval()
        if torch.is_grad_enabled():
            _keep_differentiable(modules)
        for attributes, function in zip(recomputing, functions, strict=True):
            attributes["training"] = True
            attributes["_gradient_checkpointing_func"] = _in_eval_mode(attributes, function)
        try:
            yield
        finally:
            for attributes, function in zip(recomputing, functions, strict=True):
                attributes["_gradient_checkpointing_func"] = function


@contextmanager
def aside() -> Iterator[None]:
    """Passes in this context are no part of the loss: whoever gathers gradients at the model's layers looks away.

    Examples:
        >>> with aside():
        ...     is_aside()
        True
        >>> is_aside()
        False
    """
    token = _ASIDE.set(True)
    try:
        yield
    finally:
        _ASIDE.reset(token)


def is_aside() -> bool:
    """Whether this pass is no part of the loss, see `aside`."""
    return _ASIDE.get()


def _keep_differentiable(modules: Sequence[nn.Module]) -> None:
    """Leave bitsandbytes' 4-bit layers, which have no dropout, in train mode, and unpack those that are packed."""
    for module in modules:
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.training = True
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()  # saving unpacks them in place


def leave_recomputation(attributes: dict[str, Any]) -> None:
    """Put a copy of a layer's attributes that was taken in `eval_mode` into plain eval mode, nothing recomputed.

    `eval_mode` works on the layer itself and would leave the copy in train mode.

    Examples:
        >>> attributes = {"training": True}
        >>> leave_recomputation(attributes)
        >>> attributes
        {'training': True}
    """
    checkpoint = getattr(attributes.get("_gradient_checkpointing_func"), "recomputes", None)
    if checkpoint is not None:
        attributes.update(training=False, _gradient_checkpointing_func=checkpoint)


def _recomputes(module: nn.Module) -> bool:
    # Transformers' `GradientCheckpointingLayer`, told by what `gradient_checkpointing_enable` sets on it. Whole models
    # carry the same attributes in older releases, and only ask them of their layers.
    kinds = {cls.__name__ for cls in type(module).__mro__}
    active = "GradientCheckpointingLayer" in kinds and getattr(module, "gradient_checkpointing", False)
    return active and "_gradient_checkpointing_func" in vars(module)


def _in_eval_mode(layer: dict[str, Any], checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def run(function: Callable[..., Any], *args: Any) -> Any:
        def compute(*inputs: Any) -> Any:  # also when the backward pass recomputes it
            layer["training"] = False
            try:
                return function(*inputs)
            finally:
                layer["training"] = True

        # A cache would be filled twice, and attention would look at each token twice. Transformers takes it out of the
        # keyword arguments; models in train mode do not even pass it by position.
        inputs = [None if isinstance(value, Cache) else value for value in args]
        reentrant = getattr(checkpoint, "keywords", {}).get("use_reentrant", True)
        return checkpoint(compute, *(_differentiable(inputs) if reentrant else inputs))

    run.recomputes = checkpoint  # type: ignore[attr-defined]
    return run


def _differentiable(inputs: list[Any]) -> list[Any]:
    """The inputs of a reentrant checkpoint, one of them with a gradient: without any it lets none through.

    `enable_input_require_grads` of transformers sees to that in models with token embeddings alone.
    """
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if not torch.is_grad_enabled() or any(tensor.requires_grad for tensor in tensors):
        return inputs
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    return [value.detach().requires_grad_() if value is first and value is not None else value for value in inputs]
