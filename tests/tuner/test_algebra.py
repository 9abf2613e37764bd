"""The layers' arithmetic against dense references that are written out independently."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from semu_peft import SemuConfig, SemuLayer
from semu_peft.tuner import Conv2d, Linear, ParamWrapper
from semu_peft.tuner.targets import layer_class

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CONVOLUTIONS: dict[type[nn.Module], dict[str, dict[str, Any]]] = {
    nn.Conv1d: {
        "plain": {"kernel_size": 3, "stride": 2, "padding": 1},
        "same_groups": {"kernel_size": 3, "padding": "same", "dilation": 2, "groups": 2},
        "depthwise_circular": {"kernel_size": 4, "padding": 2, "padding_mode": "circular", "groups": 4, "bias": False},
    },
    nn.Conv2d: {
        "plain": {"kernel_size": 3},
        "pointwise": {"kernel_size": 1},
        "no_bias": {"kernel_size": 3, "bias": False},
        "rectangular": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
        "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
        "valid": {"kernel_size": 2, "padding": "valid"},
        "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
        "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
        "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "stride": 2},
        "replicate_groups": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "groups": 2},
    },
    nn.Conv3d: {
        "plain": {"kernel_size": (2, 3, 1), "stride": (1, 2, 1), "padding": (1, 0, 0)},
        "groups_dilated": {"kernel_size": 2, "padding": 1, "dilation": (1, 2, 1), "groups": 2},
        "replicate": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    },
}


class ScaledEmbedding(nn.Embedding):
    """As Gemma has it."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("embed_scale", torch.tensor(2.5), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale.to(self.weight.dtype)


class Experts(nn.Module):
    """Three experts in one parameter, `(3, N, in)` to `(3, N, out)`."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = nn.Parameter(torch.randn(3, 7, 5) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,eni->eno", self.bank, x)


BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 7),
    "linear_no_bias": lambda: nn.Linear(6, 3, bias=False),
    "transposed": lambda: Conv1D(7, 5),
    **{
        f"{kind.__name__.lower()}_{name}": lambda kind=kind, options=options: kind(4, 8, **options)
        for kind, geometries in CONVOLUTIONS.items()
        for name, options in geometries.items()
    },
    "embedding": lambda: nn.Embedding(9, 5),
    "embedding_sparse": lambda: nn.Embedding(4, 6, sparse=True),
    "embedding_scaled": lambda: ScaledEmbedding(9, 5),
    "experts": Experts,
}
CASES = [
    pytest.param(name, mode, core, id=f"{name}-{mode}-{core}")
    for name in BASES
    for mode in (("flatten", "per_channel") if name.startswith("conv") else ("flatten",))
    for core in ("full", "diagonal")
]
every_case = pytest.mark.parametrize(("name", "mode", "core"), CASES)
# Every geometry in float32; in the other dtypes with the full core, which shares its arithmetic with the diagonal one.
every_case_and_dtype = pytest.mark.parametrize(
    ("name", "mode", "core", "dtype"),
    [
        pytest.param(*case.values, dtype, id=f"{case.id}-{str(dtype).removeprefix('torch.')}")
        for dtype in DTYPES
        for case in CASES
        if dtype == torch.float32 or case.values[2] == "full"
    ],
)


def make(
    name: str, mode: str = "flatten", core: str = "full", dtype: torch.dtype = torch.float32, rank: int = 3, **kw: Any
) -> tuple[SemuLayer, Tensor]:
    """A layer over a frozen base with a random adapter, and an input for it."""
    base = BASES[name]().to(dtype).requires_grad_(False)
    if isinstance(base, Conv1D):
        nn.init.normal_(base.bias)
    config = SemuConfig(conv_mode=mode, core=core, **{"r": rank, "init_weights": False, **kw})
    if isinstance(base, Experts):
        layer: SemuLayer = ParamWrapper(base, "default", config, "layer", parameter_name="bank")
    else:
        layer = layer_class(base, name)(base, "default", config, "layer")
    x = sample_input(base)
    return layer, x.to(dtype) if x.is_floating_point() else x


def sample_input(base: nn.Module) -> Tensor:
    if is_convolution(base):
        return torch.randn(2, 4, *(7, 6, 5)[: base.weight.dim() - 2])
    if isinstance(base, nn.Embedding):
        return torch.randint(base.num_embeddings, (3, 4))
    return torch.randn(3, 4, 5) if isinstance(base, Experts) else torch.randn(2, 3, features(base))


def weight_of(base: nn.Module) -> Any:
    return base.bank if isinstance(base, Experts) else base.weight


def double(x: Tensor) -> Tensor:
    """Activations in float64; tokens as they are."""
    return x.double() if x.is_floating_point() else x


def is_convolution(base: nn.Module) -> bool:
    return isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def features(base: nn.Module) -> int:
    return base.nx if isinstance(base, Conv1D) else base.in_features


def factors(layer: SemuLayer, adapter: str = "default") -> tuple[Tensor, Tensor, Tensor]:
    """U, R as full matrices, V: in float64, and V's rows in the shape of the inputs that they stand for."""
    left, right = layer.semu_U[adapter].double(), layer.semu_V[adapter].double()
    core = layer.semu_core[adapter].detach().double()
    if layer.configs[adapter].core == "diagonal":
        core = core.unsqueeze(-1) * torch.eye(core.shape[-1], dtype=core.dtype)
    base = layer.get_base_layer()
    if is_convolution(base):
        kernel = base.weight.shape[2:]
        if layer.configs[adapter].conv_mode == "per_channel":
            right = right.reshape(right.shape[0], *kernel, -1)
        else:
            right = right.reshape(base.weight.shape[1], *kernel, -1)
    return left, core, right


def dense_delta(layer: SemuLayer, adapter: str = "default") -> Tensor:
    """U R Vᵀ in the shape of the base weight, in float64."""
    left, core, right = factors(layer, adapter)
    base = layer.get_base_layer()
    if isinstance(base, Conv1D):
        return torch.einsum("op,pq,iq->io", left, core, right)
    if isinstance(base, (nn.Linear, nn.Embedding)):
        return torch.einsum("op,pq,iq->oi", left, core, right)
    if isinstance(base, Experts):
        return torch.einsum("eop,epq,eiq->eoi", left, core, right)
    if layer.configs[adapter].conv_mode == "per_channel":
        return torch.einsum("iop,ipq,i...q->oi...", left, core, right)
    return torch.einsum("op,pq,i...q->oi...", left, core, right)


def projected(layer: SemuLayer, gradient: Tensor, adapter: str = "default") -> Tensor:
    """Uᵀ G V, the gradient of R, from the gradient of the dense weight."""
    left, _, right = factors(layer, adapter)
    gradient = gradient.to_dense()
    base = layer.get_base_layer()
    if isinstance(base, Conv1D):
        result = torch.einsum("op,io,iq->pq", left, gradient, right)
    elif isinstance(base, (nn.Linear, nn.Embedding)):
        result = torch.einsum("op,oi,iq->pq", left, gradient, right)
    elif isinstance(base, Experts):
        result = torch.einsum("eop,eoi,eiq->epq", left, gradient, right)
    elif layer.configs[adapter].conv_mode == "per_channel":
        result = torch.einsum("iop,oik,ikq->ipq", left, gradient.flatten(2), right.flatten(1, -2))
    else:
        result = torch.einsum("op,oik,ikq->pq", left, gradient.flatten(2), right.flatten(1, -2))
    return result.diagonal(dim1=-2, dim2=-1) if layer.configs[adapter].core == "diagonal" else result


def dense(layer: SemuLayer, delta: Tensor | float) -> nn.Module:
    """The base layer in float64 with `delta` added to its weight."""
    reference = copy.deepcopy(layer.get_base_layer()).double()
    weight_of(reference).data += delta
    return reference


def tolerance(layer: SemuLayer, x: Tensor, dtype: torch.dtype) -> float:
    """A few roundings of the largest sum of absolute terms that the layer's output could be made of."""
    reference = dense(layer, 0.0)
    delta = sum((dense_delta(layer, name).abs() for name in layer.semu_core), torch.zeros(()))
    for parameter in reference.parameters():
        parameter.data.abs_()
    weight_of(reference).data += delta
    return 8 * torch.finfo(dtype).eps * float(reference(double(x).abs()).max())


def assert_close(actual: Tensor, expected: Tensor, atol: float) -> None:
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    assert (actual.double() - expected).abs().max() <= atol


@every_case
def test_delta_weight_is_u_r_v(name: str, mode: str, core: str) -> None:
    """`get_delta_weight` is U R Vᵀ in the shape of the weight, and has the norm of R since U and V are orthonormal."""
    layer, _ = make(name, mode, core)
    delta = layer.get_delta_weight("default")
    assert delta.shape == weight_of(layer.base_layer).shape
    torch.testing.assert_close(delta.double(), dense_delta(layer), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(delta.norm(), layer.semu_core["default"].norm(), atol=1e-6, rtol=1e-5)


@every_case_and_dtype
def test_forward_is_the_base_layer_with_the_dense_sum(name: str, mode: str, core: str, dtype: torch.dtype) -> None:
    """`layer(x)` is the base layer's output at the weight W + U R Vᵀ, in the base layer's dtype."""
    layer, x = make(name, mode, core, dtype)
    output = layer(x)
    assert output.dtype == dtype
    assert_close(output, dense(layer, dense_delta(layer))(double(x)), tolerance(layer, x, dtype))
    assert not torch.equal(output, layer.base_layer(x))


@every_case_and_dtype
def test_gradients_are_those_of_the_dense_weight(name: str, mode: str, core: str, dtype: torch.dtype) -> None:
    """∂L/∂R = Uᵀ G V with G the dense weight's gradient, ∂L/∂x as for the dense weight, and nothing else gets one."""
    layer, x = make(name, mode, core, dtype)
    x.requires_grad_(x.is_floating_point())
    upstream = torch.randn_like(layer(x))
    layer(x).backward(upstream)

    reference = dense(layer, dense_delta(layer)).requires_grad_(True)
    x_dense = double(x.detach()).requires_grad_(x.requires_grad)
    reference(x_dense).backward(upstream.double())

    gradient = layer.semu_core["default"].grad
    assert gradient is not None
    expected = projected(layer, weight_of(reference).grad)
    eps = torch.finfo(dtype).eps
    assert gradient.dtype == layer.semu_core["default"].dtype
    assert_close(gradient, expected, 40 * eps * float(weight_of(reference).grad.to_dense().abs().max()))
    if x.requires_grad:
        assert x.grad is not None and x_dense.grad is not None
        assert_close(x.grad, x_dense.grad, 40 * eps * max(1.0, float(x_dense.grad.abs().max())))
    assert all(parameter.grad is None for parameter in layer.base_layer.parameters())


@every_case
def test_only_the_core_is_trained(name: str, mode: str, core: str) -> None:
    """U and V have orthonormal columns and take no gradient, whatever is told their flags; R alone is trained."""
    layer, x = make(name, mode, core)
    parameters = {key: p for key, p in layer.named_parameters() if not key.startswith("base_layer.")}
    assert set(parameters) == {f"semu_{kind}.default.semu_{kind}" for kind in ("U", "V", "core")}
    assert [key for key, p in parameters.items() if p.requires_grad] == ["semu_core.default.semu_core"]
    layer.requires_grad_(True)
    layer(x).sum().backward()
    assert [key for key, p in parameters.items() if p.grad is not None] == ["semu_core.default.semu_core"]
    for basis in (layer.semu_U["default"], layer.semu_V["default"]):
        assert not basis.requires_grad
        identity = torch.eye(basis.shape[-1]).expand(*basis.shape[:-2], -1, -1)
        torch.testing.assert_close(basis.mT @ basis, identity, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["linear", "transposed"])
def test_backward_keeps_no_copy_of_the_input(name: str) -> None:
    """What autograd keeps of a frozen linear layer with an adapter are the thin activations, never the input."""
    layer, _ = make(name, rank=1)
    x = torch.randn(50, features(layer.base_layer), requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    activations = [tensor for tensor in kept if 50 in tensor.shape]
    assert activations and all(tensor.numel() <= 50 for tensor in activations)


@every_case_and_dtype
def test_a_core_of_zeros_is_bit_identical(name: str, mode: str, core: str, dtype: torch.dtype) -> None:
    """With R = 0 the output is the base layer's to the last bit, with and without a graph."""
    layer, x = make(name, mode, core, dtype)
    layer.semu_core["default"].data.zero_()
    assert torch.equal(layer(x), layer.base_layer(x))
    with torch.no_grad():
        assert torch.equal(layer(x), layer.base_layer(x))


@every_case_and_dtype
def test_an_uninitialised_adapter_is_bit_identical(name: str, mode: str, core: str, dtype: torch.dtype) -> None:
    """Before its initialisation an adapter has rank 0, does nothing, and merges to the same weight."""
    layer, x = make(name, mode, core, dtype, r=None, init_weights=True)
    weight = weight_of(layer.base_layer).clone()
    assert layer.r["default"] == 0 and not layer.is_initialized("default")
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not layer.get_delta_weight("default").any()
    layer.merge()
    assert torch.equal(weight_of(layer.base_layer), weight)
    layer.unmerge()
    assert torch.equal(weight_of(layer.base_layer), weight)


@pytest.mark.parametrize(("name", "mode"), [("linear", "flatten"), ("conv2d_plain", "flatten")])
def test_a_core_of_zeros_survives_large_half_precision_activations(name: str, mode: str) -> None:
    """With R = 0 a float16 output stays the base layer's where the sum x V alone would overflow float16."""
    layer, x = make(name, mode, dtype=torch.float16, rank=1)
    weight_of(layer.base_layer).data.mul_(1e-3)
    layer.semu_core["default"].data.zero_()
    right = layer.semu_V["default"]
    layer.semu_V["default"] = torch.full_like(right, right.shape[0] ** -0.5)
    x = torch.full_like(x, 40000.0)
    assert torch.isfinite(layer.base_layer(x)).all()
    assert torch.equal(layer(x), layer.base_layer(x))


@every_case_and_dtype
def test_merge_and_unmerge(name: str, mode: str, core: str, dtype: torch.dtype) -> None:
    """Merging adds ΔW to the weight once, rounded once; the output stays; unmerging takes it out again."""
    layer, x = make(name, mode, core, dtype)
    base = layer.base_layer
    weight, expected = weight_of(base).clone(), layer(x)
    eps = torch.finfo(dtype).eps
    layer.merge(safe_merge=True)
    merged = weight_of(base).clone()
    assert merged.dtype == dtype
    target = weight.double() + dense_delta(layer)
    assert ((merged.double() - target).abs() <= eps * target.abs() + 1e-6).all()
    assert_close(layer(x), expected.double(), 2 * tolerance(layer, x, dtype))
    layer.merge()
    assert torch.equal(weight_of(base), merged), "merged twice"
    layer.unmerge()
    assert not layer.merged
    assert ((weight_of(base) - weight).abs() <= 2 * eps * (weight.abs() + merged.abs()) + 1e-9).all()
    assert_close(layer(x), expected.double(), 2 * tolerance(layer, x, dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["linear", "transposed", "conv2d_groups", "embedding_scaled", "experts"])
def test_safe_merge_refuses_a_broken_core(name: str, value: float) -> None:
    """A core that is not finite is not merged: the error names the adapter and the weight is unchanged."""
    layer, _ = make(name)
    layer.semu_core["default"].data.view(-1)[0] = value
    weight = weight_of(layer.base_layer).clone()
    with pytest.raises(ValueError, match="default"):
        layer.merge(safe_merge=True)
    assert torch.equal(weight_of(layer.base_layer), weight) and not layer.merged


def test_safe_merge_of_several_adapters_is_all_or_nothing() -> None:
    """When the second of two adapters is broken, the first is not merged either."""
    layer, _ = make("linear")
    layer.update_layer("broken", SemuConfig(r=2, init_weights=False))
    layer.semu_core["broken"].data.fill_(float("nan"))
    weight = weight_of(layer.base_layer).clone()
    with pytest.raises(ValueError, match="broken"):
        layer.merge(safe_merge=True, adapter_names=["default", "broken"])
    assert torch.equal(weight_of(layer.base_layer), weight) and not layer.merged


@pytest.mark.parametrize("mode", ["flatten", "per_channel"])
@pytest.mark.parametrize("name", ["linear", "transposed", "conv2d_groups", "embedding_scaled", "experts"])
def test_scale_dials_the_correction(name: str, mode: str) -> None:
    """At scale s the layer computes with W + s ΔW, merges so, and at scale 0 is the base layer to the last bit."""
    layer, x = make(name, mode, dtype=torch.float64)
    for set_to, scale in (
        (lambda: layer.set_scale("default", 0.5), 0.5),
        (lambda: layer.scale_layer(-3.0), -1.5),
        (lambda: layer.unscale_layer(-3.0), 0.5),
        (lambda: layer.unscale_layer(), 1.0),
    ):
        set_to()
        torch.testing.assert_close(layer(x), dense(layer, scale * dense_delta(layer))(x))
    layer.set_scale("default", 0.25)
    weight = weight_of(layer.base_layer).clone()
    layer.merge()
    torch.testing.assert_close(weight_of(layer.base_layer).data, weight + 0.25 * dense_delta(layer))
    layer.unmerge()
    layer.set_scale("default", 0.0)
    layer.set_scale("no such adapter", 2.0)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("modes", [("flatten", "flatten"), ("per_channel", "per_channel"), ("flatten", "per_channel")])
@pytest.mark.parametrize("name", ["linear", "transposed", "conv2d_plain", "conv2d_depthwise", "embedding", "experts"])
def test_two_active_adapters_add_up(name: str, modes: tuple[str, str]) -> None:
    """Two active adapters of different rank, core and mode correct by the sum, forward, merged and in gradients."""
    layer, x = make(name, modes[0], dtype=torch.float64)
    layer.update_layer("other", SemuConfig(r=2, init_weights=False, conv_mode=modes[1], core="diagonal"))
    assert layer.active_adapters == ["default"]
    torch.testing.assert_close(layer(x), dense(layer, dense_delta(layer))(x))
    layer.set_adapter(["default", "other"])
    reference = dense(layer, dense_delta(layer) + dense_delta(layer, "other")).requires_grad_(True)
    expected = reference(x)
    output = layer(x)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    for adapter in ("default", "other"):
        torch.testing.assert_close(
            layer.semu_core[adapter].grad, projected(layer, weight_of(reference).grad, adapter), atol=1e-9, rtol=1e-7
        )
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    layer.set_adapter("other")
    torch.testing.assert_close(layer(x), dense(layer, dense_delta(layer, "other"))(x))
    assert [layer.semu_core[key].requires_grad for key in ("default", "other")] == [False, True]


@every_case
def test_disabled_adapters_are_bit_identical(name: str, mode: str, core: str) -> None:
    """Switched off, also while merged, the layer is the base layer."""
    layer, x = make(name, mode, core, torch.float64)
    expected = layer.base_layer(x)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected)
    layer.enable_adapters(True)
    layer.merge()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), expected)


@every_case
def test_weight_and_matrix_are_inverse(name: str, mode: str, core: str) -> None:
    """`matrix_to_weight` undoes `weight_to_matrix`, whose matrices have the shapes of the bases."""
    layer, _ = make(name, mode, core)
    weight = weight_of(layer.base_layer)
    matrix = layer.weight_to_matrix(weight, "default")
    assert matrix.shape[-2:] == (layer.semu_U["default"].shape[-2], layer.semu_V["default"].shape[-2])
    assert torch.equal(layer.matrix_to_weight(matrix, "default"), weight)


@pytest.mark.parametrize(("name", "mode"), [("linear", "flatten"), ("conv2d_groups", "per_channel")])
def test_set_basis_checks_shapes(name: str, mode: str) -> None:
    """A basis or core of the wrong shape is refused by name, and the adapter stays as it was."""
    layer, _ = make(name, mode)
    left, right, core = layer.semu_U["default"], layer.semu_V["default"], layer.semu_core["default"].data
    for which, arguments in (
        ("left", (left[..., 1:, :], right)),
        ("right", (left, right[..., :2])),
        ("core", (left, right, core[..., :1])),
    ):
        with pytest.raises(ValueError, match=f"`{which}`"):
            layer.set_basis("default", *arguments)
    assert layer.semu_U["default"] is left and layer.semu_V["default"] is right


@pytest.mark.parametrize("mode", ["flatten", "per_channel"])
@pytest.mark.parametrize("name", ["linear", "transposed", "conv2d_groups", "embedding_scaled", "experts"])
def test_autocast(name: str, mode: str) -> None:
    """Under bfloat16 autocast the layer is right to bfloat16, a zero core is bit-identical, R's gradient is float32."""
    layer, x = make(name, mode)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
        expected = layer.base_layer(x).dtype
    assert output.dtype == expected == (torch.bfloat16 if x.is_floating_point() else torch.float32)
    atol = tolerance(layer, x, torch.bfloat16)
    assert_close(output, dense(layer, dense_delta(layer))(double(x)), atol)
    output.float().sum().backward()
    assert layer.semu_core["default"].grad.dtype == torch.float32
    layer.semu_core["default"].data.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer.base_layer(x))


def test_autocast_keeps_the_digits_of_an_output_in_float32() -> None:
    """A layer that leaves autocast for itself keeps its precision: only the correction is rounded."""

    class Careful(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().forward(input)

    layer = Linear(Careful(5, 7), "default", SemuConfig(r=2, init_weights=False))
    x = torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        corrected = layer(x)
    layer.semu_core["default"].data.zero_()
    with torch.autocast("cpu", torch.bfloat16):  # anew, as it keeps its casts of parameters
        assert torch.equal(layer(x), layer.base_layer(x))
    assert corrected.dtype == torch.float32 and not torch.equal(corrected, layer.base_layer(x))


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 4, 5), (0, 5)])
@pytest.mark.parametrize("name", ["linear", "transposed"])
def test_linear_takes_any_leading_dimensions(name: str, shape: tuple[int, ...]) -> None:
    """Inputs of any number of leading dimensions, none and empty ones included."""
    layer, _ = make(name, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(layer, dense_delta(layer))(x))


@pytest.mark.parametrize("mode", ["flatten", "per_channel"])
@pytest.mark.parametrize("name", ["conv1d_plain", "conv2d_groups", "conv2d_circular", "conv2d_same", "conv3d_plain"])
def test_convolution_takes_one_image_and_channels_last(name: str, mode: str) -> None:
    """An input without a batch dimension, and memory in channels-last order, which is kept."""
    layer, x = make(name, mode, dtype=torch.float64)
    reference = dense(layer, dense_delta(layer))
    torch.testing.assert_close(layer(x[0]), reference(x[0]))
    if x.dim() > 3:
        order = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        layer, x = layer.to(memory_format=order), x.to(memory_format=order)
        output = layer(x)
        torch.testing.assert_close(output, reference(x))
        assert output.stride() == reference.to(memory_format=order)(x).stride()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 9), n=st.integers(1, 9), rank=st.integers(1, 12), rows=st.integers(1, 5),
    transposed=st.booleans(), core=st.sampled_from(["full", "diagonal"]),
)  # fmt: skip
def test_linear_of_any_shape(m: int, n: int, rank: int, rows: int, transposed: bool, core: str) -> None:
    """For every shape: the rank is cut to what the matrix has, the bases are orthonormal, forward is the dense one."""
    base = (Conv1D(m, n) if transposed else nn.Linear(n, m)).double()
    layer = Linear(base, "default", SemuConfig(r=rank, init_weights=False, core=core))
    assert layer.r["default"] == min(rank, m, n) == layer.semu_U["default"].shape[-1]
    x = torch.randn(rows, n, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(layer, dense_delta(layer))(x))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    groups=st.sampled_from([1, 2, 3]), in_per_group=st.integers(1, 3), out_per_group=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)), stride=st.integers(1, 3), dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same"]), padding_mode=st.sampled_from(["zeros", "circular", "reflect"]),
    rank=st.integers(1, 10), mode=st.sampled_from(["flatten", "per_channel"]),
    core=st.sampled_from(["full", "diagonal"]),
)  # fmt: skip
def test_convolution_of_any_shape(
    groups: int, in_per_group: int, out_per_group: int, kernel: tuple[int, int], stride: int, dilation: int,
    padding: int | str, padding_mode: str, rank: int, mode: str, core: str,
) -> None:  # fmt: skip
    """For every geometry: forward is the dense one, and R's gradient is Uᵀ G V."""
    base = nn.Conv2d(
        groups * in_per_group, groups * out_per_group, kernel, stride=1 if padding == "same" else stride,
        padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode,
    ).double()  # fmt: skip
    layer = Conv2d(base, "default", SemuConfig(r=rank, init_weights=False, conv_mode=mode, core=core))
    assert layer.r["default"] == min(rank, *layer.weight_to_matrix(base.weight, "default").shape[-2:])
    x = torch.randn(2, groups * in_per_group, 7, 8, dtype=torch.float64)
    reference = dense(layer, dense_delta(layer))
    output, expected = layer(x), reference(x)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(
        layer.semu_core["default"].grad, projected(layer, weight_of(reference).grad), atol=1e-8, rtol=1e-6
    )
