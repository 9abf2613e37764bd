"""Each objective against its formula written by hand, and what objectives promise beyond a number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from models import CLASSES, Mlp, Snapshot, image_batches, run, vector_batches, vit
from peft import IA3Config, LoraConfig, OFTConfig, get_peft_model
from torch import Tensor, nn

from semu_peft import SemuConfig
from semu_peft.objectives import (
    CrossEntropy,
    DecoupledDistillation,
    DenoisingLoss,
    Evaluation,
    GradientAscent,
    InvertedHinge,
    KLToOriginal,
    NoiseSchedule,
    Objective,
    RandomLabel,
    UniformDistribution,
    UnseenConfidence,
    WeightedSum,
    as_objective,
)
from semu_peft.objectives.base import RandomObjective


class Table(nn.Module):
    """A model that returns the logits it was made with, so that its output is known exactly."""

    def __init__(self, logits: Any) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[x]


LOGITS = np.array([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0], [-3.0, 4.0, 1.0], [1.0, 1.0, -2.0]])
LABELS = np.array([0, 2, 1, 1])
BATCH = (torch.arange(4), torch.tensor(LABELS))


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def kl(target: np.ndarray, model: np.ndarray) -> float:
    """Mean over rows of Σ q log(q / p), with 0 log 0 = 0."""
    ratio = np.log(np.where(target > 0, target, 1.0) / np.where(target > 0, model, 1.0))
    return float((target * ratio).sum(-1).mean())


def struck_out(logits: np.ndarray) -> np.ndarray:
    """The prediction without the true class, renormalised."""
    rest = softmax(logits)
    rest[np.arange(len(LABELS)), LABELS] = 0.0
    return rest / rest.sum(-1, keepdims=True)


P = softmax(LOGITS)
TRUE = P[np.arange(4), LABELS]
OTHER_LOGITS = LOGITS[::-1] * 0.7 + 0.1
EXPECTED: dict[str, tuple[Objective, float]] = {
    "cross_entropy": (CrossEntropy(), float(-np.log(TRUE).mean())),
    "gradient_ascent": (GradientAscent(), float(np.log(TRUE).mean())),
    "inverted_hinge": (
        InvertedHinge(),
        float(np.mean([1 + P[i, y] - max(P[i, v] for v in range(3) if v != y) for i, y in enumerate(LABELS)])),
    ),
    "uniform": (UniformDistribution(), kl(np.full((4, 3), 1 / 3), P)),
    "decoupled_distillation": (
        DecoupledDistillation(reference=Table(OTHER_LOGITS)),
        kl(struck_out(OTHER_LOGITS), P),
    ),
}
every_objective = pytest.mark.parametrize("name", EXPECTED)


@every_objective
def test_value_is_the_formula(name: str) -> None:
    """The value is the formula's, computed in numpy."""
    objective, expected = EXPECTED[name]
    loss = objective(Table(LOGITS), BATCH)
    assert loss.shape == () and loss.item() == pytest.approx(expected, rel=1e-10)


@every_objective
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    """The gradient by the logits is the slope of the value."""
    objective, _ = EXPECTED[name]
    model = Table(LOGITS)
    objective(model, BATCH).backward()
    slope = np.zeros_like(LOGITS)
    for index in np.ndindex(*LOGITS.shape):
        step = np.zeros_like(LOGITS)
        step[index] = 1e-6
        up, down = (objective(Table(LOGITS + sign * step), BATCH).item() for sign in (1, -1))
        slope[index] = (up - down) / 2e-6
    np.testing.assert_allclose(model.logits.grad.numpy(), slope, atol=1e-7)


@every_objective
def test_loss_is_float32_for_a_half_precision_model(name: str) -> None:
    """Half-precision logits are lifted before the softmax: no overflow, no underflow, a finite gradient."""
    logits = torch.tensor([[60000.0, -60000.0, 0.0]], dtype=torch.float16)
    objective = EXPECTED[name][0]
    if name == "decoupled_distillation":
        objective = DecoupledDistillation(reference=lambda x: torch.zeros(1, 3))  # type: ignore[arg-type]
    leaf = logits.requires_grad_(True)
    loss = objective(lambda x: leaf, (torch.zeros(1), torch.tensor([0])))  # type: ignore[arg-type]
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    loss.backward()
    assert torch.isfinite(leaf.grad).all()


def test_inverted_hinge_is_bounded() -> None:
    """0 where another class is certain, 2 where the true one is."""
    certain = 100 * torch.eye(3, dtype=torch.float64)
    x = torch.tensor([0, 1])
    assert InvertedHinge()(Table(certain), (x, x)).item() == pytest.approx(2.0)
    assert InvertedHinge()(Table(certain), (x, x + 1)).item() == pytest.approx(0.0)


# ---- random labels ----


class Recorder(nn.Module):
    """Logits whose cross entropy tells which label was asked for: −log p(v) = v, up to a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return -torch.arange(float(CLASSES)).expand(len(x), -1)


def test_random_label_is_cross_entropy_to_another_label() -> None:
    """For one example at a time the loss tells the label: never the true one, all others equally often."""
    objective, constant = RandomLabel(seed=1), math.log(sum(math.exp(-v) for v in range(CLASSES)))
    for true in range(CLASSES):
        batch = (torch.zeros(1), torch.tensor([true]))
        seen = [round(objective(Recorder(), batch).item() - constant, 3) for _ in range(300)]
        counts = {label: seen.count(label) for label in range(CLASSES)}
        assert sum(counts.values()) == 300 and counts.pop(true) == 0
        assert min(counts.values()) > 60, counts


def test_random_label_draws_each_example_afresh() -> None:
    """Within a batch and from call to call the labels differ."""
    objective = RandomLabel(seed=1)
    labels = torch.zeros(64, dtype=torch.long)
    values = {objective(Recorder(), (torch.zeros(64), labels)).item() for _ in range(8)}
    assert len(values) > 4


def test_random_label_num_labels() -> None:
    """`num_labels` below the number of logits restricts the draw; beyond it, or below two, is an error."""
    constant = math.log(sum(math.exp(-v) for v in range(CLASSES)))
    objective = RandomLabel(num_labels=2)
    values = {round(objective(Recorder(), (torch.zeros(1), torch.tensor([0]))).item() - constant, 3) for _ in range(20)}
    assert values == {1.0}
    for bad in (1, CLASSES + 1, -1):
        with pytest.raises(ValueError, match=f"`num_labels`.*{bad}"):
            RandomLabel(num_labels=bad)(Recorder(), (torch.zeros(1), torch.tensor([0])))


def test_random_label_is_deterministic_by_seed() -> None:
    """The same seed draws the same, another one draws otherwise, and the global generator plays no part."""
    model, batches = Mlp().eval(), vector_batches(6)

    def losses(seed: int) -> list[float]:
        torch.rand(3)
        objective = RandomLabel(seed=seed)
        return [objective(model, batch).item() for batch in batches]

    state = torch.get_rng_state()
    assert losses(0) == losses(0) != losses(1)
    torch.set_rng_state(state)
    expected = torch.rand(1)
    torch.set_rng_state(state)
    RandomLabel()(model, batches[0])
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("combine", [lambda o: o, lambda o: CrossEntropy() + 0.5 * o])
def test_state_dict_goes_on_where_it_was(combine: Callable[[Objective], Objective]) -> None:
    """A loaded state draws what would have been drawn next, alone and inside a sum."""
    model, batches = Mlp().eval(), vector_batches(6)
    first = combine(RandomLabel(seed=4))
    for batch in batches[:3]:
        first(model, batch)
    state = first.state_dict()
    expected = [first(model, batch).item() for batch in batches[3:]]
    second = combine(RandomLabel(seed=99))
    second.load_state_dict(state)
    assert [second(model, batch).item() for batch in batches[3:]] == expected


# ---- decoupled distillation and the reference ----


def test_the_target_leaves_the_true_class_out() -> None:
    """At the original model the loss is −log(1 − p_y), and moving along its gradient lowers p_y alone of all ratios."""
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"])).eval()
    x, y = vector_batches(1)[0]
    p = torch.softmax(run(model, x), -1).gather(1, y[:, None])
    assert DecoupledDistillation()(model, (x, y)).item() == pytest.approx(float(-(1 - p).log().mean()), rel=1e-5)


ADAPTERS = {
    "semu": SemuConfig(target_modules=["fc1", "head"], r=3, init_weights=False),
    "lora": LoraConfig(target_modules=["fc1"], modules_to_save=["head"], init_lora_weights=False),
    "oft": OFTConfig(target_modules=["fc2"], oft_block_size=2, init_weights=False),
    "ia3": IA3Config(target_modules=["fc1"], feedforward_modules=[], init_ia3_weights=False),
}
every_adapter = pytest.mark.parametrize("kind", ADAPTERS)


def wrapped(kind: str) -> tuple[nn.Module, nn.Module]:
    """A model with a non-zero adapter, and its original."""
    torch.manual_seed(5)
    original = Mlp().eval()
    torch.manual_seed(5)
    model = get_peft_model(Mlp(), ADAPTERS[kind]).eval()
    if kind == "lora":
        model.base_model.model.head.modules_to_save["default"].weight.data.add_(1.0)
    return model, original


@every_adapter
def test_the_reference_is_the_model_without_its_adapter(kind: str) -> None:
    """With any adapter method, and with modules trained beside it, the loss is that with the original as reference."""
    model, original = wrapped(kind)
    batch = vector_batches(1)[0]
    assert not torch.allclose(run(model, batch[0]), run(original, batch[0]))
    loss = DecoupledDistillation()(model, batch)
    expected = DecoupledDistillation(reference=original)(model, batch)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert all(parameter.grad is None for parameter in original.parameters())


def test_a_model_that_fails_gets_its_adapter_back() -> None:
    """An exception in the reference pass does not leave the adapter off."""
    model, _ = wrapped("semu")
    x, y = vector_batches(1)[0]
    expected = run(model, x)
    with pytest.raises(RuntimeError):
        DecoupledDistillation()(model, (x[:, :2], y))
    assert torch.equal(run(model, x), expected)


def test_reference_is_needed_for_a_plain_model() -> None:
    """Without an adapter the error asks for `reference`; with one given, a plain model is fine."""
    batch = vector_batches(1)[0]
    with pytest.raises(ValueError, match="Mlp has no PEFT adapter.*`reference`"):
        DecoupledDistillation()(Mlp(), batch)
    assert torch.isfinite(DecoupledDistillation(reference=Mlp().eval())(Mlp().eval(), batch))


def test_merged_adapter_cannot_be_the_reference() -> None:
    """A merged adapter cannot be switched off without changing weights: the error names `unmerge_adapter`."""
    model, _ = wrapped("semu")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        DecoupledDistillation()(model, vector_batches(1)[0])


def test_an_explicit_reference_is_not_changed() -> None:
    """A reference given by the user keeps its mode, gradients and statistics."""
    reference = nn.Sequential(nn.Linear(6, CLASSES), nn.BatchNorm1d(CLASSES)).eval()
    before = Snapshot.of(reference)
    DecoupledDistillation(reference=reference)(Mlp(), vector_batches(1)[0]).backward()
    before.assert_same(reference)


# ---- unseen confidence ----


def test_unseen_confidence_by_hand() -> None:
    """Ranked by margin, each target has the unseen data's quantile on the true class, or what it had if less."""
    unseen = np.array([0.1, 0.4, 0.9])
    rest = struck_out(OTHER_LOGITS)
    p = softmax(OTHER_LOGITS)[np.arange(4), LABELS]
    order = np.argsort(np.argsort(np.log(p / (1 - p))))
    confidence = np.minimum(np.quantile(unseen, (order + 0.5) / 4), p)
    target = rest * (1 - confidence)[:, None]
    target[np.arange(4), LABELS] = confidence
    objective = UnseenConfidence(confidences=torch.tensor(unseen), reference=Table(OTHER_LOGITS))
    model = Table(LOGITS)
    loss = objective(model, BATCH)
    assert loss.item() == pytest.approx(kl(target, P), rel=1e-6)
    loss.backward()
    np.testing.assert_allclose(model.logits.grad.numpy(), (P - target) / 4, atol=1e-7)


def test_unseen_confidence_teaches_nothing() -> None:
    """An example that the original is less sure of than of unseen data is at its target already."""
    original = Table(torch.tensor([[0.0, 1.0, 0.0]]))
    batch = torch.tensor([0]), torch.tensor([0])
    loss = UnseenConfidence(torch.tensor([0.9, 0.99]), reference=original)(original, batch)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_unseen_confidence_uses_the_adapter_off_model() -> None:
    """As for decoupled distillation, the reference is the model without its adapter."""
    model, original = wrapped("semu")
    batch, unseen = vector_batches(1)[0], torch.rand(9)
    expected = UnseenConfidence(confidences=unseen, reference=original)(model, batch)
    torch.testing.assert_close(UnseenConfidence(confidences=unseen)(model, batch), expected)


def test_unseen_confidence_ranks_among_all_that_are_to_be_forgotten() -> None:
    """With the log-odds of all of them the target of an example does not depend on what stands beside it."""
    original, unseen = Table(OTHER_LOGITS), torch.tensor([0.001, 0.004, 0.009])  # below what the original says
    p = torch.tensor(softmax(OTHER_LOGITS)[np.arange(4), LABELS])
    within = UnseenConfidence(unseen, original)
    among = UnseenConfidence(unseen, original, forget_log_odds=(p / (1 - p)).log())
    together = within.prepare(Table(LOGITS), BATCH)
    assert not torch.allclose(within.prepare(Table(LOGITS), (BATCH[0][:2], BATCH[1][:2])), together[:2])
    for rows in (slice(0, 4), slice(0, 1), slice(1, 4)):
        torch.testing.assert_close(among.prepare(Table(LOGITS), (BATCH[0][rows], BATCH[1][rows])), together[rows])
    losses = [among(Table(LOGITS), (BATCH[0][i : i + 1], BATCH[1][i : i + 1])) for i in range(4)]
    torch.testing.assert_close(torch.stack(losses).mean(), within(Table(LOGITS), BATCH))


@pytest.mark.parametrize("bad", [torch.tensor([]), torch.tensor([1.0, float("nan")])])
def test_log_odds_that_rank_nothing(bad: Tensor) -> None:
    """Empty or NaN; a list is no tensor."""
    with pytest.raises(ValueError, match="`forget_log_odds` must hold a number for each forget example"):
        UnseenConfidence(torch.tensor([0.5]), forget_log_odds=bad)
    with pytest.raises(TypeError, match="`forget_log_odds` must be a tensor"):
        UnseenConfidence(torch.tensor([0.5]), forget_log_odds=[0.5])  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [[], [0.5, 1.2], [-0.1], [float("nan")]])
def test_unseen_confidence_of_no_probabilities(bad: list[float]) -> None:
    """Confidences that are none are refused at construction."""
    with pytest.raises(ValueError, match=r"`confidences`.*\[0, 1\]"):
        UnseenConfidence(confidences=torch.tensor(bad))


# ---- sums ----


def test_weighted_sums() -> None:
    """Objectives add and scale like numbers, from both sides and nested."""
    model = Table(LOGITS)
    ce, uniform, hinge = (EXPECTED[name][1] for name in ("cross_entropy", "uniform", "inverted_hinge"))
    for objective, expected in (
        (CrossEntropy() + 0.5 * UniformDistribution(), ce + 0.5 * uniform),
        (CrossEntropy() * 2 + InvertedHinge() * 3, 2 * ce + 3 * hinge),
        (2 * (CrossEntropy() + 0.25 * (InvertedHinge() + UniformDistribution())), 2 * ce + 0.5 * (hinge + uniform)),
        (CrossEntropy() + GradientAscent(), 0.0),
        (-1 * CrossEntropy(), -ce),
    ):
        assert isinstance(objective, WeightedSum)
        assert objective(model, BATCH).item() == pytest.approx(expected, abs=1e-12)


def test_arithmetic_of_objectives() -> None:
    """Differences, negation, division and `sum` are those of the losses."""
    model, ce, hinge = Table(LOGITS), CrossEntropy(), InvertedHinge()
    value, other = ce(model, BATCH).item(), hinge(model, BATCH).item()
    for objective, expected in (
        (ce - hinge, value - other),
        (ce - 2 * hinge - ce, -2 * other),
        (-ce, -value),
        (-(ce - hinge), other - value),
        (ce / 4, value / 4),
        ((ce + hinge) / np.float32(2), (value + other) / 2),
        (ce * 2, 2 * value),
        (sum([ce, hinge, ce]), 2 * value + other),
        (sum([ce]), value),
        (0 + ce + 0, value),
    ):
        assert objective(model, BATCH).item() == pytest.approx(expected, abs=1e-12)


class _Counted(nn.Linear):
    """A linear classifier that counts how often it is run."""

    runs = 0

    def forward(self, input: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(input)


def test_a_sum_runs_the_model_once_for_terms_that_read_it_alike() -> None:
    """The loss, the gradient and the outputs are those of the terms one by one."""
    torch.manual_seed(0)
    model, batch = _Counted(3, 4), (torch.randn(6, 3), torch.randint(4, (6,)))
    kept = KLToOriginal(reference=nn.Linear(3, 4))
    terms = [(1.0, kept), (0.5, CrossEntropy()), (-0.25, UniformDistribution())]
    expected = sum(weight * objective(model, batch) for weight, objective in terms)
    gradient = torch.autograd.grad(expected, model.weight)[0]
    total = kept + 0.5 * CrossEntropy() - 0.25 * UniformDistribution()
    model.runs = 0
    loss = total(model, batch)
    assert model.runs == 1
    evaluation = total.evaluate(model, batch, total.prepare(model, batch))
    assert model.runs == 2
    assert torch.allclose(loss, expected) and torch.equal(evaluation.loss, loss)
    assert torch.allclose(torch.autograd.grad(loss, model.weight)[0], gradient, atol=1e-7)
    assert [output.weight for output in evaluation.outputs] == [1.0, 0.5, -0.25]
    assert all(torch.equal(output.values, model(batch[0])) for output in evaluation.outputs)


def test_what_reads_the_model_in_its_own_way_runs_it_itself() -> None:
    """A margin moves the logits, another shift reads other labels, and a subclass may do what it likes."""

    class Doubled(CrossEntropy):
        def __call__(self, model: nn.Module, batch: Any) -> Tensor:
            return 2 * super().__call__(model, batch)

    class Other(CrossEntropy):
        def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
            return super().evaluate(model, (-batch[0], batch[1]), prepared)

    torch.manual_seed(0)
    model, batch = _Counted(3, 4), (torch.randn(6, 3), torch.randint(4, (6,)))
    distillation = DecoupledDistillation(reference=nn.Linear(3, 4), margin=3.0)
    for own in (Doubled(), Other(), distillation, CrossEntropy(shift_labels=False)):
        expected = CrossEntropy()(model, batch) + own(model, batch)
        model.runs = 0
        assert torch.equal((CrossEntropy() + own)(model, batch), expected)
        assert model.runs == 2


def test_plain_functions_are_lifted() -> None:
    """A function adds from either side, and can be made an objective to be scaled."""

    def largest(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).max()

    model, ce = Table(LOGITS), CrossEntropy()
    value, top = ce(model, BATCH).item(), LOGITS.max()
    for objective, expected in (
        (ce + largest, value + top),
        (largest + ce, value + top),
        (ce - largest, value - top),
        (largest - ce, top - value),
        (0.5 * as_objective(largest), top / 2),
        (WeightedSum(((2.0, largest),)), 2 * top),  # type: ignore[arg-type]
    ):
        assert isinstance(objective, WeightedSum)
        assert objective(model, BATCH).item() == pytest.approx(expected, abs=1e-12)
        objective.load_state_dict(objective.state_dict())
    assert as_objective(ce) is ce


@pytest.mark.parametrize("weight", [True, "0.5", None, float("nan"), float("inf"), -float("inf"), 1j, CrossEntropy()])
def test_weights_are_finite_numbers(weight: Any) -> None:
    """Everything else is refused where it is written, and named."""
    for combine in (
        lambda: CrossEntropy() * weight,
        lambda: CrossEntropy() / weight,
        lambda: WeightedSum(((weight, CrossEntropy()),)),
    ):
        with pytest.raises((TypeError, ValueError), match=r"`(weight|divisor)` must be a finite number, got") as raised:
            combine()
        assert repr(weight) in str(raised.value)


def test_what_is_no_objective_does_not_add() -> None:
    """Numbers, classes and text are refused; so are dividing by zero and a sum of nothing."""
    for other in (1.0, None, "text", False):
        with pytest.raises(TypeError):
            CrossEntropy() + other  # type: ignore[operator]
        with pytest.raises(TypeError):
            other - CrossEntropy()  # type: ignore[operator]
    with pytest.raises(TypeError, match=r"the class GradientAscent.*`GradientAscent\(\)`"):
        CrossEntropy() + GradientAscent  # type: ignore[operator]
    with pytest.raises(ValueError, match="`divisor`.*zero"):
        CrossEntropy() / 0
    with pytest.raises(ValueError, match="`terms`"):
        WeightedSum(())


def test_a_sum_has_the_distribution_that_its_terms_share() -> None:
    """Cross entropies are of classes, denoising is Gaussian, and a sum of both, or with a function, is neither."""
    denoising = DenoisingLoss(NoiseSchedule(torch.ones(2), torch.zeros(2), torch.arange(2)))
    assert CrossEntropy().distribution == CrossEntropy.distribution == "categorical"
    assert all(objective.distribution == "categorical" for objective, _ in EXPECTED.values())
    assert RandomLabel().distribution == "categorical" and denoising.distribution == "gaussian"
    assert (CrossEntropy() - 0.5 * RandomLabel()).distribution == "categorical"
    assert (2 * denoising).distribution == "gaussian"
    assert (CrossEntropy() + denoising).distribution is None
    assert (CrossEntropy() + (lambda model, batch: model(batch[0]).sum())).distribution is None


def test_terms_of_a_sum_draw_independently() -> None:
    """Each term keeps its own generator, saved and loaded by itself."""
    total = RandomLabel(seed=1) + RandomLabel(seed=2)
    model, batch = Mlp().eval(), vector_batches(1)[0]
    state = total.state_dict()
    expected = RandomLabel(seed=1)(model, batch) + RandomLabel(seed=2)(model, batch)
    torch.testing.assert_close(total(model, batch), expected)
    total.load_state_dict(state)
    torch.testing.assert_close(total(model, batch), expected)


# ---- forms of batches and outputs ----


@dataclass
class Output:
    logits: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: logits,
        lambda logits: Output(logits),
        lambda logits: {"logits": logits},
        lambda logits: (logits, "more"),
        lambda logits: [logits],
    ],
    ids=["tensor", "object", "mapping", "tuple", "list"],
)
@pytest.mark.parametrize(
    "batch",
    [BATCH, list(BATCH), {"x": BATCH[0], "labels": BATCH[1]}, {"x": BATCH[0], "label": BATCH[1]}],
    ids=["tuple", "list", "labels", "label"],
)
def test_forms_of_batches_and_outputs(batch: Any, wrap: Callable[[Tensor], Any]) -> None:
    """The same number for every form of batch and output; a mapping batch is not changed."""
    table = Table(LOGITS)
    keys = list(batch)
    assert CrossEntropy()(lambda x: wrap(table(x)), batch).item() == pytest.approx(EXPECTED["cross_entropy"][1])
    assert len(list(batch)) == len(keys)


def test_several_inputs() -> None:
    """All of a tuple but its last item goes to the model."""
    x, y = BATCH
    loss = CrossEntropy()(lambda a, b: Table(LOGITS)(a + b), (x - 1, torch.ones(4, dtype=torch.long), y))
    assert loss.item() == pytest.approx(EXPECTED["cross_entropy"][1])


def test_transformers_model() -> None:
    """A transformers model with a dict batch gives its own loss."""
    model = vit()
    x, y = image_batches(1)[0]
    expected = model(pixel_values=x, labels=y).loss
    torch.testing.assert_close(CrossEntropy()(model, {"pixel_values": x, "labels": y}), expected)
    torch.testing.assert_close(CrossEntropy()(model, (x, y)), expected)


@pytest.mark.parametrize(
    ("batch", "error", "words"),
    [
        (torch.zeros(4), TypeError, ["(inputs, labels)", "Tensor", "write `[(inputs, labels)]`"]),
        ((torch.zeros(4),), TypeError, ["(inputs, labels)", "tuple"]),
        ({"x": BATCH[0]}, TypeError, ["'x'", "'labels'"]),
        ("abc", TypeError, ["str"]),
        ((BATCH[0], BATCH[1][:3]), ValueError, ["(4, 3)", "(3,)"]),
        ((BATCH[0], torch.eye(3)[BATCH[1]]), ValueError, ["(4, 3)"]),
        ((BATCH[0], BATCH[1].float()), ValueError, ["float32"]),
        ((BATCH[0], BATCH[1] > 0), ValueError, ["bool"]),
    ],
    ids=["tensor", "no_labels", "no_key", "text", "length", "one_hot", "float", "bool"],
)
def test_bad_batches(batch: Any, error: type[Exception], words: list[str]) -> None:
    """Each names what came and what was expected."""
    with pytest.raises(error) as raised:
        CrossEntropy()(Table(LOGITS), batch)
    assert all(word in str(raised.value) for word in words), raised.value


def test_inputs_that_a_model_does_not_take() -> None:
    """An index beside inputs and labels, and arrays; a model's own errors are its own."""
    x, y = vector_batches(1)[0]
    model = get_peft_model(Mlp(), LoraConfig(target_modules=["fc1"]))
    with pytest.raises(
        TypeError, match=r"must be a tuple `\(inputs, labels\)`, .* got a tuple of 3, and Mlp's `forward`"
    ):
        CrossEntropy()(model, (x, y, torch.arange(len(y))))
    with pytest.raises(TypeError, match=r"Inputs must be tensors, got a NumPy array. Write `torch.as_tensor"):
        CrossEntropy()(model, (x.numpy(), y.numpy()))
    for example in ((x[0], y[0]), {"pixel_values": x[0], "label": 3}):  # of a data set, which no loader has collated
        with pytest.raises(TypeError, match=r"got a single label.* Write `DataLoader\(dataset"):
            CrossEntropy()(model, example)

    class Fails(nn.Module):
        def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
            raise TypeError("no mask")

    with pytest.raises(TypeError, match="^no mask$"):
        CrossEntropy()(Fails(), (x, x, y))


@pytest.mark.parametrize("label", [-100, -1, 3])
@pytest.mark.parametrize("name", [*(name for name in EXPECTED if name != "uniform"), "random_label"])
def test_labels_outside_the_classes(name: str, label: int) -> None:
    """A label that is no class, such as the padding label −100, is refused by every objective that reads labels."""
    objective = RandomLabel() if name == "random_label" else EXPECTED[name][0]
    labels = BATCH[1].clone()
    labels[1] = label
    with pytest.raises((ValueError, IndexError, RuntimeError), match=r"(?i)label|class|index|target"):
        objective(Table(LOGITS), (BATCH[0], labels))


@pytest.mark.parametrize("output", [torch.zeros(4), torch.zeros(4, 2, 3), "text", {"loss": torch.zeros(())}, None])
def test_bad_outputs(output: Any) -> None:
    """A model that returns no logits `(N, classes)` is named as the cause."""
    with pytest.raises((TypeError, ValueError), match="logits"):
        CrossEntropy()(lambda x: output, BATCH)


def test_evaluations_of_a_prepared_batch_draw_the_same_and_give_the_outputs() -> None:
    model, batch = torch.nn.Linear(3, 4), (torch.randn(6, 3), torch.randint(4, (6,)))
    objective = RandomLabel(seed=2) + 0.5 * CrossEntropy()
    expected = (RandomLabel(seed=2) + 0.5 * CrossEntropy())(model, batch)
    prepared = objective.prepare(model, batch)
    first, second = (objective.evaluate(model, batch, prepared) for _ in range(2))
    assert torch.equal(first.loss, expected) and torch.equal(second.loss, expected)
    assert [output.weight for output in first.outputs] == [1.0, 0.5]
    for output in first.outputs:
        assert torch.equal(output.values, model(batch[0])) and torch.equal(output.labels, batch[1])
    assert not torch.equal(objective(model, batch), expected)  # the next call draws anew


def test_an_objective_of_ones_own_tells_its_outputs() -> None:
    class Noisy(RandomObjective):
        distribution = "categorical"

        def __call__(self, model, batch):
            return (model(batch) * torch.rand((), generator=self.generator)).mean()

        def outputs(self, model, batch):
            return model(batch)

    model, batch, objective = torch.nn.Linear(3, 4), torch.randn(6, 3), Noisy(seed=1)
    prepared = objective.prepare(model, batch)
    evaluation = objective.evaluate(model, batch, prepared)
    assert torch.equal(evaluation.loss, Noisy(seed=1)(model, batch)) and torch.equal(
        evaluation.outputs[0].values, model(batch)
    )
    assert torch.equal(objective.evaluate(model, batch, prepared).loss, evaluation.loss)
    assert CrossEntropy().minimum == 0.0 and (2 * CrossEntropy()).minimum == 0.0 and (-CrossEntropy()).minimum is None
