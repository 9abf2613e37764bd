"""Quantised linear layers, where their libraries are installed: the correction beside them, in full precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import run
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from semu_peft import (
    SemuConfig,
    initialize_semu_weights,
    rerank,
    save_as_lora,
)
from semu_peft.tuner.adapted import semu_layers
from semu_peft.tuner.quantized import QuantizedLinear

IN, HIDDEN, OUT = 64, 128, 64
pytestmark = pytest.mark.filterwarnings("ignore:Merging into a quantised weight", "ignore:.*MatMul8bitLt")


def floating() -> nn.Sequential:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT, bias=False))


def replaced(make: Callable[[nn.Linear], nn.Module]) -> nn.Sequential:
    model = floating()
    return nn.Sequential(make(model[0]), model[1], make(model[2]))


def bitsandbytes_4bit() -> nn.Sequential:
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, torch.float32, quant_type="nf4"
        )
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")

    return replaced(make)


def bitsandbytes_8bit() -> nn.Sequential:
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
        )
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")

    return replaced(make)


def torchao_int8() -> nn.Sequential:
    quantization = pytest.importorskip("torchao.quantization")
    model = floating()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    model.hf_quantizer = TorchaoQuantizer()
    return model


class TorchaoQuantizer:
    """What transformers hangs onto a model that it quantised."""

    @property
    def quantization_config(self) -> TorchaoQuantizer:
        return self

    def get_apply_tensor_subclass(self) -> Any:
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig()


def hqq_4bit() -> nn.Sequential:
    hqq = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
    return replaced(
        lambda linear: hqq.HQQLinear(linear, copy.deepcopy(config), compute_dtype=torch.float32, device="cpu")
    )


LIBRARIES = [bitsandbytes_4bit, bitsandbytes_8bit, torchao_int8, hqq_4bit]
every_library = pytest.mark.parametrize("quantized", LIBRARIES, ids=lambda make: make.__name__)


def adapted(quantized: Callable[[], nn.Sequential], **options: Any) -> PeftModel:
    model = get_peft_model(
        quantized(), SemuConfig(**{"target_modules": ["0", "2"], "r": 4, "init_weights": False, **options})
    )
    for layer in semu_layers(model).values():
        layer.semu_core["default"].data.mul_(10)
    return model.eval()


def inputs() -> Tensor:
    return torch.randn(5, IN, generator=torch.Generator().manual_seed(7))


@every_library
def test_the_correction_is_beside_the_quantised_layer(quantized: Callable[[], nn.Sequential]) -> None:
    """Each layer gives the quantised layer's output plus x (U R Vᵀ)ᵀ in float32, and its bases have logical shapes."""
    model = adapted(quantized)
    for name, x in (("0", inputs()), ("2", torch.randn(3, 2, HIDDEN))):
        layer = semu_layers(model)[name]
        assert isinstance(layer, QuantizedLinear)
        base = layer.get_base_layer()
        left, right, core = layer.semu_U["default"], layer.semu_V["default"], layer.semu_core["default"]
        assert left.shape == (base.out_features, 4) and right.shape == (base.in_features, 4)
        assert left.dtype == right.dtype == core.dtype == torch.float32
        expected = base(x) + x @ right @ core.T @ left.T
        torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == [
        "base_model.model.0.semu_core.default.semu_core",
        "base_model.model.2.semu_core.default.semu_core",
    ]


@every_library
def test_doing_nothing_is_bit_identical(quantized: Callable[[], nn.Sequential]) -> None:
    """Uninitialised, of zero core or switched off."""
    x, expected = inputs(), run(quantized(), inputs())
    assert torch.equal(run(get_peft_model(quantized(), SemuConfig(target_modules=["0", "2"])), x), expected)
    model = adapted(quantized)
    assert not torch.equal(run(model, x), expected)
    with model.disable_adapter():
        assert torch.equal(run(model, x), expected)
    for layer in semu_layers(model).values():
        layer.semu_core["default"].data.zero_()
    assert torch.equal(run(model, x), expected)


@every_library
def test_training(quantized: Callable[[], nn.Sequential]) -> None:
    """Gradients pass through the quantised layers to the first core, and a few steps fit a target."""
    model, x, target = adapted(quantized), inputs(), torch.zeros(5, OUT)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.03)
    losses = []
    for _ in range(8):
        loss = (model(x) - target).square().mean()
        loss.backward()
        assert all(layer.semu_core["default"].grad.abs().max() > 0 for layer in semu_layers(model).values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@every_library
def test_saved_loaded_exported_reranked(quantized: Callable[[], nn.Sequential], tmp_path: Path) -> None:
    """The adapter's file does not know of the quantisation, and its LoRA fits the quantised model as well."""
    model, x = adapted(quantized), inputs()
    expected = run(model, x)
    model.save_pretrained(tmp_path / "semu")
    assert torch.equal(run(PeftModel.from_pretrained(quantized(), tmp_path / "semu"), x), expected)
    difference = run(PeftModel.from_pretrained(floating(), tmp_path / "semu"), x) - expected
    assert 0 < difference.abs().max() < 0.5
    save_as_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(quantized(), tmp_path / "lora")
    torch.testing.assert_close(run(lora, x), expected, atol=1e-4, rtol=1e-4)
    rerank(model, explained_variance=1.0)
    torch.testing.assert_close(run(model, x), expected, atol=1e-4, rtol=1e-4)


@every_library
def test_merging_rounds_as_the_quantisation_does(quantized: Callable[[], nn.Sequential]) -> None:
    """The merged weight is the quantised W + ΔW: as close to it as the quantisation is, and a quantised layer again."""
    model, x = adapted(quantized), inputs()
    run(model, x)  # bitsandbytes packs its weights anew for some CPUs
    for layer in semu_layers(model).values():
        weight, delta = layer.get_base_weight().clone().float(), layer.get_delta_weight("default").detach()
        kind, coarse = type(layer.get_base_layer()), (weight - floating()[0 if len(weight) == HIDDEN else 2].weight)
        with pytest.warns(UserWarning, match="rounds the correction"):
            layer.merge(safe_merge=True)
        error = layer.get_base_weight().float() - weight - delta
        assert type(layer.get_base_layer()) is kind
        growth = (weight + delta).abs().max() / weight.abs().max()  # of the range that the few bits cover
        assert error.square().mean() < 3 * growth**2 * coarse.square().mean()
        assert error.square().mean() < 0.2 * delta.square().mean()
    merged = run(model, x)
    model = model.merge_and_unload()
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert torch.equal(run(model, x), merged)


@every_library
def test_the_weights_own_directions(quantized: Callable[[], nn.Sequential]) -> None:
    """`init_weights="weight"` takes the singular vectors of the dequantised weight."""
    for layer in semu_layers(adapted(quantized, init_weights="weight")).values():
        left, _, _ = torch.linalg.svd(layer.get_base_weight().float(), full_matrices=False)
        basis = layer.semu_U["default"]
        torch.testing.assert_close(basis @ basis.mT, left[:, :4] @ left[:, :4].mT, atol=1e-4, rtol=0)


@every_library
def test_initialisation_from_forget_data(quantized: Callable[[], nn.Sequential]) -> None:
    """The bases are the leading directions of ∇W of the dequantised layers, which no quantised weight could carry."""
    model, x = get_peft_model(quantized(), SemuConfig(target_modules=["0", "2"], explained_variance=0.9)), inputs()
    profile = initialize_semu_weights(model, [x], lambda m, b: m(b).square().sum(), progress=False)
    reference = floating()
    for name, layer in semu_layers(model).items():
        reference[int(name)].weight.data = layer.get_base_weight().clone().float()
    reference(x).square().sum().backward()
    for name, layer in semu_layers(model).items():
        left, _, _ = torch.linalg.svd(reference[int(name)].weight.grad, full_matrices=False)
        basis, left = layer.semu_U["default"], left[:, : profile.ranks[name]]
        # bitsandbytes rounds the activations to 8 bits as well
        torch.testing.assert_close(basis @ basis.mT, left @ left.mT, atol=0.05, rtol=0)


class Float8Linear(nn.Linear):
    """As transformers has it: a weight of eight bits and its scale."""

    def __init__(self) -> None:
        super().__init__(IN, OUT)
        self.weight = nn.Parameter(self.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(2.0))


class PackedLinear(nn.Linear):
    """A weight of another dtype and shape."""

    def __init__(self) -> None:
        super().__init__(IN, OUT)
        self.weight = nn.Parameter(torch.zeros(IN * OUT // 2, 1, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize("make", [Float8Linear, PackedLinear])
def test_other_quantisations_are_refused(make: type[nn.Module]) -> None:
    """By name, with what to do, and before anything is changed."""
    model = nn.Sequential(nn.Linear(IN, IN), make())
    kinds, state = [type(module) for module in model.modules()], model.state_dict()
    with pytest.raises(TypeError, match="'1'.*quantised in a way.*bitsandbytes"):
        get_peft_model(model, SemuConfig(target_modules=["0", "1"]))
    assert [type(module) for module in model.modules()] == kinds
    assert all(model.state_dict()[name].data_ptr() == tensor.data_ptr() for name, tensor in state.items())
