"""Callbacks see the run as it goes, stop it, and keep their state in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import vector_batches
from torch import nn
from training_runs import QUIET, Interrupted, Schedule, assert_same_state, loader, semu, train, trained_state

from semu_peft import Callback, EarlyStopping
from semu_peft.objectives import CrossEntropy, RandomLabel
from semu_peft.training.callbacks import TrainingContext


class Diary:
    """An object that is no `Callback` and has some of the events."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int, int]] = []

    def on_train_begin(self, context: TrainingContext) -> None:
        assert context.total_steps == 6 and not torch.is_grad_enabled()
        self.write("begin", context)

    def on_step_end(self, context: TrainingContext) -> None:
        assert not context.model.training and len(context.progress.history) == context.progress.step
        context.model.train()
        self.write("step", context)

    def on_epoch_end(self, context: TrainingContext) -> None:
        self.write("epoch", context)

    def write(self, event: str, context: TrainingContext) -> None:
        self.lines.append((event, context.progress.step, context.progress.forget.epoch))


def test_events_and_their_order() -> None:
    """A step's event comes before its epoch's; a callback that changes modes disturbs nothing."""

    class End(Callback):
        def on_train_end(self, context: TrainingContext) -> None:
            ended.append(context.progress.step)

    ended: list[int] = []
    diary, model, twin = Diary(), semu(), semu()
    train(model, vector_batches(), CrossEntropy(), callbacks=[diary, End()], **QUIET)
    train(twin, vector_batches(), CrossEntropy(), **QUIET)
    steps = [[("step", 1, 0), ("step", 2, 0), ("step", 3, 0)], [("step", 4, 1), ("step", 5, 1), ("step", 6, 1)]]
    assert diary.lines == [("begin", 0, 0), *steps[0], ("epoch", 3, 1), *steps[1], ("epoch", 6, 2)]
    assert ended == [6]
    assert_same_state(trained_state(model), trained_state(twin))


def test_a_callback_stops_the_run_after_its_step() -> None:
    class AtTwo(Callback):
        def on_step_end(self, context: TrainingContext) -> None:
            context.log(seen=float(context.progress.step))
            context.control.should_stop = context.progress.step == 2

    result = train(semu(), vector_batches(5), CrossEntropy(), callbacks=AtTwo(), **QUIET)
    assert result.steps == 2 and result.stopped_early
    assert [entry["seen"] for entry in result.history] == [1.0, 2.0]


@pytest.mark.parametrize(("restore_best", "kept"), [(True, 2), (False, 4)])
def test_the_best_weights_are_put_back(restore_best: bool, kept: int) -> None:
    """With the metric highest after the second epoch, that epoch's core is what the run leaves."""
    after_epoch: list[dict[str, torch.Tensor]] = []
    values = iter([0.1, 0.9, 0.5, 0.4, 0.3])

    def metric(model: nn.Module) -> float:
        after_epoch.append(trained_state(model))
        return next(values)

    model = semu()
    stopping = EarlyStopping(metric, patience=2, restore_best=restore_best)
    result = train(model, vector_batches(), CrossEntropy(), callbacks=stopping, epochs=5, **QUIET)
    assert result.steps == 12 and result.stopped_early
    assert_same_state(trained_state(model), after_epoch[kept - 1])
    assert not torch.equal(*(next(iter(after_epoch[index].values())) for index in (1, 3)))


def test_the_highest_metric_is_best_even_below_the_least_gain() -> None:
    """`min_delta` decides about stopping, not about what was best."""
    after_epoch: list[dict[str, torch.Tensor]] = []
    values = iter([0.5, 0.505, 0.2])

    def metric(model: nn.Module) -> float:
        after_epoch.append(trained_state(model))
        return next(values)

    model = semu()
    train(model, vector_batches(), CrossEntropy(), callbacks=EarlyStopping(metric), epochs=3, **QUIET)
    assert_same_state(trained_state(model), after_epoch[1])


@pytest.mark.parametrize("at", [4, 7])
def test_the_best_weights_are_kept_across_a_resume(at: int, tmp_path: Path) -> None:
    """The best epoch lies before the checkpoint; the resumed run puts its weights back all the same."""

    def run(model: nn.Module, dies_after: float = float("inf"), **options: Any) -> Any:
        schedule = type("Dying", (Schedule,), {"dies_after": dies_after})
        stopping = EarlyStopping(lambda m: -CrossEntropy()(m, vector_batches(1)[0]).item(), patience=9)
        return train(
            model, loader(), -CrossEntropy() + 0.1 * RandomLabel(), callbacks=[stopping], scheduler=schedule, epochs=3,
            output_dir=tmp_path, **QUIET, **options,
        )  # fmt: skip

    whole, resumed = semu(min_parameters=0), semu(min_parameters=0)
    expected = run(whole)
    metrics = [entry["metric"] for entry in expected.history if "metric" in entry]
    assert metrics[0] == max(metrics)
    with pytest.raises(Interrupted):
        run(semu(min_parameters=0), dies_after=at, checkpointing_steps=at)
    assert run(resumed, resume_from_checkpoint="latest").history == expected.history
    assert_same_state(trained_state(resumed), trained_state(whole))


def test_one_early_stopping_serves_two_runs() -> None:
    """The second run starts without the first one's best."""
    values = iter([0.9, 0.5, 0.4, 0.3, 0.2, 0.1])
    stopping = EarlyStopping(lambda model: next(values), patience=2)
    for _ in range(2):
        result = train(semu(), vector_batches(), CrossEntropy(), callbacks=stopping, epochs=9, **QUIET)
        assert result.steps == 9


@pytest.mark.parametrize("patience", [0, -1, 1.5, True])
def test_patience_is_a_positive_integer(patience: Any) -> None:
    with pytest.raises(ValueError, match="`patience`"):
        EarlyStopping(lambda model: 0.0, patience)
    with pytest.raises(TypeError, match="`metric`"):
        EarlyStopping(0.5)  # type: ignore[arg-type]
