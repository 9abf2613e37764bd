"""Exporting and re-ranking keep, or cut, exactly what they say."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from semu_peft import (
    SemuConfig,
    rerank,
    save_as_lora,
    to_lora,
)
from semu_peft.tuner.adapted import semu_layers

NETWORK = '''
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
    def forward(self, x):
        return torch.relu(self.conv(x))

class Network(nn.Module):
    """Two layers called `conv`, one name an ending of the other; convolutions of 1 to 3 dimensions; a Conv1D."""
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.block = Block()
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.series = nn.Conv1d(8, 8, 3, padding="same", groups=2)
        self.volume = nn.Conv3d(8, 8, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 0))
        self.linear = nn.Linear(8, 6)
        self.conv1d = Conv1D(5, 6)
        self.head = nn.Linear(5, 4)
    def forward(self, x):
        x = self.grouped(self.block(torch.relu(self.conv(x))))
        x = self.volume(torch.relu(x)[..., None, :, :]).flatten(2)
        x = self.series(torch.relu(x)).mean(2)
        return self.head(self.conv1d(torch.relu(self.linear(x))))
'''
namespace: dict[str, type[nn.Module]] = {}
exec(NETWORK, namespace)
Network = namespace["Network"]
TARGETS = ["conv", "block.conv", "grouped", "series", "volume", "linear", "conv1d"]


def adapted(**settings: object) -> PeftModel:
    """A network with a random adapter of different ranks, in eval mode."""
    torch.manual_seed(0)
    config = SemuConfig(**{"target_modules": TARGETS, "init_weights": False, "r": 3, **settings})
    return get_peft_model(Network(), config).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 8, 8)


@pytest.mark.parametrize("conv_mode", ["flatten", "per_channel"])
@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_stock_peft_loads_the_lora_in_a_process_without_semu(
    conv_mode: str, core: str, images: Tensor, tmp_path: Path
) -> None:
    model = adapted(conv_mode=conv_mode, core=core)
    with torch.no_grad():
        expected = model(images)
    save_as_lora(model, tmp_path / "lora")
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    torch.save({"images": images, "expected": expected}, tmp_path / "data.pt")
    base = model.unload()
    torch.save(base.state_dict(), tmp_path / "base.pt")
    script = (
        NETWORK
        + f'''
import sys, warnings
warnings.simplefilter("error", UserWarning)
warnings.filterwarnings("ignore", message=".*groups > 1.*|.*fan_in_fan_out.*")
from peft import PeftModel
data = torch.load(r"{tmp_path}/data.pt", weights_only=True)
base = Network()
base.load_state_dict(torch.load(r"{tmp_path}/base.pt", weights_only=True))
model = PeftModel.from_pretrained(base, r"{tmp_path}/lora").eval()
with torch.no_grad():
    error = (model(data["images"]) - data["expected"]).abs().max().item()
assert "semu_peft" not in sys.modules
print(error)
'''
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


def test_the_delta_weight_of_the_lora_is_that_of_the_adapter() -> None:
    model = adapted()
    model.base_model.model.linear.set_scale("default", -0.5)
    config, state = to_lora(model)
    layers = semu_layers(model)
    for name in ("linear", "conv1d"):
        down, up = (state[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        delta = layers[name].get_delta_weight("default")
        torch.testing.assert_close(up @ down, delta.T if isinstance(layers[name].base_layer, Conv1D) else delta)
    assert config.lora_alpha == config.r and config.rank_pattern == config.alpha_pattern


def test_uniform_rank_pads_with_zeros(images: Tensor, tmp_path: Path) -> None:
    """One rank for all layers, as vLLM wants it: no patterns, the same output in stock PEFT, grouped layers too."""
    model = adapted(rank_pattern={"linear": 1, "conv": 2})
    with torch.no_grad():
        expected = model(images)
    config, state = to_lora(model, uniform_rank=True)
    assert config.r == config.lora_alpha == 12 and not config.rank_pattern and not config.alpha_pattern
    assert {value.shape[0] for key, value in state.items() if "lora_A" in key} == {12}
    save_as_lora(model, tmp_path, uniform_rank=True)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Network(), tmp_path).eval()
    torch.testing.assert_close(loaded(images), expected, atol=1e-5, rtol=0)


def test_a_lora_does_not_take_the_place_of_the_adapter(tmp_path: Path) -> None:
    """The files have the same names, and the card beside them would go on telling of a SEMU adapter."""
    model = adapted()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="`path` must not be the folder of a SEMU adapter.*Give another folder"):
        save_as_lora(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_modules_to_save_travel_with_the_lora(images: Tensor, tmp_path: Path) -> None:
    model = adapted(modules_to_save=["head"])
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.mul_(2)
        expected = model(images)
    save_as_lora(model, tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Network(), tmp_path).eval()
    torch.testing.assert_close(loaded(images), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{"dilation": 2}, {"padding_mode": "circular"}])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_what_no_lora_can_equal_is_refused(kind: type[nn.Module], settings: dict[str, object], tmp_path: Path) -> None:
    network = nn.Sequential(kind(3, 4, 3, padding=1, **settings))
    model = get_peft_model(network, SemuConfig(target_modules=["0"], init_weights=False, r=2))
    with pytest.raises(ValueError, match="'0'.*merge_and_unload"):
        save_as_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_an_empty_adapter_is_not_exported(tmp_path: Path) -> None:
    model = get_peft_model(Network(), SemuConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match="initialize_semu_weights"):
        save_as_lora(model, tmp_path / "lora")


@pytest.mark.parametrize("core", ["full", "diagonal"])
@pytest.mark.parametrize("conv_mode", ["flatten", "per_channel"])
def test_reranking_is_the_best_approximation_and_says_its_error(core: str, conv_mode: str) -> None:
    model = adapted(core=core, conv_mode=conv_mode)
    before = {name: layer.get_delta_weight("default").detach().clone() for name, layer in semu_layers(model).items()}
    report = rerank(model, r=2)
    for name, layer in semu_layers(model).items():
        after = layer.get_delta_weight("default").detach()
        error = (after - before[name]).norm() / before[name].norm()
        assert report.ranks_after[name] == layer.r["default"] == min(2, report.ranks_before[name])
        assert report.relative_error[name] == pytest.approx(error.item(), abs=1e-5)
        old = layer.weight_to_matrix(before[name], "default").double()
        best = torch.linalg.svdvals(old)[..., 2:].square().sum().sqrt() / old.norm()
        assert report.relative_error[name] == pytest.approx(best.item(), abs=1e-5)
        for basis in (layer.semu_U["default"], layer.semu_V["default"]):
            identity = torch.eye(basis.shape[-1]).expand(*basis.shape[:-2], -1, -1)
            torch.testing.assert_close(basis.mT @ basis, identity, atol=1e-5, rtol=0)
    assert 0 < report.total_relative_error < 1


def test_reranking_by_energy_keeps_that_share(images: Tensor, tmp_path: Path) -> None:
    model = adapted()
    report = rerank(model, explained_variance=0.8)
    assert all(error**2 <= 0.2 + 1e-6 for error in report.relative_error.values())
    assert sum(report.ranks_after.values()) < sum(report.ranks_before.values())
    with torch.no_grad():
        expected = model(images)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    assert torch.equal(PeftModel.from_pretrained(Network(), tmp_path).eval()(images), expected)


def test_reranking_by_all_of_the_energy_changes_nothing(images: Tensor) -> None:
    model = adapted()
    untouched = copy.deepcopy(model)
    assert rerank(model, explained_variance=1.0).total_relative_error == 0.0
    torch.testing.assert_close(model(images), untouched(images), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bounds", [{}, {"r": 0}, {"r": True}, {"explained_variance": 0.0}])
def test_reranking_refuses_bad_bounds(bounds: dict[str, object]) -> None:
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((TypeError, ValueError), match="`r`|explained_variance"):
        rerank(model, **bounds)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_merged_adapter_is_not_reranked() -> None:
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        rerank(model, r=1)
