"""Streaming gradients: equal to ordinary autograd, one at a time, and the model comes back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import Cnn, Mlp, Snapshot, image_batches, vector_batches
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft.gradients.gather import accumulate_gradients

Batch = tuple[Tensor, Tensor]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def weights_of(model: nn.Module, *names: str) -> dict[str, nn.Parameter]:
    return {name: model.get_submodule(name).weight for name in names}


def plain_sums(model: nn.Module, weights: dict[str, nn.Parameter], batches: list[Batch]) -> dict[str, Tensor]:
    """The reference: `torch.autograd.grad` in eval mode, batch by batch, added up."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    for batch in batches:
        gradients = torch.autograd.grad(loss(model, batch), list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            sums[name] += gradient
    for module, training in modes:
        module.training = training
    return sums


def disturbed(model: nn.Module) -> nn.Module:
    """A model in a state that is easily lost: mixed modes, mixed flags, gradients, a hook."""
    model.train()
    list(model.children())[1].eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
        if index % 2:
            parameter.grad = torch.full_like(parameter, float(index))
    hooked = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    hooked.register_post_accumulate_grad_hook(lambda parameter: None)
    return model


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_sums_are_those_of_autograd(kind: str) -> None:
    """The sums over a pass are the ordinary gradients in eval mode, float32, and the batches are counted."""
    model = Mlp() if kind == "mlp" else Cnn()
    batches = vector_batches() if kind == "mlp" else image_batches()
    weights = weights_of(model, *(("fc1", "head") if kind == "mlp" else ("conv1", "conv2", "head")))
    expected = plain_sums(model, weights, batches)
    model.train()
    sums, count = accumulate_gradients(model, weights, iter(batches), loss, progress=False)
    assert count == 3 and sums.keys() == expected.keys()
    for name, gradient in sums.items():
        assert gradient.dtype == torch.float32 and gradient.shape == weights[name].shape
        torch.testing.assert_close(gradient, expected[name], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """A bfloat16 model's gradients are summed in float32, a float64 model's in float64."""
    model = Mlp().to(dtype)
    batches = [(x.to(dtype), y) for x, y in vector_batches(20)]
    weights = weights_of(model, "fc1")
    sums, _ = accumulate_gradients(model, weights, batches, loss, progress=False)
    assert sums["fc1"].dtype == torch.promote_types(dtype, torch.float32)
    expected = torch.zeros_like(sums["fc1"])
    for batch in batches:
        expected += torch.autograd.grad(loss(model.eval(), batch), [model.fc1.weight])[0]
    torch.testing.assert_close(sums["fc1"], expected, atol=0, rtol=1e-6)


class Twice(nn.Module):
    """One layer called twice, and one parameter held by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.left, self.right = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.left(x) + 2 * self.right(x)


def test_weights_used_twice() -> None:
    """A layer called twice and a parameter shared by two layers get the gradient of all their uses, under each name."""
    model = Twice()
    batches = vector_batches()
    expected = plain_sums(model, weights_of(model, "twice", "left"), batches)
    sums, _ = accumulate_gradients(model, weights_of(model, "twice", "left", "right"), batches, loss, progress=False)
    torch.testing.assert_close(sums["twice"], expected["twice"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sums["left"], expected["left"], atol=1e-6, rtol=1e-5)
    assert torch.equal(sums["left"], sums["right"])


def test_the_model_comes_back_as_it_was() -> None:
    """Flags, gradient objects, modes per module, hooks, weights and BatchNorm statistics."""
    model = disturbed(Cnn())
    before = Snapshot.of(model)
    accumulate_gradients(model, weights_of(model, "conv1", "conv2", "head"), image_batches(), loss, progress=False)
    before.assert_same(model)


@pytest.mark.parametrize("fails", ["loss", "batches", "nan", "no_gradient", "not_scalar", "unused"])
def test_the_model_comes_back_after_a_failure(fails: str) -> None:
    """Also when the objective or the loader raises, or a check does, in the middle of the pass."""
    model = disturbed(Cnn())
    before = Snapshot.of(model)
    seen = []

    def objective(model: nn.Module, batch: Batch) -> Any:
        seen.append(batch)
        result = loss(model, batch)
        if len(seen) < 2:
            return result
        if fails == "loss":
            raise KeyError("in the objective")
        return {"nan": result * float("nan"), "no_gradient": result.detach(), "not_scalar": result.reshape(1, 1).expand(2, 1)}.get(fails, result)  # fmt: skip  # noqa: E501

    def batches() -> Iterator[Batch]:
        yield from image_batches(2)
        if fails == "batches":
            raise OSError("in the loader")

    weights = weights_of(model, "conv1", "head")
    if fails == "unused":
        weights["unused"] = nn.Parameter(torch.ones(2, 2))
    with pytest.raises((KeyError, OSError, ValueError)):
        accumulate_gradients(model, weights, batches(), objective, progress=False)
    before.assert_same(model)


def test_one_gradient_at_a_time() -> None:
    """When a weight's gradient has been made, no other target weight still holds one, and after the pass none does."""
    model = Cnn()
    weights = weights_of(model, "conv1", "conv2", "head")
    held: list[list[str]] = []

    def watch(_: nn.Parameter) -> None:
        held.append([name for name, weight in weights.items() if weight.grad is not None])

    watchers = [weight.register_post_accumulate_grad_hook(watch) for weight in weights.values()]
    others = [p for p in model.parameters() if all(p is not weight for weight in weights.values())]

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        assert not any(parameter.requires_grad for parameter in others)
        assert all(weight.grad is None for weight in weights.values())
        return loss(model, batch)

    accumulate_gradients(model, weights, image_batches(), objective, progress=False)
    for watcher in watchers:
        watcher.remove()
    assert len(held) == 9
    assert all(len(names) == 1 for names in held)


def test_only_targets_are_differentiated() -> None:
    """Frozen targets are differentiated, and parameters that are no target are not, whatever their flags."""
    model = Mlp()
    expected = torch.autograd.grad(loss(model.eval(), vector_batches(1)[0]), [model.fc1.weight])[0]
    model.fc1.requires_grad_(False)
    sums, _ = accumulate_gradients(model, weights_of(model, "fc1"), vector_batches(1), loss, progress=False)
    torch.testing.assert_close(sums["fc1"], expected)
    assert not model.fc1.weight.requires_grad and model.head.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_works_under_no_grad() -> None:
    """The caller's `torch.no_grad` does not reach the pass."""
    model = Mlp()
    with torch.no_grad():
        sums, _ = accumulate_gradients(model, weights_of(model, "fc1"), vector_batches(), loss, progress=False)
    assert sums["fc1"].any()


def test_sums_are_not_the_models_memory() -> None:
    """The sums can be changed without a change to the model."""
    model = Mlp()
    sums, _ = accumulate_gradients(model, weights_of(model, "fc1"), vector_batches(1), loss, progress=False)
    assert not sums["fc1"].requires_grad and sums["fc1"].data_ptr() != model.fc1.weight.data_ptr()


@pytest.mark.parametrize(
    ("batches", "objective", "words"),
    [
        ([], loss, ["`batches` is empty", "used up"]),
        (iter(()), loss, ["`batches` is empty", "used up"]),
        (vector_batches(), lambda m, b: loss(m, b) * float("nan"), ["nan", "batch 0"]),
        (vector_batches(), lambda m, b: loss(m, b) / 0, ["inf", "batch 0"]),
        (vector_batches(), lambda m, b: loss(m, b).detach(), ["without a gradient", "detach"]),
        (vector_batches(), lambda m, b: m(b[0]), ["scalar", "(4, 4)"]),
        (vector_batches(), lambda m, b: 1.0, ["scalar tensor", "float"]),
        (vector_batches(), lambda m, b: m.fc1(b[0]).mean(), ["'head'", "exclude_modules"]),
        (vector_batches(), lambda m, b: Explode.apply(m.fc1.weight.sum() + m.head.weight.sum()), ["'fc1'", "finite"]),
    ],
    ids=["empty", "exhausted", "nan", "infinite", "detached", "matrix", "number", "unused", "explodes"],
)
def test_errors(batches: Any, objective: Any, words: list[str]) -> None:
    """Each names what is wrong and what to do."""
    model = Mlp()
    before = Snapshot.of(model)
    with pytest.raises(ValueError) as error:
        accumulate_gradients(model, weights_of(model, "fc1", "head"), batches, objective, progress=False)
    assert all(word in str(error.value) for word in words), error.value
    before.assert_same(model)


def test_integer_weights() -> None:
    """A quantised weight is refused by layer name and dtype."""
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="'quantised'.*int8"):
        accumulate_gradients(Mlp(), {"quantised": weight}, vector_batches(), loss, progress=False)


class Explode(torch.autograd.Function):
    """A finite loss with a gradient that is not."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return torch.zeros_like(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("inf")
