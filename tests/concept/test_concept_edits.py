"""Concepts redirected in closed form: the published formula in every layer, exact as an adapter and as a LoRA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_models import PIPELINES, diffusion_batch, quiet, sd_pipeline
from torch import Tensor

from semu_peft import save_as_diffusers_lora
from semu_peft.concept import edit_concepts
from semu_peft.concept.families import family_of
from semu_peft.concept.targets import denoiser_targets
from semu_peft.edits import Edit

FORGET = {"a cat": "a dog", "the style of van gogh": "a painting", "photo of a monet": ""}
RETAIN = ["a car", "the van"]


def encodings(pipe: Any, prompts: Any, places: list[int]) -> Tensor:
    """The encodings at these places, `(n, P)`."""
    embeds = family_of(pipe).encode(pipe, list(prompts), (16, 16))["encoder_hidden_states"].double()
    return torch.stack([row[place] for row, place in zip(embeds, places, strict=True)]).detach().mT


def predicted(pipe: Any) -> Tensor:
    batch = diffusion_batch("text_unet")
    with torch.no_grad():
        texts = batch["condition"]["encoder_hidden_states"].contiguous()
        sample: Tensor = pipe.unet(batch["latents"], 10, texts).sample
        return sample


def test_each_projection_is_the_papers() -> None:
    pipe = sd_pipeline()
    c, a = encodings(pipe, FORGET, [1, 4, 3]), encodings(pipe, FORGET.values(), [1, 1, 0])
    p = encodings(pipe, RETAIN, [1, 1])
    edit = edit_concepts(pipe, FORGET, retain=RETAIN, preserve=0.7, ridge=0.5)
    assert list(edit.deltas) == denoiser_targets(pipe.unet)
    moments = c @ c.mT + 0.7 * p @ p.mT + 0.5 * torch.eye(8)
    for name in edit.deltas:
        w = pipe.unet.get_submodule(name).weight.detach().double()
        expected = (w @ a @ c.mT + 0.7 * w @ p @ p.mT + 0.5 * w) @ torch.linalg.inv(moments)
        assert torch.allclose(edit.deltas[name].change(w), expected - w, atol=1e-6)


def test_prompts_get_the_anchors_answers_and_retained_ones_keep_theirs() -> None:
    pipe = sd_pipeline()
    edit = edit_concepts(pipe, {"a cat": "a dog"}, retain=["a car"], ridge=1e-8)
    (cat, dog, car) = (encodings(pipe, [prompt], [1]).float() for prompt in ("a cat", "a dog", "a car"))
    layer = pipe.unet.get_submodule(next(iter(edit.deltas)))
    wanted, kept = layer(dog.mT), layer(car.mT)
    with edit.apply(pipe.unet):
        assert torch.allclose(layer(cat.mT), wanted, atol=1e-4)
        assert torch.allclose(layer(car.mT), kept, atol=1e-4)


def test_a_textual_inversion_is_redirected_at_its_last_vector() -> None:
    """The pipeline writes one of several vectors as as many words, of which the others would be left as they are."""
    pipe = sd_pipeline()
    pipe.load_textual_inversion({"<toy>": torch.eye(8)[:3]}, token="<toy>")
    edit = edit_concepts(pipe, {"a <toy>": "a dog"}, ridge=1e-8)
    toy, dog = encodings(pipe, ["a <toy>"], [3]).float(), encodings(pipe, ["a dog"], [1]).float()
    layer = pipe.unet.get_submodule(next(iter(edit.deltas)))
    wanted = layer(dog.mT)
    with edit.apply(pipe.unet):
        assert torch.allclose(layer(toy.mT), wanted, atol=1e-4)


def test_it_ships_exactly_as_an_adapter_and_as_a_lora_of_diffusers(tmp_path: Path) -> None:
    pipe = quiet(sd_pipeline())
    before = predicted(pipe)
    edit = Edit.load(edit_concepts(pipe, FORGET, retain=RETAIN).save(tmp_path / "edit.safetensors"))
    with edit.apply(pipe.unet):
        expected = predicted(pipe)
    assert not torch.allclose(expected, before, atol=1e-4)
    carried = edit.to_semu(pipe.unet, adapter_name="concepts")
    assert carried.model is pipe.unet and carried.error < 1e-5
    assert max(carried.ranks.values()) <= len(FORGET)
    assert torch.allclose(predicted(pipe), expected, atol=1e-5)
    save_as_diffusers_lora(pipe, tmp_path / "lora", adapter_name="concepts")
    other = quiet(sd_pipeline())
    other.load_lora_weights(str(tmp_path / "lora"))
    assert torch.allclose(predicted(other), expected, atol=1e-5)
    pipe.unet.disable_adapters()
    assert torch.equal(predicted(pipe), before)


def test_all_tokens_and_a_list_of_prompts() -> None:
    pipe = sd_pipeline()
    edit = edit_concepts(pipe, ["a cat", "a dog"], tokens="all")
    with edit.apply(pipe.unet):
        predicted(pipe)
    weight = pipe.unet.get_submodule(next(iter(edit.deltas))).weight.detach()
    few = edit_concepts(pipe, "a cat", anchor="a dog")
    assert torch.linalg.matrix_rank(few.deltas[next(iter(few.deltas))].change(weight)) == 1
    assert torch.linalg.matrix_rank(edit.deltas[next(iter(edit.deltas))].change(weight)) > 2


def test_sdxl_has_the_encodings_of_both_encoders() -> None:
    pipe = PIPELINES["sdxl"]()
    edit = edit_concepts(pipe, {"a cat": "a dog"}, ridge=1e-8)
    cat, dog = (encodings(pipe, [prompt], [1]).float() for prompt in ("a cat", "a dog"))
    name = next(iter(edit.deltas))
    layer = pipe.unet.get_submodule(name)
    wanted = layer(dog.mT)
    with edit.apply(pipe.unet):
        assert torch.allclose(layer(cat.mT), wanted, atol=1e-3)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_where_the_text_is_transformed_on_its_way_training_is_named(kind: str) -> None:
    with pytest.raises(ValueError, match="unlearn_concept"):
        edit_concepts(PIPELINES[kind](), {"a cat": "a dog"})


def test_mistakes_name_their_argument_and_change_nothing() -> None:
    pipe = sd_pipeline()
    before = copy.deepcopy(pipe.unet.state_dict())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"forget": {}}, "`forget` must hold"),
        ({"forget": 5}, "`forget`"),
        ({"forget": {"a cat": 5}}, "`anchor`"),
        ({"forget": {"a cat": "a cat"}}, "its own anchor"),
        ({"forget": ["a cat"], "retain": ["a cat"]}, "among the retained"),
        ({"retain": [5]}, "`retain`"),
        ({"preserve": -1.0}, "`preserve`"),
        ({"ridge": 0.0}, "`ridge`"),
        ({"tokens": "first"}, "`tokens`"),
    ]
    for arguments, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            edit_concepts(pipe, **{"forget": ["a cat"], **arguments})
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
