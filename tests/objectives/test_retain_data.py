"""`Retain`, the one form of retain data, says at once what it cannot work with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models import Mlp, vector_batches
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import semu_peft
from semu_peft import SemuConfig, gather, initialize_semu_weights, unlearn
from semu_peft.objectives import CrossEntropy, Retain, as_retain

BATCHES = vector_batches(3)


def test_it_holds_what_it_was_given() -> None:
    """Batches and objective are kept as they are; the weight is 1 unless said otherwise."""
    objective = CrossEntropy()
    retain = Retain(BATCHES, objective)
    assert retain.batches is BATCHES and retain.objective is objective and retain.weight == 1.0
    assert Retain(BATCHES, objective, 2).weight == Retain(BATCHES, objective, weight=2.0).weight == 2.0
    assert Retain(BATCHES, objective, weight=0).weight == 0.0
    assert semu_peft.Retain is Retain
    with pytest.raises(AttributeError):
        retain.weight = 3.0  # type: ignore[misc]


def test_loaders_generators_and_plain_functions() -> None:
    """Whatever can be iterated serves, and any function is an objective."""
    loader = DataLoader(TensorDataset(*BATCHES[0]), batch_size=2)
    for batches in (loader, tuple(BATCHES), (batch for batch in BATCHES), iter(BATCHES)):
        retain = Retain(batches, lambda model, batch: model(batch[0]).square().mean())
        batch = next(iter(retain.batches))
        assert retain.objective(Mlp(), batch).shape == ()


@pytest.mark.parametrize(
    ("batches", "name"),
    [
        ("train", "str"),
        (b"train", "bytes"),
        (Mlp(), "Mlp"),
        (lambda: BATCHES, "function"),
        (3, "int"),
        (None, "NoneType"),
        (torch.zeros(2, 3), "Tensor"),
        ({"x": torch.zeros(2, 3), "labels": torch.zeros(2)}, "dict"),
        (CrossEntropy(), "CrossEntropy"),
        ((torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)), "one tuple of inputs and labels"),
        ((np.zeros((2, 3)), np.zeros(2)), "one tuple of inputs and labels"),
    ],
)
def test_batches_that_are_none(batches: Any, name: str) -> None:
    """No iterable, one bare batch or swapped arguments: the error names `batches`, what came and what to write."""
    with pytest.raises(TypeError, match=rf"`batches` must be a loader or a list.*{name}.*\["):
        Retain(batches, CrossEntropy())


@pytest.mark.parametrize(
    ("objective", "words"), [(None, "NoneType"), (0.5, "float"), (CrossEntropy, r"CrossEntropy\(\)")]
)
def test_objectives_that_are_none(objective: Any, words: str) -> None:
    """What cannot be called is refused, and so is a class in place of an instance."""
    with pytest.raises(TypeError, match=f"`objective`.*{words}"):
        Retain(BATCHES, objective)


@pytest.mark.parametrize(
    ("weight", "error"),
    [("1", TypeError), (None, TypeError), (True, TypeError), (-0.1, ValueError), (float("nan"), ValueError)],
)
def test_weights_that_are_none(weight: Any, error: type[Exception]) -> None:
    """A weight is a finite number, zero or more."""
    with pytest.raises(error, match="`weight`"):
        Retain(BATCHES, CrossEntropy(), weight)


def test_repr_is_one_line() -> None:
    """It says how much data there are, where that is known, and prints none of them."""
    assert repr(Retain(BATCHES, CrossEntropy())) == "Retain(list of 3, CrossEntropy(), weight=1.0)"
    assert repr(Retain(iter(BATCHES), CrossEntropy(), 0.5)) == "Retain(list_iterator, CrossEntropy(), weight=0.5)"


def test_as_retain() -> None:
    """None, one and several become a tuple."""
    one, other = Retain(BATCHES, CrossEntropy()), Retain(BATCHES, CrossEntropy(), 0.5)
    assert as_retain(None) == as_retain([]) == ()
    assert as_retain(one) == (one,)
    assert as_retain([one, other]) == as_retain((one, other)) == (one, other)


@pytest.mark.parametrize("retain", [BATCHES, DataLoader(TensorDataset(*BATCHES[0])), "retain", CrossEntropy()])
def test_as_retain_of_bare_batches(retain: Any) -> None:
    """The old form is met with what to write now."""
    with pytest.raises(TypeError, match=r"`retain` must be a `Retain`.*`Retain\(batches, objective\)`"):
        as_retain(retain)


def test_batches_of_inputs_alone_are_no_inputs_with_labels() -> None:
    for batches in (torch.randn(8, 6).split(4), (torch.randn(4, 6), torch.zeros(3)), (torch.zeros(4), torch.zeros(4))):
        assert Retain(batches, lambda model, batch: model(batch).square().mean()).batches is batches


@pytest.mark.parametrize("batch", [torch.randn(8, 6), {"x": torch.randn(8, 6)}], ids=["tensor", "mapping"])
def test_one_batch_in_the_place_of_several(batch: Any) -> None:
    """Its rows, or its keys, are not taken for batches: not in gathering, initialising or training."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["x"] if isinstance(batch, dict) else batch).square().mean()

    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), SemuConfig(target_modules=["0"]))
    for call in (gather, initialize_semu_weights, unlearn):
        if call is unlearn:
            initialize_semu_weights(model, [batch], loss, progress=False)
        with pytest.raises(TypeError, match=rf"must be a loader or a list of batches, got one {type(batch).__name__}"):
            call(model, batch, loss, progress=False)
    assert unlearn(model, [batch], loss, epochs=2, progress=False).examples_seen == 16
