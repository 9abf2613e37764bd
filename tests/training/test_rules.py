"""Rules see each step before and after the optimiser, rewrite it, and go on exactly after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import vector_batches
from torch import Tensor, nn
from training_runs import (
    QUIET,
    Interrupted,
    Schedule,
    assert_same_state,
    constant,
    loader,
    semu,
    sgd,
    train,
    trained_state,
)

from semu_peft import ClipGradientNorm, Rule
from semu_peft.objectives import CrossEntropy, RandomLabel
from semu_peft.training.rules import Step


class Momentum(Rule):
    """Rewrite what the optimiser did: a running mean of its changes, which is a state of the rule's own."""

    def __init__(self) -> None:
        self.mean: dict[str, Tensor] = {}

    def update(self, step: Step) -> None:
        for name, change in step.changes.items():
            self.mean[name] = 0.5 * self.mean.get(name, torch.zeros_like(change)) + 0.5 * change
            step.parameters[name].copy_(step.before[name] + self.mean[name])

    def state_dict(self) -> dict[str, Any]:
        return {"mean": dict(self.mean)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = dict(state["mean"])


@pytest.mark.parametrize(
    "options", [{"rules": ClipGradientNorm(0.01)}, {"rules": [ClipGradientNorm(0.01)]}, {"max_grad_norm": 0.01}]
)
def test_clipping(options: dict[str, Any]) -> None:
    """The gradient's norm over all trained parameters is cut to `max_norm`; smaller gradients stay."""
    model = semu()
    before = trained_state(model)
    train(model, vector_batches(1), 100 * CrossEntropy(), optimizer=sgd, epochs=1, **QUIET, **options)
    step = torch.stack([(tensor - before[name]).square().sum() for name, tensor in trained_state(model).items()])
    assert step.sum().sqrt().item() == pytest.approx(0.01, rel=1e-3)
    small, unclipped = semu(), semu()
    train(small, vector_batches(1), 1e-4 * CrossEntropy(), optimizer=sgd, epochs=1, **QUIET, **options)
    train(unclipped, vector_batches(1), 1e-4 * CrossEntropy(), optimizer=sgd, epochs=1, **QUIET)
    assert_same_state(trained_state(small), trained_state(unclipped))


def test_clipping_is_pytorchs() -> None:
    """The clipped gradients are those of `torch.nn.utils.clip_grad_norm_`, bit by bit."""
    parameters = {str(index): nn.Parameter(torch.zeros(3, index + 1)) for index in range(4)}
    twins = [nn.Parameter(torch.zeros_like(parameter)) for parameter in parameters.values()]
    for parameter, twin in zip(parameters.values(), twins, strict=True):
        parameter.grad = torch.randn(parameter.shape)
        twin.grad = parameter.grad.clone()
    ClipGradientNorm(0.7).gradients(Step(0, nn.Identity(), parameters))
    torch.nn.utils.clip_grad_norm_(twins, 0.7)
    assert all(torch.equal(p.grad, twin.grad) for p, twin in zip(parameters.values(), twins, strict=True))


@pytest.mark.parametrize("norm", [0, -1.0, float("nan"), "1"])
def test_a_norm_must_be_above_zero(norm: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="`max_norm`"):
        ClipGradientNorm(norm)


def test_rules_are_applied_in_order_around_the_optimiser() -> None:
    """Each rule sees what the one before it left: first all gradients, then the update, then all changes."""
    seen: list[str] = []

    class Doubles(Rule):
        def __init__(self, name: str) -> None:
            self.name = name

        def gradients(self, step: Step) -> None:
            seen.append(f"{self.name} gradients {step.number}")
            assert not torch.is_grad_enabled()
            for gradient in step.gradients.values():
                gradient.mul_(2.0)

        def update(self, step: Step) -> None:
            seen.append(f"{self.name} update {step.number}")
            for name, change in step.changes.items():
                step.parameters[name].add_(change)

    model, twin = semu(), semu()
    train(model, vector_batches(2), CrossEntropy(), rules=[Doubles("a"), Doubles("b")], optimizer=sgd, epochs=1,
            scheduler=constant, max_steps=1, **QUIET)  # fmt: skip
    train(twin, vector_batches(1), 16 * CrossEntropy(), optimizer=sgd, epochs=1, scheduler=constant, **QUIET)
    assert seen == ["a gradients 0", "b gradients 0", "a update 0", "b update 0"]
    for name, tensor in trained_state(model).items():
        torch.testing.assert_close(tensor, trained_state(twin)[name], atol=1e-6, rtol=1e-5)


def test_a_rule_sees_the_accumulated_gradient_once_a_step() -> None:
    numbers: list[int] = []

    class Counts(Rule):
        def gradients(self, step: Step) -> None:
            numbers.append(step.number)
            assert set(step.gradients) == set(step.parameters) == set(step.before)

    train(semu(), vector_batches(5), CrossEntropy(), rules=Counts(), gradient_accumulation_steps=2, epochs=1, **QUIET)
    assert numbers == [0, 1, 2]


@pytest.mark.parametrize("at", [2, 5])
def test_a_rewritten_run_resumes_exactly(at: int, tmp_path: Path) -> None:
    """A rule that rewrites AdamW's changes, with a state of its own, ends with the bits of the uninterrupted run."""

    def run(model: nn.Module, dies_after: float = float("inf"), **options: Any) -> Any:
        schedule = type("Dying", (Schedule,), {"dies_after": dies_after})
        return train(
            model, loader(), RandomLabel(seed=3), rules=[Momentum()], max_grad_norm=0.5, scheduler=schedule, epochs=3,
            output_dir=tmp_path, **QUIET, **options,
        )  # fmt: skip

    whole, resumed, plain_run = semu(), semu(), semu()
    expected = run(whole)
    with pytest.raises(Interrupted):
        run(semu(), dies_after=at, checkpointing_steps=at)
    result = run(resumed, resume_from_checkpoint="latest")
    assert result.history == expected.history
    assert_same_state(trained_state(resumed), trained_state(whole))
    train(plain_run, loader(), RandomLabel(seed=3), max_grad_norm=0.5, scheduler=Schedule, epochs=3, **QUIET)
    assert any(not torch.equal(a, b) for a, b in zip(trained_state(plain_run).values(), trained_state(whole).values(), strict=True))  # fmt: skip  # noqa: E501


def test_a_run_with_other_rules_is_not_resumed(tmp_path: Path) -> None:
    train(semu(), loader(), CrossEntropy(), rules=[Momentum()], output_dir=tmp_path, checkpointing_steps=2, **QUIET)
    model = semu()
    before = trained_state(model)
    with pytest.raises(ValueError, match=r"rules is \[\] here and \['Momentum'\] there"):
        train(model, loader(), CrossEntropy(), output_dir=tmp_path, resume_from_checkpoint="latest", **QUIET)
    assert_same_state(trained_state(model), before)
