"""A subspace of the directions that follow the leading ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import CLASSES, Mlp, vector_batches
from peft import get_peft_model
from torch import Tensor, nn

from semu_peft import SemuConfig, Sketch, gather, initialize_semu_weights, starts, unlearn
from semu_peft.objectives import CrossEntropy, UniformDistribution
from semu_peft.tuner.adapted import semu_layers


def adapted(**options: Any) -> nn.Module:
    torch.manual_seed(3)
    return get_peft_model(Mlp(), SemuConfig(target_modules=["fc1", "fc2"], **options))


def gradients() -> dict[str, Tensor]:
    torch.manual_seed(3)
    gathered = gather(Mlp(), vector_batches(3), CrossEntropy(), targets=["fc1", "fc2"], progress=False)
    return {name: each.total.double() for name, each in gathered.items()}


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("skip", [1, 2])
def test_the_directions_are_those_that_follow(skip: int, gamma: float) -> None:
    """As many as explain γ of what the first ones leave, against a dense decomposition."""
    model = adapted(explained_variance=gamma)
    profile = initialize_semu_weights(model, vector_batches(3), CrossEntropy(), skip_leading=skip, progress=False)
    for name, layer in semu_layers(model).items():
        left, values, right = torch.linalg.svd(gradients()[name])
        energies = values[skip:].square()
        rank = int((energies.cumsum(0) < gamma * energies.sum()).sum()) + 1
        assert layer.r["default"] == profile.layers[name].rank == rank
        chosen = slice(skip, skip + rank)
        for basis, exact in ((layer.semu_U["default"], left[:, chosen]), (layer.semu_V["default"], right[chosen].T)):
            torch.testing.assert_close(basis.double() @ basis.double().T, exact @ exact.T, atol=1e-4, rtol=0)


def test_none_is_the_plain_subspace_and_a_fixed_rank_stays_that() -> None:
    plain, none, fixed = adapted(), adapted(), adapted(r=2, explained_variance=1.0)
    for model, options in ((plain, {}), (none, {"skip_leading": 0}), (fixed, {"skip_leading": 1})):
        initialize_semu_weights(model, vector_batches(3), CrossEntropy(), progress=False, **options)
    for name, layer in semu_layers(plain).items():
        assert torch.equal(layer.semu_U["default"], semu_layers(none)[name].semu_U["default"])
        other = semu_layers(fixed)[name]
        assert other.r["default"] == 2
        assert (layer.semu_V["default"][:, :1].T @ other.semu_V["default"]).abs().max() < 1e-4


def test_sketches_and_starts_take_them_too_and_they_can_be_trained_in() -> None:
    model = adapted(explained_variance=0.999)
    gathered = gather(model, vector_batches(3), CrossEntropy(), statistic=Sketch.of_size(8), adapter_name="default",
                      progress=False)  # fmt: skip
    initialize_semu_weights(model, gathered, start=starts.Zero(), skip_leading=1, progress=False)
    result = unlearn(model, vector_batches(2), UniformDistribution(), max_steps=6, progress=False)
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_what_cannot_be_skipped_is_said() -> None:
    model = adapted()
    profile = initialize_semu_weights(model, vector_batches(1), CrossEntropy(), progress=False)
    for forget in (profile, None):
        with pytest.raises(ValueError, match="`skip_leading` must be 0"):
            initialize_semu_weights(model, forget, CrossEntropy(), skip_leading=1, progress=False)
    with pytest.raises(ValueError, match="`skip_leading`"):
        initialize_semu_weights(model, vector_batches(1), CrossEntropy(), skip_leading=-1)
    with pytest.raises(ValueError, match="`skip_leading`"):
        initialize_semu_weights(adapted(), vector_batches(1), CrossEntropy(), skip_leading=8 * CLASSES, progress=False)
