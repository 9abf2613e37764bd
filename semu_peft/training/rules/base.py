"""What a rule is, and what it sees of a step: gradients before the optimiser, and what the optimiser made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from semu_peft.gradients.processes import whole
from semu_peft.objectives.base import finite_number
from semu_peft.tuner.tensors import is_sharded


class StepData(Protocol):
    """What a rule may ask of the data of a step, with the parameters as they are at the moment; nothing is left behind.

    The random draws are those of the step itself, and gradients are means over all processes.
    """

    def gradient(self) -> dict[str, Tensor]:
        """The gradient of the step's whole loss."""

    def retain_gradients(self) -> list[dict[str, Tensor]]:
        """The gradient of each retain term, without its weight."""

    def example_gradients(self) -> Iterator[dict[str, Tensor]]:
        """The gradients of the forget objective on the examples of this process's forget batches, one by one."""


@dataclass(frozen=True, eq=False)
class Step:
    """One optimiser step, as rules see it.

    Attributes:
        number: How many steps were taken before it.
        model: The model.
        parameters: What is trained, by name, to be changed in place.
        before: The values before the optimiser, by name.
        optimizer: The optimiser, whose `state` a rule may read and change; None with natural gradients, which have no
            state by parameter.
        data: What a rule may ask of the step's data.
        natural: With natural gradients, `(F + λ I)⁻¹ g` of a gradient `g` by name, with the damping of the step that is
            being tried; else None.
    """

    number: int
    model: nn.Module = field(repr=False)
    parameters: Mapping[str, nn.Parameter] = field(repr=False)
    before: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    optimizer: Optimizer | None = field(default=None, repr=False)
    data: StepData | None = field(default=None, repr=False)
    natural: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = field(default=None, repr=False)

    @property
    def gradients(self) -> dict[str, Tensor]:
        """The gradients by name, to be changed in place; parameters without one are left out."""
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    @property
    def changes(self) -> dict[str, Tensor]:
        """What the optimiser (and the rules before) made of the step: the values now less those before, by name."""
        return {name: self.parameters[name].detach() - value for name, value in self.before.items()}

    def state_of(self, name: str) -> dict[str, Any]:
        """What the optimiser keeps of a parameter, such as its moments; empty where it keeps nothing."""
        state: dict[str, Any] = {} if self.optimizer is None else self.optimizer.state.get(self.parameters[name], {})
        return state

    def needed_data(self, rule: Rule) -> StepData:
        """`data`, for a rule that cannot do without.

        Raises:
            ValueError: The loop that runs the rule gives none.
        """
        if self.data is None:
            raise ValueError(
                f"`rules`: {type(rule).__name__} takes gradients of its own, which this loop does not give. Train by "
                "`unlearn`, or make the `Step` with `data`."
            )
        return self.data

    def needed_optimizer(self, rule: Rule, what: str) -> Optimizer:
        """`optimizer`, for a rule that cannot do without.

        Raises:
            ValueError: The run has none, as it is one by natural gradients.
        """
        if self.optimizer is None:
            raise ValueError(
                f"`rules`: {type(rule).__name__} {what}, and natural gradients have no such optimiser. Give "
                "`learning_rate` or another `optimizer`."
            )
        return self.optimizer


class Rule:
    """Edits the steps of a run; subclasses define what they need of the four methods.

    Rules are applied in order, without gradients. In a run in `fp16` they see gradients at their true scale.

    Attributes:
        needs_whole_parameters: Whether it reads parameters as matrices or adds up over their entries, so that it cannot
            run where FSDP has left each process a part of them.

    Examples:
        >>> class StayWithin(Rule):
        ...     '''Keep each parameter within a distance of its value before the step.'''
        ...     def update(self, step):
        ...         for name, change in step.changes.items():
        ...             step.parameters[name].copy_(step.before[name] + change.clamp(-0.01, 0.01))
    """

    needs_whole_parameters: ClassVar[bool] = False

    def gradients(self, step: Step) -> None:
        """Change gradients in place, before the optimiser sees them.

        An optimiser that evaluates the loss several times a step (L-BFGS) has this called each time.
        """

    def update(self, step: Step) -> None:
        """Change the parameters in place, after the optimiser: `step.before` and `step.changes` say what it did."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must be saved to go on exactly: tensors, numbers, strings, lists and dictionaries."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


@dataclass
class ClipGradientNorm(Rule):
    """Scale the gradient down where its norm over all trained parameters is larger than `max_norm`.

    Source: Pascanu et al. 2013, arXiv 1211.5063, algorithm 1.

    Args:
        max_norm: The largest norm.

    Raises:
        TypeError: `max_norm` is no number.
        ValueError: `max_norm` is not above zero.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> ClipGradientNorm(1.0).gradients(Step(0, torch.nn.Identity(), {"weight": weight}))
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """

    max_norm: float

    def __post_init__(self) -> None:
        if finite_number(self.max_norm, "max_norm") <= 0:
            raise ValueError(f"`max_norm` must be above zero, got {self.max_norm!r}. To clip nothing leave it out.")

    def gradients(self, step: Step) -> None:
        gradients = list(step.gradients.values())
        if gradients:
            norm = torch.stack([norm_of(gradient) for gradient in gradients]).norm()
            factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0).item()
            for gradient in gradients:
                gradient.mul_(factor)


def norm_of(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The norm of all entries, also where each process holds a part of them (FSDP's `DTensor`).

    Examples:
        >>> norm_of(torch.tensor([3.0, 4.0]))
        tensor(5.)
    """
    return whole(torch.linalg.vector_norm(tensor, dtype=dtype))


def check_sharded(rules: Iterable[Rule], parameters: Mapping[str, Tensor]) -> None:
    """Check that no rule is to read whole parameters of which each process has a part.

    Raises:
        ValueError: One is; it is named.

    Examples:
        >>> check_sharded([Rule()], {"weight": torch.zeros(2)})
    """
    parts = [name for name, parameter in parameters.items() if is_sharded(parameter)]
    for rule in rules if parts else ():
        if rule.needs_whole_parameters:
            raise ValueError(
                f"`rules`: {type(rule).__name__} reads whole parameters, and FSDP has given each process a part of "
                f"{parts[0]!r}. Train by DistributedDataParallel, or keep FSDP from sharding what is trained "
                "(`fully_shard(..., ignored_params=...)`): an adapter is small."
            )


def as_rules(rules: Rule | Iterable[Rule], max_grad_norm: float | None) -> tuple[Rule, ...]:
    """Read the arguments `rules` and `max_grad_norm` as one tuple; the clipping comes first.

    Raises:
        TypeError: Something is no rule.
        ValueError: `max_grad_norm` is not above zero.
    """
    several = tuple(rules) if isinstance(rules, Iterable) else (rules,)
    for rule in several:
        if not isinstance(rule, Rule):
            raise TypeError(
                f"`rules` must be objects of classes that derive from `Rule`, got {rule!r}. Derive yours from "
                "`semu_peft.training.rules.Rule`, and give an object of it."
            )
    if max_grad_norm is None:
        return several
    if finite_number(max_grad_norm, "max_grad_norm") <= 0:
        raise ValueError(f"`max_grad_norm` must be above zero, got {max_grad_norm!r}. Leave it out to clip nothing.")
    return (ClipGradientNorm(max_grad_norm), *several)
