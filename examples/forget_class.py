"""Forget one class of an image classifier, from a stock model to a shipped adapter.

    python examples/forget_class.py
    python examples/forget_class.py --data photos/ --model my-classifier/ --forget-class cat --retrain 30

Without arguments, a small vision transformer is trained on scikit-learn's handwritten digits and forgets the 3s. No
image of another class is used for that. A table sets the result beside the original model and beside one retrained
without the class; then the adapter is saved, reloaded, exported as a LoRA and merged, and each form is shown to give
the same outputs. Everything is read from disk: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from peft import PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from semu_peft import SemuConfig, SubspaceProfile, initialize_semu_weights, objectives, save_as_lora, unlearn
from semu_peft.evaluation import ForgettingComparison, ForgettingMetrics, Predictions, evaluate_forgetting, predict
from semu_peft.report import plot_confusion, plot_spectra

OBJECTIVES: dict[str, Callable[[], objectives.Objective]] = {
    "decoupled-distillation": objectives.DecoupledDistillation,
    "random-label": objectives.RandomLabel,  # the paper's
    "inverted-hinge": objectives.InvertedHinge,
    "uniform-distribution": objectives.UniformDistribution,
    "gradient-ascent": objectives.GradientAscent,
}
KEPT_BYTES = 2**30  # prepared images stay in memory if all of them take no more than this

# Runs where semu_peft is never imported: what is shipped needs transformers and PEFT alone.
STOCK_PROGRAM = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

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

    def add(name: str, help: str, **settings: Any) -> None:
        parser.add_argument(name, help=f"{help} (default: {settings.get('default')})", **settings)

    add("--data", "folder of images whose subfolders are the classes, or a parquet file or folder; else digits", type=Path)
    add("--model", "folder of an AutoModelForImageClassification; else a small one is trained", type=Path)
    add("--gold", "folder of that model trained without the class, to compare with", type=Path)
    add("--train-epochs", "epochs of training the small model", type=int, default=25)
    add("--retrain", "epochs of training the comparison, 0: none; by default as the small model; 0 with --model", type=int)
    add("--forget-class", "name or index of the class; by default the digit 3")
    add("--objective", "what to minimise on the class's images", choices=OBJECTIVES, default="decoupled-distillation")
    add("--target-modules", "layers to correct: a regular expression of names, or all-linear", default="all-linear")
    add("--explained-variance", "share of each gradient's energy to keep, in (0, 1]", type=float, default=0.3)
    add("--learning-rate", "of unlearning; it falls linearly to 0", type=float, default=1e-2)
    add("--epochs", "passes over the images to forget", type=int, default=10)
    add("--batch-size", "images to forget per step", type=int, default=64)
    add("--seed", "of the split, the training and the unlearning", type=int, default=0)
    add("--device", "cpu, or what Accelerate finds", choices=["auto", "cpu"], default="auto")
    add("--output", "folder for all that is written", type=Path, default=Path("runs/forget_class"))
    return parser.parse_args()


# ---- the images ----


class PreparedImages(Dataset):
    """Images as a model wants them: `{"pixel_values": (channels, height, width), "labels": class}`."""

    def __init__(self, images: datasets.Dataset, labels: Tensor, prepare: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.labels, self.prepare = images, labels, prepare
        self.kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pixels = self.kept.get(index)
        if pixels is None:
            pixels = self.prepare(self.images[index]["image"])
            if len(self) * pixels.nbytes <= KEPT_BYTES:
                self.kept[index] = pixels
        return {"pixel_values": pixels, "labels": self.labels[index]}


def read_images(path: Path | None, seed: int) -> tuple[datasets.Dataset, datasets.Dataset, list[str]]:
    """The training images, the test images (columns `image` and `label`), and the names of the labels."""
    if path is None:
        digits = load_digits()
        images = [Image.fromarray(image) for image in (digits.images * 255 / 16).round().astype(np.uint8)]
        splits = {"train": datasets.Dataset.from_dict({"image": images, "label": digits.target})}
    elif path.is_file() and path.suffix == ".parquet":
        splits = datasets.load_dataset("parquet", data_files={"train": str(path)})
    elif path.is_dir():
        kind = "parquet" if any(path.rglob("*.parquet")) else "imagefolder"
        try:
            splits = datasets.load_dataset(kind, data_dir=str(path))
        except (FileNotFoundError, ValueError) as error:
            sys.exit(f"--data: {path} holds no images and no parquet files: {error}.")
    else:
        sys.exit(f"--data: {path} is no folder and no parquet file.")
    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    features = train.features
    image = next((n for n, f in features.items() if isinstance(f, datasets.Image) or "bytes" in f), None)
    integers = [name for name, feature in features.items() if "int" in (getattr(feature, "dtype", None) or "")]
    label = next((name for name in integers if "label" in name or len(integers) == 1), None)
    if image is None or label is None:
        sys.exit(f"--data: {path} has the columns {features}; expected one of images and one of integer labels "
                 "(in an image folder: at least two subfolders, the classes).")  # fmt: skip

    labels = list(train[label])
    names = getattr(features[label], "names", None) or [str(index) for index in range(max(labels) + 1)]
    test = next((splits[name] for name in ("test", "validation") if name in splits and splits[name] is not train), None)
    if test is None:
        if min(labels.count(index) for index in set(labels)) < 2 or len(labels) < 4 * len(names):
            sys.exit(f"--data: {len(labels)} images are too few to test on a quarter of each of {len(names)} classes.")
        parts = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=seed)
        train, test = (train.select(part) for part in parts)
    pair = [part.select_columns([image, label]).rename_columns({image: "image", label: "label"}) for part in (train, test)]
    return *(part.cast_column("image", datasets.Image()) for part in pair), names


def prepare_images(
    images: datasets.Dataset, names: list[str], model: PreTrainedModel, processor: Callable[..., Any] | None
) -> PreparedImages:
    """Bring images to a model's input size, and their labels to its numbers for the classes."""
    config = model.config
    if set(names) <= set(config.label2id):
        classes = [config.label2id[name] for name in names]
    elif all(name.isdecimal() for name in names):
        classes = [int(name) for name in names]  # folders come in the order 0, 1, 10, 2
    elif all(name.startswith("LABEL_") for name in config.label2id):
        classes = list(range(len(names)))
    else:
        sys.exit(f"--data: its classes {names} are not those of --model: {list(config.label2id)}.")
    if max(classes) >= config.num_labels:
        sys.exit(f"--model: it has {config.num_labels} classes, fewer than --data: {names}.")
    channels = getattr(config, "num_channels", 3)
    size = getattr(config, "image_size", None) or images[0]["image"].size[::-1]
    height, width = (size, size) if isinstance(size, int) else size

    def prepare(image: Image.Image) -> Tensor:
        image = image.convert("L" if channels == 1 else "RGB")
        if processor is not None:
            return processor(image, return_tensors="pt")["pixel_values"][0]
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 127.5 - 1
        return torch.from_numpy(pixels).reshape(height, width, channels).permute(2, 0, 1).contiguous()

    return PreparedImages(images, torch.tensor(classes)[torch.tensor(images["label"])], prepare)


# ---- the models ----


def small_model(example: Image.Image, names: list[str]) -> PreTrainedModel:
    """An untrained vision transformer for images like this one, scaled to 32 pixels a side at the most."""
    side = max(4, min(32, *example.size) // 4 * 4)
    return AutoModelForImageClassification.from_config(
        ViTConfig(
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
    )


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


def forget(
    original: PreTrainedModel, images: Dataset, name: str, accelerator: Accelerator, args: argparse.Namespace
) -> tuple[PeftModel, SubspaceProfile, dict[str, Any]]:
    """Unlearn images in a copy of the model: that copy with its adapter, what the initialisation found, the costs."""
    started = time.perf_counter()
    objective = OBJECTIVES[name]()
    loader = DataLoader(images, batch_size=args.batch_size, shuffle=True)
    config = SemuConfig(target_modules=args.target_modules, explained_variance=args.explained_variance)
    model = get_peft_model(copy.deepcopy(original), config)
    profile = initialize_semu_weights(model, loader, objective)
    unlearn(
        model,
        loader,
        objective,
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        scheduler=lambda optimizer, steps: get_linear_schedule_with_warmup(optimizer, 0, steps),
        accelerator=accelerator,
        seed=args.seed,
    )
    seconds = time.perf_counter() - started
    folder = args.output / f"adapter-{name}"
    model.save_pretrained(folder)
    return model, profile, {"seconds": seconds, "adapter_bytes": (folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size}


# ---- the evidence ----


def measure(
    model: torch.nn.Module, train: Dataset, test: Dataset, forgotten: int, **costs: Any
) -> tuple[ForgettingMetrics, Predictions]:
    """The metrics of a model, and its predictions on all test images."""
    on_train, on_test = (
        predict(model, DataLoader(images, batch_size=256), progress=True, name=f"{name} images")
        for name, images in (("training", train), ("test", test))
    )

    def part(all_: Predictions, chosen: Tensor) -> Predictions:
        return Predictions(all_.labels[chosen], all_.predicted[chosen], all_.confidence[chosen], all_.num_classes)

    metrics = evaluate_forgetting(
        model,
        forget=part(on_train, on_train.labels == forgotten),
        retain=part(on_train, on_train.labels != forgotten),
        test=part(on_test, on_test.labels != forgotten),
        forgotten_test=part(on_test, on_test.labels == forgotten),
        **costs,
    )
    return metrics, on_test


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
        lines += [[name, *(f"{getattr(row, head) or 0:.6g}" for head in heads)] for name, row in rows.items()]
        text = markdown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    (output / "metrics.md").write_text(markdown + "\n", encoding="utf-8")
    return text


@torch.no_grad()
def prove(model: PeftModel, original: PreTrainedModel, adapter: Path, pixel_values: Tensor, output: Path) -> None:
    """Ship the adapter in every form and check that all give the same logits. Merges the adapter into the model."""
    model, original = model.cpu().eval(), original.cpu().eval()  # on one device, so that nothing else differs
    base = original.name_or_path
    wanted = model(pixel_values=pixel_values).logits
    with model.disable_adapter():
        switched_off = model(pixel_values=pixel_values).logits
    reloaded = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(base), adapter).eval()
    lora = save_as_lora(model, output / "lora")
    merged, inputs, outputs = output / "merged", output / "proof-inputs.safetensors", output / "proof-outputs.safetensors"
    model.merge_and_unload().save_pretrained(merged)
    save_file({"pixel_values": pixel_values}, inputs)
    subprocess.run([sys.executable, "-c", STOCK_PROGRAM, base, lora, merged, inputs, outputs], check=True)
    stock = load_file(outputs)

    scale = max(1.0, wanted.abs().max().item())
    differences = {}
    for name, logits, expected, tolerance in (
        ("adapter switched off: the original model", switched_off, original(pixel_values=pixel_values).logits, 0),
        ("adapter reloaded onto the stock model", reloaded(pixel_values=pixel_values).logits, wanted, 1e-5 * scale),
        ("LoRA, in a process without semu_peft", stock["lora"], wanted, 1e-5 * scale),
        ("merged checkpoint, in the same process", stock["merged"], wanted, 1e-5 * scale),
    ):
        differences[name] = (logits - expected).abs().max().item()
        print(f"  {name:<42} max |difference| {differences[name]:.1e} (allowed {tolerance:.1e})")
        if not differences[name] <= tolerance:
            sys.exit(f"{name}: the outputs differ by {differences[name]:.1e}, more than {tolerance:.1e}.")
    (output / "proofs.json").write_text(json.dumps(differences, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    args = parse_args()
    started = time.perf_counter()
    disable_progress_bar()
    datasets.disable_progress_bars()
    loaders = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed)
    accelerator = Accelerator(cpu=args.device == "cpu", dataloader_config=loaders)
    device, output = accelerator.device, args.output
    output.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)

    print("1. The model that knows all classes")
    train_rows, test_rows, names = read_images(args.data, args.seed)
    model = load_model(args.model, "--model") if args.model else small_model(train_rows[0]["image"], names)
    has_processor = args.model and (args.model / "preprocessor_config.json").is_file()
    processor = AutoImageProcessor.from_pretrained(args.model) if has_processor else None
    train_images, test_images = (prepare_images(rows, names, model, processor) for rows in (train_rows, test_rows))
    forgotten, name = find_class(args, model, names)
    chosen = train_images.labels == forgotten
    forget_images, retain_images = (Subset(train_images, part.nonzero().flatten().tolist()) for part in (chosen, ~chosen))
    untested = not (test_images.labels == forgotten).any() or (test_images.labels == forgotten).all()
    if untested or not len(forget_images) or not len(retain_images):
        sys.exit(f"--forget-class: {name!r} and the other classes need training and test images each.")
    base = args.model or output / "original"
    if not args.model:
        train(model.to(device), train_images, args.train_epochs, args.seed, "Training")
        model.save_pretrained(base)
        model = load_model(base, "--output")  # so that the adapter's configuration names its base model
    model.to(device)

    def measured(candidate: torch.nn.Module, **costs: Any) -> tuple[ForgettingMetrics, Predictions]:
        return measure(candidate, train_images, test_images, forgotten, **costs)

    rows: dict[str, ForgettingMetrics] = {}
    rows["original"], before = measured(model, trainable_parameters=0)

    print(f"2. Forgetting {name!r} with {len(forget_images)} images of it, none of the other classes")
    unlearned, profile, costs = forget(model, forget_images, args.objective, accelerator, args)
    rows[f"SEMU {args.objective}"], after = measured(unlearned, **costs)
    if args.objective != "random-label":
        other, _, costs = forget(model, forget_images, "random-label", accelerator, args)
        rows["SEMU random-label (the paper's)"], _ = measured(other, **costs)

    print("3. The model that never saw it")
    epochs = args.retrain if args.retrain is not None else 0 if args.model else args.train_epochs
    reference = "retrained" if args.gold or epochs else None
    if reference:
        set_seed(args.seed)
        gold = load_model(args.gold, "--gold") if args.gold else AutoModelForImageClassification.from_config(model.config)
        gold.to(device)
        seconds = None if args.gold else train(gold, retain_images, epochs, args.seed, "Retraining")
        rows[reference], _ = measured(gold, seconds=seconds)
        
    table = write_table(rows, reference, output)
    print("4. What ships")
    proof_images = torch.stack([test_images[index]["pixel_values"] for index in range(min(64, len(test_images)))])
    prove(unlearned, model, output / f"adapter-{args.objective}", proof_images, output)
    class_names = ...
    plot_confusion(before, after, output / "confusion.png", class_names=..., forgotten=forgotten)
    plot_spectra(profile, output / "spectra.png")
    print(table)
    print(f"Written to {output}: ")


if __name__ == "__main__":
    main()
