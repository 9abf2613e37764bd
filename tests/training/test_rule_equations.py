"""Each rule does what its equation says, against dense references and the papers' own numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import CLASSES, Cnn, Mlp, image_batches, vector_batches
from torch import Tensor, nn
from training_runs import QUIET, constant, semu, sgd, train, trained_state

from semu_peft import NormCap, RemoveLeading, Rule, gather, unlearn
from semu_peft.gradients import CoreCovariance, LayerCovariance, SquaredSum
from semu_peft.objectives import CrossEntropy, GradientAscent, UniformDistribution
from semu_peft.training.rules import (
    Precondition,
    PrivateGradient,
    Ramp,
    RemoveDirections,
    RowScale,
    SharpnessAware,
    SoftThreshold,
    Step,
)
from semu_peft.training.rules.leading import without_leading
from semu_peft.tuner.adapted import semu_layers

ONCE: dict[str, Any] = {"optimizer": sgd, "scheduler": constant, "epochs": 1, **QUIET}


def moved(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value - before[name] for name, value in trained_state(model).items()}


# ---- leading directions ----


@pytest.mark.parametrize("mode", ["soft", "hard", "quadratic"])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (3, 6, 4)])
def test_the_leading_singular_values_are_what_the_mode_says(mode: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    expected = values.clone()
    least = values[..., 2:3]
    expected[..., :3] = {"soft": least.expand_as(values[..., :3]), "hard": torch.zeros_like(values[..., :3])}.get(
        mode, least**2 / values[..., :3]
    )
    torch.testing.assert_close(
        without_leading(matrix, 3, mode), left * expected.unsqueeze(-2) @ right, atol=1e-12, rtol=0
    )


def test_without_a_rank_the_step_is_the_plain_one_and_else_its_matrices_are_changed() -> None:
    """Biases and norms stay as the optimiser made them; filters are one matrix; small changes vanish in nothing."""
    torch.manual_seed(0)
    states = {}
    for name, rules in {"plain": [], "none": [RemoveLeading(0)], "hard": [RemoveLeading(2, "hard")]}.items():
        torch.manual_seed(0)
        model = Cnn()
        before = trained_state(model)
        train(model, image_batches(1), CrossEntropy(), rules=rules, **ONCE)
        states[name] = moved(model, before)
    for name, plain in states["plain"].items():
        assert torch.equal(states["none"][name], plain)
        if plain.dim() < 2:
            assert torch.equal(states["hard"][name], plain)
            continue
        left, values, right = torch.linalg.svd(plain.flatten(1), full_matrices=False)
        expected = (left[:, 2:] * values[2:] @ right[2:]).view_as(plain)
        torch.testing.assert_close(states["hard"][name], expected, atol=1e-6, rtol=0)


def test_a_core_loses_the_leading_directions_of_the_weight() -> None:
    """`U ΔR Vᵀ` has the singular values of `ΔR`, so that both lose the same."""
    plain, soft = semu(explained_variance=0.999), semu(explained_variance=0.999)
    for model, rules in ((plain, []), (soft, [RemoveLeading(2)])):
        train(model, vector_batches(1), CrossEntropy(), rules=rules, **ONCE)
    for name, layer in semu_layers(plain).items():
        dense = layer.get_delta_weight("default").detach()
        expected = without_leading(dense, 2)
        torch.testing.assert_close(semu_layers(soft)[name].get_delta_weight("default"), expected, atol=1e-6, rtol=0)


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def double(batches: list[Any]) -> list[Any]:
    return [(inputs.double(), labels) for inputs, labels in batches]


def shared_of(model: nn.Module, counts: tuple[int, int] = (2, 1)) -> tuple[Any, RemoveDirections]:
    covariances = gather(
        model,
        double(vector_batches(3)),
        CrossEntropy(),
        targets=linears(model),
        statistic=LayerCovariance,
        progress=False,
    )
    return covariances, RemoveDirections.shared(covariances, inputs=counts[0], outputs=counts[1])


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_directions_of_inputs_and_output_gradients_are_gone(optimizer: Any) -> None:
    """`ΔW Q = 0` and `Pᵀ ΔW = 0` to 1e-12 after several steps, also by AdamW, and the change is not nothing."""
    torch.manual_seed(0)
    model = Mlp().double()
    before = trained_state(model)
    _, rule = shared_of(model)
    make = lambda parameters: optimizer(parameters, lr=0.1)  # noqa: E731
    train(model, double(vector_batches(2)), CrossEntropy(), rules=rule, optimizer=make, max_steps=5, **QUIET)
    for name in linears(model):
        change = moved(model, before)[f"{name}.weight"]
        assert change.norm() > 1e-3
        assert (change @ rule.inputs[name]).abs().max() <= 1e-12
        assert (rule.outputs[name].T @ change).abs().max() <= 1e-12


def test_a_core_is_kept_free_of_directions_within_its_bases() -> None:
    model = semu(explained_variance=0.999)
    layers = semu_layers(model)
    covariances = gather(
        model, vector_batches(3), CrossEntropy(), statistic=LayerCovariance, adapter_name="default", progress=False
    )
    rule = RemoveDirections.shared(covariances, inputs=1, outputs=0)
    train(model, vector_batches(2), UniformDistribution(), rules=rule, **QUIET)
    for name, layer in layers.items():
        change = layer.get_delta_weight("default").detach()
        assert (change @ rule.inputs[name].float()).abs().max() <= 1e-5 * max(float(change.norm()), 1e-3)


def test_layer_covariance_is_the_dense_one() -> None:
    """Against per-example gradients: `A`, `B`, both means, and a basis of mean and components."""
    torch.manual_seed(0)
    model = Mlp().double().eval()
    covariances, _ = shared_of(model)
    inputs = torch.cat([x for x, _ in double(vector_batches(3))])
    found = covariances["fc1"]
    torch.testing.assert_close(found.inputs, inputs.T @ inputs / len(inputs))
    torch.testing.assert_close(found.input_mean, inputs.mean(0))
    squares = gather(model, double(vector_batches(3)), CrossEntropy(), statistic=SquaredSum, progress=False)["head"]
    first = torch.tanh(model.fc2(torch.tanh(model.fc1(inputs))))
    probabilities = model.head(first).softmax(-1)
    labels = torch.cat([y for _, y in vector_batches(3)])
    residual = probabilities - nn.functional.one_hot(labels, CLASSES)
    torch.testing.assert_close(covariances["head"].outputs, residual.T @ residual / len(labels))
    torch.testing.assert_close(covariances["head"].output_mean, residual.mean(0))
    assert squares.mean.shape == (CLASSES, 8)
    right, _ = found.directions(2, 0)
    vectors = torch.linalg.eigh(torch.cov(inputs.T, correction=0))[1].flip(1)[:, :2]
    span = torch.linalg.qr(torch.cat([inputs.mean(0)[:, None], vectors], 1))[0]
    torch.testing.assert_close(right @ right.T, span @ span.T)


# ---- curvature ----


def regression() -> tuple[nn.Module, Any, Any, Tensor]:
    """A linear regression at the optimum of all rows, its two parts, and the optimum of the retained rows alone."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(40, 5, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    layer = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    layer.weight.data = torch.linalg.lstsq(inputs, targets).solution.T
    kept = torch.linalg.lstsq(inputs[10:], targets[10:]).solution.T
    return nn.Sequential(layer), (inputs[:10], targets[:10]), (inputs[10:], targets[10:]), kept


def squares(model: nn.Module, batch: Any) -> Tensor:
    return 0.5 * (model(batch[0]) - batch[1]).square().sum()


def test_one_newton_step_is_retraining_without_the_forget_rows() -> None:
    """Up the forget loss, divided by the retain inputs' `XᵀX`, at rate 1: to 1e-10."""
    model, forget, retain, expected = regression()
    rule = Precondition({"0": retain[0].T @ retain[0]}, damping=0.0)
    train(model, [forget], lambda model, batch: -squares(model, batch), rules=rule, **ONCE)
    torch.testing.assert_close(model[0].weight.data, expected, atol=1e-10, rtol=0)


def test_both_factors_are_the_full_kronecker_solve() -> None:
    torch.manual_seed(0)
    first, second, gradient = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 9), (3, 9), (3, 5)))
    inputs, outputs = first @ first.T, second @ second.T
    layer = nn.Linear(5, 3, bias=False, dtype=torch.float64)
    layer.weight.grad = gradient.clone()
    with torch.no_grad():
        Precondition({"0": inputs}, {"0": outputs}, damping=0.0).gradients(
            Step(0, nn.Sequential(layer), {"0.weight": layer.weight})
        )
    full = torch.linalg.solve(torch.kron(outputs, inputs), gradient.flatten()).view(3, 5)
    torch.testing.assert_close(layer.weight.grad, full, atol=1e-10, rtol=0)


def test_a_core_is_divided_by_the_factors_within_its_bases() -> None:
    """The layer's own factors, seen from within the bases, are those that `CoreCovariance` gathers."""
    steps = []
    for kind in ("layer", "core"):
        model = semu(explained_variance=0.9)
        statistic = LayerCovariance if kind == "layer" else CoreCovariance.of_adapter(model)
        covariances = gather(
            model,
            vector_batches(3, seed=4),
            CrossEntropy(),
            statistic=statistic,
            adapter_name="default",
            progress=False,
        )
        before = trained_state(model)
        train(model, vector_batches(1), CrossEntropy(), rules=Precondition.by(covariances, damping=0.0), **ONCE)
        steps.append(moved(model, before))
    for name, change in steps[0].items():
        torch.testing.assert_close(change, steps[1][name], rtol=1e-3, atol=1e-5 * float(change.norm()))


# ---- zeros, norms, rows ----


def test_the_threshold_is_the_proximal_operator() -> None:
    """ξ = 1: (.5, 1.5, 2.5, −1.5) goes to (0, .5, 1.5, −.5), where the released codes give (0, 0, 1.5, 0)."""
    weight = nn.Parameter(torch.tensor([0.5, 1.5, 2.5, -1.5]))
    with torch.no_grad():
        SoftThreshold(1.0).update(Step(0, nn.Identity(), {"w": weight}))
    assert weight.tolist() == [0.0, 0.5, 1.5, -0.5]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_with_the_learning_rate_it_is_a_penalty(gamma: float) -> None:
    """`½ (w − 3)² + γ |w|` has its minimum at `3 − γ`, and without γ the run is the plain one."""
    layer = nn.Linear(1, 1, bias=False)
    rate = lambda parameters: torch.optim.SGD(parameters, lr=0.2)  # noqa: E731
    rule = SoftThreshold(gamma, times_learning_rate=True)
    train(layer, [torch.ones(1, 1)], lambda model, x: 0.5 * (model(x) - 3).square().sum(), rules=rule,
          optimizer=rate, scheduler=constant, epochs=100, **QUIET)  # fmt: skip
    assert layer.weight.item() == pytest.approx(3 - gamma, abs=1e-4)


def test_a_ramp_rises_or_falls_between_two_steps() -> None:
    falling = Ramp(0.5, 0.0, begin=0, end=4)
    assert [falling(step) for step in (0, 2, 4, 9)] == [0.5, 0.25, 0.0, 0.0]
    seen = []
    for number in range(3):
        weight = nn.Parameter(torch.ones(1))
        with torch.no_grad():
            SoftThreshold(Ramp(0.0, 1.0, begin=0, end=2)).update(Step(number, nn.Identity(), {"w": weight}))
        seen.append(weight.item())
    assert seen == [1.0, 0.5, 0.0]


def test_ranks_fall_with_the_threshold() -> None:
    counts = []
    for threshold in (0.0, 1e-3, 1e-2, 1.0):
        model = semu(core="diagonal", explained_variance=0.999)
        train(model, vector_batches(2), UniformDistribution(), rules=SoftThreshold(threshold), **QUIET)
        counts.append(sum(int((value != 0).sum()) for value in trained_state(model).values()))
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1] == 0


@pytest.mark.filterwarnings("ignore:The loss ended")
@pytest.mark.parametrize("natural", [False, True])
def test_the_correction_stays_within_its_norm(natural: bool) -> None:
    """`‖ΔW‖_F = ‖R‖_F ≤ c` after every step, and it comes to lie on the ball."""
    norms: list[float] = []

    class Notes(Rule):
        def update(self, step: Step) -> None:
            norms.extend(layer.get_delta_weight("default").norm().item() for layer in semu_layers(step.model).values())

    model = semu(explained_variance=0.999)
    options = {} if natural else {"learning_rate": 0.1}
    rules = [NormCap(0.2), Notes()]
    unlearn(model, vector_batches(2), GradientAscent(), rules=rules, max_steps=12, **options, **QUIET)
    assert max(norms) == pytest.approx(0.2, abs=1e-5)


def test_the_norm_of_a_plain_weight_is_that_of_its_change() -> None:
    torch.manual_seed(0)
    model = Mlp()
    before = trained_state(model)
    train(model, vector_batches(2), GradientAscent(), rules=NormCap(0.05), optimizer=sgd, **QUIET)
    assert max(change.norm().item() for change in moved(model, before).values()) == pytest.approx(0.05, abs=1e-5)


def test_small_rows_learn_faster_and_slow_down() -> None:
    """η = 2: the rows (0, 0) and (3, 4) get 2.0 and .43644, and the first less after a step."""
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data, layer.weight.grad = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.ones(2, 2)
    step = Step(0, layer, {"weight": layer.weight})
    with torch.no_grad():
        RowScale(2.0).gradients(step)
        assert layer.weight.grad[:, 0].tolist() == pytest.approx([2.0, 0.43644], abs=1e-5)
        layer.weight -= 0.1 * layer.weight.grad
        layer.weight.grad = torch.ones(2, 2)
        RowScale(2.0).gradients(step)
    assert layer.weight.grad[0, 0].item() == pytest.approx(1 / math.sqrt(0.2 * math.sqrt(2) + 0.25), abs=1e-5)


# ---- sharpness, privacy ----


def test_the_gradient_is_that_of_the_worst_point_nearby() -> None:
    """Of `½ w²` at 1 with ρ = .1 it is 1.1; the weights are moved by nothing but the optimiser."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    loss = lambda model, x: 0.5 * model(x).square().sum()  # noqa: E731
    train(layer, [torch.ones(1, 1)], loss, rules=SharpnessAware(0.1), **ONCE)
    assert layer.weight.item() == pytest.approx(1.0 - 1.1)


def test_sharpness_sees_accumulated_batches_and_serves_natural_gradients() -> None:
    model = semu()
    train(model, vector_batches(2), UniformDistribution(), rules=SharpnessAware(0.1), gradient_accumulation_steps=2,
          **ONCE)  # fmt: skip
    start, batches = semu().eval(), vector_batches(2)
    cores = [p for p in start.parameters() if p.requires_grad and p.numel()]

    def gradient() -> list[Tensor]:
        loss = sum(UniformDistribution()(start, batch) for batch in batches) / 2
        return list(torch.autograd.grad(loss, cores))

    here = gradient()
    norm = torch.stack([each.norm() for each in here]).norm()
    with torch.no_grad():
        for core, each in zip(cores, here, strict=True):
            core.add_(each, alpha=0.1 / norm.item())
    for value, each in zip(trained_state(model).values(), gradient(), strict=True):
        torch.testing.assert_close(value, -each, atol=1e-6, rtol=1e-4)
    result = unlearn(semu(), batches, UniformDistribution(), rules=SharpnessAware(), max_steps=6, **QUIET)
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_every_example_is_clipped_and_noise_is_of_its_size() -> None:
    """Against a loop over examples; the noise has standard deviation `σ C / N`, and is drawn by the rule's own seed."""
    torch.manual_seed(0)
    model, batch = Mlp().eval(), vector_batches(1)[0]
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for index in range(len(batch[0])):
        model.zero_grad()
        CrossEntropy()(model, (batch[0][index : index + 1], batch[1][index : index + 1])).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norm = torch.stack([each.norm() for each in gradients.values()]).norm()
        for name, each in gradients.items():
            expected[name] -= each * min(1.0, 0.7 / norm.item()) / len(batch[0])
    before = trained_state(model)
    train(model, [batch], CrossEntropy(), rules=PrivateGradient(0.7, 0.0), **ONCE)
    for name, change in moved(model, before).items():
        torch.testing.assert_close(change, expected[name], atol=1e-6, rtol=1e-4)
    wide = nn.Linear(200, 200, bias=False)
    wide.weight.data.zero_()
    train(wide, [torch.zeros(4, 200)], lambda model, x: model(x).sum(), rules=PrivateGradient(0.5, 2.0), **ONCE)
    assert wide.weight.std().item() == pytest.approx(2.0 * 0.5 / 4, rel=0.02)


def test_privacy_is_told_by_the_accountant() -> None:
    """The figure of opacus' own accountant, for so many steps."""
    accountants = pytest.importorskip("opacus.accountants")
    private = PrivateGradient(1.0, 1.1)
    with pytest.raises(ValueError, match="after a run with noise"):
        private.epsilon(1e-5, sample_rate=0.01)
    train(semu(), vector_batches(2), CrossEntropy(), rules=private, epochs=3, **QUIET)
    accountant = accountants.RDPAccountant()
    for _ in range(6):
        accountant.step(noise_multiplier=1.1, sample_rate=0.01)
    assert private.epsilon(1e-5, sample_rate=0.01) == pytest.approx(accountant.get_epsilon(1e-5))
