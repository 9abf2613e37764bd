"""Erase a concept from a Stable Diffusion pipeline in a directory, look at it, and write what ships.

    python examples/erase_concept.py --model path/to/sd15 --forget "a photo of a cat" --anchor "a photo of a dog"

Works on directories that `DiffusionPipeline.from_pretrained` reads with Stable Diffusion 1.x, 2.x, XL or 3, or Flux.
Without `--images`, what the pipeline itself draws for the prompt is what it forgets. Nothing is downloaded. How much
memory it takes is in docs/diffusion.md; `--dtype bfloat16 --gradient-checkpointing` takes least.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from semu_peft import SemuConfig
from semu_peft.concept import Preview, concept_examples, denoiser_targets, unlearn_concept
from semu_peft.concept.families import denoiser_of
from semu_peft.concept.sampling import sample_pipeline
from semu_peft.evaluation import clip_score
from semu_peft.export.diffusers import merge_pipeline, save_adapter, save_as_diffusers_lora
from semu_peft.report import SampleGrids, plot_scales, plot_spectra

WRITTEN = {
    "samples/": "grids before, during and after training, at equal seeds",
    "scales.png": "the same samples at adapter scales from 0 to 1.5",
    "spectra.png": "each layer's forget gradient, and the rank it was given",
    "examples.safetensors": "latents and encoded prompts; a second run with the same --output-dir starts from them",
    "adapter/": "the SEMU adapter: PeftModel.from_pretrained(pipe.unet, ...)",
    "lora/": "the same for anybody's diffusers: pipe.load_lora_weights(...)",
    "merged/": "the same as a stock pipeline",
    "summary.json": "settings, counts, losses, differences between these, CLIP scores",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, text: str, **settings: Any) -> None:
        default = settings.get("default")
        parser.add_argument(name, help=text if default in (None, "") else f"{text} (default: {default})", **settings)

    add("--model", "directory of a diffusers pipeline", type=Path, required=True)
    add("--forget", "prompts to forget", nargs="+", required=True)
    add("--anchor", "what to give instead, one or as many prompts; else: what comes without a prompt", nargs="+")
    add("--retain", "prompts to hold as they are; else: the empty one", nargs="+")
    add("--images", "folder of pictures of the concept; else: drawn by the pipeline itself", type=Path)
    add("--method", "what to minimise", default="condition-matching",
        choices=["condition-matching", "negative-guidance", "gradient-ascent"])  # fmt: skip
    add("--part", "layers to correct", default="cross-attention",
        choices=["cross-attention", "attention", "all-linear", "convolutions", "all"])  # fmt: skip
    add("--explained-variance", "share of each layer's gradient energy to keep", type=float, default=1.0)
    add("--rank", "most directions a layer may have", type=int, default=32)
    add("--preserve", "weight of holding the --retain prompts", type=float, default=1.0)
    add("--max-steps", "optimiser steps", type=int, default=200)
    add("--batch-size", "examples a step", type=int, default=4)
    add("--learning-rate", "falling linearly to 0", type=float, default=1e-2)
    add("--samples-per-prompt", "latents to draw for each prompt to forget", type=int, default=16)
    add("--size", "height and width of images in pixels; else: the pipeline's own", type=int)
    add("--num-inference-steps", "sampling steps", type=int, default=25)
    add("--guidance-scale", "guidance of all sampling", type=float, default=7.5)
    add(
        "--previews",
        "grids during training; each takes time, and keeps VAE and text encoder in place",
        type=int,
        default=2,
    )
    add("--preview-samples", "images per prompt in the grids", type=int, default=3)
    add("--dtype", "of the pipeline", choices=["float32", "bfloat16", "float16"], default="float32")
    add("--device", "cpu, cuda, mps; else: what there is")
    add("--clip", "directory of a CLIPModel and its processor, to score the images with")
    add("--seed", "seed of everything drawn", type=int, default=0)
    add("--output-dir", "folder for everything written", type=Path, default=Path("runs/erase_concept"))
    parser.add_argument("--gradient-checkpointing", action="store_true", help="compute activations twice, keep fewer")
    parser.add_argument("--no-merge", action="store_true", help="do not write the merged pipeline, which is large")
    return parser.parse_args()


def load_pipeline(folder: Path, dtype: str, device: str) -> Any:
    if not (folder / "model_index.json").is_file():
        sys.exit(f"--model: {folder} is no pipeline directory, it has no model_index.json.")
    settings: dict[str, Any] = {}
    if "safety_checker" in json.loads((folder / "model_index.json").read_text(encoding="utf-8")):
        settings = {"safety_checker": None, "requires_safety_checker": False}  # it would black out samples unseen
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype), **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def read_pictures(folder: Path) -> list[Image.Image]:
    suffixes = {".png", ".jpg", ".jpeg", ".webp"}
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes)
    if not files:
        sys.exit(f"--images: {folder} holds no pictures ({', '.join(sorted(suffixes))}).")
    return [Image.open(file).convert("RGB") for file in files]


def main() -> None:
    args = parse_args()
    started = time.perf_counter()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    output: Path = args.output_dir
    pipe = load_pipeline(args.model, args.dtype, device)
    denoiser = denoiser_of(pipe)
    retain = args.retain or [""]
    sampling = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    sampling |= {"height": args.size, "width": args.size} if args.size else {}
    grids = SampleGrids(output / "samples", args.forget, retain, args.preview_samples, seed=1000, settings=sampling)

    examples = concept_examples(
        pipe,
        args.forget,
        anchor=args.anchor or "",
        retain=retain,
        images=read_pictures(args.images) if args.images else None,
        samples_per_prompt=args.samples_per_prompt,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        height=args.size,
        width=args.size,
        cache=output / "examples.safetensors",
        batch_size=args.batch_size,
        seed=args.seed,
    )
    result = unlearn_concept(
        pipe,
        examples,
        objective=args.method,
        preserve=args.preserve,
        config=SemuConfig(
            target_modules=denoiser_targets(denoiser, args.part),
            explained_variance=args.explained_variance,
            r=args.rank,
        ),
        max_steps=args.max_steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        gradient_checkpointing=args.gradient_checkpointing,
        callbacks=Preview(pipe, grids, args.previews) if args.previews else (),
        seed=args.seed,
    )
    plot_spectra(result.profile, output / "spectra.png")

    prompts = [*args.forget, *retain]

    def sample() -> torch.Tensor:
        """One image a prompt, all from one seed, by what `pipe` is at the time."""
        return sample_pipeline(pipe, prompts, seeds=[1000] * len(prompts), batch_size=1, **sampling)

    def rows() -> dict[str, torch.Tensor]:
        return {prompt or "(no prompt)": image for prompt, image in zip(prompts, sample(), strict=True)}

    plot_scales(denoiser, rows, output / "scales.png", marked=args.forget)
    wanted = sample()
    save_adapter(denoiser, output / "adapter")
    save_as_diffusers_lora(pipe, output / "lora")
    differences = {}
    scores = {"after": clip_scores(args.clip, wanted, prompts)} if args.clip else {}
    merge_pipeline(pipe)
    differences["merged"] = (sample() - wanted).abs().max().item()
    if not args.no_merge:
        pipe.save_pretrained(output / "merged")
    del pipe, denoiser
    pipe = load_pipeline(args.model, args.dtype, device)
    before = sample()
    if args.clip:
        scores["before"] = clip_scores(args.clip, before, prompts)
    # By the file's name, since diffusers before 0.40 looks for it on the hub alone.
    pipe.load_lora_weights(output / "lora", weight_name="pytorch_lora_weights.safetensors")
    differences["LoRA on the original pipeline"] = (sample() - wanted).abs().max().item()
    pipe.fuse_lora()
    differences["LoRA, fused"] = (sample() - wanted).abs().max().item()

    training = result.training
    summary = {
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "trained_parameters": training.trainable_parameters,
        "layers": len(result.profile.layers),
        "examples": len(result.examples),
        "seconds_of_training": training.seconds,
        "seconds": time.perf_counter() - started,
        "first_loss": training.history[0]["loss"],
        "last_loss": training.history[-1]["loss"],
        "largest_change_of_a_pixel": (wanted - before).abs().max().item(),
        "largest_difference_of_a_pixel_to_the_adapter": differences,
        "clip_scores": scores,
        "gpu_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"Trained {training.trainable_parameters} numbers in {len(result.profile.layers)} layers.")
    for name, difference in differences.items():
        print(f"   {name:<32} max |difference| of a pixel {difference:.1e}")
    print(f"Done in {time.perf_counter() - started:.0f} s. Written to {output}:")
    for name, content in WRITTEN.items():
        if (output / name).exists():
            print(f"   {name:<24}{content}")


def clip_scores(folder: str, images: torch.Tensor, prompts: list[str]) -> dict[str, float]:
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    return {prompt: clip_score(images[[i]], [prompt], model, processor) for i, prompt in enumerate(prompts) if prompt}


if __name__ == "__main__":
    main()
