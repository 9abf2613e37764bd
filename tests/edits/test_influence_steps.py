"""Steps in closed form: what the first step of Adam is, and when a Newton step is retraining."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from language_batches import LENGTHS, padded
from models import Mlp, llama, vector_batches
from torch import Tensor, nn

from semu_peft import CoreCovariance, SquaredSum, gather
from semu_peft.edits import influence_step, newton_step
from semu_peft.gradients.parameters import gather_parameters
from semu_peft.gradients.statistics import GradientSum
from semu_peft.linalg.closed_form import kronecker_solve, redirection
from semu_peft.objectives import CrossEntropy


def gradients(model: nn.Module, batches: Any) -> Any:
    return gather_parameters(model, batches, CrossEntropy(), statistic=GradientSum, per="batch", progress=False)


@pytest.mark.parametrize(("update", "optimizer"), [("sign", torch.optim.Adam), ("gradient", torch.optim.SGD)])
def test_it_is_one_step_on_the_difference_of_the_losses(update: Any, optimizer: Any) -> None:
    """CE(R) − CE(F), as the released code; Adam's first step is as large for every weight."""
    model, forget, retain = Mlp().eval(), vector_batches(1, seed=1), vector_batches(1, seed=2)
    edit = influence_step(gradients(model, forget), gradients(model, retain), step_size=1e-3, update=update)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with edit.apply(model):
        ours = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    loss = CrossEntropy()(model, retain[0]) - CrossEntropy()(model, forget[0])
    loss.backward()
    optimizer(model.parameters(), lr=1e-3).step()
    for name, parameter in model.named_parameters():
        assert torch.allclose(ours[name], parameter.detach() - before[name], atol=2e-6), name
        if update == "sign":
            changed = edit.deltas[name].tensors()["values"]
            assert (changed.abs() == torch.tensor(1e-3)).float().mean() > 0.99


def test_a_weight_that_layers_share_is_changed_once() -> None:
    """As the embedding of most small language models is, which is their head as well."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    data = [vector_batches(1, seed=seed) for seed in (1, 2)]
    edit = influence_step(*(gather(model, part, CrossEntropy(), progress=False) for part in data), step_size=1.0)
    other = influence_step(*(gradients(model, part) for part in data), step_size=1.0).only("0.weight")
    with edit.apply(model):
        ours = model[0].weight.detach().clone()
    with other.apply(model):
        assert torch.allclose(ours, model[0].weight.detach(), atol=1e-6)


class Regression(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
        self.layer.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def half_squares(model: nn.Module, batch: Any) -> Tensor:
    """`½‖y − t‖²`, a mean over examples."""
    x, t = batch
    return 0.5 * (model(x) - t).square().sum(1).mean()


def fitted(x: Tensor, t: Tensor) -> Tensor:
    return torch.linalg.lstsq(x, t).solution.mT


def test_a_newton_step_of_a_regression_is_retraining() -> None:
    x, t = torch.randn(50, 6).double(), torch.randn(50, 3).double()
    model = Regression(fitted(x, t))
    forget, retain = [(x[:10], t[:10])], [(x[10:30], t[10:30]), (x[30:], t[30:])]
    downhill = gather(model, forget, half_squares, progress=False)
    factors = gather(model, retain, half_squares, statistic=CoreCovariance.of_weight, progress=False)
    newton_step(downhill, factors, damping=0.0, outputs="identity").apply(model)
    assert (model.layer.weight - fitted(x[10:], t[10:])).abs().max() < 1e-10


def test_an_examples_curvature_is_that_of_all_its_rows() -> None:
    """Of tokens, or windows of a convolution."""
    x, t = torch.randn(50, 4, 6).double(), torch.randn(50, 4, 3).double()

    def half(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        return 0.5 * (model(inputs) - targets).square().sum((1, 2)).mean()

    model = Regression(fitted(x.flatten(0, 1), t.flatten(0, 1)))
    downhill = gather(model, [(x[:10], t[:10])], half, progress=False)
    retain = [(x[10:30], t[10:30]), (x[30:], t[30:])]
    factors = gather(model, retain, half, statistic=CoreCovariance.of_weight, progress=False)
    newton_step(downhill, factors, damping=0.0, outputs="identity").apply(model)
    assert (model.layer.weight - fitted(x[10:].flatten(0, 1), t[10:].flatten(0, 1))).abs().max() < 1e-10


def test_padding_has_no_say_in_the_curvature() -> None:
    """It is not among the moments, nor counted."""
    model, targets, steps = llama().eval(), ["model.layers.0.mlp.down_proj"], []
    for side, more in (("right", 0), ("right", 9), ("left", 9)):
        data = [{name: value for name, value in padded(side, more=more).items() if name != "token_mask"}]
        options: dict[str, Any] = {"targets": targets, "progress": False}
        downhill = gather(model, data, CrossEntropy(), **options)
        factors = gather(model, data, CrossEntropy(), statistic=CoreCovariance.of_weight, **options)
        assert factors[targets[0]].rows == sum(LENGTHS)  # type: ignore[attr-defined]
        weight = model.model.layers[0].mlp.down_proj.weight
        before = weight.detach().clone()
        edit = newton_step(downhill, factors, damping=0.01).apply(model)
        steps.append((weight - before).detach())
        edit.undo()
    for step in steps[1:]:
        torch.testing.assert_close(step, steps[0], rtol=1e-3, atol=1e-3 * float(steps[0].abs().max()))


def test_a_layer_that_no_retained_example_reached_stays() -> None:
    """Nothing is known of its curvature, as with an expert that is routed to for the forget data alone."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept, self.forgotten = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.kept(x) + (self.forgotten(x) if x[0, 0] > 0 else 0)

    x, labels = torch.rand(8, 6), torch.arange(8) % 3
    downhill = gather(Routed(), [(x, labels)], CrossEntropy(), progress=False)
    factors = gather(Routed(), [(-x, labels)], CrossEntropy(), statistic=CoreCovariance.of_weight, progress=False)
    deltas = newton_step(downhill, factors, damping=0.1).deltas
    assert deltas["kept"].tensors()["values"].abs().max() > 0
    assert "forgotten" not in deltas or not deltas["forgotten"].tensors()["values"].any()


def test_an_influence_step_is_retraining_to_first_order() -> None:
    """`H⁻¹ g` with the curvature of all data: halving what is forgotten quarters the error."""
    x, t = torch.randn(2000, 4).double(), torch.randn(2000, 2).double()
    x[10:40], t[10:40] = x[:10].repeat(3, 1), t[:10].repeat(3, 1)  # so that 40, 20 and 10 rows are alike
    errors = []
    for count in (40, 20, 10):
        model = Regression(fitted(x, t))
        downhill = gather(model, [(x[:count], t[:count])], half_squares, progress=False)
        factors = gather(model, [(x, t)], half_squares, statistic=CoreCovariance.of_weight, progress=False)
        newton_step(downhill, factors, damping=0.0, outputs="identity").apply(model)
        errors.append((model.layer.weight - fitted(x[count:], t[count:])).detach().norm().item())
    assert abs(errors[0] / errors[1] - 4) < 0.2 and abs(errors[1] / errors[2] - 4) < 0.1


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_the_kronecker_solve_is_the_dense_one(damping: float) -> None:
    a, b, g = torch.randn(9, 5).double(), torch.randn(8, 4).double(), torch.randn(4, 5).double()
    a, b = a.mT @ a, b.mT @ b
    dense = torch.linalg.solve(torch.kron(b, a) + damping * torch.eye(20), g.reshape(-1)).view(4, 5)
    assert torch.allclose(kronecker_solve(g, a, b, damping), dense, atol=1e-10)
    flat = torch.linalg.pinv(torch.diag(torch.tensor([1.0, 0.0, 2.0]))).double()
    assert torch.allclose(
        kronecker_solve(torch.ones(1, 3), torch.diag(torch.tensor([1.0, 0.0, 2.0]))), flat.sum(0)[None]
    )


def test_a_classifier_forgets_uphill_in_the_retained_curvature() -> None:
    torch.manual_seed(1)
    model = Mlp().eval()
    forget, retain = vector_batches(2, size=16, seed=1), vector_batches(4, size=16, seed=2)
    downhill = gather(model, forget, CrossEntropy(), progress=False)
    factors = gather(model, retain, CrossEntropy(), statistic=CoreCovariance.of_weight, progress=False)

    def losses() -> tuple[float, float]:
        with torch.no_grad():
            return tuple(sum(float(CrossEntropy()(model, b)) for b in part) / len(part) for part in (forget, retain))  # type: ignore[return-value]

    before = losses()
    edit = newton_step(downhill, factors, damping=0.1, step_size=0.1)
    with edit.apply(model):
        after = losses()
    assert after[0] > before[0]
    assert after[1] - before[1] < after[0] - before[0]


def test_one_solve_redirects_for_every_layer() -> None:
    """UCE's formula, written as a change of the input side that all layers share."""
    sources, targets, kept = (torch.randn(7, k).double() for k in (3, 3, 2))
    change = redirection(sources, targets, kept, ridge=0.5)
    for _ in range(2):
        w = torch.randn(4, 7).double()
        left = w @ targets @ sources.mT + w @ kept @ kept.mT + 0.5 * w
        moments = sources @ sources.mT + kept @ kept.mT + 0.5 * torch.eye(7)
        expected = left @ torch.linalg.inv(moments)
        assert torch.allclose(w + w @ change.left @ change.core @ change.right.mT, expected, atol=1e-10)


def test_statistics_of_other_kinds_are_refused() -> None:
    model, batches = Mlp(), vector_batches()
    sums = gather(model, batches, CrossEntropy(), progress=False)
    factors = gather(model, batches, CrossEntropy(), statistic=CoreCovariance.of_weight, progress=False)
    squares = gather(model, batches, CrossEntropy(), statistic=SquaredSum, progress=False)
    some = gather(model, batches, CrossEntropy(), targets=["fc1"], progress=False)
    others = gather(model, batches, CrossEntropy(), targets=["fc2"], statistic=CoreCovariance.of_weight, progress=False)
    cases: list[tuple[Any, str]] = [
        (lambda: newton_step(sums, sums), "`retain` must be gathered factors"),
        (lambda: newton_step(squares, factors), "`forget` must be sums"),
        (lambda: newton_step(some, others), "`retain` must have the factors of some"),
        (lambda: newton_step(sums, factors, damping=-1), "`damping`"),
        (lambda: newton_step(sums, factors, outputs="x"), "`outputs`"),  # type: ignore[arg-type]
        (lambda: influence_step(sums, some, step_size=1.0), "of the same parameters"),
        (lambda: influence_step(sums, sums, step_size=float("nan")), "`step_size`"),
        (lambda: influence_step(sums, sums, step_size=1.0, update="x"), "`update`"),  # type: ignore[arg-type]
        (lambda: influence_step([], sums, step_size=1.0), "`forget`"),  # type: ignore[arg-type]
    ]
    for call, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            call()
