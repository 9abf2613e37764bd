"""Rows taken out of a ridge head: the same as a fit without them, and the certificate says how nearly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from semu_peft.edits import RidgeHead


def refit(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """The dense solution, `(c, n)`."""
    return torch.linalg.solve(x.mT @ x + penalty * torch.eye(x.shape[1]).double(), x.mT @ y).mT


def test_the_case_by_hand() -> None:
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [3.0]])
    head = RidgeHead.empty(1, 1, penalty=1.0).add(x, y)
    assert abs(head.weight.item() - 7 / 6) < 1e-15
    after, certificate = head.forget(x[1:], y[1:])
    assert abs(after.weight.item() - 0.5) < 1e-15
    assert 1 / float(after.gram + after.penalty) == 0.5
    assert (certificate.removed, certificate.remaining, certificate.rank, certificate.condition) == (1, 1, 1, 1.0)


@pytest.mark.parametrize("forgotten", [1, 3, 20])
def test_what_remains_is_a_fit_without_the_rows(forgotten: int) -> None:
    x, y = torch.randn(60, 12).double(), torch.randn(60, 5).double()
    head = RidgeHead.empty(12, 5, penalty=0.3).add(x[:40], y[:40]).add(x[40:], y[40:])
    assert (head.weight - refit(x, y, 0.3)).abs().max() < 1e-12
    after, certificate = head.forget(x[:forgotten], y[:forgotten])
    assert (after.weight - refit(x[forgotten:], y[forgotten:], 0.3)).abs().max() < 1e-10
    assert certificate.rank == min(forgotten, 5)
    assert certificate.residual < 1e-12
    assert certificate.digest != head.forget(x[1 : forgotten + 1], y[1 : forgotten + 1])[1].digest


def test_order_does_not_matter_and_nothing_is_left_of_everything() -> None:
    x, y = torch.randn(30, 6).double(), torch.randint(4, (30,))
    head = RidgeHead.empty(6, 4).add(x, y)
    extra, label = torch.randn(2, 6).double(), torch.tensor([1, 2])
    assert (head.add(extra, label).forget(extra, label)[0].weight - head.weight).abs().max() < 1e-10
    one = head.forget(x[:3], y[:3])[0].forget(x[3:9], y[3:9])[0]
    other = head.forget(x[3:9], y[3:9])[0].forget(x[:3], y[:3])[0]
    assert (one.weight - other.weight).abs().max() < 1e-10
    nothing, certificate = head.forget(x, y)
    assert not nothing.weight.any() and certificate.remaining == 0


def test_the_change_is_an_edit_of_its_layer_and_an_exact_adapter(tmp_path: Path) -> None:
    features, labels = torch.randn(50, 8), torch.randint(6, (50,))
    before = RidgeHead.load(RidgeHead.empty(8, 6).add(features, labels).save(tmp_path / "head.safetensors"))
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(before.weight)
    after, certificate = before.forget(features[:2], labels[:2])
    edit = after.edit(before, "0")
    with edit.apply(model):
        assert torch.allclose(model[0].weight.double(), after.weight, atol=1e-6)
    carried = edit.to_semu(model)
    assert carried.ranks == {"0": certificate.rank} and carried.error == 0
    assert torch.allclose(carried.model(features).double(), features.double() @ after.weight.mT, atol=1e-5)


def test_rows_that_were_never_there_are_refused(tmp_path: Path) -> None:
    x, y = torch.randn(20, 5), torch.randint(3, (20,))
    head = RidgeHead.empty(5, 3).add(x, y)
    cases: list[tuple[Any, str]] = [
        (lambda: head.forget(10 * torch.randn(3, 5), y[:3]), "`features` must be rows that this head was fitted with"),
        (lambda: head.forget(torch.randn(21, 5), torch.zeros(21).long()), "`features` must be rows of this head"),
        (lambda: head.add(torch.randn(3, 4), y[:3]), "`features` must be finite rows"),
        (lambda: head.add(x[:3], torch.tensor([0, 1, 3])), "`targets` must be labels below 3"),
        (lambda: head.add(x[:3], y[:2]), "`targets` must be labels"),
        (lambda: head.add("x", y), "`features` must be a tensor"),
        (lambda: RidgeHead.empty(5, 3, penalty=0.0), "`penalty`"),
        (lambda: RidgeHead.empty(0, 3), "`features`"),
        (lambda: head.edit(None, "0"), "`before`"),  # type: ignore[arg-type]
        (lambda: RidgeHead.load(tmp_path / "none"), "RidgeHead.save"),
    ]
    for call, message in cases:
        with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
            call()
    assert head.count == 20
