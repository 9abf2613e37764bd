"""The forward pass: beside the weight or inside it, by the shapes, with the same result; compiled without a break."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from semu_peft import SemuConfig
from semu_peft.tuner.adapted import semu_layers
from semu_peft.tuner.cost import dense_is_cheaper


def adapted(base: nn.Module, rank: int, **settings: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(copy.deepcopy(base)), SemuConfig(target_modules=["0"], r=rank, init_weights=False, **settings)
    )
    return model, semu_layers(model)["0"]


def saved_sizes(model: nn.Module, x: Tensor) -> list[torch.Size]:
    """Shapes of what autograd keeps for the backward pass."""
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sizes


def test_the_rule() -> None:
    """Small ranks and few positions stay beside the weight; large ranks on many positions join it."""
    assert not dense_is_cheaper(768, 768, 16, 10**6)
    assert not dense_is_cheaper(768, 768, 768, 1)
    assert dense_is_cheaper(768, 768, 768, 10**4)


LINEAR, CONV = nn.Linear(24, 20), nn.Conv2d(6, 20, 3, padding=1)


@pytest.mark.parametrize(
    ("base", "x"), [(LINEAR, torch.randn(4, 300, 24)), (CONV, torch.randn(9, 6, 12, 12))], ids=["linear", "conv"]
)
def test_both_ways_are_one(base: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rank where the rule changes sides: the output, the input's and the core's gradient agree."""
    model, layer = adapted(base, 18)
    assert layer.joins_weight(["default"], x) and not layer.joins_weight(["default"], x[:1, :1])
    results = []
    for inside in (True, False):
        monkeypatch.setattr(type(layer), "joins_weight", lambda self, names, x, inside=inside: inside)
        y = x.clone().requires_grad_(True)
        output = model(y)
        model.zero_grad()
        output.square().sum().backward()
        results.append((output.detach(), y.grad, layer.semu_core["default"].grad.clone()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("base", "x"), [(LINEAR, torch.randn(7, 24)), (CONV, torch.randn(2, 6, 8, 8))], ids=["linear", "conv"]
)
def test_no_dense_weight_gradient_beside_the_weight(base: nn.Module, x: Tensor) -> None:
    """Autograd's graph of a factored layer holds no tensor that would let it make one: neither W + ΔW nor its like."""
    model, layer = adapted(base, 2)
    assert not layer.joins_weight(["default"], x)
    output = model(x)
    seen, stack, made = set(), [output.grad_fn], []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        made.append(node.name())
        stack.extend(following for following, _ in node.next_functions)
        variable = getattr(node, "variable", None)
        assert variable is None or variable is layer.semu_core["default"]
    # A convolution's node that saw a trained or computed weight of the base's shape would form its gradient.
    dense = sum(size == base.weight.shape for size in saved_sizes(model, x.requires_grad_(True)))
    assert dense <= 1, made  # the frozen weight itself, for the input's gradient


def test_the_input_is_not_kept_for_the_correction() -> None:
    """With nothing else to keep it, a linear layer's input is free after the forward pass; LoRA keeps it."""
    model, _ = adapted(nn.Linear(24, 20), 2)
    sizes = saved_sizes(model, torch.randn(50, 24, requires_grad=True))
    assert torch.Size([50, 24]) not in sizes and torch.Size([50, 2]) in sizes


@pytest.mark.parametrize("rank", [2, 18])
@pytest.mark.parametrize("core", ["full", "diagonal"])
@pytest.mark.parametrize(
    ("base", "x", "settings"),
    [
        (LINEAR, torch.randn(400, 24), {}),
        (CONV, torch.randn(3, 6, 12, 12), {}),
        (CONV, torch.randn(3, 6, 8, 8), {"conv_mode": "per_channel"}),
        (nn.Conv2d(6, 20, 3, groups=2), torch.randn(3, 6, 8, 8), {}),
    ],
    ids=["linear", "conv", "conv_per_channel", "conv_groups"],
)
def test_compiles_without_a_graph_break(
    base: nn.Module, x: Tensor, settings: dict[str, str], core: str, rank: int
) -> None:
    """`fullgraph=True` raises at any break; outputs and gradients are those of the eager layer, in both modes."""
    torch._dynamo.reset()
    model, layer = adapted(base, rank, core=core, **settings)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append(layer.semu_core["default"].grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)


def test_inactive_adapters_cost_nothing() -> None:
    """The layer looks at its active adapters only: the graph compiled for one serves however many others there are."""
    torch._dynamo.reset()
    model, _ = adapted(LINEAR, 2)
    calls = []

    def count(graph: Any, inputs: list[Tensor]) -> Any:
        calls.append(len(list(graph.graph.nodes)))
        return graph.forward

    nodes = []
    for index in range(3):
        torch._dynamo.reset()
        calls.clear()
        torch.compile(model, fullgraph=True, backend=count)(torch.randn(5, 24))
        nodes.append(calls[0])
        model.add_adapter(f"other{index}", SemuConfig(target_modules=["0"], r=2, init_weights=False))
    assert len(set(nodes)) == 1


@pytest.mark.parametrize(
    ("base", "shape", "settings"),
    [(LINEAR, (24,), {}), (CONV, (6, 12, 12), {}), (CONV, (6, 12, 12), {"conv_mode": "per_channel"})],
    ids=["linear", "conv", "per channel"],
)
def test_one_graph_for_every_batch_size(base: nn.Module, shape: tuple[int, ...], settings: dict[str, Any]) -> None:
    """On both sides of the rule's threshold: exported at all, and compiled as often as the base layer is."""
    model, _ = adapted(base, 4 if settings else 18, **settings)
    model = model.eval().requires_grad_(False)
    batches = [torch.randn(size, *shape) for size in (3, 5, 40, 3000)]
    size = torch.export.Dim("size", min=1, max=4096)
    exported = torch.export.export(model.base_model.model, (batches[0],), dynamic_shapes=({0: size},)).module()
    counts = []
    for subject in (base, model):
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(subject, backend=counter, dynamic=True, fullgraph=True)
        for x in batches:
            torch.testing.assert_close(compiled(x), subject(x), atol=1e-4, rtol=1e-4)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]
    for x in batches:
        torch.testing.assert_close(exported(x), model(x), atol=1e-4, rtol=1e-4)
