"""What `UnlearnTrainer` does beside transformers' loop: retain data beside each batch, and rules around each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from semu_peft.model_state import eval_mode
from semu_peft.objectives.base import Objective, as_objective
from semu_peft.objectives.retain import Retain
from semu_peft.objectives.wrappers import one_step

from .batches import as_loader, cycle, retain_seed
from .checkpoint import write_states
from .parameters import trained_parameters
from .progress import Position
from .rules import Rule, Step, check_sharded
from .step_data import gradients_of_batches

_STATE_FILE = "unlearn_state"


class StepsOfTrainer(TrainerCallback):
    """Retain terms, rules and the states of all of them, in the events of a `transformers.Trainer`.

    Args:
        trainer: Whose `compute_loss` asks for the [`loss`][semu_peft.training.trainer_steps.StepsOfTrainer.loss].
        objective: The loss on the batches.
        retain: What is added to it.
        rules: What edits each step.

    Examples:
        >>> from semu_peft.objectives import CrossEntropy
        >>> from semu_peft.training.trainer_steps import StepsOfTrainer
        >>> steps = StepsOfTrainer(None, CrossEntropy(), (), ())
        >>> batch = (torch.zeros(1, 2), torch.tensor([0]))
        >>> steps.loss(nn.Identity(), batch)
        tensor(0.6931)
    """

    def __init__(self, trainer: Trainer | None, objective: Objective, retain: Sequence[Retain], rules: Sequence[Rule]):
        self.trainer: Any = trainer
        self.objectives = [objective, *(as_objective(term.objective) for term in retain)]
        self.retain, self.rules = retain, rules
        self.weights = [term.weight for term in retain]
        self.positions = [Position() for _ in retain]
        self.streams: list[Any] = []
        self._batches: list[tuple[Any, list[Any]]] = []  # those of the step that is being taken
        self._drawn: list[Any] = []
        self._step: Step | None = None
        self._as_one = ExitStack()  # open from the beginning of a step to its end

    def begin(self, stack: ExitStack) -> None:
        """Open the retain data, until the stack is closed.

        Raises:
            ValueError: There are rules, and DeepSpeed takes the steps; or a `Retain` is empty.
        """
        if self.rules and self.trainer.is_deepspeed_enabled:
            raise ValueError(
                f"`rules` must be none under DeepSpeed, got {[type(rule).__name__ for rule in self.rules]}: it takes "
                "the step inside the backward pass. Train by FSDP, by one process, or by `unlearn`."
            )
        stack.enter_context(self._as_one)  # so that it is closed where a step fails
        seed = self.trainer.args.data_seed or self.trainer.args.seed
        self._batches.clear()
        loaders = [self.trainer.accelerator.prepare(as_loader(term.batches, "retain")) for term in self.retain]
        each = enumerate(zip(loaders, self.positions, strict=True))
        streams = [cycle(loader, retain_seed(seed, index), at) for index, (loader, at) in each]
        self.streams = [stack.enter_context(closing(stream)) for stream in streams]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch and of the retain batches beside it."""
        retained = [next(stream) for stream in self.streams]
        if self.rules:
            if not self._batches:
                self._drawn = [objective.state_dict() for objective in self.objectives]
            self._batches.append((batch, retained))
        return self._loss(model, batch, retained)

    def _loss(self, model: nn.Module, batch: Any, retained: Sequence[Any]) -> Tensor:
        loss = self.objectives[0](model, batch)
        for weight, objective, each in zip(self.weights, self.objectives[1:], retained, strict=True):
            if weight:  # what weighs nothing is there for rules alone
                loss = loss + weight * objective(model, each)
        return loss

    # ---- rules around a step ----

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._as_one.close()
        self._as_one.enter_context(one_step())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.rules:
            return
        trainer, parameters = self.trainer, trained_parameters(self.trainer.model)
        check_sharded(self.rules, parameters)
        model, batches = trainer.model_wrapped, list(self._batches)

        def losses() -> Iterator[Tensor]:
            for batch, retained in batches:
                with eval_mode(model), trainer.compute_loss_context_manager():
                    yield self._loss(model, batch, retained) / len(batches)

        data = gradients_of_batches(parameters, model, self.objectives, self.weights, self._drawn, batches, losses)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._step = Step(state.global_step, trainer.model, parameters, before, trainer.optimizer, data)
        if not args.max_grad_norm:  # clipping has done it
            trainer.accelerator.unscale_gradients()
        self._apply("gradients")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._step is not None and not self.trainer.accelerator.optimizer_step_was_skipped:
            self._apply("update")
        self._step = None
        self._batches.clear()
        self._as_one.close()

    def _apply(self, method: str) -> None:
        with torch.no_grad(), eval_mode(self.trainer.model):
            for rule in self.rules:
                getattr(rule, method)(self._step)

    # ---- what a checkpoint has of them ----

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if (self.rules or self.retain) and folder.is_dir():
            states = {
                "rules": [rule.state_dict() for rule in self.rules],
                "retain": [vars(position) for position in self.positions],
                "objectives": [objective.state_dict() for objective in self.objectives[1:]],
            }
            write_states(states, folder / self._file)

    def load(self, folder: Path) -> None:
        """Go to where the run stood that wrote a checkpoint.

        Raises:
            ValueError: It was a run of other rules or retain terms.
        """
        path = folder / self._file
        if not path.is_file():
            return
        states = torch.load(path, map_location="cpu", weights_only=True)
        counts = len(states["rules"]), len(states["retain"])
        if counts != (len(self.rules), len(self.retain)):
            raise ValueError(
                f"`resume_from_checkpoint` must be of a run with as many rules and retain terms, got one with "
                f"{counts[0]} and {counts[1]} for {len(self.rules)} and {len(self.retain)}. Give those of that run."
            )
        self.positions = [Position(**position) for position in states["retain"]]
        for rule, state in zip(self.rules, states["rules"], strict=True):
            rule.load_state_dict(state)
        for objective, state in zip(self.objectives[1:], states["objectives"], strict=True):
            objective.load_state_dict(state)

    @property
    def _file(self) -> str:
        args = self.trainer.args
        return f"{_STATE_FILE}_{args.process_index}.pt" if args.world_size > 1 else f"{_STATE_FILE}.pt"
