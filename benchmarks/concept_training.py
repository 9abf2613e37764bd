"""How well a concept is erased, in how many steps and seconds: natural gradients beside AdamW at several rates.

    python benchmarks/concept_training.py --models runs/diffusion_digits     # the models of examples/diffusion_digits

A text-conditional pipeline of digits forgets "three" for "eight", as in the example's second part. The loss that is
minimised, matching and preservation together, is measured on noise, timesteps and latents that no run has seen. Without
`--models` the pipeline is trained first, for `--train-steps` steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from semu_peft import SemuConfig, objectives, unlearn_concept
from semu_peft.concept import ConceptExamples, concept_examples
from semu_peft.files import written_whole
from semu_peft.training.natural import NaturalGradient

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "diffusion_digits"))
from digit_data import WORDS, load_images  # noqa: E402
from digit_models import TEMPLATES, text_pipeline, train_pipeline  # noqa: E402

RATES = (3e-3, 1e-2, 3e-2)
PRESERVE = 3.0
CONFIG: dict[str, Any] = {"target_modules": ["attn2.to_k", "attn2.to_v"], "explained_variance": 1.0, "r": 16}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="output folder of examples/diffusion_digits")
    parser.add_argument("--train-steps", type=int, default=400, help="steps of training the pipeline, else")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16, 48])
    parser.add_argument("--steps", type=int, default=200, help="steps of AdamW, of four examples; fewer of more")
    parser.add_argument("--natural-steps", type=int, default=20, help="steps of a short run by natural gradients")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "concept_training.json")
    return parser.parse_args()


def load(args: argparse.Namespace) -> Any:
    if args.models:
        pipe = DiffusionPipeline.from_pretrained(args.models / "text_conditional" / "original", safety_checker=None)
    else:
        train, _, names = load_images(None, 16, args.seed)
        torch.manual_seed(args.seed)
        pipe = train_pipeline(text_pipeline(1, 16, names), *train, names, args.train_steps, args.seed)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def examples_of(pipe: Any, samples: int, seed: int) -> ConceptExamples:
    forget, anchor = ([template.format(word) for template in TEMPLATES] for word in ("three", "eight"))
    retain = [template.format(word) for word in WORDS if word != "three" for template in TEMPLATES] + [""] * 9
    return concept_examples(
        pipe, forget, anchor=anchor, retain=retain, samples_per_prompt=samples, num_inference_steps=20,
        guidance_scale=2.0, batch_size=32, seed=seed, progress=False,
    )  # fmt: skip


@torch.no_grad()
def unseen(pipe: Any, examples: ConceptExamples) -> dict[str, float]:
    """The loss and its parts at draws of their own, four of each example."""
    parts = {"matching": objectives.ConditionMatching(pipe.scheduler, seed=1000)}
    parts["preservation"] = objectives.PreservePrediction(pipe.scheduler, under="retain", seed=1001)
    batches = [batch for _ in range(4) for batch in examples.loader(48, shuffle=False)]
    found = {
        name: sum(float(part(pipe.unet, batch)) for batch in batches) / len(batches) for name, part in parts.items()
    }
    return {"loss": found["matching"] + PRESERVE * found["preservation"], **found}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    original = load(args)
    train, test = examples_of(original, 48, args.seed), examples_of(original, 16, args.seed + 10_000)
    rows = []
    print("| batch | trained by | unseen loss | matching | preservation | steps | seconds |\n|" + " --- |" * 7)
    for batch_size in args.batch_sizes:
        steps = max(1, args.steps * 4 // batch_size)
        # By natural gradients until they end, and for so many steps; by AdamW at each rate.
        for rate, most in [(None, None), (None, args.natural_steps), *((rate, steps) for rate in RATES)]:
            pipe = copy.deepcopy(original)
            started = time.process_time()
            result = unlearn_concept(
                pipe, train, config=SemuConfig(**CONFIG), preserve=PRESERVE, batch_size=batch_size, learning_rate=rate,
                max_steps=most, optimizer=None if rate else NaturalGradient(), seed=args.seed, progress=False,
            ).training  # fmt: skip
            seconds = time.process_time() - started
            row = {"batch_size": batch_size, "learning_rate": rate, "max_steps": most, **unseen(pipe, test)}
            row |= {"steps": result.steps, "seconds": seconds, "trained": result.trainable_parameters}
            rows.append({**row, "stop_reason": result.stop_reason})
            name = f"AdamW at {rate:g}" if rate else "natural gradients" + (f", {most} steps" if most else "")
            print(
                f"| {batch_size} | {name} | {row['loss']:.2e} | {row['matching']:.2e} | {row['preservation']:.2e} | "
                f"{row['steps']} | {seconds:.0f} |",
                flush=True,
            )
    settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    versions = {"torch": torch.__version__, "threads": 1, "seconds": "processor time, with the initialisation"}
    with written_whole(args.output) as file:
        file.write_text(json.dumps({"arguments": settings, **versions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
