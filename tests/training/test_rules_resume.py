"""Every rule goes on exactly where a checkpoint left off, and says what it cannot work with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import vector_batches
from torch import Tensor, nn
from training_runs import QUIET, Interrupted, assert_same_state, loader, semu, train, trained_state

from semu_peft import Callback, Mask, NormCap, RemoveLeading, Retain, RetainSafe, Rule, gather, unlearn
from semu_peft.gradients import LayerCovariance
from semu_peft.objectives import CrossEntropy, RandomLabel, UniformDistribution
from semu_peft.training import rules
from semu_peft.training.rules import (
    ClipGradientNorm,
    Precondition,
    PrivateGradient,
    Ramp,
    RemoveDirections,
    RoutedGradient,
    RowScale,
    SharpnessAware,
    SoftThreshold,
)

Make = Callable[[nn.Module], Rule]


def ones_of_each(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.ones_like(p) for name, p in model.named_parameters() if p.requires_grad}


def half_of_each(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(value.shape, generator=generator) < 0.5 for name, value in trained_state(model).items()}


def covariances(model: nn.Module) -> Any:
    batches, kind = vector_batches(2, seed=4), LayerCovariance
    return gather(model, batches, CrossEntropy(), statistic=kind, adapter_name="default", progress=False)


RULES: dict[str, Make] = {
    "ClipGradientNorm": lambda model: ClipGradientNorm(0.5),
    "Mask": lambda model: Mask(half_of_each(model)),
    "NormCap": lambda model: NormCap(0.05),
    "Precondition": lambda model: Precondition.by(covariances(model)),
    "PrivateGradient": lambda model: PrivateGradient(1.0, 0.5, seed=3),
    "RemoveDirections": lambda model: RemoveDirections.shared(covariances(model), inputs=1, outputs=0),
    "RemoveLeading": lambda model: RemoveLeading(1, "hard"),
    "RetainSafe": lambda model: RetainSafe(memory=2),
    "RoutedGradient": lambda model: RoutedGradient(ones_of_each(model), half_of_each(model), 0.5),
    "RowScale": lambda model: RowScale(2.0),
    "SharpnessAware": lambda model: SharpnessAware(0.1),
    "SoftThreshold": lambda model: SoftThreshold(Ramp(0.0, 1e-3, begin=1, end=5)),
}


class StopsAfter(Callback):
    """Pulls the plug after the checkpoint of so many steps."""

    def __init__(self, steps: float) -> None:
        self.steps = steps

    def on_step_end(self, context: Any) -> None:
        if context.progress.step > self.steps:
            raise Interrupted


def test_every_rule_is_here() -> None:
    """`AllocateRanks` is AdaLoRA's alone, and remembers nothing: see test_carriers.py."""
    names = {name for name in rules.__all__ if isinstance(getattr(rules, name), type)}
    assert {name for name in names if issubclass(getattr(rules, name), Rule)} - {
        "Rule",
        "AllocateRanks",
    } == RULES.keys()


@pytest.mark.filterwarnings("ignore:The loss ended")
@pytest.mark.parametrize("name", RULES)
def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    """By AdamW, with objectives and a loader that draw; the rule is not one that does nothing."""

    def run(model: nn.Module, rules: list[Rule], **options: Any) -> Any:
        keep = Retain(loader(seed=4), RandomLabel(seed=5), weight=0 if name == "PrivateGradient" else 0.5)
        return train(model, loader(), RandomLabel(seed=3), retain=keep, rules=rules, **options)

    ruled, free = _resumes([name], tmp_path, run), semu(explained_variance=0.95)
    run(free, [], **QUIET)
    assert any(not torch.equal(value, trained_state(free)[key]) for key, value in ruled.items())


@pytest.mark.parametrize(
    "names", [["RetainSafe", "NormCap"], sorted(RULES.keys() - {"RetainSafe", "NormCap", "PrivateGradient"})]
)
def test_so_does_one_by_natural_gradients(names: list[str], tmp_path: Path) -> None:
    """Those with a state of their own, and all others that can be together."""

    def run(model: nn.Module, rules: list[Rule], **options: Any) -> Any:
        loss, keep = (
            UniformDistribution() + 1e-3 * RandomLabel(seed=3),
            Retain(vector_batches(2, seed=4), CrossEntropy()),
        )
        return unlearn(model, vector_batches(2), loss, retain=keep, rules=rules, max_steps=6, **options)

    _resumes(names, tmp_path, run)


def _resumes(names: list[str], folder: Path, run: Callable[..., Any]) -> dict[str, Tensor]:
    def go(model: nn.Module, steps: float = float("inf"), **options: Any) -> Any:
        return run(model, [RULES[name](model) for name in names], callbacks=StopsAfter(steps), **options, **QUIET)

    whole, interrupted, resumed = (semu(explained_variance=0.95) for _ in range(3))
    expected = go(whole)
    with pytest.raises(Interrupted):
        go(interrupted, 3, output_dir=folder, checkpointing_steps=3)
    result = go(resumed, output_dir=folder, resume_from_checkpoint="latest")
    assert result.history == expected.history and result.steps > 3
    assert_same_state(trained_state(resumed), trained_state(whole))
    return trained_state(whole)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (PrivateGradient(1.0, 1.0), "natural gradients have no such optimiser"),
        (SoftThreshold(0.1, times_learning_rate=True), "reads a learning rate"),
        (RemoveDirections({"no.such": torch.ones(6, 1)}), "`inputs` must name trained layers"),
        (RemoveDirections({"fc1": torch.ones(5, 1)}), r"must be of shape \(6, k\)"),
        (Precondition({"fc1": torch.eye(5)}), r"`inputs` of layer 'fc1' must be of shape"),
        (Precondition({"fc1": torch.zeros(6, 6)}), "`damping` must be larger"),
        (Precondition({"no.such": torch.eye(6)}), "must name trained layers"),
        (SoftThreshold(0.1, parameters="no_such"), "`parameters` must match"),
    ],
)
def test_what_does_not_fit_a_run_is_said(rule: Rule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unlearn(semu(), vector_batches(1), RandomLabel(), rules=rule, **QUIET)


def test_private_gradients_refuse_a_retain_term_with_a_weight() -> None:
    keep = Retain(vector_batches(1), CrossEntropy())
    with pytest.raises(ValueError, match="`retain` must weigh nothing"):
        train(semu(), vector_batches(1), CrossEntropy(), retain=keep, rules=PrivateGradient(1.0, 1.0), **QUIET)


def test_a_loop_that_gives_no_data_is_told_so() -> None:
    step = rules.Step(0, nn.Identity(), {"w": nn.Parameter(torch.ones(1))})
    for rule in (RetainSafe(), SharpnessAware()):
        with pytest.raises(ValueError, match="gradients of its own"):
            rule.gradients(step)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RemoveLeading(-1), "`rank`"),
        (lambda: RemoveLeading(1, "firm"), "`mode`"),  # type: ignore[arg-type]
        (lambda: RemoveDirections([1]), "`inputs`"),  # type: ignore[arg-type]
        (lambda: RemoveDirections.shared({"a": 1}), "`covariances`"),
        (lambda: Precondition.by({"a": 1}), "`covariances`"),
        (lambda: Precondition(damping=-1.0), "`damping`"),
        (lambda: NormCap(0.0), "`limit`"),
        (lambda: RowScale(0.0), "`eta`"),
        (lambda: SharpnessAware(-1.0), "`radius`"),
        (lambda: PrivateGradient(0.0, 1.0), "`max_norm`"),
        (lambda: PrivateGradient(1.0, -1.0), "`noise_multiplier`"),
        (lambda: SoftThreshold(-1.0), "`threshold`"),
        (lambda: SoftThreshold(1.0, times_learning_rate=1), "`times_learning_rate`"),  # type: ignore[arg-type]
        (lambda: SoftThreshold(1.0, parameters=["w"]), "`parameters`"),  # type: ignore[arg-type]
        (lambda: Ramp(0.0, 1.0, begin=3, end=3), "`end`"),
    ],
)
def test_arguments_are_checked_where_the_rule_is_made(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()
