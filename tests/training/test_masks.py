"""Masks hold what they hide, bit by bit, and take the largest scores of all parameters together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Mlp, vector_batches
from torch import Tensor, nn
from training_runs import QUIET, assert_same_state, semu, train, trained_state

from semu_peft import Mask, Retain, unlearn
from semu_peft.objectives import CrossEntropy, RandomLabel, UniformDistribution
from semu_peft.training.rules import gradients_of_parameters, top_fraction, wagle_scores

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4),
}


def saliency_masks(model: nn.Module, fraction: float) -> dict[str, Tensor]:
    found = gradients_of_parameters(model, vector_batches(2), CrossEntropy(), progress=False)
    return top_fraction({name: gradient.abs() for name, gradient in found.items()}, fraction)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_entries_keep_their_bits(name: str) -> None:
    """Ten steps with weight decay and momentum, and the optimiser's state is zero there; the others move."""
    torch.manual_seed(0)
    model, made = Mlp(), []

    def factory(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(OPTIMIZERS[name](parameters))
        return made[0]

    masks, before = saliency_masks(model, 0.5), trained_state(model)
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.5 * sum(mask.numel() for mask in masks.values()))
    unlearn(model, vector_batches(2), RandomLabel(), rules=Mask(masks), optimizer=factory, max_steps=10, **QUIET)
    for key, value in trained_state(model).items():
        assert torch.equal(value[~masks[key]], before[key][~masks[key]])
        assert (value[masks[key]] != before[key][masks[key]]).all()
    states = [kept for state in made[0].state.values() for kept in state.values() if isinstance(kept, Tensor)]
    hidden = dict(zip((tuple(mask.shape) for mask in masks.values()), (~mask for mask in masks.values()), strict=True))
    assert all(not kept[hidden[tuple(kept.shape)]].any() for kept in states if kept.dim())


def test_a_mask_of_everything_changes_nothing() -> None:
    masked, free = semu(), semu()
    masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in trained_state(masked).items()}
    for model, rules in ((masked, [Mask(masks)]), (free, [])):
        train(model, vector_batches(2), RandomLabel(seed=5), rules=rules, **QUIET)
    assert_same_state(trained_state(masked), trained_state(free))


def test_natural_gradients_keep_to_a_mask() -> None:
    """The other entries of the cores are trained by steps that know of it, and still forget."""
    model = semu(explained_variance=0.999)
    masks, before = saliency_masks(model, 0.5), trained_state(model)
    result = unlearn(model, vector_batches(2), UniformDistribution(), rules=Mask(masks), max_steps=8, **QUIET)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    for name, value in trained_state(model).items():
        assert torch.equal(value[~masks[name]], before[name][~masks[name]])


def test_the_largest_scores_are_taken_over_all_parameters_exactly() -> None:
    """One more entry for one more in a hundred, and of equal scores the first ones."""
    scores = {"a": torch.zeros(4, 10), "b": torch.zeros(60)}
    scores["b"][7] = 1.0
    masks = top_fraction(scores, 0.03)
    assert masks["a"].flatten().nonzero().flatten().tolist() == [0, 1] and masks["b"].nonzero().item() == 7
    for count in range(1, 101):
        assert sum(int(mask.sum()) for mask in top_fraction(scores, count / 100).values()) == count
    assert all(mask.all() for mask in top_fraction(scores, 1.0).values())


def test_wagle_attributes_by_weight_curvature_and_gradient() -> None:
    """`|(θ − g_r/μ) g_f|`: at (2, 1), g_r (1, 0), μ .5, g_f (3, −4) it is (0, 4)."""
    scores = wagle_scores(
        {"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([3.0, -4.0])}, {"w": torch.tensor([1.0, 0.0])}, mu=0.5
    )
    assert scores["w"].tolist() == [0.0, 4.0]


def test_gradients_of_parameters_are_sums_over_batches() -> None:
    torch.manual_seed(0)
    model, batches = Mlp().eval(), vector_batches(3)
    sum((CrossEntropy()(model, batch) for batch in batches), torch.zeros(())).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found = gradients_of_parameters(model.train(), batches, CrossEntropy(), progress=False)
    assert model.training and found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


def test_mistakes_are_named() -> None:
    with pytest.raises(TypeError, match="boolean"):
        Mask({"w": torch.ones(2)})
    with pytest.raises(TypeError, match="`masks`"):
        Mask([torch.ones(2)])  # type: ignore[arg-type]
    for masks in ({"no.such": torch.ones(2, dtype=torch.bool)}, {next(iter(trained_state(semu()))): torch.ones(1) > 0}):
        with pytest.raises(ValueError, match="`masks` must fit"):
            train(semu(), vector_batches(1), CrossEntropy(), rules=Mask(masks), **QUIET)
    with pytest.raises(ValueError, match="`fraction`"):
        top_fraction({"w": torch.ones(2)}, 0.0)
    with pytest.raises(ValueError, match="NaN"):
        top_fraction({"w": torch.tensor([float("nan")])}, 0.5)
    with pytest.raises(ValueError, match="`mu`"):
        wagle_scores({}, {}, {}, mu=0.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The loss ended")
def test_salun_forgets_a_digit() -> None:
    """Random labels, cross entropy on retain data (five times its weight), half of the weights held: FA 0, RA 96 up."""
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    chosen = labels == 3
    forget = list(zip(images[chosen].split(64), labels[chosen].split(64), strict=True))
    order = torch.randperm(int((~chosen).sum()))
    kept = list(zip(images[~chosen][order].split(256), labels[~chosen][order].split(256), strict=True))
    found = gradients_of_parameters(model, forget, CrossEntropy(), progress=False)
    masks, before = top_fraction({name: each.abs() for name, each in found.items()}, 0.5), trained_state(model)
    unlearn(
        model, forget, RandomLabel(), retain=Retain(kept, CrossEntropy(), weight=5.0), rules=Mask(masks), max_steps=300,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4), **QUIET,
    )  # fmt: skip
    right = model(images).argmax(1) == labels
    assert right[chosen].float().mean() == 0.0 and right[~chosen].float().mean() >= 0.96
    assert all(
        torch.equal(value[~masks[name]], before[name][~masks[name]]) for name, value in trained_state(model).items()
    )
