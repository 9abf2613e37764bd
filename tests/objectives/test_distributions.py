"""Distances of outputs, and the random roots of their Fisher matrices."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from semu_peft.objectives.distributions import divergence, probe, strike_out


def test_divergences_are_those_of_the_definition() -> None:
    before, after = torch.randn(5, 4), torch.randn(5, 4)
    p, q = before.softmax(-1), after.softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1).mean()
    assert torch.allclose(divergence("categorical", before, after), expected)
    # KL of two Gaussians of variance ½ is the squared distance of their means.
    assert torch.allclose(divergence("gaussian", before, after), (before - after).square().mean())
    assert divergence("categorical", before, before).abs() < 1e-6


def test_other_answers_are_those_without_the_label() -> None:
    logits, labels = torch.randn(6, 5), torch.randint(5, (6,))
    others = strike_out(logits, labels)
    for row, label in enumerate(labels.tolist()):
        assert others[row].tolist() == logits[row].tolist()[:label] + logits[row].tolist()[label + 1 :]


@pytest.mark.parametrize("distribution", ["categorical", "gaussian"])
@pytest.mark.parametrize("share_draws", [False, True])
def test_probes_have_the_curvature_as_second_moment(distribution, share_draws, monkeypatch) -> None:
    if share_draws:
        monkeypatch.setattr("semu_peft.objectives.distributions._INDEPENDENT_DRAWS", 0)
    weight, inputs = torch.randn(3, 2, dtype=torch.float64, requires_grad=True), torch.randn(4, 2, dtype=torch.float64)

    def outputs(flat: torch.Tensor) -> torch.Tensor:
        return inputs @ flat.view(3, 2).T

    before = outputs(weight.detach().flatten())
    exact = torch.autograd.functional.hessian(
        lambda flat: (
            F.mse_loss(outputs(flat), before)
            if distribution == "gaussian"
            else F.kl_div(outputs(flat).log_softmax(-1), before.log_softmax(-1), reduction="batchmean", log_target=True)
        ),
        weight.detach().flatten(),
    )
    generator, total, draws = torch.Generator().manual_seed(0), torch.zeros(6, 6, dtype=torch.float64), 4000
    for _ in range(draws):
        (gradient,) = torch.autograd.grad(probe(distribution, outputs(weight), generator), weight)
        total += torch.outer(gradient.flatten(), gradient.flatten()) / draws
    assert (total - exact).norm() < 0.06 * exact.norm()


def test_processes_draw_what_one_would_draw() -> None:
    logits = torch.randn(6, 3, requires_grad=True)
    whole = torch.autograd.grad(probe("categorical", logits, torch.Generator().manual_seed(3)), logits)[0]
    parts = [logits[:2], logits[2:]]
    split = [
        torch.autograd.grad(
            probe("categorical", part, torch.Generator().manual_seed(3), before=before, after=after), part
        )[0]
        for part, before, after in ((parts[0], 0, 4), (parts[1], 2, 0))
    ]
    assert torch.allclose(torch.cat(split), whole)
