"""Sums and agreement over the processes of a distributed run; nothing to do in a single one."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor


def in_several_processes() -> bool:
    """Whether this is one of several processes of a run."""
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    # Asking Accelerate sets up its state, which in a single process is the caller's to do.
    launched = initialized or int(os.environ.get("WORLD_SIZE", "1")) > 1
    return launched and PartialState().num_processes > 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of this tensor over all processes; the tensor itself in a single one."""
    return reduce(tensor, reduction="sum") if in_several_processes() else tensor


def from_main_process(tensor: Tensor) -> Tensor:
    """The main process's tensor on every process, which must bring one of the same shape."""
    return broadcast(tensor) if in_several_processes() else tensor
