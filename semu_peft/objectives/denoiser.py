"""Call any denoiser of diffusers in one way: U-Nets, DiT, and the transformers of Stable Diffusion 3 and Flux."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from semu_peft.model_state import dtype_of
from semu_peft.tuner.adapted import base_model

Condition = Mapping[str, Any]
"""Keyword arguments of the denoiser, tensors `(N, ...)` or nested mappings of them: `class_labels` for
class-conditional models; `encoder_hidden_states` and what goes with it for text."""

DenoiserCall = Callable[..., Tensor]
"""`(model, noisy, timesteps, **condition) -> prediction`, shaped like `noisy`: how a kind of denoiser is called."""

SHARED = ("txt_ids", "img_ids")  # positions, the same for all examples: one copy is passed on


def denoiser_output(model: nn.Module, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
    """A denoiser's prediction, in float32.

    Args:
        model: A diffusers model whose first argument is the noisy sample, or one whose way of being called is
            [registered][semu_peft.objectives.denoiser.register_call]; bare, in a `PeftModel` or a distributed wrapper.
        noisy: `(N, ...)`; cast to the model's dtype.
        timestep: `(N,)`.
        condition: What it is conditioned on; floating tensors are cast to the model's dtype.

    Returns:
        Shaped like `noisy`. Where the model also predicts variances (DiT), those are left out.

    Raises:
        ValueError: The prediction has another shape than `noisy`, or the timesteps are on another scale than Flux's.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.denoiser import denoiser_output
        >>> class Denoiser(torch.nn.Linear):  # stands for a U-Net
        ...     def forward(self, noisy, timestep, class_labels, return_dict):
        ...         return (super().forward(noisy),)
        >>> noisy, timesteps = torch.randn(2, 3), torch.tensor([5, 900])
        >>> denoiser_output(Denoiser(3, 3).half(), noisy, timesteps, {"class_labels": torch.tensor([0, 1])}).dtype
        torch.float32
    """
    dtype = dtype_of(model)
    arguments = {name: _prepared(value, dtype, name in SHARED) for name, value in condition.items()}
    kinds = [cls.__name__ for cls in type(base_model(model)).__mro__]
    call = next((_CALLS[kind] for kind in kinds if kind in _CALLS), _call)
    output = call(model, noisy.to(dtype), timestep, **arguments).float()
    if output.dim() > 2 and output.shape[1] == 2 * noisy.shape[1]:
        output = output.chunk(2, dim=1)[0]
    if output.shape != noisy.shape:
        raise ValueError(
            f"Predictions must have the shape of the noisy samples {tuple(noisy.shape)}, got {tuple(output.shape)} "
            f"from {type(model).__name__}. Give the latents that this model works on, not the images they decode to."
        )
    return output


def register_call(denoiser: type[nn.Module] | str, call: DenoiserCall) -> None:
    """Say how denoisers of a class are called, where it is not `model(noisy, timestep=..., **condition)`.

    Args:
        denoiser: The class, or its name; subclasses are meant as well.
        call: `(model, noisy, timesteps, **condition) -> prediction`, with `noisy` and the condition in the model's
            dtype, and the timesteps as the schedule has them. The model must be called itself, in the form in which it
            is given.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.denoiser import denoiser_output, register_call
        >>> class Backwards(torch.nn.Linear):  # takes one minus the time, and predicts the negative
        ...     def forward(self, time, noisy):
        ...         return -super().forward(noisy) * time
        >>> register_call(Backwards, lambda model, noisy, timesteps: -model(1 - timesteps / 1000, noisy))
        >>> denoiser_output(Backwards(3, 3), torch.randn(1, 3), torch.tensor([250]), {}).shape
        torch.Size([1, 3])
    """
    _CALLS[denoiser if isinstance(denoiser, str) else denoiser.__name__] = call


def _call(model: nn.Module, noisy: Tensor, timesteps: Tensor, **condition: Any) -> Tensor:
    return model(noisy, timestep=timesteps, return_dict=False, **condition)[0]


def _call_z_image(model: nn.Module, noisy: Tensor, timesteps: Tensor, **condition: Any) -> Tensor:
    """Z-Image takes lists of pictures and of texts without their padding, runs from 0 to 1, and predicts `x₀ − ε`."""
    texts = [text[mask.bool()] for text, mask in zip(condition["cap_feats"], condition["cap_mask"], strict=True)]
    pictures = list(noisy.unsqueeze(2).unbind())  # one frame
    output = model(pictures, (1000 - timesteps) / 1000, texts)[0]
    return -torch.stack(list(output)).squeeze(2)


def _call_flux(model: nn.Module, noisy: Tensor, timesteps: Tensor, **condition: Any) -> Tensor:
    """Flux runs from 0 to 1, where its scheduler counts a thousand: it would draw on with any number."""
    if timesteps.max() > 1:
        raise ValueError(
            f"`scheduler`: the timesteps of {type(base_model(model)).__name__} run from 0 to 1, got "
            f"{float(timesteps.max()):g}. Give the objective `NoiseSchedule.from_scheduler(scheduler, 1e-3)`."
        )
    return _call(model, noisy, timesteps, **condition)


_CALLS: dict[str, DenoiserCall] = {
    "FluxTransformer2DModel": _call_flux,
    "ZImageTransformer2DModel": _call_z_image,
}


def repeated(condition: Condition, count: int) -> dict[str, Any]:
    """Give the condition of one example, tensors `(1, ...)`, to `count` examples.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.denoiser import repeated
        >>> repeated({"class_labels": torch.tensor([3])}, 2)
        {'class_labels': tensor([3, 3])}
    """
    return {
        name: repeated(value, count) if isinstance(value, Mapping) else value.expand(count, *value.shape[1:])
        for name, value in condition.items()
    }


def _prepared(value: Any, dtype: torch.dtype, shared: bool) -> Any:
    if isinstance(value, Mapping):
        return {name: _prepared(item, dtype, False) for name, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    value = value[0] if shared and value.dim() == 3 else value
    return value.to(dtype) if value.is_floating_point() else value
