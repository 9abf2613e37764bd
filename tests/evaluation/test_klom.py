"""KLOM, and the forget sets that are hardest to show as forgotten."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft.evaluation import klom, predict, worst_case_forget_set
from semu_peft.evaluation.worst_case import project_to_sum


def test_the_margin_is_the_log_odds() -> None:
    predictions = predict(nn.Identity(), [(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0]))], progress=False)
    assert predictions.log_odds is not None and round(predictions.log_odds.item(), 4) == 1.3069


def test_identical_samples_are_zero_and_every_value_has_a_bin() -> None:
    values = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])
    assert klom(values, values).values.tolist() == [0.0]
    # By hand: the largest value is in the last of two bins, (2/5, 3/5) against (3/5, 2/5).
    other = torch.tensor([[0.0], [1.0], [1.5], [3.0], [4.0]])
    p, q = torch.tensor([0.4, 0.6]), torch.tensor([0.6, 0.4])
    expected = float((p * (p / q).log()).sum())
    assert abs(klom(values, other, bins=2).values.item() - expected) < 1e-4
    constant = torch.full((4, 2), 200.0)  # beyond the clip, and without any width
    assert klom(constant, constant + 50).values.tolist() == [0.0, 0.0]


def test_klom_tells_examples_apart_and_says_what_does_not_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    retrained = torch.randn(100, 4, generator=generator)
    shifted = torch.randn(100, 4, generator=generator) + torch.tensor([0.0, 1.0, 2.0, 8.0])
    values = klom(shifted, retrained).values
    assert values.tolist() == sorted(values.tolist()) and values[3] > 5
    assert klom(shifted, retrained).percentile(100) == values.max()
    with pytest.raises(ValueError, match="`retrained` must be of the same examples"):
        klom(shifted, retrained[:, :2])
    with pytest.raises(ValueError, match="`unlearned` must be margins"):
        klom(torch.full((3, 2), float("nan")), retrained)


def test_projections_by_hand() -> None:
    for given, total, expected in (
        ([2.0, 0.5, 0.5, -1.0], 2, [1.0, 0.5, 0.5, 0.0]),
        ([0.9, 0.8, 0.1], 1, [0.55, 0.45, 0.0]),
        ([0.3, 0.2], 2, [1.0, 1.0]),
    ):
        found = project_to_sum(torch.tensor(given, dtype=torch.float64), total)
        assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9)


def fitted(x: Tensor, y: Tensor, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(250):
        chosen = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = (torch.tensor(column) for column in datasets.load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:1300]
    return x[order].float() / 16, y[order]


def test_a_retrained_model_still_knows_the_worst_set_and_not_the_easiest(digits) -> None:
    x, y = digits
    model = fitted(x, y)
    batches = list(zip(x.split(650), y.split(650), strict=True))
    before = copy.deepcopy(model.state_dict())
    sets = {
        "worst": worst_case_forget_set(model, batches, 0.1, progress=False),
        "random": torch.randperm(1300, generator=torch.Generator().manual_seed(1))[:130],
        "easiest": worst_case_forget_set(model, batches, 0.1, hardest=False, progress=False),
    }
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    errors = {}
    for name, chosen in sets.items():
        assert len(chosen) == 130 == len(chosen.unique())
        kept = torch.ones(1300, dtype=torch.bool)
        kept[chosen] = False
        retrained = fitted(x[kept], y[kept])
        errors[name] = 100 - predict(retrained, [(x[chosen], y[chosen])], progress=False).accuracy
    assert errors["worst"] == 0 and 0.5 <= errors["random"] <= 6 and errors["easiest"] > 30


def test_a_model_that_cannot_move_is_refused() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="trainable parameter"):
        worst_case_forget_set(model, [(torch.zeros(1, 2), torch.tensor([0]))], 0.5, progress=False)
