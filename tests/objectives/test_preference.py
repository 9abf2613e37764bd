"""Objectives that are a sigmoid of a margin of whole answers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from language_batches import ROWS, Rows, uniform
from torch import Tensor, nn

from semu_peft.objectives import DPO, NPO, TPO, FDivergence, GradientAscent, SimNPO, preference

LOG2 = math.log(2)


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


# N is log 8 for both; the uniform reference has 2 log 4 = log 16 for the first answer and log 4 for the second.
BY_HAND: dict[str, tuple[Any, float]] = {
    "npo": (NPO(beta=0.5, reference=uniform), 2 * (softplus(0.5 * LOG2) + softplus(-0.5 * LOG2))),
    "simnpo": (SimNPO(beta=2.0), (softplus(-2 * 1.5 * LOG2) + softplus(-2 * 3 * LOG2)) / 2),
    "tpo": (TPO(beta=2.0, reference=uniform), (softplus(-3 * LOG2) + softplus(-6 * LOG2)) / 2),
    "simnpo, delta": (SimNPO(beta=2.0, delta=LOG2), (softplus(-2 * 0.5 * LOG2) + softplus(-2 * 2 * LOG2)) / 2),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_two_answers_by_hand(name: str) -> None:
    """Sums of tokens for NPO, means for SimNPO, then the mean over the answers."""
    objective, expected = BY_HAND[name]
    objective.shift_labels = False
    assert objective(Rows(), ROWS).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("beta", [1.0, 0.1, 0.001])
def test_at_the_original_npo_is_ascent(beta: float) -> None:
    """`2/β log 2`, with the gradient of the mean answer's `log p`, for every β; below, it shrinks as `2σ(β Δ)`."""
    model, start = Rows(), Rows()
    loss = NPO(beta=beta, reference=start, shift_labels=False)(model, ROWS)
    assert loss.item() == pytest.approx(2 / beta * LOG2, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, model.logits)
    (ascent,) = torch.autograd.grad(GradientAscent(shift_labels=False)(model, ROWS), model.logits)
    torch.testing.assert_close(gradient, ascent * 3 / 2)  # a mean over two answers, not over three tokens
    with torch.no_grad():
        model.logits[:, :, 0] -= 1.0
    fell = Rows().logits.log_softmax(-1) - model.logits.log_softmax(-1)
    drop = fell[0, :, 0].sum()  # of the first answer
    (gradient,) = torch.autograd.grad(NPO(beta=beta, reference=start, shift_labels=False)(model, ROWS), model.logits)
    (ascent,) = torch.autograd.grad(GradientAscent(shift_labels=False)(model, ROWS), model.logits)
    torch.testing.assert_close(gradient[0], ascent[0] * 3 / 2 * 2 * torch.sigmoid(-beta * drop).item())


# ---- with second answers ----


class Pair(nn.Module):
    """Two answers and two second answers of one token each, as logits that the batch asks for by name."""

    def __init__(self, answers: list[float], seconds: list[float]) -> None:
        super().__init__()
        told = torch.tensor([answers, seconds])
        self.logits = nn.Parameter(torch.stack([told, (1 - told)], -1).log())

    def forward(self, which: int) -> Tensor:
        return self.logits[which]


PAIRS = {"which": 0, "labels": torch.zeros(2, dtype=torch.long)}
PAIRS |= {f"alternate_{name}": value for name, value in {**PAIRS, "which": 1}.items()}


def test_dpo_by_hand() -> None:
    """The sum of how much less likely the answer is and how much likelier the second one, of each pair."""
    before, after = Pair([0.8, 0.8], [0.1, 0.2]), Pair([0.4, 0.8], [0.2, 0.1])
    margins = [math.log(2) + math.log(2), 0 - math.log(2)]
    expected = 2 / 0.5 * sum(softplus(-0.5 * margin) for margin in margins) / 2
    assert DPO(beta=0.5, reference=before)(after, PAIRS).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("beta", [1.0, 0.1, 0.001])
def test_at_the_original_dpo_is_ascent_and_descent(beta: float) -> None:
    """Its gradient is that of `log p(answer) − log p(second)`, for every β."""
    model, start = Pair([0.8, 0.3], [0.1, 0.2]), Pair([0.8, 0.3], [0.1, 0.2])
    (gradient,) = torch.autograd.grad(DPO(beta=beta, reference=start)(model, PAIRS), model.logits)
    log_p = model.logits.log_softmax(-1)[..., 0].mean(1)
    (expected,) = torch.autograd.grad(log_p[0] - log_p[1], model.logits)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # with probability 0.8 of the second answer and 0.3 of the answer
        ("tv", -0.18636),
        ("kl", -0.8 + math.exp(-0.7)),
        ("reverse_kl", math.exp(-0.8) - 0.7),
        ("pearson", -0.8 + 0.3 + 0.0225),
        ("neyman", math.exp(-0.8) - 1 + 2 - 2 * math.exp(-0.15)),
        ("hellinger", math.exp(-0.8) - 1 + math.exp(0.3) - 1),
        ("js", math.log(1 + math.exp(-0.8)) + math.log(1 + math.exp(0.3)) - 2 * LOG2),
        ("jeffrey", -0.8 + 0.3 + 0.0225 + 0.027 / 16),
    ],
)
def test_divergences_by_hand(name: str, expected: float) -> None:
    """To lower each of them makes the second answer likelier and the answer less likely, wherever they stand."""
    assert FDivergence(name)(Pair([0.3, 0.3], [0.8, 0.8]), PAIRS).item() == pytest.approx(expected, abs=1e-5)
    for answer, second in [(0.01, 0.01), (0.5, 0.5), (0.99, 0.01), (0.01, 0.99), (0.99, 0.99)]:
        model, objective = Pair([answer] * 2, [second] * 2), FDivergence(name)
        loss = objective(model, PAIRS)
        (gradient,) = torch.autograd.grad(loss, model.logits)
        assert (gradient[0, :, 0] > 0).all() and (gradient[1, :, 0] < 0).all()
        assert objective.minimum is not None and loss > objective.minimum
    perfect = FDivergence(name)(Pair([0.0, 0.0], [1.0, 1.0]), PAIRS)
    assert perfect.item() == pytest.approx(FDivergence(name).minimum)


@pytest.mark.parametrize("name", ["kl", "js", "neyman"])
def test_divergences_are_those_of_their_conjugate(name: str) -> None:
    """`f*(g(v))` is the supremum of `t u − f(u)` at `t = g(v)`, found here on a grid."""
    generators = {
        "kl": lambda u: u * u.log(),
        "neyman": lambda u: (u - 1) ** 2 / u,
        "js": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    }
    variational, conjugate = preference._DIVERGENCES[name]
    u, v = torch.linspace(1e-3, 20, 400_000, dtype=torch.float64), torch.linspace(0, 1, 5, dtype=torch.float64)
    supremum = torch.stack([(t * u - generators[name](u)).max() for t in variational(v)])
    torch.testing.assert_close(conjugate(v), supremum, rtol=0, atol=1e-6)


def test_second_answers_must_be_there() -> None:
    """In the batch, one for each answer, of which a token counts; and a divergence must be one of those."""
    for objective in (DPO(reference=Pair([0.5] * 2, [0.5] * 2)), FDivergence()):
        with pytest.raises(TypeError, match="`alternate_labels`, got.*which"):
            objective(Pair([0.5] * 2, [0.5] * 2), {name: PAIRS[name] for name in ("which", "labels")})
    tokens = {"input": torch.zeros(2, 1, 3), "labels": torch.tensor([[1], [2]])}
    fewer = {"alternate_input": torch.zeros(2, 1, 3), "alternate_labels": torch.tensor([[-100], [2]])}
    with pytest.raises(ValueError, match="`alternate_labels` must leave a token .*, got 1 for 2"):
        FDivergence(shift_labels=False)(nn.Identity(), {**tokens, **fewer})
    with pytest.raises(ValueError, match="`name` must be one of .*'hellinger'.*got 'GLS'"):
        FDivergence("GLS")


def test_answers_are_paired_row_by_row() -> None:
    """As many second answers as answers, but of other prompts."""
    logits, first, second = torch.zeros(3, 2, 4), torch.zeros(3, 2).long(), torch.zeros(3, 2).long()
    first[0], second[2] = -100, -100
    batch = {"input": logits, "labels": first, "alternate_input": logits, "alternate_labels": second}
    with pytest.raises(ValueError, match="`alternate_labels` must leave a token of one second answer for each"):
        FDivergence("tv", shift_labels=False)(nn.Identity(), batch)


@pytest.mark.parametrize("make", [NPO, SimNPO, DPO, TPO])
def test_beta_must_be_positive(make: Any) -> None:
    """And a number."""
    for beta in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"`beta` must be a finite number above 0, got .*\. Give a larger"):
            make(beta=beta)
    with pytest.raises(TypeError, match="`beta` must be"):
        make(beta="0.1")
