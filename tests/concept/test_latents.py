"""Latents in every autoencoder's convention and precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusion_models import quiet, sd_pipeline, vae
from models import Snapshot

from semu_peft.concept import ConceptExamples, concept_examples
from semu_peft.concept.latents import encoded, standardized

SIZE: dict[str, Any] = {"height": 16, "width": 16, "progress": False}


def overflowing(dtype: torch.dtype) -> Any:
    """A pipeline whose VAE leaves float16's range, as SDXL's does."""
    pipe = quiet(sd_pipeline())
    pipe.vae.encoder.conv_in.weight.data *= 3e5
    pipe.vae.register_to_config(force_upcast=True)
    return pipe.to(dtype)


def test_pictures_become_the_same_latents_in_float16(tmp_path: Path) -> None:
    pictures, cache = torch.rand(3, 3, 16, 16), tmp_path / "examples.safetensors"
    half = overflowing(torch.float16)
    before = Snapshot.of(half.vae)
    examples = concept_examples(half, "a cat", images=pictures, cache=cache, **SIZE)
    exact = concept_examples(overflowing(torch.float32), "a cat", images=pictures, **SIZE)
    torch.testing.assert_close(examples.latents, exact.latents, atol=0.05, rtol=0.05)
    before.assert_same(half.vae)
    again = concept_examples(overflowing(torch.float32), "a cat", images=pictures, cache=cache, **SIZE)
    assert torch.equal(again.latents, examples.latents)


def test_what_is_not_finite_is_no_example_and_is_not_kept(tmp_path: Path) -> None:
    cache = tmp_path / "examples.safetensors"
    pipe = quiet(sd_pipeline())
    for parameter in pipe.text_encoder.parameters():
        parameter.data.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"`encoder_hidden_states` must be finite.*text encoder.*bfloat16"):
        concept_examples(pipe, "a cat", images=torch.rand(1, 3, 16, 16), cache=cache, **SIZE)
    pipe = quiet(sd_pipeline())
    pipe.unet.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"`latents` must be finite.*float16"):
        concept_examples(pipe, "a cat", samples_per_prompt=1, num_inference_steps=1, cache=cache, **SIZE)
    assert not cache.exists()
    with pytest.raises(ValueError, match="`latents` must be finite"):
        ConceptExamples(torch.full((1, 4, 2, 2), torch.nan), [], {}, {})


def test_mean_and_deviation_are_undone_by_the_pipelines_own_decoding() -> None:
    """Playground's SDXL: `z = latents · std / scale + mean` in the pipeline."""
    mean, deviation = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([2.0, 0.5, 1.0, 3.0])
    config = {"latents_mean": mean.tolist(), "latents_std": deviation.tolist(), "scaling_factor": 0.5}
    latents = torch.randn(2, 4, 3, 3)
    back = standardized(latents, config) * deviation.view(1, 4, 1, 1) / 0.5 + mean.view(1, 4, 1, 1)
    torch.testing.assert_close(back, latents)
    video = torch.randn(2, 4, 5, 3, 3)  # Wan's: no scale, and a dimension of frames
    del config["scaling_factor"]
    torch.testing.assert_close(standardized(video, config)[:, :, 0], standardized(video[:, :, 0], config))


def test_autoencoders_of_every_kind() -> None:
    pixels, generator = torch.rand(2, 3, 16, 16) * 2 - 1, torch.Generator().manual_seed(0)
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()  # fmt: skip
    assert torch.equal(encoded(tiny, pixels, generator), tiny.encode(pixels).latents)
    exact = vae()
    distribution = exact.encode(pixels).latent_dist
    first = encoded(exact, pixels, torch.Generator().manual_seed(3))
    noise = torch.randn(distribution.mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(first, distribution.mean + distribution.std * noise)
    exact.enable_slicing()
    torch.testing.assert_close(encoded(exact, pixels, torch.Generator().manual_seed(3)), first)
