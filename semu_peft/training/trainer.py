"""Unlearning in transformers' Trainer, in the place of `unlearn`: everything that the Trainer does keeps working."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from semu_peft.model_state import eval_mode
from semu_peft.objectives.base import LossFunction, Objective, as_objective
from semu_peft.objectives.batches import split_batch
from semu_peft.objectives.original import remember_start
from semu_peft.objectives.retain import Retain, as_retain
from semu_peft.tuner.adapted import base_model

from .parameters import check_trainable
from .rules import Rule, as_rules
from .trainer_steps import StepsOfTrainer

_STATE_FILE = "objective_state.pt"


class UnlearnTrainer(Trainer):
    """A `transformers.Trainer` that minimises an objective, of `semu_peft.objectives` or any `(model, batch) -> loss`.

    As in [`unlearn`][semu_peft.training.unlearn.unlearn] the model is in eval mode while it trains, so that dropout is
    off and norm statistics stay, and activations are recomputed where `gradient_checkpointing` asks for it. Evaluation
    and prediction report the objective as `eval_loss`, and give `compute_metrics` the model's predictions; their random
    draws are the same at each evaluation and leave those of the training alone. A checkpoint has the objective's random
    state, and those of rules and retain data.

    The Trainer's `compute_loss_func` would do for an objective that reads the model's output alone; one that asks the
    original model as well, such as decoupled distillation, needs the model itself.

    Args:
        objective: `(model, batch) -> scalar loss`. A batch is what the data collator makes.
        retain: What to keep, as in `unlearn`: each is gone through in a cycle, one batch a forget batch, and is no part
            of the evaluation.
        rules: [Rules][semu_peft.training.rules.base.Rule] that edit each step, in order, after the Trainer's own
            clipping (`max_grad_norm`).
        args: All other arguments are those of `Trainer`.

    Raises:
        TypeError: `objective` cannot be called, or something in `rules` or `retain` is none.
        ValueError: Rules are to run under DeepSpeed, or one is to edit parameters of which each process has a part.

    Examples:
        >>> import tempfile, torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, initialize_semu_weights, objectives
        >>> from semu_peft.training.trainer import UnlearnTrainer
        >>> from transformers import TrainingArguments, ViTConfig, ViTForImageClassification
        >>> size = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1}
        >>> vit = ViTForImageClassification(ViTConfig(num_attention_heads=2, **size))
        >>> data = [{"pixel_values": torch.randn(3, 8, 8), "labels": torch.tensor(i % 2)} for i in range(8)]
        >>> objective = objectives.DecoupledDistillation()
        >>> model = get_peft_model(vit, SemuConfig(target_modules="all-linear", task_type="SEQ_CLS"))
        >>> batches = torch.utils.data.DataLoader(data, batch_size=4)
        >>> _ = initialize_semu_weights(model, batches, objective, progress=False)
        >>> args = TrainingArguments(
        ...     tempfile.mkdtemp(), max_steps=2, learning_rate=1e-2, report_to="none", disable_tqdm=True, use_cpu=True)
        >>> trainer = UnlearnTrainer(model, args, train_dataset=data, eval_dataset=data, objective=objective)
        >>> trainer.train().global_step
        {'train_runtime': ...}
        2
    """

    model: nn.Module

    def __init__(
        self,
        *args: Any,
        objective: LossFunction,
        retain: Retain | Sequence[Retain] | None = None,
        rules: Rule | Iterable[Rule] = (),
        **kwargs: Any,
    ) -> None:
        self.objective: Objective = as_objective(objective)
        self.steps = StepsOfTrainer(self, self.objective, as_retain(retain), as_rules(rules, None))
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # so that accumulated batches are averaged, not summed
        self._draws_of_evaluation = self.objective.state_dict()
        self._modes: ExitStack | None = None
        self.add_callback(_SaveObjective(self))
        self.add_callback(self.steps)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        remember_start(self.model)  # the original of an adapter whose start splits the weight
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder and (state := Path(folder, _STATE_FILE)).is_file():
            self.objective.load_state_dict(torch.load(state, map_location="cpu", weights_only=True))
        if folder:
            self.steps.load(Path(folder))
        with ExitStack() as stack:
            self.steps.begin(stack)
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        check_trainable(self.model)  # after a checkpoint has been loaded, which may be what gives the adapter its bases
        return super().create_optimizer(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with (
            ExitStack() as self._modes
        ):  # from the forward pass, which the Trainer begins in train mode, to the backward
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if torch.is_grad_enabled() and self._modes is not None:
            self._modes.enter_context(eval_mode(model))
            return self.steps.loss(model, inputs)
        drawn = self.objective.state_dict()
        self.objective.load_state_dict(self._draws_of_evaluation)
        loss = self.objective(model, inputs)
        self.objective.load_state_dict(drawn)
        return (loss, _predictions(model, inputs)) if return_outputs else loss


class _SaveObjective(TrainerCallback):
    """Write the objective's random state into each checkpoint."""

    def __init__(self, trainer: UnlearnTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            torch.save(self.trainer.objective.state_dict(), folder / _STATE_FILE)


def _predictions(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """The model's outputs as the Trainer reads them: a mapping, or a tuple behind the loss."""
    if isinstance(base_model(model), PreTrainedModel):
        return model(**inputs)
    output = model(**split_batch(inputs)[1])  # a model of one's own need not take labels
    return (None, *output) if isinstance(output, tuple) else output if isinstance(output, dict) else (None, output)
