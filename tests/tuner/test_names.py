"""Layers go by their names in the model that holds the adapter, whatever it is in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import Mlp, Snapshot, run, vector_batches
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

from semu_peft import (
    SemuConfig,
    SubspaceProfile,
    hotswap_adapter,
    initialize_semu_weights,
    objectives,
    rerank,
    save_as_lora,
    unlearn,
)

FORGET = objectives.CrossEntropy()
TARGETS = ["fc1", "fc2"]


def mlp() -> Any:
    torch.manual_seed(3)
    return Mlp()


def config(**options: Any) -> SemuConfig:
    return SemuConfig(**{"target_modules": TARGETS, **options})


class Outer(nn.Module):
    """A module of the user's own, which has the adapted model as a part, and a head."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.scale = nn.Parameter(torch.tensor(1.5), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * torch.stack([part(x) for part in self.parts]).sum(0)


@pytest.mark.parametrize("injected", [False, True])
def test_an_adapter_inside_a_users_module(injected: bool, tmp_path: Path) -> None:
    """All is called from outside, and files, profiles and exports have the names that the part has alone."""
    part = inject_adapter_in_model(config(), mlp()) if injected else get_peft_model(mlp(), config())
    model, x = Outer(part), vector_batches()[0][0]
    profile = initialize_semu_weights(model, vector_batches(), FORGET, progress=False)
    unlearn(model, vector_batches(), FORGET, epochs=2, progress=False)
    assert set(profile.layers) == set(profile.ranks) == set(part.peft_config["default"].ranks) == set(TARGETS)
    lora = PeftModel.from_pretrained(mlp(), save_as_lora(model, tmp_path / "lora"))
    torch.testing.assert_close(run(lora, x), run(part, x), atol=1e-5, rtol=1e-5)
    alone = get_peft_model(mlp(), config())
    SubspaceProfile.load(profile.save(tmp_path / "profile.safetensors")).initialize(alone)
    assert alone.peft_config["default"].ranks == profile.ranks
    if not injected:
        part.save_pretrained(tmp_path / "semu")
        loaded = PeftModel.from_pretrained(mlp(), tmp_path / "semu")
        assert torch.equal(run(loaded, x), run(part, x))
        hotswap_adapter(Outer(alone), str(tmp_path / "semu"))
        assert torch.equal(run(alone, x), run(part, x))
    rerank(model, r=1)
    assert part.peft_config["default"].ranks == dict.fromkeys(TARGETS, 1)


def test_two_parts_with_layers_of_one_name() -> None:
    """Then the names are those in the whole, and each part's configuration has its own."""
    parts = [get_peft_model(mlp(), config(target_modules=["fc1"])) for _ in range(2)]
    profile = initialize_semu_weights(Outer(*parts), vector_batches(), FORGET, progress=False)
    assert [name.split(".")[:2] for name in profile.ranks] == [["parts", "0"], ["parts", "1"]]
    assert all(set(part.peft_config["default"].ranks) == {"fc1"} for part in parts)


class Renamed(nn.Module):
    """The same model under another name, as a later version of a library has it."""

    def __init__(self) -> None:
        super().__init__()
        self.text = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.text(x)


def saved(folder: Path) -> PeftModel:
    model = get_peft_model(mlp(), config())
    initialize_semu_weights(model, vector_batches(), FORGET, progress=False)
    unlearn(model, vector_batches(), FORGET, epochs=2, progress=False)
    model.save_pretrained(folder)
    return model


def test_layers_that_were_renamed(tmp_path: Path) -> None:
    """A model's own mapping of old names is followed; one that is passed needs the configuration renamed."""
    model, x, mapping = saved(tmp_path), vector_batches()[0][0], {"^fc": "text.fc"}
    known: Any = Renamed()
    known._checkpoint_conversion_mapping = mapping
    assert torch.equal(run(PeftModel.from_pretrained(known, tmp_path), x), run(model, x))
    with pytest.raises(ValueError, match=r"key_mapping.*rename them in `ranks`"):
        PeftModel.from_pretrained(Renamed(), tmp_path, key_mapping=mapping)
    renamed = SemuConfig.from_pretrained(str(tmp_path))
    renamed.ranks = {f"text.{name}": rank for name, rank in renamed.ranks.items()}
    loaded = PeftModel.from_pretrained(Renamed(), tmp_path, config=renamed, key_mapping=mapping)
    assert torch.equal(run(loaded, x), run(model, x))


@pytest.mark.parametrize("whole", [True, False])
def test_modules_to_save_of_a_compiled_model(whole: bool, tmp_path: Path) -> None:
    """Loading is refused before anything changes, where PEFT finds no place for them; compiled in place, it works."""
    model = get_peft_model(mlp(), config(target_modules=["fc1"], modules_to_save=["head"], r=2, init_weights=False))
    nn.init.normal_(model.base_model.model.head.modules_to_save["default"].weight)
    x = vector_batches()[0][0]
    expected = run(model, x)
    model.save_pretrained(tmp_path)
    base = mlp()
    if whole:
        compiled: Any = torch.compile(base, backend="eager")
    else:
        compiled = base
        compiled.head = torch.compile(base.head, backend="eager")
    before = Snapshot.of(base)
    with pytest.raises(ValueError, match=r"must not be compiled yet.*'head'.*Load the adapter first"):
        PeftModel.from_pretrained(compiled, tmp_path)
    before.assert_same(base)
    in_place = mlp()
    in_place.head.compile(backend="eager")
    loaded = PeftModel.from_pretrained(in_place, tmp_path)
    assert torch.equal(run(loaded, x), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert not any("_orig_mod" in key for key in load_file(tmp_path / "again" / "adapter_model.safetensors"))
