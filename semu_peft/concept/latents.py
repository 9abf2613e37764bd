"""Images and videos as latents, in the conventions of diffusers' autoencoders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from semu_peft.model_state import device_of, dtype_of


@torch.no_grad()
def encoded(vae: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Encode `(N, 3, ...)` in [−1, 1], in float32 where the autoencoder is in float16, in which many overflow.

    Args:
        vae: An autoencoder: one that gives a distribution, which is drawn from, or the latents themselves.
        pixels: Images `(N, 3, height, width)` or videos `(N, 3, frames, height, width)`.
        generator: Where the draws come from, on the CPU.

    Examples:
        >>> from semu_peft.concept.latents import encoded
        >>> encoded(pipe.vae, torch.zeros(2, 3, 16, 16), torch.Generator()).shape
        torch.Size([2, 4, 8, 8])
    """
    with _not_in_float16(vae):
        output = vae.encode(pixels.to(device_of(vae), dtype_of(vae)))
    distribution = getattr(output, "latent_dist", None)
    if distribution is None:  # `AutoencoderTiny` and `VQModel`; `AutoencoderDC`
        return output.latents if hasattr(output, "latents") else output.latent
    noise = torch.randn(distribution.mean.shape, generator=generator).to(distribution.mean)
    return distribution.mean + distribution.std * noise


def standardized(latents: Tensor, config: Any) -> Tensor:
    """Latents as the denoiser takes them: shifted and scaled as the autoencoder's configuration says.

    `(z − shift) · scale`, or `(z − mean) · scale / std` where it has a mean and a deviation for each channel.

    Examples:
        >>> from types import SimpleNamespace
        >>> from semu_peft.concept.latents import standardized
        >>> standardized(torch.ones(1, 2, 1, 1), {"scaling_factor": 0.5, "shift_factor": 0.2}).flatten().tolist()
        [0.4..., 0.4...]
        >>> by_channel = {"latents_mean": [0.0, 1.0], "latents_std": [2.0, 1.0]}
        >>> standardized(torch.ones(1, 2, 1, 1), by_channel).flatten().tolist()
        [0.5, 0.0]
    """
    scale = config.get("scaling_factor") or 1.0
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is None or deviation is None:
        return (latents - (config.get("shift_factor") or 0.0)) * scale
    shape = (1, -1, *(1 for _ in latents.shape[2:]))
    mean, deviation = (torch.tensor(values).to(latents).view(shape) for values in (mean, deviation))
    return (latents - mean) * scale / deviation


@contextmanager
def _not_in_float16(vae: nn.Module) -> Iterator[None]:
    half = [tensor for tensor in (*vae.parameters(), *vae.buffers()) if tensor.dtype == torch.float16]
    try:
        for tensor in half:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor in half:  # which float32 holds exactly
            tensor.data = tensor.data.half()
