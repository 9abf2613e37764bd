"""Every way of shipping a pipeline's adapter gives the same images, also where `semu_peft` is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_models import PIPELINES, quiet
from models import Snapshot
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from semu_peft import SemuConfig
from semu_peft.adapter.whole_model import add_adapter
from semu_peft.concept import denoiser_targets
from semu_peft.concept.families import denoiser_of, family_of
from semu_peft.concept.sampling import sample_pipeline
from semu_peft.export.diffusers import merge_pipeline, save_adapter, save_as_diffusers_lora
from semu_peft.tuner.adapted import semu_layers

SETTINGS: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 3, "guidance_scale": 3.0}
TOLERANCE: dict[str, Any] = {"atol": 2e-5, "rtol": 0}

STOCK_PROGRAM = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):  # as on a machine where semu_peft is not installed
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "semu_peft":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from pathlib import Path
def images(pipe, **settings):
    pipe.set_progress_bar_config(disable=True)
    parts = [
        pipe("a photo of a cat", generator=torch.Generator().manual_seed(seed), output_type="pt", height=16, width=16,
             num_inference_steps=3, guidance_scale=3.0, **settings).images
        for seed in range(2)
    ]
    return torch.cat(parts).float().contiguous()
for folder in map(Path, sys.argv[1:]):
    pipe = DiffusionPipeline.from_pretrained(folder / "base")
    result = {"original": images(pipe)}
    pipe.load_lora_weights(folder / "lora", weight_name="pytorch_lora_weights.safetensors")
    result["lora"] = images(pipe)
    pipe.fuse_lora()
    result["fused"] = images(pipe)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    result["unloaded"] = images(pipe)
    result["merged"] = images(DiffusionPipeline.from_pretrained(folder / "merged"))
    save_file(result, folder / "images.safetensors")
"""


def adapted(kind: str, part: str = "all", **settings: Any) -> Any:
    """A pipeline whose denoiser has a random adapter of different ranks, and of a scale that is not 1."""
    pipe = quiet(PIPELINES[kind]())
    denoiser = denoiser_of(pipe)
    torch.manual_seed(3)
    names = [name for name in denoiser_targets(denoiser, part) if "patch" not in name and "pos_embed" not in name]
    config = SemuConfig(target_modules=names, init_weights=False, **{"r": 2, **settings})
    config.rank_pattern = dict.fromkeys(names[::3], 1)
    denoiser.add_adapter(config)
    for layer in semu_layers(denoiser).values():
        layer.set_scale("default", 1.7)
    return pipe


def images(pipe: Any) -> Tensor:
    return sample_pipeline(pipe, ["a photo of a cat"] * 2, seeds=[0, 1], batch_size=1, **SETTINGS)


def test_a_process_without_semu_draws_the_same_images(tmp_path: Path) -> None:
    expected = {}
    for kind in PIPELINES:
        pipe = adapted(kind, "all" if kind in ("sd", "sdxl") else "attention")
        folder, wanted = tmp_path / kind, images(pipe)
        save_as_diffusers_lora(pipe, folder / "lora")
        stock = quiet(PIPELINES[kind]())
        stock.save_pretrained(folder / "base")
        expected[kind] = {"original": images(stock), "wanted": wanted}
        assert (wanted - expected[kind]["original"]).abs().max() > 1e-3
        merge_pipeline(pipe).save_pretrained(folder / "merged")
        torch.testing.assert_close(images(pipe), wanted, **TOLERANCE)
    command = [sys.executable, "-W", "ignore", "-c", STOCK_PROGRAM, *(str(tmp_path / kind) for kind in PIPELINES)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "unexpected keys" not in done.stderr and "missing keys" not in done.stderr
    for kind in PIPELINES:
        for name, drawn in load_file(tmp_path / kind / "images.safetensors").items():
            same_as = expected[kind]["original" if name in ("original", "unloaded") else "wanted"]
            torch.testing.assert_close(drawn, same_as, **TOLERANCE, msg=lambda text, at=(kind, name): f"{at}: {text}")


@pytest.mark.parametrize("settings", [{"conv_mode": "per_channel"}, {"core": "diagonal"}])
def test_other_readings_of_the_weight_ship_as_well(settings: dict[str, Any], tmp_path: Path) -> None:
    pipe = adapted("sd", **settings)
    wanted = images(pipe)
    save_as_diffusers_lora(pipe, tmp_path)
    stock = quiet(PIPELINES["sd"]())
    stock.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(images(stock), wanted, **TOLERANCE)


def test_the_text_encoder_travels_in_the_same_file(tmp_path: Path) -> None:
    pipe = adapted("sd", "cross-attention")
    torch.manual_seed(1)
    pipe.text_encoder.add_adapter(SemuConfig(target_modules=["q_proj", "fc1"], init_weights=False, r=3))
    wanted = images(pipe)
    file = save_as_diffusers_lora(pipe, tmp_path)
    assert {key.split(".")[0] for key in load_file(file)} == {"unet", "text_encoder"}
    stock = quiet(PIPELINES["sd"]())
    stock.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(images(stock), wanted, **TOLERANCE)
    merge_pipeline(pipe)
    torch.testing.assert_close(images(pipe), wanted, **TOLERANCE)


def test_a_peft_folder_comes_back_onto_the_pipeline(tmp_path: Path) -> None:
    pipe = adapted("sdxl")
    for layer in semu_layers(pipe.unet).values():
        layer.set_scale("default", 1.0)
    wanted = images(pipe)
    save_adapter(pipe.unet, tmp_path)
    stock = quiet(PIPELINES["sdxl"]())
    loaded = PeftModel.from_pretrained(stock.unet, tmp_path)
    torch.testing.assert_close(images(stock), wanted, **TOLERANCE)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert pipe.unet.peft_config["default"].inference_mode is False
    stock.unet = loaded
    merge_pipeline(stock)
    assert type(stock.unet) is type(pipe.unet)
    torch.testing.assert_close(images(stock), wanted, **TOLERANCE)


def test_fusing_the_adapter_itself_and_merging_leave_a_stock_model(tmp_path: Path) -> None:
    pipe = adapted("sd")
    wanted, stock = images(pipe), Snapshot.of(PIPELINES["sd"]().unet)
    pipe.fuse_lora()
    torch.testing.assert_close(images(pipe), wanted, **TOLERANCE)
    with pytest.raises(ValueError, match="unfuse_lora"):
        merge_pipeline(pipe)
    pipe.unfuse_lora()
    torch.testing.assert_close(images(pipe), wanted, **TOLERANCE)
    merge_pipeline(pipe)
    now = Snapshot.of(pipe.unet)
    assert now.types == stock.types and now.state.keys() == stock.state.keys()
    assert "peft_config" not in vars(pipe.unet)
    pipe.unet.save_pretrained(tmp_path)
    torch.testing.assert_close(type(pipe.unet).from_pretrained(tmp_path).conv_in.weight, pipe.unet.conv_in.weight)


def test_adapters_are_merged_one_after_another() -> None:
    """Beside what is merged for good the others go on, and can be merged as well."""
    pipe = adapted("sd", "cross-attention")
    add_adapter(pipe.unet, SemuConfig(target_modules=["to_k", "to_q"], init_weights=False, r=2), adapter_name="second")
    wanted = images(pipe)
    for name in ("default", "second"):
        merge_pipeline(pipe, adapter_name=name)
        torch.testing.assert_close(images(pipe), wanted, **TOLERANCE)
    assert "peft_config" not in vars(pipe.unet)


def test_a_peft_model_in_the_pipeline() -> None:
    pipe = quiet(PIPELINES["sd"]())
    pipe.unet = get_peft_model(pipe.unet, SemuConfig(target_modules=["to_k", "conv1"], init_weights=False, r=2))
    wanted = images(pipe)
    merge_pipeline(pipe)
    assert type(pipe.unet).__name__ == "UNet2DConditionModel"
    torch.testing.assert_close(images(pipe), wanted, **TOLERANCE)


def test_a_merge_that_fails_changes_nothing() -> None:
    pipe = adapted("sd", "cross-attention")
    last = list(semu_layers(pipe.unet).values())[-1]
    with torch.no_grad():
        last.semu_core["default"].fill_(float("inf"))
    before = Snapshot.of(pipe.unet)
    with pytest.raises(ValueError, match="NaN"):
        merge_pipeline(pipe)
    now = Snapshot.of(pipe.unet)
    assert now.types == before.types
    for name, tensor in before.state.items():
        torch.testing.assert_close(now.state[name], tensor, atol=1e-6, rtol=0, equal_nan=True)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    pipe = quiet(PIPELINES["sd"]())
    with pytest.raises(ValueError, match="'default'"):
        save_as_diffusers_lora(pipe, tmp_path / "lora")
    with pytest.raises(ValueError, match="'default'"):
        merge_pipeline(pipe)
    pipe = adapted("sd", "cross-attention")
    torch.manual_seed(1)
    pipe.vae.add_adapter(SemuConfig(target_modules=["to_k"], init_weights=False, r=1))
    with pytest.raises(ValueError, match="'vae'"):
        save_as_diffusers_lora(pipe, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    assert family_of(pipe).denoiser == "unet"
