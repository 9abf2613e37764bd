"""Streaming gradients: equal to ordinary autograd, one at a time, and the model comes back as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import CLASSES, Cnn, Mlp, Snapshot, gpt2, image_batches, vector_batches
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft import SemuConfig, objectives
from semu_peft.gradients import GradientSum, SquaredSum, WeightSource
from semu_peft.gradients.gather import gather, stream_gradients

Batch = tuple[Tensor, Tensor]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def weights_of(model: nn.Module, *names: str) -> dict[str, nn.Parameter]:
    return {name: model.get_submodule(name).weight for name in names}


def parameter_sums(
    model: nn.Module, weights: dict[str, nn.Parameter], batches: Any, objective: Any = None
) -> tuple[dict[str, Tensor], int]:
    """The sums over a pass of gradients that are caught at the parameters."""
    sources = {name: WeightSource(weight) for name, weight in weights.items()}
    sums = {name: GradientSum(source.shape, source.dtype, source.device) for name, source in sources.items()}
    counts = stream_gradients(model, sources, sums, batches, objective or loss, progress=False)
    return {name: total.total for name, total in sums.items()}, counts.batches


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
    sums, count = parameter_sums(model, weights, iter(batches))
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
    sums, _ = parameter_sums(model, weights, batches)
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
    gathered = gather(model, batches, loss, progress=False)
    assert list(gathered) == ["twice", "left", "right"]
    torch.testing.assert_close(gathered["twice"].total, expected["twice"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gathered["left"].total, expected["left"], atol=1e-6, rtol=1e-5)
    assert gathered["left"] is gathered["right"]


def test_the_model_comes_back_as_it_was() -> None:
    """Flags, gradient objects, modes per module, hooks, weights and BatchNorm statistics."""
    model = disturbed(Cnn())
    before = Snapshot.of(model)
    parameter_sums(model, weights_of(model, "conv1", "conv2", "head"), image_batches())
    before.assert_same(model)


@pytest.mark.parametrize("fails", ["loss", "batches", "nan", "no_gradient", "not_scalar"])
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

    with pytest.raises((KeyError, OSError, ValueError)):
        parameter_sums(model, weights_of(model, "conv1", "head"), batches(), objective)
    before.assert_same(model)


def test_a_target_that_the_loss_does_not_depend_on() -> None:
    """Its statistic is empty, with a warning that names it, and the others' are what they are without it."""
    model = Cnn()
    weights = weights_of(model, "conv1", "head")
    expected, _ = parameter_sums(model, weights, image_batches(), loss)
    with pytest.warns(UserWarning, match="no gradient for 1 of 3 target layers.*unused"):
        found, _ = parameter_sums(model, {**weights, "unused": nn.Parameter(torch.ones(2, 2))}, image_batches(), loss)
    assert not found["unused"].any()
    assert all(torch.equal(found[name], expected[name]) for name in weights)


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

    parameter_sums(model, weights, image_batches(), objective)
    for watcher in watchers:
        watcher.remove()
    assert len(held) == 9
    assert all(len(names) == 1 for names in held)


def test_only_targets_are_differentiated() -> None:
    """Frozen targets are differentiated, and parameters that are no target are not, whatever their flags."""
    model = Mlp()
    expected = torch.autograd.grad(loss(model.eval(), vector_batches(1)[0]), [model.fc1.weight])[0]
    model.fc1.requires_grad_(False)
    sums, _ = parameter_sums(model, weights_of(model, "fc1"), vector_batches(1))
    torch.testing.assert_close(sums["fc1"], expected)
    assert not model.fc1.weight.requires_grad and model.head.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_works_under_no_grad() -> None:
    """The caller's `torch.no_grad` does not reach the pass."""
    model = Mlp()
    with torch.no_grad():
        sums, _ = parameter_sums(model, weights_of(model, "fc1"), vector_batches())
    assert sums["fc1"].any()


def test_sums_are_not_the_models_memory() -> None:
    """The sums can be changed without a change to the model."""
    model = Mlp()
    sums, _ = parameter_sums(model, weights_of(model, "fc1"), vector_batches(1))
    assert not sums["fc1"].requires_grad and sums["fc1"].data_ptr() != model.fc1.weight.data_ptr()


@pytest.mark.parametrize(
    ("batches", "objective", "words"),
    [
        ([], loss, ["`batches` must give at least one batch", "used up"]),
        (iter(()), loss, ["`batches` must give at least one batch", "used up"]),
        (vector_batches(), lambda m, b: loss(m, b) * float("nan"), ["nan", "batch 0"]),
        (vector_batches(), lambda m, b: loss(m, b) / 0, ["inf", "batch 0"]),
        (vector_batches(), lambda m, b: loss(m, b).detach(), ["without a gradient", "detach"]),
        (vector_batches(), lambda m, b: m(b[0]), ["scalar", "(4, 4)"]),
        (vector_batches(), lambda m, b: 1.0, ["scalar tensor", "float"]),
        (vector_batches(), lambda m, b: nn.Parameter(b[0]).mean(), ["'fc1', 'head'", "any of the target"]),
        (vector_batches(), lambda m, b: Explode.apply(m.fc1.weight.sum() + m.head.weight.sum()), ["'fc1'", "finite"]),
    ],
    ids=["empty", "exhausted", "nan", "infinite", "detached", "matrix", "number", "unused", "explodes"],
)
def test_errors(batches: Any, objective: Any, words: list[str]) -> None:
    """Each names what is wrong and what to do."""
    model = Mlp()
    before = Snapshot.of(model)
    with pytest.raises(ValueError) as error:
        parameter_sums(model, weights_of(model, "fc1", "head"), batches, objective)
    assert all(word in str(error.value) for word in words), error.value
    before.assert_same(model)


@pytest.mark.parametrize("bad", [0, 1, 4])
@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_which_loss_is_not_finite(bad: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where several are looked at together, as on an accelerator; the model is as it was."""
    monkeypatch.setattr("semu_peft.gradients.gather._LOSSES_ON_CPU", at_once)
    model = Mlp()
    before = Snapshot.of(model)
    batches = vector_batches(5)
    batches[bad][0].fill_(torch.nan)
    with pytest.raises(ValueError, match=f"`objective` must be finite, got nan for batch {bad} "):
        gather(model, batches, loss, progress=False)
    before.assert_same(model)


def test_integer_weights() -> None:
    """A quantised weight that must be differentiated as a parameter is refused by layer name and dtype."""
    model = Cnn()
    model.conv2.weight = nn.Parameter(model.conv2.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="'conv2'.*int8"):
        gather(model, image_batches(), loss, progress=False)


class Explode(torch.autograd.Function):
    """A finite loss with a gradient that is not."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return torch.zeros_like(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


# ---- which layers, and what is kept of them ----


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (None, ["fc1", "fc2", "head"]),
        (["head", "fc1"], ["fc1", "head"]),
        (r"fc\d", ["fc1", "fc2"]),
    ],
)
def test_targets(targets: Any, names: list[str]) -> None:
    """All layers of known types, names and endings, or an expression for the whole name; in the model's order."""
    model = Mlp()
    gathered = gather(model, vector_batches(), loss, targets=targets, progress=False)
    assert list(gathered) == names and len(gathered) == len(names)
    expected = plain_sums(model, weights_of(model, *names), vector_batches())
    for name in names:
        torch.testing.assert_close(gathered[name].total, expected[name], atol=1e-6, rtol=1e-4)
    assert (gathered.batches, gathered.examples) == (3, 12)
    assert repr(gathered) == f"Gathered(GradientSum of {len(names)} layers, batches=3, examples=12)"


@pytest.mark.parametrize("targets", [["fc1", "fc9"], r"fc", ["dropout"]])
def test_targets_that_no_layer_matches(targets: Any) -> None:
    """Named, with the layers that there are and the way to add a type."""
    with pytest.raises(ValueError, match=r"`targets`.*(fc9|fc|dropout).*'fc1'.*register_source"):
        gather(Mlp(), vector_batches(), loss, targets=targets, progress=False)


@pytest.mark.parametrize("method", ["lora", "semu"])
def test_a_model_with_adapters(method: str) -> None:
    """The layers keep their names, the weights are the base's, and the adapters take part as they stand."""
    model = Mlp()
    base = copy.deepcopy(model)
    config = LoraConfig(target_modules=["fc1"], init_lora_weights=False, r=2)
    if method == "semu":
        config = SemuConfig(target_modules=["fc1"], r=2, init_weights=False)
    adapted = get_peft_model(model, config)
    base.fc1.weight.data += adapted.base_model.model.fc1.get_delta_weight("default")
    gathered = gather(adapted, vector_batches(), loss, progress=False)
    assert list(gathered) == Mlp.targets
    expected = plain_sums(base, weights_of(base, *Mlp.targets), vector_batches())
    for name, gradient in expected.items():
        torch.testing.assert_close(gathered[name].total, gradient, atol=1e-5, rtol=1e-3)


def test_layers_that_an_adapter_trains_in_full_are_left_out() -> None:
    """There are two of them, and only one is called."""
    adapted = get_peft_model(Mlp(), LoraConfig(target_modules=["fc1"], modules_to_save=["head"]))
    assert list(gather(adapted, vector_batches(), loss, progress=False)) == ["fc1", "fc2"]


def test_an_adapters_reading() -> None:
    """With `adapter_name` convolutions are read as the adapter reads them, and only its layers are gathered."""
    model = Cnn()
    expected = plain_sums(model, weights_of(model, "conv1"), image_batches())["conv1"]
    adapted = get_peft_model(model, SemuConfig(target_modules=["conv1"], conv_mode="per_channel"))
    gathered = gather(adapted, image_batches(), loss, progress=False, adapter_name="default")
    assert list(gathered) == ["conv1"] and gathered["conv1"].shape == (3, 8, 9)
    torch.testing.assert_close(gathered["conv1"].total, expected.transpose(0, 1).flatten(2), atol=1e-6, rtol=1e-4)


def test_transposed_layers_and_shared_embeddings() -> None:
    """`Conv1D` is read `(out, in)`; an embedding that is the head too has the gradient of both uses, once."""
    model = gpt2()
    tokens = torch.randint(32, (2, 8))
    gathered = gather(model, [tokens], lambda m, b: m(b, labels=b).loss, progress=False)
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    layer = model.transformer.h[0].mlp.c_fc
    torch.testing.assert_close(gathered["transformer.h.0.mlp.c_fc"].total, layer.weight.grad.T, atol=1e-6, rtol=1e-4)
    assert gathered["lm_head"] is gathered["transformer.wte"]
    torch.testing.assert_close(gathered["lm_head"].total, model.lm_head.weight.grad, atol=1e-6, rtol=1e-4)


class Bilinear(nn.Module):
    """`y = (x W) ∘ s`: a layer type that the package does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(6, CLASSES)), torch.randn(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight * self.scale


def test_a_layer_type_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once registered it is gathered, with every statistic that its gradients can give."""
    from semu_peft.gradients import LayerSource, SquaredSum, TokenGradient, register_source, sources

    monkeypatch.setattr(sources, "_FACTORIES", dict(sources._FACTORIES))
    model = nn.Sequential(Bilinear())
    with pytest.raises(ValueError, match="register_source"):
        gather(model, vector_batches(), loss, progress=False)

    def source(layer: Bilinear) -> LayerSource:
        return LayerSource(layer, lambda dy, x: [TokenGradient(dy * layer.scale, x)], shape=(CLASSES, 6))

    register_source(Bilinear, source)
    gathered = gather(model, vector_batches(), loss, progress=False)
    expected = sum(torch.autograd.grad(loss(model, batch), [model[0].weight])[0] for batch in vector_batches())
    torch.testing.assert_close(gathered["0"].total, expected.T, atol=1e-6, rtol=1e-4)
    squares = gather(model, vector_batches(3, 1), loss, statistic=SquaredSum, progress=False)["0"].total
    rows = [torch.autograd.grad(loss(model, batch), [model[0].weight])[0] for batch in vector_batches(3, 1)]
    torch.testing.assert_close(squares, sum(row.square() for row in rows).T, atol=1e-6, rtol=1e-4)


def test_a_statistic_for_each_layer() -> None:
    """A mapping names the targets too; a layer without one is an error."""
    kinds = {"fc1": GradientSum, "head": SquaredSum}
    gathered = gather(Mlp(), vector_batches(), loss, statistic=kinds, progress=False)
    assert {name: type(statistic) for name, statistic in gathered.items()} == kinds
    with pytest.raises(ValueError, match="`statistic` has none for the layers .*'fc2'"):
        gather(Mlp(), vector_batches(), loss, targets="fc.", statistic=kinds, progress=False)


@pytest.mark.parametrize("statistic", [GradientSum, SquaredSum])
def test_gathering_leaves_the_model_as_it_was(statistic: Any) -> None:
    model = disturbed(Cnn())
    before = Snapshot.of(model)
    gather(model, image_batches(), loss, targets=["conv1", "head"], statistic=statistic, progress=False)
    before.assert_same(model)
    with pytest.raises(ValueError, match="nan"):
        gather(model, image_batches(), lambda m, b: loss(m, b) * float("nan"), statistic=statistic, progress=False)
    before.assert_same(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_compiled_model_that_has_run_is_gathered_as_the_plain_one() -> None:
    """Its graph was made without the hooks, and a backward pass through it has not what they look for."""
    torch._dynamo.reset()
    plain, batches = Mlp(), vector_batches(2)
    compiled = torch.compile(plain, backend="eager")
    compiled(batches[0][0])
    found, expected = (gather(model, batches, objectives.CrossEntropy(), progress=False) for model in (compiled, plain))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].total, gradient.total)
