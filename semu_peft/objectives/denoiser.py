"""Call any denoiser of diffusers in one way: U-Nets, DiT, and the transformers of Stable Diffusion 3 and Flux."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from semu_peft.model_state import dtype_of

Condition = Mapping[str, Any]
"""Keyword arguments of the denoiser, tensors `(N, ...)` or nested mappings of them: `class_labels` for
class-conditional models; `encoder_hidden_states` and what goes with it for text."""

SHARED = ("txt_ids", "img_ids")  # positions, the same for all examples: one copy is passed on


def denoiser_output(model: nn.Module, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
    """A denoiser's prediction, in float32.

    Args:
        model: A diffusers model whose first argument is the noisy sample, bare, inside a `PeftModel` or a distributed
            wrapper.
        noisy: `(N, ...)`; cast to the model's dtype.
        timestep: `(N,)`.
        condition: What it is conditioned on; floating tensors are cast to the model's dtype.

    Returns:
        Shaped like `noisy`. Where the model also predicts variances (DiT), those are left out.

    Raises:
        ValueError: The prediction has another shape than `noisy`.

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
    output = model(noisy.to(dtype), timestep=timestep, return_dict=False, **arguments)[0].float()
    if output.dim() > 2 and output.shape[1] == 2 * noisy.shape[1]:
        output = output.chunk(2, dim=1)[0]
    if output.shape != noisy.shape:
        raise ValueError(
            f"Predictions must have the shape of the noisy samples {tuple(noisy.shape)}, got {tuple(output.shape)} "
            f"from {type(model).__name__}. Give the latents that this model works on, not the images they decode to."
        )
    return output


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
