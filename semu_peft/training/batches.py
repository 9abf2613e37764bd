"""The batches of a run, in an order that a resumed run draws again."""

from __future__ import annotations

import itertools
import random
from collections.abc import Generator, Iterable, Iterator, Sized
from contextlib import closing, contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from semu_peft.objectives.batches import check_batches
from semu_peft.objectives.examples import check_not_empty

from .generators import generator_states, own_generators, set_generator_states
from .progress import Position

_END = object()
_RETAIN_SEED = 2**31  # keeps the draws of the loaders apart, and those of one retain loader from the next one's
_NEXT_RETAIN_SEED = 2**20


def as_loader(batches: Iterable[Any], name: str, most: int | None = None) -> DataLoader[Any]:
    """Return a DataLoader over batches: the one given, or one over ready batches.

    Args:
        batches: A DataLoader; an `IterableDataset` of ready batches; a list or another iterable of ready batches.
        name: The argument to name in errors.
        most: How many ready batches are needed at most, which bounds what is taken of an endless iterator.

    Raises:
        TypeError: There is nothing to go through.
        ValueError: It is empty.
    """
    if isinstance(batches, DataLoader):
        loader = batches
    elif isinstance(batches, IterableDataset):
        loader = DataLoader(batches, batch_size=None)
    else:
        check_batches(batches, name)
        # One more than is needed, or the run would take the last one for the end of an epoch.
        most = None if most is None or isinstance(batches, Sized) else most + 1
        ready: list[Any] = list(itertools.islice(batches, most))
        if any(batch is None for batch in ready):
            raise TypeError(f"`{name}` must give batches, got None among them. Leave out what a `collate_fn` dropped.")
        loader = DataLoader(ready, batch_size=1, shuffle=False, collate_fn=_only)  # type: ignore[arg-type]
    if batches_in(loader) == 0:
        raise ValueError(
            f"`{name}` must give at least one batch, got none. An iterator may have been used up before: give a list."
        )
    return loader


def batches_in(loader: DataLoader[Any]) -> int | None:
    """Return how many batches one pass has; None for an iterable dataset that does not say."""
    try:
        return len(loader)
    except TypeError:
        return None


def _only(items: list[Any]) -> Any:
    return items[0]


def rest_of_epoch(loader: DataLoader[Any], seed: int, at: Position) -> Generator[Any, None, None]:
    """The batches of an epoch, without those that were seen already.

    Each epoch of each loader draws from a random state of its own, set by `seed` and epoch: a resumed run loads the
    seen batches again and is then where the interrupted one was, whatever samplers and augmentations had drawn.
    Samplers and data sets with generators of their own begin the epoch where those were when it began first.
    """
    seen = at.batch
    generators = own_generators(loader)
    if at.generators is None:
        at.generators = generator_states(generators)
        at.first_generators = at.first_generators or at.generators
    set_generator_states(generators, at.generators)
    loader.set_epoch(at.epoch)  # type: ignore[attr-defined]
    random_states = _seeded_random_states(seed + at.epoch)
    iterator: Iterator[Any] | None = None
    try:
        for index in itertools.count():
            outside = _random_states()
            _set_random_states(random_states)
            try:
                iterator = iter(loader) if iterator is None else iterator
                batch = next(iterator, _END)
            except ValueError as error:  # Accelerate's words for a stream without any batch
                if index or "does not contain any data" not in str(error):
                    raise
                batch = _END
            finally:
                random_states = _random_states()
                _set_random_states(outside)
            if batch is _END:
                at.generators = generator_states(generators)  # where the next epoch begins
                return
            check_not_empty(batch, f"batch {index} of epoch {at.epoch}")
            if index >= seen:
                yield batch
    finally:
        loader.end()  # type: ignore[attr-defined]  # or a run that stops midway leaves it as Accelerate's active one


@contextmanager
def first_batches(
    loader: DataLoader[Any], seed: int, first_generators: list[Any] | None = None
) -> Iterator[Iterator[Any]]:
    """Look at a run's first batches without a trace in what it then draws; none of a stream, which may not come again.

    Args:
        loader: A prepared loader.
        seed: The seed of its first epoch.
        first_generators: Where the loader's own generators were when the run began; by default where they are.

    Yields:
        The batches of the first epoch, of which as many may be taken as wanted.
    """
    if isinstance(loader.dataset, IterableDataset):
        yield iter(())
        return
    generators, prepared = own_generators(loader), cast(Any, loader)
    before, epoch = generator_states(generators), prepared.iteration
    try:
        look = rest_of_epoch(loader, seed, Position(generators=first_generators))
        with _another_iterator(loader), closing(look) as batches:
            yield batches
    finally:
        set_generator_states(generators, before)
        prepared.set_epoch(epoch)  # by which samplers and data sets may draw what is left of it


@contextmanager
def _another_iterator(loader: Any) -> Iterator[None]:
    """Let a loader begin anew in the middle of an epoch, which goes on afterwards where its workers stay alive."""
    loaders: list[Any] = [loader, getattr(loader, "base_dataloader", None)]  # Accelerate's, and what is in it
    held = [each for each in loaders if hasattr(each, "_iterator")]
    iterators = [each._iterator for each in held]
    for each in held:
        each._iterator = None
    try:
        yield
    finally:
        for each, iterator in zip(held, iterators, strict=True):
            each._iterator = iterator


def in_steps(batches: Iterator[Any], size: int) -> Iterator[tuple[list[Any], bool]]:
    """Groups of `size` batches, one group a step, each with whether it is the last of the epoch; that may be smaller.

    Examples:
        >>> list(in_steps(iter("abc"), 2))
        [(['a', 'b'], False), (['c'], True)]
    """
    group: list[Any] = []
    for batch in batches:
        if len(group) == size:
            yield group, False
            group = []
        group.append(batch)
    if group:
        yield group, True


def retain_seed(seed: int, index: int) -> int:
    """The seed of the `index`-th retain loader of a run.

    Examples:
        >>> retain_seed(0, 1) - retain_seed(0, 0)
        1048576
    """
    return seed + _RETAIN_SEED + index * _NEXT_RETAIN_SEED


def cycle(loader: DataLoader[Any], seed: int, at: Position) -> Generator[Any, None, None]:
    """The batches of retain data, epoch after epoch, from where the run stands.

    Raises:
        ValueError: The loader gives no batch any more.
    """
    while True:
        with closing(rest_of_epoch(loader, seed, at)) as batches:
            for batch in batches:
                at.batch += 1
                yield batch
        if at.batch == 0:
            raise ValueError(f"`retain` gave no batch in epoch {at.epoch}. Check that it gives its batches anew.")
        at.next_epoch()


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
