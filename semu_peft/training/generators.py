"""The random generators that a loader's sampler, data set and transforms hold themselves, and their states."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader, Dataset, Sampler

_MOST = 1000  # objects that are looked into: data sets hold their data in lists as well


def own_generators(loader: DataLoader[Any]) -> list[Any]:
    """Every generator of torch, NumPy or Python that a loader draws its batches with, in a fixed order.

    Looked into are the loader's generator, samplers, data set and `collate_fn`, and what these hold of data sets,
    samplers and callables such as transforms.

    Examples:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader([1, 2], shuffle=True, generator=torch.Generator())
        >>> len(own_generators(loader))
        1
    """
    start = [getattr(loader, name, None) for name in ("generator", "sampler", "batch_sampler", "dataset", "collate_fn")]
    found: list[Any] = []
    seen: set[int] = set()
    waiting = start[::-1]
    while waiting and len(seen) < _MOST:
        value = waiting.pop()
        if value is None or id(value) in seen:
            continue
        seen.add(id(value))
        if _is_generator(value):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            waiting += [each for each in value[:_MOST] if _may_draw(each)][::-1]
        elif _may_draw(value):
            waiting += [each for each in getattr(value, "__dict__", {}).values() if _is_worth_a_look(each)][::-1]
    return [each for each in found if getattr(each, "device", None) in (None, torch.device("cpu"))]


def _may_draw(value: Any) -> bool:
    if isinstance(value, (type, SeedableRandomSampler)):  # Accelerate's is seeded anew for each epoch
        return False
    return isinstance(value, (Dataset, Sampler)) or callable(value) or _is_generator(value)


def _is_generator(value: Any) -> bool:
    return isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random))


def _is_worth_a_look(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or _may_draw(value)


def generator_states(generators: Iterable[Any]) -> list[Any]:
    """Their states, as tensors, numbers, strings, lists and dictionaries.

    Examples:
        >>> import random
        >>> drawn = random.Random(3)
        >>> states = generator_states([drawn])
        >>> first = drawn.random()
        >>> set_generator_states([drawn], states)
        >>> drawn.random() == first
        True
    """
    return [_state_of(generator) for generator in generators]


def set_generator_states(generators: Sequence[Any], states: Sequence[Any]) -> None:
    """Put generators back into states that `generator_states` returned; those that came later are left alone.

    Raises:
        ValueError: There are fewer of them.
    """
    if len(generators) < len(states):
        raise ValueError(
            f"`resume_from_checkpoint`: the loader of the interrupted run had {len(states)} generators of its own, "
            f"this one has {len(generators)}. Resume with the data of the interrupted run."
        )
    for generator, state in zip(generators, states, strict=False):
        if isinstance(generator, torch.Generator):
            generator.set_state(state)
        elif isinstance(generator, random.Random):
            generator.setstate((state[0], tuple(state[1]), state[2]))
        elif isinstance(generator, np.random.RandomState):
            generator.set_state(_as_arrays(state))
        else:
            generator.bit_generator.state = _as_arrays(state)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        version, numbers, gauss = generator.getstate()
        return [version, list(numbers), gauss]
    if isinstance(generator, np.random.RandomState):
        return _as_plain(generator.get_state(legacy=False))
    return _as_plain(generator.bit_generator.state)


def _as_plain(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _as_plain(value) for key, value in state.items()}
    return {"array": state.tolist(), "dtype": str(state.dtype)} if isinstance(state, np.ndarray) else state


def _as_arrays(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    if state.keys() == {"array", "dtype"}:
        return np.array(state["array"], dtype=state["dtype"])
    return {key: _as_arrays(value) for key, value in state.items()}
