"""What rules may ask of the data of a step: its gradient again, those of the retain data, those of single examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from semu_peft.gradients.gather import check_loss
from semu_peft.objectives.base import Objective
from semu_peft.objectives.examples import single_examples

from .trials import Term, Trials

Losses = Iterable[Tensor]


class GradientsOfStep:
    """Gradients of a step's losses, see [`StepData`][semu_peft.training.rules.base.StepData].

    Args:
        parameters: What is trained, by name.
        objectives: Those of the run, whose random draws begin again at `drawn` for each question.
        drawn: Their states as the step found them.
        losses: The losses that add up to the step's.
        retain_losses: For each retain term, the losses that add up to its own, without its weight.
        example_losses: The forget objective on one example after the other.
        mean: Takes the mean of a gradient over processes, where the backward pass has not.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        objectives: Sequence[Objective],
        drawn: Sequence[Any],
        *,
        losses: Callable[[], Losses],
        retain_losses: Sequence[Callable[[], Losses]],
        example_losses: Callable[[], Losses],
        mean: Callable[[Tensor], Tensor],
    ) -> None:
        self.parameters, self.objectives, self.drawn = parameters, objectives, drawn
        self.losses, self.retain_losses, self.example_losses, self.mean = losses, retain_losses, example_losses, mean

    def gradient(self) -> dict[str, Tensor]:
        return self._of(self.losses)

    def retain_gradients(self) -> list[dict[str, Tensor]]:
        return [self._of(losses) for losses in self.retain_losses]

    def example_gradients(self) -> Iterator[dict[str, Tensor]]:
        with self._same_draws(), torch.enable_grad():
            for loss in self.example_losses():
                with self._own_gradients():
                    loss.backward()
                    found = self._found()
                yield found

    def _of(self, losses: Callable[[], Losses]) -> dict[str, Tensor]:
        with self._same_draws(), self._own_gradients(), torch.enable_grad():
            for loss in losses():
                loss.backward()
            return {name: self.mean(gradient) for name, gradient in self._found().items()}

    def _found(self) -> dict[str, Tensor]:
        each = self.parameters.items()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad.detach() for name, p in each}

    @contextmanager
    def _own_gradients(self) -> Iterator[None]:
        """The step's own gradients are put aside in the meantime."""
        kept = [(parameter, parameter.grad) for parameter in self.parameters.values()]
        try:
            for parameter, _ in kept:
                parameter.grad = None
            yield
        finally:
            for parameter, gradient in kept:
                parameter.grad = gradient

    @contextmanager
    def _same_draws(self) -> Iterator[None]:
        now = [objective.state_dict() for objective in self.objectives]
        _load(self.objectives, self.drawn)
        try:
            yield
        finally:
            _load(self.objectives, now)


def gradients_of_batches(
    parameters: Mapping[str, nn.Parameter],
    model: nn.Module,
    objectives: Sequence[Objective],
    weights: Sequence[float],
    drawn: Sequence[Any],
    batches: Sequence[tuple[Any, Sequence[Any]]],
    losses: Callable[[], Losses],
) -> GradientsOfStep:
    """What rules may ask of a step whose loss is a mean over batches; nothing is worked out before they do.

    Args:
        parameters: What is trained, by name.
        model: What the objectives are called with.
        objectives: The forget objective, then that of each retain term.
        weights: Those of the retain terms.
        drawn: The states of the objectives as the step found them.
        batches: Each forget batch with a batch of each retain term.
        losses: Those that add up to the step's whole loss.
    """
    count = len(batches)

    def losses_of_term(index: int) -> Iterator[Tensor]:
        for _, retained in batches:
            loss = objectives[1 + index](model, retained[index])
            check_loss(loss, "the retain data, for a rule")
            yield loss.reshape(()) / count

    def example_losses() -> Iterator[Tensor]:
        if any(weights):
            raise ValueError(
                "`retain` must weigh nothing beside a rule that takes the gradient of each forget example, got "
                f"weights {list(weights)}. Set `weight=0`, or put these data among the forget batches."
            )
        for batch, _ in batches:
            for example in single_examples(batch):
                loss = objectives[0](extract_model_from_parallel(model), example)
                check_loss(loss, "one example, for a rule")
                yield loss.reshape(())

    return GradientsOfStep(
        parameters, objectives, drawn, losses=losses,
        retain_losses=[partial(losses_of_term, index) for index in range(len(weights))],
        example_losses=example_losses, mean=lambda gradient: gradient,
    )  # fmt: skip


def gradients_of_terms(
    parameters: Mapping[str, nn.Parameter], trials: Trials, terms: Sequence[Term], mean: Callable[[Tensor], Tensor]
) -> GradientsOfStep:
    """What rules may ask of the terms of a step by natural gradients, with what these have prepared.

    Args:
        parameters: The cores by name.
        trials: It evaluates the terms.
        terms: Those of the step, of each batch one for the forget objective and one for each retain term.
        mean: The mean of a gradient over processes.
    """

    def losses_of_retain_term(index: int) -> Iterator[Tensor]:
        own = terms[1 + index :: len(trials.objectives)]
        for term in own:
            yield term.objective.evaluate(trials.model, term.batch, term.prepared).loss / len(own)

    def example_losses() -> Iterator[Tensor]:
        raise ValueError(
            "`rules` that take the gradient of each example bound what a single one does to the model, and natural "
            "gradients look at the batch itself. Give `learning_rate` or another `optimizer`."
        )

    return GradientsOfStep(
        parameters, trials.objectives, [objective.state_dict() for objective in trials.objectives],
        losses=lambda: [trials.evaluate(terms, with_gradient=True).loss],
        retain_losses=[partial(losses_of_retain_term, index) for index in range(len(trials.weights))],
        example_losses=example_losses, mean=mean,
    )  # fmt: skip


def _load(objectives: Sequence[Objective], states: Sequence[Any]) -> None:
    for objective, state in zip(objectives, states, strict=True):
        objective.load_state_dict(state)
