"""Forgetting that lasts: what is minimised is minimal also where somebody has trained the model a little further."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from semu_peft.arguments import check_count, check_kind, check_number

from .attackers import Attacker, Relearner
from .base import Evaluation, LossFunction, Objective, PreparedObjective, RandomObjective, as_objective
from .classification import CrossEntropy
from .examples import Examples
from .original import with_values

Displaced = list[tuple[nn.Parameter, Tensor]]
"""Weights, and what an attacker has made of them: the values themselves where a weight is frozen, else the change."""


@dataclass(eq=False)
class _Simulated:
    """One batch with what is held fixed on it; the displacement can be had again from the rest.

    Attributes:
        given: What the objective itself takes as given.
        model: The model that was attacked.
        trained: The trained parameters, with the values that they had.
        state: The random state before the attack.
        displaced: What the attack led to, while it is kept in memory.
    """

    given: Any
    model: nn.Module
    trained: list[tuple[nn.Parameter, Tensor]]
    state: dict[str, Any]
    displaced: Displaced | None = None


@dataclass
class SimulatedRelearning(PreparedObjective, RandomObjective):
    """`L(W) + weight · L(W + Δ)`, with `Δ` what an attacker's fine-tuning makes of the weights just now.

    An objective that is minimal at the weights alone is undone by a few steps of training: the class is silenced and
    its features stay. Here the weights are fine-tuned before each gradient as an attacker would, the displacement `Δ`
    is held fixed (first order: no gradient through the attacker's steps), and the objective counts there as well. With
    a KL to the original on retain data beside it, relearning takes several times as many steps; how much is kept
    against how deep is forgotten is a curve, not a gift (see *Attacks and deep forgetting* in the documentation).

    The attackers are taken in turn, one a batch. Natural gradients simulate once a batch and judge all trials of a step
    at the same `Δ`. One copy of the attacked weights is kept in memory, and what was dropped is simulated again when it
    is asked for, from the cores and the random state of then.

    Args:
        objective: What to minimise, of any kind: of a classifier, a language model or a denoiser.
        forget: Batches that the attackers draw their forget examples from; gone through once.
        retain: Batches that they draw others from; None for attackers who have none.
        attackers: Who is simulated, in turn.
        learn: What the attackers minimise: the ordinary training loss, for a denoiser `DenoisingLoss(scheduler)`.
        weight: Of the objective at the displaced weights.
        copies: How many displacements are kept at once; more save time where a step has several batches.
        seed: Seed of the attackers' draws.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: There is no attacker or no example, or `weight` is negative.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import Attacker, DecoupledDistillation, SimulatedRelearning
        >>> original, model = torch.nn.Linear(3, 3).requires_grad_(False), torch.nn.Linear(3, 3)
        >>> forget = [(torch.eye(3), torch.arange(3))]
        >>> distillation = DecoupledDistillation(reference=original)
        >>> deep = SimulatedRelearning(distillation, forget, attackers=[Attacker("sgd", 0.1), Attacker("adam", 0.01)])
        >>> bool(deep(model, forget[0]) > 2 * distillation(model, forget[0]))  # relearnt a little, it is larger there
        True
    """

    objective: LossFunction
    forget: Iterable[Any] = field(repr=False)
    retain: Iterable[Any] | None = field(default=None, repr=False)
    attackers: Sequence[Attacker] = (Attacker(),)
    learn: LossFunction = field(default_factory=CrossEntropy)
    weight: float = field(default=1.0, kw_only=True)
    copies: int = field(default=1, kw_only=True, repr=False)
    is_costly = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective, self.learn = as_objective(self.objective), as_objective(self.learn)
        check_number("weight", self.weight, low=0)
        check_count("copies", self.copies)
        attackers = [self.attackers] if isinstance(self.attackers, Attacker) else self.attackers
        check_kind("attackers", attackers, (list, tuple), "a list of attackers", "Write `[Attacker()]`.")
        if not attackers or not all(isinstance(attacker, Attacker) for attacker in attackers):
            raise ValueError(f"`attackers` must be at least one `Attacker`, got {attackers!r}. Write `[Attacker()]`.")
        self.attackers = tuple(attackers)
        self._forget = Examples(self.forget, "forget")
        self._retain = None if self.retain is None else Examples(self.retain, "retain")
        self.forget = self._forget.batches
        self.retain = None if self._retain is None else self._retain.batches
        self.distribution, self.is_steady = self.objective.distribution, self.objective.is_steady
        self.minimum = None if self.objective.minimum is None else (1 + self.weight) * self.objective.minimum
        self.turns, self.turn = math.lcm(len(self.attackers), self._inner.turns), 0
        self._in_memory: list[_Simulated] = []

    def prepare(self, model: nn.Module, batch: Any) -> _Simulated:
        given = self._inner.prepare(model, batch)
        trained = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad and p.numel()]
        simulated = _Simulated(given, model, trained, self._attack_state())
        self._attack(simulated)
        self.turn += 1
        return simulated

    def evaluate(self, model: nn.Module, batch: Any, prepared: _Simulated) -> Evaluation:
        if prepared.displaced is None:
            self._attack_again(prepared)
        assert prepared.displaced is not None
        values = {id(weight): weight + value if weight.requires_grad else value for weight, value in prepared.displaced}
        here = self._inner.evaluate(model, batch, prepared.given)
        there = self._inner.evaluate(with_values(model, values), batch, prepared.given)
        outputs = [replace(output, weight=self.weight * output.weight) for output in there.outputs]
        return Evaluation(here.loss + self.weight * there.loss, (*here.outputs, *outputs), here.damage)

    def state_dict(self) -> dict[str, Any]:
        return {**self._attack_state(), "objective": self._inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._load_attack_state(state)
        self._inner.load_state_dict(state["objective"])

    @property
    def _inner(self) -> Objective:
        return as_objective(self.objective)

    def _attack_state(self) -> dict[str, Any]:
        return {**super().state_dict(), "turn": self.turn, "learn": as_objective(self.learn).state_dict()}

    def _load_attack_state(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.turn = state["turn"]
        as_objective(self.learn).load_state_dict(state["learn"])

    def _attack(self, simulated: _Simulated) -> None:
        """Let the attacker whose turn it is fine-tune, and keep what it made of the weights."""
        self._in_memory.append(simulated)
        for old in self._in_memory[: -self.copies]:
            old.displaced = None
        self._in_memory = self._in_memory[-self.copies :]
        attacker = self.attackers[self.turn % len(self.attackers)]
        learn = as_objective(self.learn)
        relearner = Relearner(simulated.model, attacker, self._forget, self._retain, learn, self.generator)
        for _ in range(attacker.steps):
            relearner.step()
        simulated.displaced = relearner.displaced()

    def _attack_again(self, simulated: _Simulated) -> None:
        now = self._attack_state()
        self._load_attack_state(simulated.state)
        try:
            with _set_back(simulated.trained):
                self._attack(simulated)
        finally:
            self._load_attack_state(now)


@contextmanager
def _set_back(trained: list[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Give parameters the values that they had; by `data`, as graphs made before will be differentiated afterwards."""
    now = [parameter.detach().clone() for parameter, _ in trained]
    try:
        for parameter, value in trained:
            parameter.data.copy_(value)
        yield
    finally:
        for (parameter, _), value in zip(trained, now, strict=True):
            parameter.data.copy_(value)
