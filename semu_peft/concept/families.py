"""How each family of text-to-image pipelines turns prompts and images into what its denoiser takes.

Conditions are kept flat, `{"added_cond_kwargs.text_embeds": (P, ...)}`, one row a prompt, so that they can be saved as
they are; a dot stands for a nested mapping.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from semu_peft.tuner.adapted import base_model

from .latents import encoded, standardized


class Family:
    """Stable Diffusion 1 and 2: one text encoder, cross-attention in a U-Net; and what other families change.

    Subclass it for pipelines of another kind, and [register][semu_peft.concept.families.register_family] that.

    Attributes:
        denoiser: The name of the pipeline's denoiser.
        text_to_image: The name of the pipeline that draws from a prompt alone with the same parts, for those that also
            take a picture; None where there is no such pipeline.
        text_encoders: The text encoders without which no prompt can be encoded.
        timestep_scale: Factor between the scheduler's timesteps and those that the denoiser is given.

    Examples:
        >>> from semu_peft.concept.families import family_of
        >>> family_of(pipe).size(pipe, None, None)
        (16, 16)
    """

    denoiser = "unet"
    text_to_image: str | None = "StableDiffusionPipeline"
    text_encoders: tuple[str, ...] = ("text_encoder",)
    timestep_scale = 1.0

    def size(self, pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
        """Image height and width, the pipeline's own where none is given."""
        side = getattr(pipe, "default_sample_size", None) or getattr(pipe, self.denoiser).config.sample_size
        return height or side * pipe.vae_scale_factor, width or side * pipe.vae_scale_factor

    def check(self, pipe: Any) -> None:
        """Refuse a pipeline whose denoiser takes more than noisy latents and a text.

        Raises:
            ValueError: It does.
        """
        denoiser: Any = denoiser_module(pipe, self.denoiser)
        takes, gives = (denoiser.config.get(name) for name in ("in_channels", "out_channels"))
        if takes and gives and takes not in (gives, gives // 2):
            raise ValueError(
                f"`pipe`: the {self.denoiser} of this {type(pipe).__name__} takes {takes} channels for the {gives} "
                "that it gives: the other channels that it takes are a picture's, as in inpainting, and no prompt says "
                "what is in them. Erase the concept in the text-to-image model it was made from, or make batches "
                "yourself (`initialize_semu_weights` and `unlearn`, see CONTRIBUTING.md on families)."
            )
        if denoiser.config.get("encoder_hid_dim_type") in ("ip_image_proj", "image_proj", "text_image_proj"):
            raise ValueError(
                f"`pipe`: the {self.denoiser} reads a picture beside the text, as an IP-Adapter lets it. Unload it for "
                "the erasure: `pipe.unload_ip_adapter()`."
            )
        if getattr(pipe, "transformer_2", None) is not None:
            raise ValueError(
                f"`pipe`: this {type(pipe).__name__} has a second expert, `transformer_2`, in which the concept would "
                "remain. Unlearn both by themselves, each in its part of the schedule: `timestep_span=(share, 1)` and "
                "`(0, share)` of the objectives, with `NoiseSchedule.share_below` (see docs/diffusion.md)."
            )

    def check_encoders(self, pipe: Any) -> None:
        """Refuse a pipeline that cannot encode a prompt.

        Raises:
            ValueError: A text encoder is missing.
        """
        missing = [name for name in self.text_encoders if getattr(pipe, name, None) is None]
        if missing:
            has = [name for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if getattr(pipe, name, None)]
            raise ValueError(
                f"`pipe` must have its text encoder `{missing[0]}` to encode prompts, got a {type(pipe).__name__} with "
                f"{has or 'no text encoder'}. Load it, or make examples elsewhere and save them."
            )

    def sampler(self, pipe: Any) -> Any:
        """The pipeline to sample latents with from prompts alone: itself, or one of the same parts.

        Raises:
            ValueError: There is none.
        """
        takes = inspect.signature(type(pipe).__call__).parameters
        if not {"image", "control_image", "mask_image"} & set(takes):
            return pipe
        if self.text_to_image is None:
            raise ValueError(
                f"`pipe`: a {type(pipe).__name__} draws from a picture, and there is none: give `images=`, pictures of "
                "the concept."
            )
        import diffusers

        plain: Any = getattr(diffusers, self.text_to_image)
        parts = {**pipe.components, **{name: pipe.config.get(name) for name in _SETTINGS if name in pipe.config}}
        given = inspect.signature(plain.__init__).parameters
        return plain(**{name: part for name, part in parts.items() if name in given})

    def encode(self, pipe: Any, prompts: Sequence[str], size: tuple[int, int]) -> dict[str, Tensor]:
        """The denoiser's keyword arguments for P prompts, `(P, ...)`; the empty prompt is the unconditional one."""
        embeds, _ = pipe.encode_prompt(list(prompts), pipe._execution_device, 1, False)
        return {"encoder_hidden_states": embeds}

    def last_words(self, pipe: Any, prompts: Sequence[str]) -> list[int]:
        """The position of each prompt's last word among the tokens that it is encoded to; of its end, without a word.

        A family that writes prompts in a way of its own says here where their last words come to stand.
        """
        tokenizer = pipe.tokenizer if getattr(pipe, "tokenizer", None) is not None else pipe.tokenizer_2
        positions = []
        for prompt in prompts:
            tokens = tokenizer(written(pipe, prompt, tokenizer), truncation=True, return_special_tokens_mask=True)
            words = [place for place, special in enumerate(tokens["special_tokens_mask"]) if not special]
            positions.append(words[-1] if words else max(0, len(tokens["input_ids"]) - 1))
        return positions

    def sampling_arguments(self, rows: dict[str, Tensor], unconditional: dict[str, Tensor]) -> dict[str, Any]:
        """The pipeline's keyword arguments to sample with, for rows of conditions `(N, ...)`."""
        return {
            "prompt_embeds": rows["encoder_hidden_states"],
            "negative_prompt_embeds": unconditional["encoder_hidden_states"],
        }

    def to_latents(self, pipe: Any, images: Tensor, generator: torch.Generator) -> Tensor:
        """Encode images `(N, 3, height, width)` in [−1, 1] as the latents that the denoiser works on."""
        return standardized(encoded(pipe.vae, images, generator), pipe.vae.config)


class StableDiffusionXL(Family):
    """SDXL and its refiner: the pooled text and the image's sizes join the time embedding."""

    text_to_image = "StableDiffusionXLPipeline"
    text_encoders = ("text_encoder_2",)

    def check_encoders(self, pipe: Any) -> None:
        if "text_encoder_2" in pipe.components:  # Kolors has one encoder alone
            super().check_encoders(pipe)

    def sampler(self, pipe: Any) -> Any:
        if pipe.config.get("requires_aesthetics_score"):
            raise ValueError(
                f"`pipe`: this {type(pipe).__name__} is a refiner, which draws from a picture: give `images=`, "
                "pictures of the concept."
            )
        return super().sampler(pipe)

    def encode(self, pipe: Any, prompts: Sequence[str], size: tuple[int, int]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = pipe.encode_prompt(
            list(prompts), device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if pipe.config.get("force_zeros_for_empty_prompt"):
            empty = torch.tensor([not prompt for prompt in prompts], device=embeds.device)
            embeds, pooled = embeds.masked_fill(empty.view(-1, 1, 1), 0), pooled.masked_fill(empty.view(-1, 1), 0)
        if pipe.config.get("requires_aesthetics_score"):  # as the pipeline does, for the prompt and without one
            times = torch.tensor([[*size, 0, 0, 6.0 if prompt else 2.5] for prompt in prompts])
        else:
            times = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).expand(len(prompts), 6)
        return {
            "encoder_hidden_states": embeds,
            "added_cond_kwargs.text_embeds": pooled,
            "added_cond_kwargs.time_ids": times.contiguous(),
        }

    def sampling_arguments(self, rows: dict[str, Tensor], unconditional: dict[str, Tensor]) -> dict[str, Any]:
        return {
            **super().sampling_arguments(rows, unconditional),
            "pooled_prompt_embeds": rows["added_cond_kwargs.text_embeds"],
            "negative_pooled_prompt_embeds": unconditional["added_cond_kwargs.text_embeds"],
        }


class StableDiffusion3(Family):
    """Stable Diffusion 3: an MMDiT, trained as a rectified flow."""

    denoiser = "transformer"
    text_to_image = "StableDiffusion3Pipeline"
    text_encoders = ("text_encoder", "text_encoder_2")

    def encode(self, pipe: Any, prompts: Sequence[str], size: tuple[int, int]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = pipe.encode_prompt(
            *[list(prompts)] * 3, device=pipe._execution_device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def sampling_arguments(self, rows: dict[str, Tensor], unconditional: dict[str, Tensor]) -> dict[str, Any]:
        return {
            **super().sampling_arguments(rows, unconditional),
            "pooled_prompt_embeds": rows["pooled_projections"],
            "negative_pooled_prompt_embeds": unconditional["pooled_projections"],
        }


class Flux(Family):
    """Flux: a transformer over packed latents with its guidance scale as an input, trained as a rectified flow."""

    denoiser = "transformer"
    text_to_image = "FluxPipeline"
    text_encoders = ("text_encoder", "text_encoder_2")
    timestep_scale = 1e-3
    guidance = 1.0  # as diffusers' own training scripts tell guidance-distilled models

    def encode(self, pipe: Any, prompts: Sequence[str], size: tuple[int, int]) -> dict[str, Tensor]:
        embeds, pooled, text_ids = pipe.encode_prompt(list(prompts), list(prompts), device=pipe._execution_device)
        rows, columns = (side // (2 * pipe.vae_scale_factor) for side in size)
        image_ids = pipe._prepare_latent_image_ids(1, rows, columns, pipe._execution_device, torch.float32)
        arguments = {
            "encoder_hidden_states": embeds,
            "pooled_projections": pooled,
            "txt_ids": text_ids.float().expand(len(prompts), -1, -1).contiguous(),
            "img_ids": image_ids.expand(len(prompts), -1, -1).contiguous(),
        }
        if pipe.transformer.config.guidance_embeds:
            arguments["guidance"] = torch.full((len(prompts),), self.guidance)
        return arguments

    def sampling_arguments(self, rows: dict[str, Tensor], unconditional: dict[str, Tensor]) -> dict[str, Any]:
        return {"prompt_embeds": rows["encoder_hidden_states"], "pooled_prompt_embeds": rows["pooled_projections"]}

    def to_latents(self, pipe: Any, images: Tensor, generator: torch.Generator) -> Tensor:
        return pipe._pack_latents((latents := super().to_latents(pipe, images, generator)), *latents.shape)


class ZImage(Family):
    """Z-Image: texts of any length, padded here, and pictures in one stream; trained as a rectified flow."""

    denoiser = "transformer"
    text_to_image = "ZImagePipeline"
    longest = 512  # tokens, as the pipeline encodes them

    def size(self, pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
        return height or 1024, width or 1024

    def encode(self, pipe: Any, prompts: Sequence[str], size: tuple[int, int]) -> dict[str, Tensor]:
        texts, _ = pipe.encode_prompt(list(prompts), device=pipe._execution_device, do_classifier_free_guidance=False)
        padded = torch.zeros(len(texts), self.longest, texts[0].shape[-1], device=texts[0].device, dtype=texts[0].dtype)
        mask = torch.zeros(len(texts), self.longest, dtype=torch.int64)
        for row, text in enumerate(texts):
            padded[row, : len(text)], mask[row, : len(text)] = text, 1
        return {"cap_feats": padded, "cap_mask": mask}

    def sampling_arguments(self, rows: dict[str, Tensor], unconditional: dict[str, Tensor]) -> dict[str, Any]:
        def texts(rows: dict[str, Tensor]) -> list[Tensor]:
            return [text[mask.bool()] for text, mask in zip(rows["cap_feats"], rows["cap_mask"], strict=True)]

        return {"prompt_embeds": texts(rows), "negative_prompt_embeds": texts(unconditional)}


_SETTINGS = ("requires_safety_checker", "force_zeros_for_empty_prompt", "is_distilled")

_FAMILIES: dict[str, type[Family]] = {
    "UNet2DConditionModel": Family,
    "SD3Transformer2DModel": StableDiffusion3,
    "FluxTransformer2DModel": Flux,
    "ZImageTransformer2DModel": ZImage,
}


def register_family(kind: type | str, family: type[Family]) -> None:
    """Let `concept_examples` and `unlearn_concept` work on another kind of pipelines.

    Args:
        kind: The class of the pipelines, or of their denoisers, or its name; subclasses are meant as well, and a
            pipeline's class goes before its denoiser's.
        family: How their prompts and pictures become what the denoiser takes: a subclass of
            [`Family`][semu_peft.concept.families.Family].

    Raises:
        TypeError: `family` is no such class.

    Examples:
        >>> from semu_peft.concept.families import Family, family_of, register_family
        >>> class LongPrompts(Family):
        ...     def encode(self, pipe, prompts, size):
        ...         return super().encode(pipe, [f"{prompt}, a photo" for prompt in prompts], size)
        >>> class LongPromptPipeline(type(pipe)): pass
        >>> register_family(LongPromptPipeline, LongPrompts)
        >>> type(family_of(LongPromptPipeline(**pipe.components, requires_safety_checker=False))).__name__
        'LongPrompts'
    """
    if not (isinstance(family, type) and issubclass(family, Family)):
        raise TypeError(f"`family` must be a subclass of `Family`, got {family!r}. Give the class, not an instance.")
    _FAMILIES[kind if isinstance(kind, str) else kind.__name__] = family


def family_of(pipe: Any) -> Family:
    """The family that a pipeline belongs to, by its class or its denoiser's.

    Raises:
        ValueError: It is none of those known here.
    """
    family = _registered(type(pipe))
    model = next((m for name in ("unet", "transformer") if (m := getattr(pipe, name, None)) is not None), None)
    denoiser: Any = None if model is None else base_model(model)
    family = family or _registered(type(denoiser))
    # Kandinsky, DeepFloyd IF and others have U-Nets of this class too.
    other = family is Family and not (hasattr(pipe, "encode_prompt") and hasattr(pipe, "vae"))
    if family is None or other:
        raise ValueError(
            f"{type(pipe).__name__} with a {type(denoiser).__name__} is not among the pipelines known here, whose "
            f"denoisers are {', '.join(_FAMILIES)}. Register a family of your own "
            "(`semu_peft.concept.register_family`, see CONTRIBUTING.md), or make batches yourself and use "
            "`initialize_semu_weights` and `unlearn` with an objective of `semu_peft.objectives`."
        )
    if family is Family and denoiser.config.get("addition_embed_type") == "text_time":
        family = StableDiffusionXL
    return family()


def written(pipe: Any, prompt: str, tokenizer: Any) -> str:
    """The prompt as the pipeline tokenizes it: a textual inversion of several vectors is as many words."""
    return pipe.maybe_convert_prompt(prompt, tokenizer) if hasattr(pipe, "maybe_convert_prompt") else prompt


def denoiser_of(pipe: Any) -> nn.Module:
    """The pipeline's U-Net or transformer."""
    return denoiser_module(pipe, family_of(pipe).denoiser)


def denoiser_module(pipe: Any, name: str) -> nn.Module:
    """The denoiser of that name, out of whatever wrapper it is in."""
    return base_model(getattr(pipe, name))


def _registered(kind: type) -> type[Family] | None:
    return next((_FAMILIES[cls.__name__] for cls in kind.__mro__ if cls.__name__ in _FAMILIES), None)
