"""Objectives that are a sigmoid of a margin of whole answers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from semu_peft.objectives import NPO, GradientAscent, SimNPO

LOG2 = math.log(2)


class Rows(nn.Module):
    """Two answers of 2 and 1 tokens over four classes: probabilities ½ and ¼ of the first, ⅛ of the second."""

    def __init__(self) -> None:
        super().__init__()
        told = [[1 / 2, 1 / 6, 1 / 6, 1 / 6], [1 / 4] * 4, [1 / 8, 7 / 24, 7 / 24, 7 / 24], [1 / 4] * 4]
        self.logits = nn.Parameter(torch.tensor(told).log().view(2, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


BATCH = (torch.zeros(2, 2), torch.tensor([[0, 0], [0, -100]]))


def uniform(x: Tensor) -> Tensor:
    return torch.zeros(2, 2, 4)


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


# N is log 8 for both; the uniform reference has 2 log 4 = log 16 for the first answer and log 4 for the second.
BY_HAND: dict[str, tuple[Any, float]] = {
    "npo": (NPO(beta=0.5, reference=uniform), 2 * (softplus(0.5 * LOG2) + softplus(-0.5 * LOG2))),
    "simnpo": (SimNPO(beta=2.0), (softplus(-2 * 1.5 * LOG2) + softplus(-2 * 3 * LOG2)) / 2),
    "simnpo, delta": (SimNPO(beta=2.0, delta=LOG2), (softplus(-2 * 0.5 * LOG2) + softplus(-2 * 2 * LOG2)) / 2),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_two_answers_by_hand(name: str) -> None:
    """Sums of tokens for NPO, means for SimNPO, then the mean over the answers."""
    objective, expected = BY_HAND[name]
    objective.shift_labels = False
    assert objective(Rows(), BATCH).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("beta", [1.0, 0.1, 0.001])
def test_at_the_original_npo_is_ascent(beta: float) -> None:
    """`2/β log 2`, with the gradient of the mean answer's `log p`, for every β; below, it shrinks as `2σ(β Δ)`."""
    model, start = Rows(), Rows()
    loss = NPO(beta=beta, reference=start, shift_labels=False)(model, BATCH)
    assert loss.item() == pytest.approx(2 / beta * LOG2, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, model.logits)
    (ascent,) = torch.autograd.grad(GradientAscent(shift_labels=False)(model, BATCH), model.logits)
    torch.testing.assert_close(gradient, ascent * 3 / 2)  # a mean over two answers, not over three tokens
    with torch.no_grad():
        model.logits[:, :, 0] -= 1.0
    fell = Rows().logits.log_softmax(-1) - model.logits.log_softmax(-1)
    drop = fell[0, :, 0].sum()  # of the first answer
    (gradient,) = torch.autograd.grad(NPO(beta=beta, reference=start, shift_labels=False)(model, BATCH), model.logits)
    (ascent,) = torch.autograd.grad(GradientAscent(shift_labels=False)(model, BATCH), model.logits)
    torch.testing.assert_close(gradient[0], ascent[0] * 3 / 2 * 2 * torch.sigmoid(-beta * drop).item())


@pytest.mark.parametrize("make", [NPO, SimNPO])
def test_beta_must_be_positive(make: Any) -> None:
    """And a number."""
    for beta in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"`beta` must be a finite number above 0, got .*\. Give a larger"):
            make(beta=beta)
    with pytest.raises(TypeError, match="`beta` must be"):
        make(beta="0.1")
