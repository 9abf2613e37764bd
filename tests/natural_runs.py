"""A network that knows its 64 examples, one class of which natural gradients make it forget."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from semu_peft import SemuConfig, initialize_semu_weights
from semu_peft.objectives import Objective

INPUTS, LABELS = torch.randn(64, 8, generator=torch.Generator().manual_seed(5)), torch.arange(64) % 4
FORGET, KEEP = [(INPUTS[LABELS == 1], LABELS[LABELS == 1])], [(INPUTS[LABELS != 1], LABELS[LABELS != 1])]


def classifier(seed: int = 0) -> nn.Module:
    """A network that knows its 64 examples."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(net(INPUTS), LABELS).backward()
        optimizer.step()
    return net.eval()


NET = classifier()


def adapted(objective: Objective, batches: list[Any] = FORGET, net: nn.Module = NET, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = SemuConfig(**{"target_modules": ["0", "2", "4"], "explained_variance": 0.99, **options})
    model = get_peft_model(copy.deepcopy(net), config)
    initialize_semu_weights(model, batches, objective, progress=False)
    return model


def probability(model: nn.Module, batches: list[Any]) -> float:
    with torch.no_grad():
        (inputs, labels), *_ = batches
        return model(inputs).softmax(-1).gather(1, labels.unsqueeze(1)).mean().item()


def accuracy(model: nn.Module, batches: list[Any]) -> float:
    with torch.no_grad():
        (inputs, labels), *_ = batches
        return (model(inputs).argmax(-1) == labels).float().mean().item()
