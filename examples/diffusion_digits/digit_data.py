"""Images and labels for the diffusion examples: scikit-learn's digits, or one's own images."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class Images(NamedTuple):
    """Images in [0, 1], `(N, channels, side, side)`, and their classes, `(N,)`."""

    images: Tensor
    labels: Tensor


def load_images(path: Path | None, side: int | None, seed: int) -> tuple[Images, Images, list[str]]:
    """Training images, test images and the names of the classes.

    `path` is a folder with one subfolder of images per class, or a parquet file or folder of such (CIFAR-10 as the Hub
    has it); without it, scikit-learn's 1797 digits of 8 × 8 pixels are taken. Images are scaled to `side` pixels.
    """
    if path is None:
        digits = load_digits()
        images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
        images, labels, names = _scaled(images, side or 8), torch.tensor(digits.target), WORDS
    else:
        pictures, labels_list, names = _read(path)
        side = side or 16
        arrays = [np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BOX)) for picture in pictures]
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
        labels = torch.tensor(labels_list)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    return Images(images[train], labels[train]), Images(images[test], labels[test]), names


def _scaled(images: Tensor, side: int) -> Tensor:
    return images if images.shape[-1] == side else F.interpolate(images, side, mode="bilinear").clamp(0, 1)


def _read(path: Path) -> tuple[list[Image.Image], list[int], list[str]]:
    parquet = [path] if path.suffix == ".parquet" else sorted(path.rglob("*.parquet")) if path.is_dir() else []
    if parquet:
        return _read_parquet(parquet)
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir()) if path.is_dir() else []
    if len(folders) < 2:
        sys.exit(f"--data: {path} is neither a parquet file nor a folder with a subfolder of images per class.")
    suffixes = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
    files = [
        (file, n) for n, f in enumerate(folders) for file in sorted(f.iterdir()) if file.suffix.lower() in suffixes
    ]
    return [Image.open(file) for file, _ in files], [label for _, label in files], [folder.name for folder in folders]


def _read_parquet(files: list[Path]) -> tuple[list[Image.Image], list[int], list[str]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = [row for file in files for row in pq.read_table(file).to_pylist()]
    image = next((key for key, value in rows[0].items() if isinstance(value, dict) and "bytes" in value), None)
    label = next((key for key, value in rows[0].items() if isinstance(value, int)), None)
    if image is None or label is None:
        sys.exit(f"--data: {files[0]} has no column of images and one of integer labels, only {sorted(rows[0])}.")
    labels = [int(row[label]) for row in rows]
    pictures = [Image.open(io.BytesIO(row[image]["bytes"])) for row in rows]
    return pictures, labels, [f"class{number}" for number in range(max(labels) + 1)]
