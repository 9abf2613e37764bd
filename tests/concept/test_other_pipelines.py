"""Pipelines beside the plain text-to-image ones: they work, or are refused by name before anything is changed."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusion_models import (
    flux_pipeline,
    quiet,
    randomize,
    sd3_pipeline,
    sd_pipeline,
    sdxl_pipeline,
    text_unet,
)
from models import Snapshot
from torch import Tensor

from semu_peft.concept import Family, concept_examples, register_family, unlearn_concept
from semu_peft.concept.families import family_of
from semu_peft.objectives import NoiseSchedule
from semu_peft.objectives.denoiser import denoiser_output

QUICK: dict[str, Any] = {"height": 16, "width": 16, "progress": False}
DRAWN: dict[str, Any] = {"num_inference_steps": 2, "samples_per_prompt": 2, **QUICK}


def as_kind(pipe: Any, kind: str, **more: Any) -> Any:
    return quiet(getattr(diffusers, kind)(**{**pipe.components, **more}))


def controlnet() -> Any:
    return diffusers.ControlNetModel(
        in_channels=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2,
        conditioning_embedding_out_channels=(4, 8),
    )  # fmt: skip


WITHOUT_CHECKER: dict[str, Any] = {"requires_safety_checker": False}


@pytest.mark.parametrize(
    ("plain", "kind", "more"),
    [
        (sd_pipeline, "StableDiffusionImg2ImgPipeline", WITHOUT_CHECKER),
        (sd_pipeline, "StableDiffusionInpaintPipeline", WITHOUT_CHECKER),
        (sd_pipeline, "StableDiffusionControlNetPipeline", {**WITHOUT_CHECKER, "controlnet": controlnet}),
        (sdxl_pipeline, "StableDiffusionXLImg2ImgPipeline", {}),
        (sd3_pipeline, "StableDiffusion3Img2ImgPipeline", {}),
        (flux_pipeline, "FluxImg2ImgPipeline", {}),
    ],
)
def test_a_pipeline_that_takes_a_picture_too_is_erased_from_prompts(plain: Any, kind: str, more: Any) -> None:
    """Its latents are those of the text-to-image pipeline of the same parts."""
    more = {name: part() if callable(part) else part for name, part in more.items()}
    expected = concept_examples(quiet(plain()), "a cat", anchor="a dog", **DRAWN)
    pipe = as_kind(plain(), kind, **more)
    examples = concept_examples(pipe, "a cat", anchor="a dog", **DRAWN)
    torch.testing.assert_close(examples.latents, expected.latents, atol=1e-5, rtol=1e-5)
    assert unlearn_concept(pipe, examples, max_steps=1, progress=False).pipe is pipe


def without(pipe: Any, *names: str) -> Any:
    for name in names:
        setattr(pipe, name, None)
    return quiet(pipe)


def inpainting() -> Any:
    parts = {**sd_pipeline().components, "unet": text_unet(in_channels=9)}
    return quiet(diffusers.StableDiffusionInpaintPipeline(**parts, **WITHOUT_CHECKER))


def refiner() -> Any:
    parts = {**sdxl_pipeline().components, "text_encoder": None, "tokenizer": None}
    parts["unet"] = text_unet(
        cross_attention_dim=8, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 5 * 4,
    )  # fmt: skip
    del parts["image_encoder"], parts["feature_extractor"]
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, add_watermarker=False)
    return quiet(pipe)


def with_ip_adapter() -> Any:
    pipe = quiet(sd_pipeline())
    pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    return pipe


def with_second_expert() -> Any:
    pipe = quiet(sd_pipeline())
    pipe.transformer_2 = text_unet()
    return pipe


class Kandinsky(diffusers.DiffusionPipeline):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet)


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (inpainting, {"images": torch.rand(2, 3, 16, 16)}, ["9 channels", "4", "text-to-image"]),
        (lambda: without(sd_pipeline(), "text_encoder"), {}, ["`text_encoder`", "no text encoder"]),
        (lambda: without(flux_pipeline(), "text_encoder"), {}, ["`text_encoder`", "text_encoder_2"]),
        (lambda: without(sd3_pipeline(), "text_encoder_2"), {}, ["`text_encoder_2`"]),
        (lambda: without(sdxl_pipeline(), "text_encoder_2"), {}, ["`text_encoder_2`"]),
        (refiner, {}, ["refiner", "`images=`"]),
        (with_ip_adapter, {}, ["unload_ip_adapter"]),
        (with_second_expert, {}, ["transformer_2", "share_below"]),
        (lambda: Kandinsky(text_unet()), {}, ["Kandinsky", "register_family"]),
    ],
)
def test_refused_before_anything_is_changed(make: Any, options: dict[str, Any], words: list[str]) -> None:
    pipe = make()
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    before = {name: Snapshot.of(part) for name, part in parts.items()}
    with pytest.raises(ValueError, match="`pipe`|not among") as raised:
        unlearn_concept(pipe, "a cat", progress=False, **options)
    assert all(word in str(raised.value) for word in words), raised.value
    for name, snapshot in before.items():
        snapshot.assert_same(getattr(pipe, name))


def test_a_refiner_is_told_how_good_pictures_look() -> None:
    """With pictures it is erased; its sizes end in a score, the pipeline's own for prompts and without one."""
    pipe = refiner()
    examples = concept_examples(pipe, "a cat", anchor="a dog", images=torch.rand(2, 3, 16, 16), **QUICK)
    times = examples.encoded["added_cond_kwargs.time_ids"]
    assert times[examples.prompts.index("a cat")].tolist() == [16, 16, 0, 0, 6.0]
    assert times[examples.prompts.index("")].tolist() == [16, 16, 0, 0, 2.5]
    assert unlearn_concept(pipe, examples, max_steps=1, progress=False).training.steps == 1


def test_a_family_of_ones_own() -> None:
    class Shouting(Family):
        def encode(self, pipe: Any, prompts: Any, size: tuple[int, int]) -> dict[str, Tensor]:
            return super().encode(pipe, [f"{prompt} style" for prompt in prompts], size)

    class ShoutingPipeline(diffusers.StableDiffusionPipeline):
        pass

    register_family(ShoutingPipeline, Shouting)
    pipe = quiet(ShoutingPipeline(**sd_pipeline().components, requires_safety_checker=False))
    assert type(family_of(pipe)) is Shouting and type(family_of(sd_pipeline())) is Family
    ours, plain = (concept_examples(made, "a cat", **DRAWN) for made in (pipe, quiet(sd_pipeline())))
    loud = concept_examples(quiet(sd_pipeline()), "a cat style", **DRAWN)
    row = ours.prompts.index("a cat")
    assert torch.equal(ours.rows(row)["encoder_hidden_states"], loud.rows(row)["encoder_hidden_states"])
    assert not torch.equal(ours.latents, plain.latents)
    with pytest.raises(TypeError, match="`family` must be a subclass of `Family`"):
        register_family(ShoutingPipeline, Shouting())  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(diffusers, "ZImageTransformer2DModel"), reason="diffusers has no Z-Image yet")
def test_z_image_is_called_as_its_pipeline_calls_it() -> None:
    """Lists of pictures and texts, time running from 0 to 1, and the flow's sign turned."""
    torch.manual_seed(0)
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=[4, 6, 6], axes_lens=[64, 16, 16],
    )  # fmt: skip
    model = randomize(model.eval())
    noisy, timesteps, texts = torch.randn(2, 4, 8, 8), torch.tensor([100.0, 900.0]), torch.randn(2, 6, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    with torch.no_grad():
        got = denoiser_output(model, noisy, timesteps, {"cap_feats": texts, "cap_mask": mask})
        expected = model(list(noisy.unsqueeze(2).unbind()), torch.tensor([0.9, 0.1]), [texts[0, :3], texts[1]])[0]
    torch.testing.assert_close(got, -torch.stack(list(expected)).squeeze(2))


def test_experts_share_the_schedule_at_a_timestep() -> None:
    """Wan 2.2's second expert draws below `boundary_ratio`, which a shifted schedule reaches elsewhere."""
    schedule = NoiseSchedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0))
    share = schedule.share_below(875.0)
    assert 0 < share < 1 and (schedule.timesteps[: round(share * len(schedule))] < 875).all()
    low = schedule.draw(200, torch.Generator().manual_seed(0), span=(0.0, share))
    high = schedule.draw(200, torch.Generator().manual_seed(0), span=(share, 1.0))
    assert schedule.timesteps_at(low).max() < 875 <= schedule.timesteps_at(high).min()
