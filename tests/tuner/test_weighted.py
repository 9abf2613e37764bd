"""Sums of adapters: exact where they say so, the best approximation where they cut, and refused without a trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Cnn, Mlp, Snapshot, llama, run, sample_input
from peft import PeftModel, get_peft_model
from torch import Tensor

from semu_peft import (
    SemuConfig,
    rerank,
    set_scale,
    to_lora,
)
from semu_peft.tuner.adapted import semu_layers

WEIGHTS = {"first": 0.7, "second": -1.5}
EXACT = {"atol": 1e-5, "rtol": 1e-5}


def with_two(base: Any, targets: tuple[list[str], list[str]], **options: Any) -> PeftModel:
    """Two random adapters of rank 3 and 5 on layers that overlap in part; the second one is active."""
    first, second = (
        SemuConfig(target_modules=names, r=rank, init_weights=False, **options)
        for names, rank in zip(targets, (3, 5), strict=True)
    )
    model = get_peft_model(base, first, adapter_name="first")
    model.add_adapter("second", second)
    model.set_adapter("second")
    return model.eval()


def wanted(model: PeftModel) -> dict[str, Tensor]:
    """The dense weighted sum by layer name."""
    layers = {name: layer for adapter in WEIGHTS for name, layer in semu_layers(model, adapter).items()}
    return {
        name: sum(
            weight * layer.get_delta_weight(adapter) for adapter, weight in WEIGHTS.items() if adapter in layer.r
        ).detach()
        for name, layer in layers.items()
    }


MODELS: dict[str, Any] = {
    "mlp": lambda **options: with_two(Mlp(), (["fc1", "head"], ["fc2", "head"]), **options),
    "cnn": lambda **options: with_two(Cnn(), (["conv1", "conv2"], ["conv2", "head"]), **options),
    "llama": lambda **options: with_two(llama(), (["q_proj", "up_proj"], ["up_proj", "k_proj"]), **options),
}
every_model = pytest.mark.parametrize("name", MODELS)


def assert_orthonormal(basis: Tensor) -> None:
    identity = torch.eye(basis.shape[-1]).expand(*basis.shape[:-2], -1, -1)
    torch.testing.assert_close(basis.mT @ basis, identity, atol=1e-5, rtol=0)


@every_model
@pytest.mark.parametrize("core", ["full", "diagonal"])
@pytest.mark.parametrize("conv_mode", ["flatten", "per_channel"])
def test_cat_is_exact(name: str, core: str, conv_mode: str) -> None:
    """`"cat"`: the weighted sum itself, negative weights and scales included, with orthonormal bases."""
    model = MODELS[name](core=core, conv_mode=conv_mode)
    set_scale(model, 0.5, adapter_name="second")
    dense = wanted(model)
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", combination_type="cat")
    layers = semu_layers(model, "sum")
    assert layers.keys() == dense.keys()
    for key, layer in layers.items():
        torch.testing.assert_close(layer.get_delta_weight("sum").detach(), dense[key], **EXACT)
        assert_orthonormal(layer.semu_U["sum"])
        assert_orthonormal(layer.semu_V["sum"])
        *_, m, n = layer.weight_to_matrix(layer.get_base_layer().weight, "sum").shape
        parts = [layer.r[adapter] for adapter in WEIGHTS if adapter in layer.r]
        assert layer.r["sum"] == min(sum(parts), m, n)


@every_model
def test_the_model_with_the_sum(name: str, tmp_path: Path) -> None:
    """Scaled adapters that are active together compute what their sum computes; it is saved, loaded, exported."""
    torch.manual_seed(0)
    model = MODELS[name]()
    x = sample_input(model.get_base_model())
    for adapter, weight in WEIGHTS.items():
        set_scale(model, weight, adapter_name=adapter)
    model.base_model.set_adapter(list(WEIGHTS))
    expected = run(model, *x)
    model.add_weighted_adapter(list(WEIGHTS), [1.0, 1.0], "sum", combination_type="cat")
    assert torch.equal(run(model, *x), expected), "adding is not activating"
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".sum." in key)
    model.set_adapter("sum")
    torch.testing.assert_close(run(model, *x), expected, **EXACT)
    assert any(p.requires_grad for key, p in model.named_parameters() if ".sum." in key)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    base = copy.deepcopy(model).unload()
    torch.testing.assert_close(
        run(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "sum"), *x), expected, **EXACT
    )
    config, _ = to_lora(model, adapter_name="sum")
    assert config.r > 0
    model.delete_adapter("sum")


@pytest.mark.parametrize("conv_mode", ["flatten", "per_channel"])
def test_svd_is_the_best_of_its_rank(conv_mode: str) -> None:
    """`"svd"`: the Eckart–Young approximation of the dense sum; by default of the larger rank."""
    model = MODELS["cnn"](conv_mode=conv_mode)
    dense = wanted(model)
    for rank in (2, None):
        model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), f"sum{rank}", svd_rank=rank)
        for key, layer in semu_layers(model, f"sum{rank}").items():
            matrix = layer.weight_to_matrix(dense[key], f"sum{rank}").double()
            got = layer.weight_to_matrix(layer.get_delta_weight(f"sum{rank}").detach(), f"sum{rank}").double()
            largest = max(layer.r[adapter] for adapter in WEIGHTS if adapter in layer.r)
            kept = rank or largest
            assert layer.r[f"sum{rank}"] == min(kept, *matrix.shape[-2:])
            best = torch.linalg.svdvals(matrix)[..., kept:].square().sum().sqrt()
            torch.testing.assert_close((got - matrix).norm(), best, atol=1e-5, rtol=1e-4)


def test_cat_then_rerank_cuts_by_energy() -> None:
    """The exact sum, cut to a share of its energy afterwards."""
    model = MODELS["llama"]()
    dense = wanted(model)
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", combination_type="cat")
    report = rerank(model, explained_variance=0.9, adapter_name="sum")
    assert sum(report.ranks_after.values()) < sum(report.ranks_before.values())
    for key, layer in semu_layers(model, "sum").items():
        error = (layer.get_delta_weight("sum") - dense[key]).square().sum() / dense[key].square().sum()
        assert error <= 0.1 + 1e-5


def test_linear_adds_cores_of_shared_bases() -> None:
    """`"linear"` is exact, at the same rank, for adapters with the same bases, and refused for others."""
    model = MODELS["mlp"]()
    layer = model.base_model.model.head
    basis = layer.semu_U["first"], layer.semu_V["first"]
    layer.set_basis("second", *basis, torch.randn(3, 3))
    dense = wanted(model)["head"]
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", combination_type="linear")
    assert layer.r["sum"] == 3
    torch.testing.assert_close(layer.get_delta_weight("sum").detach(), dense, **EXACT)
    other = MODELS["mlp"]()
    before = Snapshot.of(other)
    with pytest.raises(ValueError, match="'head'.*'cat'"):
        other.add_weighted_adapter(list(WEIGHTS), [1.0, 1.0], "sum", combination_type="linear")
    before.assert_same(other)
    assert list(other.peft_config) == list(WEIGHTS)


@pytest.mark.parametrize("kind", ["ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"])
def test_elementwise_rules(kind: Any) -> None:
    """With nothing pruned and one adapter, LoRA's elementwise rules are the adapter itself."""
    model = MODELS["cnn"]()
    model.add_weighted_adapter(["first"], [2.0], "sum", combination_type=kind, density=1.0)
    for layer in semu_layers(model, "sum").values():
        torch.testing.assert_close(layer.get_delta_weight("sum"), 2 * layer.get_delta_weight("first"), **EXACT)
    with pytest.raises(ValueError, match="density"):
        model.add_weighted_adapter(["first"], [2.0], "other", combination_type=kind)


def test_the_same_adapter_twice() -> None:
    """Bases that overlap stay orthonormal."""
    model = MODELS["mlp"]()
    model.add_weighted_adapter(["first", "first"], [0.25, 0.5], "sum", combination_type="cat")
    for layer in semu_layers(model, "sum").values():
        assert_orthonormal(layer.semu_U["sum"])
        torch.testing.assert_close(layer.get_delta_weight("sum"), 0.75 * layer.get_delta_weight("first"), **EXACT)


def test_a_saved_module_goes_with_its_adapter() -> None:
    """`modules_to_save` of one of the adapters is copied; of two for one module, the sum is refused as in LoRA."""
    model = with_two(Mlp(), (["fc1"], ["fc2"]))
    model.add_adapter("third", SemuConfig(target_modules=["fc2"], r=2, init_weights=False, modules_to_save=["head"]))
    head = model.base_model.model.head
    head.modules_to_save["third"].weight.data.add_(1.0)
    model.add_weighted_adapter(["first", "third"], [1.0, 1.0], "sum", combination_type="cat")
    assert torch.equal(head.modules_to_save["sum"].weight, head.modules_to_save["third"].weight)
    model.add_adapter("fourth", SemuConfig(target_modules=["fc1"], r=2, init_weights=False, modules_to_save=["head"]))
    with pytest.raises(ValueError, match="modules_to_save.*head"):
        model.add_weighted_adapter(["third", "fourth"], [1.0, 1.0], "other", combination_type="cat")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"adapters": ["first", "none"]}, "got 'none', which does not exist"),
        ({"weights": [1.0]}, "same length"),
        ({"adapters": [], "weights": []}, "at least 1"),
        ({"adapter_name": "first"}, "got 'first', which already exists"),
        ({"combination_type": "ties"}, "combination_type.*'ties'.*'svd'"),
        ({"combination_type": "wrong"}, "combination_type.*'wrong'"),
        ({"svd_rank": 0}, "svd_rank"),
        ({"combination_type": "ties_svd", "density": 2.0}, "density"),
    ],
)
def test_refused(arguments: dict[str, Any], words: str) -> None:
    """Bad arguments are named, and the model keeps its adapters and nothing else."""
    model = MODELS["cnn"]()
    before = Snapshot.of(model)
    given = {"adapters": list(WEIGHTS), "weights": [1.0, 1.0], "adapter_name": "sum", **arguments}
    with pytest.raises(ValueError, match=words):
        model.add_weighted_adapter(**given)
    before.assert_same(model)
    assert list(model.peft_config) == list(WEIGHTS) and model.active_adapters == ["second"]


def test_convolutions_read_in_different_ways() -> None:
    """Adapters of different `conv_mode` have no bases in common."""
    model = with_two(Cnn(), (["conv1"], ["conv2"]))
    model.add_adapter("third", SemuConfig(target_modules=["conv1"], r=2, init_weights=False, conv_mode="per_channel"))
    with pytest.raises(ValueError, match="conv1.*conv_mode"):
        model.add_weighted_adapter(["first", "third"], [1.0, 1.0], "sum")
    with pytest.raises(ValueError, match="conv_mode"):
        model.add_weighted_adapter(["second", "third"], [1.0, 1.0], "sum")
    assert "sum" not in model.peft_config
