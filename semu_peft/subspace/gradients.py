"""Streaming gradients of chosen weights: each is folded away as soon as autograd has made it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from semu_peft.tuner.eval_mode import eval_mode

Objective = Callable[[nn.Module, Any], Tensor]


def accumulate_gradients(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    objective: Objective,
    *,
    progress: bool = True,
) -> tuple[dict[str, Tensor], int]:
    """Sum the gradient of the objective at each weight over one pass of the batches, the model in eval mode.

    A weight's gradient is added to its float32 sum, and dropped, by a hook that autograd calls when the gradient is
    complete, so that at no moment the gradients of two weights exist beside each other's sums. The model comes back
    as it was: `requires_grad` flags, gradients, train/eval modes and hooks.

    Args:
        model: The model, called by `objective`.
        weights: The weights to differentiate by, with the names to use in errors. One `Parameter` may stand under
            several names; each then gets the gradient of all its uses.
        batches: Forget batches; tensors in them are moved to the model's device.
        objective: `(model, batch) -> scalar loss`.
        progress: Show a progress bar.

    Returns:
        The gradients by name, float32 (float64 for float64 weights), and the number of batches.

    Raises:
        ValueError: There is no batch; a loss or a gradient is not finite; a loss depends on no target weight; a weight
            never received a gradient; a weight's dtype cannot carry one.
    """
    for name, weight in weights.items():
        if weight.is_meta:
            raise ValueError(
                f"The weight of layer {name!r} is on the meta device: it is offloaded, or not loaded at all. "
                "Initialise the adapter on a model that is loaded whole, save it, and load it onto the offloaded one."
            )
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:  # float8 has no arithmetic of its own
            raise ValueError(
                f"The weight of layer {name!r} has dtype {weight.dtype}, which cannot carry a gradient. Load the model "
                "unquantised to initialise the adapter, or leave the layer out of `target_modules`."
            )
    sums: dict[int, Tensor] = {}

    def fold(weight: Tensor) -> None:
        if weight.grad is None:
            return
        if id(weight) in sums:
            sums[id(weight)].add_(weight.grad)
        else:
            sums[id(weight)] = weight.grad.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        weight.grad = None

    count = 0
    unique = {id(weight): weight for weight in weights.values()}.values()
    with _only_differentiable(model, list(unique)), torch.enable_grad():
        hooks = [weight.register_post_accumulate_grad_hook(fold) for weight in unique]
        try:
            device = next(iter(unique)).device
            bar = tqdm(batches, desc="Forget gradients", disable=not progress, leave=False)
            for batch in bar:
                loss = objective(model, send_to_device(batch, device))
                check_loss(loss, f"batch {count}")
                if not torch.isfinite(loss):
                    raise ValueError(
                        f"`objective` is {loss.item()} for batch {count} of `batches`. Check that batch's inputs and "
                        "labels for NaN, infinite or out-of-range values."
                    )
                loss.backward()
                count += 1
        finally:
            for hook in hooks:
                hook.remove()
    if count == 0:
        raise ValueError(
            "`batches` is empty: expected at least one forget batch. If it is a generator or an iterator, it may have "
            "been used up by an earlier pass; pass a DataLoader or a list."
        )
    missing = [name for name, weight in weights.items() if id(weight) not in sums]
    if missing:
        raise ValueError(
            f"The loss has no gradient for the target layers {missing[:3]} ({len(missing)} in all): the forward pass "
            "does not use them. Put them into `exclude_modules`, or use an objective that reaches them."
        )
    for name, weight in weights.items():
        if not torch.isfinite(sums[id(weight)]).all():
            raise ValueError(
                f"The gradient of layer {name!r} is not finite. Check the forget data for extreme values, or compute "
                "in float32 or bfloat16 instead of float16."
            )
    return {name: sums[id(weight)] for name, weight in weights.items()}, count


def check_loss(loss: Any, where: str) -> None:
    """Check that an objective returned a scalar tensor with a gradient.

    Args:
        loss: What the objective returned.
        where: The batch, to name in the error.

    Raises:
        ValueError: It did not.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(
            f"`objective` must return a scalar tensor, got {type(loss).__name__} "
            f"{tuple(loss.shape) if isinstance(loss, Tensor) else repr(loss)} for {where}."
        )
    if not loss.requires_grad:
        raise ValueError(
            f"`objective` returned a loss without a gradient for {where}: it depends on nothing that is trained. Do "
            "not detach the model's output or call the model under `torch.no_grad`."
        )


@contextmanager
def _only_differentiable(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """Let gradients reach `weights` alone, in eval mode, and put everything back afterwards."""
    parameters = list({id(p): p for p in (*model.parameters(), *weights)}.values())
    flags = [parameter.requires_grad for parameter in parameters]
    gradients = [weight.grad for weight in weights]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        with eval_mode(model):
            yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
