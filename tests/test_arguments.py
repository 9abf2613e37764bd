"""Usual mistakes in arguments: each gives a ValueError or TypeError that names the argument and says a mend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Mlp, vector_batches
from peft import get_peft_model
from torch import nn
from training_runs import QUIET

from semu_peft import (
    ClipGradientNorm,
    EarlyStopping,
    RankBudget,
    Retain,
    SemuConfig,
    Sketch,
    SubspaceProfile,
    from_lora,
    gather,
    hotswap_adapter,
    initialize_semu_weights,
    localize,
    rerank,
    save_as_lora,
    search_scale,
    set_scale,
    starts,
    to_lora,
    unlearn,
)
from semu_peft.evaluation import Predictions, evaluate_forgetting, membership_inference
from semu_peft.objectives import CrossEntropy, RandomLabel, UnseenConfidence

NAN = float("nan")
X = torch.ones(6)


def fresh(**options: Any) -> Any:
    return get_peft_model(Mlp(), SemuConfig(**{"target_modules": ["fc1", "fc2"], "r": 2, **options}))


def ready() -> Any:
    return fresh(init_weights=False)


def initialize(**given: Any) -> SubspaceProfile:
    known = {"model": fresh, "forget": vector_batches, "objective": CrossEntropy}
    arguments = {name: make() for name, make in known.items() if name not in given}
    return initialize_semu_weights(**{**arguments, **QUIET, **given})


def train(**given: Any) -> Any:
    known = {"model": ready, "forget": vector_batches, "objective": CrossEntropy}
    arguments = {name: make() for name, make in known.items() if name not in given}
    return unlearn(**{**arguments, "max_steps": 2, **QUIET, **given})


def gathered(**given: Any) -> Any:
    return gather(**{"model": Mlp(), "batches": vector_batches(), "objective": CrossEntropy(), **QUIET, **given})


def summed(**given: Any) -> Any:
    return ready().add_weighted_adapter(**{"adapters": ["default"], "weights": [1.0], "adapter_name": "sum", **given})


SCORES = torch.tensor([0.1, 0.6, 0.9])


def evaluated(**given: Any) -> Any:
    said = Predictions(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]), SCORES, 4)
    return evaluate_forgetting(**{"model": ready(), "forget": said, "retain": said, "test": said, **given})


def attacked(**given: Any) -> Any:
    return membership_inference(**{"member": SCORES, "non_member": SCORES, "forget": SCORES, **given})


def taken_from_lora(**given: Any) -> Any:
    config, state_dict = to_lora(ready())
    return from_lora(**{"config": config, "state_dict": state_dict, **given})


MISTAKES: list[tuple[Callable[..., Any], dict[str, list[Any]]]] = [
    (
        fresh,
        {
            "exclude_modules": [7, [{"a": 1}], "((("], "target_modules": [5, [5], "(((", r"(\w+)+!"],
            "layers_to_transform": ["x", {}, True], "target_parameters": [5, {"a": 1}, "weight"],
            "modules_to_save": [5, "fc2", [5], ["((("]], "orthogonal_to_weight": ["no", None], "inference_mode": ["no"],
            "ensure_weight_tying": ["no"], "explained_variance_pattern": [{"(((": 0.5}, {5: 0.5}],
            "rank_pattern": [{"(((": 1}, {5: 1}], "trainable_token_indices": [{"fc1": [0]}],
            "task_type": ["CAUSAL_LM"],
        },
    ),
    (
        initialize,
        {
            "model": [None, nn.Linear(2, 2)], "forget": [None, 5, "x", [], [None]],
            "objective": [None, "x", CrossEntropy, lambda m, b: None], "rank_budget": [5, {}], "retain": [5, "x"],
            "keep_explained_variance": ["x", 0, NAN, True], "adapter_name": ["nope", None, ["default"], ""],
            "start": [5, "zero", starts.Zero, lambda *given: None], "statistic": [5, "sum"], "retain_rule": ["x"],
            "overwrite": ["no"], "progress": ["no"],
        },
    ),
    (
        train,
        {
            "model": [None], "forget": [None, 5, "x", [], [None]], "objective": [None, "x"],
            "learning_rate": [NAN, -1.0, "x", float("inf")], "optimizer": ["adam", 0, lambda p: None],
            "scheduler": ["cosine", 0, lambda optimizer, steps: None], "max_grad_norm": [-1.0, 0.0, NAN, "x"],
            "seed": ["x", None, 1.5, -1], "output_dir": [5, NAN], "epochs": [True, 0, 1.5],
            "accelerator": [True, "cpu"], "resume_from_checkpoint": [True, 5], "retain": [5, "x", [CrossEntropy()]],
            "rules": [5, "x"], "callbacks": [5], "mixed_precision": ["fp17", 5], "save_total_limit": [0, 1],
            "checkpointing_steps": [0, 1.5], "gradient_accumulation_steps": [None, 0], "adapter_name": [5, "", "nope"],
            "progress": ["no"], "max_steps": [0, "x"],
        },
    ),
    (
        lambda **given: train(
            callbacks=EarlyStopping(**{"metric": lambda model: 0.0, **given}), epochs=1, max_steps=None
        ),
        {
            "metric": [0.9, "acc", lambda model: NAN, lambda model: "x", lambda model: None],
            "patience": [0, 1.5, True], "min_delta": [NAN, "x", None], "restore_best": ["no", None],
        },
    ),
    (
        lambda **given: Retain(**{"batches": vector_batches(), "objective": CrossEntropy(), **given}),
        {"batches": [None, 5, "x"], "objective": [None, 5, CrossEntropy], "weight": [NAN, "x", None, -1.0]},
    ),
    (
        gathered,
        {
            "model": [None], "batches": [None, 5, [], [None]], "objective": [None, 5], "targets": [5, ["nope"]],
            "statistic": [5, "sum"], "adapter_name": [5, "a.b"],
        },
    ),
    (lambda **given: ClipGradientNorm(**given), {"max_norm": [0, NAN, "x", None]}),
    (lambda **given: Sketch.of_size(**given), {"size": [0, 1.5, "x"], "seed": ["x", 1.5], "device": ["nope", 1.5]}),
    (lambda **given: RankBudget(**{"total": 4, **given}), {
        "total": [0, 1.5, True, None, "x", NAN], "unit": ["bits", None], "relative_to": [5],
    }),
    (lambda **given: SubspaceProfile.load(**given), {"path": [None, 5]}),
    (
        lambda **given: initialize().initialize(fresh(), **given),
        {"explained_variance": ["x", 0, NAN], "rank_budget": [5], "start": [5], "adapter_name": [5, "nope"]},
    ),
    (lambda **given: RandomLabel(**given)(ready(), vector_batches()[0]), {
        "num_labels": ["3", 1, 99, 2.5, 0], "seed": ["x", 1.5, None],
    }),
    (lambda **given: UnseenConfidence(**{"confidences": SCORES, **given})(ready(), vector_batches()[0]), {
        "confidences": [None, [0.5], SCORES * NAN], "reference": ["x"],
    }),
    (lambda weight: weight * CrossEntropy(), {"weight": [NAN, "x", None]}),
    (lambda **given: rerank(**{"model": ready(), "r": 1, **given}), {
        "r": [0, 1.5, "x"], "explained_variance": ["x", 2, NAN], "adapter_name": ["nope", ["default"]],
    }),
    (taken_from_lora, {
        "config": [None], "state_dict": [None, {}, {5: 1}], "r": [0, 1.5, NAN, "x", True],
        "explained_variance": ["x", 0],
    }),
    (lambda **given: set_scale(**{"model": ready(), "scale": 0.5, **given}), {
        "model": [None], "scale": [NAN, "x", None], "adapter_name": ["nope", 5],
    }),
    (lambda **given: search_scale(**{"model": ready(), "score": lambda m: 0.0, **given}), {
        "model": [None], "score": [None, 5, lambda m: NAN], "highest": [0, -1, NAN, "x"], "halvings": [-1, 0.5, "x"],
        "adapter_name": ["nope", 3, ""],
    }),
    (lambda **given: starts.FirstStep(**{"learning_rate": 0.1, **given}), {
        "learning_rate": [-1, NAN, "x", None], "transform": ["adam", None],
    }),
    (lambda **given: starts.Ascent(**given), {"scale": [NAN, "x"]}),
    (lambda **given: starts.WeightSplit(**given), {"basis": ["svd", None], "drop": ["no", 1]}),
    (lambda **given: starts.RankOneWrite(**{"keys": {"fc1": X}, "values": {"fc1": X}, **given}), {
        "keys": [{}, None], "values": [{}, None], "rule": ["x"], "damping": [-1, NAN], "explained_variance": [0, 2],
    }),
    (lambda **given: starts.Projection(**given), {"directions": [{}, None, {"fc1": 5}]}),
    (lambda **given: localize.decode_neurons(**{"model": ready(), **given}), {"model": [None], "topk": [0, 0.5, "x"]}),
    (lambda **given: localize.expert_affinity(**{"model": ready(), "batches": [], **given}), {
        "model": [None], "batches": [None, 5],
    }),
    (lambda **given: to_lora(**{"model": ready(), **given}), {"model": [None], "uniform_rank": ["no"]}),
    (lambda **given: save_as_lora(ready(), **given), {"path": [None, 5]}),
    (lambda **given: hotswap_adapter(ready(), **given), {"model_name_or_path": [None, 5]}),
    (summed, {
        "adapters": [None, "default", ["nope"]], "weights": [None, ["x"], [NAN]], "adapter_name": ["", "a.b", None],
        "svd_rank": [1.5, 0, "x"], "density": ["x", 2.0], "majority_sign_method": ["x"],
    }),
    (evaluated, {
        "model": [None], "forget": [None, [], [None]], "test": [5], "device": ["nope", 1.5],
        "max_attack_examples": [0, 1.5, NAN, "x"], "seed": ["x", 1.5], "seconds": [-1, "x"],
        "trainable_parameters": [-1, 0.5],
    }),
    (attacked, {
        "member": [None, [0.5], SCORES * 2], "forget": [torch.zeros(0), SCORES[None]],
        "max_examples": [0, True, NAN, 1.5], "seed": [None, "x"],
    }),
]  # fmt: skip
CASES = [
    pytest.param(call, argument, value, id=f"{number}-{argument}-{index}")
    for number, (call, arguments) in enumerate(MISTAKES)
    for argument, values in arguments.items()
    for index, value in enumerate(values)
]


@pytest.mark.parametrize(("call", "argument", "value"), CASES)
def test_a_mistake_is_named(call: Callable[..., Any], argument: str, value: Any) -> None:
    """By the argument, in backticks or so that nobody can mistake it; nothing passes silently."""
    with pytest.raises((ValueError, TypeError)) as raised:
        call(**{argument: value})
    said = str(raised.value)
    assert argument in said or argument.rstrip("es") in said, said
    assert len(said) > len(argument) + 20, said
