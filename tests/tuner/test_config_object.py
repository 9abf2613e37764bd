"""The configuration object that a user gives is the one that is used, and may be given again."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Mlp, vector_batches
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering, BertForTokenClassification

from semu_peft import SemuConfig, initialize_semu_weights, objectives, unlearn
from semu_peft.tuner.adapted import semu_layers

FORGET = objectives.CrossEntropy()


def mlp() -> nn.Module:
    torch.manual_seed(3)
    return Mlp()


def initialised(config: SemuConfig, base: nn.Module | None = None) -> PeftModel:
    model = get_peft_model(base or mlp(), config)
    initialize_semu_weights(model, vector_batches(), FORGET, progress=False)
    return model


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("used", [False, True], ids=["new", "used before"])
def test_a_config_given_to_from_pretrained(used: bool, is_trainable: bool, tmp_path: Path) -> None:
    """It is the object that the loaded adapter has, and the adapter that had it before keeps its own settings."""
    config = SemuConfig(target_modules="all-linear")
    model = initialised(config if used else SemuConfig(target_modules="all-linear"))
    unlearn(model, vector_batches(), FORGET, epochs=3, progress=False)
    ranks = dict(model.peft_config["default"].ranks)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path, config=config, is_trainable=is_trainable)
    assert loaded.peft_config["default"] is config and config.inference_mode is not is_trainable
    assert config.ranks == ranks == model.peft_config["default"].ranks
    x = vector_batches()[0][0]
    assert torch.equal(loaded.eval()(x), model.eval()(x)) and not torch.equal(model(x), mlp().eval()(x))


def test_the_same_object_for_several_adapters() -> None:
    """Each starts from what was asked for, and none changes with another, in one model, in several, and after the
    first is gone."""
    config = SemuConfig(target_modules="all-linear", explained_variance=0.8)
    first = initialised(config)
    assert first.peft_config["default"] is config
    ranks = dict(config.ranks)
    first.add_adapter("second", config)
    assert first.peft_config["second"] is config and config.ranks == {}
    assert first.peft_config["default"].ranks == ranks
    assert all(layer.is_initialized("default") for layer in semu_layers(first).values())
    other = get_peft_model(nn.Sequential(nn.Linear(6, 4)), config)  # of other names: the word is resolved anew
    assert set(semu_layers(other)) == {"0"} and not any(
        layer.is_initialized("default") for layer in semu_layers(other).values()
    )
    del other
    bare = inject_adapter_in_model(config, mlp())
    assert config.ranks == {} and set(semu_layers(bare)) == {"fc1", "fc2", "head"}
    initialize_semu_weights(first, vector_batches(), FORGET, progress=False, adapter_name="second")
    assert first.peft_config["second"].ranks and config.ranks == {}


def test_what_was_changed_in_between_counts() -> None:
    config = SemuConfig(target_modules="all-linear", r=2, init_weights=False)
    get_peft_model(mlp(), config)
    config.target_modules, config.r = {"fc1"}, 3
    assert get_peft_model(mlp(), config).peft_config["default"].ranks == {"fc1": 3}


def test_copies_of_a_used_object() -> None:
    """They are pickled and copied like any dataclass, and compare by their fields."""
    config = SemuConfig(target_modules="all-linear")
    initialised(config)
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config and again.to_dict() == config.to_dict()
        assert get_peft_model(mlp(), again).peft_config["default"].ranks == {}


TASKS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "TOKEN_CLS": (BertForTokenClassification, "classifier", {"labels": torch.tensor([[0, 1, 1]])}),
    "QUESTION_ANS": (
        BertForQuestionAnswering,
        "qa_outputs",
        {"start_positions": torch.tensor([0]), "end_positions": torch.tensor([2])},
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_tasks_whose_head_peft_trains(task: str, tmp_path: Path) -> None:
    """The head is trained in full, corrected by no adapter, and saved beside it."""
    kind, head, answers = TASKS[task]
    small = BertConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_labels=2
    )
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), **answers}
    torch.manual_seed(0)
    model = get_peft_model(kind(small), SemuConfig(target_modules="all-linear", task_type=task))
    assert head in model.peft_config["default"].modules_to_save
    initialize_semu_weights(model, [batch], lambda m, b: m(**b).loss, progress=False)
    assert not any(head in name for name in semu_layers(model))
    unlearn(model, [batch], lambda m, b: m(**b).loss, progress=False)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(kind(small), tmp_path)
    assert torch.equal(loaded.eval()(**batch).loss, model.eval()(**batch).loss)
