"""Squared gradients and K-FAC's factors: those of single examples, equal to plain autograd, however batches are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CLASSES, VIT, Cnn, Mlp, llama, vit
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from semu_peft import SemuConfig, initialize_semu_weights
from semu_peft.gradients import ConvGradient, CoreCovariance, DenseGradient, SquaredSum, TokenGradient
from semu_peft.gradients.gather import gather
from semu_peft.objectives import CrossEntropy
from semu_peft.tuner.adapted import semu_layers

EXAMPLES = 6


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    output = model(batch[0])
    return F.cross_entropy(getattr(output, "logits", output), batch[1])


def token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch, labels=batch).loss


def data(kind: str) -> tuple[nn.Module, Any, list[Any], list[str]]:
    """A model, its objective, its examples as batches of one, and its layers whose examples can be told apart."""
    draw = torch.Generator().manual_seed(3)
    torch.manual_seed(5)
    labels = torch.randint(CLASSES, (EXAMPLES, 1), generator=draw)
    if kind == "mlp":
        return Mlp(), loss, list(zip(torch.randn(EXAMPLES, 1, 6, generator=draw), labels, strict=True)), Mlp.targets
    if kind == "llama":
        return llama(), token_loss, list(torch.randint(32, (EXAMPLES, 1, 7), generator=draw)), ["q_proj", "down_proj"]
    images = list(zip(torch.randn(EXAMPLES, 1, 3, 8, 8, generator=draw), labels, strict=True))
    return (
        (Cnn(), loss, images, ["conv1", "head"]) if kind == "cnn" else (vit(), loss, images, [VIT["query"], VIT["up"]])
    )


def batched(examples: list[Any], sizes: list[int]) -> Iterator[Any]:
    start = 0
    for size in sizes:
        part, start = examples[start : start + size], start + size
        if isinstance(part[0], Tensor):
            yield torch.cat(part)
        else:
            yield tuple(torch.cat(tensors) for tensors in zip(*part, strict=True))


def squares_of(model: nn.Module, names: list[str], batches: list[Any], objective: Any) -> dict[str, Tensor]:
    """The reference: each batch's gradient by autograd, squared and added up."""
    model.eval()
    weights = [model.get_submodule(name).weight for name in names]
    sums = [torch.zeros_like(weight) for weight in weights]
    for batch in batches:
        for total, gradient in zip(sums, torch.autograd.grad(objective(model, batch), weights), strict=True):
            total += gradient.square()
    return {name: total.flatten(1) for name, total in zip(names, sums, strict=True)}


def assert_same(found: Any, expected: dict[str, Tensor], count: int) -> None:
    for name, squares in expected.items():
        scale = float(squares.max())
        assert scale > 0 and found[name].count == count
        torch.testing.assert_close(found[name].total / scale, squares / scale, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(found[name].mean, found[name].total / count)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "vit", "llama"])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(cuts=st.sets(st.integers(1, EXAMPLES - 1)))
def test_squares_of_examples_do_not_depend_on_the_batches(kind: str, cuts: set[int]) -> None:
    """For a mean over examples, any split of the same examples gives the squares of batches of one."""
    model, objective, examples, targets = data(kind)
    ends = [0, *sorted(cuts), EXAMPLES]
    sizes = [stop - start for start, stop in zip(ends, ends[1:], strict=False)]
    found = gather(model, batched(examples, sizes), objective, targets=targets, statistic=SquaredSum, progress=False)
    assert found.examples == EXAMPLES and found.batches == len(sizes)
    assert_same(found, squares_of(model, list(found), examples, objective), EXAMPLES)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "llama"])
def test_squares_of_batches_are_another_thing(kind: str) -> None:
    """They are autograd's squares batch by batch; between unlike examples they fall as batches grow."""
    model, objective, examples, targets = data(kind)
    means = []
    for sizes in ([1] * EXAMPLES, [3, 3], [EXAMPLES]):
        batches = list(batched(examples, sizes))
        found = gather(model, batches, objective, targets=targets, statistic=SquaredSum.per_batch, progress=False)
        assert_same(found, squares_of(model, list(found), batches, objective), len(sizes))
        means.append(sum(float(squares.mean.sum()) for squares in found.values()))
    assert means[0] > 1.3 * means[1] > 1.3 * means[2]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ratio_of_a_subset_to_all(size: int) -> None:
    """One example among `n` with a gradient of its own: `n` by examples at most; by batches `n` times their size."""
    model = nn.Linear(3, 1, bias=False)
    inputs = torch.zeros(8, 3)
    inputs[0, 0], inputs[1:, 1] = 2.0, 1.0

    def mean(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).mean()

    def ratio(statistic: Any) -> float:
        forget = gather(nn.Sequential(model), [inputs[:1]], mean, statistic=statistic, progress=False)["0"].mean
        everything = gather(nn.Sequential(model), inputs.split(size), mean, statistic=statistic, progress=False)["0"]
        return float((forget / everything.mean)[0, 0])

    assert ratio(SquaredSum) == pytest.approx(8)
    assert ratio(SquaredSum.per_batch) == pytest.approx(8 * size)


class Twice(nn.Module):
    """A layer that is called twice, the second time on two tokens an example."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(x))
        return self.head(self.twice(torch.stack([x, -2 * x], 1)).tanh().sum(1))


@pytest.mark.parametrize("sizes", [[1] * EXAMPLES, [2, 4]])
def test_a_layer_that_is_called_twice(sizes: list[int]) -> None:
    """An example's gradient is the sum over its calls, and so is a batch's, before it is squared."""
    _, _, examples, _ = data("mlp")
    model, batches = Twice(), list(batched(examples, sizes))
    found = gather(model, batches, loss, statistic=SquaredSum, progress=False)
    assert_same(found, squares_of(model, ["twice", "head"], examples, loss), EXAMPLES)
    found = gather(model, batches, loss, statistic=SquaredSum.per_batch, progress=False)
    assert_same(found, squares_of(model, ["twice", "head"], batches, loss), len(sizes))


def test_weights_that_are_differentiated_as_parameters() -> None:
    """A grouped convolution: batches of one, or whole batches; else an error that says so, and no hook stays."""
    model, objective, examples, _ = data("cnn")
    singles = gather(model, examples, objective, targets=["conv2"], statistic=SquaredSum, progress=False)
    assert_same(singles, squares_of(model, ["conv2"], examples, objective), EXAMPLES)
    pairs = list(batched(examples, [2, 2, 2]))
    whole = gather(model, pairs, objective, targets=["conv2"], statistic=SquaredSum.per_batch, progress=False)
    assert_same(whole, squares_of(model, ["conv2"], pairs, objective), 3)
    with pytest.raises(ValueError, match="'conv2'.*batches of one"):
        gather(model, pairs, objective, targets=["conv2"], statistic=SquaredSum, progress=False)
    assert not any(module._forward_hooks for module in model.modules())


def test_examples_that_cannot_be_told_apart() -> None:
    """A layer that sees other rows than examples, and a batch without a tensor."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inside(x.view(-1, 3)).view(x.shape)

    def objective(model: nn.Module, batch: Any) -> Tensor:
        return model(batch if isinstance(batch, Tensor) else torch.ones(2, 6)).square().mean()

    with pytest.raises(ValueError, match="'inside'.*4 rows.*2 examples"):
        gather(Flat(), [torch.randn(2, 6)], objective, statistic=SquaredSum, progress=False)
    with pytest.raises(ValueError, match="'inside'.*no tensor"):
        gather(Flat(), [["a text"]], objective, statistic=SquaredSum, progress=False)
    one = gather(Flat(), [torch.randn(1, 6)], objective, statistic=SquaredSum, progress=False)
    assert one["inside"].count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_squares_are_summed_in_float32_or_better(dtype: torch.dtype) -> None:
    """Squares of half-precision gradients neither vanish nor are rounded to its digits."""
    squares = SquaredSum((4, 5), torch.promote_types(dtype, torch.float32), torch.device("cpu"))
    outputs, inputs = (1e-4 * torch.randn(3, 2, 4)).to(dtype), torch.randn(3, 2, 5).to(dtype)
    squares.add(TokenGradient(outputs, inputs))
    squares.end_batch(3)
    expected = (outputs.double().mT @ inputs.double()).square().sum(0) * 9
    torch.testing.assert_close(squares.total.double(), expected, atol=0, rtol=1e-4)


@pytest.mark.parametrize("name", ["plain", "grouped", "circular"])
def test_a_convolutions_examples_are_autograds(name: str) -> None:
    conv = {
        "plain": nn.Conv2d(4, 6, 3, stride=2, padding=1),
        "grouped": nn.Conv1d(4, 6, 3, groups=2),
        "circular": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    }[name]
    x = torch.randn(5, 4, *(7,) * (conv.weight.dim() - 2))
    output = conv(x)
    slope = torch.randn_like(output)
    found = ConvGradient.of(conv, slope, x).per_example(1, 4)
    for index in range(1, 4):
        (expected,) = torch.autograd.grad((output[index] * slope[index]).sum(), [conv.weight], retain_graph=True)
        torch.testing.assert_close(found[index - 1], expected.flatten(1), atol=1e-4, rtol=1e-4)


def test_a_bad_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="`per` must be 'example' or 'batch'"):
        SquaredSum((2, 2), torch.float32, torch.device("cpu"), per="token")


# ---- K-FAC's factors ----


def adapted(kind: str) -> tuple[nn.Module, Any, list[Any]]:
    model, objective, examples, targets = data(kind)
    model = get_peft_model(model, SemuConfig(target_modules=targets, r=3))
    initialize_semu_weights(model, examples, objective, progress=False)
    for layer in semu_layers(model).values():
        nn.init.normal_(layer.semu_core["default"], std=0.1)
    return model.eval(), objective, examples


def rows_of(layer: Any, run: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """All rows that go into a layer, windows of a convolution, and the gradients of those that come out."""
    base, inputs, slopes = layer.get_base_layer(), [], []

    def after(module: Any, args: Any, output: Tensor) -> None:
        x = args[0].detach()
        if x.dim() == 4:
            x = F.unfold(x, base.kernel_size, padding=base.padding, stride=base.stride).mT
        inputs.append(x.flatten(0, -2))
        output.register_hook(lambda slope: slopes.append(slope.movedim(1, -1) if slope.dim() == 4 else slope))

    handle = layer.register_forward_hook(after)
    run()
    handle.remove()
    return torch.cat(inputs), torch.cat([slope.flatten(0, -2) for slope in slopes])


@pytest.mark.parametrize("kind", ["mlp", "cnn", "llama"])
@pytest.mark.parametrize("sizes", [[1] * EXAMPLES, [2, 4], [EXAMPLES]])
def test_core_covariance_is_that_of_the_rows(kind: str, sizes: list[int]) -> None:
    """`E[h hᵀ]` and `E[g gᵀ]` over all rows, of inputs in V and output gradients in U, at the adapter as it stands."""
    model, objective, examples = adapted(kind)
    found = gather(
        model, batched(examples, sizes), objective, statistic=CoreCovariance.of_adapter(model), progress=False,
        adapter_name="default",
    )  # fmt: skip
    for name, layer in semu_layers(model).items():
        inputs, slopes = rows_of(layer, lambda: [objective(model, example).backward() for example in examples])
        h, g = inputs @ layer.semu_V["default"], slopes @ layer.semu_U["default"]
        torch.testing.assert_close(found[name].inputs, h.T @ h / len(h), atol=1e-6, rtol=1e-3)
        scale = float((g.T @ g / len(g)).abs().max())
        torch.testing.assert_close(found[name].outputs / scale, g.T @ g / len(g) / scale, atol=1e-5, rtol=1e-3)


def test_core_covariance_is_the_cores_fisher_for_one_row() -> None:
    """With one row an example and one example, `B ⊗ A` is the square of the core's gradient, to the digit."""
    model, objective, examples = adapted("mlp")
    found = gather(
        model, examples[:1], objective, statistic=CoreCovariance.of_adapter(model), progress=False,
        adapter_name="default",
    )  # fmt: skip
    model.zero_grad()
    objective(model, examples[0]).backward()
    for name, layer in semu_layers(model).items():
        gradient = layer.semu_core["default"].grad.flatten()
        kronecker = torch.kron(found[name].outputs, found[name].inputs)
        torch.testing.assert_close(kronecker, torch.outer(gradient, gradient), atol=1e-7, rtol=1e-3)


def test_padding_is_told_apart_where_a_pass_begins() -> None:
    """By the mask of a layer's own pass, of tokens alone, and not by that of the other side of an encoder-decoder."""

    def rows(model: nn.Module, batch: Any, objective: Any, target: str) -> float:
        options: dict[str, Any] = {"targets": [target], "progress": False}
        return gather(model, [batch], objective, statistic=CoreCovariance.of_weight, **options)[target].rows  # type: ignore[attr-defined]

    ids = torch.randint(3, 32, (4, 8))
    masks = [(torch.arange(8) < length).long().expand(4, 8) for length in (8, 3)]

    def both(model: nn.Module, batch: Any) -> Tensor:
        return sum(model(input_ids=ids, attention_mask=mask).logits.square().mean() for mask in masks)

    assert rows(llama().eval(), {"input_ids": ids, "labels": ids}, both, "model.layers.0.mlp.down_proj") == 4 * 11
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2
    )  # fmt: skip
    pooled = {"input_ids": torch.randint(3, 32, (4, 16)), "labels": torch.arange(4) % 2}
    pooled["attention_mask"] = (torch.arange(16) < 5).long().expand(4, 16)
    assert rows(BertForSequenceClassification(config).eval(), pooled, CrossEntropy(), "classifier") == 4
    small = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )  # fmt: skip
    answers = {"input_ids": ids, "attention_mask": masks[1], "labels": ids}
    target = "decoder.block.0.layer.2.DenseReluDense.wo"
    assert rows(T5ForConditionalGeneration(small).eval(), answers, CrossEntropy(), target) == 32


def test_core_covariance_of_what_has_no_rows() -> None:
    """A weight that is differentiated as a parameter, and a batch of cores."""
    covariance = CoreCovariance(torch.eye(4), torch.eye(4))
    with pytest.raises(ValueError, match="as a parameter"):
        covariance.add(DenseGradient(torch.eye(4)))
    with pytest.raises(ValueError, match="batch of cores"):
        CoreCovariance(torch.ones(3, 4, 2), torch.ones(3, 4, 2))
    with pytest.raises(ValueError, match="no tensor"):
        covariance.end_batch(None)
