"""Adversarial neighbours of forget examples, and training by them (AMUN)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft import Retain, SemuConfig, initialize_semu_weights, unlearn
from semu_peft.evaluation import predict
from semu_peft.objectives import AdversarialUnlearning, CrossEntropy, adversarial_examples


class WithDropout(nn.Sequential):
    """A small network that is another one in train mode."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 24), nn.Dropout(0.5), nn.Tanh(), nn.Linear(24, 4))


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(60, 6, generator=generator), torch.randint(4, (60,), generator=generator)


@pytest.fixture(scope="module")
def memorised(data: tuple[Tensor, Tensor]) -> nn.Module:
    """Random labels, learnt by heart."""
    torch.manual_seed(0)
    model = WithDropout().eval()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(500):
        optimizer.zero_grad()
        F.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    assert predict(model, [data], progress=False).accuracy == 100
    return model


def batches(data: tuple[Tensor, Tensor], chosen: slice) -> list[Any]:
    return list(zip(data[0][chosen].split(8), data[1][chosen].split(8), strict=True))


def test_neighbours_are_taken_for_the_class_that_they_are_labelled(memorised, data) -> None:
    forget = batches(data, slice(20))
    pairs = adversarial_examples(memorised, forget)
    assert [len(given[1]) for given, _ in pairs] == [8, 8, 4]
    for (inputs, labels), (given, (neighbours, wrong)) in zip(forget, pairs, strict=True):
        assert torch.equal(given[0], inputs) and torch.equal(given[1], labels)
        assert (wrong != labels).all() and torch.equal(memorised(neighbours).argmax(1), wrong)


def test_each_neighbour_is_of_the_first_radius_that_has_one(memorised, data) -> None:
    (_, (neighbours, _)), *_ = adversarial_examples(memorised, batches(data, slice(8)), radius=0.05)
    distances = (neighbours - data[0][:8]).norm(dim=1)
    for index, distance in enumerate(distances.tolist()):
        radius = next(0.05 * 2**k for k in range(16) if distance <= 0.05 * 2**k * (1 + 1e-5))
        if radius > 0.05:  # half as far there is none
            with pytest.raises(ValueError, match=r"without one for 1 of 1 in batch 0.*larger `radius`"):
                one = slice(index, index + 1)
                adversarial_examples(memorised, batches(data, one), radius=radius / 2, max_radii=1)
    assert len({round(distance, 2) for distance in distances.tolist()}) > 1


def test_an_example_that_is_mistaken_already_is_its_own_neighbour(memorised, data) -> None:
    wrong_labels = (data[1][:4] + 1) % 4
    ((_, (neighbours, answers)),) = adversarial_examples(memorised, [(data[0][:4], wrong_labels)])
    assert torch.equal(neighbours, data[0][:4]) and torch.equal(answers, data[1][:4])


def test_the_model_stays_as_it_is(memorised, data) -> None:
    model = copy.deepcopy(memorised).train()
    model[0].eval()
    model[3].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        adversarial_examples(model, batches(data, slice(4)))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert modes == [m.training for m in model.modules()] and flags == [p.requires_grad for p in model.parameters()]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[3].weight.grad is None


def test_same_model_and_batches_same_neighbours(memorised, data) -> None:
    first, second = (adversarial_examples(memorised, batches(data, slice(8))) for _ in range(2))
    assert torch.equal(first[0][1][0], second[0][1][0])


def test_a_certain_model_has_neighbours_too(memorised, data) -> None:
    """Its cross entropy is flat to the last digit."""
    certain = copy.deepcopy(memorised)
    with torch.no_grad():
        certain[3].weight.mul_(1000), certain[3].bias.mul_(1000)
    ((_, (_, wrong)),) = adversarial_examples(certain, batches(data, slice(8)))
    assert (wrong != data[1][:8]).all()


def test_mappings_keep_their_form() -> None:
    class Model(nn.Module):
        def forward(self, pixel_values: Tensor, ids: Tensor) -> Tensor:
            return pixel_values.flatten(1) + 0 * ids[:, None]

    batch = {"pixel_values": torch.eye(4).view(4, 1, 2, 2), "ids": torch.arange(4), "labels": torch.arange(4)}
    ((given, adversarial),) = adversarial_examples(Model(), [batch])
    assert given.keys() == adversarial.keys() and torch.equal(adversarial["ids"], batch["ids"])
    assert adversarial["pixel_values"].shape == (4, 1, 2, 2)
    assert (adversarial["labels"] != batch["labels"]).all() and torch.equal(batch["labels"], torch.arange(4))


def test_the_loss_is_the_mean_over_both(memorised, data) -> None:
    ((given, adversarial),) = adversarial_examples(memorised, [(data[0][:6], data[1][:6])])
    objective = AdversarialUnlearning()
    both = torch.cat([given[0], adversarial[0]]), torch.cat([given[1], adversarial[1]])
    assert torch.allclose(objective(memorised, (given, adversarial)), F.cross_entropy(memorised(both[0]), both[1]))
    evaluation = objective.evaluate(memorised, (given, adversarial), None)
    assert [output.labels.tolist() for output in evaluation.outputs] == [given[1].tolist()] * 2


def test_natural_gradients_train_by_it(memorised, data) -> None:
    forget, kept = batches(data, slice(6)), batches(data, slice(6, None))
    model = get_peft_model(copy.deepcopy(memorised), SemuConfig(target_modules=["0", "3"], explained_variance=1.0))
    pairs = adversarial_examples(model, forget)
    before = predict(model, forget, progress=False).confidence.mean()
    objective, retain = AdversarialUnlearning(), Retain(kept, CrossEntropy())
    initialize_semu_weights(model, pairs, objective, progress=False)
    result = unlearn(model, pairs, objective, retain=retain, progress=False)
    assert "damping" in result.history[0] and result.history[-1]["loss"] < result.history[0]["loss"]
    assert predict(model, forget, progress=False).confidence.mean() < before
    assert predict(model, [adversarial for _, adversarial in pairs], progress=False).confidence.min() > 0.9
    assert predict(model, kept, progress=False).accuracy > 98


def test_an_adapter_is_left_out(memorised, data) -> None:
    """Also one without bases yet, and one that has been trained."""
    expected = adversarial_examples(memorised, batches(data, slice(4)))
    for settings in ({}, {"r": 2, "init_weights": False}):
        model = get_peft_model(copy.deepcopy(memorised), SemuConfig(target_modules=["0", "3"], **settings))
        ((_, (neighbours, wrong)),) = adversarial_examples(model, batches(data, slice(4)))
        assert torch.equal(neighbours, expected[0][1][0]) and torch.equal(wrong, expected[0][1][1])


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((torch.zeros(2, 4).long(), torch.arange(2)), TypeError, r"one floating-point input, got \[\].*Tokens"),
        ((torch.zeros(2, 4), torch.zeros(2, 4), torch.arange(2)), TypeError, r"got \['0', '1'\]"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 3).long()), ValueError, "one label an example, got 6.*for 2 inputs"),
    ],
)
def test_what_has_no_neighbours_is_refused(batch, error, message) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return x.float()

    with pytest.raises(error, match=message):
        adversarial_examples(Model(), [batch])


def test_arguments_are_checked(memorised, data) -> None:
    with pytest.raises(ValueError, match="`radius` must be above zero"):
        adversarial_examples(memorised, batches(data, slice(4)), radius=0)
    with pytest.raises(ValueError, match="at least one batch, got none"):
        adversarial_examples(memorised, [])
    with pytest.raises(TypeError, match="pair of an ordinary batch.*adversarial_examples"):
        AdversarialUnlearning()(memorised, (data[0][:4], data[1][:4]))
