"""Gradients between a layer's inputs and its outputs: autograd's own, whatever surrounds the layer."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from models import Cnn, Mlp, Snapshot, image_batches, llama, vector_batches
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from semu_peft import SemuConfig, initialize_semu_weights, objectives
from semu_peft.gradients.gather import stream_gradients
from semu_peft.gradients.sources import CalledWeightSource, LayerSource, conv_gradients, token_gradients
from semu_peft.gradients.statistics import GradientSum
from semu_peft.gradients.targets import find_sources
from semu_peft.objectives.original import original
from semu_peft.tuner.adapted import semu_layers


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def caught(model: nn.Module, names: list[str], batches: list[Any], objective: Any = loss) -> dict[str, Tensor]:
    """The sums that layer sources give."""
    layers = {name: model.get_submodule(name) for name in names}
    sources = {
        name: LayerSource(layer, token_gradients if isinstance(layer, nn.Linear) else conv_gradients(layer))
        for name, layer in layers.items()
    }
    sums = {
        name: GradientSum(tuple(layer.weight.flatten(1).shape), torch.float32, torch.device("cpu"))
        for name, layer in layers.items()
    }
    stream_gradients(model, sources, sums, batches, objective, progress=False)
    return {name: total.total for name, total in sums.items()}


def autograds(model: nn.Module, names: list[str], batches: list[Any], objective: Any = loss) -> dict[str, Tensor]:
    """Ordinary gradients in eval mode."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    for batch in batches:
        objective(model, batch).backward()
    return {name: model.get_submodule(name).weight.grad.flatten(1).float() for name in names}


def assert_same(
    model: nn.Module, names: list[str], batches: list[Any], objective: Any = loss, **tolerance: Any
) -> None:
    expected = autograds(model, names, batches, objective)
    before = Snapshot.of(model)
    found = caught(model, names, batches, objective)
    before.assert_same(model)
    for name in names:
        torch.testing.assert_close(found[name], expected[name], **(tolerance or {"atol": 1e-6, "rtol": 1e-4}))


@pytest.mark.parametrize("frozen", [False, True])
def test_linear_and_convolution(frozen: bool) -> None:
    """Also the first layer, before which nothing is differentiated, and with every weight frozen."""
    for model, batches in ((Mlp(), vector_batches()), (Cnn(), image_batches())):
        names = [name for name in model.targets if getattr(model.get_submodule(name), "groups", 1) == 1]
        assert_same(model.requires_grad_(not frozen), names, batches)


class Awkward(nn.Module):
    """In-place activations after the targets, a layer called twice, keyword input, a call without gradient."""

    def __init__(self, by_keyword: bool = True) -> None:
        super().__init__()
        self.by_keyword = by_keyword  # which an adapter's layer does not take
        self.stem = nn.Linear(6, 8)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = 1 + self.twice(torch.ones(8)).sigmoid()
        x = F.relu(self.stem(x), inplace=True)
        x = self.twice(input=x) if self.by_keyword else self.twice(x)
        x += 1.0
        x = self.twice(x.view(2, -1, 8)).mul_(scale).flatten(0, 1)
        return self.head(x)


def test_awkward_models() -> None:
    """In-place operations on the outputs, several calls and calls without a graph change nothing."""
    assert_same(Awkward(), ["stem", "twice", "head"], vector_batches())


class ReadPast(nn.Module):
    """A layer that is called, and whose weight is read past it as well; another whose weight is read transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.turned = Conv1D(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.turned(torch.tanh(self.stem(x))))
        return self.head(x) + x @ self.head.weight.T


def both_ways(model: nn.Module, batches: list[Any], objective: Any = loss) -> list[dict[str, Tensor]]:
    """The sums of an adapter's layers from their calls, and from autograd's gradients of their weights."""
    found = []
    for by_weight in (False, True):
        with original(model) as reference:
            sources, _ = find_sources(reference, adapter_name="default", by_weight=by_weight)
            chosen = {name: source.summed or source for name, source in sources.items()}
            assert any(isinstance(source, CalledWeightSource) for source in chosen.values()) == by_weight
            sums = {name: GradientSum(source.shape, source.dtype, source.device) for name, source in sources.items()}
            stream_gradients(reference, chosen, sums, batches, objective, progress=False)
            assert all(layer.watch is None for layer in semu_layers(reference).values())
        found.append({name: total.total for name, total in sums.items()})
    return found


@pytest.mark.parametrize("kind", ["mlp", "cnn", "per_channel", "llama", "awkward", "checkpointed", "read past"])
def test_an_accelerators_way_gives_the_same(kind: str) -> None:
    """Autograd's gradient of a weight is that of the layer's calls, reads past the layer left out."""
    targets = {"awkward": ["stem", "twice", "head"], "read past": ["stem", "turned", "head"], "llama": "all-linear"}
    targets["checkpointed"] = r".*(stem|blocks\.\d\.[02]|head)"
    models = {
        "mlp": Mlp, "cnn": Cnn, "per_channel": Cnn, "llama": llama, "read past": ReadPast,
        "awkward": partial(Awkward, False), "checkpointed": partial(Checkpointed, False),
    }  # fmt: skip
    model = models[kind]()
    wanted = targets.get(kind) or model.targets
    per_channel = {"conv_mode": "per_channel"} if kind == "per_channel" else {}
    wrapped = get_peft_model(model, SemuConfig(target_modules=wanted, **per_channel))
    batches = {"cnn": image_batches, "per_channel": image_batches}.get(kind, vector_batches)()
    objective: Any = loss
    if kind == "llama":
        batches = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(32, (2, 3, 7))]
        objective = lambda model, batch: model(**batch).loss  # noqa: E731
    before = Snapshot.of(wrapped)
    by_calls, by_weights = both_ways(wrapped, batches, objective)
    before.assert_same(wrapped)
    for name, total in by_calls.items():
        assert total.any(), "there is something to compare"
        torch.testing.assert_close(by_weights[name], total, atol=1e-6, rtol=1e-4)


def test_an_accelerators_way_leaves_nothing_behind_after_an_error() -> None:
    wrapped = get_peft_model(Mlp(), SemuConfig(target_modules=Mlp.targets))
    before = Snapshot.of(wrapped)

    def failing(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        raise OSError("no disk")

    with pytest.raises(OSError, match="no disk"):
        sources, _ = find_sources(wrapped, adapter_name="default", by_weight=True)
        chosen = {name: source.summed for name, source in sources.items()}
        sums = {name: GradientSum(source.shape, source.dtype, source.device) for name, source in sources.items()}
        stream_gradients(wrapped, chosen, sums, vector_batches(), failing, progress=False)
    before.assert_same(wrapped)
    assert all(layer.watch is None for layer in semu_layers(wrapped).values())
    assert not any(p._post_accumulate_grad_hooks for p in wrapped.parameters())


def test_which_weights_autograd_is_asked_for() -> None:
    """None in float16, of a layer with a forward of its own, or that is computed; none on a CPU unless told to."""

    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = nn.Sequential(nn.Linear(6, 8), Own(8, 8), nn.Linear(8, 8).half(), weight_norm(nn.Linear(8, 4)))
    wrapped = get_peft_model(model, SemuConfig(target_modules=r"[0-3]"))
    sources, _ = find_sources(wrapped, adapter_name="default", by_weight=True)
    assert [name.rpartition(".")[2] for name, source in sources.items() if source.summed] == ["0"]
    assert not any(source.summed for source in find_sources(wrapped, adapter_name="default")[0].values())


class Checkpointed(nn.Module):
    """Two blocks that are recomputed in the backward pass."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(x)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks(use_reentrant: bool) -> None:
    """Each gradient is counted once, though the forward pass runs twice."""
    assert_same(
        Checkpointed(use_reentrant), ["stem", "blocks.0.0", "blocks.0.2", "blocks.1.2", "head"], vector_batches()
    )


def test_inputs_are_recomputed_where_the_model_is_checkpointed() -> None:
    """What the sources keep goes through autograd's saved tensors, so that checkpointing drops it."""
    model = Checkpointed(False)
    alive: list[weakref.ref[Tensor]] = []

    def remember(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        alive.append(weakref.ref(args[0]))

    model.blocks[0][2].register_forward_pre_hook(remember)

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        result = loss(model, batch)
        gc.collect()
        assert alive[-1]() is None, "an input inside a checkpointed block is kept until the backward pass"
        return result

    caught(model, ["blocks.0.2"], vector_batches(1), objective)


def test_inputs_are_let_go_during_the_backward_pass() -> None:
    """When the first layers' gradients are made, the inputs of the last ones are gone, and after it nothing is left."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    inputs: dict[int, weakref.ref[Tensor]] = {}
    seen = []
    for index in (0, 4):
        model[index].register_forward_pre_hook(
            lambda _, args, index=index: inputs.__setitem__(index, weakref.ref(args[0]))
        )

    class Watching(GradientSum):
        def add(self, gradient: Any, scale: float = 1.0) -> None:
            super().add(gradient, scale)
            gc.collect()
            seen.append(inputs[4]() is None)

    sources = {"0": LayerSource(model[0], token_gradients), "4": LayerSource(model[4], token_gradients)}
    sums = {"0": Watching((8, 6), torch.float32, torch.device("cpu"))}
    sums["4"] = GradientSum((4, 8), torch.float32, torch.device("cpu"))
    batch = (torch.randn(3, 6).tanh(), torch.tensor([0, 1, 2]))
    stream_gradients(model, sources, sums, [batch], loss, progress=False)
    assert seen == [True]
    gc.collect()
    assert inputs[4]() is None


def test_autocast() -> None:
    """Under autocast the products are those of the half-precision activations, summed in float32."""

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(model, batch)

    model = Mlp()
    expected = autograds(model, Mlp.targets, vector_batches())
    found = caught(model, Mlp.targets, vector_batches(), objective)
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        assert F.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.999


def test_weight_that_cannot_carry_a_gradient() -> None:
    """A layer whose weight is an integer parameter is differentiated all the same."""

    class Int8Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.to(x.dtype) / 64, self.bias)

    model = Mlp()
    plain = Mlp()
    quantised = Int8Linear(10, 8)
    integers = torch.randint(-64, 64, (8, 10), dtype=torch.int8)
    quantised.weight = nn.Parameter(integers, requires_grad=False)
    model.fc2 = quantised
    plain.load_state_dict({**plain.state_dict(), **{k: v for k, v in model.state_dict().items() if k != "fc2.weight"}})
    plain.fc2.weight.data = integers.float() / 64
    expected = autograds(plain, ["fc2"], vector_batches())["fc2"]
    found = caught(model, ["fc2"], vector_batches())["fc2"]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_offloaded_weights() -> None:
    """A model whose weights are brought in layer by layer gets the bases of the model in memory."""
    from accelerate import cpu_offload

    profiles = []
    for offload in (False, True):
        torch.manual_seed(3)
        model = llama()
        if offload:
            cpu_offload(model, torch.device("cpu"))
        model = get_peft_model(model, SemuConfig(target_modules="all-linear", orthogonal_to_weight=True))
        tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(1))
        profiles.append(initialize_semu_weights(model, [tokens], lambda m, b: m(b, labels=b).loss, progress=False))
    for name, layer in profiles[0].layers.items():
        other = profiles[1].layers[name]
        assert layer.rank == other.rank
        torch.testing.assert_close(other.singular_values, layer.singular_values, atol=1e-6, rtol=1e-3)


def test_gradients_of_tied_weights_are_counted_once() -> None:
    """A weight that two layers hold is summed over all its uses, once, and both get the directions of that sum."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
            self.right.weight = self.left.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) + 2 * self.right(x.tanh())

    model = Tied()
    expected = autograds(model, ["left"], vector_batches())["left"]
    wrapped = get_peft_model(model, SemuConfig(target_modules=["left", "right"], explained_variance=1.0))
    profile = initialize_semu_weights(wrapped, vector_batches(), objectives.CrossEntropy(), progress=False)
    for layer in semu_layers(wrapped).values():
        left, right = layer.semu_U["default"], layer.semu_V["default"]
        torch.testing.assert_close(left @ (left.T @ expected @ right) @ right.T, expected, atol=1e-5, rtol=1e-3)
    assert profile.layers["left"].energy == profile.layers["right"].energy
    assert profile.layers["left"].energy == pytest.approx(float(expected.square().sum()), rel=1e-4)
