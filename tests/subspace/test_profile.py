"""Saved spectra: through a file and back, and into an adapter again at another γ or budget, without data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import Cnn, Mlp, Snapshot, image_batches, vector_batches
from peft import get_peft_model
from safetensors.torch import save_file

from semu_peft import (
    Retain,
    SemuConfig,
    SubspaceProfile,
    initialize_semu_weights,
    objectives,
)
from semu_peft.subspace import RankBudget
from semu_peft.tuner.adapted import semu_layers

FORGET = objectives.CrossEntropy()


def adapted(mode: str = "flatten", gamma: float = 0.9) -> torch.nn.Module:
    torch.manual_seed(2)
    return get_peft_model(Cnn(), SemuConfig(target_modules=Cnn.targets, explained_variance=gamma, conv_mode=mode))


@pytest.mark.parametrize("mode", ["flatten", "per_channel"])
def test_round_trip(mode: str, tmp_path: Path) -> None:
    """Everything comes back as it was, to the bit."""
    retain = Retain(image_batches(seed=4), FORGET)
    profile = initialize_semu_weights(adapted(mode), image_batches(), FORGET, retain=retain, progress=False)
    loaded = SubspaceProfile.load(profile.save(tmp_path / "new" / "profile.safetensors"))
    assert loaded.batches == profile.batches == 3 and list(loaded.layers) == list(profile.layers)
    for name, layer in profile.layers.items():
        other = loaded.layers[name]
        assert (other.rank, other.shape, other.estimated) == (layer.rank, layer.shape, layer.estimated)
        assert other.explained_variance == layer.explained_variance and other.energy == layer.energy
        for attribute in ("left", "right", "singular_values", "energy"):
            assert torch.equal(getattr(other.directions, attribute), getattr(layer.directions, attribute))
        assert torch.equal(other.overlap.inputs, layer.overlap.inputs)
        assert torch.equal(other.overlap.outputs, layer.overlap.outputs)


@pytest.mark.parametrize("mode", ["flatten", "per_channel"])
@pytest.mark.parametrize("gamma", [0.5, 0.99])
def test_another_share_is_that_of_the_data(mode: str, gamma: float, tmp_path: Path) -> None:
    """The adapter initialised from the file is the one that the data would have given at that γ."""
    expected = adapted(mode, gamma)
    from_data = initialize_semu_weights(expected, image_batches(), FORGET, progress=False)
    model = adapted(mode)
    profile = initialize_semu_weights(model, image_batches(), FORGET, keep_explained_variance=0.999, progress=False)
    loaded = SubspaceProfile.load(profile.save(tmp_path / "p.safetensors"))
    changed = loaded.initialize(model, explained_variance=gamma)
    assert changed.ranks == from_data.ranks == dict(model.peft_config["default"].ranks)
    for name, layer in semu_layers(model).items():
        other = semu_layers(expected)[name]
        projector = layer.semu_U["default"] @ layer.semu_U["default"].mT
        torch.testing.assert_close(projector, other.semu_U["default"] @ other.semu_U["default"].mT, atol=1e-4, rtol=0)
        assert not layer.semu_core["default"].any()


def test_another_budget() -> None:
    """The same directions, spread anew."""
    model = adapted(gamma=0.999)
    profile = initialize_semu_weights(model, image_batches(), FORGET, progress=False)
    changed = profile.initialize(model, rank_budget=RankBudget(4))
    assert sum(changed.ranks.values()) == 4
    assert {name: layer.r["default"] for name, layer in semu_layers(model).items()} == changed.ranks
    assert profile.initialize(model).ranks == profile.ranks


def test_more_than_was_kept_is_refused() -> None:
    """The profile holds the adapter's directions only, unless told to keep more; the adapter is unchanged."""
    model = adapted(gamma=0.6)
    profile = initialize_semu_weights(model, image_batches(), FORGET, progress=False)
    before = Snapshot.of(model)
    with pytest.raises(ValueError, match="keep_explained_variance"):
        profile.initialize(model, explained_variance=0.999)
    before.assert_same(model)


def test_another_model_is_refused() -> None:
    """Other layers or shapes than those of the profile."""
    profile = initialize_semu_weights(adapted(), image_batches(), FORGET, progress=False)
    with pytest.raises(ValueError, match="does not fit"):
        profile.initialize(get_peft_model(Mlp(), SemuConfig(target_modules=Mlp.targets)))
    with pytest.raises(ValueError, match="does not fit"):
        profile.initialize(adapted("per_channel"))


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    """No file, a damaged one, one of other tensors."""
    with pytest.raises(FileNotFoundError, match="SubspaceProfile.save"):
        SubspaceProfile.load(tmp_path / "none.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match="damaged"):
        SubspaceProfile.load(tmp_path / "damaged.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="must be a file that `SubspaceProfile.save` wrote"):
        SubspaceProfile.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"retain_rule": "keep"}, "`retain_rule` must be"),
        ({"keep_explained_variance": 1.2}, "explained_variance"),
        ({"rank_budget": RankBudget(1, "parameters")}, None),
    ],
)
def test_arguments_of_the_initialisation(arguments: dict[str, object], message: str | None) -> None:
    """Refused by name, before the data are touched."""
    model = get_peft_model(Mlp(), SemuConfig(target_modules=Mlp.targets))
    if message is None:
        initialize_semu_weights(model, vector_batches(), FORGET, progress=False, **arguments)
        return
    with pytest.raises(ValueError, match=message):
        initialize_semu_weights(model, iter(()), FORGET, progress=False, **arguments)
