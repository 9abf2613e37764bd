"""Pruning drops what a core does not use, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Cnn, Mlp, image_batches, vector_batches
from torch import nn
from training_runs import QUIET, constant, semu, train

from semu_peft import NotInitializedError, SemuConfig, initialize_semu_weights, prune, starts
from semu_peft.objectives import CrossEntropy, UniformDistribution
from semu_peft.training.rules import SoftThreshold
from semu_peft.tuner.adapted import semu_layers


def cores(model: nn.Module) -> dict[str, Any]:
    return {name: layer.semu_core["default"] for name, layer in semu_layers(model).items()}


@pytest.mark.parametrize(("kind", "threshold"), [(Mlp, 2e-2), (Cnn, 2.5e-2)])
def test_a_thresholded_adapter_is_smaller_and_computes_the_same_bits(kind: Any, threshold: float) -> None:
    model = semu(kind, core="diagonal", explained_variance=0.999)
    batches = vector_batches(2) if kind is Mlp else image_batches(2)
    train(model, batches, UniformDistribution(), rules=SoftThreshold(threshold), scheduler=constant, epochs=8, **QUIET)
    inputs = batches[0][0]
    used = sum(int((core != 0).sum()) for core in cores(model).values())
    with torch.no_grad():
        expected = model.eval()(inputs)
        report = prune(model)
        assert torch.equal(model(inputs), expected)
    assert 0 < sum(report.ranks_after.values()) == used < sum(report.ranks_before.values())
    assert report.total_relative_error == 0.0 and all((core != 0).all() for core in cores(model).values())
    assert prune(model).ranks_after == report.ranks_after
    train(model, batches, UniformDistribution(), max_steps=1, **QUIET)


def test_a_full_core_loses_what_neither_row_nor_column_uses() -> None:
    model = semu(explained_variance=0.999)
    core = cores(model)["fc1"]
    with torch.no_grad():
        core.zero_()
        core[0, 2] = 1.0
    before = semu_layers(model)["fc1"].get_delta_weight("default")
    report = prune(model)
    assert report.ranks_after == {"fc1": 2, "fc2": 0, "head": 0}
    assert torch.equal(semu_layers(model)["fc1"].get_delta_weight("default"), before)


def test_an_offset_counts_as_used() -> None:
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"]))
    initialize_semu_weights(model, vector_batches(), CrossEntropy(), start=starts.WeightSplit(), progress=False)
    with torch.no_grad():
        cores(model)["fc1"].zero_()
    before = semu_layers(model)["fc1"].get_delta_weight("default")
    prune(model)
    assert torch.equal(semu_layers(model)["fc1"].get_delta_weight("default"), before)


def test_what_cannot_be_pruned_is_said() -> None:
    from peft import get_peft_model

    with pytest.raises(NotInitializedError):
        prune(get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"])))
    with pytest.raises(ValueError, match="every core of 'default' is zero"):
        prune(semu())
    merged = semu()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        prune(merged)
