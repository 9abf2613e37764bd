"""Starts: a first core that is not zero leaves the base weight, and the model's output, as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Cnn, Mlp, Snapshot, gpt2, image_batches, run, sample_input, vector_batches
from peft import PeftModel, get_peft_model
from torch import nn

from semu_peft import SemuConfig, SquaredSum, gather, initialize_semu_weights, objectives
from semu_peft.subspace.starts import LayerStart, Start, WeightSplit, Zero, fila_row_weights
from semu_peft.tuner.adapted import semu_layers

FORGET = objectives.CrossEntropy()


def case(kind: str) -> tuple[nn.Module, Any, Any, dict[str, Any]]:
    """A model, its data and objective, and the settings of an adapter for it."""
    torch.manual_seed(4)
    if kind == "gpt2":
        tokens = torch.randint(32, (3, 8))
        return gpt2(), [tokens], lambda m, b: m(b, labels=b).loss, {"target_modules": ["c_fc", "c_attn"]}
    if kind == "mlp":
        return Mlp(), vector_batches(), FORGET, {"target_modules": Mlp.targets}
    return Cnn(), image_batches(), FORGET, {"target_modules": Cnn.targets, "conv_mode": kind}


def loku(model: nn.Module, batches: Any, objective: Any) -> Start:
    """FILA's row weights, from Fisher information over batches, and the split of the weight that they give."""

    def fisher(slope: float) -> Any:
        return gather(
            model, batches, lambda m, b: slope * objective(m, b), statistic=SquaredSum.per_batch, progress=False,
            adapter_name="default",
        )  # fmt: skip

    return WeightSplit(fila_row_weights(fisher(1.0), fisher(0.1)))


@pytest.mark.parametrize("weighted", [False, True], ids=["pissa", "loku"])
@pytest.mark.parametrize("kind", ["mlp", "flatten", "per_channel", "gpt2"])
def test_a_split_of_the_weight_keeps_the_original(kind: str, weighted: bool, tmp_path: Path) -> None:
    """Off is the original bit for bit, at the start and after training; the start computes the same; it is a file."""
    base, batches, objective, settings = case(kind)
    original, x = copy.deepcopy(base), sample_input(base)
    expected = run(original, *x)
    model = get_peft_model(base, SemuConfig(r=3, **settings))
    start = loku(model, batches, objective) if weighted else WeightSplit()
    profile = initialize_semu_weights(model, batches, objective, start=start, progress=False)
    layers = semu_layers(model)
    assert all(layer.semu_core["default"].any() for layer in layers.values())
    assert profile.ranks == {name: layer.r["default"] for name, layer in layers.items()}
    torch.testing.assert_close(run(model, *x), expected, atol=1e-6, rtol=1e-5)
    optimizer = torch.optim.SGD([layer.semu_core["default"] for layer in layers.values()], lr=1.0)
    (-objective(model, batches[0])).backward()
    optimizer.step()
    assert not torch.allclose(run(model, *x), expected, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(run(model, *x), expected)
    weights = original.state_dict()
    for name, layer in layers.items():
        assert torch.equal(layer.get_base_layer().weight, weights[f"{name}.weight"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(original, tmp_path)
    torch.testing.assert_close(run(loaded, *x), run(model, *x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "per_channel"])
def test_the_split_is_filas(kind: str) -> None:
    """`U R₀ Vᵀ` is `diag(1/w) SVD_r(diag(w) W)`, and bases are orthonormal; without weights it is `SVD_r(W)`."""
    for weighted in (True, False):
        base, batches, objective, settings = case(kind)
        model = get_peft_model(base, SemuConfig(r=2, explained_variance=1.0, **settings))
        weights = {
            name: torch.rand(layer.matrix_shape("default")[:-1]) if weighted else None
            for name, layer in semu_layers(model).items()
        }
        start = WeightSplit({name: w for name, w in weights.items() if w is not None})
        initialize_semu_weights(model, batches, objective, start=start, progress=False)
        for name, layer in semu_layers(model).items():
            matrix = layer.weight_to_matrix(layer.get_base_layer().weight.detach(), "default").double()
            rows = (
                torch.ones_like(matrix[..., :1]) if weights[name] is None else weights[name].double()[..., None] + 1e-5
            )
            u, s, vh = torch.linalg.svd(rows * matrix, full_matrices=False)
            rank = layer.r["default"]
            expected = (u[..., :rank] * s[..., None, :rank] @ vh[..., :rank, :]) / rows
            left, right, core = (getattr(layer, part)["default"] for part in ("semu_U", "semu_V", "semu_offset"))
            torch.testing.assert_close((left @ core @ right.mT).double(), expected, atol=1e-4, rtol=1e-4)
            for basis in (left, right):
                identity = torch.eye(rank).expand(*basis.shape[:-2], -1, -1)
                torch.testing.assert_close(basis.mT @ basis, identity, atol=1e-5, rtol=0)


def test_row_weights_are_the_papers() -> None:
    """`√(Σ_columns F_forget / (F_retain + 1e-5))`, from the squares of plain gradients."""
    model = Mlp().eval()
    forget, retain = vector_batches(2, seed=1), vector_batches(3, seed=2)
    fisher = [
        gather(model, batches, FORGET, targets=["fc1"], statistic=SquaredSum.per_batch, progress=False)
        for batches in (forget, retain)
    ]
    means = []
    for batches in (forget, retain):
        gradients = [torch.autograd.grad(FORGET(model, batch), [model.fc1.weight])[0] for batch in batches]
        means.append(sum(gradient.square() for gradient in gradients) / len(batches))
    expected = (means[0] / (means[1] + 1e-5)).sum(1).sqrt()
    torch.testing.assert_close(fila_row_weights(*fisher)["fc1"], expected, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="differ at the layers .*'fc2'"):
        fila_row_weights(fisher[0], gather(model, retain, FORGET, targets="fc.", statistic=SquaredSum, progress=False))
    with pytest.raises(ValueError, match="'fc1' has SquaredSum and GradientSum"):
        fila_row_weights(fisher[0], gather(model, retain, FORGET, targets=["fc1"], progress=False))


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_a_start_that_is_the_core_itself(core: str) -> None:
    """Without an offset the model changes at once; the bases may be any."""

    def loud(layer: Any, directions: Any, adapter_name: str) -> LayerStart:
        shape = layer.tensor_shapes(adapter_name, directions.rank)["semu_core"]
        return LayerStart(directions.left, directions.right, core=torch.ones(shape))

    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"], core=core))
    x = torch.randn(3, 6)
    before = run(model, x)
    initialize_semu_weights(model, vector_batches(), FORGET, start=loud, progress=False)
    layer = semu_layers(model)["fc1"]
    assert not torch.allclose(run(model, x), before) and "default" not in layer.semu_offset
    quiet = initialize_semu_weights(model, vector_batches(), FORGET, start=Zero(), overwrite=True, progress=False)
    assert torch.equal(run(model, x), before) and quiet.ranks["fc1"] == layer.r["default"]


def test_a_diagonal_core_splits_the_plain_weight() -> None:
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"], core="diagonal", r=3))
    profile = initialize_semu_weights(model, vector_batches(), FORGET, start=WeightSplit(), progress=False)
    offset = semu_layers(model)["fc1"].semu_offset["default"]
    values = torch.linalg.svdvals(semu_layers(model)["fc1"].get_base_layer().weight)
    torch.testing.assert_close(offset, values[: profile.ranks["fc1"]].detach(), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="'fc1' need a full core"):
        start = WeightSplit({"fc1": torch.ones(10)})
        initialize_semu_weights(model, vector_batches(), FORGET, start=start, progress=False)


BAD: dict[str, tuple[Callable[..., Any], str]] = {
    "rows": (WeightSplit({"head": torch.ones(3)}), r"`row_weights` of layer 'head'.*\(4,\), got \(3,\)"),
    "negative": (WeightSplit({"head": -torch.ones(4)}), "finite, zero or more"),
    "core": (
        lambda layer, found, _: LayerStart(found.left, found.right, core=torch.ones(1 + found.rank, 1)),
        "`start`: the core of layer 'fc1'",
    ),
    "basis": (lambda layer, found, _: LayerStart(found.right, found.right), "`start`: the left of layer"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_start_that_does_not_fit_changes_nothing(name: str) -> None:
    """No layer is filled before all are known to fit."""
    start, message = BAD[name]
    model = get_peft_model(Mlp(), SemuConfig(target_modules=Mlp.targets))
    before, ranks = Snapshot.of(model), dict(model.peft_config["default"].ranks)
    with pytest.raises(ValueError, match=message):
        initialize_semu_weights(model, vector_batches(), FORGET, start=start, progress=False)
    before.assert_same(model)
    assert model.peft_config["default"].ranks == ranks


def test_a_profile_takes_a_start() -> None:
    """From what was kept of the forget gradient, without data."""
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"]))
    profile = initialize_semu_weights(model, vector_batches(), FORGET, progress=False)
    initialize_semu_weights(model, profile, start=WeightSplit())
    assert semu_layers(model)["fc1"].semu_offset["default"].any()
    assert not semu_layers(model)["fc1"].get_delta_weight("default").any()
    initialize_semu_weights(model, profile)  # a core at its start has learned nothing that could be lost
    assert "default" not in semu_layers(model)["fc1"].semu_offset
