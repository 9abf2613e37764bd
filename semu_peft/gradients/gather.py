"""Streaming gradients of chosen weights: each is folded away as soon as the backward pass has it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from semu_peft.model_state import eval_mode

from .processes import sum_over_processes
from .sources import GradientSource, WeightSource, carries_gradient
from .statistics import Accumulator, ExactSum

Objective = Callable[[nn.Module, Any], Tensor]


def stream_gradients(
    model: nn.Module,
    sources: Mapping[str, GradientSource],
    accumulators: Mapping[str, Accumulator],
    batches: Iterable[Any],
    objective: Objective,
    *,
    description: str = "Forget gradients",
    progress: bool = True,
) -> int:
    """Add the gradient of the objective at each source to its accumulator, over one pass, the model in eval mode.

    A gradient is folded into its accumulator, and dropped, by a hook in the backward pass, so that at no moment the
    gradients of two weights exist beside each other's sums. The model comes back as it was: `requires_grad` flags,
    gradients, train/eval modes and hooks.

    In a distributed run every process brings its own batches, and the sums of all are left on each. The accumulators
    are added up one after the other.

    Args:
        model: The model, called by `objective`.
        sources: Where each gradient comes from, with the name to use in errors.
        accumulators: Where it goes, by the same names.
        batches: Tensors in them are moved to the model's device.
        objective: `(model, batch) -> scalar loss`.
        description: Title of the progress bar.
        progress: Show a progress bar.

    Returns:
        The number of batches, of all processes.

    Raises:
        ValueError: There is no batch; a loss or a gradient is not finite; a loss depends on no target; a target never
            received a gradient.
    """
    received = dict.fromkeys(sources, 0)

    def fold_into(name: str) -> Callable[[Any], None]:
        def fold(gradient: Any) -> None:
            received[name] += 1
            accumulators[name].add(gradient)

        return fold

    weights = [source.weight for source in sources.values() if source.weight is not None]
    count = 0
    with _only_differentiable(model, weights), torch.enable_grad():
        handles = [source.attach(fold_into(name)) for name, source in sources.items()]
        try:
            device = _input_device(model)
            for batch in tqdm(batches, desc=description, disable=not progress, leave=False):
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
            for handle in handles:
                handle.remove()
    counts = sum_over_processes(torch.tensor([count, *received.values()], device=device)).tolist()
    if counts[0] == 0:
        raise ValueError(
            "`batches` is empty: expected at least one batch. If it is a generator or an iterator, it may have been "
            "used up by an earlier pass; pass a DataLoader or a list."
        )
    missing = [name for name, parts in zip(sources, counts[1:], strict=True) if parts == 0]
    if missing:
        raise ValueError(
            f"The loss has no gradient for the target layers {missing[:3]} ({len(missing)} in all): the forward pass "
            "does not use them. Put them into `exclude_modules`, or use an objective that reaches them."
        )
    for name, accumulator in accumulators.items():
        for tensor in accumulator.tensors():
            tensor.copy_(sum_over_processes(tensor))
        if not accumulator.is_finite():
            raise ValueError(
                f"The gradient of layer {name!r} is not finite. Check the forget data for extreme values, or compute "
                "in float32 or bfloat16 instead of float16."
            )
    return int(counts[0])


def accumulate_gradients(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Any],
    objective: Objective,
    *,
    progress: bool = True,
) -> tuple[dict[str, Tensor], int]:
    """Sum the gradient of the objective at each weight over one pass of the batches, the model in eval mode.

    Args:
        model: The model, called by `objective`.
        weights: The weights to differentiate by, with the names to use in errors. One `Parameter` may stand under
            several names; each then gets the gradient of all its uses.
        batches: See [`stream_gradients`][semu_peft.gradients.gather.stream_gradients], as the rest.
        objective: `(model, batch) -> scalar loss`.
        progress: Show a progress bar.

    Returns:
        The gradients by name, float32 (float64 for float64 weights), and the number of batches.

    Raises:
        ValueError: As `stream_gradients`, or a weight's dtype cannot carry a gradient.
    """
    first: dict[int, str] = {}
    for name, weight in weights.items():
        if not carries_gradient(weight):
            raise ValueError(
                f"The weight {name!r} has dtype {weight.dtype} on {weight.device}, which cannot carry a gradient. Load "
                "the model unquantised and whole, or leave this weight out."
            )
        first.setdefault(id(weight), name)
    sources = {name: WeightSource(weights[name]) for name in first.values()}
    sums = {
        name: ExactSum(tuple(source.weight.shape), sum_dtype(source.weight.dtype), source.weight.device)
        for name, source in sources.items()
    }
    count = stream_gradients(model, sources, sums, batches, objective, progress=progress)
    return {name: sums[first[id(weight)]].total for name, weight in weights.items()}, count


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that gradients of weights of this dtype are summed in: float32 or better."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32


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


def _input_device(model: nn.Module) -> torch.device:
    # Offloaded weights lie on the meta device; whatever moves them in moves the inputs as well.
    devices = [parameter.device for parameter in model.parameters() if parameter.device.type != "meta"]
    return devices[0] if devices else torch.device("cpu")


@contextmanager
def _only_differentiable(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
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
