"""The training loop: it trains the adapter and nothing else, resumes exactly, and gives everything back."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from models import CLASSES, Cnn, Mlp, Snapshot, image_batches, run, vector_batches
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler
from training_runs import (
    QUIET,
    Interrupted,
    Schedule,
    assert_same_state,
    loader,
    lora,
    oft,
    plain,
    semu,
    train,
    trained_state,
)  # fmt: skip

from semu_peft import Retain, SemuConfig, UnlearnResult, initialize_semu_weights
from semu_peft.objectives import (
    CrossEntropy,
    DecoupledDistillation,
    RandomLabel,
    UniformDistribution,
)
from semu_peft.training.callbacks import EarlyStopping
from semu_peft.tuner.adapted import semu_layers

# ---- what it trains ----


@pytest.mark.parametrize("mode", ["flatten", "per_channel"])
def test_the_loss_falls_and_only_the_cores_change(mode: str) -> None:
    """Base weights, BatchNorm statistics and bases are bit-identical afterwards; the loss on the data is lower."""
    model = semu(Cnn, conv_mode=mode)
    model.train()
    before, batches = Snapshot.of(model), image_batches()
    result = train(model, batches, CrossEntropy(), epochs=12, learning_rate=3e-2, **QUIET)
    now = Snapshot.of(model)
    changed = {name for name, tensor in now.state.items() if not torch.equal(tensor, before.state[name])}
    assert changed == {name for name in now.state if "semu_core" in name}
    assert now.state.keys() == before.state.keys()
    losses = [entry["loss"] for entry in result.history]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    model.eval()
    measured = sum(CrossEntropy()(model, batch).item() for batch in batches)
    assert measured < 0.8 * sum(losses[:3])


def test_everything_else_comes_back() -> None:
    """Modes, flags, hooks, module types, `forward`, and no gradient left behind."""
    model = semu(Cnn)
    model.train()
    model.base_model.model.norm.eval()
    before, attributes = Snapshot.of(model), set(vars(model))
    train(model, image_batches(), CrossEntropy(), epochs=1, mixed_precision="bf16", **QUIET)
    now = Snapshot.of(model)
    assert (now.modes, now.flags, now.types, now.hooks) == (before.modes, before.flags, before.types, before.hooks)
    assert not any(gradient is not None for gradient in now.gradients.values())
    assert set(vars(model)) == attributes
    assert run(model, image_batches()[0][0]).dtype == torch.float32
    copy.deepcopy(model)


def test_a_forward_of_the_users_own_comes_back() -> None:
    """A `forward` that the user has put on the instance stays there."""
    model = semu()
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    model.forward = forward
    train(model, vector_batches(), CrossEntropy(), epochs=1, **QUIET)
    assert model.__dict__["forward"] is forward


def test_dropout_is_off() -> None:
    """In train mode or in eval mode, the run is the same to the last bit."""
    states = []
    for training in (True, False):
        model = semu().train(training)
        train(model, vector_batches(), CrossEntropy(), epochs=2, **QUIET)
        states.append(trained_state(model))
    assert_same_state(*states)


def test_the_update_is_the_optimisers() -> None:
    """One step of plain SGD is θ − lr ∇; the loader's order, the sum with the retain loss and its weight included."""
    model, twin = semu(), semu()
    forget, retain = vector_batches(1), vector_batches(1, seed=8)
    loss = CrossEntropy()(twin.eval(), forget[0]) + 0.5 * UniformDistribution()(twin, retain[0])
    loss.backward()
    result = train(
        model, forget, CrossEntropy(), retain=Retain(retain, 0.5 * UniformDistribution()),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), epochs=1, **QUIET,
    )  # fmt: skip
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            expected = parameter.detach() - 0.1 * parameter.grad
            torch.testing.assert_close(dict(model.named_parameters())[name].detach(), expected)
    assert result.history[0]["loss"] == pytest.approx(loss.item())


@pytest.mark.parametrize("make", [lora, oft, plain], ids=["lora", "oft", "plain"])
@pytest.mark.parametrize("objective", [RandomLabel, DecoupledDistillation])
def test_other_methods(make: Callable[[], nn.Module], objective: Callable[..., Any]) -> None:
    """Other adapters and plain parameters are trained by the same loop; what is frozen stays to the last bit."""
    model = make()
    if objective is DecoupledDistillation and make is plain:
        chosen = DecoupledDistillation(reference=copy.deepcopy(model).eval())
    else:
        chosen = objective()
    before = Snapshot.of(model)
    result = train(model, vector_batches(), chosen, epochs=15, **QUIET)
    now = Snapshot.of(model)
    changed = {name for name, tensor in now.state.items() if not torch.equal(tensor, before.state[name])}
    assert changed and changed <= {name for name, flag in before.flags.items() if flag}
    assert result.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    losses = [entry["loss"] for entry in result.history]
    assert objective is RandomLabel or sum(losses[-6:]) < sum(losses[:6])
    assert now.modes == before.modes and now.flags == before.flags


def test_gradients_from_before_do_not_count() -> None:
    """A gradient that the user left on a parameter is not part of the first step."""
    clean, dirty = semu(), semu()
    for parameter in dirty.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 100.0)
    for model in (clean, dirty):
        train(model, vector_batches(), CrossEntropy(), epochs=1, **QUIET)
    assert_same_state(trained_state(dirty), trained_state(clean))


# ---- the loop ----


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_micro_batches_are_one_big_batch(accumulation: int) -> None:
    """k micro-batches a step give the steps, and the history, of batches k times as large."""
    x, y = vector_batches(1, 16)[0]
    small = [(a, b) for a, b in zip(x.split(2), y.split(2), strict=True)]
    size = 2 * accumulation
    large = [(a, b) for a, b in zip(x.split(size), y.split(size), strict=True)]
    first, second = semu(), semu()
    one = train(first, small, CrossEntropy(), epochs=3, gradient_accumulation_steps=accumulation, **QUIET)
    other = train(second, large, CrossEntropy(), epochs=3, **QUIET)
    assert one.steps == other.steps == 3 * 8 // accumulation
    assert one.examples_seen == other.examples_seen == 48
    for name, tensor in trained_state(first).items():
        torch.testing.assert_close(tensor, trained_state(second)[name], atol=1e-5, rtol=1e-4)
    assert [e["loss"] for e in one.history] == pytest.approx([e["loss"] for e in other.history], abs=1e-5)


def test_an_incomplete_group_at_the_end_of_an_epoch_is_a_step_of_its_own() -> None:
    """Five batches, two a step: three steps an epoch, and none reaches into the next epoch."""
    result = train(semu(), vector_batches(5), CrossEntropy(), epochs=2, gradient_accumulation_steps=2, **QUIET)
    assert result.steps == 6
    assert [entry["epoch"] for entry in result.history] == [0, 0, 0, 1, 1, 1]


def test_an_incomplete_group_weighs_its_batches_like_any_other() -> None:
    """The step of a group that is cut short by the end of the epoch takes the mean of the batches that it has."""
    batches = vector_batches(3)
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    cut, alone = semu(), semu()
    train(cut, batches, CrossEntropy(), epochs=1, gradient_accumulation_steps=2, optimizer=sgd, **QUIET)
    pair = (torch.cat([batches[0][0], batches[1][0]]), torch.cat([batches[0][1], batches[1][1]]))
    train(alone, [pair, batches[2]], CrossEntropy(), epochs=1, optimizer=sgd, **QUIET)
    for name, tensor in trained_state(cut).items():
        torch.testing.assert_close(tensor, trained_state(alone)[name], atol=1e-6, rtol=1e-5)


def test_clipping() -> None:
    """The gradient's norm over all trained parameters is cut to `max_grad_norm`."""
    model = semu()
    before = trained_state(model)
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=1.0)  # noqa: E731
    train(model, vector_batches(1), 100 * CrossEntropy(), optimizer=sgd, max_grad_norm=0.01, epochs=1, **QUIET)
    step = torch.stack([(tensor - before[name]).square().sum() for name, tensor in trained_state(model).items()])
    assert step.sum().sqrt().item() == pytest.approx(0.01, rel=1e-3)


def test_scheduler_and_optimiser_factories() -> None:
    """The optimiser gets exactly the trainable parameters, the scheduler the true number of steps, once a step."""
    seen: dict[str, Any] = {"rates": []}

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        seen["parameters"] = parameters
        return torch.optim.SGD(parameters, lr=1.0, momentum=0.9)

    def scheduler(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        seen["steps"] = steps
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: seen["rates"].append(step) or 1.0 / (1 + step))

    model = semu()
    train(
        model, vector_batches(5), CrossEntropy(), epochs=2, gradient_accumulation_steps=2, optimizer=optimizer,
        scheduler=scheduler, **QUIET,
    )  # fmt: skip
    assert [id(p) for p in seen["parameters"]] == [id(p) for p in model.parameters() if p.requires_grad]
    assert seen["steps"] == 6 and seen["rates"] == list(range(7))


@pytest.mark.parametrize(("limit", "steps"), [(1, 1), (4, 4), (100, 6)])
def test_max_steps(limit: int, steps: int) -> None:
    """`max_steps` bounds the run, also in the middle of an epoch."""
    result = train(semu(), vector_batches(), CrossEntropy(), epochs=2, max_steps=limit, **QUIET)
    assert result.steps == len(result.history) == steps


def test_history() -> None:
    """One entry a step with step, epoch and loss; with retain data its two parts; the metric at the end of an epoch."""
    model = semu()
    result = train(
        model, vector_batches(3), CrossEntropy(), epochs=2,
        retain=Retain(vector_batches(2, seed=4), UniformDistribution(), weight=0.5),
        callbacks=EarlyStopping(lambda m: 7.0, patience=5), **QUIET,
    )  # fmt: skip
    assert isinstance(result, UnlearnResult)
    assert [entry["step"] for entry in result.history] == [1, 2, 3, 4, 5, 6]
    for entry in result.history:
        assert entry["loss"] == pytest.approx(entry["forget_loss"] + entry["retain_loss"], rel=1e-5)
    assert ["metric" in entry for entry in result.history] == [False, False, True] * 2
    assert result.examples_seen == 24 and result.seconds > 0 and not result.stopped_early
    assert result.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    without = train(semu(), vector_batches(1), CrossEntropy(), epochs=1, **QUIET)
    assert set(without.history[0]) == {"step", "epoch", "loss"}


def test_history_is_of_this_run_only() -> None:
    """A second call starts counting at one."""
    model = semu()
    train(model, vector_batches(), CrossEntropy(), epochs=1, **QUIET)
    assert [entry["step"] for entry in train(model, vector_batches(), CrossEntropy(), epochs=1, **QUIET).history] == [
        1, 2, 3,
    ]  # fmt: skip


def test_retain_data_goes_round() -> None:
    """Fewer retain batches than forget batches are cycled through; more are taken up where they were left."""
    seen: list[int] = []

    def retain(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(int(batch[0][0, 0]))
        return CrossEntropy()(model, batch)

    batches = [(torch.full((2, 6), float(index)), torch.zeros(2, dtype=torch.long)) for index in range(4)]
    train(semu(), vector_batches(3), CrossEntropy(), retain=Retain(batches, retain), epochs=3, **QUIET)
    assert seen == [0, 1, 2, 3, 0, 1, 2, 3, 0]


@pytest.mark.parametrize(
    ("metrics", "patience", "min_delta", "epochs"),
    [
        ([0.5, 0.6, 0.6, 0.6, 0.9], 2, 0.01, 4),
        ([0.5, 0.505, 0.509, 0.9], 2, 0.01, 3),
        ([0.5, 0.4, 0.51, 0.4, 0.4, 0.9], 2, 0.01, 5),
        ([3.0, 2.0, 5.0], 1, 0.01, 2),
        ([0.1, 0.2, 0.3, 0.4], 1, 0.01, 4),
    ],
)
def test_early_stopping(metrics: list[float], patience: int, min_delta: float, epochs: int) -> None:
    """Stops after `patience` epochs in a row without a gain of `min_delta` over the best so far."""
    values = iter(metrics)
    result = train(
        semu(), vector_batches(2), CrossEntropy(), epochs=len(metrics),
        callbacks=EarlyStopping(lambda model: next(values), patience, min_delta), **QUIET,
    )  # fmt: skip
    assert result.steps == 2 * epochs
    assert result.stopped_early == (epochs < len(metrics) or metrics[-1] < metrics[0])


def test_the_metric_may_do_as_it_likes_with_modes_and_gradients() -> None:
    """A metric that puts the model into train mode or calls it with gradients on does not change the run."""

    def metric(model: nn.Module) -> float:
        assert not torch.is_grad_enabled()
        model.train()
        return 0.0

    states = []
    for callbacks in ((), EarlyStopping(metric, patience=9, restore_best=False)):
        model = semu()
        train(model, vector_batches(), CrossEntropy(), callbacks=callbacks, epochs=3, **QUIET)
        states.append(trained_state(model))
    assert_same_state(*states)


def test_bfloat16_mixed_precision() -> None:
    """Forward passes run in bfloat16, the core and its gradient stay float32, and the loss still falls."""
    dtypes: set[torch.dtype] = set()
    model = semu(Cnn, conv_mode="per_channel")
    model.base_model.model.norm.register_forward_pre_hook(lambda module, inputs: dtypes.add(inputs[0].dtype))
    result = train(
        model, image_batches(), CrossEntropy(), epochs=12, learning_rate=3e-2, mixed_precision="bf16", **QUIET
    )
    assert dtypes == {torch.bfloat16}
    assert all(layer.semu_core["default"].dtype == torch.float32 for layer in semu_layers(model).values())
    losses = [entry["loss"] for entry in result.history]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_each_run_has_its_own_precision() -> None:
    """One run in bfloat16 does not hold a second one to float32, nor the other way round."""
    dtypes: list[torch.dtype] = []
    model = semu()
    model.base_model.model.fc1.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    for precision, expected in (("bf16", torch.bfloat16), (None, torch.float32), ("bf16", torch.bfloat16)):
        dtypes.clear()
        train(model, vector_batches(), CrossEntropy(), epochs=1, mixed_precision=precision, **QUIET)
        assert set(dtypes) == {expected}


def test_ones_own_accelerator() -> None:
    """An Accelerator of the caller's is used as it is, and still works afterwards."""
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = semu()
    result = train(model, vector_batches(4), CrossEntropy(), accelerator=accelerator, epochs=1, **QUIET)
    assert result.steps == 2
    again = train(model, vector_batches(4), CrossEntropy(), accelerator=accelerator, epochs=1, **QUIET)
    assert again.steps == 2 and math.isfinite(again.history[-1]["loss"])


def test_a_model_that_is_prepared_already(tmp_path: Path) -> None:
    """A model that the caller's Accelerator has prepared stays prepared, and stays in its checkpoints."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(semu().eval())
    x = vector_batches()[0][0]
    attributes, expected = dict(vars(model)), model(x)
    train(model, vector_batches(), CrossEntropy(), accelerator=accelerator, epochs=1, learning_rate=1e-12, **QUIET)
    assert vars(model).keys() == attributes.keys() and vars(model)["forward"] is attributes["forward"]
    torch.testing.assert_close(model(x), expected, atol=1e-2, rtol=1e-2)
    accelerator.save_state(str(tmp_path))
    assert (tmp_path / "model.safetensors").is_file()


def test_tensorboard(tmp_path: Path) -> None:
    """`log_with="tensorboard"` writes the losses, step by step, under `output_dir`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(
        semu(), vector_batches(), CrossEntropy(), epochs=2, output_dir=tmp_path, log_with="tensorboard",
        callbacks=EarlyStopping(lambda model: 0.25), **QUIET,
    )  # fmt: skip
    folders = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    assert len(folders) == 1
    events = EventAccumulator(str(folders.pop())).Reload()
    assert {"loss", "metric"} <= set(events.Tags()["scalars"])
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    assert logged == [(entry["step"], pytest.approx(entry["loss"], rel=1e-5)) for entry in result.history]


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    """The bar shows the running loss, and `progress=False` prints nothing."""
    train(semu(), vector_batches(), CrossEntropy(), epochs=1)
    assert "loss=" in capsys.readouterr().err
    train(semu(), vector_batches(), CrossEntropy(), epochs=1, progress=False)
    assert capsys.readouterr() == ("", "")


# ---- the data ----


def test_the_loader_comes_back() -> None:
    """The user's DataLoader has its sampler, its generator and its attributes back, and can be used again."""
    data, retain = loader(), loader(seed=5)
    before = [(dict(vars(each)), each.sampler, each.batch_sampler, each.batch_sampler.sampler) for each in (data, retain)]  # fmt: skip  # noqa: E501
    for _ in range(2):
        train(semu(), data, CrossEntropy(), retain=Retain(retain, CrossEntropy()), epochs=2, **QUIET)
    for each, (attributes, sampler, batch_sampler, inner) in zip((data, retain), before, strict=True):
        assert vars(each) == attributes
        assert each.sampler is sampler and each.batch_sampler is batch_sampler and batch_sampler.sampler is inner
    torch.manual_seed(0)
    first = [y.tolist() for _, y in data]
    torch.manual_seed(0)
    assert [y.tolist() for _, y in loader()] == first


def test_the_loader_comes_back_after_a_failure() -> None:
    """So it does, and the model with it, when the run fails."""
    data, model = loader(), semu().train()
    sampler, modes = data.batch_sampler.sampler, Snapshot.of(model).modes
    calls: list[int] = []

    def fails(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("objective")
        return CrossEntropy()(model, batch)

    with pytest.raises(KeyError):
        train(model, data, fails, epochs=1, gradient_accumulation_steps=3, **QUIET)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert data.batch_sampler.sampler is sampler
    assert Snapshot.of(model).modes == modes and "forward" not in vars(model)


@pytest.mark.parametrize(
    "options",
    [
        {"resume_from_checkpoint": "/no/such/folder"},
        {"scheduler": lambda optimizer, steps: 1 / 0},
        {"optimizer": lambda parameters: 1 / 0},
        {"log_with": "no_such_tracker", "output_dir": "."},
    ],
    ids=["resume", "scheduler", "optimizer", "tracker"],
)
def test_everything_comes_back_after_a_failure_before_the_first_step(options: dict[str, Any]) -> None:
    """What fails between preparing and the first step leaves neither autocast on the model nor another sampler."""
    data, model = loader(), semu().train()
    sampler, before, attributes = data.batch_sampler.sampler, Snapshot.of(model), set(vars(model))
    with pytest.raises((FileNotFoundError, ZeroDivisionError, ValueError)):
        train(model, data, CrossEntropy(), mixed_precision="bf16", **QUIET, **options)
    before.assert_same(model)
    assert set(vars(model)) == attributes and data.batch_sampler.sampler is sampler


def test_shuffling_follows_the_seed() -> None:
    """The order of a shuffled loader is that of `seed`, whatever the global generator; epochs differ."""

    def order(seed: int) -> list[list[float]]:
        torch.rand(1)
        seen: list[list[float]] = []

        def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            seen.append(batch[0][:, 0].tolist())
            return CrossEntropy()(model, batch)

        train(semu(), loader(), objective, epochs=2, seed=seed, **QUIET)
        return seen

    first = order(1)
    torch.rand(5)
    assert first == order(1)
    assert first != order(2)
    assert first[:4] != first[4:]


def test_forms_of_data() -> None:
    """A list, a tuple, a generator and a DataLoader over the same batches give the same run."""
    x, y = (torch.cat(part) for part in zip(*vector_batches(), strict=True))
    states = []
    for data in (
        vector_batches(),
        tuple(vector_batches()),
        (batch for batch in vector_batches()),
        DataLoader(TensorDataset(x, y), batch_size=4),
    ):
        model = semu()
        result = train(model, data, CrossEntropy(), epochs=2, **QUIET)
        assert result.examples_seen == 24
        states.append(trained_state(model))
    for state in states[1:]:
        assert_same_state(state, states[0])


def test_dict_batches() -> None:
    """Batches in the form of transformers' collators are trained on and counted."""
    batches = [{"x": x, "labels": y} for x, y in vector_batches()]
    result = train(semu(), batches, CrossEntropy(), epochs=1, **QUIET)
    assert result.examples_seen == 12


@pytest.mark.parametrize("learning_rate", [None, 1e-2])
def test_examples_that_are_both_to_be_forgotten_and_kept_are_told_once(learning_rate: float | None) -> None:
    """Inputs and labels alike, among the first batches that the run has anyway; not where labels are others'."""

    def said(retained: list[tuple[Tensor, Tensor]]) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            retain = Retain(retained, CrossEntropy())
            settings = {"max_steps": 40, "learning_rate": learning_rate, **QUIET}
            train(semu(), forget, DecoupledDistillation(), retain=retain, **settings)
        return [str(each.message) for each in caught if "`forget`" in str(each.message)]

    forget, others = vector_batches(3, seed=1), vector_batches(3, seed=2)
    (inputs, labels), (first, its) = forget[1], others[0]
    mixed = (torch.cat([first, inputs[:2]]), torch.cat([its, labels[:2]]))
    assert said(others) == [] and said([(inputs, (labels + 1) % 2)]) == []
    (words,) = said([*others, mixed])
    assert words.startswith("The first batches of `retain` hold 2 of the examples of `forget`")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("semu_peft.training.overlap._FIRST", 2)
        assert said([others[0], others[1], mixed]) == []  # it does not look further


# ---- resuming ----


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Random augmentation, drawn from the global generators of torch, NumPy and Python."""

    def __init__(self) -> None:
        self.x, self.y = (torch.cat(part) for part in zip(*vector_batches(13, 1), strict=True))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] + 0.1 * torch.randn(6) + 0.1 * np.random.rand() + 0.1 * random.random(), self.y[index]


Data = Callable[[], Any]
DATA: dict[str, Data] = {
    "list": lambda: vector_batches(4),
    "shuffled": loader,
    "weighted": lambda: loader(shuffle=False, sampler=WeightedRandomSampler(torch.linspace(0.1, 1.0, 13), 13)),
    "augmented": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True),
}


def long_run(model: nn.Module, data: Any, *, dies_after: float = math.inf, **options: Any) -> UnlearnResult:
    """A run with everything that has a state: two loaders, a random objective, a schedule, a metric."""
    schedule = type("Dying", (Schedule,), {"dies_after": dies_after})
    return train(
        model, data, RandomLabel(seed=7) + 0.1 * CrossEntropy(), epochs=4, scheduler=schedule,
        retain=[Retain(loader(9, 2, seed=5), RandomLabel(seed=8), 0.5), Retain(loader(7, 2), RandomLabel(seed=9), 0.1)],
        callbacks=EarlyStopping(lambda m: -CrossEntropy()(m, vector_batches(1)[0]).item(), patience=50),
        max_grad_norm=1.0, **{**QUIET, **options},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("data", "accumulation", "at"),
    [
        ("list", 1, 3), ("list", 2, 2), ("shuffled", 1, 3), ("shuffled", 1, 4), ("shuffled", 1, 6),
        ("shuffled", 2, 3), ("weighted", 1, 6), ("augmented", 1, 6),
    ],
)  # fmt: skip
def test_a_resumed_run_equals_the_uninterrupted_one(data: str, accumulation: int, at: int, tmp_path: Path) -> None:
    """Killed after step `at`, in the middle or at the end of an epoch, the run ends with the same bits and history."""
    options: dict[str, Any] = {"gradient_accumulation_steps": accumulation}
    whole, resumed = semu(), semu()
    torch.manual_seed(1)
    expected = long_run(whole, DATA[data](), **options)
    torch.manual_seed(1)
    with pytest.raises(Interrupted):
        long_run(semu_at(1), DATA[data](), output_dir=tmp_path, checkpointing_steps=at, dies_after=at, **options)
    result = long_run(resumed, DATA[data](), output_dir=tmp_path, resume_from_checkpoint="latest", **options)
    assert result.history == expected.history
    assert_same_state(trained_state(resumed), trained_state(whole))
    assert (result.steps, result.examples_seen) == (expected.steps, expected.examples_seen)


def semu_at(seed: int) -> nn.Module:
    """An initialised model, the same at every call, with the global generator where `seed` puts it."""
    model = semu()
    torch.manual_seed(seed)
    return model


def pissa() -> nn.Module:
    torch.manual_seed(11)
    return get_peft_model(plain(), LoraConfig(target_modules=["fc1"], r=2, init_lora_weights="pissa"))


def test_the_original_after_a_resume_is_that_of_the_start(tmp_path: Path) -> None:
    """PiSSA moves the start into the adapter; a resumed run measures against the original all the same."""

    def run(model: nn.Module, **options: Any) -> UnlearnResult:
        return train(
            model, vector_batches(), DecoupledDistillation(), epochs=4, output_dir=tmp_path, **QUIET, **options
        )

    whole, resumed = pissa(), pissa()
    expected = run(whole, checkpointing_steps=5)
    assert run(resumed, resume_from_checkpoint=tmp_path / "checkpoint-5").history == expected.history
    assert_same_state(trained_state(resumed), trained_state(whole))


@pytest.mark.parametrize("make", [lora, plain], ids=["lora", "plain"])
def test_resume_of_other_methods(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Resuming works for whatever is trained."""
    whole, resumed = make(), make()
    long_run(whole, loader())
    with pytest.raises(Interrupted):
        long_run(make(), loader(), output_dir=tmp_path, checkpointing_steps=5, dies_after=5)
    long_run(resumed, loader(), resume_from_checkpoint=tmp_path / "checkpoint-5")
    assert_same_state(trained_state(resumed), trained_state(whole))


def test_resume_with_ones_own_accelerator(tmp_path: Path) -> None:
    """An Accelerator that has served an earlier run writes checkpoints of the later run alone."""
    whole, resumed = semu(), semu()
    long_run(whole, vector_batches(), accelerator=Accelerator(cpu=True))
    accelerator = Accelerator(cpu=True)
    long_run(lora(), vector_batches(), accelerator=accelerator)
    with pytest.raises(Interrupted):
        long_run(
            semu(), vector_batches(), accelerator=accelerator, output_dir=tmp_path, checkpointing_steps=4, dies_after=4
        )
    long_run(
        resumed, vector_batches(), accelerator=Accelerator(cpu=True), resume_from_checkpoint=tmp_path / "checkpoint-4"
    )
    assert_same_state(trained_state(resumed), trained_state(whole))


def test_resume_keeps_the_patience(tmp_path: Path) -> None:
    """Early stopping counts on across a resume, and a run that had stopped stays stopped."""
    options: dict[str, Any] = {"epochs": 9, "output_dir": tmp_path, **QUIET}
    stopping = EarlyStopping(lambda model: 1.0, patience=3)
    train(semu(), vector_batches(2), CrossEntropy(), checkpointing_steps=2, callbacks=stopping, **options)
    for step in (4, 8):
        result = train(
            semu(), vector_batches(2), CrossEntropy(), resume_from_checkpoint=tmp_path / f"checkpoint-{step}",
            callbacks=EarlyStopping(lambda model: 1.0, patience=3), **options,
        )  # fmt: skip
        assert result.steps == 8 and result.stopped_early


def test_checkpoints_hold_the_adapter_only(tmp_path: Path) -> None:
    """A checkpoint has no base weights, no half-written folder is left, and torch reads it without unpickling code."""
    model = semu()
    train(model, vector_batches(), CrossEntropy(), epochs=1, output_dir=tmp_path, checkpointing_steps=1, **QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in (1, 2, 3)]
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert_same_state(weights, trained_state(model))


def test_a_half_written_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    """What a killed writer left behind is passed over by `"latest"` and overwritten by the next writer."""
    options: dict[str, Any] = {"epochs": 1, "output_dir": tmp_path, **QUIET}
    (tmp_path / "checkpoint-3.partial").mkdir()
    (tmp_path / "checkpoint-3.partial" / "rubbish").write_text("half")
    train(semu(), vector_batches(), CrossEntropy(), checkpointing_steps=2, **options)
    result = train(semu(), vector_batches(), CrossEntropy(), resume_from_checkpoint="latest", **options)
    assert result.steps == 3
    train(semu(), vector_batches(), CrossEntropy(), checkpointing_steps=3, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-3"}
    assert not (tmp_path / "checkpoint-3" / "rubbish").exists()


def test_resume_into_another_adapter(tmp_path: Path) -> None:
    """A checkpoint of other trained parameters is refused, not loaded in part or not at all."""
    train(semu(), vector_batches(), CrossEntropy(), epochs=1, output_dir=tmp_path, checkpointing_steps=2, **QUIET)
    for other in (lora(), plain(), semu(r=1)):
        before = trained_state(other)
        with pytest.raises((ValueError, RuntimeError), match=r"semu_core|checkpoint"):
            train(
                other, vector_batches(), CrossEntropy(), epochs=1, resume_from_checkpoint="latest",
                output_dir=tmp_path, **QUIET,
            )  # fmt: skip
        assert_same_state(trained_state(other), before)


# ---- errors ----


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from vector_batches()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"forget": []}, ValueError, ["`forget` must give at least one batch"]),
        ({"forget": iter(())}, ValueError, ["`forget` must give at least one batch"]),
        ({"forget": 3}, TypeError, ["`forget`", "int", "list"]),
        ({"forget": DataLoader(Endless(), batch_size=None)}, ValueError, ["`forget`", "length", "`max_steps`"]),
        ({"forget": Endless()}, ValueError, ["`forget`", "length", "`max_steps`"]),
        ({"retain": vector_batches()}, TypeError, ["`retain`", "Retain(batches, objective)"]),
        ({"retain": Retain([], CrossEntropy())}, ValueError, ["`retain` must give at least one batch"]),
        ({"objective": CrossEntropy}, TypeError, ["`objective`", "CrossEntropy()"]),
        ({"rules": [lambda step: None]}, TypeError, ["`rules`", "`Rule`"]),
        ({"callbacks": [EarlyStopping]}, TypeError, ["`callbacks`", "on_step_end"]),
        ({"callbacks": [object()]}, TypeError, ["`callbacks`", "on_step_end"]),
        ({"max_grad_norm": 0.0}, ValueError, ["`max_grad_norm`", "0.0"]),
        ({"max_grad_norm": -1}, ValueError, ["`max_grad_norm`", "-1"]),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))])}, TypeError, ["`optimizer`", "SGD", "lambda"]),
        ({"optimizer": "sgd"}, TypeError, ["`optimizer`", "str", "lambda"]),
        ({"optimizer": lambda parameters: None}, TypeError, ["`optimizer`", "NoneType", "return"]),
        ({"optimizer": lambda _: torch.optim.SGD([torch.zeros(1)])}, ValueError, ["`optimizer`", "SGD of others"]),
        ({"scheduler": lambda o, _: ReduceLROnPlateau(o)}, TypeError, ["`scheduler`", "ReduceLROnPlateau"]),
        ({"optimizer": torch.optim.LBFGS, "mixed_precision": "fp16"}, ValueError, ["`mixed_precision`", "LBFGS"]),
        ({"adapter_name": "other"}, ValueError, ["`adapter_name`", "'other'", "'default'"]),
        ({"epochs": 0}, ValueError, ["`epochs`", "0"]),
        ({"epochs": 1.5}, ValueError, ["`epochs`", "1.5"]),
        ({"max_steps": 0}, ValueError, ["`max_steps`"]),
        ({"gradient_accumulation_steps": 0}, ValueError, ["`gradient_accumulation_steps`"]),
        ({"checkpointing_steps": 2}, ValueError, ["`checkpointing_steps`", "`output_dir`"]),
        ({"log_with": "tensorboard"}, ValueError, ["`log_with`", "`output_dir`"]),
        ({"resume_from_checkpoint": "latest"}, ValueError, ["`output_dir`"]),
        ({"resume_from_checkpoint": "/no/such/folder"}, FileNotFoundError, ["/no/such/folder", "checkpoint"]),
        ({"objective": lambda m, b: CrossEntropy()(m, b) * float("nan")}, ValueError, ["nan", "step 0", "learning_"]),
        ({"objective": lambda m, b: CrossEntropy()(m, b).detach()}, ValueError, ["gradient"]),
        ({"objective": lambda m, b: m(b[0])}, ValueError, ["scalar", "(4, 4)"]),
        ({"objective": lambda m, b: 1.0}, ValueError, ["scalar", "float"]),
        ({"learning_rate": -1.0}, ValueError, ["learning"]),
    ],
)  # fmt: skip
def test_errors(options: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    """Each names the argument and the mend, and leaves the model as it was."""
    model = semu().train()
    before = Snapshot.of(model)
    arguments = {"forget": vector_batches(), "objective": CrossEntropy(), **QUIET, **options}
    with pytest.raises(error) as raised:
        train(model, **arguments)
    assert all(word in str(raised.value) for word in words), raised.value
    before.assert_same(model)
    assert "forward" not in vars(model)


def test_nothing_to_train() -> None:
    """A frozen model is refused with the usual reasons."""
    with pytest.raises(ValueError, match="no trainable parameter.*is_trainable"):
        train(semu().requires_grad_(False), vector_batches(), CrossEntropy(), **QUIET)


def test_adapters_that_do_not_run_are_named_as_what_they_are() -> None:
    """Merged or disabled: not the objective's fault, and not a model loaded for inference."""
    model = semu()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the weights.*unmerge_adapter"):
        train(model, vector_batches(), CrossEntropy(), **QUIET)
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="disabled.*enable_adapter_layers"):
        train(model, vector_batches(), CrossEntropy(), **QUIET)
    model.base_model.enable_adapter_layers()
    assert train(model, vector_batches(), CrossEntropy(), epochs=1, **QUIET).steps


def test_a_layer_that_another_adapter_is_merged_into_does_not_count() -> None:
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"], r=2, init_weights=False))
    model.add_adapter("second", SemuConfig(target_modules=["fc2"], r=2, init_weights=False))
    model.set_adapter("second")
    model.merge_adapter(["default"])
    assert train(model, vector_batches(), CrossEntropy(), epochs=1, **QUIET).steps


def test_a_loss_that_turns_nan_leaves_the_last_good_weights() -> None:
    """The run stops at the bad batch with the weights of the last good step, and no gradient is left."""
    good = vector_batches(2)
    bad = (torch.full((4, 6), float("nan")), torch.zeros(4, dtype=torch.long))
    model, twin = semu(), semu()
    constant = lambda optimizer, steps: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # noqa: E731
    with pytest.raises(ValueError, match="nan at step 2.*batch 2 of epoch 0"):
        train(model, [*good, bad], CrossEntropy(), epochs=1, scheduler=constant, **QUIET)
    train(twin, good, CrossEntropy(), epochs=1, scheduler=constant, **QUIET)
    assert_same_state(trained_state(model), trained_state(twin))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_same_objective_object_for_initialisation_and_training() -> None:
    """The README's three lines, on a model that then forgets and ships."""
    torch.manual_seed(11)
    model = get_peft_model(Cnn(), SemuConfig(target_modules="all-linear", explained_variance=0.95))
    objective = RandomLabel(num_labels=CLASSES)
    initialize_semu_weights(model, image_batches(), objective, progress=False)
    result = train(model, image_batches(), objective, epochs=2, **QUIET)
    merged = copy.deepcopy(model).merge_and_unload()
    x = image_batches()[0][0]
    torch.testing.assert_close(run(merged, x), run(model, x), atol=1e-5, rtol=1e-4)
    assert result.steps == 6
