"""What the model does with its cores at one place: the losses, the damage, and how far from another place that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from semu_peft.gradients.gather import check_loss
from semu_peft.objectives.base import Evaluation, Objective, Outputs
from semu_peft.objectives.distributions import answer_probability, divergence, strike_out
from semu_peft.objectives.original import original

from .held_batches import Pair, share_of_enough

# Nats of forgetting that a whole budget is worth: without any, steps drift, and with ten times as much it is not spent.
_COST_OF_THE_BUDGET = 0.1

Mean = Callable[[dict[str, float]], dict[str, float]]
"""The mean of numbers over all processes."""


@dataclass(eq=False)
class Term:
    """One objective on one batch, with what stays the same while the cores move.

    Attributes:
        objective: What is minimised.
        batch: On what.
        weight: Its weight in the sum.
        prepared: What the objective takes as given on this batch.
        is_forget: Whether this is the forget objective.
        original: What the original says, where damage is measured here; else empty.
    """

    objective: Objective
    batch: Any
    weight: float
    prepared: Any
    is_forget: bool
    original: list[Tensor] = field(default_factory=list)


@dataclass
class Tried:
    """What the model does with the cores at one place.

    Attributes:
        loss: With its graph where that was asked for; so is `spent`, the damage of this process.
        values: Losses, damage and answer probability, as means over all processes.
        terms: The terms with their evaluations.
        damage: What is spent of the budget.
    """

    loss: Tensor
    spent: Tensor
    values: dict[str, float]
    terms: list[tuple[Term, Evaluation]]
    damage: float


class Trials:
    """Evaluates a run's objectives together, wherever the cores are.

    Args:
        model: The model, called by the objectives.
        objectives: The forget objective, and those of the retain data.
        weights: The weights of the latter.
        adapter_name: The adapter that is trained.
        limit: The damage budget, all of which weighs a tenth of a nat in the loss; None for no budget.
        measures_damage: Whether the original is asked for it; else there is the damage that objectives tell by
            themselves, and no budget.
        mean_over_processes: Agrees on numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        objectives: Sequence[Objective],
        weights: Sequence[float],
        adapter_name: str,
        *,
        limit: float | None,
        measures_damage: bool,
        mean_over_processes: Mean,
    ) -> None:
        self.model, self.objectives, self.weights = model, objectives, weights
        self.adapter_name, self.measures_damage = adapter_name, measures_damage
        self.limit, self.damage_weight = limit, 0.0
        self.weigh_damage(1.0)
        self.mean_over_processes = mean_over_processes

    def weigh_damage(self, unit: float) -> None:
        """Take this for a nat, where the loss is in another unit."""
        if self.limit is not None:
            self.damage_weight = _COST_OF_THE_BUDGET * unit / self.limit

    def terms(self, batch: Any, retained: Sequence[Any]) -> list[Term]:
        """Prepare the objectives' batches of one forget batch: what is drawn, and what the original says."""
        objective, *keep = self.objectives
        terms = [self._term(objective, batch, 1.0, is_forget=True)]
        pairs = zip(keep, retained, self.weights, strict=True)
        return terms + [self._term(each, kept, weight, is_forget=False) for each, kept, weight in pairs]

    def terms_that_fit(self, pairs: Sequence[Pair]) -> list[Term]:
        """Those of the first pairs of batches, one at least, until texts are enough or take all the room.

        What the original says of a batch of text takes a gigabyte where the vocabulary is large.
        """
        terms: list[Term] = []
        taken = 0.0
        for number, pair in enumerate(pairs, start=1):
            found = self.terms(*pair)
            terms += found
            own = share_of_enough(pair, [[term.prepared, term.original] for term in found])
            told = self.mean_over_processes({"taken": own, "go on": float(number < len(pairs))})
            taken += told["taken"]
            if taken >= 1 or told["go on"] < 1:  # so that all look at as many, and none at more than it has
                break
        return terms

    def _term(self, objective: Objective, batch: Any, weight: float, *, is_forget: bool) -> Term:
        term = Term(objective, batch, weight, objective.prepare(self.model, batch), is_forget)
        if self.measures_damage and self._is_kept(term):
            with torch.no_grad(), original(self.model, self.adapter_name) as reference:
                evaluation = objective.evaluate(reference, batch, term.prepared)
            term.original = [self._kept(term, output) for output in _measured(term, evaluation)]
        return term

    def _is_kept(self, term: Term) -> bool:
        """Whether damage is measured here: on the retain batches, and where there are none on the forget batches."""
        return term.is_forget == (not self.weights)

    def _kept(self, term: Term, output: Outputs) -> Tensor:
        """What is to stay as it is: the outputs or, on forget inputs, their other answers."""
        if not term.is_forget:
            return output.values
        if output.labels is None:
            raise ValueError(
                "`max_retain_kl` must have retain data to be measured on where the forget outputs have no labels to "
                "leave out. Give `retain=Retain(batches, objective)`, or set no bound."
            )
        return strike_out(output.values, output.labels)

    def evaluate(self, terms: Sequence[Term], *, with_gradient: bool) -> Tried:
        """The loss at the cores' present values, as a mean over the forget batches of the step."""
        forget = sum(term.is_forget for term in terms)
        losses: dict[str, list[Tensor]] = {"forget_loss": [], "retain_loss": []}
        evaluations, damages, answers = [], [], []
        with torch.set_grad_enabled(with_gradient):
            for term in terms:
                evaluation = term.objective.evaluate(self.model, term.batch, term.prepared)
                if with_gradient:
                    check_loss(evaluation.loss, "a forget batch" if term.is_forget else "a retain batch")
                losses["forget_loss" if term.is_forget else "retain_loss"].append(term.weight * evaluation.loss)
                if term.original:
                    damages.append(self._damage(term, evaluation))
                elif self._is_kept(term) and evaluation.damage is not None:
                    damages.append(evaluation.damage)
                if term.is_forget:
                    answers.append(answer_probability(evaluation.outputs))
                evaluations.append((term, evaluation))
            parts = {key: torch.stack(each).sum() / forget for key, each in losses.items() if each}
            loss = torch.stack(list(parts.values())).sum()
            damage = torch.stack(damages).mean() if damages else loss.new_zeros(())
            if self.damage_weight:
                loss = loss + self.damage_weight * damage
        values = {"loss": loss, **parts, "damage": damage}
        known = [answer for answer in answers if answer is not None]
        if known:
            values["answer_probability"] = torch.stack(known).mean()
        if not damages:
            del values["damage"]
        told = self.mean_over_processes(dict(zip(values, _numbers(list(values.values())), strict=True)))
        return Tried(loss, damage, told, evaluations, told.get("damage", 0.0))

    @torch.no_grad()
    def of_forget_batch(self, batch: Any) -> dict[str, float]:
        """The forget loss of one batch and, where its labels tell, the probability of its answers; without damage."""
        objective = self.objectives[0]
        evaluation = objective.evaluate(self.model, batch, objective.prepare(self.model, batch))
        values = {"forget_loss": evaluation.loss}
        answer = answer_probability(evaluation.outputs)
        if answer is not None:
            values["answer_probability"] = answer
        return self.mean_over_processes(dict(zip(values, _numbers(list(values.values())), strict=True)))

    def _damage(self, term: Term, evaluation: Evaluation) -> Tensor:
        distribution = term.objective.distribution
        assert distribution is not None
        pairs = zip(term.original, _measured(term, evaluation), strict=True)
        parts = [divergence(distribution, before, self._kept(term, output)) for before, output in pairs]
        return torch.stack(parts).mean()

    @torch.no_grad()
    def moved(self, here: Tried, tried: Tried) -> tuple[float, float]:
        """How far a step has moved the outputs, on the forget batches and on the retain batches."""
        parts: dict[bool, list[Tensor]] = {True: [], False: []}
        for (term, before), (_, after) in zip(here.terms, tried.terms, strict=True):
            distribution = term.objective.distribution
            if distribution is not None:
                pairs = zip(before.outputs, after.outputs, strict=True)
                parts[term.is_forget] += [divergence(distribution, old.values, new.values) for old, new in pairs]
        means = [torch.stack(part).mean() if part else torch.zeros(()) for part in (parts[True], parts[False])]
        moved = self.mean_over_processes(dict(zip(("kl", "retain_kl"), _numbers(means), strict=True)))
        return moved["kl"], moved["retain_kl"]


def _numbers(values: Sequence[Tensor]) -> list[float]:
    """Scalars as numbers, by waiting once for a device that they are on."""
    return torch.stack([value.detach().to(values[0].device, torch.float64) for value in values]).tolist()


def _measured(term: Term, evaluation: Evaluation) -> Sequence[Outputs]:
    """The outputs that the damage is measured on: not those that the forget objective teaches, which have no labels."""
    labelled = [output for output in evaluation.outputs if output.labels is not None]
    return labelled if term.is_forget and labelled else evaluation.outputs
