"""What is read from saved adapters without their base model is what a loaded model says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from semu_peft import SemuConfig, add_request, initialize_semu_weights
from semu_peft.adapter.saved import compare_adapters, inspect_adapter
from semu_peft.linalg.angles import principal_cosines
from semu_peft.objectives import GradientAscent
from semu_peft.tuner.adapted import semu_layers


def adapter(folder: Path, seed: int, **settings: object) -> tuple[Path, dict[str, torch.Tensor]]:
    """Save an adapter with a random correction; returns the folder and each layer's ΔW as matrices."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(6, 5), nn.Flatten(), nn.Unflatten(1, (5, 1, 1)), nn.Conv2d(5, 4, 3, padding=1))
    config = SemuConfig(target_modules=["0", "3"], r=2, init_weights=False, **settings)  # type: ignore[arg-type]
    model = get_peft_model(base, config)
    model.save_pretrained(str(folder))
    deltas = {name: layer.get_delta_weight("default").detach() for name, layer in semu_layers(model, "default").items()}
    return folder, deltas


@pytest.mark.parametrize(
    "settings", [{}, {"core": "diagonal"}, {"conv_mode": "per_channel"}], ids=["full", "diagonal", "per_channel"]
)
def test_norms_are_those_of_the_corrections(tmp_path: Path, settings: dict[str, str]) -> None:
    folder, deltas = adapter(tmp_path, 0, **settings)
    found = inspect_adapter(folder)
    assert set(found.layers) == set(deltas)
    for name, delta in deltas.items():
        assert found.layers[name].norm == pytest.approx(float(delta.norm()), rel=1e-5)
    assert found.layers["0"].largest == pytest.approx(float(torch.linalg.matrix_norm(deltas["0"], 2)), rel=1e-5)
    assert found.norm == pytest.approx(
        float(torch.cat([delta.flatten() for delta in deltas.values()]).norm()), rel=1e-5
    )


def test_parents_are_the_adapters_that_it_was_made_of_beside_or_apart_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch, config = (torch.randn(16, 8), torch.randint(6, (16,))), SemuConfig(target_modules=["0"], r=2)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), config, adapter_name="first")
    for name in ("first", "second"):  # the second with the first switched off, and orthogonal to it
        add_request(model, name, [batch], GradientAscent(), max_steps=1, progress=False)
    model.add_adapter("third", SemuConfig(target_modules=["0"], r=2))
    model.base_model.set_adapter(["first", "second", "third"])
    initialize_semu_weights(model, [batch], GradientAscent(), adapter_name="third", overwrite=True, progress=False)
    model.base_model.add_weighted_adapter(["second", "third"], [1.0, 1.0], "both")
    model.save_pretrained(str(tmp_path))
    found = {name: list(inspect_adapter(tmp_path / name).parents) for name in ("first", "second", "third", "both")}
    assert found == {"first": [], "second": ["first"], "third": ["first", "second"], "both": ["second", "third"]}
    again = PeftModel.from_pretrained(nn.Sequential(nn.Linear(8, 6)), str(tmp_path / "both"), adapter_name="both")
    assert again.peft_config["both"].parents == ["second", "third"]
    with pytest.raises(ValueError, match="`parents` must be a list of adapters' names, got 'first'"):
        SemuConfig(target_modules=["0"], parents="first")  # type: ignore[arg-type]


def test_the_cosine_is_that_of_the_dense_corrections(tmp_path: Path) -> None:
    first, ours = adapter(tmp_path / "a", 0)
    second, theirs = adapter(tmp_path / "b", 1)
    for name, found in compare_adapters(first, second).items():
        cosine = torch.cosine_similarity(ours[name].flatten(), theirs[name].flatten(), dim=0)
        assert found.cosine == pytest.approx(float(cosine), abs=2e-6)
        assert 0 <= found.left <= 1 and 0 <= found.right <= 1
    assert compare_adapters(first, first)["3"].cosine == pytest.approx(1)


def test_a_correction_of_zero_is_at_no_angle(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = SemuConfig(target_modules=["0"], r=2, init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
    model.save_pretrained(str(tmp_path / "moved"))
    with torch.no_grad():
        semu_layers(model, "default")["0"].semu_core["default"].zero_()
    model.save_pretrained(str(tmp_path / "idle"))
    found = compare_adapters(tmp_path / "moved", tmp_path / "idle")["0"]
    assert found.cosine is None and found.norms[0] > 0 and found.norms[1] == 0
    assert found.left == found.right == 1, "the directions are the same, whatever is done in them"


def test_angles_of_planes_that_share_a_line() -> None:
    angle = torch.tensor(0.3)
    first = torch.eye(4)[:, :2]
    second = torch.stack([torch.eye(4)[0], angle.cos() * torch.eye(4)[1] + angle.sin() * torch.eye(4)[2]], 1)
    mixed = second @ torch.tensor([[2.0, 1.0], [0.0, 3.0]])  # another basis of the same plane
    expected = torch.tensor([1.0, angle.cos()]).double()
    torch.testing.assert_close(principal_cosines(first, mixed), expected, atol=1e-6, rtol=0)


def test_other_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        inspect_adapter(tmp_path)
    with pytest.raises(TypeError, match="folder"):
        inspect_adapter(3)  # type: ignore[arg-type]
