"""What Accelerate keeps for the whole process is after a run what it was before."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from models import vector_batches
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Sampler
from training_runs import QUIET, assert_same_state, semu, train, trained_state

from semu_peft import NaturalGradient, Retain, unlearn
from semu_peft.objectives import CrossEntropy, DecoupledDistillation

SHARED = (PartialState, AcceleratorState, GradientState)


def shared() -> list[dict[str, Any]]:
    return [dict(state._shared_state) for state in SHARED]


def test_nothing_is_left_of_a_run() -> None:
    assert shared() == [{}, {}, {}]
    train(semu(), vector_batches(), CrossEntropy(), mixed_precision="bf16", **QUIET)
    assert shared() == [{}, {}, {}]
    assert Accelerator(mixed_precision="no", cpu=True).mixed_precision == "no"


def test_nothing_is_left_of_a_run_that_failed() -> None:
    with pytest.raises(ZeroDivisionError):
        train(semu(), vector_batches(), lambda model, batch: 1 / 0, mixed_precision="bf16", **QUIET)
    assert shared() == [{}, {}, {}]


def test_the_callers_accelerator_keeps_its_settings() -> None:
    """A run of its own precision beside an Accelerator that it was not given leaves that one as it is."""
    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_steps=4, cpu=True)
    before, dtypes, model = shared(), set(), semu()
    model.base_model.model.fc1.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    train(model, vector_batches(), CrossEntropy(), mixed_precision="bf16", **QUIET)
    assert dtypes == {torch.bfloat16} and shared() == before
    assert accelerator.mixed_precision == "no" and accelerator.gradient_accumulation_steps == 4


def test_an_accelerator_left_in_the_middle_of_accumulating_takes_the_steps() -> None:
    """Its optimisers take none in between: the loss stayed the same, and nothing said why."""
    accelerator, model = Accelerator(gradient_accumulation_steps=2, cpu=True), semu()
    other = nn.Linear(2, 2)
    with accelerator.accumulate(other):
        other(torch.ones(1, 2)).sum().backward()
    before = trained_state(model)
    train(model, vector_batches(), CrossEntropy(), accelerator=accelerator, **QUIET)
    assert any(not torch.equal(now, before[name]) for name, now in trained_state(model).items())
    assert not accelerator.sync_gradients and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "dials",
    [{"learning_rate": 1e-3}, {}, {"optimizer": NaturalGradient(max_retain_kl=0.1)}, {"mixed_precision": "bf16"}],
    ids=str,
)
def test_a_model_is_freed_with_its_last_name(dials: dict[str, Any]) -> None:
    """Nothing of a run refers to itself in a circle, which would keep the weights until a garbage collection."""
    model = semu()
    gc.collect()
    gc.disable()
    try:
        unlearn(model, vector_batches(), DecoupledDistillation(), epochs=2, **dials, **QUIET)
        there = weakref.ref(model)
        del model
        assert there() is None
    finally:
        gc.enable()


class Stream(IterableDataset[Any]):
    """Ready batches without a length, anew at each pass."""

    def __init__(self, count: int) -> None:
        self.count, self.passes = count, 0

    def __iter__(self) -> Any:
        self.passes += 1
        yield from vector_batches(self.count)


@pytest.mark.parametrize("given", ["dataset", "loader"])
def test_an_iterable_dataset_is_trained_on_for_max_steps(given: str) -> None:
    """It is gone through as often as the steps need, and the run is that of the same batches in a list.

    Where `epochs` are given, it is gone through so often at most.
    """
    stream, model, twin = Stream(3), semu(), semu()
    data = stream if given == "dataset" else DataLoader(stream, batch_size=None)
    result = train(model, data, CrossEntropy(), max_steps=7, epochs=None, **QUIET)
    train(twin, vector_batches(3), CrossEntropy(), max_steps=7, epochs=3, **QUIET)
    assert result.steps == 7 and [entry["epoch"] for entry in result.history] == [0, 0, 0, 1, 1, 1, 2]
    assert_same_state(trained_state(model), trained_state(twin))
    assert train(semu(), data, CrossEntropy(), max_steps=7, epochs=2, **QUIET).steps == 6


def test_an_endless_iterator_is_taken_as_far_as_max_steps_needs() -> None:
    def endless() -> Any:
        while True:
            taken.append(1)
            yield vector_batches(1)[0]

    taken: list[int] = []
    result = train(semu(), endless(), CrossEntropy(), max_steps=4, gradient_accumulation_steps=2, **QUIET)
    assert result.steps == 4 and len(taken) == 9


class Promised(Sampler[int]):
    """Promises five examples and gives fewer."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Any:
        return iter(range(self.count))


def test_a_loader_that_runs_dry_ends_the_run() -> None:
    """Fewer batches than promised are shorter epochs; none at all are an error rather than an endless loop."""

    def dry(count: int) -> DataLoader[Any]:
        examples = [(x[0], y[0]) for x, y in vector_batches(5)]
        return DataLoader(examples, batch_size=1, sampler=Promised(count))

    assert train(semu(), dry(2), CrossEntropy(), **QUIET).steps == 4
    with pytest.raises(ValueError, match="`forget` gave no batch in epoch 0"):
        train(semu(), dry(0), CrossEntropy(), **QUIET)
    with pytest.raises(ValueError, match="`retain` gave no batch in epoch 0"):
        train(semu(), vector_batches(), CrossEntropy(), retain=Retain(dry(0), CrossEntropy()), **QUIET)


class Once(IterableDataset[Any]):
    """A stream that is an iterator, which gives its examples a single time."""

    def __init__(self) -> None:
        self.examples = iter([(x[0], y[0]) for x, y in vector_batches(2)])

    def __iter__(self) -> Any:
        return self.examples


def test_a_stream_that_does_not_begin_again_is_told() -> None:
    stream, again = DataLoader(Once(), batch_size=1), "`{}` gave no batch in epoch 1"
    with pytest.raises(ValueError, match=again.format("forget")):
        train(semu(), stream, CrossEntropy(), max_steps=4, **QUIET)
    retain = Retain(DataLoader(Once(), batch_size=1), CrossEntropy())
    with pytest.raises(ValueError, match=again.format("retain")):
        train(semu(), vector_batches(5), CrossEntropy(), retain=retain, max_steps=4, **QUIET)


def test_a_resume_with_less_data_is_refused(tmp_path: Path) -> None:
    """The data is part of what a run is, and compared before anything is loaded."""
    options: dict[str, Any] = {"epochs": 9, "max_steps": 5, "output_dir": tmp_path, **QUIET}
    train(semu(), vector_batches(5), CrossEntropy(), checkpointing_steps=4, **options)
    with pytest.raises(ValueError, match=r"batches is \[3\] here and \[5\] there"):
        train(semu(), vector_batches(3), CrossEntropy(), resume_from_checkpoint="latest", **options)


def test_several_retain_sets_are_weighted_and_cycled_each_for_itself() -> None:
    """The retain loss is the weighted sum; each set has a position and an order of its own."""
    seen: dict[str, list[float]] = {"a": [], "b": []}

    def watched(name: str) -> Any:
        def objective(model: nn.Module, batch: Any) -> torch.Tensor:
            seen[name].append(batch[0][0, 0].item())
            return CrossEntropy()(model, batch)

        return objective

    def numbered(count: int) -> list[Any]:
        return [(torch.full((2, 6), float(index)), torch.zeros(2, dtype=torch.long)) for index in range(count)]

    model, twin = semu(), semu().eval()
    retain = [Retain(numbered(2), watched("a"), 0.5), Retain(numbered(3), watched("b"), 2.0)]
    first = 0.5 * CrossEntropy()(twin, numbered(1)[0]) + 2.0 * CrossEntropy()(twin, numbered(1)[0])
    result = train(model, vector_batches(4), CrossEntropy(), retain=retain, epochs=1, **QUIET)
    assert seen == {"a": [0.0, 1.0, 0.0, 1.0], "b": [0.0, 1.0, 2.0, 0.0]}
    assert result.history[0]["retain_loss"] == pytest.approx(first.item(), rel=1e-5)
    for entry in result.history:
        assert entry["loss"] == pytest.approx(entry["forget_loss"] + entry["retain_loss"], rel=1e-5)


def test_the_result_prints_in_one_line() -> None:
    result = train(semu(), vector_batches(), CrossEntropy(), **QUIET)
    assert repr(result).startswith("UnlearnResult(steps=6, ") and len(repr(result)) < 160
    with pytest.raises(AttributeError):
        result.steps = 3  # type: ignore[misc]
