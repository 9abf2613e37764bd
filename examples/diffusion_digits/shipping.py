"""Ship a pipeline's adapter along every route, and check that all of them draw the same images."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from semu_peft.concept.sampling import sample_pipeline
from semu_peft.export.diffusers import merge_pipeline, save_adapter, save_as_diffusers_lora

# Runs where semu_peft is never imported: what is shipped needs diffusers and PEFT alone.
STOCK_PROGRAM = """
import json, sys
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import save_file

base, lora, merged, prompts, settings, out = sys.argv[1:]

def images(pipe):
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(json.loads(prompts)))]
    return pipe(json.loads(prompts), generator=generators, output_type="pt", **json.loads(settings)).images.contiguous()

pipe = DiffusionPipeline.from_pretrained(base, safety_checker=None)
pipe.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
result = {"lora": images(pipe)}
pipe.fuse_lora()
result["fused"] = images(pipe)
result["merged"] = images(DiffusionPipeline.from_pretrained(merged, safety_checker=None))
assert "semu_peft" not in sys.modules
save_file(result, out)
"""


@torch.no_grad()
def prove(pipe: Any, load: Callable[[], Any], prompts: list[str], output: Path, sampling: dict[str, Any]) -> None:
    """Ship the adapter along every route and compare the images with the adapter's own. Merges it at the end."""

    def images(pipe: Any) -> Tensor:
        return sample_pipeline(pipe, prompts, seeds=range(len(prompts)), batch_size=len(prompts), **sampling)

    wanted, original = images(pipe), images(load())
    save_adapter(pipe.unet, output / "adapter")
    save_as_diffusers_lora(pipe, output / "lora")
    reloaded = load()
    PeftModel.from_pretrained(reloaded.unet, output / "adapter")
    pipe.unet.disable_adapters()
    switched_off = images(pipe)
    pipe.unet.enable_adapters()
    pipe.fuse_lora()
    fused = images(pipe)
    pipe.unfuse_lora()
    merge_pipeline(pipe).save_pretrained(output / "merged")
    paths = [output / name for name in ("original", "lora", "merged")]
    out = output / "images-elsewhere.safetensors"
    python = [sys.executable, "-W", "ignore", "-c", STOCK_PROGRAM]
    subprocess.run([*python, *paths, json.dumps(prompts), json.dumps(sampling), out], check=True)
    elsewhere = load_file(out)
    differences, allowed = {}, 1e-3
    for name, drawn, expected in (
        ("switched off: the original", switched_off, original),
        ("PEFT folder, reloaded", images(reloaded), wanted),
        ("fused in place", fused, wanted),
        ("merged in place", images(pipe), wanted),
        ("LoRA, process without semu_peft", elsewhere["lora"], wanted),
        ("LoRA fused, that process", elsewhere["fused"], wanted),
        ("merged stock pipeline, that process", elsewhere["merged"], wanted),
    ):
        differences[name] = (drawn - expected).abs().max().item()
        print(f"   {name:<38} max |difference| of a pixel {differences[name]:.1e}, allowed {allowed:.0e}")
        if not differences[name] <= allowed:
            sys.exit(f"{name}: images differ by {differences[name]:.1e}, more than {allowed:.0e}.")
    differences["for comparison: original and unlearned"] = (wanted - original).abs().max().item()
    (output / "proofs.json").write_text(json.dumps(differences, indent=2) + "\n", encoding="utf-8")
