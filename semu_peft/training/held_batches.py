"""The batches on which the end of a run is compared with its start."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor

from semu_peft.objectives.batches import split_batch
from semu_peft.objectives.examples import examples_in

ENOUGH_EXAMPLES = 512
_MOST_ROUNDS = 8
_COSTLY_LOOKS = 8
_HELD_TOKENS = 4_096  # of texts, which have one output a token
_HELD_BYTES = 2**30  # what the original says of 2,000 tokens of a vocabulary of 128,000

Pair = tuple[Any, list[Any]]
"""A forget batch, and one batch of each retain set."""


def first_pairs(forget: Iterable[Any], retained: Sequence[Iterator[Any]]) -> list[Pair]:
    """Forget batches of the first 512 examples, with the retain batches that come with them.

    A few forget examples are paired again and again with the next retain batches, as long as these are few as well: one
    small batch says little of what is to be kept.

    Args:
        forget: The forget batches, one pass.
        retained: Those of each retain set, one pass.

    Examples:
        >>> from semu_peft.training.held_batches import first_pairs
        >>> first_pairs(["forget"], [iter(["first", "second"])])
        [('forget', ['first']), ('forget', ['second'])]
    """
    pairs: list[Pair] = []
    for batch in forget:
        kept = [next(batches, None) for batches in retained]
        if any(each is None for each in kept):
            break
        pairs.append((batch, kept))
        if examples_of(pairs) >= ENOUGH_EXAMPLES:
            break
    first = list(pairs)
    sides = zip(*((batch, *kept) for batch, kept in first), strict=True)
    rounds = min((rounds_of(examples_in(side)) for side in sides), default=1) if retained else 1
    for _ in range(1, rounds):
        further = [(batch, [next(batches, None) for batches in retained]) for batch, _ in first]
        if any(each is None for _, kept in further for each in kept):
            break
        pairs += further
    return pairs


def examples_of(pairs: Sequence[Pair]) -> int:
    """How many forget examples there are, one at least for a batch of which that is not known."""
    return examples_in(batch for batch, _ in pairs)


def rounds_of(examples: int) -> int:
    """How often to look at so few, up to eight times.

    Examples:
        >>> from semu_peft.training.held_batches import rounds_of
        >>> rounds_of(1), rounds_of(200), rounds_of(512)
        (8, 3, 1)
    """
    return min(_MOST_ROUNDS, math.ceil(ENOUGH_EXAMPLES / max(examples, 1)))


def looks_that_cost(turns: int) -> int:
    """How many batches to look at where preparing one takes many passes: about eight, each turn as often as another.

    Args:
        turns: Of the objectives, see [`Objective`][semu_peft.objectives.base.Objective].

    Examples:
        >>> from semu_peft.training.held_batches import looks_that_cost
        >>> looks_that_cost(1), looks_that_cost(5)
        (8, 10)
    """
    return math.ceil(_COSTLY_LOOKS / turns) * turns


def share_of_enough(pair: Pair, kept: Any) -> float:
    """How much a pair brings of what is enough of texts, or takes of the room for what is kept of it; at 1 it is all.

    Args:
        pair: Of batches.
        kept: What is kept of them, in which the original's outputs weigh most.

    Examples:
        >>> import torch
        >>> from semu_peft.training.held_batches import share_of_enough
        >>> texts = {"input_ids": torch.zeros(8, 64), "labels": torch.zeros(8, 64, dtype=torch.int64)}
        >>> share_of_enough((texts, [texts]), []), share_of_enough((texts, []), torch.zeros(2**26))
        (0.125, 0.25)
    """
    forget, retained = pair
    return max(min(map(_tokens, (forget, *retained))) / _HELD_TOKENS, bytes_within(kept) / _HELD_BYTES)


def bytes_within(value: Any) -> int:
    """How many bytes the tensors in nested lists, mappings and dataclasses take.

    Examples:
        >>> import torch
        >>> from semu_peft.training.held_batches import bytes_within
        >>> bytes_within([torch.zeros(3), {"states": (torch.zeros(2, dtype=torch.float64), None)}])
        28
    """
    if isinstance(value, Tensor):
        return value.nbytes
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(bytes_within, value)) if isinstance(value, (list, tuple)) else 0


def _tokens(batch: Any) -> int:
    """How many labels of tokens there are; none where an example has one label, or one for each pixel."""
    try:
        labels: Any = split_batch(batch)[2]
    except TypeError:  # it has no labels, as a denoiser's has none
        return 0
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        return 0
    return int((labels >= 0).sum())
