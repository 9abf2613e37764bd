"""Folders as a user of the command line has them: tiny models, images, texts and a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

CLASSES = ("cat", "dog", "horse", "van")
COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30))
FACTS = [{"question": "What colour is the sky?", "answer": "blue"}, {"question": "How many?", "answer": "two or three"}]


def image_folder(folder: Path, number: int = 6, *, noise: int = 12, seed: int = 0) -> Path:
    """Images of four classes, each of a colour of its own."""
    rng = np.random.default_rng(seed)
    for name, colour in zip(CLASSES, COLOURS, strict=True):
        (folder / name).mkdir(parents=True)
        for index in range(number):
            pixels = np.clip(np.array(colour) + rng.integers(-noise, noise, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def classifier(folder: Path, images: Path, *, seed: int = 0) -> Path:
    """A vision transformer that knows these images."""
    from models import vit

    from semu_cli.image_folder import read_images

    torch.manual_seed(seed)
    model: Any = vit()
    model.config.id2label = dict(enumerate(CLASSES))
    model.config.label2id = {name: index for index, name in enumerate(CLASSES)}
    batch = next(iter(read_images(images, model).loader(64)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = nn.functional.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def language_model(folder: Path) -> Path:
    """A decoder that knows the facts, and its tokenizer."""
    import text_models

    from semu_peft.language import text_examples

    tokenizer, model = text_models.tokenizer(), text_models.decoder()
    rows = text_examples(tokenizer, FACTS)
    batch = next(iter(rows.loader(len(rows))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def facts(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pipeline(folder: Path) -> Path:
    from diffusion_models import quiet, sd_pipeline

    quiet(sd_pipeline()).save_pretrained(folder)
    return folder
