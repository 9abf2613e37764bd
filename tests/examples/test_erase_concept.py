"""The program for real pipelines runs on directories with the module structure of SD 1.5 and SDXL, weights random."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusion_models import quiet, sd_pipeline, sdxl_pipeline
from matplotlib.image import imread
from PIL import Image
from safetensors.torch import load_file

from semu_peft.concept.sampling import sample_pipeline

PROGRAM = Path(__file__).parents[2] / "examples" / "erase_concept.py"
# The configurations of stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0, and narrow versions of them.
SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
SDXL = {
    "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "sample_size": 128, "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
NARROW = {"sample_size": 8, "norm_num_groups": 4}
NARROW_SD15 = {
    **SD15, **NARROW, "cross_attention_dim": 8, "attention_head_dim": 2, "block_out_channels": (4, 8, 16, 16)
}  # fmt: skip
NARROW_SDXL = {
    **SDXL, **NARROW, "cross_attention_dim": 16, "attention_head_dim": 2, "block_out_channels": (4, 8, 16),
    "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 8 + 6 * 4,
}  # fmt: skip


def narrow(kind: str) -> Any:
    pipe = quiet(sd_pipeline() if kind == "sd15" else sdxl_pipeline())
    torch.manual_seed(0)
    pipe.unet = diffusers.UNet2DConditionModel(**(NARROW_SD15 if kind == "sd15" else NARROW_SDXL)).eval()
    return pipe


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the program with these arguments, in this process."""

    def program(*arguments: Any) -> None:
        monkeypatch.setattr("sys.argv", [str(PROGRAM), *map(str, arguments)])
        runpy.run_path(str(PROGRAM), run_name="__main__")

    return program


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_on_a_pipeline_with_the_real_module_structure(kind: str, run: Callable[..., None], tmp_path: Path) -> None:
    pipe = narrow(kind)
    with torch.device("meta"):
        full = diffusers.UNet2DConditionModel(**(SD15 if kind == "sd15" else SDXL))
    assert dict(full.named_parameters()).keys() == dict(pipe.unet.named_parameters()).keys()
    pipe.save_pretrained(tmp_path / "pipeline")
    run(
        "--model", tmp_path / "pipeline", "--forget", "a photo of a cat", "--anchor", "a photo of a dog",
        "--retain", "a photo of a car", "", "--part", "cross-attention" if kind == "sd15" else "attention",
        "--max-steps", 4, "--samples-per-prompt", 2, "--size", 16, "--num-inference-steps", 2, "--previews", 1,
        "--preview-samples", 1, "--rank", 2, "--output-dir", tmp_path / "out", "--gradient-checkpointing",
    )  # fmt: skip
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["trained_parameters"] > 0 and summary["examples"] == 2
    assert summary["layers"] == (32 if kind == "sd15" else 560)
    differences = summary["largest_difference_of_a_pixel_to_the_adapter"]
    assert len(differences) == 3 and max(differences.values()) < 1e-4
    assert summary["largest_change_of_a_pixel"] > 10 * max(differences.values())
    assert {path.name for path in (out / "samples").iterdir()} == {
        "step-00000.png", "step-00002.png", "step-00004.png"
    }  # fmt: skip
    assert imread(out / "scales.png").std() > 0 and (out / "spectra.png").is_file()
    keys = load_file(out / "lora" / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("unet.") and ".lora_" in key for key in keys)
    # What was written is what the program said: the merged directory draws as the LoRA does.
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16}
    merged = quiet(diffusers.DiffusionPipeline.from_pretrained(out / "merged"))
    pipe.load_lora_weights(out / "lora", weight_name="pytorch_lora_weights.safetensors")
    one, other = (sample_pipeline(p, ["a photo of a cat"], seeds=[3], **settings) for p in (merged, pipe))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_pictures_of_the_concept_and_bad_input(run: Callable[..., None], tmp_path: Path) -> None:
    narrow("sd15").save_pretrained(tmp_path / "pipeline")
    (tmp_path / "cats").mkdir()
    for number in range(3):
        Image.new("RGB", (20, 24), (80 * number, 20, 200)).save(tmp_path / "cats" / f"{number}.png")
    common = [
        "--forget",
        "a cat",
        "--max-steps",
        2,
        "--size",
        16,
        "--num-inference-steps",
        2,
        "--previews",
        0,
        "--no-merge",
    ]
    run(
        "--model", tmp_path / "pipeline", *common, "--images", tmp_path / "cats", "--output-dir", tmp_path / "out",
        "--method", "negative-guidance", "--dtype", "bfloat16",
    )  # fmt: skip
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["examples"] == 3
    assert not (tmp_path / "out" / "merged").exists() and not (tmp_path / "out" / "samples").exists()
    with pytest.raises(SystemExit, match="no pipeline directory"):
        run("--model", tmp_path / "cats", *common)
    with pytest.raises(SystemExit, match="holds no pictures"):
        run("--model", tmp_path / "pipeline", *common, "--images", tmp_path / "pipeline" / "unet")
