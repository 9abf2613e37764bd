"""An adapter knows its layers by their names in the plain model, however the model was compiled before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import load_peft_weights
from torch import Tensor, nn

from semu_peft import SemuConfig
from semu_peft.tuner.adapted import base_model, semu_layers


def network(compiled: str = "") -> nn.Module:
    torch.manual_seed(0)
    plain: Any = nn.Sequential(nn.Sequential(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 4))
    if compiled == "block":
        plain[0] = torch.compile(plain[0], backend="eager")
    elif compiled == "layer":
        plain[2] = torch.compile(plain[2], backend="eager")
    return torch.compile(plain, backend="eager") if compiled == "whole" else plain


def adapted(compiled: str, targets: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(network(compiled), SemuConfig(target_modules=targets, init_weights=False, r=2))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 8)


@pytest.mark.parametrize("compiled", ["whole", "block", "layer"])
@pytest.mark.parametrize("targets", ["all-linear", ["0.0", "2"], r"0\.0|2"])
def test_files_are_those_of_the_plain_model(compiled: str, targets: Any, x: Tensor, tmp_path: Path) -> None:
    model, plain = adapted(compiled, targets), adapted("", targets)
    wanted = plain(x)
    assert (wanted - network()(x)).abs().max() > 1e-3
    torch.testing.assert_close(model(x), wanted)
    assert list(semu_layers(model)) == ["0.0", "2"]
    model.save_pretrained(tmp_path / "compiled")
    plain.save_pretrained(tmp_path / "plain")
    saved, expected = load_peft_weights(tmp_path / "compiled"), load_peft_weights(tmp_path / "plain")
    assert saved.keys() == expected.keys() and all(torch.equal(saved[key], expected[key]) for key in saved)
    assert "_orig_mod" not in (tmp_path / "compiled/adapter_config.json").read_text()
    for other in ("", "whole", "block", "layer"):
        loaded = PeftModel.from_pretrained(network(other), tmp_path / "compiled")
        torch.testing.assert_close(loaded(x), wanted)


def test_the_base_model_is_found_in_every_wrapper() -> None:
    plain = network()
    model = get_peft_model(torch.compile(plain, backend="eager"), SemuConfig(target_modules=["2"], r=1))
    assert base_model(model) is plain
    assert base_model(nn.DataParallel(model)) is plain
    other = network()
    model = get_peft_model(other, SemuConfig(target_modules=["2"], r=1))
    assert base_model(torch.compile(model, backend="eager")) is other
