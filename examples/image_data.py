"""Images for the examples: from scikit-learn's digits, an image folder or parquet files into a model's input form."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import AutoImageProcessor, PreTrainedModel


class PreparedImages(Dataset):
    """Images as a model wants them, kept in memory once prepared if all of them fit into 1 GB."""

    def __init__(self, images: datasets.Dataset, labels: Tensor, prepare: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.labels, self.prepare = images, labels, prepare
        self.kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pixels = self.kept.get(index)
        if pixels is None:
            pixels = self.prepare(read_image(self.images, index))
            if len(self) * pixels.nbytes <= 2**30:
                self.kept[index] = pixels
        return {"pixel_values": pixels, "labels": self.labels[index]}

    def where(self, chosen: Tensor) -> Subset:
        return Subset(self, chosen.nonzero().flatten().tolist())


def read_image(images: datasets.Dataset, index: int) -> Image.Image:
    try:
        return images[index]["image"]
    except OSError as error:
        sys.exit(f"--data: image {index} of {len(images)} cannot be read: {error}")


def is_image(feature: object) -> bool:
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and {"bytes", "path"} <= set(feature))


def read_images(path: Path | None, seed: int) -> tuple[datasets.Dataset, datasets.Dataset, list[str]]:
    """The training images, the test images (columns `image` and `label`), and the names of the labels."""
    if path is None:
        digits = load_digits()
        images = [Image.fromarray(image) for image in (digits.images * 255 / 16).round().astype(np.uint8)]
        splits = {"train": datasets.Dataset.from_dict({"image": images, "label": digits.target})}
    elif path.is_dir() or (path.is_file() and path.suffix == ".parquet"):
        parquet = path.is_file() or any(path.rglob("*.parquet"))
        files = {"data_files": {"train": str(path)}} if path.is_file() else {"data_dir": str(path)}
        try:
            splits = datasets.load_dataset("parquet" if parquet else "imagefolder", **files)
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            sys.exit(f"--data: {path} holds no readable {'parquet file' if parquet else 'images'}: {error}")
    else:
        sys.exit(f"--data: {path} is no folder and no parquet file.")

    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    test = next((splits[name] for name in ("test", "validation") if name in splits and splits[name] is not train), None)
    features = train.features
    image = next((name for name, f in features.items() if is_image(f)), None)
    integers = [name for name, feature in features.items() if "int" in (getattr(feature, "dtype", None) or "")]
    label = next((name for name in integers if "label" in name or len(integers) == 1), None)
    if image is None or label is None:
        sys.exit(f"--data: {path} has the columns {dict(features)}; expected images and integer labels (in a folder "
                 "of images: two subfolders or more, named like the classes).")  # fmt: skip
    labels = list(train[label])
    found = {*labels, *(test[label] if test is not None else ())}
    if not found or None in found or min(found) < 0:
        sys.exit(f"--data: column {label!r} of {path} has no, missing or negative labels; expected classes from 0 on.")
    names = getattr(features[label], "names", None) or [str(index) for index in range(max(found) + 1)]
    if test is None:
        if min(labels.count(index) for index in set(labels)) < 2 or len(labels) < 4 * len(names):
            sys.exit(f"--data: {len(labels)} images are too few to test on a quarter of each of {len(names)} classes.")
        parts = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=seed)
        train, test = (train.select(part) for part in parts)
    columns = {image: "image", label: "label"}
    train, test = (part.select_columns(list(columns)).rename_columns(columns) for part in (train, test))
    return train.cast_column("image", datasets.Image()), test.cast_column("image", datasets.Image()), names


def match_classes(names: list[str], model: PreTrainedModel) -> tuple[list[int], list[str]]:
    """The model's number for each label of the data, and a name for each class of the model."""
    known = [name for _, name in sorted(model.config.id2label.items())]
    unnamed = all(name.startswith("LABEL_") for name in known)
    if set(names) <= set(known):
        classes = [known.index(name) for name in names]
    elif all(name.isdecimal() for name in names):
        classes = [int(name) for name in names]  # folders come in the order 0, 1, 10, 2
    elif unnamed:
        classes = list(range(len(names)))
    else:
        sys.exit(f"--data: its classes {names} are not those of --model: {known}.")
    if max(classes) >= len(known):
        sys.exit(f"--model: it has {len(known)} classes, too few for those of --data: {names}.")
    if unnamed:
        for index, name in zip(classes, names, strict=True):
            known[index] = name
    return classes, known


def image_preparation(model: PreTrainedModel, example: Image.Image) -> Callable[[Image.Image], Tensor]:
    """What brings an image into the model's form: its own processor, or else scaling to its size and to [-1, 1]."""
    channels = getattr(model.config, "num_channels", 3)
    size = getattr(model.config, "image_size", None) or example.size[::-1]
    height, width = (size, size) if isinstance(size, int) else size
    has_processor = Path(model.name_or_path, "preprocessor_config.json").is_file()
    processor = AutoImageProcessor.from_pretrained(model.name_or_path) if has_processor else None

    def prepare(image: Image.Image) -> Tensor:
        image = image.convert("L" if channels == 1 else "RGB")
        if processor is not None:
            return processor(image, return_tensors="pt")["pixel_values"][0]
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 127.5 - 1
        return torch.from_numpy(pixels).reshape(height, width, channels).permute(2, 0, 1).contiguous()

    return prepare
