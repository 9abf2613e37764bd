"""A hundred prompts redirected in closed form beside a step of ESD-like training, at Stable Diffusion's size.

    python benchmarks/concept_edits.py

The U-Net is that of Stable Diffusion 1.5 and the text encoder CLIP ViT-L/14, both with random weights: time and size
are measured, not pictures. Training is negative guidance (ESD) in an adapter of cross-attention: one example a step, at
512 pixels. Times are the processor's, on one thread, which other work on the machine disturbs least. Results go to
`benchmarks/results/concept_edits.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from semu_peft import SemuConfig, save_as_diffusers_lora
from semu_peft.adapter.whole_model import add_adapter, remove_adapter
from semu_peft.concept import denoiser_targets, edit_concepts
from semu_peft.files import written_whole
from semu_peft.objectives import NegativeGuidance, NoiseSchedule

RESULT = Path(__file__).parent / "results" / "concept_edits.json"
USUAL_STEPS = 200  # the default of `unlearn_concept`
RANK = 16


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100, help="how many prompts to redirect")
    parser.add_argument("--retain", type=int, default=100, help="how many to hold")
    parser.add_argument("--steps", type=int, default=1, help="training steps to time, 0 for none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT)
    return parser.parse_args()


def pipeline(words: list[str]) -> Any:
    """Stable Diffusion 1.5 with random weights, and a VAE of no size, which is not used."""
    vocabulary = {word: index for index, word in enumerate(["<s>", "</s>", "<unk>", "a", "photo", "of", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        model_max_length=77,
        pad_token="</s>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = diffusers.AutoencoderKL(block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4,
                                  up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4)  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text).eval(), tokenizer=tokenizer, unet=unet.eval(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def timed(title: str, action: Any) -> tuple[Any, float]:
    started = time.process_time()
    value = action()
    seconds = time.process_time() - started
    print(f"{title:<48} {seconds:8.2f} s of the processor", flush=True)
    return value, round(seconds, 3)


def closed_form(pipe: Any, forget: dict[str, str], retain: list[str]) -> dict[str, Any]:
    edit, edited = timed(f"{len(forget)} prompts in closed form", lambda: edit_concepts(pipe, forget, retain=retain))
    _, applied = timed("applied to the weights, and undone", lambda: edit.apply(pipe.unet).undo())
    carried, converted = timed("as a SEMU adapter", lambda: edit.to_semu(pipe.unet, adapter_name="concepts"))
    with tempfile.TemporaryDirectory() as folder:
        _, saved = timed(
            "as a LoRA of diffusers", lambda: save_as_diffusers_lora(pipe, folder, adapter_name="concepts")
        )
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    remove_adapter(pipe.unet, adapter_name="concepts")
    return {
        "prompts": len(forget), "retained": len(retain), "layers": len(edit.deltas), "edit_seconds": edited,
        "apply_and_undo_seconds": applied, "adapter_seconds": converted, "lora_seconds": saved, "lora_bytes": size,
        "largest_rank": max(carried.ranks.values()), "error": carried.error,
    }  # fmt: skip


def training_step(pipe: Any, prompt: str, steps: int, seed: int) -> float:
    """Seconds of a step of negative guidance with AdamW, one example, in an adapter of cross-attention."""
    unet = pipe.unet
    add_adapter(unet, SemuConfig(target_modules=denoiser_targets(unet), r=RANK, init_weights=False))
    embeds = [pipe.encode_prompt([text], "cpu", 1, False)[0].detach() for text in (prompt, "")]
    batch = {
        "latents": torch.randn(1, 4, 64, 64),
        "condition": {"encoder_hidden_states": embeds[0]},
        "unconditional": {"encoder_hidden_states": embeds[1]},
    }
    objective = NegativeGuidance(NoiseSchedule.from_scheduler(pipe.scheduler, 1.0), seed=seed)
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-2)

    def train() -> None:
        for _ in range(steps):
            objective(unet, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    _, seconds = timed(f"{steps} step(s) of negative guidance, one prompt", train)
    return seconds / steps


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    names = [f"name{index}" for index in range(args.prompts + args.retain)]
    pipe, built = timed("the model, with random weights", lambda: pipeline(names))
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.requires_grad_(False)
    prompts = [f"a photo of {name}" for name in names]
    result = closed_form(pipe, dict.fromkeys(prompts[: args.prompts], "a photo"), prompts[args.prompts :])
    if args.steps:
        step = training_step(pipe, prompts[0], args.steps, args.seed)
        training, edit = step * USUAL_STEPS, result["edit_seconds"]
        result |= {
            "training_step_seconds": round(step, 2), "training_steps": USUAL_STEPS,
            "training_seconds_one_prompt": round(training),
            "one_prompt_trained_over_all_edited": round(training / edit),
            "all_prompts_trained_over_all_edited": round(args.prompts * training / edit),
        }  # fmt: skip
    result |= {
        "parameters": sum(p.numel() for p in pipe.unet.parameters()), "build_seconds": built, "seed": args.seed,
        "command": " ".join(["python", "benchmarks/concept_edits.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {args.threads} threads of {os.cpu_count()} CPU cores, no GPU",
        "torch": torch.__version__,
    }  # fmt: skip
    with written_whole(args.output) as file:
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
