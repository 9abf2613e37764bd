"""Gradients that pass through float16 are those of float32, however small or large the loss makes them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from semu_peft import gather
from semu_peft.gradients import GradientSum, SquaredSum
from semu_peft.gradients.sketch import Sketch

TINY = 2.0**-30  # float16 ends at 2**-24


class Net(nn.Module):
    """Every kind of source: an embedding, convolutions with groups and without, and a linear layer called twice."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.embed = nn.Embedding(5, 8)
        self.conv, self.grouped = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 1, groups=2)
        self.twice, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def block(self, x: Tensor) -> Tensor:
        return self.twice(torch.tanh(self.twice(x)))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.grouped(self.conv(self.embed(tokens).mT)).mT
        if self.reentrant is None:
            return self.out(self.block(hidden))
        return self.out(checkpoint(self.block, hidden, use_reentrant=self.reentrant))


def batch(seed: int, factor: float = TINY) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    return {"tokens": torch.randint(5, (6, 4), generator=draw), "factor": torch.tensor(factor)}


def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return model(batch["tokens"]).float().square().mean() * batch["factor"]


def sums(model: nn.Module, batches: list[Any], **settings: Any) -> dict[str, Tensor]:
    found = gather(model, batches, loss, progress=False, **settings)
    return {name: statistic.tensors()[0].double() for name, statistic in found.items()}


def assert_alike(half: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    for name, expected in exact.items():
        assert half[name].norm() > 0, name
        assert (half[name] - expected).norm() < 0.03 * expected.norm(), name


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("statistic", [GradientSum, SquaredSum.per_batch, Sketch.of_size(2)])
def test_small_gradients_are_those_of_float32(statistic: Any, reentrant: bool | None) -> None:
    model, batches = Net(reentrant), [batch(0), batch(1)]
    exact = sums(model, batches, statistic=statistic)
    assert_alike(sums(copy.deepcopy(model).half(), batches, statistic=statistic), exact)


def test_autocast_is_seen_in_the_graph() -> None:
    model = Net()
    exact = sums(model, [batch(0)])
    with torch.autocast("cpu", torch.float16):
        assert_alike(sums(model, [batch(0)]), exact)


@pytest.mark.parametrize("factors", [(TINY, 2.0**20), (2.0**20, TINY), (TINY, 2.0**40, TINY)])
def test_what_overflows_is_repeated_and_counted_once(factors: tuple[float, ...]) -> None:
    """Layers that had their gradient before the overflow do not get it twice."""
    model = Net()
    for index, factor in enumerate(factors):  # each batch alone shows in a sum of its own
        exact = sums(model, [batch(index, factor)])
        assert_alike(sums(copy.deepcopy(model).half(), [batch(index, factor)]), exact)
    batches = [batch(index, factor) for index, factor in enumerate(factors)]
    assert_alike(sums(copy.deepcopy(model).half(), batches), sums(model, batches))


def test_an_overflow_in_the_middle_of_the_backward_pass() -> None:
    """The layers behind it are taken before it is seen, those before it in the repeated pass."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight.mul_(2.0**9)
        model[2].weight.mul_(2.0**-9)
    inputs = [torch.randn(8, 4), torch.randn(8, 4)]

    def scaled(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).float().square().mean() * (1 if x is inputs[0] else 2.0**9)

    def grads(model: nn.Module) -> dict[str, Tensor]:
        found = gather(model, inputs, scaled, progress=False)
        return {name: statistic.tensors()[0] for name, statistic in found.items()}

    exact = grads(model)
    inputs = [x.half() for x in inputs]
    assert_alike(grads(copy.deepcopy(model).half()), exact)


def test_the_scale_is_undone_exactly_and_other_dtypes_are_left_alone() -> None:
    """Powers of two: gradients that float16 holds come out bit for bit; without float16 there is one plain pass."""
    layer = nn.Linear(1, 1, bias=False).half()
    found = gather(layer, [torch.full((1, 1), 0.5).half()], lambda model, x: model(x).sum(), progress=False)
    assert found[""].tensors()[0].item() == 0.5
    model, passes = Net(), []
    model.out.register_full_backward_hook(lambda *_: passes.append(1))
    found = sums(model, [batch(0, 1.0)])
    assert len(passes) == 1
    model.requires_grad_(True)
    loss(model, batch(0, 1.0)).backward()
    torch.testing.assert_close(found["out"].float(), model.out.weight.grad)


def test_no_scale_makes_up_for_a_gradient_that_is_not_finite() -> None:
    model = Net().half()

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient * torch.nan

    with pytest.raises(ValueError, match="gradient of layer .* is not finite"):
        gather(model, [batch(0)], lambda model, x: Broken.apply(loss(model, x)), progress=False)
    nothing = gather(model, [batch(0)], lambda model, x: 0 * model(x["tokens"]).float().sum(), progress=False)
    assert not any(statistic.tensors()[0].any() for statistic in nothing.values())
