"""Forgetting by teachers, boundaries, noise and stored logits, and the methods that are made of them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from models import Mlp, vector_batches
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft import Retain, methods, unlearn
from semu_peft.objectives import (
    BoundaryShrink,
    CrossEntropy,
    GradientAscent,
    InTurns,
    KLToOriginal,
    OracleMatching,
    error_maximizing_noise,
    pair_with_logits,
    untrained,
    without_influence,
)
from semu_peft.objectives.original import original


@pytest.fixture
def blobs() -> tuple[nn.Module, list[Any], list[Any]]:
    """A classifier of four well separated clouds, batches of class 0, and batches of the others."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(32)
    x = 3 * torch.eye(4, 6)[labels] + 0.5 * torch.randn(128, 6, generator=generator)
    torch.manual_seed(1)
    model = Mlp().eval()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    forget, retain = labels == 0, labels != 0
    batches = [list(zip(x[part].split(16), labels[part].split(16), strict=True)) for part in (forget, retain)]
    return model, *batches


def accuracy(model: nn.Module, batches: list[Any]) -> float:
    with torch.no_grad():
        return float(torch.cat([model(x).argmax(1) == y for x, y in batches]).float().mean())


def with_lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    return get_peft_model(copy.deepcopy(model), LoraConfig(r=4, lora_alpha=16, target_modules=Mlp.targets)).eval()


# ---- methods by name ----


def forgets(model: nn.Module, forget: list[Any], retain: list[Any]) -> bool:
    return accuracy(model, forget) <= 0.35 and accuracy(model, retain) >= 0.9


def test_boundary_shrink_shares_a_class_out_among_its_neighbours(blobs) -> None:
    base, forget, retain = blobs
    model = with_lora(base)
    methods.boundary_shrink(model, forget, learning_rate=0.01, max_steps=40, progress=False)
    assert accuracy(model, forget) == 0 and accuracy(model, retain) >= 0.9


def test_bad_teacher_forgets_and_keeps(blobs) -> None:
    base, forget, retain = blobs
    model = with_lora(base)
    methods.bad_teacher(model, forget, retain, learning_rate=0.02, epochs=40, progress=False)
    teacher = untrained(base)
    assert accuracy(model, retain) >= 0.95
    with torch.no_grad():
        for x, _ in forget:
            apart = F.kl_div(model(x).log_softmax(-1), teacher(x).softmax(-1), reduction="batchmean")
            before = F.kl_div(base(x).log_softmax(-1), teacher(x).softmax(-1), reduction="batchmean")
            assert apart < 0.1 * before


def test_neg_grad_plus_and_scrub_forget_and_keep(blobs) -> None:
    base, forget, retain = blobs
    model = with_lora(base)
    methods.neg_grad_plus(model, forget, retain, beta=0.9, learning_rate=0.02, max_steps=60, progress=False)
    assert forgets(model, forget, retain)
    model = with_lora(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # losses that take turns do not "end above their start"
        methods.scrub(model, forget, retain, learning_rate=0.03, max_epochs=4, min_epochs=6, progress=False)
    assert forgets(model, forget, retain)


def test_unsir_impairs_and_repairs(blobs) -> None:
    base, forget, retain = blobs
    model = copy.deepcopy(base)
    methods.unsir(model, forget * 8, retain * 6, impair_rate=0.08, repair_rate=0.01, progress=False)
    assert accuracy(model, retain) >= 0.85 and accuracy(model, forget) <= 0.5


# ---- their words ----


def test_turns_are_the_steps_of_the_two_losses_by_hand(blobs) -> None:
    """With SGD: one step up the divergence, then two down the retain loss, and at the end only down."""
    base, forget, retain = blobs
    rate, number = 0.05, 6
    model, by_hand = copy.deepcopy(base), copy.deepcopy(base)
    up = InTurns(GradientAscent(), steps=1, period=3, until=3)
    down = InTurns(CrossEntropy(), steps=2, period=3, first=1)
    unlearn(
        model, forget, up, retain=Retain(retain, down), max_steps=number, epochs=number, progress=False,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate),
        scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
    )  # fmt: skip
    for step in range(number):
        if step % 3 == 0 and step >= 3:
            continue  # the first loss stays away, and the other has not its turn
        up_now = step % 3 == 0
        batch = (forget if up_now else retain)[step % len(forget if up_now else retain)]
        loss = (GradientAscent() if up_now else CrossEntropy())(by_hand, batch)
        for parameter, gradient in zip(
            by_hand.parameters(), torch.autograd.grad(loss, list(by_hand.parameters())), strict=True
        ):
            parameter.data -= rate * gradient
    for found, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(found, expected, atol=1e-6)


def test_a_turn_must_fit_into_its_period_and_its_count_is_saved() -> None:
    with pytest.raises(ValueError, match="`steps` must fit into `period`"):
        InTurns(CrossEntropy(), steps=2, period=2, first=1)
    turns, model, batch = InTurns(CrossEntropy(), 1, 2), nn.Linear(2, 2), (torch.zeros(1, 2), torch.tensor([0]))
    turns(model, batch)
    resumed = InTurns(CrossEntropy(), 1, 2)
    resumed.load_state_dict(turns.state_dict())
    assert resumed(model, batch) == 0 and resumed(model, batch) > 0


def test_the_nearest_class_is_wrong_even_where_the_step_stays_inside(blobs) -> None:
    """The gradient's sign decides which class is nearest; the true one and all forgotten ones are out."""
    model = nn.Linear(2, 3, bias=False)
    model.weight.data = torch.tensor([[5.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    batch = (torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    objective = BoundaryShrink(bound=0.1, reference=copy.deepcopy(model))
    assert objective.prepare(model, batch).tolist() == [1]
    assert BoundaryShrink(bound=0.1, reference=model, classes=[0, 1]).prepare(model, batch).tolist() == [2]
    assert torch.isclose(objective(model, batch), F.cross_entropy(model(batch[0]), torch.tensor([1])))
    assert all(parameter.grad is None for parameter in model.parameters())
    base, forget, _ = blobs
    lora = with_lora(base)
    lora.base_model.model.head.lora_B["default"].weight.data.normal_()
    with original(lora) as teacher:  # the adapter does not decide what the neighbours are
        expected = BoundaryShrink(reference=teacher).prepare(lora, forget[0])
    assert torch.equal(BoundaryShrink().prepare(lora, forget[0]), expected) and (expected != 0).all()


def test_noise_is_what_the_model_is_most_wrong_about(blobs) -> None:
    base, forget, _ = blobs
    before = {name: value.clone() for name, value in base.state_dict().items()}
    noise = error_maximizing_noise(base, forget)
    assert [tuple(x.shape) for x, _ in noise] == [tuple(x.shape) for x, _ in forget]
    assert accuracy(base, noise) == 0 and CrossEntropy()(base, noise[0]) > CrossEntropy()(base, forget[0]) + 2
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    again = error_maximizing_noise(base, forget)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(noise, again, strict=True))
    large, small = (error_maximizing_noise(base, forget, weight=weight)[0][0].norm() for weight in (0.0, 10.0))
    assert small < large


def test_the_untrained_teacher_knows_nothing_and_has_no_adapter(blobs) -> None:
    base, forget, _ = blobs
    lora = with_lora(base)
    state = torch.random.get_rng_state()
    teacher = untrained(lora, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    x = torch.cat([each for each, _ in forget])
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher(x).softmax(-1).amax() < 0.9 < base(x).softmax(-1).amax(-1).mean()
    assert torch.equal(untrained(base, seed=3)(x), teacher(x))
    assert torch.equal(lora(x), base(x))
    bare = nn.ParameterDict({"scale": nn.Parameter(torch.randn(50) + 7)})
    assert abs(untrained(bare)["scale"].mean() - 7) < 1 and not torch.equal(untrained(bare)["scale"], bare["scale"])


# ---- stored logits ----


def test_matching_what_the_model_says_leaves_it_as_it_is(blobs) -> None:
    base, forget, _ = blobs
    model = copy.deepcopy(base)
    with torch.no_grad():
        own = torch.cat([base(x) for x, _ in forget])
    pairs = pair_with_logits(forget, without_influence(own, torch.zeros(3, *own.shape)))
    result = unlearn(model, pairs, OracleMatching(), max_steps=5, learning_rate=0.1, progress=False)
    assert result.history[0]["loss"] < 1e-12
    for found, expected in zip(model.parameters(), base.parameters(), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


def test_matching_reaches_the_oracles_mean(blobs) -> None:
    base, forget, retain = blobs
    oracles = torch.stack([torch.cat([untrained(base, seed=seed)(x) for x, _ in forget]) for seed in range(3)])
    pairs = pair_with_logits(forget, oracles.mean(0))
    model = with_lora(base)
    result = unlearn(model, pairs, OracleMatching(), epochs=60, learning_rate=0.03, progress=False)
    assert result.history[-1]["loss"] < 0.02 * result.history[0]["loss"] and accuracy(model, forget) < 0.9


def test_batches_that_are_no_pairs_and_logits_that_do_not_fit_are_refused() -> None:
    batches = vector_batches(1)
    with pytest.raises(TypeError, match="pair_with_logits"):
        OracleMatching()(Mlp(), batches[0])
    with pytest.raises(ValueError, match="`logits` must have a row for each"):
        pair_with_logits(batches, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="stored logits must be of the shape"):
        OracleMatching()(Mlp(), pair_with_logits(batches, torch.zeros(len(batches[0][1]), 3))[0])
    with pytest.raises(ValueError, match="`influence` must be"):
        without_influence(torch.zeros(2, 3), torch.zeros(2, 3))


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.solve(x.T @ x + torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)


@pytest.mark.parametrize(("removed", "limit"), [(1, 1e-9), (4, 0.10), (16, 0.27)])
def test_influences_on_a_ridge_predict_retraining(removed: int, limit: float) -> None:
    """Leave-one-out effects: exact for one point, and near for several, against doing nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 6, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(6, 2, generator=generator, dtype=torch.float64)
    y = y + 0.5 * torch.randn(80, 2, generator=generator, dtype=torch.float64)
    whole = x @ _ridge(x, y)
    kept = [torch.arange(80) != i for i in range(removed)]
    influence = torch.stack([whole - x @ _ridge(x[each], y[each]) for each in kept])
    retrained = x @ _ridge(x[removed:], y[removed:])
    error = (without_influence(whole, influence) - retrained).norm() / (whole - retrained).norm()
    assert error <= limit


def test_the_divergence_from_the_original_is_zero_at_the_original_and_not_from_another_teacher() -> None:
    model = with_lora(Mlp())
    batch = vector_batches(1)[0]
    assert abs(KLToOriginal()(model, batch).item()) < 1e-6
    assert KLToOriginal(reference=untrained(model, seed=5))(model, batch) > 1e-3
