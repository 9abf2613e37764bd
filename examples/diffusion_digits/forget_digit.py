"""Train two small diffusion models on digits, make them forget one, measure, compare, and ship.

    python examples/diffusion_digits/forget_digit.py

1. A class-conditional `UNet2DModel` in pixel space forgets the class from its images.
2. A text-conditional latent `StableDiffusionPipeline` forgets it from the prompts alone, in one call.

Beside SEMU stand LoRA with as many trained numbers, and ESD, which trains whole weights of (cross-)attention. A
separately trained classifier is the judge. Nothing is downloaded; examples/README.md says what is written.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DModel
from digit_data import Images, load_images
from digit_models import (
    TEMPLATES,
    Classifier,
    class_unet,
    schedule,
    text_pipeline,
    train_class_unet,
    train_classifier,
    train_pipeline,
)
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from shipping import prove
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft import (
    SemuConfig,
    SubspaceProfile,
    UnlearnResult,
    initialize_semu_weights,
    objectives,
    unlearn,
)
from semu_peft.concept import ConceptResult, Preview, concept_examples, unlearn_concept
from semu_peft.concept.sampling import sample_denoiser, sample_pipeline
from semu_peft.evaluation import ErasureMetrics, classify_samples, evaluate_erasure
from semu_peft.report import (
    SampleGrids,
    plot_before_after,
    plot_confusion,
    plot_scales,
    plot_spectra,
)

SHOWN = 8  # samples a row in the pictures
BATCH = 32
# The best of a few settings that were tried, for each method. As in the SEMU paper, attention keeps all of its
# gradient (1.0), as far as `r` allows, and convolutions nearly all.
SEMU_CLASS: dict[str, Any] = {
    "target_modules": ["time_emb_proj", "to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"],
    "explained_variance": 0.95,
    "r": 8,
}
SEMU_TEXT: dict[str, Any] = {"target_modules": ["attn2.to_k", "attn2.to_v"], "explained_variance": 1.0, "r": 16}
LEARNING_RATE = {"SEMU, text": 0.03, "LoRA": 0.01, "ESD, class": 3e-4, "ESD, text": 5e-4}


@dataclasses.dataclass
class Setting:
    """What all parts of the comparison share."""

    args: argparse.Namespace
    train: Images
    names: list[str]
    forgotten: int
    anchor: int
    judge: Classifier
    rows: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def labels(self) -> Tensor:
        """The class of every sample to judge, for all models the same, with the same seeds."""
        return torch.arange(len(self.names)).repeat_interleave(self.args.samples)

    @property
    def sampling(self) -> dict[str, Any]:
        """How everything is sampled."""
        return {"num_inference_steps": self.args.num_inference_steps, "guidance_scale": 2.0}

    def judged(self, name: str, images: Tensor, **costs: Any) -> ErasureMetrics:
        """Measure samples of all classes and add a row to the table."""
        real = self.train.images[self.train.labels != self.forgotten]
        metrics = evaluate_erasure(
            images, self.labels, self.judge, self.forgotten, real=real, features=self.judge.features
        )
        self.rows[name] = {**dataclasses.asdict(metrics), **costs}
        print(f"   {name}: {table_row(self.rows[name])}", flush=True)
        return metrics

    def by_class(self, images: Tensor) -> dict[str, Tensor]:
        """The first few samples of each class, for the pictures."""
        parts = images.split(self.args.samples)
        return {name: part[:SHOWN] for name, part in zip(self.names, parts, strict=True)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, text: str, **settings: Any) -> None:
        default = settings.get("default")
        parser.add_argument(name, help=text if default is None else f"{text} (default: {default})", **settings)

    add("--data", "folder with a subfolder of images per class, or parquet file or folder; else: digits", type=Path)
    add(
        "--side", "pixels a side; the pipeline's images have twice as many; else: 8 for digits, 16 for others", type=int
    )
    add("--forget-class", "name of the class to forget; else: three, or the first")
    add("--anchor-class", "what to draw in its place; else: eight, or the class after it")
    add("--models", "output folder of an earlier run, whose models are taken rather than trained again", type=Path)
    add("--train-steps", "training steps of each model", type=int, default=1500)
    add("--max-steps", "steps of unlearning", type=int, default=150)
    add("--preserve", "weight of holding the other conditions", type=float, default=3.0)
    add("--samples", "samples per class that are judged", type=int, default=60)
    add("--num-inference-steps", "sampling steps", type=int, default=20)
    add("--seed", "seed of everything drawn", type=int, default=0)
    add("--output-dir", "folder for everything written", type=Path, default=Path("runs/diffusion_digits"))
    parser.add_argument("--no-baselines", action="store_true", help="SEMU only, without LoRA and ESD")
    return parser.parse_args()


def share(trained: int, model: nn.Module) -> dict[str, Any]:
    total = sum(p.numel() for name, p in model.named_parameters() if ".semu_" not in name and ".lora_" not in name)
    return {"trained": trained, "share": 100 * trained / total}


def equal_lora(model: nn.Module, profile: SubspaceProfile, names: list[str], budget: int) -> LoraConfig:
    """LoRA on these layers with as many trained numbers as SEMU at most: of the highest rank that fits, or of rank 1 on
    those of the layers that have the largest forget gradients."""
    layers = dict(model.named_modules())
    costs = {name: layers[name].weight.shape[0] + layers[name].weight[0].numel() for name in names}
    rank, chosen, left = budget // sum(costs.values()), list(names), budget
    if rank == 0:
        rank, chosen = 1, []
        for name in sorted(names, key=lambda name: -profile.layers[name].energy):
            if costs[name] <= left:
                chosen, left = [*chosen, name], left - costs[name]
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=chosen)


# ---- 1. a class-conditional model of pixels ----


def class_conditional(setting: Setting) -> None:
    args, output, names = setting.args, setting.args.output_dir / "class_conditional", setting.names
    channels, side = setting.train.images.shape[1:3]
    nothing = len(names)
    torch.manual_seed(args.seed)
    if args.models:
        original = UNet2DModel.from_pretrained(args.models / "class_conditional" / "original").eval()
    else:
        original = class_unet(channels, side, len(names))
        train_class_unet(original, *setting.train, len(names), args.train_steps, args.seed)
    original.save_pretrained(output / "original")

    def samples(model: nn.Module) -> Tensor:
        parts = [
            sample_denoiser(
                model, schedule(), {"class_labels": part}, (channels, side, side), seeds=seeds.tolist(),
                unconditional={"class_labels": torch.full_like(part, nothing)}, **setting.sampling,
            )
            for part, seeds in zip(setting.labels.split(250), torch.arange(len(setting.labels)).split(250), strict=True)
        ]  # fmt: skip
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    before = samples(original)
    setting.judged("class-conditional, original", before, trained=0, share=0.0)

    images = 2 * setting.train.images[setting.train.labels == setting.forgotten] - 1
    batches = [
        {"latents": part}
        | {
            role: {"class_labels": torch.full((len(part),), label)}
            for role, label in (
                ("condition", setting.forgotten), ("anchor", setting.anchor), ("unconditional", nothing)
            )
        }
        for part in images.split(BATCH)
    ]  # fmt: skip
    forget = objectives.ConditionMatching(schedule(), seed=args.seed)
    # Other classes, and no class, at the same noisy images: what is retained needs no images of its own.
    keep = objectives.PreservePrediction(schedule(), under="random", num_classes=len(names) + 1, seed=args.seed + 1)

    def trained(model: nn.Module, objective: objectives.Objective, learning_rate: float) -> UnlearnResult:
        return unlearn(
            model, batches, objective, epochs=args.max_steps, max_steps=args.max_steps, learning_rate=learning_rate,
            seed=args.seed,
        )  # fmt: skip

    unlearned = get_peft_model(copy.deepcopy(original), SemuConfig(**SEMU_CLASS))
    profile = initialize_semu_weights(unlearned, batches, forget)
    # Natural gradients: no rate, and as many steps as it takes.
    result = unlearn(unlearned, batches, forget + args.preserve * keep, seed=args.seed)
    after = samples(unlearned)
    budget = result.trainable_parameters
    setting.judged("class-conditional, SEMU", after, **share(budget, unlearned), seconds=result.seconds)
    unlearned.save_pretrained(output / "adapter")
    marked = [names[setting.forgotten]]
    rows = setting.by_class(before), setting.by_class(after)
    plot_before_after(*rows, output / "samples.png", marked=marked, title=f"forgetting {marked[0]}")
    plot_spectra(profile, output / "spectra.png")
    confusions = [classify_samples(part, setting.labels, setting.judge) for part in (before, after)]
    plot_confusion(*confusions, output / "confusion.png", class_names=names, forgotten=setting.forgotten)
    if args.no_baselines:
        return

    torch.manual_seed(args.seed)
    lora: Any = get_peft_model(copy.deepcopy(original), equal_lora(original, profile, list(profile.layers), budget))
    result = trained(lora, forget + args.preserve * keep, LEARNING_RATE["LoRA"])
    costs = share(result.trainable_parameters, lora)
    setting.judged("class-conditional, LoRA of equal size", samples(lora), **costs, seconds=result.seconds)

    tuned = copy.deepcopy(original).requires_grad_(False)
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_("attentions" in name or "time_emb_proj" in name)
    esd = objectives.NegativeGuidance(schedule(), reference=original, seed=args.seed)
    result = trained(tuned, esd, LEARNING_RATE["ESD, class"])
    costs = share(result.trainable_parameters, tuned)
    setting.judged("class-conditional, ESD, attention and time", samples(tuned), **costs, seconds=result.seconds)


# ---- 2. a text-conditional latent model ----


def text_conditional(setting: Setting, train: Images) -> None:
    args, output, names = setting.args, setting.args.output_dir / "text_conditional", setting.names
    channels, side = train.images.shape[1:3]
    torch.manual_seed(args.seed)
    if args.models:
        pipe = DiffusionPipeline.from_pretrained(args.models / "text_conditional" / "original", safety_checker=None)
    else:
        pipe = train_pipeline(text_pipeline(channels, side, names), *train, names, args.train_steps, args.seed)
    pipe.save_pretrained(output / "original")
    prompts = [TEMPLATES[0].format(names[label]) for label in setting.labels.tolist()]

    def load() -> Any:
        pipe = DiffusionPipeline.from_pretrained(output / "original", safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def samples(pipe: Any) -> Tensor:
        images = sample_pipeline(pipe, prompts, seeds=range(len(prompts)), batch_size=250, **setting.sampling)
        return F.avg_pool2d(images, 2)  # to the size that the judge knows

    pipe = load()
    before = samples(pipe)
    setting.judged("text-conditional, original", before, trained=0, share=0.0)

    forgotten, others = names[setting.forgotten], [name for i, name in enumerate(names) if i != setting.forgotten]
    forget, anchor = ([t.format(names[label]) for t in TEMPLATES] for label in (setting.forgotten, setting.anchor))
    retain = [template.format(name) for name in others for template in TEMPLATES] + [""] * len(others)
    grids = SampleGrids(output / "training", forget[:1], [TEMPLATES[0].format(name) for name in others[:4]],
                        samples=SHOWN // 2, settings=setting.sampling)  # fmt: skip
    examples = concept_examples(
        pipe,
        forget,
        anchor=anchor,
        retain=retain,
        samples_per_prompt=48,
        batch_size=BATCH,
        seed=args.seed,
        **setting.sampling,
    )
    erased = unlearn_concept(
        pipe,
        examples,
        config=SemuConfig(**SEMU_TEXT),
        preserve=args.preserve,
        max_steps=args.max_steps,
        batch_size=BATCH,
        learning_rate=LEARNING_RATE["SEMU, text"],
        callbacks=Preview(pipe, grids),
        seed=args.seed,
    )
    after = samples(pipe)
    budget = erased.training.trainable_parameters
    costs = {**share(budget, pipe.unet), "seconds": erased.training.seconds}
    setting.judged("text-conditional, SEMU", after, **costs)
    rows = setting.by_class(before), setting.by_class(after)
    plot_before_after(*rows, output / "samples.png", marked=[forgotten], title=f"forgetting {forgotten}")
    plot_spectra(erased.profile, output / "spectra.png")
    shown = [setting.forgotten, setting.anchor, *(i for i in range(len(names)) if names[i] in others)][:5]

    def slide() -> dict[str, Tensor]:
        texts = [TEMPLATES[0].format(names[i]) for i in shown]
        images = sample_pipeline(pipe, texts, seeds=range(len(texts)), **setting.sampling)
        return dict(zip(texts, images, strict=True))

    plot_scales(pipe.unet, slide, output / "scales.png", marked=forget)
    if not args.no_baselines:
        text_baselines(setting, erased, load, samples)
    prove(pipe, load, [*forget, *retain[:6]], output, setting.sampling)


def text_baselines(
    setting: Setting, erased: ConceptResult, load: Callable[[], Any], samples: Callable[[Any], Tensor]
) -> None:
    args, examples = setting.args, erased.examples
    noise = erased.pipe.scheduler
    forget = objectives.ConditionMatching(noise, seed=args.seed)
    keep = objectives.PreservePrediction(noise, under="retain", seed=args.seed + 1)
    epochs = -(-args.max_steps // len(examples.loader(BATCH)))

    def trained(model: nn.Module, objective: objectives.Objective, learning_rate: float) -> UnlearnResult:
        return unlearn(
            model, examples.loader(BATCH), objective, epochs=epochs, max_steps=args.max_steps,
            learning_rate=learning_rate, seed=args.seed,
        )  # fmt: skip

    pipe = load()
    torch.manual_seed(args.seed)
    layers = list(erased.profile.layers)
    config = equal_lora(pipe.unet, erased.profile, layers, erased.training.trainable_parameters)
    pipe.unet = inject_adapter_in_model(config, pipe.unet)
    result = trained(pipe.unet, forget + args.preserve * keep, LEARNING_RATE["LoRA"])
    costs = {**share(result.trainable_parameters, pipe.unet), "seconds": result.seconds}
    setting.judged("text-conditional, LoRA of equal size", samples(pipe), **costs)

    pipe = load()
    original = copy.deepcopy(pipe.unet)
    for name, parameter in pipe.unet.named_parameters():
        parameter.requires_grad_("attn2" in name)
    esd = objectives.NegativeGuidance(noise, reference=original, seed=args.seed)
    result = trained(pipe.unet, esd, LEARNING_RATE["ESD, text"])
    costs = {**share(result.trainable_parameters, pipe.unet), "seconds": result.seconds}
    setting.judged("text-conditional, ESD, cross-attention", samples(pipe), **costs)


# ---- the table ----


def table_row(row: dict[str, Any]) -> str:
    seconds = f"{row['seconds']:.0f}" if row.get("seconds") is not None else ""
    return (
        f"{row['forget_accuracy']:.1f} | {row['retain_accuracy']:.1f} | {row['frechet_distance']:.2f} | "
        f"{row['kernel_distance']:.3f} | {row['trained']} | {row['share']:.2f}% | {seconds}"
    )


def write_table(rows: dict[str, dict[str, Any]], output: Path) -> str:
    heads = ["model", "forgotten recognised %", "others recognised %", "Fréchet distance", "kernel distance", "trained",
             "share", "seconds"]  # fmt: skip
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    lines += [f"{name} | {table_row(row)}" for name, row in rows.items()]
    text = "\n".join(f"| {line} |" for line in lines)
    (output / "metrics.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    (output / "metrics.md").write_text(text + "\n", encoding="utf-8")
    return text


def chosen_class(names: list[str], wanted: str | None, default: str, fallback: int, option: str) -> int:
    name = wanted or (default if default in names else names[fallback % len(names)])
    if name not in names:
        sys.exit(f"{option}: {name!r} is none of the classes {names}.")
    return names.index(name)


def main() -> None:
    args = parse_args()
    started = time.perf_counter()
    side = args.side or (8 if args.data is None else 16)
    train, test, names = load_images(args.data, side, args.seed)
    forgotten = chosen_class(names, args.forget_class, "three", 0, "--forget-class")
    anchor = chosen_class(names, args.anchor_class, "eight", forgotten + 1, "--anchor-class")
    if anchor == forgotten:
        sys.exit(f"--anchor-class: {names[anchor]!r} is the class to forget; choose another.")

    torch.manual_seed(args.seed)
    judge = Classifier(train.images.shape[1], len(names))
    train_classifier(judge, *train, max(1, args.train_steps // 2), args.seed)
    accuracy = classify_samples(test.images, test.labels, judge).accuracy
    print(f"The judge is right about {accuracy:.1f}% of the test images.")
    setting = Setting(args, train, names, forgotten, anchor, judge)

    print(f"Class-conditional: forgetting {names[forgotten]!r}, drawing {names[anchor]!r} in its place")
    class_conditional(setting)
    print("Text-conditional: the same, from prompts alone")
    larger, _, _ = load_images(args.data, 2 * side, args.seed)
    text_conditional(setting, larger)

    table = write_table(setting.rows, args.output_dir)
    print(f"\n{table}\n\nDone in {time.perf_counter() - started:.0f} s. Everything is in {args.output_dir}.")


if __name__ == "__main__":
    main()
