"""What is peculiar to `nn.MultiheadAttention` and PyTorch's transformer modules, which read weights past layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Snapshot, run
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from semu_peft import SemuConfig, initialize_semu_weights, to_lora
from semu_peft.tuner.adapted import semu_layers

SIZE, HEADS = 8, 2


class Block(nn.Module):
    """A residual attention block as in open_clip, `(N, T, SIZE)` to the same."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(SIZE, HEADS, batch_first=True, **options)
        self.fc = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        context = x if self.attn.kdim == SIZE else x[..., : self.attn.kdim]
        return self.fc(x + self.attn(query=x, key=context, value=context, need_weights=False)[0])


def block(**options: Any) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(Block(**options))
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return model


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(SIZE, HEADS, 12, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2).eval()


def inputs() -> Tensor:
    return torch.randn(3, 5, SIZE, generator=torch.Generator().manual_seed(3))


def adapted(base: nn.Module, targets: list[str], dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    config = SemuConfig(**{"target_modules": targets, "r": 3, "init_weights": False, **options})
    model = get_peft_model(base.to(dtype), config)
    for layer in semu_layers(model).values():
        layer.semu_core["default"].data.mul_(5)
    return model.eval()


GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "extra_key": {"add_bias_kv": True, "add_zero_attn": True},
    "separate": {"kdim": 6, "vdim": 6},
}


@pytest.mark.parametrize("core", ["full", "diagonal"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_projection_is_corrected(geometry: str, core: str) -> None:
    """With a graph and without, the attention is the one at W + U R Vᵀ for each of its matrices."""
    base = block(**GEOMETRIES[geometry]).double()
    model, x = adapted(copy.deepcopy(base), ["attn"], torch.float64, core=core), inputs().double()
    expected = ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if geometry == "separate" else ["in_proj_weight"]
    assert sorted(semu_layers(model)) == sorted(f"0.attn.{name}" for name in [*expected, "out_proj.weight"])
    reference = copy.deepcopy(base)
    for name, layer in semu_layers(model).items():
        left, right = layer.semu_U["default"], layer.semu_V["default"]
        matrix = layer.get_core("default").detach()
        reference.get_parameter(name).data += torch.einsum("op,pq,iq->oi", left, matrix, right)
    reference.requires_grad_(True)
    output, dense = model(x), reference(x)
    torch.testing.assert_close(output, dense)
    torch.testing.assert_close(run(model, x), run(reference, x))
    output.square().sum().backward()
    dense.square().sum().backward()
    for name, layer in semu_layers(model).items():
        gradient = layer.semu_U["default"].mT @ reference.get_parameter(name).grad @ layer.semu_V["default"]
        gradient = gradient.diagonal() if core == "diagonal" else gradient
        torch.testing.assert_close(layer.semu_core["default"].grad, gradient)
        assert layer.base_weight.grad is None and isinstance(layer.base_weight, nn.Parameter)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_doing_nothing_is_bit_identical(geometry: str, dtype: torch.dtype) -> None:
    """Uninitialised, of zero core or switched off: the attention is the base model's, also on its fused path."""
    for options in ({"init_weights": True, "r": None}, {}):
        # Frozen as it will be: PyTorch chooses its attention kernel by that, too.
        base, x = block(**GEOMETRIES[geometry]).to(dtype).requires_grad_(False), inputs().to(dtype)
        expected = run(base, x)
        model = adapted(base, ["attn"], dtype, **options)
        with model.disable_adapter():
            assert torch.equal(run(model, x), expected)
        for layer in semu_layers(model).values():
            assert layer.semu_core["default"].dtype == layer.semu_U["default"].dtype == torch.float32
            layer.semu_core["default"].data.zero_()
        assert torch.equal(run(model, x), expected)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_saved_loaded_merged(geometry: str, tmp_path: Path) -> None:
    """Saving, loading, merging, unmerging and unloading keep the output, and give the module back."""
    options, x = GEOMETRIES[geometry], inputs()
    model = adapted(block(**options), ["attn"])
    plain, expected = run(block(**options), x), run(model, x)
    assert (expected - plain).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(block(**options), tmp_path)
    assert torch.equal(run(loaded, x), expected)
    loaded.add_adapter("other", SemuConfig(target_modules=["attn"], r=2, init_weights=False))
    loaded.base_model.set_adapter(["default", "other"])
    both = run(loaded, x)
    torch.testing.assert_close(run(copy.deepcopy(loaded).merge_and_unload(), x), both, atol=1e-5, rtol=0)
    model.merge_adapter()
    assert torch.equal(run(model, x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(run(copy.deepcopy(model).unload(), x), plain, atol=1e-5, rtol=0)
    merged = model.merge_and_unload()
    assert type(merged[0].attn) is nn.MultiheadAttention
    assert merged.state_dict().keys() == block(**options).state_dict().keys()
    torch.testing.assert_close(run(merged, x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("geometry", ["plain", "separate"])
def test_there_is_no_lora(geometry: str) -> None:
    """PEFT's LoRA adds the output projection's correction twice: the export is refused, and says so."""
    with pytest.raises(ValueError, match="'0.attn.*twice.*merge_and_unload"):
        to_lora(adapted(block(**GEOMETRIES[geometry]), ["attn", "fc"]))


def test_initialisation() -> None:
    """Each matrix gets the leading directions of its own gradient."""
    x, reference = inputs(), block().eval()
    run(reference, x)
    reference(x).square().mean().backward()
    model = get_peft_model(block(), SemuConfig(target_modules=["attn"], explained_variance=0.8))
    profile = initialize_semu_weights(model, [x], lambda m, b: m(b).square().mean(), progress=False)
    for name, layer in semu_layers(model).items():
        left, _, _ = torch.linalg.svd(reference.get_parameter(name).grad)
        basis, left = layer.semu_U["default"], left[:, : profile.ranks[name]]
        torch.testing.assert_close(basis @ basis.mT, left @ left.mT, atol=1e-4, rtol=0)


def test_training_before_initialisation() -> None:
    model = get_peft_model(block(), SemuConfig(target_modules=["attn"]))
    with pytest.raises(RuntimeError, match="initialize_semu_weights"):
        model(inputs()).sum().backward()


def test_the_output_projection_alone_is_refused() -> None:
    """Its forward is never called, so that a correction of it alone would be ignored."""
    model = block()
    before = Snapshot.of(model)
    with pytest.raises(TypeError, match="out_proj.*target the attention module itself"):
        get_peft_model(model, SemuConfig(target_modules=["fc", "out_proj"]))
    with pytest.raises(TypeError, match="in_proj_weight.*as a whole"):
        get_peft_model(model, SemuConfig(target_modules=[], target_parameters=["attn.in_proj_weight"]))
    before.assert_same(model)


# ---- inside nn.TransformerEncoder, whose fused kernel reads the weights of its parts ----

PARTS = [["linear1"], ["linear2"], ["self_attn"], ["self_attn", "linear1", "linear2"], ["1.linear2"]]


@pytest.mark.parametrize("targets", PARTS, ids=" ".join)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_no_fused_path_past_a_correction(targets: list[str], padded: bool, mode: str) -> None:
    """In every mode, eval with gradients included, the encoder computes as its merged weights do, and trains."""
    x = inputs()
    padding = torch.arange(5).expand(3, 5) >= torch.tensor([[3], [5], [4]]) if padded else None
    kept = ~padding if padded else torch.ones(3, 5, dtype=torch.bool)
    model = adapted(encoder(), targets)
    merged = copy.deepcopy(model).merge_and_unload()
    plain = encoder()
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
    with context():
        output = model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        expected = merged(x, src_key_padding_mask=padding)
        assert (expected - plain(x, src_key_padding_mask=padding))[kept].abs().max() > 0.05
    torch.testing.assert_close(output[kept], expected[kept], atol=1e-5, rtol=0)
    if mode == "grad":
        output[kept].square().sum().backward()
        assert all(layer.semu_core["default"].grad.abs().max() > 0 for layer in semu_layers(model).values())
    elif padded:
        assert not output[~kept].any() and not expected[~kept].any()


def test_the_encoder_comes_back_without_hooks() -> None:
    """Merged or refused, no hook and no setting stays behind."""
    base = encoder()
    model = adapted(base, ["linear1", "self_attn"])
    model(inputs(), src_key_padding_mask=torch.zeros(3, 5, dtype=torch.bool)).sum().backward()
    merged = model.merge_and_unload()
    for module in merged.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert merged.use_nested_tensor and "nests_in_inference" not in vars(merged)


def test_decoder() -> None:
    """Self- and cross-attention of `nn.TransformerDecoderLayer`."""
    torch.manual_seed(0)
    base = nn.TransformerDecoderLayer(SIZE, HEADS, 12, dropout=0.0, batch_first=True)
    model = adapted(nn.ModuleDict({"decoder": base}), ["self_attn", "multihead_attn"]).base_model.model["decoder"]
    x, memory = inputs(), inputs().flip(0)
    plain = nn.TransformerDecoderLayer(SIZE, HEADS, 12, dropout=0.0, batch_first=True)
    plain.load_state_dict(
        {key.replace("base_layer.", ""): v for key, v in model.state_dict().items() if "semu" not in key}
    )
    before = run(plain, x, memory)
    for name in ("self_attn", "multihead_attn"):
        for parameter in ("in_proj_weight", "out_proj.weight"):
            delta = getattr(model, name).wrapper_of(parameter).get_delta_weight("default").detach()
            plain.get_parameter(f"{name}.{parameter}").data += delta
    torch.testing.assert_close(run(model, x, memory), run(plain, x, memory), atol=1e-5, rtol=0)
    assert (run(model, x, memory) - before).abs().max() > 0.05


@pytest.mark.skipif(torch.__version__ < (2, 8), reason="torch 2.7 breaks the graph around the attention's weights")
def test_compiles_into_one_graph() -> None:
    """`torch.compile` follows the corrected weights without a break, forward and backward."""
    model, x = adapted(block(), ["attn", "fc"]), inputs()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, x), run(model, x), atol=1e-5, rtol=0)
    compiled(x).square().sum().backward()
    compiled_gradients = [layer.semu_core["default"].grad.clone() for layer in semu_layers(model).values()]
    model.zero_grad()
    model(x).square().sum().backward()
    for layer, gradient in zip(semu_layers(model).values(), compiled_gradients, strict=True):
        torch.testing.assert_close(layer.semu_core["default"].grad, gradient, atol=1e-4, rtol=1e-4)
