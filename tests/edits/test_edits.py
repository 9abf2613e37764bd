"""Edits: all of a change or none of it, undone bit for bit, and the same from a file."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Cnn, Mlp
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from semu_peft.edits import Edit
from semu_peft.edits.deltas import Delta, Dense, LowRank, Scaled, Sparse


def every_kind(model: Any) -> dict[str, Delta]:
    """A change of each kind, of the parts of an `Mlp`."""
    shape = tuple(model.fc1.weight.shape)
    return {
        "fc1.weight": LowRank(torch.randn(shape[0], 2), torch.randn(shape[1], 2)),
        "fc1.bias": Dense(torch.randn(shape[0])),
        "fc2.weight": Sparse(torch.tensor([0, 3]), torch.tensor([0.3, -7.0]), tuple(model.fc2.weight.shape)),
        "fc2.bias": Scaled(torch.tensor([1], dtype=torch.int32), torch.tensor([0.1]), tuple(model.fc2.bias.shape)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_was_applied_is_undone_bit_for_bit(dtype: torch.dtype) -> None:
    model = Mlp().to(dtype)
    before = copy.deepcopy(model.state_dict())
    edit = Edit(every_kind(model))
    edit.apply(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(edit.deltas)
    edit.undo(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="stop"), edit.apply(model):
        raise RuntimeError("stop")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_each_kind_changes_what_it_says() -> None:
    model = Mlp()
    before, deltas = copy.deepcopy(model.state_dict()), every_kind(model)
    Edit(deltas).apply(model)
    after = model.state_dict()
    low_rank = deltas["fc1.weight"]
    assert isinstance(low_rank, LowRank)
    assert torch.allclose(after["fc1.weight"], before["fc1.weight"] + low_rank.left @ low_rank.right.mT)
    assert torch.equal(after["fc1.bias"], before["fc1.bias"] + deltas["fc1.bias"].tensors()["values"])
    assert (after["fc2.weight"] != before["fc2.weight"]).reshape(-1).nonzero().squeeze(1).tolist() == [0, 3]
    assert torch.equal(after["fc2.bias"][1], before["fc2.bias"][1] * 0.1)
    for name, delta in deltas.items():
        assert torch.allclose(delta.change(before[name]), after[name] - before[name], atol=1e-6)


def test_changes_that_rounding_loses_are_told() -> None:
    """And nothing is told where some number moves, or where there was nothing to change."""
    model = nn.Linear(4, 4).bfloat16()
    nn.init.ones_(model.weight)
    with pytest.warns(
        UserWarning, match="changed no number: all its changes are lost to the rounding of torch.bfloat16"
    ):
        Edit({"weight": Dense(torch.full((4, 4), 1e-3))}).apply(model)
    assert bool((model.weight == 1).all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Edit({"weight": Dense(torch.full((4, 4), 1e-3).fill_diagonal_(1.0))}).apply(model)
        Edit({"weight": Scaled(torch.tensor([0]), torch.tensor([1.0]), (4, 4))}).apply(model)


def test_edits_of_one_weight_are_undone_from_the_last() -> None:
    model = Mlp()
    before = model.fc1.bias.detach().clone()
    first, second = (Edit({"fc1.bias": Dense(value * torch.ones_like(before))}, made_by) for value, made_by in
                     ((0.1, "first"), (0.2, "second")))  # fmt: skip
    first.apply(model)
    second.apply(model)
    with pytest.raises(ValueError, match=r"Edit\(second\(\).* was applied to the same weights later"):
        first.undo(model)
    second.undo(model)
    first.undo(model)
    assert torch.equal(model.fc1.bias, before)
    with pytest.raises(ValueError, match="was not applied to it"):
        first.undo(model)


def test_undoing_loses_no_training() -> None:
    model = Mlp()
    edit = Edit({"fc1.bias": Dense(torch.ones_like(model.fc1.bias))})
    edit.apply(model)
    with torch.no_grad():
        model.fc1.bias[0] += 0.01
    with pytest.raises(ValueError, match=r"'fc1.bias' has been changed since"):
        edit.undo(model)


def test_where_one_parameter_cannot_be_changed_none_is() -> None:
    model = Mlp()
    before = copy.deepcopy(model.state_dict())
    ones = torch.ones_like(model.fc1.bias)
    for last, message in (
        ({"fc2.bias": Dense(torch.full_like(model.fc2.bias, 3e38) * 10)}, "would not be finite"),
        ({"fc3.bias": Dense(ones)}, r"no parameter 'fc3.bias'"),
        ({"fc2.bias": Dense(torch.ones(99))}, r"has shape \(\d+,\), the edit's change has \(99,\)"),
        ({"fc1": Dense(torch.ones_like(model.fc1.weight)), "fc1.weight": Dense(torch.ones_like(model.fc1.weight))},
         "shares its parameter"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Edit({"fc1.bias": Dense(ones), **last}).apply(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layers_name_means_its_weight_as_a_matrix() -> None:
    model = nn.ModuleDict({"gpt": Conv1D(3, 4), "conv": nn.Conv2d(2, 3, 2)})
    turned, kernel = torch.randn(3, 4), torch.randn(3, 8)
    sparse = Sparse(torch.tensor([1, 7]), torch.tensor([1.0, 2.0]), (3, 4))  # at (0, 1) and (1, 3) of the matrix
    before = {name: layer.weight.detach().clone() for name, layer in model.items()}
    with Edit({"gpt": Dense(turned), "conv": Dense(kernel)}).apply(model):
        assert torch.equal(model["gpt"].weight, before["gpt"] + turned.mT)
        assert torch.equal(model["conv"].weight, before["conv"] + kernel.view(3, 2, 2, 2))
    with Edit({"gpt": sparse}).apply(model):
        changed = model["gpt"].weight - before["gpt"]
        assert changed.nonzero().tolist() == [[1, 0], [3, 1]]
    left, right = torch.randn(3, 1), torch.randn(4, 1)
    with Edit({"gpt": LowRank(left, right)}).apply(model):
        assert torch.allclose(model["gpt"].weight, before["gpt"] + (left @ right.mT).mT)


def test_names_are_those_of_the_model_without_its_adapters() -> None:
    plain = Mlp()
    before = plain.fc1.weight.detach().clone()
    edit = Edit({"fc1.weight": Dense(torch.ones_like(before)), "fc2.bias": Dense(torch.ones_like(plain.fc2.bias))})
    edit.apply(plain)
    model = get_peft_model(plain, LoraConfig(target_modules=["fc1"], modules_to_save=["fc2"]))
    edit.undo(model)  # applied before the adapter came
    base = model.base_model.model.fc1.base_layer.weight
    assert torch.equal(base, before)
    with edit.apply(model):
        assert torch.equal(base, before + 1)


def test_an_edit_that_is_bound_fits_its_own_weights_alone() -> None:
    model = Mlp()
    edit = Edit({"fc1.bias": Dense(torch.ones_like(model.fc1.bias))}).bound_to(model)
    with torch.no_grad():
        model.fc2.bias.add_(1.0)  # not among those that it changes
    with edit.apply(model), pytest.raises(ValueError, match="are not those it was made for"):
        edit.apply(model)
    with torch.no_grad():
        model.fc1.bias[0] += 1e-3
    with pytest.raises(ValueError, match="strict=False"):
        edit.apply(model)
    edit.apply(model, strict=False)


def test_a_file_gives_the_same_edit(tmp_path: Path) -> None:
    model = nn.ModuleDict({"mlp": Mlp(), "cnn": Cnn()})
    deltas: dict[str, Delta] = {f"mlp.{name}": delta for name, delta in every_kind(model["mlp"]).items()}
    deltas["cnn.conv1"] = LowRank(torch.randn(8, 2), torch.randn(27, 2))
    edit = Edit(deltas, "dampen", {"threshold": 2.0}).bound_to(model)
    first = edit.save(tmp_path / "edit.safetensors")
    read = Edit.load(first)
    assert (read.made_by, read.settings, read.base) == ("dampen", {"threshold": 2.0}, edit.base)
    again = read.save(tmp_path / "again.safetensors")
    assert first.read_bytes() == again.read_bytes()
    other = copy.deepcopy(model)
    edit.apply(model)
    read.apply(other)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    with pytest.raises(FileNotFoundError, match=r"Edit\.save"):
        Edit.load(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="holds no edit"):
        Edit.load(path)

    def write(kind: str, tensors: dict[str, torch.Tensor]) -> None:
        header = {"made_by": "x", "settings": {}, "base": None, "deltas": {"w": {"kind": kind, "shape": [2, 2]}}}
        save_file({f"w|{part}": tensor for part, tensor in tensors.items()}, path, {"semu_edit": json.dumps(header)})

    outside = {"indices": torch.tensor([4]), "values": torch.ones(1)}
    for kind, tensors in (("sparse", outside), ("dense", {"values": torch.ones(3)}), ("dense", {"left": torch.ones(2)}),
                          ("other", {"values": torch.ones(2, 2)})):  # fmt: skip
        write(kind, tensors)
        with pytest.raises(ValueError, match="holds no edit, or a damaged one"):
            Edit.load(path)
    write("sparse", {"indices": torch.tensor([3]), "values": torch.ones(1)})
    assert Edit.load(path).deltas["w"].change(torch.zeros(2, 2))[1, 1] == 1


def test_computed_and_quantised_weights_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    edit = Edit({"0.weight": Dense(torch.ones(3, 3))})
    with pytest.raises(ValueError, match=r"prune\.remove"):
        edit.apply(model)
    with pytest.raises(ValueError, match="cannot be changed number by number"):
        edit.apply(nn.Sequential(nn.Linear(3, 3, device="meta")))


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: Edit({"fc1.bias": torch.ones(2)}), "deltas"),  # type: ignore[dict-item]
        (lambda: Edit([1]), "deltas"),  # type: ignore[arg-type]
        (lambda: Edit({}).apply(None), "model"),  # type: ignore[arg-type]
        (lambda: Edit({}).apply(Mlp(), undoable="no"), "undoable"),  # type: ignore[arg-type]
        (lambda: Edit({}).only("fc1"), "names"),
        (lambda: Edit({}).save(5), "path"),  # type: ignore[arg-type]
        (lambda: Edit({}).to_semu(Mlp(), r=0), "r"),
        (lambda: Edit({}).to_semu(Mlp(), explained_variance=2), "explained_variance"),
    ],
)
def test_mistakes_name_their_argument(call: Any, argument: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"`{argument}`"):
        call()
