"""Train the original and the gold models from scratch, once: every later run reads them from the cache."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from resnet import ResNet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
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

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=self.weight_decay)

    def augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Flip half of the batch and shift all of it by up to 3 pixels (one shift a batch, which is free)."""
        device = generator.device
        flip = torch.rand(len(images), generator=generator, device=device) < 0.5
        images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
        dy, dx = torch.randint(0, 7, (2,), generator=generator, device=device).tolist()
        return F.pad(images, (3, 3, 3, 3))[:, :, dy : dy + 32, dx : dx + 32]


@contextmanager
def _tuned_convolutions() -> Iterator[None]:
    """Let cuDNN look for its fastest algorithms, which pays where all batches are of one size."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@_tuned_convolutions()
def train(
    dataset: TensorDataset,
    recipe: Recipe,
    seed: int,
    compile_model: bool,
    label: str,
    build: Callable[[], nn.Module] = ResNet,
) -> nn.Module:
    """Train a fresh model where `dataset` lies; deterministic under `seed` on one CPU. A GPU computes in bfloat16."""
    images, labels = dataset.tensors
    device, on_gpu = images.device, images.is_cuda
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    model = build().to(device, memory_format=torch.channels_last)
    forward = torch.compile(model) if compile_model else model
    optimizer = recipe.optimizer(model)
    steps_per_epoch = len(images) // recipe.batch_size
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=recipe.epochs * steps_per_epoch, pct_start=0.2
    )
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(images), generator=generator, device=device)
        bar = tqdm(
            range(steps_per_epoch), desc=f"{label}: epoch {epoch + 1}/{recipe.epochs}", leave=False, disable=None
        )
        for step in bar:
            rows = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            batch = recipe.augmented(images[rows], generator) if recipe.augment else images[rows]
            batch = batch.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                output = forward(batch)
                loss = F.cross_entropy(getattr(output, "logits", output), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            if step % 10 == 0 and not bar.disable:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def cached_model(
    cache: Path,
    name: str,
    dataset: TensorDataset,
    recipe: Recipe,
    seed: int,
    compile_model: bool = False,
    build: Callable[[], nn.Module] = ResNet,
    before_training: Callable[[], None] = lambda: None,
) -> nn.Module:
    """Return the model called `name`, from `cache` if a run with the same recipe left it there, else train it.

    Where another process trains it already, wait for that. It lies where `dataset` does. `before_training` may raise to
    leave the training out.
    """
    settings = "-".join(f"{key}{value}" for key, value in asdict(recipe).items())
    path = cache / f"{name}-seed{seed}-{settings}-n{len(dataset)}.safetensors"
    cache.mkdir(parents=True, exist_ok=True)
    with only_process(path.with_suffix(".lock")):
        if path.is_file():
            model = build()
            model.load_state_dict(load_file(path))
            return model.to(dataset.tensors[0].device, memory_format=torch.channels_last).eval()
        before_training()
        model = train(dataset, recipe, seed, compile_model, name, build)
        temporary = path.with_suffix(".partial")
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, temporary)
        temporary.rename(path)
    return model


@contextmanager
def only_process(path: Path) -> Iterator[None]:
    """Wait until no other process is in here; one that dies is out."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
