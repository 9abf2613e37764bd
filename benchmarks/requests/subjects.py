"""Data of scikit-learn and small models of them, trained on the spot in seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification


@dataclass(frozen=True)
class Data:
    """Inputs and labels, and which of them are trained on; the rest nobody sees before the end."""

    inputs: Tensor
    labels: Tensor
    train: Tensor
    test: Tensor

    def loader(self, chosen: Tensor, batch_size: int = 64) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(self.inputs[chosen], self.labels[chosen]), batch_size)


def split(inputs: Tensor, labels: Tensor, seed: int, held_out_share: float) -> Data:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out = int(len(labels) * held_out_share)
    return Data(inputs, labels, order[held_out:].sort().values, order[:held_out].sort().values)


def digits() -> tuple[Tensor, Tensor]:
    images, labels = (torch.tensor(column) for column in load_digits(return_X_y=True))
    return images.float() / 16, labels


def digit_images() -> tuple[Tensor, Tensor]:
    images, labels = digits()
    return images.view(-1, 1, 8, 8) * 2 - 1, labels


def wine() -> tuple[Tensor, Tensor]:
    return _standardised(*load_wine(return_X_y=True))


def breast_cancer() -> tuple[Tensor, Tensor]:
    return _standardised(*load_breast_cancer(return_X_y=True))


def _standardised(inputs: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.tensor((inputs - inputs.mean(0)) / inputs.std(0)).float(), torch.tensor(labels).long()


def mlp(inputs: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, classes))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def vit(width: int = 48, depth: int = 2) -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            image_size=8, patch_size=2, num_channels=1, hidden_size=width, num_hidden_layers=depth,
            num_attention_heads=4, intermediate_size=2 * width, num_labels=10,
        )
    )  # fmt: skip


def demo_vit() -> nn.Module:
    """The network of `make demo`."""
    return vit(64, 3)


def train(build: Callable[[], nn.Module], data: Data, chosen: Tensor, seed: int, steps: int = 400) -> nn.Module:
    """Train with AdamW on batches of 64 drawn at random: until the training data are known by heart, or nearly."""
    torch.manual_seed(seed)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(steps):
        batch = chosen[torch.randint(len(chosen), (64,))]
        optimizer.zero_grad()
        outputs = model(data.inputs[batch])
        F.cross_entropy(getattr(outputs, "logits", outputs), data.labels[batch]).backward()
        optimizer.step()
    return model.eval()


@dataclass(frozen=True)
class Subject:
    """A data set, a model of it, and the class that it is to forget."""

    load: Callable[[], tuple[Tensor, Tensor]]
    build: Callable[[], nn.Module]
    forget_class: int

    def read(self, seed: int, held_out_share: float = 0.25) -> Data:
        return split(*self.load(), seed, held_out_share)


SUBJECTS = {
    "digits, MLP": Subject(digits, lambda: mlp(64, 10), 3),
    "wine, MLP": Subject(wine, lambda: mlp(13, 3), 1),
    "breast cancer, MLP": Subject(breast_cancer, lambda: mlp(30, 2), 0),
    "digits, conv net": Subject(digit_images, conv_net, 3),
    "digits, ViT": Subject(digit_images, vit, 3),
    "digits, the demo's ViT": Subject(digit_images, demo_vit, 3),
}
