"""Forget one class of an image classifier, from a stock model to a shipped adapter.

    python examples/forget_class.py
    python examples/forget_class.py --data photos/ --model my-classifier/ --forget-class cat --retrain 30

Without arguments, a small vision transformer is trained on scikit-learn's handwritten digits and forgets the 3s. No
image of another class is used for that. A table sets the result beside the original model and beside one retrained
without the class; then the adapter is saved, reloaded, exported as a LoRA and merged, and each form is shown to give
the same outputs. Attacks try to bring the class back, beside the retrained model under the same attacks, and it ends
with a report for whoever signs: report.html. Everything is read from disk: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from image_data import PreparedImages, image_preparation, match_classes, read_image, read_images
from peft import PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    get_cosine_schedule_with_warmup,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from semu_peft import (
    SemuConfig,
    SubspaceProfile,
    UnlearnResult,
    initialize_semu_weights,
    objectives,
    save_as_lora,
    unlearn,
)
from semu_peft.evaluation import (
    AttackReport,
    ForgettingComparison,
    ForgettingMetrics,
    attack,
    evaluate_forgetting,
    predict,
)
from semu_peft.gradients import GradientSum, Sketch
from semu_peft.report import audit, plot_confusion, plot_spectra

OBJECTIVES: dict[str, Callable[[], objectives.Objective]] = {
    "decoupled-distillation": objectives.DecoupledDistillation,
    "random-label": objectives.RandomLabel,  # the paper's
    "inverted-hinge": objectives.InvertedHinge,
    "uniform-distribution": objectives.UniformDistribution,
    "gradient-ascent": objectives.GradientAscent,
}

WRITTEN = {
    "report.html": "all of it as one page, and what was not tested; report.md and report.json too",
    "metrics.json": "the table, and as Markdown in metrics.md",
    "confusion.png": "what the test images were taken for, before and after",
    "spectra.png": "each layer's forget gradient, and the rank it was given",
    "profile.safetensors": "the same as numbers, with the directions: SubspaceProfile.load reads it",
    "original/": "the model that knew the class",
    "adapter/": "the SEMU adapter",
    "adapter-random-label/": "that of the paper's objective",
    "lora/": "the same as a LoRA for stock PEFT",
    "merged/": "the same as a stock model",
    "proofs.json": "by how much their outputs differ",
}

# Runs where semu_peft is never imported: what is shipped needs transformers and PEFT alone.
STOCK_PROGRAM = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
base, lora, merged, inputs, outputs = sys.argv[1:]
models = {
    "lora": PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(base), lora),
    "merged": AutoModelForImageClassification.from_pretrained(merged),
}
with torch.no_grad():
    pixel_values = load_file(inputs)["pixel_values"]
    save_file({name: model.eval()(pixel_values=pixel_values).logits for name, model in models.items()}, outputs)
assert "semu_peft" not in sys.modules
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, text: str, **settings: Any) -> None:
        default = settings.get("default")
        parser.add_argument(name, help=text if default is None else f"{text} (default: {default})", **settings)

    add("--data", "folder with a subfolder of images per class, or parquet file or folder; else: digits", type=Path)
    add("--model", "folder of an AutoModelForImageClassification; else: a small one is trained", type=Path)
    add("--reference", "folder of such a model trained without the class, to compare with", type=Path)
    add("--train-epochs", "epochs of training the small model", type=int, default=25)
    add("--retrain", "epochs of training a model without the class; else: --train-epochs, 0 with --model", type=int)
    add("--forget-class", "name or index of the class to forget; else: the digit 3")
    add("--method", "what to minimise on its images", choices=OBJECTIVES, default="decoupled-distillation")
    add("--target-modules", "layers to correct, a regular expression or all-linear; else: the last third")
    add("--explained-variance", "share of each layer's gradient energy to keep", type=float, default=0.9)
    add("--accumulate", "sums of gradients, or sketches of them", choices=["exact", "sketch"], default="exact")
    add("--batch-size", "images to forget per step", type=int, default=64)
    add("--attack-seconds", "begin no attack after so many; 0 tries none", type=float, default=60.0)
    add("--seed", "seed of the split, the training and the unlearning", type=int, default=0)
    add("--device", "cpu, or what Accelerate finds", choices=["auto", "cpu"], default="auto")
    add("--output-dir", "folder for everything written", type=Path, default=Path("runs/forget_class"))
    return parser.parse_args()


# ---- models ----


def small_model(example: Image.Image, names: list[str]) -> PreTrainedModel:
    """An untrained vision transformer for images like this one, scaled to 32 pixels a side or fewer."""
    side = max(4, min(32, *example.size) // 4 * 4)
    config = ViTConfig(
        image_size=side,
        patch_size=side // 4,
        num_channels=1 if example.mode == "L" else 3,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    return AutoModelForImageClassification.from_config(config)


def load_model(folder: Path, option: str) -> PreTrainedModel:
    if not (folder / "config.json").is_file():
        sys.exit(f"{option}: {folder} is no model folder, it has no config.json.")
    try:
        return AutoModelForImageClassification.from_pretrained(folder)
    except (OSError, ValueError) as error:
        sys.exit(f"{option}: {folder} holds no AutoModelForImageClassification: {error}")


def train(model: PreTrainedModel, images: Dataset, epochs: int, seed: int, title: str) -> float:
    """Train a model in the ordinary way, in place, and return the seconds that took."""
    started = time.perf_counter()
    loader = DataLoader(images, batch_size=128, shuffle=True, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * len(loader)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 5, steps)
    with tqdm(total=steps, desc=title) as bar:
        for _ in range(epochs):
            for batch in loader:
                loss = model(**{key: value.to(model.device) for key, value in batch.items()}).loss
                loss.backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3g}")
    model.eval()
    return time.perf_counter() - started


def last_layers(model: nn.Module) -> list[str]:
    """The last third of the linear and convolutional layers; what earlier ones compute, all classes need."""
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return names[-math.ceil(len(names) / 3) :]


def forget(
    model: PreTrainedModel,
    images: Dataset,
    objective_name: str,
    folder: Path,
    accelerator: Accelerator,
    args: argparse.Namespace,
) -> tuple[PeftModel, SubspaceProfile, UnlearnResult, dict[str, Any]]:
    """Unlearn the images in a copy of the model, and save the adapter; returns also spectra, the run and the costs."""
    started = time.perf_counter()
    loader = DataLoader(images, batch_size=args.batch_size, shuffle=True)
    objective = OBJECTIVES[objective_name]()
    config = SemuConfig(
        target_modules=args.target_modules or last_layers(model), explained_variance=args.explained_variance
    )
    unlearned = get_peft_model(copy.deepcopy(model), config)
    statistic = Sketch.of_size() if args.accumulate == "sketch" else GradientSum
    profile = initialize_semu_weights(unlearned, loader, objective, statistic=statistic)
    result = unlearn(unlearned, loader, objective, accelerator=accelerator, seed=args.seed)
    seconds = time.perf_counter() - started
    unlearned.save_pretrained(folder)
    costs = {"seconds": seconds, "adapter_bytes": (folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size}
    return unlearned, profile, result, costs


# ---- evidence ----


def attacked(
    model: PeftModel, images: dict[str, Dataset], gold: nn.Module | None, args: argparse.Namespace
) -> AttackReport:
    """What brings the class back: a fast selection of attacks, on the merged weights, which are what is given away."""
    merged = copy.deepcopy(model).merge_and_unload()
    few = {name: DataLoader(Subset(part, range(min(512, len(part)))), batch_size=256) for name, part in images.items()}
    return attack(
        merged, few["forget"], few["retain"], few["test"], reference=gold, forget_test=few["forgotten_test"],
        attackers=[objectives.Attacker("sgd", 3e-3, steps=50), objectives.Attacker("adam", 1e-3, steps=50)],
        time_limit=args.attack_seconds, seed=args.seed,
    )  # fmt: skip


def write_table(rows: dict[str, ForgettingMetrics], reference: str | None, output: Path) -> str:
    """Write the table as JSON and Markdown, and return it as text."""
    if reference is not None:
        comparison = ForgettingComparison(rows, reference)
        comparison.save(output / "metrics.json")
        text, markdown = str(comparison), comparison.to_markdown()
    else:  # no retrained model, so no gap to it
        content = {"reference": None, "rows": {name: dataclasses.asdict(row) for name, row in rows.items()}}
        (output / "metrics.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        heads = [field.name for field in dataclasses.fields(ForgettingMetrics)]
        lines = [["model", *heads], ["---"] * (len(heads) + 1)]
        lines += [[name, *(cell(getattr(row, head)) for head in heads)] for name, row in rows.items()]
        text = markdown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    (output / "metrics.md").write_text(markdown + "\n", encoding="utf-8")
    return text


def cell(value: float | tuple[float, ...] | None) -> str:
    """A number, or the ends of an interval."""
    return "–".join(f"{each or 0:.6g}" for each in (value if isinstance(value, tuple) else (value,)))


@torch.no_grad()
def prove(model: PeftModel, original: PreTrainedModel, pixel_values: Tensor, output: Path) -> None:
    """Ship the adapter in every form and check that all give the same logits. Merges it into the model at the end."""
    model, original = model.cpu().eval(), original.cpu().eval()  # one device, so that nothing else differs
    base = original.name_or_path
    wanted = model(pixel_values=pixel_values).logits
    with model.disable_adapter():
        switched_off = model(pixel_values=pixel_values).logits
    stock = AutoModelForImageClassification.from_pretrained(base)
    reloaded = PeftModel.from_pretrained(stock, output / "adapter").eval()
    lora, merged = save_as_lora(model, output / "lora"), output / "merged"
    model.merge_and_unload().save_pretrained(merged)
    inputs, outputs = output / "proof-inputs.safetensors", output / "proof-outputs.safetensors"
    save_file({"pixel_values": pixel_values}, inputs)
    python = [sys.executable, "-W", "ignore::FutureWarning", "-c", STOCK_PROGRAM]
    subprocess.run([*python, base, lora, merged, inputs, outputs], check=True)
    elsewhere = load_file(outputs)

    allowed = 1e-5 * max(1.0, wanted.abs().max().item())
    differences = {}
    for name, logits, expected, tolerance in (
        ("switched off: the original, bit for bit", switched_off, original(pixel_values=pixel_values).logits, 0.0),
        ("saved, reloaded onto a stock model", reloaded(pixel_values=pixel_values).logits, wanted, allowed),
        ("as LoRA, in a process without semu_peft", elsewhere["lora"], wanted, allowed),
        ("merged, stock checkpoint, that process", elsewhere["merged"], wanted, allowed),
    ):
        differences[name] = (logits - expected).abs().max().item()
        print(f"   {name:<40} max |difference| {differences[name]:.1e}, allowed {tolerance:.1e}")
        if not differences[name] <= tolerance:
            sys.exit(f"{name}: outputs differ by {differences[name]:.1e}, more than {tolerance:.1e}.")
    (output / "proofs.json").write_text(json.dumps(differences, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    args = parse_args()
    started = time.perf_counter()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT's affair
    disable_progress_bar()
    datasets.disable_progress_bars()
    loaders = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed)
    accelerator = Accelerator(cpu=args.device == "cpu", dataloader_config=loaders)
    device, output = accelerator.device, args.output_dir
    output.mkdir(parents=True, exist_ok=True)

    print("The model that knows all classes")
    train_rows, test_rows, names = read_images(args.data, args.seed)
    set_seed(args.seed)
    example = read_image(train_rows, 0)
    model = load_model(args.model, "--model") if args.model else small_model(example, names)
    classes, names = match_classes(names, model)
    prepare = image_preparation(model, example)
    train_images, test_images = (
        PreparedImages(part, torch.tensor(classes)[torch.tensor(part["label"])], prepare)
        for part in (train_rows, test_rows)
    )
    wanted = args.forget_class or ("3" if args.data is None else "")
    if wanted not in names and not (wanted.isdecimal() and int(wanted) < len(names)):
        sys.exit(f"--forget-class: {wanted!r} is none of the classes {names}.")
    forgotten = names.index(wanted) if wanted in names else int(wanted)
    images = {
        "forget": train_images.where(train_images.labels == forgotten),
        "retain": train_images.where(train_images.labels != forgotten),
        "test": test_images.where(test_images.labels != forgotten),
        "forgotten_test": test_images.where(test_images.labels == forgotten),
    }
    if empty := [name for name, part in images.items() if not len(part)]:
        sys.exit(f"--forget-class: too few images of {names[forgotten]!r} or of the others: none for {empty}.")
    if not args.model:
        train(model.to(device), train_images, args.train_epochs, args.seed, "Training")
        model.save_pretrained(output / "original")
        model = load_model(output / "original", "--output-dir")  # now it has a name, which the adapter's file tells
    model.to(device)

    def measured(candidate: nn.Module, **costs: Any) -> ForgettingMetrics:
        parts = {name: DataLoader(part, batch_size=256) for name, part in images.items()}
        return evaluate_forgetting(candidate, **parts, **costs)

    rows = {"original": measured(model, trainable_parameters=0)}

    print(f"Forgetting {names[forgotten]!r} with its {len(images['forget'])} training images alone")
    adapter = output / "adapter"
    unlearned, profile, result, costs = forget(model, images["forget"], args.method, adapter, accelerator, args)
    rows[f"SEMU, {args.method}"] = measured(unlearned, **costs)
    if args.method != "random-label":
        folder = output / "adapter-random-label"
        other, _, _, costs = forget(model, images["forget"], "random-label", folder, accelerator, args)
        rows["SEMU, random-label (paper)"] = measured(other, **costs)

    reference = gold = None
    epochs = args.retrain if args.retrain is not None else 0 if args.model else args.train_epochs
    if args.reference or epochs:
        print("The model that never saw it")
        reference = "retrained"
        set_seed(args.seed)
        new = AutoModelForImageClassification.from_config
        gold = (load_model(args.reference, "--reference") if args.reference else new(model.config)).to(device)
        seconds = None if args.reference else train(gold, images["retain"], epochs, args.seed, "Retraining")
        rows[reference] = measured(gold, seconds=seconds)

    print("What brings it back")
    tried = attacked(unlearned, images, gold, args)
    table = write_table(rows, reference, output)
    tests = DataLoader(test_images, batch_size=256)
    before, after = (predict(candidate, tests) for candidate in (model, unlearned))
    plot_confusion(before, after, output / "confusion.png", class_names=names, forgotten=forgotten)
    plot_spectra(profile, output / "spectra.png")
    profile.save(output / "profile.safetensors")
    audit(
        f"Forget the class {names[forgotten]!r} of an image classifier.",
        title=f"What was forgotten: {names[forgotten]}",
        model=unlearned,
        data={name: DataLoader(part, batch_size=256) for name, part in images.items()},
        adapter_file=adapter,
        settings={"objective": OBJECTIVES[args.method](), "batch_size": args.batch_size, "seed": args.seed},
        profile=profile,
        training=result,
        metrics=ForgettingComparison(rows, reference) if reference else rows,
        attacks=tried,
        predictions=(before, after),
        class_names=names,
        forgotten=forgotten,
    ).write_all(output)

    print("What ships, compared with the adapter in memory")
    shown = [
        part[index]["pixel_values"]
        for part in (images["forgotten_test"], images["test"])
        for index in range(min(32, len(part)))
    ]
    prove(unlearned, model, torch.stack(shown), output)

    print(f"\n{table}\n\n{tried}\n\nDone in {time.perf_counter() - started:.0f} s. Written to {output}:")
    for path, content in WRITTEN.items():
        if (output / path).exists():
            print(f"   {path:<24}{content}")


if __name__ == "__main__":
    main()
