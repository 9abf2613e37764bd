"""The batches of a run, in an order that a resumed run draws again."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .checkpoint import Progress


def as_loader(batches: Iterable[Any], name: str) -> DataLoader[Any]:
    """A DataLoader over batches: the one given, or one over a list (or other finite iterable) of ready batches.

    Raises:
        ValueError: It is empty or has no length; `name` is the argument to name.
    """
    loader = batches if isinstance(batches, DataLoader) else _ready_batches(batches)
    try:
        count = len(loader)
    except TypeError as error:
        raise ValueError(f"`{name}` must have a length; wrap an iterable dataset into a list of batches.") from error
    if count == 0:
        raise ValueError(f"`{name}` is empty: expected at least one batch.")
    return loader


def _ready_batches(batches: Iterable[Any]) -> DataLoader[Any]:
    return DataLoader(list(batches), batch_size=1, shuffle=False, collate_fn=_only)  # type: ignore[arg-type]


def _only(items: list[Any]) -> Any:
    return items[0]


def rest_of_epoch(loader: DataLoader[Any], seed: int, epoch: int, seen: int) -> Iterator[Any]:
    """The batches of an epoch, without the first `seen`.

    Each epoch of each loader draws from a random state of its own, set by `seed` and `epoch`: a resumed run loads the
    seen batches again and is then where the interrupted one was, whatever samplers and augmentations had drawn.
    """
    loader.set_epoch(epoch)  # type: ignore[attr-defined]
    own = _seeded_random_states(seed + epoch)
    iterator: Iterator[Any] | None = None
    try:
        for index in itertools.count():
            outside = _random_states()
            _set_random_states(own)
            try:
                iterator = iter(loader) if iterator is None else iterator
                batch = next(iterator, None)
            finally:
                own = _random_states()
                _set_random_states(outside)
            if batch is None:
                return
            if index >= seen:
                yield batch
    finally:
        loader.end()  # type: ignore[attr-defined]  # or a run that stops midway leaves it as Accelerate's active one


def cycle(loader: DataLoader[Any], seed: int, state: Progress) -> Iterator[Any]:
    """The batches of retain data, epoch after epoch, from where the run stands."""
    while True:
        for batch in rest_of_epoch(loader, seed, state.retain_epoch, state.retain_batch):
            state.retain_batch += 1
            yield batch
        state.retain_epoch, state.retain_batch = state.retain_epoch + 1, 0


def _random_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _set_random_states(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


def _seeded_random_states(seed: int) -> tuple[Any, ...]:
    """The states that the generators of torch, NumPy and Python have after seeding, without seeding them."""
    return (
        torch.Generator().manual_seed(seed).get_state(),
        np.random.RandomState(seed % 2**32).get_state(),
        random.Random(seed).getstate(),
    )


def batch_size(batch: Any) -> int:
    """How many examples a batch holds: the length of its first tensor, 1 where there is none."""
    values = list(batch.values()) if hasattr(batch, "values") else list(batch)
    return next((len(value) for value in values if isinstance(value, Tensor) and value.dim() > 0), 1)
