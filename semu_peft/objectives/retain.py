"""What the model should keep: the one form of retain data."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Any

from .base import LossFunction, as_objective, finite_number
from .batches import check_batches


@dataclass(frozen=True, eq=False, repr=False)
class Retain:
    """Retain data, what is asked of the model on them, and how much that counts.

    The same object serves for choosing a subspace, for training, for rules and for budgets; each takes one or a list.

    Args:
        batches: A loader or a list of batches, such as a `torch.utils.data.DataLoader`.
        objective: The loss that should stay low on them, `(model, batch) -> scalar`.
        weight: Its weight beside the forget objective, which has 1.

    Raises:
        TypeError: `batches` are no collection of batches, `objective` cannot be called, or `weight` is no number.
        ValueError: `weight` is negative or not finite.

    Examples:
        >>> import torch
        >>> from semu_peft import Retain
        >>> from semu_peft.objectives import CrossEntropy
        >>> batches = [(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))]
        >>> Retain(batches, CrossEntropy(), weight=0.5)
        Retain(list of 1, CrossEntropy(), weight=0.5)
    """

    batches: Iterable[Any]
    objective: LossFunction
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_batches(self.batches)
        as_objective(self.objective)
        weight = finite_number(self.weight, "weight")
        if weight < 0:
            raise ValueError(f"`weight` must be zero or more, got {self.weight}. To raise a loss, write `-objective`.")
        object.__setattr__(self, "weight", weight)

    def __repr__(self) -> str:
        count = f" of {len(self.batches)}" if isinstance(self.batches, Sized) else ""
        return f"Retain({type(self.batches).__name__}{count}, {self.objective!r}, weight={self.weight})"


def as_retain(retain: Retain | Iterable[Retain] | None) -> tuple[Retain, ...]:
    """Read an argument `retain`, which may be None, one `Retain` or a list of them, as a tuple.

    Raises:
        TypeError: It is something else, such as bare batches.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import CrossEntropy, Retain, as_retain
        >>> as_retain(None)
        ()
        >>> as_retain(Retain([(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))], CrossEntropy()))
        (Retain(list of 1, CrossEntropy(), weight=1.0),)
    """
    if retain is None:
        return ()
    if isinstance(retain, Retain):
        return (retain,)
    terms = tuple(retain) if isinstance(retain, (list, tuple)) else None
    if terms is None or not all(isinstance(term, Retain) for term in terms):
        got = type(retain).__name__
        if terms:
            got += f" with {next(type(term).__name__ for term in terms if not isinstance(term, Retain))}"
        raise TypeError(
            f"`retain` must be a `Retain`, a list of them or None, got {got}. Write `Retain(batches, objective)`, with "
            "the objective that should stay low on them, such as `CrossEntropy()`."
        )
    return terms
