"""What the outcome of a step says about the next one."""

from __future__ import annotations

import math

import pytest
import torch

from semu_peft.gradients.core_rows import Rows
from semu_peft.training.curvature import CoreSlot, KroneckerFactors, Probe
from semu_peft.training.step_control import LevenbergMarquardt, Outcome, TrustRegion

GOOD = Outcome(fall=1.0, predicted=1.0, kl=0.05, retain_kl=0.0, is_over_budget=False)
BAD = {
    "not finite": GOOD._replace(fall=math.nan),
    "moves too far": GOOD._replace(kl=0.4),
    "moves too far on retain data": GOOD._replace(retain_kl=0.04),
    "over budget": GOOD._replace(is_over_budget=True),
    "the loss rose": GOOD._replace(fall=-1e-3),
}


def curvature() -> KroneckerFactors:
    factors = KroneckerFactors([CoreSlot("core", 0, (3, 3), True)], 0.8, torch.device("cpu"))
    rows = Rows(torch.randn(20, 4, 3), torch.randn(20, 4, 3) * torch.tensor([10.0, 1.0, 0.1]))
    factors.observe([Probe({"core": [rows]}, torch.zeros(9), 20)])
    return factors


def test_the_length_changes_and_the_direction_does_not() -> None:
    control, factors, gradient = TrustRegion(0.1, 0.1), curvature(), torch.randn(9)
    first, _ = control.propose(factors, gradient)
    for _ in range(3):
        assert not control.is_good(BAD["moves too far"])
    last, _ = control.propose(factors, gradient)
    assert last.norm() < 0.2 * first.norm()
    assert torch.cosine_similarity(first, last, dim=0) > 1 - 1e-6
    assert torch.cosine_similarity(last, -gradient, dim=0) < 0.9  # which damping would have brought to 1


def test_no_step_is_longer_than_gauss_newtons_and_its_fall_is_the_models() -> None:
    control, factors, gradient = TrustRegion(0.1, 0.1), curvature(), torch.randn(9)
    for _ in range(30):
        step, predicted = control.propose(factors, gradient)
        assert control.is_good(GOOD._replace(kl=1e-4))
        assert predicted == pytest.approx((-gradient @ step - step @ factors.times(step) / 2).item(), rel=1e-4)
    assert control.length == pytest.approx(1.0)
    assert (gradient + factors.times(step)) @ step == pytest.approx(0.0, abs=1e-4)


def test_the_first_step_promises_what_is_worth_its_trial() -> None:
    factors, gradient = curvature(), 1e-4 * torch.randn(9)
    _, short = TrustRegion(0.1, 0.1).propose(factors, gradient)
    _, worth = TrustRegion(0.1, 0.1, first_fall=10 * short).propose(factors, gradient)
    assert 9 * short < worth < 10 * short
    control = TrustRegion(0.1, 0.1, first_fall=1e6 * short)
    control.propose(factors, gradient)
    assert control.length == pytest.approx(1.0)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("kind", [LevenbergMarquardt, TrustRegion])
def test_what_a_bad_step_is_and_that_the_next_is_shorter(name: str, kind: type) -> None:
    control, factors, gradient = kind(0.1, 0.1), curvature(), torch.randn(9)
    before, _ = control.propose(factors, gradient)
    if kind is LevenbergMarquardt and "retain" in name:
        assert control.is_good(BAD[name])  # the whole matrix knows what the retain data costs
        return
    assert not control.is_good(BAD[name])
    assert control.propose(factors, gradient)[0].norm() < before.norm()


def test_good_steps_lengthen_what_moved_little_and_shorten_what_promised_too_much() -> None:
    for outcome, grows in ((GOOD._replace(kl=0.03), True), (GOOD._replace(kl=0.14), False)):
        control, factors, gradient = TrustRegion(0.1, 0.1), curvature(), torch.randn(9)
        before, _ = control.propose(factors, gradient)
        assert control.is_good(outcome)
        assert (control.propose(factors, gradient)[0].norm() > before.norm()) == grows
    assert control.is_good(GOOD._replace(fall=0.1))
    assert control.propose(factors, gradient)[0].norm() < before.norm()


@pytest.mark.parametrize("moved", [0.02, 0.04, 0.06, 0.1, 0.14])
def test_a_good_step_says_how_long_the_next_may_be(moved: float) -> None:
    """What a step moves grows with the square of its length: none is proposed that would have to be taken back."""
    control, factors, gradient = TrustRegion(0.1, 0.1), curvature(), torch.randn(9)
    before, _ = control.propose(factors, gradient)
    assert control.is_good(GOOD._replace(kl=moved))
    after, _ = control.propose(factors, gradient)
    assert moved * (after.norm() / before.norm()) ** 2 == pytest.approx(0.08, rel=1e-4)


def test_the_radius_goes_on_where_it_was() -> None:
    control, factors, gradient = TrustRegion(0.1, 0.1), curvature(), torch.randn(9)
    control.propose(factors, gradient)
    control.is_good(GOOD._replace(kl=1e-3))
    again = TrustRegion(0.1, 0.1)
    again.load_state_dict(control.state_dict())
    assert torch.equal(again.propose(factors, gradient)[0], control.propose(factors, gradient)[0])
