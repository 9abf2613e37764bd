"""Layers that are not the plain operation of a stored weight: what they compute, merge and export with an adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from semu_peft import SemuConfig, gather, initialize_semu_weights, objectives, to_lora, unlearn
from semu_peft.tuner.adapted import semu_layers
from semu_peft.tuner.weight_use import WeightUse, weight_use

OBJECTIVE = objectives.RandomLabel()


class Same(nn.Conv2d):
    """Pads by what the input's size asks for, as timm's convolutions from TensorFlow do."""

    def forward(self, x: Tensor) -> Tensor:
        needed = [
            max((-(-size // step) - 1) * step + kernel - size, 0)
            for size, step, kernel in zip(x.shape[2:], self.stride, self.kernel_size, strict=True)
        ]
        padding = [part for total in reversed(needed) for part in (total // 2, total - total // 2)]
        return F.conv2d(F.pad(x, padding), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Causal(nn.Conv1d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv1d(F.pad(x, (2, 0)), weight, bias)


class Standardised(nn.Conv2d):
    """Weight standardisation, as in BiT and NFNets; the stored weight is standardised from the start."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight.data = self.standard()

    def standard(self) -> Tensor:
        deviation, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        return (self.weight - mean) / deviation

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standard(), self.bias)


class Masked(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("mask", torch.ones_like(self.weight).tril())
        self.weight.data *= self.mask

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class UnitRows(nn.Linear):
    """Divides its rows by their norm, which is 1 in the weight that is stored."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weight.data = F.normalize(self.weight.data, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=-1), self.bias)


class Equalised(nn.Linear):
    """StyleGAN's: the weight is scaled at run time."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.in_features**-0.5, self.bias)


class Gated(nn.Linear):
    """Wants a second argument."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * gate


class Lookup(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(super().forward(tokens))


class Written(nn.Linear):
    """The plain operation, written out: Falcon's."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Net(nn.Module):
    """A layer between what it needs before and after it."""

    def __init__(self, layer: nn.Module, classes: int = 4) -> None:
        super().__init__()
        self.layer, self.norm, self.head = layer, nn.BatchNorm1d(6), nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x, torch.full((6,), 0.7)) if isinstance(inner(self.layer), Gated) else self.layer(x)
        if hidden.dim() > 2:
            hidden = hidden.flatten(2).mean(-1) if hidden.shape[1] == 6 else hidden.mean(1)
        return self.head(self.norm(hidden))


def inner(layer: Any) -> nn.Module:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def inputs_of(layer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if isinstance(layer, nn.Embedding):
        return torch.randint(0, 9, (12, 5), generator=generator)
    shape = {nn.Linear: (8,), nn.Conv1d: (4, 9), nn.Conv2d: (4, 9, 8)}
    return torch.randn(12, *next(size for kind, size in shape.items() if isinstance(layer, kind)), generator=generator)


def data_for(layer: nn.Module) -> list[Any]:
    x = inputs_of(layer)
    return [(x, torch.arange(12) % 4), (x.flip(0), torch.arange(12) % 3)]


OWN: dict[str, Callable[[], nn.Module]] = {
    "same": lambda: Same(4, 6, 3, stride=2),
    "same_grouped": lambda: Same(4, 6, 3, stride=2, groups=2),
    "causal": lambda: Causal(4, 6, 3),
    "standardised": lambda: Standardised(4, 6, 3, padding=1),
    "masked": lambda: Masked(8, 6),
    "cosine": lambda: Cosine(8, 6),
    "unit_rows": lambda: UnitRows(8, 6),
    "equalised": lambda: Equalised(8, 6),
    "gated": lambda: Gated(8, 6),
    "lookup": lambda: Lookup(9, 6),
}


def pruned(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old_weight_norm": old_weight_norm,
    "old_spectral_norm": old_spectral_norm,
    "pruned": pruned,
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 6),
    "conv": lambda: nn.Conv2d(4, 6, 3),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "embedding": lambda: nn.Embedding(9, 6),
    "padded": lambda: nn.Embedding(9, 6, padding_idx=2),
}
COMPUTED = [("linear", name) for name in NORMS] + [
    ("conv", "weight_norm"), ("conv", "pruned"), ("grouped", "weight_norm"), ("grouped", "pruned"),
    ("embedding", "weight_norm"), ("padded", "pruned"),
]  # fmt: skip


def computed(layer: str, norm: str) -> nn.Module:
    return NORMS[norm](LAYERS[layer]())


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def forgotten(layer: nn.Module, **config: Any) -> tuple[Any, Tensor, Tensor]:
    """A model around the layer whose adapter was trained; an input; the original's answer to it."""
    plain, batches = Net(layer).eval(), data_for(layer)
    x = batches[0][0]
    before = plain(x).detach()
    model = get_peft_model(plain, SemuConfig(target_modules=["layer"], **config))
    initialize_semu_weights(model, batches, OBJECTIVE, progress=False)
    unlearn(model, batches, OBJECTIVE, epochs=3, learning_rate=0.05, progress=False)
    return model.eval(), x, before


@pytest.mark.parametrize("name", OWN)
def test_a_forward_of_its_own_runs_with_the_corrected_parameter_and_merging_changes_nothing(name: str) -> None:
    model, x, before = forgotten(OWN[name]())
    trained = model(x).detach()
    assert (trained - before).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    assert torch.allclose(model.merge_and_unload().eval()(x), trained, atol=1e-5)


@pytest.mark.parametrize("name", OWN)
def test_its_forget_gradient_is_that_of_the_parameter(name: str) -> None:
    layer = OWN[name]()
    assert weight_use(layer) is WeightUse.OWN
    model, batch = Net(layer).eval(), data_for(layer)[0]
    loss = objectives.CrossEntropy()
    (exact,) = torch.autograd.grad(loss(model, batch), layer.weight)
    seen = gather(model, [batch], loss, progress=False)
    assert torch.allclose(seen["layer"].total, exact.flatten(1), atol=1e-6)
    adapted = get_peft_model(model, SemuConfig(target_modules=["layer"]))
    seen = gather(adapted, [batch], loss, adapter_name="default", progress=False)
    assert torch.allclose(seen["layer"].total, exact.flatten(1), atol=1e-6)


@pytest.mark.parametrize("name", ["same", "masked"])
def test_each_row_of_a_batch_may_have_an_adapter_of_its_own(name: str) -> None:
    model, x, before = forgotten(OWN[name]())
    trained = model(x).detach()
    mixed = model(x, adapter_names=["default", "__base__"] * 6)
    assert torch.allclose(mixed[0::2], trained[0::2], atol=1e-5) and torch.allclose(
        mixed[1::2], before[1::2], atol=1e-5
    )


def test_no_lora_equals_a_correction_inside_a_forward_of_its_own() -> None:
    model, _, _ = forgotten(OWN["same"]())
    with pytest.raises(ValueError, match=r"'layer', a Same, .*no LoRA equals.*merge_and_unload"):
        to_lora(model)


def test_the_plain_operation_written_out_is_plain() -> None:
    assert weight_use(Written(8, 6)) is WeightUse.PLAIN
    assert weight_use(Same(4, 6, 1)) is WeightUse.PLAIN  # it never pads
    model, _, _ = forgotten(Written(8, 6))
    to_lora(model)


@pytest.mark.parametrize(("layer", "norm"), COMPUTED)
def test_a_computed_weight_is_corrected_beside_it_and_not_merged(layer: str, norm: str) -> None:
    model, x, before = forgotten(computed(layer, norm))
    trained = model(x).detach()
    assert (trained - before).abs().max() > 1e-3
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"merged at layer 'layer': its weight is computed.*remove"):
            merge()
    with pytest.raises(ValueError, match=r"exported as a LoRA.*'layer': its weight is computed"):
        to_lora(model)
    assert torch.equal(model(x), trained)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with model.disable_adapter():
        assert torch.equal(model(x), before)


@pytest.mark.parametrize(("layer", "norm"), COMPUTED)
def test_its_forget_gradient_is_that_of_the_computed_weight(layer: str, norm: str) -> None:
    plain = computed(layer, norm)
    model, batch = Net(plain).eval(), data_for(plain)[0]
    assert weight_use(plain) is WeightUse.COMPUTED
    model(batch[0])
    stored = LAYERS[layer]()
    stored.load_state_dict(
        {"weight": plain.weight.detach(), **({"bias": plain.bias} if isinstance(plain, (nn.Linear, nn.Conv2d)) else {})}
    )
    loss = objectives.CrossEntropy()
    seen = gather(model, [batch], loss, progress=False)
    model.layer = stored
    (exact,) = torch.autograd.grad(loss(model, batch), stored.weight)
    assert torch.allclose(seen["layer"].total, exact.flatten(1), atol=1e-6)


@pytest.mark.parametrize("mode", ["flatten", "per_channel"])
def test_a_computed_convolution_is_read_as_the_adapter_reads_it(mode: str) -> None:
    model, x, before = forgotten(computed("grouped", "weight_norm"), conv_mode=mode)
    assert (model(x) - before).abs().max() > 1e-3


def test_a_weight_that_is_stored_again_can_be_merged() -> None:
    model, x, _ = forgotten(computed("linear", "weight_norm"))
    trained = model(x).detach()
    parametrize.remove_parametrizations(semu_layers(model)["layer"].base_layer, "weight")
    assert torch.allclose(model.merge_and_unload().eval()(x), trained, atol=1e-6)


def test_an_adapter_leaves_the_buffers_of_a_norm_alone() -> None:
    plain = Net(computed("linear", "spectral_norm")).train()
    before = plain.layer.parametrizations.weight[0]._u.clone()
    model = get_peft_model(plain, SemuConfig(target_modules=["layer"]))
    initialize_semu_weights(model, data_for(nn.Linear(8, 6)), OBJECTIVE, progress=False)
    unlearn(model, data_for(nn.Linear(8, 6)), OBJECTIVE, progress=False)
    assert torch.equal(model.base_model.model.layer.base_layer.parametrizations.weight[0]._u, before)


def test_a_computed_weight_in_a_forward_of_its_own_is_refused() -> None:
    plain = Net(parametrizations.weight_norm(Masked(8, 6)))
    with pytest.raises(TypeError, match=r"'layer', a .*computed, and what its own `forward` does"):
        get_peft_model(plain, SemuConfig(target_modules=["layer"]))
    assert list(gather(plain, data_for(nn.Linear(8, 6)), OBJECTIVE, progress=False)) == ["head"]


def test_a_layer_is_tried_without_a_trace() -> None:
    layer = Masked(8, 6).train()
    weight, state = layer.weight, torch.get_rng_state()
    kept = weight.detach().clone()
    assert weight_use(layer) is WeightUse.OWN
    assert layer.weight is weight and torch.equal(weight, kept) and layer.training and weight.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert weight_use(Masked(8, 6).to("meta")) is None


@pytest.mark.parametrize("make", [OWN["same"], OWN["masked"], OWN["lookup"], lambda: computed("conv", "weight_norm")])
def test_natural_gradients_train_them(make: Callable[[], nn.Module]) -> None:
    plain = Net(make()).eval()
    batches, objective = data_for(plain.layer), objectives.DecoupledDistillation()
    model = get_peft_model(plain, SemuConfig(target_modules=["layer", "head"]))
    initialize_semu_weights(model, batches, objective, progress=False)
    before = objective(model, batches[0]).item()
    result = unlearn(model, batches, objective, max_steps=4, progress=False)
    assert result.steps > 0 and objective(model, batches[0]).item() < before
