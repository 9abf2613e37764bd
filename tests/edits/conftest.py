"""A classifier of real digits, of which one is to be forgotten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from semu_peft.gradients.parameters import gather_parameters
from semu_peft.objectives import CrossEntropy


@pytest.fixture(scope="module")
def digits() -> dict[str, Any]:
    """An MLP that knows the digits, the data of one and of the others, and the importances for forgetting it."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    x, order = x.float() / 16, torch.randperm(len(x))
    x, y = x[order][:1300], y[order][:1300]
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(30):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    forget = y == 3
    seen = [
        gather_parameters(model, [(x[part], y[part])], CrossEntropy(), progress=False)
        for part in (forget, torch.ones_like(forget))
    ]

    def accuracies(candidate: nn.Module) -> tuple[float, float]:
        with torch.no_grad():
            right = candidate(x).argmax(1) == y
        return 100 * right[forget].float().mean().item(), 100 * right[~forget].float().mean().item()

    data = [[(x[part], y[part])] for part in (forget, ~forget)]
    return {"model": model, "data": data, "seen": seen, "accuracies": accuracies}
