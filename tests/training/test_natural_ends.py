"""Where runs by natural gradients end, and where they are left: with data in an order, a budget, a choice, an error."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from natural_runs import FORGET, INPUTS, KEEP, LABELS, accuracy, adapted, classifier, probability
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from training_runs import QUIET, Interrupted, assert_same_state, trained_state

from semu_peft import Callback, EarlyStopping, NaturalGradient, Retain, initialize_semu_weights, unlearn
from semu_peft.adapter.whole_model import add_adapter
from semu_peft.objectives import (
    CrossEntropy,
    DecoupledDistillation,
    GradientAscent,
    KLToOriginal,
    Objective,
    PrimalDual,
    RandomLabel,
)
from semu_peft.objectives.distributions import divergence
from semu_peft.objectives.original import original
from semu_peft.training.batches import first_batches, rest_of_epoch
from semu_peft.training.held_batches import ENOUGH_EXAMPLES
from semu_peft.training.progress import Position

BOTH = DecoupledDistillation(classes=[1, 2])


def of_class(label: int, size: int = 4, times: int = 1) -> list[Any]:
    inputs, labels = INPUTS[label == LABELS], LABELS[label == LABELS]
    return list(zip(inputs.split(size), labels.split(size), strict=True)) * times


class MoveAway(Objective):
    """A squared error as a denoiser has it, in a unit of its own: the outputs are to be zero."""

    distribution, minimum = "gaussian", 0.0

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return self.outputs(model, batch).square().mean()

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return self.scale * model(batch[0])


class Kept(MoveAway):
    """No change of the outputs is asked for; the budget alone holds them."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return 0.0 * self.outputs(model, batch).square().mean()


# ---- data in an order ----


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("curvature", ["whole", "kronecker"])
def test_classes_that_come_one_after_the_other_are_all_forgotten(size: int, curvature: Any) -> None:
    """Batches of the first class alone say nothing of the second, which the run would end without."""
    batches = of_class(1, size) + of_class(2, size)
    model = adapted(BOTH, batches)
    unlearn(model, batches, BOTH, optimizer=NaturalGradient(curvature=curvature), **QUIET)
    assert max(probability(model, of_class(label, 16)) for label in (1, 2)) < 0.1
    assert min(accuracy(model, of_class(label, 16)) for label in (0, 3)) >= 0.75


def test_a_class_behind_what_the_end_is_compared_on_is_seen() -> None:
    """More than the first examples, on which alone the best cores would be those that leave the second class."""
    batches = of_class(1, 16, times=ENOUGH_EXAMPLES // 16 + 1) + of_class(2, 16, times=20)
    model = adapted(BOTH, batches)
    with pytest.warns(UserWarning, match=r"batch 33 of the forget data is not. Shuffle them"):
        result = unlearn(model, batches, BOTH, **QUIET)
    assert result.examples_seen > 16 * 33 and result.stop_reason != "the forget data are forgotten"
    assert sum(probability(model, of_class(label, 16)) for label in (1, 2)) < 0.8  # of 1 where one alone is forgotten


def test_what_is_forgotten_in_part_is_not_forgotten_already() -> None:
    model, once = adapted(BOTH, of_class(1)), DecoupledDistillation()
    unlearn(model, of_class(1, 16), once, **QUIET)
    batches = of_class(1, 16, times=ENOUGH_EXAMPLES // 16 + 1) + of_class(2, 16)
    add_adapter(model, model.peft_config["default"], adapter_name="second")
    initialize_semu_weights(model, batches, once, adapter_name="second", progress=False)
    before = probability(model, of_class(2, 16))
    result = unlearn(model, batches, once, adapter_name="second", **QUIET)
    assert result.steps and result.stop_reason != "the forget data were forgotten already"
    assert probability(model, of_class(2, 16)) <= before


def test_an_ascent_that_ends_with_others_remembered_says_so() -> None:
    batches = of_class(1) + of_class(2)
    model = adapted(GradientAscent(), batches)
    with pytest.warns(UserWarning, match=r"and batch \d of the forget data is not. Shuffle them"):
        result = unlearn(model, batches, GradientAscent(), **QUIET)
    assert result.stop_reason == "the last batches are forgotten, and others are not"


def test_few_batches_that_are_looked_at_often_are_not_all() -> None:
    """What draws at random is looked at again and again; of twenty batches four are unlikely already."""
    wrong = [(inputs, (labels + 1) % 4) for inputs, labels in of_class(1)]
    batches, keep = wrong + of_class(1, times=4), Retain(KEEP * 4, CrossEntropy())
    ascent = -1 * CrossEntropy() + 0.0 * RandomLabel()
    model = adapted(CrossEntropy(), batches)
    result = unlearn(model, batches, ascent, retain=keep, max_steps=4, **QUIET)
    assert result.steps and result.stop_reason != "the forget data were forgotten already"


@pytest.mark.parametrize("inner", [1, 100])
def test_a_look_in_the_middle_of_an_epoch_leaves_workers_where_they_are(inner: int) -> None:
    """Workers that stay alive have one iterator a loader, which another pass would begin anew."""
    loader = Accelerator(cpu=True).prepare(
        DataLoader(TensorDataset(torch.arange(12)), batch_size=2, num_workers=1, persistent_workers=True)
    )
    seen = []
    for batch in rest_of_epoch(loader, 0, Position()):
        seen += batch[0].tolist()
        if len(seen) == 6:
            with first_batches(loader, 0) as batches:
                looked_at = [each[0].tolist() for each in itertools.islice(batches, inner)]
            assert looked_at == [[place, place + 1] for place in range(0, 12, 2)][:inner]
    assert seen == list(range(12))


def test_a_look_in_the_middle_of_an_epoch_leaves_data_in_their_epoch() -> None:
    """Data sets and samplers with a `set_epoch` went on as in the first one, unlike in a run that was resumed there."""

    class Curriculum(Dataset):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Tensor:
            return torch.tensor(10 * self.epoch + index)

    loader, seen = Accelerator(cpu=True).prepare(DataLoader(Curriculum())), []
    for batch in rest_of_epoch(loader, 0, Position(epoch=3)):
        seen.append(batch.item())
        with first_batches(loader, 0) as batches:
            assert [each.item() for each in batches] == [0, 1, 2, 3]
    assert seen == [30, 31, 32, 33]


def test_the_first_batch_of_a_stream_says_nothing_of_the_others() -> None:
    """Of a stream that cannot be looked at, as many examples in a row as would be looked at must be forgotten."""

    class Stream(IterableDataset):
        def __iter__(self):
            yield from of_class(1) + of_class(2)

    model = adapted(BOTH, of_class(1) + of_class(2))
    unlearn(model, Stream(), BOTH, **QUIET)
    assert max(probability(model, of_class(label, 16)) for label in (1, 2)) < 0.1


def test_a_resumed_stream_keeps_what_it_knows(tmp_path: Path) -> None:
    """Its curvature, its damping and where it began; the first batch alone is not there again."""

    class Stream(IterableDataset):
        def __iter__(self):
            yield from of_class(1)

    options = {"output_dir": tmp_path, "checkpointing_steps": 2, **QUIET}
    whole, parts = adapted(BOTH, of_class(1)), adapted(BOTH, of_class(1))
    expected = unlearn(whole, Stream(), DecoupledDistillation(), max_steps=8, **QUIET)

    class Stop(Callback):
        at = 4

        def on_step_end(self, context: Any) -> None:
            if context.progress.step == self.at:
                raise Interrupted

    stop = Stop()
    with pytest.raises(Interrupted):
        unlearn(parts, Stream(), DecoupledDistillation(), max_steps=8, callbacks=stop, **options)
    stop.at, options["resume_from_checkpoint"] = 0, "latest"
    again = adapted(BOTH, of_class(1))
    result = unlearn(again, Stream(), DecoupledDistillation(), max_steps=8, callbacks=stop, **options)
    assert [entry["loss"] for entry in result.history[:-1]] == [entry["loss"] for entry in expected.history[:-1]]
    assert_same_state(trained_state(again), trained_state(whole))


@pytest.mark.parametrize("limit", [None, 0.05])
def test_an_objective_that_is_scaled_down_is_minimised_as_far(limit: float | None) -> None:
    """A hundredth of a nat, and what a budget costs, are as much less; it was said to be forgotten already."""
    runs = []
    for objective in (DecoupledDistillation(), 1e-3 * DecoupledDistillation()):
        model = adapted(DecoupledDistillation())
        runs.append(unlearn(model, FORGET, objective, max_retain_kl=limit, **QUIET))
        assert probability(model, FORGET) < 0.03
    assert runs[0].steps == runs[1].steps and runs[0].stop_reason == runs[1].stop_reason


@pytest.mark.parametrize("curvature", ["whole", "kronecker"])
def test_outputs_in_large_numbers_are_moved_as_fast(curvature: Any) -> None:
    """A step was to move prices in thousands by a tenth, so that the loss no longer fell where it had hardly fallen."""
    runs = []
    for scale in (10.0, 1e4):
        model = adapted(DecoupledDistillation())
        dials = NaturalGradient(curvature=curvature)
        runs.append(unlearn(model, FORGET, MoveAway(scale), optimizer=dials, **QUIET))
    assert runs[0].stop_reason == runs[1].stop_reason == "the forget data are forgotten"
    assert runs[0].steps == runs[1].steps


# ---- the budget ----


@pytest.mark.parametrize("size", [2, 4, 16])
@pytest.mark.parametrize("limit", [0.005, 0.05])
def test_what_is_left_keeps_to_the_budget_on_all_that_is_compared(size: int, limit: float) -> None:
    """Each step keeps to it on a small batch of its own, which says little of the others."""
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    (inputs, labels) = KEEP[0]
    keep = list(zip(inputs[order].split(size), labels[order].split(size), strict=True))
    model = adapted(DecoupledDistillation())
    result = unlearn(
        model, FORGET, DecoupledDistillation(), retain=Retain(keep, CrossEntropy()), max_retain_kl=limit, **QUIET
    )
    with torch.no_grad(), original(model) as reference:
        before = reference(inputs)
    with torch.no_grad():
        damage = divergence("categorical", before, model(inputs)).item()
    seen = min(len(keep), 8) * size  # a forget batch is compared with up to eight of these
    assert result.history[-1]["damage"] <= limit and damage <= limit * (1.001 if seen == 48 else 3)
    assert probability(model, FORGET) < 0.9


def test_a_run_that_begins_above_its_budget_says_so_and_comes_back() -> None:
    model = adapted(GradientAscent())
    unlearn(model, FORGET, GradientAscent(), max_steps=6, optimizer=NaturalGradient(kl=0.5), **QUIET)
    keep = Retain(KEEP, CrossEntropy())
    with pytest.warns(UserWarning, match=r"begins above `max_retain_kl`=0.001: the model is .* from the original"):
        result = unlearn(model, FORGET, DecoupledDistillation(), retain=keep, max_retain_kl=0.001, **QUIET)
    assert result.history[-1]["damage"] < 0.5 * result.history[0]["damage"]


def within(limit: float, curvature: Any, retain: Retain | None) -> tuple[float, Any]:
    """What is left of the answers, and the run."""
    model = adapted(DecoupledDistillation())
    dials = NaturalGradient(max_retain_kl=limit, curvature=curvature)
    result = unlearn(model, FORGET, DecoupledDistillation(), retain=retain, optimizer=dials, **QUIET)
    assert result.history[-1]["damage"] <= limit
    return probability(model, FORGET), result


@pytest.mark.parametrize("curvature", ["whole", "kronecker"])
@pytest.mark.parametrize(("retain", "times"), [(None, 50), (Retain(KEEP, CrossEntropy()), 3)])
def test_a_budget_that_is_not_spent_hardly_changes_a_run(curvature: Any, retain: Retain | None, times: float) -> None:
    """It is a bound, and no reason to forget less, nor is it said to be what ended the run."""
    free, result = within(1e4, curvature, retain)
    left, result = within(times * result.history[-1]["damage"], curvature, retain)
    assert free < 0.02 and left < free + 0.06
    assert result.stop_reason in ("the forget data are forgotten", "the loss no longer falls")


@pytest.mark.parametrize("curvature", ["whole", "kronecker"])
def test_a_run_goes_along_the_edge_of_its_budget(curvature: Any) -> None:
    """Without a bound it would do a hundred times the damage on its way; what stood still there kept 0.95 and more."""
    free, result = within(1e4, curvature, None)
    end = result.history[-1]["damage"]
    assert max(entry["damage"] for entry in result.history) > 50 * end
    left, result = within(3 * end, curvature, None)
    assert left < 0.5 and max(entry["damage"] for entry in result.history) <= 3 * end * (1 + 1e-6)


@pytest.mark.parametrize(
    "keep",
    [Retain(KEEP, KLToOriginal(), weight=0), Retain(KEEP, 1e-3 * KLToOriginal()),
     Retain(KEEP, PrimalDual(KLToOriginal(), limit=1.0, multiplier=0.0))],
    ids=["weight", "objective", "multiplier"],
)  # fmt: skip
def test_a_budget_is_spent_as_well_where_the_retain_loss_weighs_nothing(keep: Retain) -> None:
    """Steps know what the damage costs: by the retain loss's own curvature half as much was forgotten."""
    model, budget = adapted(DecoupledDistillation(), net=classifier(1)), 0.002
    result = unlearn(model, FORGET, DecoupledDistillation(), retain=keep, max_retain_kl=budget, **QUIET)
    assert result.history[-1]["damage"] <= budget and result.history[-1]["loss"] < 0.2, result
    assert result.steps < 100


def test_a_budget_that_is_spent_is_said_to_be() -> None:
    assert within(1e-4, "whole", Retain(KEEP, CrossEntropy()))[1].stop_reason == "the damage budget is spent"


def test_a_budget_of_a_denoiser_is_weighed_in_the_unit_of_its_loss() -> None:
    """Its squared error may be far from a nat: what a budget costs is a share of where the run began."""
    errors = {}
    for scale in (1.0, 1e-3):
        model = adapted(DecoupledDistillation())
        away = MoveAway(scale)
        start = away(model, FORGET[0]).item()
        limit = 0.1 * scale**2
        unlearn(model, FORGET, away, retain=Retain(KEEP, Kept(scale)), max_retain_kl=limit, **QUIET)
        errors[scale] = away(model, FORGET[0]).item() / start
    assert errors[1.0] < 0.5 and errors[1e-3] == pytest.approx(errors[1.0], rel=0.05)


def test_a_choice_keeps_to_the_budget() -> None:
    """The history may have points above it, which small batches did not show when the step was taken."""
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    inputs, labels = KEEP[0]
    keep = Retain(list(zip(inputs[order].split(4), labels[order].split(4), strict=True)), CrossEntropy())

    def worst(history: Any) -> int:
        return max(range(len(history)), key=lambda index: history[index].get("damage", 0.0))

    model = adapted(GradientAscent())
    with pytest.warns(UserWarning, match="`choose` took a point with a damage of .* above `max_retain_kl=0.01`"):
        result = unlearn(model, FORGET, GradientAscent(), retain=keep, max_retain_kl=0.01, choose=worst, **QUIET)
    assert max(entry["damage"] for entry in result.history[:-1]) > 0.01
    assert 0.005 < result.history[-1]["damage"] <= 0.01


# ---- a choice, and callbacks ----


@pytest.mark.parametrize("steps", [1, 4])
def test_the_last_point_can_be_chosen(steps: int) -> None:
    dials = {"max_steps": steps, **QUIET}
    plain, chosen = adapted(DecoupledDistillation()), adapted(DecoupledDistillation())
    unlearn(plain, FORGET, DecoupledDistillation(), **dials)
    offered: list[int] = []

    def last(history: Any) -> int:
        offered.append(len(history))
        return len(history) - 1

    result = unlearn(chosen, FORGET, DecoupledDistillation(), choose=last, **dials)
    assert offered == [result.steps + 1] and result.history[-1]["answer_probability"] < 0.999
    assert probability(chosen, FORGET) == pytest.approx(result.history[-1]["answer_probability"], rel=1e-4)
    assert probability(chosen, FORGET) < result.history[-2]["answer_probability"]


def test_a_run_without_a_choice_is_not_resumed_with_one(tmp_path: Path) -> None:
    """Its checkpoints do not know where the steps before were: another point was taken than the one chosen."""
    options: dict[str, Any] = {"max_steps": 8, "output_dir": tmp_path, "checkpointing_steps": 4, **QUIET}
    unlearn(adapted(DecoupledDistillation()), FORGET, DecoupledDistillation(), **options)
    options |= {"resume_from_checkpoint": tmp_path / "checkpoint-4", "choose": lambda history: 1}
    with pytest.raises(ValueError, match="choose is .*lambda.* here and None there"):
        unlearn(adapted(DecoupledDistillation()), FORGET, DecoupledDistillation(), **options)


@pytest.mark.parametrize("index", [100, -100, 0.5, "first", None, True])
def test_what_is_no_index_is_refused_with_the_cores_as_they_were(index: Any) -> None:
    model = adapted(DecoupledDistillation())
    with pytest.raises(ValueError, match="`choose` must return an index of the history, from 0 to 3"):
        unlearn(model, FORGET, DecoupledDistillation(), choose=lambda history: index, max_steps=3, **QUIET)
    assert probability(model, FORGET) < 0.999


def test_a_callback_has_the_last_word() -> None:
    model, seen = adapted(DecoupledDistillation()), []

    def falling(net: nn.Module) -> float:
        seen.append(trained_state(net))
        return -float(len(seen))

    stopping = EarlyStopping(falling, patience=2)
    unlearn(model, FORGET, DecoupledDistillation(), callbacks=stopping, optimizer=NaturalGradient(kl=0.02), **QUIET)
    assert len(seen) == 3
    assert_same_state(trained_state(model), seen[0])


def test_epochs_that_are_asked_for_are_not_cut_off() -> None:
    batches = of_class(1, 1, times=10)
    model = adapted(DecoupledDistillation(), batches)
    dials = NaturalGradient(curvature="kronecker", tolerance=1e-9, patience=10_000)
    result = unlearn(model, batches, DecoupledDistillation(), epochs=2, optimizer=dials, **QUIET)
    assert result.steps == 2 * len(batches) > 200


# ---- errors ----


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("curvature", ["whole", "kronecker"])
def test_an_interrupted_trial_leaves_the_last_good_cores(error: type, curvature: Any) -> None:
    class Breaks(DecoupledDistillation):
        def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Any:
            evaluations.append(1)
            if len(evaluations) == at:
                raise error("stopped here")
            return super().evaluate(model, batch, prepared)

    whole: list[Any] = []

    class Look(Callback):
        def on_train_begin(self, context: Any) -> None:
            whole.append(trained_state(context.model))

        def on_step_end(self, context: Any) -> None:
            whole.append(trained_state(context.model))

    dials, evaluations, at = NaturalGradient(kl=0.01, curvature=curvature), [], 0
    unlearn(adapted(DecoupledDistillation()), FORGET, Breaks(), optimizer=dials, callbacks=Look(), max_steps=6, **QUIET)
    every = len(evaluations)
    for at in range(1, every + 1):
        model, evaluations = adapted(DecoupledDistillation()), []
        look = whole[:]
        with pytest.raises(error, match="stopped here"):
            unlearn(model, FORGET, Breaks(), optimizer=dials, max_steps=6, **QUIET)
        left = probability(model, FORGET)
        # Where a batch brings two steps, the one between them was not looked at.
        bound = max(probability_of(state) for state in look)
        assert left <= bound + 1e-6, at


def probability_of(state: dict[str, Tensor]) -> float:
    model = adapted(DecoupledDistillation())
    model.load_state_dict(state, strict=False)
    return probability(model, FORGET)


@pytest.mark.parametrize("place", [0, 2])
def test_a_batch_with_a_number_that_is_not_finite_is_named(place: int) -> None:
    batches = [(inputs.clone(), labels) for inputs, labels in of_class(1)]
    batches[place][0][0, 0] = math.nan
    model = adapted(DecoupledDistillation())
    before = trained_state(model)
    with pytest.raises(ValueError, match="The loss of a `forget` batch is nan before any step"):
        unlearn(model, batches, DecoupledDistillation(), **QUIET)
    assert_same_state(trained_state(model), before)
    late = of_class(1, 16, times=ENOUGH_EXAMPLES // 16) + batches
    dials = NaturalGradient(kl=0.01, tolerance=1e-9, patience=999)
    with pytest.raises(ValueError, match=rf"nan on batch {len(late) - 4 + place} of epoch 0, where the run began"):
        unlearn(model, late, DecoupledDistillation(), optimizer=dials, **QUIET)


def test_an_objective_without_outputs_is_refused() -> None:
    class Silent(Objective):
        distribution = "categorical"

        def __call__(self, model: nn.Module, batch: Any) -> Tensor:
            return model(batch[0]).softmax(-1)[:, 1].mean()

        def outputs(self, model: nn.Module, batch: Any) -> None:
            return None

    model = adapted(DecoupledDistillation())
    with pytest.raises(ValueError, match="`objective` must tell the model's outputs, got None of Silent.outputs"):
        unlearn(model, FORGET, Silent(), **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert unlearn(model, FORGET, Silent(), learning_rate=1e-2, **QUIET).steps
