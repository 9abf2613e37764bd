"""How each family of text-to-image pipelines turns prompts and images into what its denoiser takes.

Conditions are kept flat, `{"added_cond_kwargs.text_embeds": (P, ...)}`, one row a prompt, so that they can be saved as
they are; a dot stands for a nested mapping.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from semu_peft.tuner.adapted import base_model

from .latents import encoded, standardized


class Family:
    """Stable Diffusion 1 and 2: one text encoder, cross-attention in a U-Net."""

    denoiser = "unet"
    timestep_scale = 1.0

    def size(self, pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
        """Image height and width, the pipeline's own where none is given."""
        side = getattr(pipe, "default_sample_size", None) or getattr(pipe, self.denoiser).config.sample_size
        return height or side * pipe.vae_scale_factor, width or side * pipe.vae_scale_factor

    def encode(self, pipe: Any, prompts: Sequence[str], size: tuple[int, int]) -> dict[str, Tensor]:
        """The denoiser's keyword arguments for P prompts, `(P, ...)`; the empty prompt is the unconditional one."""
        embeds, _ = pipe.encode_prompt(list(prompts), pipe.device, 1, False)
        return {"encoder_hidden_states": embeds}

    def sampling_arguments(self, rows: dict[str, Tensor], unconditional: dict[str, Tensor]) -> dict[str, Tensor]:
        """The pipeline's keyword arguments to sample with, for rows of conditions `(N, ...)`."""
        return {
            "prompt_embeds": rows["encoder_hidden_states"],
            "negative_prompt_embeds": unconditional["encoder_hidden_states"],
        }

    def to_latents(self, pipe: Any, images: Tensor, generator: torch.Generator) -> Tensor:
        """Encode images `(N, 3, height, width)` in [−1, 1] as the latents that the denoiser works on."""
        return standardized(encoded(pipe.vae, images, generator), pipe.vae.config)


class StableDiffusionXL(Family):
    """SDXL: two text encoders; the pooled text and the image's sizes join the time embedding."""

    def encode(self, pipe: Any, prompts: Sequence[str], size: tuple[int, int]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = pipe.encode_prompt(
            list(prompts), device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if pipe.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([not prompt for prompt in prompts], device=embeds.device)
            embeds, pooled = embeds.masked_fill(empty.view(-1, 1, 1), 0), pooled.masked_fill(empty.view(-1, 1), 0)
        times = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).expand(len(prompts), 6)
        return {
            "encoder_hidden_states": embeds,
            "added_cond_kwargs.text_embeds": pooled,
            "added_cond_kwargs.time_ids": times.contiguous(),
        }

    def sampling_arguments(self, rows: dict[str, Tensor], unconditional: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            **super().sampling_arguments(rows, unconditional),
            "pooled_prompt_embeds": rows["added_cond_kwargs.text_embeds"],
            "negative_pooled_prompt_embeds": unconditional["added_cond_kwargs.text_embeds"],
        }


class StableDiffusion3(Family):
    """Stable Diffusion 3: an MMDiT, trained as a rectified flow."""

    denoiser = "transformer"

    def encode(self, pipe: Any, prompts: Sequence[str], size: tuple[int, int]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = pipe.encode_prompt(
            list(prompts), list(prompts), list(prompts), device=pipe.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def sampling_arguments(self, rows: dict[str, Tensor], unconditional: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            **super().sampling_arguments(rows, unconditional),
            "pooled_prompt_embeds": rows["pooled_projections"],
            "negative_pooled_prompt_embeds": unconditional["pooled_projections"],
        }


class Flux(Family):
    """Flux: a transformer over packed latents with its guidance scale as an input, trained as a rectified flow."""

    denoiser = "transformer"
    timestep_scale = 1e-3
    guidance = 1.0  # as diffusers' own training scripts tell guidance-distilled models

    def encode(self, pipe: Any, prompts: Sequence[str], size: tuple[int, int]) -> dict[str, Tensor]:
        embeds, pooled, text_ids = pipe.encode_prompt(list(prompts), list(prompts), device=pipe.device)
        rows, columns = (side // (2 * pipe.vae_scale_factor) for side in size)
        image_ids = pipe._prepare_latent_image_ids(1, rows, columns, pipe.device, torch.float32)
        arguments = {
            "encoder_hidden_states": embeds,
            "pooled_projections": pooled,
            "txt_ids": text_ids.float().expand(len(prompts), -1, -1).contiguous(),
            "img_ids": image_ids.expand(len(prompts), -1, -1).contiguous(),
        }
        if pipe.transformer.config.guidance_embeds:
            arguments["guidance"] = torch.full((len(prompts),), self.guidance)
        return arguments

    def sampling_arguments(self, rows: dict[str, Tensor], unconditional: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_embeds": rows["encoder_hidden_states"], "pooled_prompt_embeds": rows["pooled_projections"]}

    def to_latents(self, pipe: Any, images: Tensor, generator: torch.Generator) -> Tensor:
        return pipe._pack_latents((latents := super().to_latents(pipe, images, generator)), *latents.shape)


_BY_DENOISER: dict[str, type[Family]] = {
    "UNet2DConditionModel": Family,
    "SD3Transformer2DModel": StableDiffusion3,
    "FluxTransformer2DModel": Flux,
}


def family_of(pipe: Any) -> Family:
    """The family that a pipeline belongs to, by its denoiser.

    Raises:
        ValueError: It is none of those known here.
    """
    found = [getattr(pipe, name, None) for name in ("unet", "transformer")]
    model: Any = next((base_model(model) for model in found if model is not None), None)
    family = _BY_DENOISER.get(type(model).__name__)
    if family is None:
        raise ValueError(
            f"{type(pipe).__name__} with a {type(model).__name__} is not among the pipelines known here, whose "
            f"denoisers are {', '.join(_BY_DENOISER)}. For others, make batches yourself and use "
            "`initialize_semu_weights` and `unlearn` with an objective of `semu_peft.objectives`."
        )
    added: str | None = model.config.get("addition_embed_type")
    if family is Family and added == "text_time":
        family = StableDiffusionXL
    return family()


def denoiser_of(pipe: Any) -> nn.Module:
    """The pipeline's U-Net or transformer."""
    return base_model(getattr(pipe, family_of(pipe).denoiser))
