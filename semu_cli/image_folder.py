"""Folders of images as batches for a classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageFolder:
    """Images with the classes that a model knows them by. It is a data set for a `DataLoader`.

    Attributes:
        files: The images.
        labels: The class of each.
        prepare: Makes an image the model's input.

    Examples:
        >>> len(ImageFolder([Path("a.png")], [3], prepare=lambda image: image))
        1
    """

    files: list[Path]
    labels: list[int]
    prepare: Callable[[Any], Any] = field(repr=False)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch
        from PIL import Image

        try:
            with Image.open(self.files[index]) as image:
                pixels = self.prepare(image)
        except OSError as error:
            raise ValueError(f"{self.files[index]} cannot be read as an image ({error}). Remove or mend it.") from None
        return {"pixel_values": pixels, "labels": torch.tensor(self.labels[index])}

    def loader(self, batch_size: int, *, shuffle: bool = False) -> Any:
        """Batches of them."""
        from torch.utils.data import DataLoader

        return DataLoader(self, batch_size=min(batch_size, len(self)), shuffle=shuffle)  # type: ignore[arg-type]


def read_images(
    path: str | Path, model: Any, name: str = "forget", only: str | None = None, *, original: Any = None
) -> ImageFolder:
    """Read a folder of images: with a subfolder a class, or flat.

    Args:
        path: The folder.
        model: The classifier, which says what its classes are called and what its inputs are like.
        name: The flag, for errors.
        only: Leave all classes but this one out. In a flat folder all images are of it; without it their classes are
            what the original takes them for.
        original: The model before it forgot; by default `model`.

    Raises:
        typer.BadParameter: There are no images, or a class that the model does not have.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise typer.BadParameter(f"`--{name}`: there is no folder {folder}. Give a folder of images.")
    found = {place.name: _images(place) for place in sorted(folder.iterdir()) if place.is_dir()}
    found = {place: files for place, files in found.items() if files}
    prepare = preparation(model)
    if not found:
        files = _images(folder)
        if not files:
            raise typer.BadParameter(f"`--{name}`: {folder} has no images ({', '.join(_SUFFIXES)}). Check the path.")
        label = None if only is None else _numbers([only], model, "forget-class")[0]
        flat = ImageFolder(files, [label or 0] * len(files), prepare)
        return flat if label is not None else ImageFolder(files, _taken_for(original or model, model, files), prepare)
    numbers = dict(zip(found, _numbers(list(found), model, name), strict=True))
    if only is not None and only not in found:
        raise typer.BadParameter(f"`--forget-class` must be one of {', '.join(found)}, got {only!r}.")
    chosen = [(file, numbers[place]) for place, files in found.items() if only in (None, place) for file in files]
    return ImageFolder([file for file, _ in chosen], [label for _, label in chosen], prepare)


def read_others(
    path: str | Path, model: Any, only: str | None, name: str = "retain", *, original: Any = None
) -> ImageFolder | None:
    """Read a folder of images without one class; None where there is no other."""
    folder, every = Path(path), read_images(path, model, name, original=original)
    if only is None:
        return every
    if all(file.parent == folder for file in every.files):
        return None if name == "forget" else every  # flat: of the forgotten class, unless it is given as other data
    kept = [index for index, file in enumerate(every.files) if file.relative_to(folder).parts[0] != only]
    return ImageFolder([every.files[i] for i in kept], [every.labels[i] for i in kept], every.prepare) if kept else None


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())


def _numbers(names: list[str], model: Any, flag: str) -> list[int]:
    """The model's number for each class name."""
    known = {str(name): int(number) for number, name in model.config.id2label.items()}
    if set(names) <= set(known):
        return [known[name] for name in names]
    if all(name.isdecimal() and int(name) < len(known) for name in names):
        return [int(name) for name in names]
    if all(name.startswith("LABEL_") for name in known) and 1 < len(names) <= len(known):
        return list(range(len(names)))  # an unnamed model: the classes in alphabetical order, as data sets have them
    strange = next(name for name in names if name not in known)
    shown = ", ".join(list(known)[:12]) + (", …" if len(known) > 12 else "")
    raise typer.BadParameter(
        f"`--{flag}`: the model has no class {strange!r}. It has: {shown}. Name folders like the model's classes."
    )


def _taken_for(original: Any, model: Any, files: list[Path]) -> list[int]:
    """The model's numbers for the classes that the original takes images for."""
    from semu_peft.evaluation import predict

    images = ImageFolder(files, [0] * len(files), preparation(original))
    found = [int(label) for label in predict(original, images.loader(64), progress=False).predicted]
    names = original.config.id2label
    if names == model.config.id2label:
        return found
    number = dict(zip(names, _numbers([str(name) for name in names.values()], model, "reference"), strict=True))
    return [number[label] for label in found]


def preparation(model: Any) -> Callable[[Any], Any]:
    """What makes an image a model's input: its own processor, or else scaling to its size and to [-1, 1]."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor

    config = model.config
    channels = getattr(config, "num_channels", 3)
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    try:
        processor = AutoImageProcessor.from_pretrained(config.name_or_path or config._name_or_path)
    except (OSError, ValueError):
        processor = None

    def prepare(image: Any) -> Any:
        image = image.convert("L" if channels == 1 else "RGB")
        if processor is not None:
            return processor(image, return_tensors="pt")["pixel_values"][0]
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(resized, dtype=np.float32) / 127.5 - 1
        return torch.from_numpy(pixels).reshape(height, width, channels).permute(2, 0, 1).contiguous()

    return prepare
