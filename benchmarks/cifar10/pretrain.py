"""Train the original and the gold models from scratch, once: every later run reads them from the cache."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from resnet import ResNet
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from tqdm import tqdm


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: SGD with Nesterov momentum and a one-cycle learning rate."""

    epochs: int
    augment: bool
    learning_rate: float = 0.4
    batch_size: int = 256
    weight_decay: float = 5e-4


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip half of the batch and shift all of it by up to 3 pixels (one shift a batch, which is free)."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
    dy, dx = torch.randint(0, 7, (2,), generator=generator).tolist()
    return F.pad(images, (3, 3, 3, 3))[:, :, dy : dy + 32, dx : dx + 32]


def train(dataset: TensorDataset, recipe: Recipe, seed: int, compile_model: bool, label: str) -> nn.Module:
    """Train a fresh ResNet on `dataset`; deterministic under `seed` on one machine."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = ResNet().to(memory_format=torch.channels_last)
    forward = torch.compile(model) if compile_model else model
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )
    images, labels = dataset.tensors
    steps_per_epoch = len(images) // recipe.batch_size
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=recipe.epochs * steps_per_epoch, pct_start=0.2
    )
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(images), generator=generator)
        bar = tqdm(range(steps_per_epoch), desc=f"{label}: epoch {epoch + 1}/{recipe.epochs}", leave=False)
        for step in bar:
            rows = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            batch = augment(images[rows], generator) if recipe.augment else images[rows]
            loss = F.cross_entropy(forward(batch.contiguous(memory_format=torch.channels_last)), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def cached_model(
    cache: Path, name: str, dataset: TensorDataset, recipe: Recipe, seed: int, compile_model: bool = False
) -> nn.Module:
    """Return the model called `name`, from `cache` if a run with the same recipe left it there, else train it."""
    settings = "-".join(f"{key}{value}" for key, value in asdict(recipe).items())
    path = cache / f"{name}-seed{seed}-{settings}-n{len(dataset)}.safetensors"
    if path.is_file():
        model = ResNet()
        model.load_state_dict(load_file(path))
        return model.to(memory_format=torch.channels_last).eval()
    model = train(dataset, recipe, seed, compile_model, name)
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, temporary)
    temporary.rename(path)
    return model
