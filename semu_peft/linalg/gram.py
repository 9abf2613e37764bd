"""Singular values and vectors from Gram matrices in float64, and what these do not resolve."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .energy import without_noise

# The Gram matrix squares the condition number: in float64 this still leaves half of float32's digits.
_RESOLUTION = 1e-5
# An accelerator decomposes matrices of some hundred rows one by one, in two milliseconds or more each. The host needs a
# part of one up to the first of these sides; up to the second it is quicker with some cores, which share the matrices.
_ON_HOST, _ON_CORES = 128, 256
_SOME_CORES = 4


def gram_values(gram: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Singular values, descending, of matrices `A` from `A Aᵀ`, in float64: as `gram_spectrum`, in a third of its time.

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.gram import gram_values
        >>> gram_values(torch.diag(torch.tensor([4.0, 9.0])).double(), (2, 2), torch.float32).tolist()
        [3.0, 2.0]
    """
    (squares,) = where_quick(lambda grams: (torch.linalg.eigvalsh(grams),), gram)
    return _roots(squares, shape, dtype)


def gram_spectrum(gram: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Singular values, descending, and left vectors of matrices `A` from `A Aᵀ`, all in float64.

    Args:
        gram: `(..., m, m)`.
        shape: Of `A`.
        dtype: Of `A`, whose rounding is no direction.

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.gram import gram_spectrum
        >>> gram_spectrum(torch.diag(torch.tensor([4.0, 9.0])).double(), (2, 2), torch.float32)[0].tolist()
        [3.0, 2.0]
    """
    squares, left = where_quick(torch.linalg.eigh, gram)
    return _roots(squares, shape, dtype), left.flip(-1)


def where_quick(decompose: Callable[[Tensor], Any], gram: Tensor, cores: int | None = None) -> tuple[Tensor, ...]:
    """What `decompose` gives of each matrix, worked out where that is quickest and brought back.

    Args:
        decompose: Of `(batch, m, m)`; must treat each matrix by itself.
        gram: `(..., m, m)`; on a CPU it is left to torch, which shares a decomposition among the cores.
        cores: Over how many threads of the host to spread the matrices; by default all cores of the process.

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.gram import where_quick
        >>> (values,) = where_quick(lambda grams: (torch.linalg.eigvalsh(grams),), torch.eye(2).expand(3, 2, 2))
        >>> values.tolist()
        [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    if gram.device.type == "cpu" and cores is None:
        return tuple(decompose(gram))
    cores = cores or _cores()
    if gram.shape[-1] > (_ON_CORES if cores >= _SOME_CORES else _ON_HOST):
        return tuple(decompose(gram))
    batch, host = gram.shape[:-2], gram.reshape(-1, *gram.shape[-2:]).cpu()
    parts = host.tensor_split(min(cores, len(host))) if len(host) > 1 else (host,)
    found = list(_each(decompose, parts))
    return tuple(
        torch.cat(tensors).to(gram.device).reshape(*batch, *tensors[0].shape[1:])
        for tensors in zip(*found, strict=True)
    )


def _each(decompose: Callable[[Tensor], Any], parts: Sequence[Tensor]) -> list[Any]:
    """Of each part, in a thread of its own that does not split up further."""
    if len(parts) == 1:
        return [decompose(parts[0])]
    threads = torch.get_num_threads()
    try:
        return list(_workers(_cores(), os.getpid()).map(decompose, parts))
    finally:
        torch.set_num_threads(threads)  # which threads that begin later take over


@lru_cache(maxsize=1)
def _workers(count: int, process: int) -> ThreadPoolExecutor:
    """Kept, as they are needed every few milliseconds; those of another process are not there after a fork."""
    return ThreadPoolExecutor(count, "semu-decompose", initializer=torch.set_num_threads, initargs=(1,))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _roots(squares: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # Rounding of the squares leaves half of float64's digits to their roots.
    resolution = max(torch.finfo(torch.float64).eps ** 0.5, torch.finfo(dtype).eps)
    return without_noise(squares.flip(-1).clamp_min(0).sqrt(), shape, resolution)


def inverse(values: Tensor) -> Tensor:
    """One over each singular value; zero for those that the Gram matrix does not resolve."""
    return torch.where(_clear(values), 1 / values, 0)


def resolved(values: Tensor, ranks: Tensor) -> Tensor:
    """Whether the first `rank` values of `(..., k)` stand clear of what the Gram matrix rounds away, `(...)`."""
    return _clear(values).sum(-1) >= ranks


def _clear(values: Tensor) -> Tensor:
    return values > _RESOLUTION * values[..., :1]
