"""Samples with a seed for each image, so that before and after, and any batch size, start from equal noise."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from semu_peft.arguments import check_count
from semu_peft.model_state import device_of
from semu_peft.objectives.denoiser import Condition, denoiser_output


@torch.no_grad()
def sample_denoiser(
    model: nn.Module,
    scheduler: Any,
    condition: Condition,
    shape: Sequence[int],
    *,
    seeds: Sequence[int],
    num_inference_steps: int = 50,
    unconditional: Condition | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Sample from a bare denoiser, for models that have no pipeline, such as a class-conditional `UNet2DModel`.

    Args:
        model: The denoiser, in eval mode.
        scheduler: Any diffusers scheduler that samples; it is left as it is.
        condition: What to sample, tensors `(N, ...)`, on the model's device.
        shape: Shape of one sample, for example `(channels, height, width)`.
        seeds: One seed per sample, N of them.
        num_inference_steps: Steps of the sampler.
        unconditional: The condition to guide away from.
        guidance_scale: `s` in classifier-free guidance `u + s (c − u)`; above 1 it needs `unconditional`.

    Returns:
        Samples `(N, *shape)` in the denoiser's space, float32, on its device.

    Raises:
        ValueError: Guidance is asked for without `unconditional`.

    Examples:
        >>> from diffusers import DDIMScheduler, UNet2DModel
        >>> unet = UNet2DModel(
        ...     sample_size=4, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), num_class_embeds=3,
        ... ).eval()
        >>> digits = {"class_labels": torch.tensor([0, 2])}
        >>> sample_denoiser(unet, DDIMScheduler(), digits, (1, 4, 4), seeds=[5, 6], num_inference_steps=2).shape
        torch.Size([2, 1, 4, 4])
    """
    if guidance_scale != 1.0 and unconditional is None:
        raise ValueError(
            f"`guidance_scale` must be 1 without `unconditional`, got {guidance_scale}. Give that condition."
        )
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    device = device_of(model)
    generators = seeded(seeds)
    noisy = torch.stack([torch.randn(*shape, generator=generator) for generator in generators]).to(device)
    noisy = noisy * getattr(scheduler, "init_noise_sigma", 1.0)
    accepted = inspect.signature(scheduler.step).parameters
    draws = {"generator": generators} if "generator" in accepted else {}
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(noisy, timestep) if hasattr(scheduler, "scale_model_input") else noisy
        timesteps = timestep.to(device).expand(len(noisy))
        noise_pred = denoiser_output(model, scaled, timesteps, condition)
        if unconditional is not None and guidance_scale != 1.0:
            noise_pred_uncond = denoiser_output(model, scaled, timesteps, unconditional)
            noise_pred = noise_pred_uncond + guidance_scale * (noise_pred - noise_pred_uncond)
        noisy = scheduler.step(noise_pred, timestep, noisy, **draws).prev_sample
    return noisy


def sample_pipeline(
    pipe: Any, prompts: Sequence[str], *, seeds: Sequence[int], batch_size: int = 8, **settings: Any
) -> Tensor:
    """Sample images from a text-to-image pipeline, as the model draws them.

    Args:
        pipe: A diffusers pipeline, without a safety checker: its black pictures would pass for samples of a model that
            has forgotten.
        prompts: N prompts.
        seeds: One seed per prompt.
        batch_size: Images at a time.
        settings: What the pipeline takes beside: `num_inference_steps`, `guidance_scale`, `height`, `width` …

    Returns:
        Images `(N, 3, height, width)` in [0, 1], float32, on the CPU.

    Raises:
        TypeError: The prompts are no list, or there is none.
        ValueError: There are not as many seeds as prompts, the pipeline has a safety checker, or a sample is not
            finite.
    """
    if (checker := getattr(pipe, "safety_checker", None)) is not None:
        raise ValueError(
            "`pipe` must have no safety checker where its samples are looked at or counted, got "
            f"{type(checker).__name__}: the black pictures that it gives would pass for what the model draws. Set "
            "`pipe.safety_checker = None` for as long as you sample."
        )
    check_count("batch_size", batch_size)
    if isinstance(prompts, str) or not len(prompts):  # the letters of a string would be drawn
        raise TypeError(f"`prompts` must be a list of prompts, got {prompts!r}. Write `['a cat'] * 4` for four of one.")
    if len(prompts) != len(seeds):
        raise ValueError(f"`seeds` must be one per prompt, got {len(seeds)} for {len(prompts)} prompts.")
    parts = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        output = pipe(list(prompts[part]), generator=seeded(seeds[part]), output_type="pt", **settings)
        parts.append(output.images.float().cpu())
        if not parts[-1].isfinite().all():
            raise ValueError(
                f"`pipe` gave a sample that is not finite, for a prompt of {list(prompts[part])[:3]}. Its VAE may "
                "overflow in float16: load it in float32 or bfloat16 (`pipe.vae.to(torch.float32)`)."
            )
    return torch.cat(parts)


def seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per seed: samples are then the same on every device.

    Examples:
        >>> [generator.initial_seed() for generator in seeded([3, 4])]
        [3, 4]
    """
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]
