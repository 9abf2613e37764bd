"""Runs by natural gradients: what they promise of every step, of their end, and of going on."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from language_batches import padded
from models import Cnn, Mlp, image_batches, llama, unet_condition
from natural_runs import FORGET, INPUTS, KEEP, LABELS, NET, accuracy, adapted, classifier, probability
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from training_runs import QUIET, Interrupted, Schedule, assert_same_state, semu, trained_state

from semu_peft import Callback, NaturalGradient, Retain, Rule, SemuConfig, initialize_semu_weights, unlearn
from semu_peft.objectives import (
    NPO,
    ConditionMatching,
    CrossEntropy,
    DecoupledDistillation,
    GradientAscent,
    KLToOriginal,
    Objective,
    PreservePrediction,
    PrimalDual,
    RandomLabel,
    UniformDistribution,
    UnseenConfidence,
)
from semu_peft.objectives.distributions import divergence, strike_out
from semu_peft.objectives.original import original
from semu_peft.training.curvature import Curvature, KroneckerFactors, WholeMatrix
from semu_peft.tuner.adapted import semu_layers


@pytest.mark.parametrize("objective", [DecoupledDistillation(), RandomLabel(), GradientAscent(), UniformDistribution()])
@pytest.mark.parametrize("curvature", ["whole", "kronecker"])
def test_a_class_is_forgotten_and_the_loss_at_the_end_is_below_the_start(objective, curvature) -> None:
    model = adapted(objective)
    assert accuracy(model, FORGET) == 1.0
    result = unlearn(model, FORGET, objective, optimizer=NaturalGradient(curvature=curvature), **QUIET)
    assert probability(model, FORGET) < 0.35
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    # Ascent has no end, whatever it destroys; all others find theirs.
    assert result.stopped_early or isinstance(objective, GradientAscent)
    assert all(entry["kl"] <= 1.5 * 0.1 for entry in result.history[:-1])


def test_other_classes_are_kept_without_retain_data() -> None:
    objective = DecoupledDistillation()
    model = adapted(objective)
    unlearn(model, FORGET, objective, **QUIET)
    assert accuracy(model, FORGET) == 0.0 and accuracy(model, KEEP) >= 0.97


def test_what_the_forget_data_hardly_see_stays_as_it_is() -> None:
    """The pull ends the drift along flat directions, costs little of the loss, and is not there with retain data."""
    objective, retain = DecoupledDistillation(), Retain(KEEP, CrossEntropy())
    moved, losses = {}, {}
    for proximal in (0.0, 0.1):
        for keep in (None, retain):
            model = adapted(objective)
            dials = NaturalGradient(proximal=proximal, tolerance=1e-6, curvature="whole")
            result = unlearn(model, FORGET, objective, retain=keep, optimizer=dials, **QUIET)
            key = proximal, keep is None
            moved[key] = sum(core.square().sum().item() for core in trained_state(model).values())
            losses[key] = result.history[-1]["loss"]
    assert moved[0.1, True] < 0.5 * moved[0.0, True]
    assert losses[0.0, True] < losses[0.1, True] < 0.2
    assert moved[0.1, False] == moved[0.0, False]


class Target(Objective):
    """The outputs are to be one; a squared error."""

    distribution, minimum = "gaussian", 0.0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - 1).square().mean()

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])


class Away(Target):
    """Ascent: no target ends it."""

    minimum = None

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return -super().__call__(model, batch)


@pytest.mark.parametrize(
    ("objective", "pull"),
    [(Target(), 0.0), (Target() + 2 * Target(), 0.0), (Away(), 0.01), (UniformDistribution(), 0.01)],
)
def test_a_target_for_each_output_is_reached_without_a_pull(objective: Objective, pull: float) -> None:
    """The default pull is that of classes; a squared error with a target has none, and ends lower for it."""
    ends = {}
    for proximal in (None, pull, 0.01 - pull):
        model = adapted(objective)
        dials = NaturalGradient(proximal=proximal, curvature="whole", tolerance=1e-6)
        ends[proximal] = unlearn(model, FORGET, objective, optimizer=dials, max_steps=20, **QUIET).history[-1]["loss"]
    assert ends[None] == ends[pull] != ends[0.01 - pull]
    assert pull or ends[0.0] < ends[0.01]


def test_first_steps_that_went_too_far_are_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a model is sure of itself there is hardly any curvature; what is seen further on would undo every step."""
    seen = itertools.chain([1e-9], itertools.repeat(1e6))
    monkeypatch.setattr(WholeMatrix, "scale", property(lambda _: next(seen)))
    objective = DecoupledDistillation()
    result = unlearn(adapted(objective), FORGET, objective, optimizer=NaturalGradient(curvature="whole"), **QUIET)
    losses = [entry["loss"] for entry in result.history]
    assert losses[1] < 0.9 * losses[0] and losses[2] == pytest.approx(losses[0], rel=1e-6)
    assert losses[-1] <= losses[0]


@pytest.mark.parametrize("size", [1, 2, 16])
def test_any_size_of_request_and_of_batch(size: int) -> None:
    batches = [(INPUTS[LABELS == 1][index : index + size], torch.full((size,), 1)) for index in range(0, 16, size)]
    model = adapted(DecoupledDistillation(), batches)
    unlearn(model, batches, DecoupledDistillation(), **QUIET)
    assert accuracy(model, FORGET) <= 0.1


def test_what_is_forgotten_already_takes_no_step() -> None:
    objective = DecoupledDistillation()
    model = adapted(objective)
    unlearn(model, FORGET, objective, optimizer=NaturalGradient(tolerance=0.5), **QUIET)
    before = trained_state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # there is nothing to mend
        result = unlearn(model, FORGET, objective, optimizer=NaturalGradient(tolerance=0.6), **QUIET)
    assert result.steps == 0 and result.stop_reason == "the forget data were forgotten already"
    assert_same_state(trained_state(model), before)


def test_an_objective_that_teaches_answers_does_not_end_as_forgotten() -> None:
    """Cross entropy at its minimum is the opposite."""
    objective = CrossEntropy()
    assert (objective + 0.5 * DecoupledDistillation()).forgets and not (2 * objective + CrossEntropy()).forgets
    net = copy.deepcopy(NET)
    with torch.no_grad():
        net[4].bias[1] -= 3.0
    result = unlearn(adapted(objective, net=net), FORGET, objective, **QUIET)
    assert result.steps and result.stop_reason == "the loss is at its minimum"
    known = unlearn(adapted(objective), FORGET, objective, optimizer=NaturalGradient(tolerance=0.5), **QUIET)
    assert known.steps == 0 and known.stop_reason == "the loss was at its minimum already"
    turned = unlearn(adapted(objective), FORGET, -objective, optimizer=NaturalGradient(tolerance=0.3), **QUIET)
    assert turned.steps and turned.stop_reason == "the forget data are forgotten"  # it has no minimum


def test_a_start_next_to_the_end_still_goes_to_the_end() -> None:
    """With retain data a share of a short way is left by default; a tolerance that is given is kept to."""
    objective = DecoupledDistillation()
    near = adapted(objective)
    start = unlearn(near, FORGET, objective, optimizer=NaturalGradient(tolerance=0.2), **QUIET).history[-1]["loss"]
    assert 0.01 < start < 0.2
    retain, left = Retain(KEEP, CrossEntropy(), 1e-3), {}
    for keep, tolerance in itertools.product((retain, None), (None, 0.01)):
        dials = NaturalGradient(proximal=0, tolerance=tolerance)
        result = unlearn(copy.deepcopy(near), FORGET, objective, retain=keep, optimizer=dials, **QUIET)
        assert result.stop_reason == "the forget data are forgotten"
        last = result.history[-1]
        left[keep is retain, tolerance] = last.get("forget_loss", last["loss"])
    assert left[True, None] <= 0.02 * start < left[True, 0.01] <= 0.01
    assert left[False, None] == left[False, 0.01]


def test_small_batches_are_waited_for_until_they_bring_64_examples() -> None:
    """A loss that never falls: the number of batches that a run looks at before it gives up."""

    class Seen(Callback):
        batches = 0

        def on_step_end(self, context: Any) -> None:
            self.batches += 1

    def looked_at(size: int, number: int, **dials: Any) -> int:
        one, objective, seen = INPUTS[LABELS == 1][:1], DecoupledDistillation(), Seen()
        batches = [(one.expand(size, -1), torch.full((size,), 1))] * number
        model = adapted(objective)
        with torch.no_grad():
            for layer in semu_layers(model).values():
                layer.semu_U["default"].zero_()  # no step changes anything
        result = unlearn(model, batches, objective, optimizer=NaturalGradient(**dials), callbacks=seen, **QUIET)
        assert result.stop_reason == "the loss no longer falls"
        return seen.batches

    by_default = {(16, 20): 4, (8, 20): 8, (8, 6): 6, (1, 100): 64, (64, 1): 4}
    for (size, number), patience in by_default.items():
        assert looked_at(size, number) == looked_at(size, number, patience=patience)
        assert looked_at(size, number, patience=patience + 2) > looked_at(size, number)
    assert looked_at(8, 20, curvature="kronecker") == looked_at(8, 20, curvature="kronecker", patience=4)


def test_the_damage_budget_is_never_exceeded() -> None:
    objective, keep = GradientAscent(), Retain(KEEP, CrossEntropy())
    model = adapted(objective)
    seen = []

    class Look(Callback):
        def on_step_end(self, context: Any) -> None:
            with original(context.model) as reference:
                before, after = reference(KEEP[0][0]), context.model(KEEP[0][0])
            seen.append(divergence("categorical", before, after).item())

    result = unlearn(model, FORGET, objective, retain=keep, max_retain_kl=0.02, callbacks=Look(), **QUIET)
    assert len(seen) > 3 and max(seen) <= 0.02 + 1e-5
    assert result.history[-1]["damage"] <= 0.02 + 1e-5
    free = adapted(objective)
    unlearn(free, FORGET, objective, **QUIET)
    with original(free) as reference:
        unbounded = divergence("categorical", reference(KEEP[0][0]), free(KEEP[0][0])).item()
    assert unbounded > 2 * max(seen)


def test_without_retain_data_the_budget_is_on_the_other_answers() -> None:
    objective = RandomLabel()
    model = adapted(objective)
    result = unlearn(model, FORGET, objective, max_retain_kl=0.05, **QUIET)
    assert 0 < result.history[-1]["damage"] <= 0.05 + 1e-5
    logits, before = model(FORGET[0][0]), NET(FORGET[0][0])
    others = [index for index in range(4) if index != 1]
    expected = divergence("categorical", before[:, others], logits[:, others]).item()
    assert math.isclose(result.history[-1]["damage"], expected, rel_tol=1e-3)


@pytest.mark.parametrize(("limit", "mend"), [(None, "a `learning_rate`"), (0.05, "a larger `max_retain_kl`")])
def test_a_loss_that_cannot_fall_leaves_the_start_and_says_so(limit: float | None, mend: str) -> None:
    class Rising(CrossEntropy):
        """Whatever is done to the cores is worse."""

        def loss(self, logits: Tensor, labels: Tensor, prepared: Any) -> Tensor:
            return (
                super().loss(logits, labels, prepared).detach() * 0 + (logits - NET(INPUTS[LABELS == 1])).abs().mean()
            )

    Rising.minimum = None
    model = adapted(DecoupledDistillation())
    before = trained_state(model)
    with pytest.warns(UserWarning, match="No step lowered the loss .* as it was before. .*, or " + mend):
        unlearn(model, FORGET, Rising(), max_retain_kl=limit, **QUIET)
    assert_same_state(trained_state(model), before)


def test_steps_that_are_not_finite_are_taken_back() -> None:
    class Cliff(GradientAscent):
        def loss(self, logits: Tensor, labels: Tensor, prepared: Any) -> Tensor:
            loss = super().loss(logits, labels, prepared)
            return loss * math.nan if loss < -3.0 else loss

    model = adapted(DecoupledDistillation())
    result = unlearn(model, FORGET, Cliff(), **QUIET)
    assert all(torch.isfinite(value).all() for value in trained_state(model).values())
    assert -3.0 <= result.history[-1]["loss"] < -1 and result.steps > 1


def test_a_batch_that_is_not_finite_ends_the_run_at_the_best() -> None:
    class SecondBatchBreaks(GradientAscent):
        """Finite on the batches that steps are tried on, and not on a later one."""

        def loss(self, logits: Tensor, labels: Tensor, prepared: Any) -> Tensor:
            loss = super().loss(logits, labels, prepared)
            return loss * math.inf if len(labels) == 6 and loss < -1.0 else loss

    inputs, labels = FORGET[0]
    model = adapted(DecoupledDistillation())
    result = unlearn(model, [(inputs[:10], labels[:10]), (inputs[10:], labels[10:])], SecondBatchBreaks(), **QUIET)
    assert result.stop_reason.startswith("the loss was not finite") and result.stopped_early
    assert all(torch.isfinite(value).all() for value in trained_state(model).values())


@pytest.mark.parametrize("curvature", ["whole", "kronecker"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_gradient_that_is_not_finite_ends_the_run_at_the_best(is_first: bool, curvature: Any) -> None:
    class Root(DecoupledDistillation):
        """Adds nothing, with a derivative that is infinite."""

        def loss(self, logits: Tensor, labels: Tensor, prepared: Any) -> Tensor:
            loss = super().loss(logits, labels, prepared)
            return loss + (loss - loss.detach()).sqrt() if is_first or loss < 0.2 else loss

    model = adapted(DecoupledDistillation())
    before = trained_state(model)
    if is_first:
        with pytest.raises(ValueError, match="gradient is not finite at step 0"):
            unlearn(model, FORGET, Root(), optimizer=NaturalGradient(curvature=curvature), **QUIET)
        return assert_same_state(trained_state(model), before)
    result = unlearn(model, FORGET, Root(), optimizer=NaturalGradient(curvature=curvature), **QUIET)
    assert result.stop_reason.startswith("the loss was not finite") and result.steps
    assert all(torch.isfinite(value).all() for value in trained_state(model).values())
    assert result.history[-1]["loss"] < result.history[0]["loss"]


@pytest.mark.parametrize("refresh", [1, 3, 5])
def test_a_run_that_has_converged_stays_at_its_best_and_ends(refresh: int) -> None:
    """Trials that fail until nothing is to be gained any more are taken back, on whichever step that is."""
    objective = DecoupledDistillation()
    model = adapted(objective)
    dials = NaturalGradient(refresh=refresh, tolerance=1e-6, patience=50, proximal=0)
    result = unlearn(model, FORGET, objective, optimizer=dials, **QUIET)
    losses = [entry["loss"] for entry in result.history]
    assert result.steps > 30 and all(after <= before + 1e-6 for before, after in itertools.pairwise(losses))


def test_the_curvature_is_taken_of_each_batch_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fourth step would only ever see the first of four batches that come in one order."""
    steps: list[int] = []
    seen: list[int] = []
    observe = KroneckerFactors.observe

    def noted(self: KroneckerFactors, probes: Any) -> None:
        seen.append(len(steps))
        observe(self, probes)

    class Counts(Callback):
        def on_step_end(self, context: Any) -> None:
            steps.append(context.progress.step)

    monkeypatch.setattr(KroneckerFactors, "observe", noted)
    batches = list(zip(FORGET[0][0].split(4), FORGET[0][1].split(4), strict=True))
    objective = DecoupledDistillation()
    model = adapted(objective, batches)
    dials = NaturalGradient(curvature="kronecker", tolerance=1e-9, patience=10**6)
    unlearn(model, batches, objective, optimizer=dials, max_steps=16, callbacks=[Counts()], **QUIET)
    assert len(batches) == 4 and {step % 4 for step in seen if step != 2} == {0, 1, 2, 3}
    assert seen == [0, 2, 5, 10, 15]


KINDS: dict[str, dict[str, Any]] = {
    "diagonal": {"core": "diagonal"},
    "per channel": {"conv_mode": "per_channel"},
    "flattened": {},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("curvature", ["whole", "kronecker"])
def test_cores_of_convolutions_train(kind: str, curvature: Any) -> None:
    model = semu(Cnn, r=2, **KINDS[kind])
    dials = NaturalGradient(curvature=curvature, tolerance=1e-4)  # an untrained network is near to uniform already
    result = unlearn(model, image_batches(), UniformDistribution(), optimizer=dials, **QUIET)
    assert result.history[-1]["loss"] < 0.8 * result.history[0]["loss"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1).repeat(1, 3, 1)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_cores_that_are_read_without_their_layers_train() -> None:
    torch.manual_seed(2)
    net = Attention()
    model = adapted(UniformDistribution(), net=net, target_modules=["attention"], r=2)
    result = unlearn(model, FORGET, UniformDistribution(), **QUIET)
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]


def test_language_models_forget_by_tokens() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(3, 32, (4, 8))
    batch = {"input_ids": tokens, "labels": tokens}
    net = llama()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        net(**batch).loss.backward()
        optimizer.step()
    objective = DecoupledDistillation()
    model = adapted(objective, [batch], net.eval(), target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens"])
    result = unlearn(model, [batch], objective, **QUIET)
    assert result.history[0]["answer_probability"] > 0.5 and result.history[-1]["answer_probability"] < 0.2


def test_padding_has_no_say_in_a_step() -> None:
    """Factors are of the tokens alone, on whichever side of them there is how much padding."""
    objective, found = NPO(), []
    for side, more in (("right", 0), ("right", 6), ("left", 24)):
        torch.manual_seed(0)
        net = llama().eval()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(8 if parameter.dim() > 1 else 1)
        batches = [padded(side, more=more, seed=seed) for seed in (3, 4)]
        batches = [{name: value for name, value in batch.items() if name != "token_mask"} for batch in batches]
        model = adapted(objective, batches, net, target_modules=["q_proj", "down_proj", "embed_tokens"], r=4)
        optimizer = NaturalGradient(curvature="kronecker")
        unlearn(model, batches, objective, optimizer=optimizer, max_steps=1, **QUIET)
        found.append(torch.cat([layer.semu_core["default"].flatten() for layer in semu_layers(model).values()]))
    for cores in found[1:]:
        assert torch.cosine_similarity(cores, found[0], dim=0) > 0.9999
        assert float(cores.detach().norm()) == pytest.approx(float(found[0].detach().norm()), rel=1e-2)


def test_a_denoiser_needs_no_rate() -> None:
    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    net, scheduler = unet_condition(), DDPMScheduler(num_train_timesteps=20)
    width = net.config.cross_attention_dim
    size = (4, net.config.in_channels, 8, 8)
    batches = [
        {
            "latents": torch.randn(size),
            "condition": {"encoder_hidden_states": torch.ones(4, 2, width)},
            "anchor": {"encoder_hidden_states": -torch.ones(4, 2, width)},
        }
        for _ in range(2)
    ]
    objective = ConditionMatching(scheduler) + 0.5 * PreservePrediction(scheduler, under="anchor")
    model = adapted(objective, batches, net, target_modules=["to_k", "to_v"], explained_variance=0.9)
    result = unlearn(model, batches, objective, max_steps=30, **QUIET)
    assert result.history[-1]["loss"] < 0.7 * result.history[0]["loss"]


def loader(**options: Any) -> DataLoader[Any]:
    chosen = LABELS == 1
    return DataLoader(TensorDataset(INPUTS[chosen], LABELS[chosen]), 5, shuffle=True, **options)


def test_resuming_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def run(model: nn.Module, stop: int = 10**9, **options: Any) -> Any:
        keep = Retain(DataLoader(TensorDataset(*KEEP[0]), 9, shuffle=True), CrossEntropy())
        return unlearn(
            model, loader(), RandomLabel() + 0.1 * DecoupledDistillation(), retain=keep, max_retain_kl=0.1, seed=3,
            max_steps=14, callbacks=Interrupt(stop), **QUIET, **options,
        )  # fmt: skip

    whole, parted = (adapted(DecoupledDistillation()) for _ in range(2))
    expected = run(whole)
    with pytest.raises(Interrupted):
        run(parted, 9, output_dir=tmp_path, checkpointing_steps=4)
    resumed = adapted(DecoupledDistillation())
    result = run(resumed, output_dir=tmp_path, checkpointing_steps=4, resume_from_checkpoint="latest")
    assert_same_state(trained_state(resumed), trained_state(whole))
    assert result.history == expected.history and result.steps == expected.steps


class Interrupt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, context: Any) -> None:
        if context.progress.step >= self.step:
            raise Interrupted


def test_runs_of_one_seed_are_the_same() -> None:
    first, second = (adapted(DecoupledDistillation()) for _ in range(2))
    histories = [unlearn(model, loader(), RandomLabel(), **QUIET).history for model in (first, second)]
    assert histories[0] == histories[1]
    assert_same_state(trained_state(first), trained_state(second))


def test_accumulated_batches_are_one_large_batch() -> None:
    inputs, labels = FORGET[0]
    halves = [(inputs[:8], labels[:8]), (inputs[8:], labels[8:])]
    histories = []
    for batches, accumulation in ((FORGET, 1), (halves, 2)):
        model = adapted(DecoupledDistillation())
        result = unlearn(
            model, batches, DecoupledDistillation(), gradient_accumulation_steps=accumulation, max_steps=2, **QUIET
        )
        histories.append(result.history)
    # The random signs differ; what is minimised does not.
    assert math.isclose(histories[0][0]["loss"], histories[1][0]["loss"], rel_tol=1e-4)
    assert histories[1][-1]["loss"] < histories[1][0]["loss"]


@pytest.mark.parametrize("kind", [WholeMatrix, KroneckerFactors])
def test_the_curvature_of_accumulated_batches_is_that_of_one_large_batch(
    kind: type[Curvature], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, labels = FORGET[0]
    observe, seen = kind.observe, []

    def looked_at(self: Any, probes: Any) -> None:
        observe(self, probes)
        ones = torch.ones(self.size)
        seen.append((ones @ self.times(ones) / self.size).item())

    monkeypatch.setattr(kind, "observe", looked_at)
    dials = NaturalGradient(curvature="whole" if kind is WholeMatrix else "kronecker")
    means = []
    for size in (16, 2):
        costs = []
        for seed in range(8):
            seen.clear()
            batches = list(zip(inputs.split(size), labels.split(size), strict=True))
            unlearn(
                adapted(DecoupledDistillation()), batches, DecoupledDistillation(), optimizer=dials, seed=seed,
                gradient_accumulation_steps=16 // size, max_steps=1, **QUIET,
            )  # fmt: skip
            costs.append(seen[0])
        means.append(sum(costs) / len(costs))
    assert 0.5 < means[1] / means[0] < 2  # eight times as much where the batches add up


@pytest.mark.parametrize("dials", [{}, {"learning_rate": 3e-2, "epochs": 30}], ids=["natural", "adamw"])
def test_under_the_callers_autocast_cores_move(dials: dict[str, Any]) -> None:
    """It keeps its casts of parameters until its block ends: the loss stayed what it was, whatever the cores were."""
    model = adapted(DecoupledDistillation())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(INPUTS)
        result = unlearn(model, FORGET, DecoupledDistillation(), **dials, **QUIET)
        assert torch.is_autocast_cache_enabled()
    assert result.history[-1]["loss"] < 0.2 * result.history[0]["loss"]


def test_bfloat16_autocast_forgets_as_well() -> None:
    model = adapted(DecoupledDistillation())
    unlearn(model, FORGET, DecoupledDistillation(), mixed_precision="bf16", **QUIET)
    assert probability(model, FORGET) < 0.1


def test_a_point_of_the_trade_off_can_be_chosen() -> None:
    model, objective = adapted(DecoupledDistillation()), DecoupledDistillation()
    chosen: dict[str, Any] = {}

    def least_forgotten(history: Any) -> int:
        index = next(index for index, entry in enumerate(history) if entry["answer_probability"] < 0.5)
        chosen.update(history[index])
        return index

    result = unlearn(model, FORGET, objective, choose=least_forgotten, **QUIET)
    assert math.isclose(probability(model, FORGET), chosen["answer_probability"], rel_tol=1e-4)
    assert result.history[-1]["damage"] == pytest.approx(chosen["damage"], rel=1e-3, abs=1e-6)


UNSEEN = UnseenConfidence(torch.tensor([0.3, 0.5, 0.7]))


@pytest.mark.parametrize(
    ("objective", "keep"),
    [
        (DecoupledDistillation(), None),
        (DecoupledDistillation(margin=1.0), None),
        (UNSEEN, None),
        (RandomLabel(), Retain(KEEP, KLToOriginal(), weight=3.0)),
        (RandomLabel(), Retain(KEEP, 2.0 * KLToOriginal() + CrossEntropy())),
        (RandomLabel(), [Retain(KEEP, CrossEntropy()), Retain(KEEP, PrimalDual(KLToOriginal(), limit=0.1))]),
    ],
)
def test_an_objective_that_has_asked_the_original_tells_the_damage(objective: Objective, keep: Any) -> None:
    """Without a budget, and by no other steps than where nobody asks: equal to the divergence on what is kept."""

    class Look(Callback):
        def __init__(self) -> None:
            self.seen = {0: 0.0}  # after so many steps

        @torch.no_grad()
        def on_step_end(self, context: Any) -> None:
            inputs, labels = (FORGET if keep is None else KEEP)[0]
            with original(context.model) as reference:
                outputs = [reference(inputs), context.model(inputs)]
            if keep is None:
                outputs = [strike_out(each, labels) for each in outputs]
            self.seen[context.progress.step] = divergence("categorical", *outputs).item()

    look, model = Look(), adapted(objective)
    result = unlearn(model, FORGET, objective, retain=keep, callbacks=look, **QUIET)
    told = {entry["step"] - 1: entry["damage"] for entry in result.history[:-1]}
    both = sorted(told.keys() & look.seen.keys())
    assert len(both) > 2 and max(told.values()) > 1e-4
    assert [told[step] for step in both] == pytest.approx([look.seen[step] for step in both], rel=1e-3, abs=1e-5)


def test_other_optimisers_tell_the_damage_too() -> None:
    for keep in (KLToOriginal(), 2.0 * KLToOriginal() + CrossEntropy()):
        model = adapted(RandomLabel())
        told = unlearn(
            model, FORGET, RandomLabel(), retain=Retain(KEEP, keep), learning_rate=1e-2, max_steps=3, **QUIET
        )
        damage = [entry["damage"] for entry in told.history]
        assert damage[0] == pytest.approx(0, abs=1e-6) and damage[2] > damage[1] > 1e-6
        assert all(
            entry["loss"] == pytest.approx(entry["forget_loss"] + entry["retain_loss"]) for entry in told.history
        )


def test_what_nobody_knows_of_the_damage_is_not_told() -> None:
    another = KLToOriginal(reference=classifier(1))  # far from it before anything was done
    cases = [(RandomLabel(), None), (DecoupledDistillation(), Retain(KEEP, CrossEntropy()))]
    cases += [(RandomLabel(), Retain(KEEP, another)), (DecoupledDistillation(reference=NET), None)]
    for objective, keep in cases:
        result = unlearn(adapted(objective), FORGET, objective, retain=keep, max_steps=2, **QUIET)
        assert all("damage" not in entry for entry in result.history)


class InHarderTurns(DecoupledDistillation):
    """Every sixth batch is easy, as that of a weaker attacker: its loss lies lower wherever the cores are."""

    turns, turn = 6, 0

    def prepare(self, model: nn.Module, batch: Any) -> Any:
        self.turn += 1
        return super().prepare(model, batch), 4.0 * (self.turn % 6 != 1)

    def loss(self, logits: Tensor, labels: Tensor, prepared: Any) -> Tensor:
        return super().loss(logits, labels, prepared[0]) + prepared[1]

    def damage(self, *arguments: Any) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"turn": self.turn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.turn = state["turn"]


def test_losses_are_compared_over_all_turns() -> None:
    """Compared batch by batch, the first turn looks like the best place, and the run ends long before its end."""
    model, dials = adapted(InHarderTurns()), NaturalGradient(kl=0.02, curvature="whole")
    unlearn(model, FORGET, InHarderTurns(), optimizer=dials, **QUIET)
    alike = adapted(DecoupledDistillation())
    unlearn(alike, FORGET, DecoupledDistillation(), optimizer=dials, **QUIET)
    assert probability(model, FORGET) < 1.1 * probability(alike, FORGET) < 0.02


def test_streams_need_no_number_of_steps() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            while True:
                yield FORGET[0]

    model = adapted(DecoupledDistillation())
    result = unlearn(model, Stream(), DecoupledDistillation(), **QUIET)
    assert accuracy(model, FORGET) == 0.0 and result.stop_reason != "all steps are done"


def test_rules_edit_the_realised_step() -> None:
    class FirstLayerOnly(Rule):
        def update(self, step: Any) -> None:
            for name, parameter in step.parameters.items():
                if ".0." not in name:
                    parameter.copy_(step.before[name])

    model = adapted(DecoupledDistillation())
    result = unlearn(model, FORGET, DecoupledDistillation(), rules=FirstLayerOnly(), **QUIET)
    cores = {name: layer.semu_core["default"] for name, layer in semu_layers(model).items()}
    assert cores["0"].any() and not cores["2"].any() and not cores["4"].any()
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_an_objective_of_ones_own_joins_by_its_outputs() -> None:
    class Own(Objective):
        distribution, minimum = "categorical", 0.0

        def __call__(self, model: nn.Module, batch: Any) -> Tensor:
            return model(batch[0]).softmax(-1).gather(1, batch[1].unsqueeze(1)).mean()

        def outputs(self, model: nn.Module, batch: Any) -> Tensor:
            return model(batch[0])

    model = adapted(DecoupledDistillation())
    unlearn(model, FORGET, Own(), **QUIET)
    assert probability(model, FORGET) < 0.02


def test_what_it_cannot_train_adamw_does_and_says_so() -> None:
    model = adapted(DecoupledDistillation())
    with pytest.warns(UserWarning, match="AdamW trains .* does not tell the model's outputs"):
        unlearn(model, FORGET, lambda net, batch: net(batch[0]).square().mean(), epochs=1, **QUIET)
    with pytest.raises(ValueError, match="`max_retain_kl` must be left out"):
        unlearn(model, FORGET, DecoupledDistillation(), learning_rate=1e-2, max_retain_kl=0.1, **QUIET)
    with pytest.raises(TypeError, match="`choose` must be a function"):
        unlearn(model, FORGET, DecoupledDistillation(), choose="best", **QUIET)
    lora = get_peft_model(copy.deepcopy(NET), LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="`choose` must be left out here"):
        unlearn(lora, FORGET, DecoupledDistillation(), choose=len, **QUIET)
    with pytest.raises(ValueError, match="NaturalGradient cannot train this run, as what is trained is not"):
        unlearn(lora, FORGET, CrossEntropy(), optimizer=NaturalGradient(), **QUIET)
    with pytest.warns(UserWarning, match="AdamW trains .* not the cores of one SEMU adapter .* Give a `learning_rate`"):
        assert unlearn(lora, FORGET, CrossEntropy(), epochs=1, **QUIET).stop_reason == "all steps are done"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is said of what was asked for, nor where there is no adapter
        unlearn(lora, FORGET, CrossEntropy(), learning_rate=1e-3, epochs=1, **QUIET)
        unlearn(copy.deepcopy(NET), FORGET, CrossEntropy(), epochs=1, **QUIET)
    with pytest.raises(ValueError, match="fp16"):
        unlearn(model, FORGET, CrossEntropy(), optimizer=NaturalGradient(), mixed_precision="fp16", **QUIET)
    with pytest.raises(ValueError, match="`learning_rate` and `scheduler` must be left out"):
        unlearn(model, FORGET, CrossEntropy(), optimizer=NaturalGradient(), scheduler=Schedule, **QUIET)


@pytest.mark.parametrize(
    ("dial", "value"),
    [("kl", 0), ("kl", "x"), ("max_retain_kl", -1.0), ("tolerance", math.nan), ("damping", 0.0), ("decay", 1.0),
     ("refresh", 0), ("patience", 1.5), ("proximal", -0.1), ("curvature", "diagonal")],
)  # fmt: skip
def test_dials_out_of_range_are_refused_by_name(dial: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"`{dial}` must be"):
        NaturalGradient(**{dial: value})


def test_gradients_of_others_and_modes_come_back() -> None:
    model = adapted(DecoupledDistillation()).train()
    result = unlearn(model, FORGET, DecoupledDistillation(), max_steps=2, **QUIET)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules()) and result.steps == 2


@pytest.fixture
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("default_dtype", [torch.bfloat16, torch.float64], indirect=True)
@pytest.mark.parametrize("curvature", ["whole", "kronecker"])
@pytest.mark.parametrize("init_weights", [True, False])
def test_torchs_default_dtype(init_weights: bool, curvature: Any, default_dtype: torch.dtype) -> None:
    """Bases and curvature are float32 or wider whatever it is: nothing is decomposed in half precision."""
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"], r=2, init_weights=init_weights))
    batches = [(torch.randn(8, 6), torch.arange(8) % 4)]
    if init_weights:
        initialize_semu_weights(model, batches, CrossEntropy(), progress=False)
    optimizer = NaturalGradient(curvature=curvature)
    assert unlearn(model, batches, CrossEntropy(), optimizer=optimizer, max_steps=2, progress=False).steps == 2
    wanted = torch.float64 if default_dtype == torch.float64 else torch.float32
    assert {parameter.dtype for name, parameter in model.named_parameters() if "semu_" in name} == {wanted}


@pytest.mark.parametrize("way", ["base", "whole", "in place"])
def test_a_compiled_model_forgets_as_the_plain_one_does(way: str) -> None:
    """A graph made before the run calls none of its hooks, so that the curvature was zero and nothing forgotten."""
    torch._dynamo.reset()
    wrapped = torch.compile(copy.deepcopy(NET), backend="eager") if way == "base" else copy.deepcopy(NET)
    compiled: Any = get_peft_model(wrapped, SemuConfig(target_modules="all-linear"))
    if way == "whole":
        compiled = torch.compile(compiled, backend="eager")
    elif way == "in place":
        compiled.compile(backend="eager")
    compiled(INPUTS)
    plain = get_peft_model(copy.deepcopy(NET), SemuConfig(target_modules="all-linear"))
    losses = []
    for model in (compiled, plain):
        initialize_semu_weights(model, FORGET, DecoupledDistillation(), progress=False)
        result = unlearn(model, FORGET, DecoupledDistillation(), progress=False)
        losses.append(torch.tensor([entry["loss"] for entry in result.history]))
    torch.testing.assert_close(*losses)
