"""`UnlearnTrainer` is transformers' Trainer with the loss and the modes of `unlearn`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import CLASSES, VIT, vit
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from semu_peft import (
    NotInitializedError,
    Retain,
    RetainSafe,
    Rule,
    SemuConfig,
    initialize_semu_weights,
    objectives,
    unlearn,
)
from semu_peft.training.rules import NormCap, PrivateGradient, RowScale, SharpnessAware, SoftThreshold, Step
from semu_peft.training.trainer import UnlearnTrainer
from semu_peft.tuner.adapted import semu_layers


class InOrder(UnlearnTrainer):
    """The Trainer shuffles; `unlearn` does not."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def images() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randn(16, 3, 8, 8, generator=draw)
    return [{"pixel_values": image, "labels": torch.tensor(index % CLASSES)} for index, image in enumerate(pixels)]


def adapted() -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(vit(), SemuConfig(target_modules=[VIT["query"], VIT["up"]], r=3, init_weights=False))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "num_train_epochs": 3, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "weight_decay": 0.0,
        "learning_rate": 1e-2, "max_grad_norm": 0.0, "report_to": "none", "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "optim": "adamw_torch",
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**defaults, **options})


def cores(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.semu_core["default"].detach().clone() for name, layer in semu_layers(model).items()}


def assert_same_cores(first: nn.Module, second: nn.Module) -> None:
    start = cores(adapted())
    for name, core in cores(first).items():
        assert (core - start[name]).abs().max() > 1e-3
        torch.testing.assert_close(cores(second)[name], core, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_ends_where_unlearn_does(accumulation: int, tmp_path: Path) -> None:
    """Optimiser, schedule, accumulation and modes given alike, the cores are the same."""
    objective = objectives.DecoupledDistillation()
    first, second = adapted(), adapted()
    unlearn(
        first, DataLoader(images(), batch_size=4), objective, epochs=3, learning_rate=1e-2,
        gradient_accumulation_steps=accumulation, progress=False,
    )  # fmt: skip
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation)
    trainer = InOrder(second, args, train_dataset=images(), objective=objective)
    trainer.train()
    assert_same_cores(first, second)
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_what_takes_steps_of_its_own_takes_one_with_the_optimiser(tmp_path: Path) -> None:
    """Of all batches that gradients accumulate over, of a last group that is cut short too; as in `unlearn`."""
    found = []
    batches, options = DataLoader(images(), batch_size=4), {"gradient_accumulation_steps": 3}
    for model in (adapted(), adapted()):
        keep = objectives.PrimalDual(objectives.CrossEntropy(), limit=0.5)
        retain = Retain(DataLoader(images()[::-1], batch_size=4), keep)
        if not found:
            unlearn(model, batches, objectives.DecoupledDistillation(), retain=retain, epochs=2, learning_rate=1e-2,
                    progress=False, **options)  # fmt: skip
        else:
            args = arguments(tmp_path, num_train_epochs=2, **options)
            InOrder(model, args, train_dataset=images(), objective=objectives.DecoupledDistillation(),
                    retain=retain).train()  # fmt: skip
        found.append((keep.steps, keep.multiplier))
    assert found[0][0] == found[1][0] == 4 and found[0][1] == pytest.approx(found[1][1], rel=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, tmp_path: Path) -> None:
    """Layers are computed twice, in eval mode, and the cores are those without it."""
    plain, recomputed, seen = adapted(), adapted(), []
    block = next(module for module in recomputed.modules() if isinstance(module, GradientCheckpointingLayer))
    next(block.children()).register_forward_hook(lambda module, *_: seen.append(module.training))
    for model, options in (
        (plain, {}),
        (
            recomputed,
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}},
        ),
    ):
        InOrder(
            model, arguments(tmp_path, **options), train_dataset=images(), objective=objectives.CrossEntropy()
        ).train()
    assert len(seen) == 24 and not any(seen)
    assert_same_cores(plain, recomputed)


def accuracy(predictions: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(predictions.predictions.argmax(-1) == predictions.label_ids))}


def test_evaluation_and_prediction(tmp_path: Path) -> None:
    """`eval_loss` is the objective's, the metrics see the model's logits and labels, and prediction returns them."""
    objective, model = objectives.DecoupledDistillation(), adapted()
    trainer = UnlearnTrainer(
        model, arguments(tmp_path), eval_dataset=images(), objective=objective, compute_metrics=accuracy
    )
    whole = next(iter(DataLoader(images(), batch_size=16)))
    with torch.no_grad():
        logits = model.eval()(pixel_values=whole["pixel_values"]).logits
        expected = objective(model, whole).item()
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["eval_accuracy"] == pytest.approx((logits.argmax(-1) == whole["labels"]).float().mean().item())
    predicted = trainer.predict(images())
    np.testing.assert_allclose(predicted.predictions, logits.numpy(), atol=1e-5)
    assert predicted.label_ids.tolist() == whole["labels"].tolist()
    without = trainer.predict([{"pixel_values": item["pixel_values"]} for item in images()])
    np.testing.assert_allclose(without.predictions, logits.numpy(), atol=1e-5)


class Own(nn.Module):
    """A model that takes no labels, and returns a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(pixel_values.flatten(1))


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Own(), SemuConfig(target_modules=["head"], r=2, init_weights=False))
    args = arguments(tmp_path, remove_unused_columns=False, label_names=["labels"])
    trainer = UnlearnTrainer(
        model, args, train_dataset=images(), eval_dataset=images(), objective=objectives.GradientAscent(),
        compute_metrics=accuracy,
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_loss"] < before and 0 <= found["eval_accuracy"] <= 1


def test_draws_of_evaluation_are_their_own(tmp_path: Path) -> None:
    """Evaluating between the steps changes nothing, and twice at the same weights says the same."""
    models = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        models.append(adapted())
        trainer = InOrder(
            models[-1], arguments(tmp_path, **options), train_dataset=images(), eval_dataset=images(),
            objective=objectives.RandomLabel(seed=3),
        )  # fmt: skip
        trainer.train()
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
    assert_same_cores(*models)


def test_resuming(tmp_path: Path) -> None:
    """A run that is resumed, in a model whose adapter waits for its bases, ends where an uninterrupted one does."""

    def fresh() -> PeftModel:
        torch.manual_seed(0)
        return get_peft_model(vit(), SemuConfig(target_modules=[VIT["query"], VIT["up"]], r=3))

    def trainer(model: PeftModel, steps: int) -> UnlearnTrainer:
        args = arguments(
            tmp_path, save_strategy="steps", save_steps=4, max_steps=steps, lr_scheduler_type="constant",
        )  # fmt: skip
        return InOrder(model, args, train_dataset=images(), objective=objectives.RandomLabel(seed=3))

    whole = fresh()
    initialize_semu_weights(whole, DataLoader(images(), batch_size=4), objectives.RandomLabel(), progress=False)
    trainer(whole, 8).train()
    resumed = fresh()
    assert trainer(resumed, 8).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4")).global_step == 8
    assert resumed.peft_config["default"].ranks == whole.peft_config["default"].ranks
    for name, core in cores(whole).items():
        assert core.any()
        torch.testing.assert_close(cores(resumed)[name], core, atol=1e-6, rtol=1e-5)


def test_what_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(vit(), SemuConfig(target_modules=[VIT["query"]]))
    with pytest.raises(NotInitializedError):
        UnlearnTrainer(model, arguments(tmp_path), train_dataset=images(), objective=objectives.CrossEntropy()).train()
    with pytest.raises(TypeError, match="objective"):
        UnlearnTrainer(model, arguments(tmp_path), train_dataset=images(), objective="npo")


def by_hand(**options: Any) -> PeftModel:
    """What `unlearn` makes of the batches that the Trainer has."""
    model = adapted()
    unlearn(
        model, DataLoader(images(), batch_size=4), objectives.DecoupledDistillation(), epochs=3, learning_rate=1e-2,
        progress=False, **options,
    )  # fmt: skip
    return model


def kept(weight: float) -> Retain:
    return Retain(DataLoader(images()[4:], batch_size=4), objectives.CrossEntropy(), weight)


RULES: dict[str, Any] = {
    "capped": lambda: [NormCap(0.05)],
    "sharp": lambda: [SharpnessAware(0.1)],
    "thresholded, then capped": lambda: [SoftThreshold(1e-3), NormCap(0.2)],
    "scaled rows": lambda: [RowScale(2.0)],
    "private": lambda: [PrivateGradient(1.0, 0.1, seed=3)],
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", RULES)
def test_rules_do_to_a_step_what_they_do_in_unlearn(name: str, accumulation: int, tmp_path: Path) -> None:
    """Before the optimiser and after it, also where a step has several batches."""
    expected = by_hand(rules=RULES[name](), gradient_accumulation_steps=accumulation)
    model = adapted()
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation)
    objective = objectives.DecoupledDistillation()
    InOrder(model, args, train_dataset=images(), objective=objective, rules=RULES[name]()).train()
    assert_same_cores(expected, model)
    plain = by_hand(gradient_accumulation_steps=accumulation)
    assert any((core - cores(plain)[key]).abs().max() > 1e-4 for key, core in cores(model).items())


@pytest.mark.parametrize("is_safe", [False, True])
def test_retain_data_are_those_of_unlearn(is_safe: bool, tmp_path: Path) -> None:
    """As a term of the loss, in a cycle of their own; and as what a rule keeps."""
    weight = 0.0 if is_safe else 0.5
    expected = by_hand(retain=kept(weight), rules=[RetainSafe(memory=2)] if is_safe else ())
    model, rules = adapted(), [RetainSafe(memory=2)] if is_safe else ()
    objective = objectives.DecoupledDistillation()
    trainer = InOrder(
        model, arguments(tmp_path), train_dataset=images(), objective=objective, retain=kept(weight), rules=rules
    )
    trainer.train()
    assert_same_cores(expected, model)


def test_rules_and_retain_data_go_on_where_they_stood(tmp_path: Path) -> None:
    """A resumed run ends where an uninterrupted one does, with rules that remember and shuffled retain data."""

    def run(folder: Path, **options: Any) -> PeftModel:
        model = adapted()
        args = arguments(folder, save_strategy="steps", save_steps=5, max_steps=8, lr_scheduler_type="constant")
        retain = Retain(DataLoader(images(), batch_size=4, shuffle=True), objectives.RandomLabel(seed=3), 0.0)
        rules = [RetainSafe(memory=2), NormCap(0.05), PrivateGradient(9.0, 0.1, seed=3)]
        InOrder(
            model,
            args,
            train_dataset=images(),
            objective=objectives.DecoupledDistillation(),
            retain=retain,
            rules=rules,
        ).train(**options)
        return model

    whole = run(tmp_path)
    assert_same_cores(whole, run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-5")))
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be of a run with as many rules"):
        InOrder(
            adapted(), arguments(tmp_path), train_dataset=images(), objective=objectives.CrossEntropy(),
            rules=NormCap(0.05),
        ).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))  # fmt: skip


def test_rules_see_gradients_that_the_trainer_has_clipped(tmp_path: Path) -> None:
    class Seen(Rule):
        norms: list[float] = []

        def gradients(self, step: Step) -> None:
            self.norms.append(torch.stack([gradient.norm() for gradient in step.gradients.values()]).norm().item())

    args = arguments(tmp_path, max_grad_norm=1e-3, max_steps=2)
    UnlearnTrainer(adapted(), args, train_dataset=images(), objective=objectives.CrossEntropy(), rules=Seen()).train()
    assert Seen.norms == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_rules_and_retain_terms_that_are_none(tmp_path: Path) -> None:
    for options in ({"rules": "norm"}, {"retain": [images()]}):
        with pytest.raises(TypeError, match=f"`{next(iter(options))}` must"):
            UnlearnTrainer(adapted(), arguments(tmp_path), objective=objectives.CrossEntropy(), **options)
    trainer = UnlearnTrainer(
        adapted(), arguments(tmp_path), train_dataset=images(), objective=objectives.CrossEntropy(), rules=RetainSafe()
    )
    with pytest.raises(ValueError, match="RetainSafe needs the run's retain data"):
        trainer.train()
