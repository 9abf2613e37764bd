"""Objectives made of another objective: on some of the tokens, at some of the steps, or with a weight that moves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from semu_peft.arguments import check_count, check_number, check_switch

from .base import Evaluation, LossFunction, Objective, as_objective
from .batches import ALTERNATE, IGNORED, TOKEN_MASK, as_labels

_WAITING: ContextVar[list[PrimalDual] | None] = ContextVar("semu_step", default=None)  # for the end of a step


@dataclass
class TokenSelective(Objective):
    """An objective on the tokens that the batch's `token_mask` names, or on the others.

    Which words of an answer carry what is to be forgotten is for the data to say (targeted forgetting, arXiv
    2506.03142; by entropy, ALTER, arXiv 2603.01792); the rest of the answer can be kept by a second term:
    `TokenSelective(InvertedHinge()) + TokenSelective(CrossEntropy(), selected=False)`. An answer without a token of the
    kind is left out; a batch without any is an error.

    A batch has `token_mask` `(N, L)` beside its labels, true at the tokens that are meant (`alternate_token_mask`
    beside second answers).

    Args:
        objective: What is minimised on those tokens.
        selected: Whether on the tokens that the mask names, or on the others.

    Raises:
        TypeError: A batch has no such mask.
        ValueError: The mask is of another shape than the labels, or holds something else than 0 and 1.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import CrossEntropy, TokenSelective
        >>> logits, labels = torch.zeros(1, 3, 2), torch.tensor([[0, 1, 0]])
        >>> logits[0, 0, 0] = 50.0  # sure of the first token alone
        >>> batch = {"input": logits, "labels": labels, "token_mask": torch.tensor([[False, True, True]])}
        >>> ce = CrossEntropy(shift_labels=False)
        >>> model = torch.nn.Identity()
        >>> round(TokenSelective(ce)(model, batch).item(), 4), TokenSelective(ce, selected=False)(model, batch).item()
        (0.6931, 0.0)
    """

    objective: LossFunction
    selected: bool = True

    def __post_init__(self) -> None:
        check_switch("selected", self.selected)
        self._inner = as_objective(self.objective)
        self.distribution, self.minimum = self._inner.distribution, self._inner.minimum
        self.forgets = self._inner.forgets
        self.is_steady, self.is_random = self._inner.is_steady, self._inner.is_random
        self.is_costly, self.turns = self._inner.is_costly, self._inner.turns

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return self._inner(model, self._select(batch))

    def prepare(self, model: nn.Module, batch: Any) -> Any:
        return self._inner.prepare(model, self._select(batch))

    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        return self._inner.evaluate(model, self._select(batch), prepared)

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state)

    def _select(self, batch: Any) -> dict[str, Any]:
        """The batch with the labels of the other tokens taken out."""
        if not isinstance(batch, Mapping) or TOKEN_MASK not in batch:
            found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise TypeError(
                f"A batch must be a mapping with '{TOKEN_MASK}', got {found}. Add a mask of the tokens that are meant, "
                "of the shape of `labels`."
            )
        chosen = dict(batch)
        for prefix in ("", ALTERNATE):
            if prefix + TOKEN_MASK in chosen:
                labels, mask = as_labels(chosen[prefix + "labels"]), as_labels(chosen.pop(prefix + TOKEN_MASK))
                if not ((mask == 0) | (mask == 1)).all():
                    raise ValueError(
                        f"`{prefix}{TOKEN_MASK}` must hold true or false, got numbers from {mask.min()} to "
                        f"{mask.max()}. Say from where on a token is meant, such as `scores > 0.5`."
                    )
                if labels.shape != mask.shape:
                    raise ValueError(
                        f"`{prefix}{TOKEN_MASK}` must have the shape of `labels`, {tuple(labels.shape)}, got "
                        f"{tuple(mask.shape)}. Pad both alike."
                    )
                chosen[prefix + "labels"] = labels.masked_fill(mask.bool().to(labels.device) != self.selected, IGNORED)
        return chosen


@dataclass
class PrimalDual(Objective):
    """`λ (L − ε)`: keep a loss under a limit, with a multiplier that grows while it is over and falls while under.

    After each step `λ ← max(0, λ + η (L − ε))`, the dual ascent of "minimise the forget loss subject to `L ≤ ε`" (PDU,
    arXiv 2506.05314). It is made for retain data: `Retain(batches, PrimalDual(CrossEntropy(), limit=0.3))`. A weight
    need not be found, the limit says what is meant. The multiplier is saved with the run; each process has its own.
    Where gradients accumulate, `L` is the mean over the batches of a step; in a loop of your own each call is a step,
    but within [`one_step`][semu_peft.objectives.wrappers.one_step].

    Args:
        objective: The loss `L` that is to stay under the limit.
        limit: ε.
        rate: η, how fast the multiplier follows.
        multiplier: λ at the start.
        warmup: How many steps the multiplier stays at its start.

    Raises:
        ValueError: One of the numbers is negative or not finite.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import CrossEntropy, PrimalDual
        >>> model, batch = torch.nn.Identity(), (torch.zeros(1, 2), torch.tensor([0]))  # a loss of log 2 = 0.69
        >>> bounded = PrimalDual(CrossEntropy(), limit=0.5, rate=10.0)
        >>> [round(bounded(model, batch).item(), 3) for _ in range(3)]  # 0.193 times 1, 2.93 and 4.86
        [0.193, 0.566, 0.939]
    """

    objective: LossFunction
    limit: float
    rate: float = 1.0
    multiplier: float = 1.0
    warmup: int = 0
    steps: int = field(default=0, init=False, repr=False)
    is_steady = False  # it rises with its multiplier

    def __post_init__(self) -> None:
        for name in ("limit", "rate", "multiplier"):
            check_number(name, getattr(self, name), low=0)
        check_count("warmup", self.warmup, least=0)
        self._inner = as_objective(self.objective)
        self.distribution, self.is_random = self._inner.distribution, self._inner.is_random
        self.is_costly, self.turns = self._inner.is_costly, self._inner.turns
        self._seen: list[float] = []  # the losses of a step that has not ended

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        multiplier, loss = self.multiplier, self._inner(model, batch)
        if torch.is_grad_enabled():  # and not while somebody only looks
            self._ascend(loss)
        return multiplier * (loss - self.limit)

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Any) -> tuple[float, Any]:
        multiplier, prepared = self.multiplier, self._inner.prepare(model, batch)
        self._ascend(self._inner.evaluate(model, batch, prepared).loss)
        return multiplier, prepared

    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        multiplier, inner = prepared
        evaluation = self._inner.evaluate(model, batch, inner)
        outputs = [replace(output, weight=multiplier * output.weight) for output in evaluation.outputs]
        return replace(evaluation, loss=multiplier * (evaluation.loss - self.limit), outputs=tuple(outputs))

    def state_dict(self) -> dict[str, Any]:
        state = {"multiplier": self.multiplier, "steps": self.steps, "seen": list(self._seen)}
        return {**state, "objective": self._inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.multiplier, self.steps = state["multiplier"], state["steps"]
        self._seen = list(state.get("seen", []))  # of a version that took each batch for a step
        self._inner.load_state_dict(state["objective"])

    def _ascend(self, loss: Tensor) -> None:
        """Move the multiplier by what the loss is over its limit at the beginning of this step, when that ends."""
        self._seen.append(loss.item())
        waiting = _WAITING.get()
        if waiting is None:
            self._end_step()
        elif not any(each is self for each in waiting):
            waiting.append(self)

    def _end_step(self) -> None:
        if self._seen and self.steps >= self.warmup:
            loss = sum(self._seen) / len(self._seen)
            self.multiplier = max(0.0, self.multiplier + self.rate * (loss - self.limit))
        self.steps += bool(self._seen)
        self._seen = []


@contextmanager
def one_step() -> Iterator[None]:
    """What objectives are called with in here are the batches of one optimiser step, over which gradients accumulate.

    A step that fails has not been.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import CrossEntropy, PrimalDual
        >>> model, batch = torch.nn.Identity(), (torch.zeros(1, 2), torch.tensor([0]))
        >>> bounded = PrimalDual(CrossEntropy(), limit=0.5, rate=10.0)
        >>> with one_step():
        ...     [round(bounded(model, batch).item(), 3) for _ in range(3)]
        [0.193, 0.193, 0.193]
        >>> bounded.steps, round(bounded.multiplier, 2)
        (1, 2.93)
    """
    waiting: list[PrimalDual] = []
    token = _WAITING.set(waiting)
    try:
        yield
        for objective in waiting:
            objective._end_step()
    finally:
        _WAITING.reset(token)
        for objective in waiting:
            objective._seen = []


@dataclass
class InTurns(Objective):
    """An objective at some of the steps, and nothing at the others: `steps` of every `period`, from step `first` on.

    So that two losses are not added but alternate, as where one is raised and another lowered (SCRUB, Kurmanji et al.
    2023, arXiv 2302.09880; see [`methods.scrub`][semu_peft.methods.baselines.scrub]), give the forget objective
    and that of the retain data turns which do not meet. At its other steps the model is not run for it. Steps are
    counted in batches; the count is saved with the run. Natural gradients are not for losses that come and go: such a
    run takes AdamW.

    Args:
        objective: The loss.
        steps: How many steps its turn has.
        period: After how many steps its turn comes again.
        first: In which step of the period its turn begins.
        until: After this many steps it stays away; None never.

    Raises:
        ValueError: The turn is longer than the period, or a number is out of range.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import CrossEntropy, InTurns
        >>> model, batch = torch.nn.Linear(2, 2), (torch.zeros(1, 2), torch.tensor([0]))
        >>> every_third = InTurns(CrossEntropy(), steps=1, period=3, first=1)
        >>> [bool(every_third(model, batch) > 0) for _ in range(6)]
        [False, True, False, False, True, False]
    """

    objective: LossFunction
    steps: int = 1
    period: int = 2
    first: int = 0
    until: int | None = None
    calls: int = field(default=0, init=False, repr=False)
    is_steady = False

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_count("period", self.period)
        check_count("first", self.first, least=0)
        check_count("until", self.until, optional=True)
        if self.first + self.steps > self.period:
            raise ValueError(
                f"`steps` must fit into `period` from `first` on, got {self.steps} steps from {self.first} on in "
                f"{self.period}. Make the period longer."
            )
        self._inner = as_objective(self.objective)
        self.is_random, self.is_costly = self._inner.is_random, self._inner.is_costly
        self.turns = self.period * self._inner.turns

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        number, is_over = self.calls % self.period, self.until is not None and self.calls >= self.until
        if torch.is_grad_enabled():  # and not while somebody only looks
            self.calls += 1
        if self.first <= number < self.first + self.steps and not is_over:
            return self._inner(model, batch)
        # Nothing, with a gradient: what a loop differentiates must depend on something.
        return 0.0 * next(parameter for parameter in model.parameters() if parameter.requires_grad).sum()

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls, "objective": self._inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]
        self._inner.load_state_dict(state["objective"])
