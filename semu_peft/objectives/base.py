"""What an objective is, and how objectives add up."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from semu_peft.arguments import check_count

LossFunction = Callable[[nn.Module, Any], Tensor]
"""`(model, batch) -> scalar loss` that is to be minimised: an `Objective` or a plain function."""

Reader = Callable[[nn.Module, Any], Any]
"""`(model, batch) -> what the model says`, equal to another that gives the same."""

Distribution = Literal["categorical", "gaussian"]
"""What a model's output describes: probabilities of classes or tokens, or the mean of a Gaussian (a denoiser)."""


@dataclass(frozen=True)
class Outputs:
    """What a model says of one batch, with its graph.

    Attributes:
        values: Logits `(T, classes)` of the examples or tokens that count where the objective's distribution is
            categorical, a prediction of any shape where it is Gaussian.
        labels: The labels `(T,)` beside logits, where there are any.
        weight: The weight of the objective that asked for them.

    Examples:
        >>> import torch
        >>> Outputs(torch.zeros(2, 4), torch.tensor([0, 1])).weight
        1.0
    """

    values: Tensor = field(repr=False)
    labels: Tensor | None = field(default=None, repr=False)
    weight: float = 1.0


@dataclass(frozen=True)
class Evaluation:
    """A loss, and the model's outputs that it is a function of.

    Attributes:
        loss: The loss of one batch, a scalar.
        outputs: What the model says of it, once for each objective in a sum; none where the objective does not tell.
        damage: How far the other outputs are from the original's, all of those of retain data and the other answers or
            conditions of forget data: a scalar, `KL(original ‖ now)` in nats or a squared error, where the model itself
            without its adapter has been asked anyway; else None.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import CrossEntropy
        >>> objective, model, batch = CrossEntropy(), torch.nn.Identity(), (torch.zeros(2, 4), torch.tensor([0, 1]))
        >>> objective.evaluate(model, batch, objective.prepare(model, batch))
        Evaluation(loss=tensor(1.3863), outputs=(Outputs(weight=1.0),))
    """

    loss: Tensor
    outputs: tuple[Outputs, ...] = ()
    damage: Tensor | None = field(default=None, repr=False)


class Objective(ABC):
    """A callable `(model, batch) -> scalar loss` that is to be minimised.

    Objectives add, subtract and scale like numbers, also with plain functions of the same signature, and `sum([...])`
    works. They save their random state with [`state_dict`][semu_peft.objectives.base.Objective.state_dict], so that a
    resumed run draws what an uninterrupted one would have drawn.

    Attributes:
        distribution: What the model's output is, `"categorical"` over classes or tokens, `"gaussian"` for a denoiser;
            None where it is neither or unknown. With [`outputs`][semu_peft.objectives.base.Objective.outputs] it is
            what natural gradients and bounds on the damage need to know of an objective.
        minimum: The value that the loss cannot fall below and reaches when all is forgotten; None where there is none.
        forgets: Whether that minimum says that the data are forgotten: not of one that teaches answers.
        is_steady: Whether its values at different steps can be compared, so that a rise over the run means something.
        is_random: Whether it draws at random, so that the same batch is worth looking at more than once.
        is_costly: Whether `prepare` takes many passes of the model, so that few batches are worth being looked at.
        turns: After how many batches what is minimised comes round again; losses are compared over as many.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import Objective
        >>> class MeanOutput(Objective):
        ...     def __call__(self, model, batch):
        ...         return model(batch).mean()
        >>> objective = 2 * MeanOutput() - (lambda model, batch: model(batch).max())
        >>> objective(torch.nn.Identity(), torch.tensor([1.0, 3.0]))
        tensor(1.)
    """

    distribution: Distribution | None = None
    minimum: float | None = None
    forgets: bool = True
    is_steady: bool = True
    is_random: bool = False
    is_costly: bool = False
    turns: int = 1

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of one batch as a scalar tensor, in float32 or better."""

    def outputs(self, model: nn.Module, batch: Any) -> Tensor | None:
        """Return what the model says of the batch, with its graph: logits `(T, classes)`, or a prediction; or None.

        An objective of your own that says its `distribution` defines this one method to be trained by natural
        gradients.
        """
        return None

    def prepare(self, model: nn.Module, batch: Any) -> Any:
        """Return what `evaluate` takes as given on this batch: random draws, and what a reference model says of it."""
        return self.state_dict()

    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        """Return the loss with the outputs behind it; again and again the same, for what `prepare` returned."""
        self.load_state_dict(prepared)
        outputs = self.outputs(model, batch)
        self.load_state_dict(prepared)
        loss = self(model, batch)
        if outputs is None:
            return Evaluation(loss)
        self._check_outputs(outputs, loss)
        return Evaluation(loss, (Outputs(outputs),))

    def _check_outputs(self, outputs: Any, loss: Tensor) -> None:
        name = f"`{type(self).__name__}.outputs`"
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"{name} must return a tensor or None, got {type(outputs).__name__}. Return the logits alone."
            )
        if self.distribution == "categorical" and outputs.dim() != 2:
            raise ValueError(
                f"{name} must return logits (T, classes) where the distribution is categorical, got "
                f"{tuple(outputs.shape)}. Flatten examples and tokens into rows."
            )
        if loss.requires_grad and not outputs.requires_grad:
            raise ValueError(f"{name} must keep the graph of the model, got a tensor without. Do not detach it.")

    def measure(self, model: nn.Module, batch: Any) -> Evaluation:
        """Return the loss of a batch that is looked at once, as a call does, and the damage where that is known."""
        return Evaluation(self(model, batch))

    def reader(self) -> Reader | None:
        """Return what runs the model on a batch, where nothing else of the model is in the loss; or None.

        Of the terms of a sum whose readers are equal, one runs the model for all. An objective that has one defines
        `evaluate_reading(reading, prepared)`.
        """
        return None

    def evaluate_reading(self, reading: Any, prepared: Any) -> Evaluation:
        """Return what `evaluate` does, of what the `reader` has given."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what must be saved to go on exactly: the random state, where there is one."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - most objectives have no state
        """Restore what `state_dict` returned."""

    def __add__(self, other: LossFunction | Literal[0]) -> Objective:
        if _is_zero(other):
            return self
        if not callable(other):
            return NotImplemented
        return WeightedSum((*_terms(self), *_terms(as_objective(other))))

    def __radd__(self, other: LossFunction | Literal[0]) -> Objective:
        if _is_zero(other):  # where `sum` begins
            return self
        return as_objective(other) + self if callable(other) else NotImplemented

    def __sub__(self, other: LossFunction) -> Objective:
        return self + -as_objective(other) if callable(other) else NotImplemented

    def __rsub__(self, other: LossFunction) -> Objective:
        return as_objective(other) + -self if callable(other) else NotImplemented

    def __neg__(self) -> WeightedSum:
        return self * -1.0

    def __mul__(self, weight: float) -> WeightedSum:
        factor = finite_number(weight, "weight")
        return WeightedSum(tuple((factor * inner, objective) for inner, objective in _terms(self)))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> WeightedSum:
        if finite_number(divisor, "divisor") == 0:
            raise ValueError(
                "`divisor` must be a finite number other than zero, got 0. Leave the objective out instead."
            )
        return self * (1.0 / float(divisor))


class PreparedObjective(Objective):
    """An objective whose call is what `evaluate` says of what `prepare` returns.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.base import PreparedObjective
        >>> class FromTheStart(PreparedObjective):
        ...     def prepare(self, model, batch):
        ...         return model(batch).detach()
        ...     def evaluate(self, model, batch, prepared):
        ...         return Evaluation((model(batch) - prepared).square().sum())
        >>> FromTheStart()(torch.nn.Identity(), torch.ones(3))
        tensor(0.)
    """

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return self.evaluate(model, batch, self.prepare(model, batch)).loss

    def measure(self, model: nn.Module, batch: Any) -> Evaluation:
        if type(self).__call__ is not PreparedObjective.__call__:  # one that is called otherwise
            return super().measure(model, batch)
        return self.evaluate(model, batch, self.prepare(model, batch))

    @abstractmethod
    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        """Return the loss with the outputs behind it; again and again the same, for what `prepare` returned."""


@dataclass(frozen=True)
class WeightedSum(Objective):
    """`Σ weight · objective`, made by adding and scaling objectives; all terms see the same batch.

    The model is run once for all terms that read it alike, as those of `KLToOriginal() + CrossEntropy()` do. The sum's
    `distribution` is that of its terms if they agree, else None.

    Args:
        terms: Pairs of a weight and an objective or plain function.

    Raises:
        TypeError: A weight is no number, or an objective cannot be called.
        ValueError: A weight is not finite, or there is no term.

    Examples:
        >>> from semu_peft.objectives import CrossEntropy, UniformDistribution
        >>> total = CrossEntropy() + 0.5 * UniformDistribution()
        >>> total.terms
        ((1.0, CrossEntropy()), (0.5, UniformDistribution()))
        >>> total.distribution
        'categorical'
    """

    terms: tuple[tuple[float, Objective], ...]
    distribution: Distribution | None = field(init=False, repr=False, compare=False, default=None)
    minimum: float | None = field(init=False, repr=False, compare=False, default=None)
    forgets: bool = field(init=False, repr=False, compare=False, default=True)
    is_steady: bool = field(init=False, repr=False, compare=False, default=True)
    is_random: bool = field(init=False, repr=False, compare=False, default=False)
    is_costly: bool = field(init=False, repr=False, compare=False, default=False)
    turns: int = field(init=False, repr=False, compare=False, default=1)

    def __post_init__(self) -> None:
        terms = tuple((finite_number(weight, "weight"), as_objective(objective)) for weight, objective in self.terms)
        if not terms:
            raise ValueError("`terms` must hold at least one pair of a weight and an objective, got none. Add a term.")
        agreed = {objective.distribution for _, objective in terms}
        object.__setattr__(self, "terms", terms)
        object.__setattr__(self, "distribution", agreed.pop() if len(agreed) == 1 else None)
        object.__setattr__(self, "forgets", any(objective.forgets or weight < 0 for weight, objective in terms))
        object.__setattr__(self, "is_steady", all(objective.is_steady for _, objective in terms))
        object.__setattr__(self, "is_random", any(objective.is_random for _, objective in terms))
        object.__setattr__(self, "is_costly", any(objective.is_costly for _, objective in terms))
        object.__setattr__(self, "turns", math.lcm(*(objective.turns for _, objective in terms)))
        if all(weight >= 0 and objective.minimum is not None for weight, objective in terms):
            object.__setattr__(self, "minimum", sum(weight * (objective.minimum or 0.0) for weight, objective in terms))

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return self.measure(model, batch).loss

    def measure(self, model: nn.Module, batch: Any) -> Evaluation:
        readings = _Readings(model, batch)
        return self._sum([
            objective.measure(model, batch) if objective.reader() is None
            else readings.evaluate(objective, objective.prepare(model, batch))
            for _, objective in self.terms
        ])  # fmt: skip

    def prepare(self, model: nn.Module, batch: Any) -> list[Any]:
        return [objective.prepare(model, batch) for _, objective in self.terms]

    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        readings, pairs = _Readings(model, batch), zip(self.terms, prepared, strict=True)
        return self._sum([readings.evaluate(objective, given) for (_, objective), given in pairs])

    def _sum(self, evaluations: list[Evaluation]) -> Evaluation:
        losses = [weight * each.loss for (weight, _), each in zip(self.terms, evaluations, strict=True)]
        outputs = [
            replace(output, weight=weight * output.weight)
            for (weight, _), each in zip(self.terms, evaluations, strict=True)
            for output in each.outputs
        ]
        told = [each.damage for each in evaluations if each.damage is not None]
        return Evaluation(torch.stack(losses).sum(), tuple(outputs), torch.stack(told).mean() if told else None)

    def state_dict(self) -> dict[str, Any]:
        return {str(index): objective.state_dict() for index, (_, objective) in enumerate(self.terms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, (_, objective) in enumerate(self.terms):
            objective.load_state_dict(state[str(index)])


@dataclass(frozen=True)
class FunctionObjective(Objective):
    """A plain function `(model, batch) -> scalar loss` as an objective, see `as_objective`.

    Args:
        function: What computes the loss. It has no state that would be saved.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.base import FunctionObjective
        >>> FunctionObjective(lambda model, batch: model(batch).sum())(torch.nn.Identity(), torch.ones(3))
        tensor(3.)
    """

    function: LossFunction

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return self.function(model, batch)


@dataclass
class RandomObjective(Objective):
    """An objective that draws from a generator of its own, on the CPU, so that the draws do not depend on the device.

    Args:
        seed: Seed of the generator.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.base import RandomObjective
        >>> class Drawn(RandomObjective):
        ...     def __call__(self, model, batch):
        ...         return torch.rand((), generator=self.generator)
        >>> Drawn(seed=1)(None, None) == Drawn(seed=1)(None, None)
        tensor(True)
    """

    seed: int = field(default=0, kw_only=True)
    is_random = True

    def __post_init__(self) -> None:
        check_count("seed", self.seed, least=0)
        self.generator = torch.Generator().manual_seed(self.seed)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


def as_objective(function: LossFunction) -> Objective:
    """Turn a plain function `(model, batch) -> scalar loss` into an objective; an objective is returned as it is.

    Raises:
        TypeError: It cannot be called, or it is a class where an instance is meant.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import as_objective
        >>> mean = as_objective(lambda model, batch: model(batch).mean())
        >>> (mean / 2)(torch.nn.Identity(), torch.tensor([1.0, 3.0]))
        tensor(1.)
    """
    if isinstance(function, Objective):
        return function
    if isinstance(function, type):
        raise TypeError(
            "`objective` must be an objective or a function (model, batch) -> loss, got the class "
            f"{function.__name__}. Make one: `{function.__name__}()`."
        )
    if not callable(function):
        raise TypeError(
            f"`objective` must be an objective or a function (model, batch) -> loss, got {type(function).__name__}. "
            "Take one from `semu_peft.objectives`, such as `CrossEntropy()`."
        )
    return FunctionObjective(function)


def finite_number(value: Any, name: str) -> float:
    """Return a number as a float, or say that the argument `name` is none.

    Raises:
        TypeError: It is no real number (a bool is none).
        ValueError: It is NaN or infinite.

    Examples:
        >>> from semu_peft.objectives.base import finite_number
        >>> finite_number(2, "weight")
        2.0
        >>> finite_number("2", "weight")
        Traceback (most recent call last):
        TypeError: `weight` must be a finite number, got '2'. Write it as a float, such as 0.5.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a finite number, got {value!r}. Write it as a float, such as 0.5.")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}. Write it as a float, such as 0.5.")
    return float(value)


def _terms(objective: Objective) -> tuple[tuple[float, Objective], ...]:
    return objective.terms if isinstance(objective, WeightedSum) else ((1.0, objective),)


def _is_zero(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and value == 0


class _Readings:
    """What a model says of one batch, run once for each way of reading it."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self.model, self.batch = model, batch
        self.found: dict[Reader, Any] = {}

    def evaluate(self, objective: Objective, prepared: Any) -> Evaluation:
        reader = objective.reader()
        if reader is None:
            return objective.evaluate(self.model, self.batch, prepared)
        if reader not in self.found:
            self.found[reader] = reader(self.model, self.batch)
        return objective.evaluate_reading(self.found[reader], prepared)
