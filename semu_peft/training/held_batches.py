"""The batches on which the end of a run is compared with its start."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from semu_peft.objectives.examples import count_examples

_HELD_EXAMPLES = 512
_MOST_ROUNDS = 8

Pair = tuple[Any, list[Any]]
"""A forget batch, and one batch of each retain set."""


def first_pairs(forget: Iterable[Any], retained: Sequence[Iterator[Any]]) -> list[Pair]:
    """Forget batches of the first 512 examples, with the retain batches that come with them.

    A few forget examples are paired again and again with the next retain batches: one of these says little of what is
    to be kept.

    Args:
        forget: The forget batches, one pass.
        retained: Those of each retain set, one pass.

    Examples:
        >>> from semu_peft.training.held_batches import first_pairs
        >>> first_pairs(["forget"], [iter(["first", "second"])])
        [('forget', ['first']), ('forget', ['second'])]
    """
    pairs: list[Pair] = []
    examples = 0
    for batch in forget:
        kept = [next(batches, None) for batches in retained]
        if any(each is None for each in kept):
            break
        pairs.append((batch, kept))
        examples += examples_of(pairs[-1:])
        if examples >= _HELD_EXAMPLES:
            break
    first = list(pairs)
    for _ in range(1, rounds_of(examples) if retained else 1):
        further = [(batch, [next(batches, None) for batches in retained]) for batch, _ in first]
        if any(each is None for _, kept in further for each in kept):
            break
        pairs += further
    return pairs


def examples_of(pairs: Sequence[Pair]) -> int:
    """How many forget examples there are, one at least for a batch of which that is not known."""
    return sum(count_examples(batch) or 1 for batch, _ in pairs)


def rounds_of(examples: int) -> int:
    """How often to look at so few, up to eight times.

    Examples:
        >>> from semu_peft.training.held_batches import rounds_of
        >>> rounds_of(1), rounds_of(200), rounds_of(512)
        (8, 3, 1)
    """
    return min(_MOST_ROUNDS, math.ceil(_HELD_EXAMPLES / max(examples, 1)))
