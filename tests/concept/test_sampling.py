"""Samples are those of the pipeline, and a matter of their own seed alone."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusion_models import class_unet, dit, quiet, randomize, sd_pipeline
from transformers import CLIPConfig

from semu_peft.concept.sampling import sample_denoiser, sample_pipeline
from semu_peft.report import SampleGrids


@pytest.mark.parametrize("scheduler", ["DDIM", "DDPM", "EulerDiscrete", "DPMSolverMultistep"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_bare_denoiser_samples_as_its_pipeline_does(scheduler: str, guidance: float) -> None:
    pipe = quiet(sd_pipeline())
    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(pipe.scheduler.config)
    text, _ = pipe.encode_prompt(["a photo of a cat"], "cpu", 1, False)
    nothing, _ = pipe.encode_prompt([""], "cpu", 1, False)
    wanted = pipe(
        "a photo of a cat", num_inference_steps=3, guidance_scale=guidance, height=16, width=16,
        output_type="latent", generator=torch.Generator().manual_seed(4),
    ).images  # fmt: skip
    got = sample_denoiser(
        pipe.unet, pipe.scheduler, {"encoder_hidden_states": text}, (4, 8, 8), seeds=[4], num_inference_steps=3,
        unconditional={"encoder_hidden_states": nothing}, guidance_scale=guidance,
    )  # fmt: skip
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["class_unet", "dit"])
def test_a_sample_depends_on_its_own_seed_alone(kind: str) -> None:
    model, shape = (class_unet(), (3, 8, 8)) if kind == "class_unet" else (randomize(dit()), (4, 8, 8))
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(7)
    settings: dict[str, Any] = {"num_inference_steps": 3}
    labels = torch.tensor([0, 1, 2])
    together = sample_denoiser(model, scheduler, {"class_labels": labels}, shape, seeds=[5, 6, 7], **settings)
    alone = sample_denoiser(model, scheduler, {"class_labels": labels[1:2]}, shape, seeds=[6], **settings)
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)
    assert len(scheduler.timesteps) == 7
    with pytest.raises(ValueError, match="unconditional"):
        sample_denoiser(model, scheduler, {"class_labels": labels}, shape, seeds=[5, 6, 7], guidance_scale=2.0)


def test_a_pipeline_samples_in_batches_of_any_size() -> None:
    pipe = quiet(sd_pipeline())
    settings: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16}
    prompts = ["a cat", "a dog", "a car"]
    one = sample_pipeline(pipe, prompts, seeds=[1, 2, 3], batch_size=1, **settings)
    other = sample_pipeline(pipe, prompts, seeds=[1, 2, 3], batch_size=2, **settings)
    assert one.shape == (3, 3, 16, 16) and one.min() >= 0 and one.max() <= 1
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="`seeds` must be one per prompt, got 1"):
        sample_pipeline(pipe, prompts, seeds=[1], **settings)
    with pytest.raises(TypeError, match="`prompts` must be a list of prompts, got 'a cat'"):
        sample_pipeline(pipe, "a cat", seeds=range(5), **settings)  # as many as it has letters
    with pytest.raises(ValueError, match="`batch_size`"):
        sample_pipeline(pipe, prompts, seeds=[1, 2, 3], batch_size=0, **settings)


def test_what_no_model_drew_is_no_sample() -> None:
    """Neither a safety checker's black pictures nor those of a VAE that overflows."""
    pipe = quiet(sd_pipeline())
    settings: dict[str, Any] = {"num_inference_steps": 1, "height": 16, "width": 16}
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**small, "image_size": 8, "patch_size": 4}, text_config=small, projection_dim=8)
    pipe.safety_checker = StableDiffusionSafetyChecker(config)
    with pytest.raises(ValueError, match=r"`pipe`.*StableDiffusionSafetyChecker.*safety_checker = None"):
        sample_pipeline(pipe, ["a cat"], seeds=[1], **settings)
    with pytest.raises(ValueError, match="safety checker"):
        SampleGrids("unused", forget=["a cat"], samples=1, settings=settings)(pipe, 0)
    pipe.safety_checker = None
    pipe.vae.decoder.conv_in.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"`pipe` gave a sample that is not finite.*'a cat'.*float32"):
        sample_pipeline(pipe, ["a cat"], seeds=[1], **settings)
