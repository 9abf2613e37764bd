"""Unlearning under simulated relearning: the displacement, the gradient beside it, and that forgetting gets deeper."""

from __future__ import annotations

import copy
from collections import UserDict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Mlp, Snapshot, llama, vector_batches
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from training_runs import QUIET, Interrupted, assert_same_state, trained_state

from semu_peft import NaturalGradient, Retain, SemuConfig, SemuLayer, gather, initialize_semu_weights, unlearn
from semu_peft.objectives import (
    Attacker,
    ConditionMatching,
    CrossEntropy,
    DecoupledDistillation,
    DenoisingLoss,
    KLToOriginal,
    NoiseSchedule,
    Objective,
    RandomLabel,
    SimulatedRelearning,
)
from semu_peft.objectives.attackers import Relearner, corrections_of, flip
from semu_peft.objectives.examples import Examples, single_examples
from semu_peft.objectives.original import original, with_values

FORGET, RETAIN = vector_batches(2, 8, seed=1), vector_batches(2, 8, seed=2)
ATTACKERS = [Attacker("sgd", 0.1, steps=3, forget_examples=5, retain_examples=4), Attacker("adam", 0.01, steps=2)]


def adapted(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(3)
    model = get_peft_model(Mlp().to(dtype).eval(), SemuConfig(target_modules=Mlp.targets, r=2))
    initialize_semu_weights(model, batches(FORGET, dtype), CrossEntropy(), progress=False)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def batches(given: list[Any], dtype: torch.dtype = torch.float64) -> list[Any]:
    return [(x.to(dtype), y) for x, y in given]


def deep(objective: Objective | None = None, attackers: Any = tuple(ATTACKERS), **options: Any) -> SimulatedRelearning:
    inner = DecoupledDistillation() if objective is None else objective
    return SimulatedRelearning(inner, batches(FORGET), batches(RETAIN), attackers, **options)


def drawn(given: list[Any], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The attacker's examples, in a dense reference's own words."""
    x, y = (torch.cat(parts) for parts in zip(*given, strict=True))
    order = torch.randperm(len(x), generator=generator)[:count]
    return x[order], y[order]


def fine_tuned(model: Any, generator: torch.Generator) -> nn.Module:
    """The first attacker's work on a merged copy, by torch alone."""
    merged = copy.deepcopy(model).merge_and_unload().eval().requires_grad_(True)
    forget, retain = drawn(batches(FORGET), 5, generator), drawn(batches(RETAIN), 4, generator)
    x, y = torch.cat([forget[0], retain[0]]), torch.cat([forget[1], retain[1]])
    optimizer = torch.optim.SGD(merged.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(merged(x), y).backward()
        optimizer.step()
    return merged


def test_the_displacement_is_that_of_fine_tuning_the_merged_model() -> None:
    model = adapted()
    objective, batch = deep(), batches(FORGET)[0]
    simulated = objective.prepare(model, batch)
    expected = fine_tuned(model, torch.Generator().manual_seed(0))
    there = with_values(model, {id(weight): value for weight, value in simulated.displaced})
    assert torch.allclose(there(batch[0]), expected(batch[0]), atol=1e-12)
    evaluation = objective.evaluate(model, batch, simulated)
    inner = DecoupledDistillation(reference=model.get_base_model())
    with original(model) as reference:
        q = reference(batch[0]).scatter(1, batch[1][:, None], float("-inf")).softmax(-1)
    by_hand = [F.kl_div(net(batch[0]).log_softmax(-1), q, reduction="batchmean") for net in (model, expected)]
    assert evaluation.loss.item() == pytest.approx(sum(each.item() for each in by_hand), rel=1e-10)
    assert [len(output.values) for output in evaluation.outputs] == [8, 8] and inner.minimum == objective.minimum


def test_half_precision_is_attacked_by_steps_that_add_up() -> None:
    """As in mixed precision: each step is far below what bfloat16 tells apart, their sum is not."""
    torch.manual_seed(0)
    plain, data = nn.Linear(8, 4), [(torch.randn(16, 8), torch.arange(16) % 4)]
    learnt = []
    for dtype in (torch.float32, torch.bfloat16):
        model, pool = copy.deepcopy(plain).to(dtype), Examples([(data[0][0].to(dtype), data[0][1])])
        attacker = Attacker("adam", 1e-4, steps=200, forget_examples=16)
        relearner = Relearner(model, attacker, pool, None, CrossEntropy(), torch.Generator().manual_seed(0))
        for _ in range(attacker.steps):
            relearner.step()
        assert relearner.model.weight.dtype == dtype
        learnt.append(relearner.model.weight.float() - model.weight.float())
    assert (learnt[1] - learnt[0]).norm() < 0.1 * learnt[0].norm()


@pytest.mark.parametrize("conv_mode", ["flatten", "per_channel"])
def test_convolutions_are_attacked_merged(conv_mode: Any) -> None:
    """With the correction in the weight, and all examples in one pass: as by an attacker who has the merged model."""
    config = SemuConfig(target_modules=["conv", "head"], r=2, conv_mode=conv_mode, init_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(Convolving().double(), config).double()
    x, y = torch.randn(9, 2, 4, 4, dtype=torch.float64), torch.arange(9) % 3
    expected = copy.deepcopy(model).merge_and_unload()
    relearners = [
        Relearner(
            net, Attacker("adam", 0.01, forget_examples=4, retain_examples=3), Examples([(x[:5], y[:5])]),
            Examples([(x[5:], y[5:])]), CrossEntropy(), torch.Generator().manual_seed(1),
        )
        for net in (model, expected)
    ]  # fmt: skip
    for relearner in relearners:
        relearner.step()
        relearner.step()
    ours, theirs = relearners
    assert torch.allclose(ours.model(x), theirs.model(x), atol=1e-12) and not torch.allclose(ours.model(x), model(x))
    assert len(corrections_of(model)) == 2 and len(ours._batches()) == 1
    assert not any(isinstance(module, SemuLayer) and not module.disable_adapters for module in ours.model.modules())
    moved = with_values(model, {id(weight): value for weight, value in ours.displaced()})
    assert torch.allclose(moved(x), theirs.model(x), atol=1e-12)


class Convolving(nn.Module):
    """A convolution and a head, `(N, 2, 4, 4) -> (N, 3)`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 5, 3, padding=1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).mean((2, 3)))


def test_a_weight_that_others_use_or_compute_is_attacked_as_it_is() -> None:
    config = SemuConfig(target_modules=["conv", "head"], r=2, init_weights=False)
    net = Convolving()
    net.twin = nn.Linear(5, 3)
    net.twin.weight = net.head.weight
    assert len(corrections_of(get_peft_model(net, config))) == 1
    assert not corrections_of(get_peft_model(Convolving().bfloat16(), config)), "the sum would be rounded"
    parametrised = Convolving()
    nn.utils.parametrizations.weight_norm(parametrised.head)
    assert len(corrections_of(get_peft_model(parametrised, config))) == 1


def test_the_model_is_untouched() -> None:
    model = adapted().train()
    before = Snapshot.of(model)
    loss = deep()(model, batches(FORGET)[0])
    before.assert_same(model)
    loss.backward()
    frozen = [p.grad for p in model.parameters() if not p.requires_grad]
    assert all(gradient is None for gradient in frozen)


@pytest.mark.parametrize("kind", ["adapter", "all weights"])
def test_the_gradient_is_that_of_finite_differences(kind: str) -> None:
    """With the displacement held fixed: also where the weights are trained that an attacker moves."""
    net = adapted() if kind == "adapter" else Mlp().double().eval()
    reference = Mlp().double().eval().requires_grad_(False)
    objective = deep(DecoupledDistillation(reference=reference, margin=1.5), weight=0.7)
    batch = batches(FORGET)[1]
    prepared = objective.prepare(net, batch)
    objective.evaluate(net, batch, prepared).loss.backward()
    for parameter in trained(net):
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for index in {0, len(flat) // 2, len(flat) - 1}:
            values = []
            for step in (1e-6, -2e-6):
                flat[index] += step
                values.append(objective.evaluate(net, batch, prepared).loss.item())
            flat[index] += 1e-6
            assert gradient[index].item() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-6)


def test_what_is_no_longer_in_memory_is_simulated_again() -> None:
    model, objective, (first, second) = adapted(), deep(RandomLabel(seed=5)), batches(FORGET)
    early = objective.prepare(model, first)
    before = objective.evaluate(model, first, early)
    values = [value.clone() for _, value in early.displaced]
    late = objective.prepare(model, second)
    assert early.displaced is None and late.displaced is not None
    with torch.no_grad():
        kept = [parameter.clone() for parameter in trained(model)]
        for parameter in trained(model):
            parameter.add_(0.1)
    state = objective.state_dict()
    moved = objective.evaluate(model, first, early)
    assert moved.loss.item() != before.loss.item(), "the loss is that of the present cores"
    assert all(torch.equal(value, old) for (_, value), old in zip(early.displaced, values, strict=True))
    assert torch.equal(objective.state_dict()["generator"], state["generator"])
    with torch.no_grad():
        for parameter, value in zip(trained(model), kept, strict=True):
            parameter.copy_(value)
    assert torch.equal(objective.evaluate(model, first, early).loss, before.loss)


def test_attackers_come_in_turn() -> None:
    model, objective, batch = adapted(), deep(), batches(FORGET)[0]
    both = [deep(attackers=attacker) for attacker in ATTACKERS]
    state = objective.state_dict()
    for turn in range(3):
        alone = both[turn % 2]
        alone.load_state_dict({**objective.state_dict(), "turn": 0})
        assert torch.equal(objective(model, batch), alone(model, batch))
    assert objective.state_dict()["turn"] == 3 and state["turn"] == 0


def test_the_original_of_a_displaced_model_is_the_original() -> None:
    """An objective that asks for it in its call, rather than beforehand, is told the same at both places."""
    model, x = adapted(), batches(FORGET)[0][0]
    displaced = with_values(model, {id(p): p.detach() + 1 for p in model.parameters() if not p.requires_grad})
    with original(model) as expected, original(displaced) as reference:
        assert torch.equal(reference(x), expected(x)) and not torch.equal(displaced(x), model(x))


def test_a_subspace_is_found_from_both_places() -> None:
    """The attacker's own passes leave no trace in it."""
    net, batch = Mlp().double().eval(), batches(FORGET)[0]
    reference = Mlp().double().eval()
    inner = DecoupledDistillation(reference=reference)
    objective = deep(inner)
    layers = {"fc1": net.fc1.weight, "head": net.head.weight}
    gathered = gather(net.requires_grad_(False), [batch], objective, targets=list(layers), progress=False)
    again = deep(inner)
    net.requires_grad_(True)
    again(net, batch).backward()
    for name, weight in layers.items():
        assert torch.allclose(gathered[name].total, weight.grad, atol=1e-10)


@pytest.mark.parametrize("optimizer", ["natural", "adamw"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, optimizer: str) -> None:
    def run(folder: Path, **options: Any) -> dict[str, Tensor]:
        model = adapted(torch.float32)
        way: dict[str, Any] = {"learning_rate": 1e-2} if optimizer == "adamw" else {}
        unlearn(
            model, FORGET, SimulatedRelearning(DecoupledDistillation(), FORGET, RETAIN, ATTACKERS),
            retain=Retain(RETAIN, RandomLabel()), output_dir=folder,
            checkpointing_steps=2, **{"max_steps": 6, "callbacks": Breaks(99), **way, **QUIET, **options},
        )  # fmt: skip
        return trained_state(model)

    expected, broken = run(tmp_path / "whole"), tmp_path / "broken"
    with pytest.raises(Interrupted):
        run(broken, callbacks=Breaks(3))
    assert_same_state(run(broken, resume_from_checkpoint="latest"), expected)


def test_few_batches_are_attacked_for_the_comparison_of_the_end_with_the_start() -> None:
    """Each attack is a short training; each attacker has as many of them as another."""
    looks = []
    small = [(x[None], y[None]) for x, y in zip(*(torch.cat(part) for part in zip(*FORGET, strict=True)), strict=True)]

    class Counted(SimulatedRelearning):
        def prepare(self, model: nn.Module, batch: Any) -> Any:
            looks.append(self.turn % len(self.attackers))
            return super().prepare(model, batch)

    three = [*ATTACKERS, Attacker(steps=1)]
    objective = Counted(DecoupledDistillation(), FORGET, RETAIN, three) + 0.5 * KLToOriginal()
    assert objective.is_costly and objective.turns == 3
    result = unlearn(adapted(torch.float32), small, objective, max_steps=2, **QUIET)
    assert result.steps == 2 and len(looks) == 9 + 1
    assert looks[:9] == [0, 1, 2] * 3


class Breaks:
    """Pulls the plug after a step."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, context: Any) -> None:
        if context.progress.step >= self.after:
            raise Interrupted


def test_language_models_and_denoisers() -> None:
    net = llama()
    ids = torch.randint(3, 32, (6, 7), generator=torch.Generator().manual_seed(0))
    text = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
    model = get_peft_model(net, SemuConfig(target_modules=["q_proj", "down_proj"], r=2))
    initialize_semu_weights(model, text, CrossEntropy(), progress=False)
    objective = SimulatedRelearning(DecoupledDistillation(), text, attackers=Attacker("adam", 1e-3, steps=2))
    result = unlearn(model, text, objective, max_steps=4, progress=False)
    assert result.history[-1]["loss"] < result.history[0]["loss"]

    schedule = NoiseSchedule(torch.linspace(1, 0.1, 10), torch.linspace(0, 1, 10), torch.arange(10))
    denoiser = get_peft_model(Denoiser(), SemuConfig(target_modules=["inner"], r=2))
    images = [(torch.randn(8, 1, 2, 2), torch.zeros(8, dtype=torch.long))]
    inner = ConditionMatching(schedule, towards="next", num_classes=3)
    initialize_semu_weights(denoiser, images, inner, progress=False)
    with_attack = SimulatedRelearning(
        inner, images, attackers=Attacker(steps=2, forget_examples=4), learn=DenoisingLoss(schedule)
    )
    result = unlearn(denoiser, images, with_attack, max_steps=4, progress=False)
    assert result.history[-1]["loss"] < result.history[0]["loss"]


class Denoiser(nn.Module):
    """A class-conditional denoiser of four numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.inner, self.outer, self.of_class = nn.Linear(4, 8), nn.Linear(8, 4), nn.Embedding(3, 4)

    def forward(self, noisy: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
        hidden = torch.tanh(self.inner(noisy.flatten(1) + self.of_class(class_labels)))
        return (self.outer(hidden).view_as(noisy),)


def test_examples_of_every_form() -> None:
    short = {"input_ids": torch.arange(6).view(2, 3), "labels": torch.zeros(2, 3)}
    long = {"input_ids": torch.arange(8).view(2, 4), "labels": torch.ones(2, 4)}
    examples = Examples([short, long, short])
    parts = examples.batches_of(examples.rows)
    assert [len(part["labels"]) for part in parts] == [4, 2], "one batch for each length"
    assert [len(part["labels"]) for part in examples.batches_of(examples.rows, size=3)] == [2, 1, 1, 2]
    condition = {"latents": torch.zeros(2, 4), "condition": {"txt_ids": torch.zeros(2, 3), "c": torch.arange(2)}}
    (one,) = Examples([condition]).batches_of([(0, 1)])
    assert one["condition"]["c"].tolist() == [1] and one["condition"]["txt_ids"].shape == (2, 3), "shared by all"


def test_single_examples_have_their_own_labels_and_names() -> None:
    """Whatever the batch is made of: labels in a list, a named tuple, positions that all examples share."""
    pair = namedtuple("pair", ["inputs", "labels"])
    first, second = single_examples(pair(torch.arange(2), ["cat", "dog"]))
    assert (type(second), second.inputs.tolist(), second.labels) == (pair, [1], ["dog"]) and first.labels == ["cat"]
    condition = {"latents": torch.zeros(2, 4), "condition": {"txt_ids": torch.zeros(2, 3), "c": [torch.arange(2)]}}
    (_, one) = single_examples(condition)
    assert one["condition"]["c"][0].tolist() == [1] and one["condition"]["txt_ids"].shape == (2, 3), "shared by all"
    with pytest.raises(TypeError, match="first dimension is the examples, got list"):
        single_examples(["text"])


def test_flips_leave_what_is_no_picture() -> None:
    batch = UserDict(pixel_values=torch.arange(8.0).view(4, 1, 1, 2), labels=torch.arange(4))  # as transformers' are
    flipped = flip(batch, torch.Generator().manual_seed(0))
    assert torch.equal(flipped["labels"], batch["labels"])
    turned = flipped["pixel_values"][:, 0, 0, 0] == batch["pixel_values"][:, 0, 0, 1]
    assert 0 < turned.sum() < 4


@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("attackers", lambda: deep(attackers=[])),
        ("attackers", lambda: deep(attackers=["sgd"])),
        ("forget", lambda: SimulatedRelearning(CrossEntropy(), [])),
        ("forget", lambda: SimulatedRelearning(CrossEntropy(), FORGET[0][0])),
        ("forget", lambda: SimulatedRelearning(CrossEntropy(), [["text"]])),
        ("objective", lambda: SimulatedRelearning(CrossEntropy, FORGET)),
        ("weight", lambda: deep(weight=-1.0)),
        ("copies", lambda: deep(copies=0)),
        ("optimizer", lambda: Attacker("lion")),
        ("learning_rate", lambda: Attacker("sgd", -1.0)),
        ("forget_examples", lambda: Attacker(forget_examples=0, retain_examples=0)),
        (
            "attacker",
            lambda: SimulatedRelearning(CrossEntropy(), FORGET, None, Attacker(forget_examples=0))(Mlp(), FORGET[0]),
        ),
        ("layers", lambda: Attacker(layers=5)),
        ("layers", lambda: deep(CrossEntropy(), attackers=Attacker(layers="nope"))(Mlp().double(), batches(FORGET)[0])),
        ("margin", lambda: DecoupledDistillation(margin=-1.0)),
    ],
)
def test_mistakes_are_named(argument: str, make: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=argument):
        make()


# ---- deeper ----


def digits(seed: int) -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(x).float()[order] / 16, torch.tensor(y)[order]


def test_relearning_takes_longer_and_the_rest_stays() -> None:
    """By an attacker with images, seeds and a number of steps that were not simulated."""
    x, y = digits(0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    train, test = slice(0, 1200), slice(1200, None)
    for _ in range(250):
        rows = torch.randint(1200, (64,))
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    own = y[train] == 3
    forget, retain = (x[train][own], y[train][own]), (x[train][~own], y[train][~own])
    half = len(forget[0]) // 2
    known = [(forget[0][:half], forget[1][:half])]
    kept = [(retain[0][:400], retain[1][:400])]
    attack = (torch.cat([forget[0][half : half + 20], retain[0][500:560]]),
              torch.cat([forget[1][half : half + 20], retain[1][500:560]]))  # fmt: skip

    def after(is_deep: bool) -> tuple[int, float]:
        config = SemuConfig(target_modules="all-linear", explained_variance=0.9999)
        model = get_peft_model(copy.deepcopy(net), config)
        plain = DecoupledDistillation(margin=3.0)
        initialize_semu_weights(model, known, DecoupledDistillation(), progress=False)
        objective = SimulatedRelearning(plain, known, kept, [Attacker(steps=10)]) if is_deep else plain
        unlearn(
            model, known, objective, retain=Retain(kept, KLToOriginal(), weight=10.0), progress=False,
            optimizer=NaturalGradient(patience=20), max_steps=20,
        )  # fmt: skip
        merged = model.merge_and_unload().requires_grad_(True)
        others = y[test] != 3
        accuracy = (merged(x[test])[others].argmax(1) == y[test][others]).float().mean().item()
        return steps_back(merged, attack, (x[test][~others], y[test][~others])), accuracy

    (shallow_steps, shallow_kept), (deep_steps, deep_kept) = after(False), after(True)
    assert deep_steps >= 3 * max(shallow_steps, 1), (shallow_steps, deep_steps)
    assert deep_kept > shallow_kept - 0.03 and deep_kept > 0.9, (shallow_kept, deep_kept)


def steps_back(model: nn.Module, attack: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> int:
    """After how many steps half of the forgotten class is recognised again."""
    optimizer = torch.optim.SGD(model.parameters(), 3e-3, momentum=0.9)
    for step in range(100):
        if (model(held_out[0]).argmax(1) == held_out[1]).float().mean() >= 0.5:
            return step
        optimizer.zero_grad()
        F.cross_entropy(model(attack[0]), attack[1]).backward()
        optimizer.step()
    return 100
