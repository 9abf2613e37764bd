"""Forget and retain examples in pairs, for trainers that know one data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from semu_peft.arguments import check_count, check_kind
from semu_peft.objectives.base import Evaluation, Objective, as_objective

_PARTS = ("forget", "retain")


class ForgetRetainPairs(Dataset[dict[str, Any]]):
    """A retain example beside each forget example, `{"forget", "retain"}`; none twice before all have come once.

    The retain examples come in one random order after another, through all epochs: in an epoch of `F` forget examples
    the pair `i` has the retain example at place `epoch · F + i`. So a pair depends on seed, epoch and index alone,
    whatever order a sampler asks in, and a resumed run sees what an uninterrupted one would have seen. Trainers on
    Accelerate call `set_epoch`; in several processes call it yourself.

    Args:
        forget: The forget examples; an epoch is one pass over them.
        retain: The retain examples.
        collate: What makes a batch of the rows of either; by default that of `forget`, or torch's.
        seed: Seed of the orders.

    Raises:
        TypeError: One is no data set with a length.
        ValueError: One is empty.

    Examples:
        >>> from semu_peft.language import ForgetRetainPairs
        >>> pairs = ForgetRetainPairs(["f0", "f1"], ["r0", "r1", "r2", "r3"])
        >>> first = [pairs[index]["retain"] for index in range(2)]
        >>> pairs.set_epoch(1)
        >>> sorted(first + [pairs[index]["retain"] for index in range(2)])
        ['r0', 'r1', 'r2', 'r3']
    """

    def __init__(
        self,
        forget: Sequence[Any] | Dataset[Any],
        retain: Sequence[Any] | Dataset[Any],
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
    ) -> None:
        for name, examples in zip(_PARTS, (forget, retain), strict=True):
            check_kind(name, examples, Sized, "a data set with a length", "Give a list or `text_examples(...)`.")
            if not len(examples):  # type: ignore[arg-type]
                raise ValueError(f"`{name}` must hold at least one example, got none. Check where it was read from.")
        check_count("seed", seed, least=0)
        self.forget, self.retain, self.seed, self.epoch = forget, retain, seed, 0
        self._collate: Any = collate or getattr(forget, "collate", default_collate)
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self.forget)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"forget": self.forget[index], "retain": self.retain[self.retain_index(index)]}

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch it is, from 0."""
        self.epoch = epoch

    def retain_index(self, index: int) -> int:
        """The number of the retain example beside forget example `index`, in this epoch."""
        order, place = divmod(self.epoch * len(self) + index, len(self.retain))  # type: ignore[arg-type]
        if self._order[0] != order:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + order)
            self._order = order, torch.randperm(len(self.retain), generator=generator).tolist()  # type: ignore[arg-type]
        return self._order[1][place]

    def collate(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch `{"forget": ..., "retain": ...}` of pairs: the `data_collator`."""
        return {part: self._collate([pair[part] for pair in pairs]) for part in _PARTS}


@dataclass
class Part(Objective):
    """An objective on one part of a batch, so that a sum may have one for each part.

    Args:
        key: The part's key in the batch.
        objective: What is minimised on it.

    Raises:
        TypeError: `objective` cannot be called.

    Examples:
        >>> import torch
        >>> from semu_peft.language import Part
        >>> from semu_peft.objectives import CrossEntropy, GradientAscent
        >>> loss = Part("forget", GradientAscent()) + Part("retain", CrossEntropy())
        >>> batch = (torch.zeros(2, 4), torch.tensor([0, 1]))
        >>> loss(torch.nn.Identity(), {"forget": batch, "retain": batch})
        tensor(0.)
    """

    key: str
    objective: Any = field()

    def __post_init__(self) -> None:
        self.objective = as_objective(self.objective)
        self.distribution, self.minimum = self.objective.distribution, self.objective.minimum
        self.is_steady, self.is_random = self.objective.is_steady, self.objective.is_random
        self.is_costly, self.turns = self.objective.is_costly, self.objective.turns

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return self.objective(model, batch[self.key])

    def outputs(self, model: nn.Module, batch: Any) -> Tensor | None:
        return self.objective.outputs(model, batch[self.key])

    def prepare(self, model: nn.Module, batch: Any) -> Any:
        return self.objective.prepare(model, batch[self.key])

    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        return self.objective.evaluate(model, batch[self.key], prepared)

    def state_dict(self) -> dict[str, Any]:
        return self.objective.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state)
