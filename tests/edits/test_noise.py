"""Needle: noise on the columns that hold a concept, and on nothing else; and how far a vector then is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from semu_peft import methods
from semu_peft.edits import noise_columns
from semu_peft.evaluation import vector_change


def planted() -> tuple[nn.Module, torch.Tensor]:
    """A down-projection whose column 3 writes one direction, and a head that reads tokens from it."""
    draw = torch.Generator().manual_seed(0)
    model, head = nn.Sequential(nn.Linear(8, 64, bias=False)), torch.randn(4000, 64, generator=draw)
    model[0].weight.data = torch.randn(64, 8, generator=draw) * 0.05
    return model, head


def test_needle_takes_out_the_vector_and_leaves_the_others() -> None:
    """Acceptance: Jaccard below 0.05 where it was 1, other columns bit-equal, and the edit is undone bit for bit."""
    model, head = planted()
    before = model[0].weight.detach().clone()
    found = vector_change(before[:, 3], before[:, 3], head)
    assert (found.jaccard, found.distance) == (1.0, 0.0) and found.cosine == pytest.approx(1.0)
    edit = methods.needle(model, {"0": [3]}, std=1.0, seed=1)
    with edit.apply(model):
        after = model[0].weight.detach().clone()
    assert vector_change(before[:, 3], after[:, 3], head).jaccard < 0.05
    others = [column for column in range(8) if column != 3]
    assert torch.equal(after[:, others], before[:, others]) and torch.equal(model[0].weight, before)


def test_the_noise_is_the_seeds_and_of_its_size() -> None:
    model, _ = planted()
    with noise_columns(model, {"0": [1, 5]}, std=0.1, seed=2).apply(model):
        first = model[0].weight.detach().clone()
    with noise_columns(model, {"0": [1, 5]}, std=0.1, seed=2).apply(model):
        assert torch.equal(first, model[0].weight)
    with noise_columns(model, {"0": torch.tensor([1, 5])}, std=0.1, seed=2).apply(model):  # as found by a comparison
        assert torch.equal(first, model[0].weight)
    moved = (first - model[0].weight.detach())[:, [1, 5]]
    assert moved.std().item() == pytest.approx(0.1, rel=0.2)


def test_vectors_by_hand() -> None:
    found = vector_change(torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0]), torch.eye(2), topk=1)
    assert found.cosine == pytest.approx(24 / 25) and found.distance == pytest.approx(2**0.5) and found.jaccard == 0.0


def test_mistakes() -> None:
    model, head = planted()
    for columns in ({"1": [0]}, {"0": [8]}, {"0": []}, {}):
        with pytest.raises(ValueError, match="`columns`"):
            noise_columns(model, columns)
    with pytest.raises(ValueError, match="`before` and `after` must be vectors"):
        vector_change(torch.zeros(3), torch.zeros(3), head)
