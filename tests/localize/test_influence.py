"""Influence of examples is retraining without them, where that can be had in closed form."""

from __future__ import annotations

import pytest
import torch
from models import Mlp, vector_batches
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft import SemuConfig, initialize_semu_weights, objectives
from semu_peft.localize import example_influence
from semu_peft.objectives import without_influence


class Ridge(nn.Module):
    """A linear head in float64."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def fitted(x: Tensor, y: Tensor, damping: float) -> Ridge:
    targets = F.one_hot(y, 3).double()
    return Ridge(torch.linalg.solve(x.mT @ x + damping * torch.eye(x.shape[1]).double(), x.mT @ targets))


def ridge_data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(80, 5, generator=draw).double(), torch.randint(3, (80,), generator=draw)


@pytest.mark.parametrize(("removed", "allowed"), [(1, 1e-5), (4, 0.10), (16, 0.27)])
def test_of_a_ridge_regression(removed: int, allowed: float) -> None:
    """Acceptance of DMM: exact for one example; for 16 of 80 within 27% of what doing nothing is off by."""
    x, y = ridge_data()
    model = fitted(x, y, 2.0)
    forget = [(x[:removed], y[:removed])]
    tau = example_influence(model, [(x, y)], forget, [(x, y)], output="gaussian", damping=2.0, progress=False)
    told, gold = without_influence(model(x).detach(), tau), fitted(x[removed:], y[removed:], 2.0)(x)
    nothing = (model(x) - gold).norm()
    assert ((told - gold).norm() / nothing).item() < allowed


def logistic(x: Tensor, y: Tensor, damping: float) -> Ridge:
    model = Ridge(torch.zeros(x.shape[1], 3, dtype=torch.float64))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y, reduction="sum") + damping / 2 * model.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return model


def test_of_a_logistic_regression() -> None:
    """Of each example by itself, within a tenth of what retraining without it changes."""
    x, y = ridge_data()
    model = logistic(x, y, 1.0)
    tau = example_influence(model, [(x, y)], [(x[:5], y[:5])], [(x, y)], damping=1.0, progress=False)
    for number in range(5):
        kept = torch.arange(80) != number
        exact = model(x) - logistic(x[kept], y[kept], 1.0)(x)
        assert ((tau[number] - exact).norm() / exact.norm()).item() < 0.1


def test_projected_gradients_say_nearly_the_same() -> None:
    """At random, to more numbers than there are examples' logits; a seed is a seed."""
    x, y = ridge_data()
    model, data = fitted(x, y, 20.0), [(x[:20], y[:20])]
    exact, first, again = (
        example_influence(
            model, data, data, data, output="gaussian", damping=20.0, projection=size, seed=3, progress=False
        )
        for size in (None, 4000, 4000)
    )
    assert torch.equal(first, again)
    assert ((first - exact).norm() / exact.norm()).item() < 0.2


def test_of_trained_cores() -> None:
    """Only what is trained has influence; modes, flags and gradients stay."""
    torch.manual_seed(0)
    batches = vector_batches(2)
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc2", "head"], r=2))
    initialize_semu_weights(model, batches, objectives.CrossEntropy(), progress=False)
    model.train()
    tau = example_influence(model, batches, batches[:1], batches[1:], progress=False)
    assert tau.shape == (len(batches[0][0]), len(batches[1][0]), 4) and tau.any()
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_mistakes() -> None:
    model, batches = Mlp(), vector_batches(1)
    with pytest.raises(ValueError, match="`output` must be"):
        example_influence(model, batches, batches, batches, output="poisson")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`damping` must be"):
        example_influence(model, batches, batches, batches, damping=0.0)
    with pytest.raises(ValueError, match="`projection` must be at most 8192"):
        example_influence(nn.Linear(100, 100), batches, batches, batches)
    with pytest.raises(ValueError, match="no trainable parameter"):
        example_influence(Mlp().requires_grad_(False), batches, batches, batches)
    with pytest.raises(TypeError, match="`queries` must be a loader or a list"):
        example_influence(model, batches, batches, batches[0][0])
