"""RetainSafe: what the optimiser really did is moved to the nearest change that leaves the retain loss alone."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from models import Mlp, vector_batches
from torch import Tensor, nn
from training_runs import QUIET, semu, train, trained_state

from semu_peft import NaturalGradient, Retain, RetainSafe, Rule, unlearn
from semu_peft.objectives import CrossEntropy, GradientAscent, RandomLabel, UniformDistribution
from semu_peft.training.rules import Step
from semu_peft.training.rules.retain_safe import nearest_safe, nonnegative_multipliers


def one(*values: float) -> dict[str, Tensor]:
    return {"w": torch.tensor(values, dtype=torch.float64)}


def test_the_two_cases_by_hand() -> None:
    """M = (1, 4), Δ₀ = g = (1, 1) gives (−.6, .6); M = I, g = (1, 0) gives (0, 1)."""
    torch.testing.assert_close(nearest_safe(one(1, 1), [one(1, 1)], [one(1, 1 / 4)]), one(-0.6, 0.6))
    torch.testing.assert_close(nearest_safe(one(1, 1), [one(1, 0)], [one(1, 0)]), one(0, 1))


def test_what_is_safe_already_keeps_its_bits_and_twice_is_once() -> None:
    torch.manual_seed(0)
    assert nearest_safe(one(-1, 1), [one(1, 0)], [one(1, 0)]) == {}
    constraints = [{"w": torch.randn(9, dtype=torch.float64)} for _ in range(4)]
    change = {"w": torch.randn(9, dtype=torch.float64) + constraints[0]["w"]}
    metric = {"w": torch.rand(9, dtype=torch.float64) + 0.1}
    divided = [{"w": each["w"] / metric["w"]} for each in constraints]
    safe = nearest_safe(change, constraints, divided)
    assert safe and nearest_safe(safe, constraints, divided) == {}


@pytest.mark.parametrize("repeated", [False, True])
def test_the_multipliers_are_those_of_the_best_active_set(repeated: bool) -> None:
    """Against all active sets tried one by one, also where retain gradients repeat."""
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(5, 7, generator=generator, dtype=torch.float64)
        rows = torch.cat([rows, rows[:2]]) if repeated else rows
        rows = rows / rows.norm(dim=1, keepdim=True)
        wanted = torch.randn(7, generator=generator, dtype=torch.float64)
        found = wanted - nonnegative_multipliers(rows @ rows.T, rows @ wanted, 1e-14) @ rows
        best = min(_candidates(rows, wanted), key=lambda each: float((each - wanted).norm()))
        torch.testing.assert_close(found, best, atol=1e-10, rtol=0)


def _candidates(rows: Tensor, wanted: Tensor) -> list[Tensor]:
    feasible = []
    for size in range(len(rows) + 1):
        for active in combinations(range(len(rows)), size):
            chosen = rows[list(active)]
            point = wanted - chosen.T @ torch.linalg.pinv(chosen @ chosen.T) @ (chosen @ wanted) if size else wanted
            if (rows @ point).max() <= 1e-10:
                feasible.append(point)
    return feasible


class Watched(Rule):
    """Note `⟨g_r, Δ⟩` of what is left of each step, for the step's own retain gradient."""

    def __init__(self) -> None:
        self.worst = float("-inf")

    def gradients(self, step: Step) -> None:
        assert step.data is not None
        self.retain = step.data.retain_gradients()

    def update(self, step: Step) -> None:
        for gradient in self.retain:
            inner = sum(float((gradient[name] * change).sum()) for name, change in step.changes.items())
            self.worst = max(self.worst, inner)


class ProjectsGradient(Rule):
    """What is not enough: the gradient alone made orthogonal to the retain gradient."""

    def gradients(self, step: Step) -> None:
        assert step.data is not None
        for retain in step.data.retain_gradients():
            inner = sum(float((retain[name] * gradient).sum()) for name, gradient in step.gradients.items())
            length = sum(float(retain[name].square().sum()) for name in step.gradients)
            for name, gradient in step.gradients.items():
                gradient.sub_(retain[name], alpha=min(inner, 0.0) / length)


def double(batches: list[Any]) -> list[Any]:
    return [(inputs.double(), labels) for inputs, labels in batches]


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def worst_after(rules: list[Rule], **options: Any) -> float:
    """The worst `⟨g_r, Δ⟩` of 20 steps of ascent by AdamW, in float64."""
    torch.manual_seed(0)
    model, watched = Mlp().double(), Watched()
    keep = Retain(double(vector_batches(2, seed=4)), CrossEntropy(), weight=0)
    unlearn(
        model, double(vector_batches(2)), GradientAscent(), retain=keep, rules=[*rules, watched], max_steps=20,
        **{"optimizer": adamw, **options}, **QUIET,
    )  # fmt: skip
    return watched.worst


@pytest.mark.filterwarnings("ignore:The loss ended")
def test_the_realised_update_is_safe_where_a_projected_gradient_is_not() -> None:
    """20 steps of AdamW with weight decay: ⟨g_r, Δ⟩ ≤ 1e-12 at each, and not by projecting gradients."""
    assert worst_after([]) > 1e-3
    assert worst_after([ProjectsGradient()]) > 1e-3
    assert worst_after([RetainSafe()]) <= 1e-12
    assert worst_after([RetainSafe(memory=0)]) <= 1e-12
    sgd = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)}
    assert worst_after([RetainSafe(metric="identity")], **sgd) <= 1e-12
    amsgrad = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, amsgrad=True)}
    assert worst_after([RetainSafe()], **amsgrad) <= 1e-12


@pytest.mark.filterwarnings("ignore:The loss ended")
def test_earlier_retain_batches_stay_constraints() -> None:
    """With a memory the change is safe for the retain gradients of the last steps as well."""

    class Remembers(Rule):
        def __init__(self) -> None:
            self.seen: list[dict[str, Tensor]] = []
            self.worst = float("-inf")

        def gradients(self, step: Step) -> None:
            assert step.data is not None
            self.seen = [*step.data.retain_gradients(), *self.seen][:3]

        def update(self, step: Step) -> None:
            for gradient in self.seen:
                inner = sum(float((gradient[name] * change).sum()) for name, change in step.changes.items())
                self.worst = max(self.worst, inner)

    worst = {}
    for memory in (0, 2):
        torch.manual_seed(0)
        remembers, model = Remembers(), Mlp().double()
        keep = Retain(double(vector_batches(4, seed=4)), CrossEntropy(), weight=0)
        unlearn(
            model, double(vector_batches(2)), GradientAscent(), retain=keep, optimizer=adamw, max_steps=8,
            rules=[RetainSafe(memory=memory), remembers], **QUIET,
        )  # fmt: skip
        worst[memory] = remembers.worst
    assert worst[2] <= 1e-12 < 1e-4 < worst[0]


def test_natural_gradients_are_moved_in_their_own_metric() -> None:
    """Each retain term is a constraint; what is left still forgets, as the nearest safe step of a quadratic model."""
    model, watched = semu(explained_variance=0.999), Watched()
    terms = [Retain(vector_batches(2, seed=seed), CrossEntropy(), weight=0) for seed in (4, 5)]
    rules = [RetainSafe(memory=0), watched]
    result = unlearn(model, vector_batches(2), UniformDistribution(), retain=terms, rules=rules, **QUIET)
    assert len(watched.retain) == 2 and watched.worst <= 1e-6
    assert result.history[-1]["loss"] < 0.1 * result.history[0]["loss"]


def test_asking_leaves_the_run_as_it_was() -> None:
    """A rule that asks for gradients and does nothing changes no bit, also of what is drawn."""

    class Asks(Rule):
        def gradients(self, step: Step) -> None:
            assert step.data is not None
            before = {name: gradient.clone() for name, gradient in step.gradients.items()}
            again = step.data.gradient()
            step.data.retain_gradients()
            assert all(torch.allclose(again[name], gradient, atol=1e-7) for name, gradient in before.items())
            assert all(torch.equal(step.gradients[name], gradient) for name, gradient in before.items())

    for options in ({}, {"optimizer": NaturalGradient(), "learning_rate": None, "epochs": None, "max_steps": 4}):
        states = []
        for rules in ([], [Asks()]):
            model = semu()
            keep = Retain(vector_batches(2, seed=4), RandomLabel(seed=7))
            train(model, vector_batches(3), RandomLabel(seed=3), retain=keep, rules=rules, **QUIET, **options)
            states.append(trained_state(model))
        assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_what_it_needs_is_said() -> None:
    keep = Retain(vector_batches(1, seed=4), CrossEntropy(), weight=0)
    for arguments, message in (
        ({"rules": RetainSafe()}, "RetainSafe needs the run's retain data"),
        ({"rules": RetainSafe(), "retain": keep, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}, "`metric`"),
    ):
        with pytest.raises(ValueError, match=message):
            train(semu(), vector_batches(1), GradientAscent(), **arguments, **QUIET)
    for wrong in ({"memory": -1}, {"metric": "sgd"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RetainSafe(**wrong)  # type: ignore[arg-type]


def test_a_retain_term_of_no_weight_is_for_rules_alone() -> None:
    """It is not evaluated in the loss, and the run trains as without it."""
    calls = []

    def counts(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return CrossEntropy()(model, batch)

    with_term, without = semu(), semu()
    result = train(with_term, vector_batches(2), CrossEntropy(), retain=Retain(vector_batches(1), counts, weight=0), **QUIET)  # fmt: skip  # noqa: E501
    train(without, vector_batches(2), CrossEntropy(), **QUIET)
    assert not calls and result.history[-1]["retain_loss"] == 0.0
    assert all(torch.equal(value, trained_state(without)[name]) for name, value in trained_state(with_term).items())
