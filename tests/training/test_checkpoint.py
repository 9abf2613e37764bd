"""Checkpoints are of one run, whole or passed over, without pickled code; no step is kept that is not finite."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from models import vector_batches
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from training_runs import QUIET, Interrupted, Schedule, assert_same_state, constant, loader, semu, train, trained_state

from semu_peft.objectives import CrossEntropy, RandomLabel
from semu_peft.objectives.original import original
from semu_peft.objectives.retain import Retain
from semu_peft.training.callbacks import Callback
from semu_peft.training.rules import Rule


def run(folder: Path, model: nn.Module | None = None, dies_after: float = float("inf"), **options: Any) -> Any:
    """A short run, of 6 steps."""
    given = {"forget": vector_batches(3), "objective": CrossEntropy(), "epochs": 2, "checkpointing_steps": 1}
    given["scheduler"] = type("Dying", (Schedule,), {"dies_after": dies_after})
    return train(semu() if model is None else model, output_dir=folder, **{**given, **options}, **QUIET)


OTHERS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 1},
    "steps": {"epochs": 3},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2, "epochs": 3},
    "objective": {"objective": RandomLabel()},
    "optimizer": {"learning_rate": 0.5},
    "schedule": {"scheduler": constant},
    "retain": {"retain": Retain(vector_batches(2), CrossEntropy())},
    "batches": {"forget": vector_batches(4), "max_steps": 6},
    "first batch of forget": {"forget": vector_batches(3, seed=5)},
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_another_run_neither_resumes_nor_writes_beside(name: str, tmp_path: Path) -> None:
    """Whatever differs is found before anything is loaded, and said with both values and the mend."""
    run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for options, argument in (({"resume_from_checkpoint": "latest"}, "resume_from_checkpoint"), ({}, "output_dir")):
        model = semu()
        weights = trained_state(model)
        with pytest.raises(ValueError, match=rf"`{argument}` must be .* here and .* there") as raised:
            run(tmp_path, model, **OTHERS[name], **options)
        assert name in str(raised.value)
        assert_same_state(trained_state(model), weights)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_latest_starts_where_there_is_nothing_yet(tmp_path: Path) -> None:
    """One command serves the first start and every restart."""
    whole, resumed = semu(), semu()
    run(tmp_path / "alone", whole)
    with pytest.raises(Interrupted):
        run(tmp_path / "run", resume_from_checkpoint="latest", dies_after=3)
    assert run(tmp_path / "run", resumed, resume_from_checkpoint="latest").steps == 6
    assert_same_state(trained_state(resumed), trained_state(whole))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "unlearn_state.pt", "random_states_0.pkl"])
def test_a_damaged_checkpoint_is_passed_over_by_latest_and_named_otherwise(name: str, tmp_path: Path) -> None:
    whole, resumed = semu(), semu()
    run(tmp_path, whole)
    damaged = tmp_path / "checkpoint-6" / name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        run(tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-6")
    with pytest.warns(UserWarning, match="goes on from .*checkpoint-5 instead"):
        run(tmp_path, resumed, resume_from_checkpoint="latest")
    assert_same_state(trained_state(resumed), trained_state(whole))
    assert (tmp_path / "checkpoint-6" / name).read_bytes() != bytes(content)


def test_latest_does_not_start_anew_over_damaged_checkpoints(tmp_path: Path) -> None:
    run(tmp_path, checkpointing_steps=6)
    (tmp_path / "checkpoint-6" / "optimizer.bin").unlink()
    with pytest.raises(ValueError, match=r"optimizer\.bin is damaged or missing"):
        run(tmp_path, resume_from_checkpoint="latest")


@pytest.mark.parametrize("left", ["checkpoint-6.partial", "checkpoint-6.replaced"])
def test_a_kill_while_the_only_checkpoint_is_replaced(left: str, tmp_path: Path) -> None:
    """Between two renames nothing has the final name; what has another is whole, and found."""
    whole, resumed = semu(), semu()
    run(tmp_path, whole, checkpointing_steps=6)
    (tmp_path / "checkpoint-6").rename(tmp_path / left)
    assert run(tmp_path, resumed, resume_from_checkpoint="latest").steps == 6
    assert_same_state(trained_state(resumed), trained_state(whole))


def test_killed_writers_leave_nothing_that_stays(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path, dies_after=3)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-9.partial")
    (tmp_path / "checkpoint-1.replaced").mkdir()
    run(tmp_path, resume_from_checkpoint="latest")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in range(1, 7)]


def test_save_total_limit_keeps_the_newest(tmp_path: Path) -> None:
    run(tmp_path, save_total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-6"]
    run(tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-5", save_total_limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


@pytest.mark.skipif(os.name == "nt", reason="no folder locks there")
def test_one_writer_a_folder(tmp_path: Path) -> None:
    """A second run, in this or another process, does not mix its checkpoints in; the lock ends with the first."""

    class Second(Callback):
        def on_train_begin(self, context: Any) -> None:
            run(tmp_path)

    with pytest.raises(ValueError, match="`output_dir` must be a folder that no other run writes to"):
        run(tmp_path, callbacks=Second())
    run(tmp_path)


class Draws(Dataset[Any]):
    """Noise on every example, of generators that the data set holds itself."""

    def __init__(self) -> None:
        self.torch, self.python = torch.Generator().manual_seed(1), random.Random(1)
        self.numpy, self.legacy = np.random.default_rng(1), np.random.RandomState(1)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(6, generator=self.torch) + self.numpy.normal() + self.legacy.normal() + self.python.random()
        return x, torch.tensor(index % 4)


def drawn() -> DataLoader[Any]:
    data = Draws()
    return DataLoader(data, batch_size=4, sampler=RandomSampler(data, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_samplers_and_data_with_generators_of_their_own_resume_exactly(at: int, tmp_path: Path) -> None:
    """In the middle of an epoch and between two; also by the loader whose generators the killed run has moved."""
    whole, fresh, again = semu(), semu(), semu()
    expected = run(tmp_path / "alone", whole, forget=drawn())
    used = drawn()
    with pytest.raises(Interrupted):
        run(tmp_path / "run", forget=used, dies_after=at)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert run(tmp_path / "run", fresh, forget=drawn(), resume_from_checkpoint="latest").history == expected.history
    assert_same_state(trained_state(fresh), trained_state(whole))
    run(tmp_path / "copy", again, forget=used, resume_from_checkpoint="latest")
    assert_same_state(trained_state(again), trained_state(whole))


class Counter:
    """What a user registers with the Accelerator."""

    def __init__(self, value: Any = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def with_counter(value: Any) -> tuple[Accelerator, Counter]:
    accelerator, counter = Accelerator(cpu=True), Counter(value)
    accelerator.register_for_checkpointing(counter)
    return accelerator, counter


def test_what_the_user_registered_comes_back_without_pickled_code(tmp_path: Path) -> None:
    """Accelerate itself would unpickle any code out of the folder."""

    class Payload:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "executed"), "w")

    accelerator, _ = with_counter(7)
    run(tmp_path / "run", accelerator=accelerator)
    assert not list((tmp_path / "run").rglob("custom_checkpoint*"))
    for name in ("checkpoint-6", "checkpoint-5"):
        accelerator, counter = with_counter(0)
        run(tmp_path / "run", accelerator=accelerator, resume_from_checkpoint=tmp_path / "run" / name)
        assert counter.value == 7 and accelerator._custom_objects == [counter]
    shutil.copytree(tmp_path / "run" / "checkpoint-6", tmp_path / "attacked")
    torch.save(Payload(), tmp_path / "attacked" / "custom_checkpoint_0.pkl")
    with pytest.raises(ValueError, match="with 'custom_checkpoint_0.pkl' in it besides"):
        run(tmp_path / "run", accelerator=with_counter(0)[0], resume_from_checkpoint=tmp_path / "attacked")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ValueError, match="1 registered objects, this one has 0"):
        run(tmp_path / "run", accelerator=Accelerator(cpu=True), resume_from_checkpoint="latest")


def test_a_state_that_only_pickle_could_read_is_refused_when_it_is_written(tmp_path: Path) -> None:
    accelerator, _ = with_counter(np.zeros(2))
    with pytest.raises(TypeError, match="`state_dict` of objectives.*Turn NumPy's arrays into tensors"):
        run(tmp_path, accelerator=accelerator)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ""]


# ---- steps that are not finite ----


def test_a_finite_loss_with_a_gradient_that_is_not(tmp_path: Path) -> None:
    """The root of a distance has no derivative at the start, where the adapter does nothing yet."""

    def distance(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.no_grad(), original(model) as reference:
            before = reference(batch[0])
        return 1 - (model(batch[0]) - before).square().sum().sqrt()

    model = semu()
    before = trained_state(model)
    for optimizer in (None, torch.optim.LBFGS):
        with pytest.raises(ValueError, match="gradient is not finite at step 0"):
            train(model, vector_batches(), distance, optimizer=optimizer, **QUIET)
        assert_same_state(trained_state(model), before)


def test_weights_that_an_optimiser_or_a_rule_blows_up() -> None:
    class Explodes(Rule):
        def update(self, step: Any) -> None:
            if step.number == 2:
                next(iter(step.parameters.values())).fill_(float("inf"))

    good, model = semu(), semu()
    train(good, loader(), CrossEntropy(), epochs=1, callbacks=StopAt(2), **QUIET)
    with pytest.raises(ValueError, match="weight that the optimiser or a rule made is not finite at step 2"):
        train(model, loader(), CrossEntropy(), epochs=1, rules=Explodes(), **QUIET)
    assert_same_state(trained_state(model), trained_state(good))
    plain = semu()
    before = trained_state(plain)
    with pytest.raises(ValueError, match="not finite at step 0"):
        train(plain, loader(), CrossEntropy(), optimizer=lambda p: torch.optim.SGD(p, lr=float("inf")), **QUIET)
    assert_same_state(trained_state(plain), before)


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, context: Any) -> None:
        context.control.should_stop |= context.progress.step >= self.step
