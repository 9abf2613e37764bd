"""Examples for every family of pipelines are what the pipeline itself gives its denoiser, and one call erases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusion_models import PIPELINES, quiet, sd_pipeline
from models import Snapshot
from peft import LoraConfig
from PIL import Image
from torch import Tensor

from semu_peft import SemuConfig, objectives
from semu_peft.concept import ConceptExamples, Preview, denoiser_targets, unlearn_concept
from semu_peft.concept.dataset import concept_examples, nested
from semu_peft.concept.families import denoiser_of, family_of
from semu_peft.concept.sampling import sample_pipeline
from semu_peft.objectives.denoiser import SHARED
from semu_peft.training.natural import NaturalGradient
from semu_peft.tuner.adapted import semu_layers

SIZE: dict[str, Any] = {"height": 16, "width": 16}
QUICK: dict[str, Any] = {**SIZE, "num_inference_steps": 2, "progress": False}
every_family = pytest.mark.parametrize("kind", PIPELINES)


def images(pipe: Any, prompt: str = "a photo of a cat", count: int = 3) -> Tensor:
    settings = {**SIZE, "num_inference_steps": 3, "guidance_scale": 3.0}
    return sample_pipeline(quiet(pipe), [prompt] * count, seeds=range(count), **settings)


def made(pipe: Any, forget: Any, **options: Any) -> ConceptExamples:
    """Examples made quickly."""
    return concept_examples(pipe, forget, **{**QUICK, "samples_per_prompt": 1, **options})


def flat(arguments: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    result = {}
    for name, value in arguments.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            result[f"{prefix}{name}"] = value
    return result


@every_family
def test_conditions_are_what_the_pipeline_gives_its_denoiser(kind: str) -> None:
    pipe = quiet(PIPELINES[kind]())
    given: list[dict[str, Any]] = []
    denoiser = denoiser_of(pipe)
    hook = denoiser.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
    pipe("a photo of a cat", num_inference_steps=1, guidance_scale=1.0, output_type="latent", **SIZE)
    hook.remove()
    examples = concept_examples(pipe, "a photo of a cat", samples_per_prompt=1, **QUICK)
    ours = examples.rows(examples.prompts.index("a photo of a cat"))
    theirs = {name: value for name, value in flat(given[0]).items() if name not in ("hidden_states", "timestep")}
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        expected = value if name in SHARED else value[0]
        torch.testing.assert_close(ours[name].float(), expected.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])  # Flux has its guidance built in
def test_the_unconditional_is_the_pipelines_own_negative(kind: str) -> None:
    pipe = quiet(PIPELINES[kind]())
    given: list[dict[str, Any]] = []
    hook = denoiser_of(pipe).register_forward_pre_hook(lambda _, a, kwargs: given.append(kwargs), with_kwargs=True)
    pipe("a photo of a cat", num_inference_steps=1, guidance_scale=3.0, output_type="latent", **SIZE)
    hook.remove()
    examples = concept_examples(pipe, "a photo of a cat", samples_per_prompt=1, **QUICK)
    ours = examples.rows(examples.prompts.index(""))
    for name, value in flat(given[0]).items():
        if name not in ("hidden_states", "timestep"):
            torch.testing.assert_close(ours[name].float(), value[0].float(), atol=1e-5, rtol=1e-4)


@every_family
def test_sampled_latents_are_the_pipelines_samples(kind: str) -> None:
    pipe = quiet(PIPELINES[kind]())
    examples = concept_examples(pipe, "a dog", samples_per_prompt=3, guidance_scale=2.0, batch_size=2, seed=5, **QUICK)
    expected = [
        pipe("a dog", num_inference_steps=2, guidance_scale=2.0, output_type="latent", **SIZE,
             generator=torch.Generator().manual_seed(seed)).images[0]
        for seed in (5, 6, 7)
    ]  # fmt: skip
    torch.testing.assert_close(examples.latents, torch.stack(expected), atol=1e-4, rtol=1e-4)


@every_family
def test_images_become_latents_that_decode_to_them(kind: str) -> None:
    pipe = quiet(PIPELINES[kind]())
    pictures = torch.rand(2, 3, 16, 16)
    examples = concept_examples(pipe, "a dog", images=pictures, **QUICK)
    config = pipe.vae.config
    mean = pipe.vae.encode(2 * pictures - 1).latent_dist.mean
    expected = (mean - (config.get("shift_factor") or 0)) * config.scaling_factor
    latents = examples.latents
    if kind == "flux":
        latents = pipe._unpack_latents(latents, 16, 16, pipe.vae_scale_factor)
    spread = pipe.vae.encode(2 * pictures - 1).latent_dist.std * config.scaling_factor
    assert ((latents - expected).abs() < 5 * spread).all()
    as_pil = [Image.fromarray((255 * picture.permute(1, 2, 0)).byte().numpy()) for picture in pictures]
    torch.testing.assert_close(
        concept_examples(pipe, "a dog", images=as_pil, **QUICK).latents, examples.latents, atol=0.1, rtol=0
    )


def test_pictures_of_every_form_are_the_same_examples() -> None:
    """Colours with a fourth channel, in a palette or as floats of any width; grey is grey."""
    pipe = quiet(sd_pipeline())
    values = torch.randint(0, 2, (1, 3, 16, 16)).float()
    plain = Image.fromarray((255 * values[0]).byte().permute(1, 2, 0).numpy())
    expected = made(pipe, "cat", images=values).latents
    palette = plain.quantize(8)
    for same in ([plain.convert("RGBA")], (plain,), values.bfloat16(), [palette], values.permute(0, 2, 3, 1).numpy()):
        torch.testing.assert_close(made(pipe, "cat", images=same).latents, expected, atol=1e-5, rtol=0)
    assert made(pipe, "cat", images=[plain.convert("L")]).latents.shape == expected.shape
    for name in ("samples_per_prompt", "num_inference_steps"):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1, got 0"):
            made(pipe, "cat", **{name: 0})


def test_roles_pair_or_draw_prompts() -> None:
    pipe = quiet(sd_pipeline())
    paired = concept_examples(pipe, ["cat", "dog"], anchor=["car", "monet"], samples_per_prompt=3, **QUICK)
    pairs = {
        (paired.prompts[int(a)], paired.prompts[int(b)])
        for a, b in zip(paired.roles["condition"], paired.roles["anchor"], strict=True)
    }
    assert pairs == {("cat", "car"), ("dog", "monet")} and len(paired) == 6
    given = {"anchor": ["car", "monet", "gogh"], "images": torch.rand(3, 3, 16, 16)}
    twice = made(pipe, ["cat", "cat", "dog"], **given)  # a prompt may have several pictures, each with its anchor
    assert [twice.prompts[int(index)] for index in twice.roles["anchor"]] == given["anchor"]
    drawn = concept_examples(pipe, "cat", anchor=["car", "monet"], retain=["dog"], samples_per_prompt=16, **QUICK)
    assert {drawn.prompts[int(index)] for index in drawn.roles["anchor"]} == {"car", "monet"}
    held = [drawn.prompts[int(index)] for index in drawn.roles["retain"]]
    assert sorted(map(held.count, ("dog", "car", "monet"))) == [5, 5, 6]  # anchors too, and evenly
    example = drawn[0]
    assert set(example) == {"latents", "condition", "anchor", "unconditional", "retain"}
    assert nested({"a.b": 1, "c": 2}) == {"a": {"b": 1}, "c": 2}


def test_examples_come_back_from_their_file(tmp_path: Path) -> None:
    pipe = quiet(PIPELINES["sdxl"]())
    examples = concept_examples(pipe, "cat", anchor="dog", samples_per_prompt=2, **QUICK)
    loaded = ConceptExamples.load(examples.save(tmp_path / "examples.safetensors"))
    assert loaded.prompts == examples.prompts and len(loaded) == 2
    one, other = flat(examples[1]), flat(loaded[1])
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert loaded[0]["condition"]["added_cond_kwargs"]["time_ids"].tolist() == [16, 16, 0, 0, 16, 16]


def test_a_configuration_without_layers_takes_those_of_the_default() -> None:
    pipe, config = sd_pipeline(), SemuConfig(explained_variance=1.0)
    unlearn_concept(pipe, made(pipe, "a cat"), config=config, max_steps=1, progress=False)
    assert set(semu_layers(pipe.unet)) == set(denoiser_targets(pipe.unet)) and config.target_modules is None
    assert all(layer.r["default"] > 1 for layer in semu_layers(pipe.unet).values())


@every_family
def test_one_call_erases_and_the_rest_of_the_pipeline_stays(kind: str) -> None:
    pipe = PIPELINES[kind]()
    denoiser = denoiser_of(pipe)
    others = {name: Snapshot.of(part) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    before = images(pipe)
    config = SemuConfig(target_modules=denoiser_targets(denoiser, "attention"))
    result = unlearn_concept(
        pipe, made(pipe, "a photo of a cat", anchor="a photo of a dog", images=torch.rand(4, 3, 16, 16)), config=config,
        max_steps=40, learning_rate=0.01, progress=False,
    )  # fmt: skip
    assert result.pipe is pipe and result.training.steps == 40
    check = objectives.ConditionMatching(
        objectives.NoiseSchedule.from_scheduler(pipe.scheduler, family_of(pipe).timestep_scale), seed=9
    )
    batch = next(iter(result.examples.loader(4, shuffle=False)))
    with torch.no_grad():
        after = float(check(denoiser, batch))
        for layer in semu_layers(denoiser).values():
            layer.set_scale("default", 0.0)
        check.load_state_dict({"generator": torch.Generator().manual_seed(9).get_state()})
        assert after < 0.7 * float(check(denoiser, batch))
        torch.testing.assert_close(images(pipe), before, atol=1e-5, rtol=0)  # at scale 0 the original again
    for name, snapshot in others.items():
        if name not in ("unet", "transformer"):
            snapshot.assert_same(getattr(pipe, name))


def test_runs_are_a_matter_of_the_seed() -> None:
    cores = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(cores))
        pipe = quiet(sd_pipeline())
        examples = made(pipe, "cat", anchor="dog", samples_per_prompt=4, seed=seed)
        unlearn_concept(pipe, examples, max_steps=5, seed=seed, progress=False)
        cores.append([layer.semu_core["default"].detach() for layer in semu_layers(pipe.unet).values()])
    assert all(torch.equal(a, b) for a, b in zip(cores[0], cores[1], strict=True))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(cores[0], cores[2], strict=True))


def test_steps_are_those_of_the_optimiser() -> None:
    """Not batches: several of them may make a step."""
    pipe = quiet(sd_pipeline())
    examples = made(pipe, "cat", anchor="dog", samples_per_prompt=4)
    settings: dict[str, Any] = {"batch_size": 2, "gradient_accumulation_steps": 2}
    assert unlearn_concept(pipe, examples, max_steps=5, progress=False, **settings).training.steps == 5


@pytest.mark.parametrize("objective", ["negative-guidance", "gradient-ascent"])
def test_other_objectives(objective: str) -> None:
    pipe = quiet(sd_pipeline("v_prediction"))
    before = images(pipe)
    examples = made(pipe, "a photo of a cat", samples_per_prompt=4)
    result = unlearn_concept(pipe, examples, objective=objective, max_steps=20, progress=False)
    assert (images(pipe) - before).abs().max() > 1e-3
    assert result.training.history[-1]["loss"] < result.training.history[0]["loss"]


def test_natural_gradients_where_they_are_asked_for() -> None:
    pipe = quiet(sd_pipeline())
    examples = made(pipe, "cat", anchor="dog", samples_per_prompt=4)
    result = unlearn_concept(pipe, examples, optimizer=NaturalGradient(), max_steps=3, progress=False)
    assert result.training.steps <= 3 and "damping" in result.training.history[0]
    assert result.training.history[-1]["loss"] <= result.training.history[0]["loss"]


def test_a_second_stage_needs_neither_text_encoder_nor_vae(tmp_path: Path) -> None:
    options: dict[str, Any] = {"anchor": "dog", "samples_per_prompt": 4, "cache": tmp_path / "examples.safetensors"}
    whole = quiet(sd_pipeline())
    unlearn_concept(whole, made(whole, "cat", **options), max_steps=6, progress=False)
    bare = quiet(sd_pipeline())
    bare.text_encoder = bare.tokenizer = bare.vae = None
    examples = made(bare, "cat", **options)
    unlearn_concept(bare, examples, max_steps=6, gradient_checkpointing=True, progress=False)
    for one, other in zip(semu_layers(whole.unet).values(), semu_layers(bare.unet).values(), strict=True):
        torch.testing.assert_close(one.semu_core["default"], other.semu_core["default"], atol=1e-5, rtol=1e-4)
    assert not bare.unet.is_gradient_checkpointing
    with pytest.raises(ValueError, match="text encoder"):
        unlearn_concept(bare, "cat", adapter_name="second", progress=False)


def test_a_cache_is_of_one_request(tmp_path: Path) -> None:
    """Examples made of anything else than what is asked for now are refused, by name."""
    pipe, cache = quiet(sd_pipeline()), tmp_path / "examples.safetensors"
    first = made(pipe, "cat", anchor="dog", cache=cache)
    again = made(pipe, "cat", anchor="dog", cache=cache)
    assert torch.equal(again.latents, first.latents) and again.request == first.request
    pictures = torch.rand(1, 3, 16, 16)
    others: dict[str, dict[str, Any]] = {
        "forget": {"forget": "dog"}, "anchor": {"anchor": "car"}, "retain": {"retain": ["monet"]},
        "samples_per_prompt": {"samples_per_prompt": 2}, "images": {"images": pictures}, "seed": {"seed": 1},
        "num_inference_steps": {"num_inference_steps": 3}, "height": {"height": 32},
    }  # fmt: skip
    for name, other in others.items():
        with pytest.raises(ValueError, match=f"`cache`.*{'' if name == 'images' else f'{name}='}"):
            made(pipe, **{"forget": "cat", "anchor": "dog", "cache": cache, **other})
    made(pipe, "cat", images=pictures, cache=tmp_path / "pictures.safetensors")
    with pytest.raises(ValueError, match="images="):
        made(pipe, "cat", images=1 - pictures, cache=tmp_path / "pictures.safetensors")


def test_a_bfloat16_pipeline() -> None:
    pipe = quiet(sd_pipeline().to(torch.bfloat16))
    examples = made(pipe, "cat", anchor="dog", samples_per_prompt=2)
    result = unlearn_concept(pipe, examples, max_steps=3, progress=False)
    layer = next(iter(semu_layers(pipe.unet).values()))
    assert layer.semu_core["default"].dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    assert result.examples.latents.isfinite().all() and layer.semu_core["default"].any()


@every_family
def test_an_offloaded_pipeline(kind: str) -> None:
    """As `enable_sequential_cpu_offload` leaves it: the weights lie on the meta device, and hooks bring them in."""
    losses = []
    for is_offloaded in (False, True):
        pipe = quiet(PIPELINES[kind]())
        parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)] if is_offloaded else []
        for part in parts:
            cpu_offload(part, torch.device("cpu"), offload_buffers=bool(part._parameters))
        result = unlearn_concept(pipe, made(pipe, "a cat", anchor="a dog"), max_steps=2, progress=False)
        losses.append([step["loss"] for step in result.training.history])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_previews_before_during_and_after() -> None:
    pipe = quiet(sd_pipeline())
    seen: list[tuple[int, Tensor]] = []
    preview = Preview(pipe, lambda pipe, step: seen.append((step, images(pipe, "cat", 1))), times=2)
    examples = made(pipe, "cat", anchor="dog", samples_per_prompt=4)
    result = unlearn_concept(pipe, examples, max_steps=10, learning_rate=0.05, callbacks=preview, progress=False)
    assert [step for step, _ in seen] == [0, 3, 7, 10]
    assert len({float(image.sum()) for _, image in seen}) == 4
    assert all("metric" not in entry for entry in result.training.history)
    with pytest.raises(TypeError, match="`show`"):
        Preview(pipe, "grids")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`times`"):
        Preview(pipe, print, -1)


def test_what_fails_leaves_the_pipeline_as_it_was() -> None:
    pipe = quiet(sd_pipeline())
    before, examples = Snapshot.of(pipe.unet), made(pipe, "cat", anchor="dog")
    with pytest.raises(ValueError, match="`objective` must be one of"):
        unlearn_concept(pipe, examples, objective="other", progress=False)

    def broken(pipe: Any, step: int) -> None:
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        unlearn_concept(
            pipe, examples, callbacks=Preview(pipe, broken), gradient_checkpointing=True, max_steps=2, progress=False
        )
    before.assert_same(pipe.unet)
    assert not getattr(pipe.unet, "peft_config", {}) and not pipe.unet.is_gradient_checkpointing
    unlearn_concept(pipe, examples, max_steps=1, progress=False)
    with pytest.raises(ValueError, match="adapter_name"):
        unlearn_concept(pipe, examples, progress=False)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"forget": None}, TypeError, ["`forget`", "None"]),
        ({"forget": []}, ValueError, ["`forget`"]),
        ({"forget": ["dog", " "]}, ValueError, ["`forget` must be a prompt, got an empty one"]),
        ({"anchor": "cat"}, ValueError, ["`anchor` must be another prompt than those to forget, got 'cat'"]),
        ({"retain": ["dog", "cat"]}, ValueError, ["`retain` must be another prompt than those to forget, got 'cat'"]),
        ({"images": "nope/"}, TypeError, ["`images` must be a tensor", "got 'nope/'. Open"]),
        ({"images": ["a.png"]}, TypeError, ["`images` must be a tensor", "got a list with 'a.png' in it"]),
        ({"images": Image.new("RGB", (16, 16))}, TypeError, ["`images` must be a tensor", "got Image", "`[image]`"]),
        ({"images": torch.rand(3, 16, 16)}, TypeError, ["`images` must be a tensor", "of shape (3, 16, 16)"]),
        ({"images": []}, TypeError, ["`images` must be a tensor", "got none at all"]),
        ({"images": torch.rand(2, 16, 16, 3)}, TypeError, ["`images` must be a tensor", "of shape (2, 16, 16, 3)"]),
        ({"images": 255 * torch.ones(2, 3, 16, 16)}, ValueError, ["`images` must be in [0, 1]", "got 255", "Divide"]),
        ({"images": [np.full((16, 16, 3), 9, np.uint8)]}, ValueError, ["`images` must be in [0, 1]", "got 9"]),
        ({"objective": "esd"}, ValueError, ["`objective`", "'esd'"]),
        ({"config": LoraConfig()}, TypeError, ["`config` must be a `SemuConfig`, got LoraConfig"]),
        ({"config": SemuConfig(r=2, init_weights="weight")}, ValueError, ["`init_weights` at True", "'weight'"]),
        ({"preserve": -1}, ValueError, ["`preserve`", "-1"]),
        ({"learning_rate": "1e-2"}, TypeError, ["`learning_rate`", "'1e-2'"]),
        ({"batch_size": 0}, ValueError, ["`batch_size`", "0"]),
        ({"seed": -1}, ValueError, ["`seed`", "-1"]),
        ({"adapter_name": "a.b"}, ValueError, ["`adapter_name`", "'a.b'"]),
        ({"max_steps": 0}, ValueError, ["`max_steps`", "0"]),
        ({"epochs": 3}, ValueError, ["`epochs`", "`max_steps`"]),
        ({"samples_per_prompt": 3}, TypeError, ["`samples_per_prompt`", "concept_examples"]),
        ({"steps": 3}, TypeError, ["`steps`", "neither"]),
        ({"callbacks": print}, TypeError, ["`callbacks`"]),
    ],
)
def test_errors(
    options: dict[str, Any], error: type[Exception], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each names the argument, before anything is encoded or trained."""
    pipe = quiet(sd_pipeline())
    before = Snapshot.of(pipe.unet)
    monkeypatch.setattr(type(pipe), "encode_prompt", None)
    with pytest.raises(error) as raised:
        unlearn_concept(pipe, **{"forget": "cat", "progress": False, **options})
    assert all(word in str(raised.value) for word in words), raised.value
    before.assert_same(pipe.unet)


@pytest.mark.parametrize("name", ["anchor", "retain", "images"])
def test_ready_examples_have_their_own_prompts(name: str) -> None:
    pipe = quiet(sd_pipeline())
    with pytest.raises(ValueError, match=f"`{name}` cannot be given with ready examples"):
        unlearn_concept(pipe, made(pipe, "cat"), **{name: ["dog"]}, progress=False)
    with pytest.raises(ValueError, match="`retain` must be another prompt than those to forget, got 'cat'"):
        unlearn_concept(pipe, made(pipe, "cat", retain="cat"), progress=False)
    with pytest.raises(ValueError, match="one per image, got 3 prompts for 2 images"):
        made(pipe, ["a", "b", "c"], images=torch.rand(2, 3, 16, 16))


def test_prompts_are_made_into_examples_with_the_pipelines_own_settings() -> None:
    """Prompts with anchor, retain and images give what `concept_examples` gives."""
    pipe = quiet(sd_pipeline())
    given: dict[str, Any] = {"anchor": "dog", "retain": ["car", ""], "images": torch.rand(3, 3, 16, 16), "seed": 4}
    result = unlearn_concept(pipe, "cat", max_steps=2, progress=False, **given)
    expected = concept_examples(pipe, "cat", progress=False, **given)
    assert torch.equal(result.examples.latents, expected.latents) and result.examples.request == expected.request
    assert all(torch.equal(result.examples.roles[role], index) for role, index in expected.roles.items())
    assert repr(result).startswith("ConceptResult(adapter_name='default', training=UnlearnResult(steps=2")
    assert "\n" not in repr(result) and repr(result.examples) == "ConceptExamples(3 of ['cat'], latents (4, 8, 8))"
