"""An exported pipeline means the same to every reader: old and new diffusers, ComfyUI, WebUI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils.state_dict_utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
from diffusion_models import PIPELINES, quiet
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from semu_peft import SemuConfig, save_as_diffusers_lora
from semu_peft.concept import denoiser_targets
from semu_peft.concept.families import denoiser_of
from semu_peft.concept.sampling import sample_pipeline
from semu_peft.export.diffusers import WEIGHT_NAME, merge_pipeline, save_adapter
from semu_peft.tuner.adapted import base_model, semu_layers

TOLERANCE: dict[str, Any] = {"atol": 2e-5, "rtol": 0}
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def adapted(kind: str, part: str = "attention", text: bool = False, adapter_name: str = "default") -> Any:
    """A pipeline with random adapters of different ranks, in the denoiser and perhaps in the text encoders."""
    pipe = quiet(PIPELINES[kind]())
    denoiser = denoiser_of(pipe)
    torch.manual_seed(3)
    names = [name for name in denoiser_targets(denoiser, part) if "patch" not in name and "pos_embed" not in name]
    config = SemuConfig(target_modules=names, init_weights=False, r=3, rank_pattern=dict.fromkeys(names[::3], 1))
    denoiser.add_adapter(config, adapter_name=adapter_name)
    for encoder in ("text_encoder", "text_encoder_2") if text else ():
        if hasattr(getattr(pipe, encoder, None), "text_projection") or encoder == "text_encoder":
            model = getattr(pipe, encoder)
            model.add_adapter(SemuConfig(target_modules=TEXT_TARGETS, init_weights=False, r=2), adapter_name)
    return pipe


def images(pipe: Any) -> Tensor:
    return sample_pipeline(
        pipe, ["a photo of a cat"], seeds=[0], height=16, width=16, num_inference_steps=2, guidance_scale=3.0
    )


def deltas(pipe: Any) -> dict[str, Tensor]:
    """Each layer's correction, by component and name."""
    found = {}
    for component, model in pipe.components.items():
        if isinstance(model, nn.Module) and getattr(model, "peft_config", None):
            for name, layer in semu_layers(model).items():
                found[f"{component}.{name.removeprefix('text_model.')}"] = layer.get_delta_weight("default").detach()
    return found


def product(down: Tensor, up: Tensor, like: Tensor) -> Tensor:
    return (up.flatten(1) @ down.flatten(1)).reshape(like.shape)


@pytest.mark.parametrize("kind", PIPELINES)
def test_readers_that_know_only_shapes_scale_by_one(kind: str, tmp_path: Path) -> None:
    """One rank in the whole file, and `B A` is the correction: α read from the first tensor is right for all."""
    pipe = adapted(kind, text=kind in ("sd", "sdxl", "sd3"))
    wanted = deltas(pipe)
    weights = load_file(save_as_diffusers_lora(pipe, tmp_path))
    downs = {key.removesuffix(".lora_A.weight"): value for key, value in weights.items() if ".lora_A" in key}
    assert {down.shape[0] for down in downs.values()} == {3}
    assert {weights[f"{name}.lora_B.weight"].shape[1] for name in downs} == {3}
    written = {
        name.replace(".text_model.", "."): (down, weights[f"{name}.lora_B.weight"]) for name, down in downs.items()
    }
    assert written.keys() == wanted.keys()
    for name, (down, up) in written.items():
        torch.testing.assert_close(product(down, up, wanted[name]), wanted[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_reader_that_drops_the_settings_draws_the_same(kind: str, tmp_path: Path) -> None:
    pipe = adapted(kind, text=True)
    wanted = images(pipe)
    weights = load_file(save_as_diffusers_lora(pipe, tmp_path))
    for state_dict in (dict(weights), convert_state_dict_to_kohya(convert_all_state_dict_to_peft(dict(weights)))):
        stock = quiet(PIPELINES[kind]())
        stock.load_lora_weights(state_dict)
        torch.testing.assert_close(images(stock), wanted, **TOLERANCE)


def test_the_settings_are_those_that_every_version_of_peft_has(tmp_path: Path) -> None:
    with safe_open(save_as_diffusers_lora(adapted("sdxl", text=True), tmp_path), "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    fields = {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"}  # diffusers 0.36 asks for all five
    components = ("unet", "text_encoder", "text_encoder_2")
    assert set(settings) == {f"{component}.{field}" for component in components for field in fields}
    assert settings["unet.r"] == settings["unet.lora_alpha"] == 3 and settings["unet.rank_pattern"] == {}


def test_text_layers_are_named_for_old_and_new_transformers(tmp_path: Path) -> None:
    """Files say `text_model.`, which transformers 5 has taken out of one model; the targets mean both by their ends."""
    file = save_as_diffusers_lora(adapted("sdxl", text=True), tmp_path)
    keys = [key for key in load_file(file) if key.startswith("text_encoder")]
    assert keys and all(key.split(".")[1] == "text_model" for key in keys)
    with safe_open(file, "pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    for component in ("text_encoder", "text_encoder_2"):
        assert all(name.startswith("encoder.layers.") for name in settings[f"{component}.target_modules"])
    nested, flat = nn.ModuleDict({"text_model": tower()}), tower()
    for model in (nested, flat):
        adapter = get_peft_model(model, LoraConfig(target_modules=settings["text_encoder.target_modules"]))
        prefix = "base_model.model." + ("text_model." if model is nested else "")
        reached = {key.split(".lora_")[0].removeprefix(prefix) for key in get_peft_model_state_dict(adapter)}
        assert reached == set(settings["text_encoder.target_modules"])


def tower() -> nn.Module:
    encoder = base_model(PIPELINES["sd"]().text_encoder)
    return getattr(encoder, "text_model", encoder)


def test_layers_whose_names_end_alike_are_left_alone(tmp_path: Path) -> None:
    """Flux has a `proj_out` in every single block; readers match names by their ends."""
    pipe = quiet(PIPELINES["flux"]())
    torch.manual_seed(3)
    pipe.transformer.add_adapter(SemuConfig(target_modules=r"proj_out|x_embedder", init_weights=False, r=2))
    wanted = images(pipe)
    weights = load_file(save_as_diffusers_lora(pipe, tmp_path))
    block = "transformer.single_transformer_blocks.0.proj_out"
    assert not weights[f"{block}.lora_A.weight"].any() and not weights[f"{block}.lora_B.weight"].any()
    assert weights["transformer.proj_out.lora_B.weight"].any()
    stock = quiet(PIPELINES["flux"]())
    stock.load_lora_weights(dict(weights))
    torch.testing.assert_close(images(stock), wanted, **TOLERANCE)


def test_another_lora_can_be_swapped_for_it(tmp_path: Path) -> None:
    pipe = adapted("sd", "cross-attention")
    wanted = images(pipe)
    save_as_diffusers_lora(pipe, tmp_path / "semu")
    plain = quiet(PIPELINES["sd"]())
    names = denoiser_targets(plain.unet)
    plain.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False), "default")
    layers = get_peft_model_state_dict(plain.unet, adapter_name="default")
    plain.save_lora_weights(tmp_path / "plain", unet_lora_layers=layers)
    stock = quiet(PIPELINES["sd"]())
    stock.enable_lora_hotswap(target_rank=8)
    stock.load_lora_weights(tmp_path / "plain", weight_name=WEIGHT_NAME, adapter_name="a")
    stock.load_lora_weights(tmp_path / "semu", weight_name=WEIGHT_NAME, adapter_name="a", hotswap=True)
    torch.testing.assert_close(images(stock), wanted, **TOLERANCE)


# ---- kohya's layout ----


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_kohya_names_every_layer_and_its_alpha(kind: str, tmp_path: Path) -> None:
    """Read as ComfyUI and WebUI do: names with underscores, `α` over the rank times `up` times `down`."""
    pipe = adapted(kind, "all", text=True)
    wanted = deltas(pipe)
    weights = load_file(save_as_diffusers_lora(pipe, tmp_path, format="kohya"))
    text = {"text_encoder": "lora_te" if kind == "sd" else "lora_te1", "text_encoder_2": "lora_te2"}
    expected = {}
    for name in wanted:
        component, _, layer = name.partition(".")
        place = "lora_unet" if component == "unet" else f"{text[component]}_text_model"
        expected[f"{place}_{layer.replace('.', '_')}"] = wanted[name]
    kinds = {"lora_down.weight", "lora_up.weight", "alpha"}
    assert set(weights) == {f"{layer}.{part}" for layer in expected for part in kinds}
    for layer, delta in expected.items():
        down, up = weights[f"{layer}.lora_down.weight"], weights[f"{layer}.lora_up.weight"]
        read = weights[f"{layer}.alpha"].item() / down.shape[0] * product(down, up, delta)
        torch.testing.assert_close(read, delta, atol=1e-6, rtol=0)
        assert down.dim() == up.dim() == delta.dim()


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_diffusers_reads_kohyas_layout_too(kind: str, tmp_path: Path) -> None:
    pipe = adapted(kind, text=True)
    wanted = images(pipe)
    save_as_diffusers_lora(pipe, tmp_path, format="kohya")
    stock = quiet(PIPELINES[kind]())
    stock.load_lora_weights(tmp_path, weight_name=WEIGHT_NAME)
    torch.testing.assert_close(images(stock), wanted, **TOLERANCE)


def test_what_kohya_has_no_name_for_is_refused(tmp_path: Path) -> None:
    for kind in ("sd3", "flux"):
        with pytest.raises(ValueError, match="`format='kohya'`.*the format 'diffusers'"):
            save_as_diffusers_lora(adapted(kind), tmp_path / "lora", format="kohya")
    pipe = quiet(PIPELINES["sdxl"]())
    pipe.text_encoder_2.add_adapter(SemuConfig(target_modules=["text_projection"], init_weights=False, r=2))
    with pytest.raises(ValueError, match="'text_projection'.*kohya"):
        save_as_diffusers_lora(pipe, tmp_path / "lora", format="kohya")
    with pytest.raises(ValueError, match="`format`.*'webui'"):
        save_as_diffusers_lora(adapted("sd"), tmp_path / "lora", format="webui")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    "more", [{"bias": "all"}, {"target_modules": ["token_embedding"]}, {"modules_to_save": ["fc2"]}]
)
def test_what_no_such_file_can_hold_is_refused(more: dict[str, Any], tmp_path: Path) -> None:
    pipe = quiet(PIPELINES["sd"]())
    settings = {"target_modules": ["q_proj"], "init_weights": False, "r": 2, **more}
    pipe.text_encoder.add_adapter(SemuConfig(**settings))
    with pytest.raises(ValueError, match="'text_encoder'.*merge"):
        save_as_diffusers_lora(pipe, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


# ---- beside others, compiled, and twice ----


def test_a_style_loaded_on_top_does_not_change_what_is_exported(tmp_path: Path) -> None:
    style = quiet(PIPELINES["sd"]())
    torch.manual_seed(1)
    style.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), "default")
    layers = get_peft_model_state_dict(style.unet, adapter_name="default")
    style.save_lora_weights(tmp_path / "style", unet_lora_layers=layers)
    pipe = adapted("sd", "cross-attention", adapter_name="erase")
    wanted = images(pipe)
    pipe.load_lora_weights(tmp_path / "style", weight_name=WEIGHT_NAME, adapter_name="style")
    save_as_diffusers_lora(pipe, tmp_path / "lora", adapter_name="erase")
    stock = quiet(PIPELINES["sd"]())
    stock.load_lora_weights(tmp_path / "lora", weight_name=WEIGHT_NAME)
    torch.testing.assert_close(images(stock), wanted, **TOLERANCE)
    alone = adapted("sd", "cross-attention", adapter_name="erase")
    for name, model in (("beside", pipe.unet), ("alone", alone.unet)):
        save_adapter(model, tmp_path / name, adapter_name="erase")
    assert (tmp_path / "beside/adapter_model.safetensors").read_bytes() == (
        tmp_path / "alone/adapter_model.safetensors"
    ).read_bytes()


def test_a_compiled_denoiser_is_exported_as_the_plain_one(tmp_path: Path) -> None:
    pipe = adapted("sd", "cross-attention")
    wanted = images(pipe)
    plain = save_as_diffusers_lora(pipe, tmp_path / "plain").read_bytes()
    save_adapter(pipe.unet, tmp_path / "peft")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert save_as_diffusers_lora(pipe, tmp_path / "compiled").read_bytes() == plain
    save_adapter(pipe.unet, tmp_path / "peft-compiled")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "peft-compiled" / file).read_bytes() == (tmp_path / "peft" / file).read_bytes()
    merge_pipeline(pipe)
    assert type(pipe.unet).__name__ == "UNet2DConditionModel"
    torch.testing.assert_close(images(pipe), wanted, **TOLERANCE)


EXPORT = """
import sys
from pathlib import Path
import torch
from torch import nn
from peft import get_peft_model
from semu_peft import SemuConfig, initialize_semu_weights, objectives, save_as_diffusers_lora, save_as_lora
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
from test_readers import adapted
torch.set_num_threads(1)
folder = Path(sys.argv[2])
for layout in ("diffusers", "kohya"):
    save_as_diffusers_lora(adapted("sd", text=True), folder / layout, format=layout)
torch.manual_seed(0)
network = nn.Sequential(*(nn.Linear(6, 6) for _ in range(6)))
model = get_peft_model(network, SemuConfig(target_modules=["0", "1", "2", "3", "4"], r=2))
batches = [(torch.randn(4, 6), torch.randint(0, 6, (4,)))]
initialize_semu_weights(model, batches, objectives.CrossEntropy(), progress=False).save(folder / "profile.safetensors")
save_as_lora(model, folder / "lora")
"""


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    """Python's order of sets and safetensors' order of metadata differ from process to process."""
    written = []
    for number in range(3):
        folder = tmp_path / str(number)
        command = [sys.executable, "-W", "ignore", "-c", EXPORT, str(Path(__file__).parent), str(folder)]
        environment = {"PYTHONHASHSEED": str(number), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
        assert done.returncode == 0, done.stderr
        written.append({str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.*")})
    assert len(written[0]) == 5
    for other in written[1:]:
        assert [name for name, content in written[0].items() if other[name] != content] == []
