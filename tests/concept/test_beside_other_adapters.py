"""An erasure beside earlier ones and beside styles: what is active stays active, and only the new adapter trains."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_models import quiet, sd_pipeline
from models import Snapshot
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor

from semu_peft import SemuConfig, objectives, save_as_diffusers_lora
from semu_peft.adapter.whole_model import add_adapter
from semu_peft.concept import ConceptExamples, concept_examples, unlearn_concept
from semu_peft.concept.earlier import earlier_erasures
from semu_peft.concept.families import denoiser_of
from semu_peft.concept.sampling import sample_pipeline
from semu_peft.export.diffusers import save_adapter
from semu_peft.objectives.original import without_adapter
from semu_peft.tuner.weighted import config_of_the_sum

SIZE: dict[str, Any] = {"height": 16, "width": 16}
LAYERS = SemuConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"], explained_variance=0.99)


def images(pipe: Any) -> Tensor:
    settings = {**SIZE, "num_inference_steps": 2, "guidance_scale": 3.0}
    return sample_pipeline(quiet(pipe), ["a photo of a cat"] * 2, seeds=range(2), **settings)


def made(pipe: Any, forget: str, anchor: str) -> ConceptExamples:
    pictures = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return concept_examples(pipe, forget, anchor=anchor, images=pictures, progress=False, **SIZE)


def erase(pipe: Any, forget: str, anchor: str, name: str, **options: Any) -> Any:
    examples = made(pipe, forget, anchor)
    settings = {"max_steps": 40, "learning_rate": 0.01, **options}
    return unlearn_concept(pipe, examples, adapter_name=name, progress=False, **settings)


def trained(model: Any) -> set[str]:
    return {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_second_erasure_leaves_the_first_active_and_unchanged() -> None:
    pipe, reference = quiet(sd_pipeline()), sd_pipeline().unet
    first = erase(pipe, "a photo of a cat", "a photo of a dog", "first", config=LAYERS)

    def distance(reference: Any = reference) -> float:
        matching = objectives.ConditionMatching(pipe.scheduler, seed=9, reference=reference)
        with torch.no_grad():
            return float(matching(pipe.unet, next(iter(first.examples.loader(4, shuffle=False)))))

    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items() if ".first." in name}
    assert before
    erased = distance()
    second = erase(pipe, "monet", "car", "second", learning_rate=0.003, max_steps=20)
    assert {second.examples.prompts[int(at)] for at in second.examples.roles["earlier"]} == {
        "a photo of a cat", "a photo of a dog"
    }  # fmt: skip
    assert pipe.unet.active_adapters() == ["first", "second"] and trained(pipe.unet) == {"second"}
    assert all(torch.equal(pipe.unet.state_dict()[name], tensor) for name, tensor in before.items())
    both, named = distance(), distance(without_adapter(pipe.unet, "first"))
    pipe.unet.set_adapter("second")
    assert both < 3 * erased and both < 0.5 * distance()
    assert named < 3 * erased  # beside the second alone, as it is beside the original


def test_a_larger_second_erasure_leaves_the_first_where_it_was() -> None:
    """However far the first moved its own anchor, what it forgot is held against what it was to be."""
    pipe = quiet(sd_pipeline())
    options: dict[str, Any] = {"learning_rate": 0.02, "max_steps": 60}
    batch = next(iter(made(pipe, "a photo of a cat", "a photo of a dog").loader(4, shuffle=False)))

    def distance(adapter_name: str) -> float:
        matching = objectives.ConditionMatching(
            pipe.scheduler, seed=9, reference=without_adapter(pipe.unet, adapter_name)
        )
        with torch.no_grad():
            return float(matching(pipe.unet, batch))

    erase(pipe, "a photo of a cat", "a photo of a dog", "first", config=LAYERS, **options)
    erased = distance("first")
    second = erase(pipe, "monet", "photo", "second", **options)
    assert second.training.history[-1]["loss"] < 0.5 * second.training.history[0]["loss"]
    assert distance("first") < 1.5 * erased


def test_an_adapter_says_what_it_was_made_to_forget(tmp_path: Path) -> None:
    pipe = quiet(sd_pipeline())
    erase(pipe, "a photo of a cat", "a photo of a dog", "first", max_steps=1)
    record = {"first": {"a photo of a cat": ["a photo of a dog"]}}
    assert earlier_erasures(pipe.unet) == record
    save_adapter(pipe.unet, tmp_path, adapter_name="first")
    fresh = quiet(sd_pipeline())
    fresh.unet = PeftModel.from_pretrained(fresh.unet, tmp_path, adapter_name="first")
    assert earlier_erasures(denoiser_of(fresh)) == record
    examples = made(fresh, "monet", "photo")
    assert {examples.prompts[int(at)] for at in examples.roles["earlier"]} == {"a photo of a cat", "a photo of a dog"}
    pipe.unet.disable_adapters()
    assert earlier_erasures(pipe.unet) == {} and "earlier" not in made(pipe, "monet", "photo").roles


def test_a_sum_of_erasures_says_what_all_forgot() -> None:
    pipe = quiet(sd_pipeline())
    for name, prompt in (("first", "cat"), ("second", "car")):
        erase(pipe, prompt, "dog", name, max_steps=1)
    model = pipe.unet
    summed = config_of_the_sum({name: model.peft_config[name] for name in ("first", "second")}, ["to_k"], {})
    assert summed.forgotten == {"cat": ["dog"], "car": ["dog"]} and summed.parents == ["first", "second"]


def test_what_nothing_holds_is_said() -> None:
    pipe = quiet(sd_pipeline())
    before = made(pipe, "monet", "photo")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The erasures")
        erase(pipe, "a photo of a cat", "a photo of a dog", "first", record=False, max_steps=1)
    options: dict[str, Any] = {"max_steps": 1, "learning_rate": 0.01, "progress": False}
    prompts: dict[str, Any] = {"images": torch.rand(2, 3, 16, 16), **options}
    assert earlier_erasures(pipe.unet) == {"first": {}}
    with pytest.warns(UserWarning, match=r"The erasures \['first'\] stay active, but do not say what they forgot"):
        unlearn_concept(pipe, "monet", anchor="photo", adapter_name="second", **prompts)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The erasures")
        unlearn_concept(pipe, "car", retain=["a photo of a cat"], adapter_name="third", **prompts)
    with pytest.warns(UserWarning, match=r"The erasures \['second', 'third'\] .* the examples hold nothing of what"):
        unlearn_concept(pipe, made(sd_pipeline(), "dog", "photo"), adapter_name="fourth", **options)
    with pytest.warns(
        UserWarning, match=r"'second' gives 'photo' for 'monet', and goes on to .* `forget=\['photo', 'mo"
    ):
        examples = made(pipe, "photo", "")
    assert {examples.prompts[int(at)] for at in examples.roles["earlier"]} == {"monet", "car", "dog"}
    assert "earlier" not in before.roles


@pytest.mark.parametrize("value", [["cat"], {"cat": "dog"}, {"cat": [1]}])
def test_a_record_of_another_form_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="`forgotten` must map prompts to lists of prompts"):
        SemuConfig(target_modules=["to_k"], forgotten=value)


@pytest.mark.parametrize("disabled", [False, True])
def test_a_style_stays_as_it_is_through_an_erasure_and_both_ship(disabled: bool, tmp_path: Any) -> None:
    pipe = quiet(sd_pipeline())
    style = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    pipe.unet.add_adapter(style, adapter_name="style")
    if disabled:
        pipe.unet.disable_adapters()
    before, weights = images(pipe), get_peft_model_state_dict(pipe.unet, adapter_name="style")
    erase(pipe, "a photo of a cat", "a photo of a dog", "erase", max_steps=10, learning_rate=0.05)
    assert pipe.unet.active_adapters() == ([] if disabled else ["style"]) + ["erase"] and trained(pipe.unet) == {
        "erase"
    }
    after = get_peft_model_state_dict(pipe.unet, adapter_name="style")
    assert all(torch.equal(after[name.replace(".lora", ".base_layer.lora") if name not in after else name], weight)
               for name, weight in weights.items())  # fmt: skip
    together = images(pipe)
    assert (together - before).abs().max() > 1e-4
    save_as_diffusers_lora(pipe, tmp_path, adapter_name="erase")
    stock = quiet(sd_pipeline())
    if not disabled:
        stock.unet.add_adapter(style, adapter_name="style")
        held = {name.replace(".lora_A.", ".lora_A.style.").replace(".lora_B.", ".lora_B.style."): weight
                for name, weight in weights.items()}  # fmt: skip
        assert not stock.unet.load_state_dict(held, strict=False).unexpected_keys
    stock.load_lora_weights(tmp_path, adapter_name="erase")
    stock.unet.set_adapter(["erase"] if disabled else ["style", "erase"])
    torch.testing.assert_close(images(stock), together, atol=1e-4, rtol=0)


def test_a_denoiser_in_pefts_wrapper_keeps_its_adapter() -> None:
    pipe = quiet(sd_pipeline())
    first = SemuConfig(target_modules=["to_q"], init_weights=False, r=1)
    pipe.unet = get_peft_model(pipe.unet, first, adapter_name="first")
    erase(pipe, "cat", "dog", "second", config=SemuConfig(target_modules=["to_k"]), max_steps=3)
    assert pipe.unet.active_adapters == ["first", "second"] and trained(pipe.unet) == {"second"}


def test_what_fails_leaves_other_adapters_as_they_were() -> None:
    pipe = quiet(sd_pipeline())
    erase(pipe, "cat", "dog", "first", max_steps=2)
    before, active = Snapshot.of(pipe.unet), pipe.unet.active_adapters()

    def broken(model: Any, batch: Any) -> Any:
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        erase(pipe, "monet", "car", "second", objective=objectives.as_objective(broken))
    before.assert_same(pipe.unet)
    assert pipe.unet.active_adapters() == active and list(pipe.unet.peft_config) == ["first"]


def test_an_adapter_beside_merged_ones_is_refused() -> None:
    """The model would compute with what is merged alone, and the new adapter would do nothing."""
    unet = sd_pipeline().unet
    config = SemuConfig(target_modules=["to_q"], init_weights=False, r=1)
    add_adapter(unet, config, adapter_name="first")
    unet.fuse_lora()
    with pytest.raises(ValueError, match=r"`model`.*'first'.*merged.*unfuse_lora"):
        add_adapter(unet, config, adapter_name="second")
    unet.unfuse_lora()
    with pytest.raises(ValueError, match="`adapter_name`.*'first' already"):
        add_adapter(unet, config, adapter_name="first")
