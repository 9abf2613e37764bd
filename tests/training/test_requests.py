"""One request after the other, each with an adapter of its own: earlier ones stay as they are, and stay on."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from semu_peft import SemuConfig, initialize_semu_weights, objectives, unlearn
from semu_peft.evaluation import predict
from semu_peft.tuner.adapted import semu_layers

CLASSES = 6
CONFIG = SemuConfig(target_modules=["0", "2"], min_parameters=0)


def examples(label: int) -> list[Any]:
    """Points around a place of their own for each class."""
    generator = torch.Generator().manual_seed(label)
    places = 3 * torch.eye(CLASSES, 8)
    return [(places[label] + 0.3 * torch.randn(32, 8, generator=generator), torch.full((32,), label))]


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    data = [examples(label)[0] for label in range(CLASSES)]
    x, y = torch.cat([part[0] for part in data]), torch.cat([part[1] for part in data])
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def forget(model: Any, label: int, adapter_name: str) -> None:
    objective = objectives.DecoupledDistillation()
    initialize_semu_weights(model, examples(label), objective, adapter_name=adapter_name, progress=False)
    unlearn(model, examples(label), objective, epochs=100, learning_rate=0.2, adapter_name=adapter_name, progress=False)


def accuracies(model: Any) -> list[float]:
    return [predict(model, examples(label), progress=False).accuracy for label in range(CLASSES)]


def test_a_second_request_on_top_of_the_first_leaves_it_as_it_was(trained: nn.Module) -> None:
    model = get_peft_model(copy.deepcopy(trained), CONFIG)
    forget(model, 0, "default")
    first = {name: layer.semu_core["default"].clone() for name, layer in semu_layers(model).items()}
    names = ["default"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for label in (1, 2):
            names.append(f"request-{label}")
            model.add_adapter(names[-1], CONFIG)
            model.base_model.set_adapter(names)
            forget(model, label, names[-1])
    gone = accuracies(model)
    assert max(gone[:3]) < 10 and min(gone[3:]) > 90
    assert all(torch.equal(layer.semu_core["default"], first[name]) for name, layer in semu_layers(model).items())


def test_switching_an_earlier_request_off_is_said(trained: nn.Module) -> None:
    model = get_peft_model(copy.deepcopy(trained), CONFIG)
    forget(model, 0, "default")
    model.add_adapter("second", CONFIG)
    model.set_adapter("second")
    with pytest.warns(UserWarning, match=r"\['default'\] are not active.*set_adapter\(\['default', 'second'\]\)"):
        initialize_semu_weights(model, examples(1), objectives.GradientAscent(), adapter_name="second", progress=False)
    model.set_adapter("default")
    with pytest.raises(ValueError, match=r"'second' is not active.*set_adapter\(\['default', 'second'\]\)"):
        unlearn(model, examples(1), objectives.GradientAscent(), adapter_name="second", progress=False)


def test_training_earlier_requests_again_is_said(trained: nn.Module) -> None:
    model = get_peft_model(copy.deepcopy(trained), CONFIG)
    forget(model, 0, "default")
    model.add_adapter("second", CONFIG)
    model.base_model.set_adapter(["default", "second"])
    initialize_semu_weights(model, examples(1), objectives.GradientAscent(), adapter_name="second", progress=False)
    with pytest.warns(UserWarning, match=r"\['default', 'second'\] are all trained.*adapter_name='second'"):
        unlearn(model, examples(1), objectives.GradientAscent(), progress=False)


def test_a_trained_adapter_is_started_again_only_when_told(trained: nn.Module) -> None:
    model = get_peft_model(copy.deepcopy(trained), CONFIG)
    forget(model, 0, "default")
    before = accuracies(model)
    with pytest.raises(ValueError, match="bring back what it has forgotten.*`add_adapter`.*overwrite=True"):
        forget(model, 1, "default")
    assert accuracies(model) == before


@pytest.mark.parametrize("combination", ["cat", "linear", "svd"])
def test_a_sum_shares_no_memory_with_its_sources(trained: nn.Module, combination: Any) -> None:
    model = get_peft_model(copy.deepcopy(trained), SemuConfig(target_modules=["0"], r=2, init_weights=False))
    model.add_weighted_adapter(["default"], [1.0], "sum", combination_type=combination)
    layer = semu_layers(model)["0"]
    before = layer.get_delta_weight("sum").clone()
    for tensors in (layer.semu_U, layer.semu_V, layer.semu_core):
        tensors["default"].data.mul_(3)
    assert torch.equal(layer.get_delta_weight("sum"), before)
