"""CUPID's words: how sharp examples are, which weights serve them, and gradients on two paths."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from semu_peft import unlearn
from semu_peft.objectives import CrossEntropy, GradientAscent
from semu_peft.training.rules import RoutedGradient, Step, causal_mask, example_sharpness


def routed(mask: list[bool], weight: float = 1.0) -> torch.Tensor:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    rule = RoutedGradient({"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor(mask)}, weight)
    rule.gradients(Step(0, nn.Identity(), {"w": parameter}))
    return parameter.grad


def test_the_two_paths_are_orthogonal_and_add_up() -> None:
    along, rest = routed([True, True]), routed([False, False])
    assert along.tolist() == [3.0, 0.0] and rest.tolist() == [0.0, 4.0]
    assert (along @ rest).item() == 0 and (along + rest).tolist() == [3.0, 4.0]
    assert routed([True, False], weight=0.5).tolist() == [1.5, 4.0]


def test_sharpness_of_a_parabola_by_hand_and_the_weights_come_back() -> None:
    class Parabola(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t = nn.Parameter(torch.tensor([1.0]))

    model = Parabola()
    found = example_sharpness(model, [torch.zeros(2, 1)], lambda m, b: m.t.square().sum(), radius=0.1, progress=False)
    assert torch.allclose(found, torch.tensor([0.21, 0.21]), atol=1e-6) and model.t.item() == 1.0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="`causal` must not be zero"):
        RoutedGradient({"w": torch.zeros(2)}, {"w": torch.ones(2).bool()})
    with pytest.raises(ValueError, match="`masks` must be of the same parameters"):
        RoutedGradient({"w": torch.ones(2)}, {})
    rule = RoutedGradient({"w": torch.ones(2)}, {"w": torch.ones(2).bool()})
    data = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
    with pytest.raises(ValueError, match="`causal` must name all that is trained"):
        unlearn(nn.Linear(3, 2), data, GradientAscent(), rules=rule, max_steps=1, learning_rate=0.1, progress=False)
    with pytest.raises(ValueError, match="`curvature` must be of some"):
        causal_mask({}, {"w": torch.ones(2)})


def test_among_the_sharpest_the_examples_without_the_shortcut_are_many_times_as_frequent() -> None:
    """Digits whose corner pixel tells the class but for one example in twenty."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = (torch.tensor(column) for column in datasets.load_digits(n_class=2, return_X_y=True))
    x = x.float() / 16
    generator = torch.Generator().manual_seed(0)
    conflicting = torch.rand(len(y), generator=generator) < 0.05
    x[:, 0] = torch.where(conflicting, 1 - y, y).float() * 3
    x[:, 1:] += 0.6 * torch.randn(len(x), 63, generator=generator)  # the digit itself is harder to see
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    before = copy.deepcopy(model.state_dict())
    forget = (y == 0).nonzero().squeeze(1)
    sharpness = example_sharpness(model, [(x[forget], y[forget])], CrossEntropy(), progress=False)
    sharpest = sharpness.argsort(descending=True)[: max(1, round(0.05 * len(forget)))]
    share = conflicting[forget][sharpest].float().mean()
    assert share >= 4 * conflicting[forget].float().mean()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
