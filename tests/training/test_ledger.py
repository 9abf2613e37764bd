"""Exact deletion: stages that have not seen an example are bit for bit those of a training without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import CLASSES, run
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from semu_peft.objectives import CrossEntropy
from semu_peft.training.ledger import Ledger, expected_deletions, rotations, take_back, train_stages

DATA = torch.randn(32, 6, generator=torch.Generator().manual_seed(0)), torch.arange(32) % CLASSES
STAGES = [["layers.11"], ["layers.2"], ["layers.1"]]


class Deep(nn.Module):
    """Layers 0 to 11, whose names contain each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(6, 6) for _ in range(11)), nn.Linear(6, CLASSES))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.drop(x))


def base() -> Deep:
    torch.manual_seed(3)
    return Deep()


def batches(ids: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    chosen = torch.tensor(ids)
    return list(zip(DATA[0][chosen].split(8), DATA[1][chosen].split(8), strict=True))


def trained(ledger: Ledger, watch: Any = None, **options: Any) -> PeftModel:
    config = LoraConfig(r=2, lora_dropout=0.1)
    said: dict[str, Any] = {"learning_rate": 1e-2, "epochs": 2, "progress": False, "callbacks": watch or (), **options}
    return train_stages(base(), ledger, batches, CrossEntropy(), config, **said)


def test_deletion_is_exact() -> None:
    """After deleting from slice i the logits are bit-equal to a model trained without the slices from i on."""
    ledger = Ledger.divide(32, STAGES)
    x = torch.randn(5, 6)
    untouched = run(base(), x)
    for place in (2, 1, 0):
        model, after = trained(ledger), ledger.delete([ledger.slices[place][0]])
        assert after.alive == place
        assert take_back(model, after) == [f"stage-{stage}" for stage in range(place, 3)]
        if place == 0:
            assert torch.equal(run(model, x), untouched)
            continue
        without = Ledger(ledger.slices[:place], ledger.stages[:place])
        torch.manual_seed(99)  # whatever was drawn before
        assert torch.equal(run(model, x), run(trained(without), x))
        assert not torch.allclose(run(model, x), untouched)


def test_a_stage_trains_its_own_layers_alone() -> None:
    """`layers.1` is not `layers.11`; parameters of stage j are bit-unchanged while stage i trains."""
    ledger = Ledger.divide(32, STAGES)
    first, whole = trained(Ledger(ledger.slices[:1], ledger.stages[:1])), trained(ledger)
    for place, layers in enumerate(STAGES):
        keys = {key.split(".lora_")[0] for key, _ in whole.named_parameters() if f".stage-{place}." in key}
        assert [key.removeprefix("base_model.model.") for key in keys] == layers
    after = whole.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in first.state_dict().items() if "stage-0" in key)
    original = base().state_dict()
    for key, value in after.items():
        if "lora" not in key:
            name = key.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(value, original[name])
    assert all(after[key].any() for key in after if "lora_B" in key)


def test_what_a_stage_has_seen() -> None:
    ledger = Ledger.divide(10, STAGES, seed=1)
    assert sorted(ledger.seen_by(2)) == list(range(10)) and len(ledger.seen_by(0)) == 4
    assert set(ledger.seen_by(0)) < set(ledger.seen_by(1))
    gone = ledger.delete(ledger.slices[2][:1]).delete(ledger.slices[1][:1])
    assert (ledger.alive, gone.alive) == (3, 1)
    turned = Ledger.divide(10, STAGES, seed=1, rotation=1)
    assert turned.slices == (*ledger.slices[1:], ledger.slices[0])


def test_how_long_it_lasts() -> None:
    """Expected deletions until nothing is left, L 4: B 1 → 4, B 2 → 6, B 4 → 8.333, also by simulation."""
    ledger = Ledger(tuple((place,) for place in range(4)), tuple((f"{place}",) for place in range(4)))
    draw = torch.Generator().manual_seed(0)
    for budget, expected in ((1, 4.0), (2, 6.0), (4, 25 / 3)):
        assert expected_deletions(4, budget) == pytest.approx(expected)
        counts = []
        for _ in range(1500):
            orders, count = rotations(ledger, budget), 0
            while any(order.alive for order in orders):
                example = int(torch.randint(4, (), generator=draw))
                orders, count = [order.delete([example]) for order in orders], count + 1
            counts.append(count)
        assert sum(counts) / len(counts) == pytest.approx(expected, abs=0.3)
    assert max(rotations(ledger, 2), key=lambda order: order.delete([0]).alive).slices[0] == (2,)


def test_files_and_mistakes(tmp_path: Path) -> None:
    ledger = Ledger.divide(10, STAGES).delete([3, 4])
    assert Ledger.load(ledger.save(tmp_path / "ledger.json")) == ledger
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="`path` must be a file that `Ledger.save` wrote"):
        Ledger.load(tmp_path / "other.json")
    for content in (b"\xff\xfe", b'{"slices": [[0]], "stages": ["fc"], "deleted": []}'):
        (tmp_path / "other.json").write_bytes(content)
        with pytest.raises(ValueError, match="`path` must be a file that `Ledger.save` wrote"):
            Ledger.load(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"`stages` must be groups of layers, got the name 'head'. Write \[\['head'\]"):
        Ledger.divide(8, ["head", "fc1"])
    with pytest.raises(ValueError, match=r"`examples` must be in a slice, got \[77\]"):
        ledger.delete([77])
    with pytest.raises(ValueError, match="`stages` must be as many as `slices`"):
        Ledger(((0,),), ())
    with pytest.raises(ValueError, match="`slices` must not be empty or have anything twice"):
        Ledger(((0,), (0,)), (("a",), ("b",)))
    with pytest.raises(ValueError, match="`budget` must be at most the 3 slices"):
        rotations(ledger, 4)
    with pytest.raises(ValueError, match="`ledger` must name layers of the model in full"):
        trained(Ledger(((0,),), (("1",),)))
    with pytest.raises(ValueError, match="`ledger` must have a stage alive"):
        trained(ledger.delete(range(10)))


def test_numbers_of_examples_as_arrays_have_them(tmp_path: Path) -> None:
    ledger = Ledger.divide(10, STAGES)
    gone = ledger.delete([3, 4])
    for numbers in (np.array([3, 4]), torch.tensor([3, 4])):
        assert Ledger.load(ledger.delete(numbers).save(tmp_path / "ledger.json")) == gone
    by_array = Ledger(tuple(map(tuple, np.arange(4).reshape(2, 2))), (("a",), ("b",)))
    assert Ledger.load(by_array.save(tmp_path / "ledger.json")) == by_array


def test_training_that_fails_leaves_the_model() -> None:
    model, before = base(), str(base())

    def fail(ids: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        if len(ids) == 32:  # the last stage's
            raise OSError("disk")
        return batches(ids)

    with pytest.raises(OSError, match="disk"):
        train_stages(model, Ledger.divide(32, STAGES), fail, CrossEntropy(), LoraConfig(r=2), learning_rate=1e-2,
                     max_steps=1, progress=False)  # fmt: skip
    assert str(model) == before and not hasattr(model, "peft_config")
    assert all(parameter.requires_grad for parameter in model.parameters())
