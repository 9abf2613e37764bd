"""Sums and agreement over the processes of a distributed run; nothing to do in a single one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor

from semu_peft.tuner.tensors import is_sharded


def in_several_processes() -> bool:
    """Whether this is one of several processes of a run, whoever has made them known to each other."""
    if processes_of_torch():
        return processes_of_torch() > 1
    # Asking Accelerate sets up its state, which in a single process is the caller's to do.
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and PartialState().num_processes > 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of this tensor over all processes; the tensor itself in a single one."""
    if not in_several_processes():
        return tensor
    if not processes_of_torch():  # processes that torch.distributed does not know of, as on TPUs
        return reduce(tensor, reduction="sum")
    total = _within_reach(tensor).clone()
    torch.distributed.all_reduce(total)
    return total.to(tensor.device)


def mean_of_numbers(numbers: Mapping[str, float], processes: int, device: torch.device) -> dict[str, float]:
    """The mean of each over so many processes, all of which bring numbers of the same names."""
    if processes == 1:
        return dict(numbers)
    values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    return dict(zip(numbers, (sum_over_processes(values) / processes).tolist(), strict=True))


def from_main_process(tensor: Tensor) -> Tensor:
    """The main process's tensor on every process, which must bring one of the same shape."""
    if not in_several_processes():
        return tensor
    if not processes_of_torch():
        return broadcast(tensor)
    received = _within_reach(tensor).clone()
    torch.distributed.broadcast(received, src=0)
    return received.to(tensor.device)


def processes_of_torch() -> int:
    """How many processes `torch.distributed` knows of; 0 where it has not been set up."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 0


def whole(tensor: Any) -> Tensor:
    """A tensor, gathered from all processes where it is sharded over them.

    Examples:
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return gathered


def _within_reach(tensor: Tensor) -> Tensor:
    on_cpu = tensor.device.type == "cpu"
    return tensor.cuda() if on_cpu and torch.distributed.get_backend() == "nccl" else tensor


def rows_elsewhere(values: Tensor, rank: int, processes: int) -> tuple[int, int]:
    """How many rows of such values other processes have before and after this one's, where it has `rank`.

    Examples:
        >>> rows_elsewhere(torch.zeros(3, 2), rank=0, processes=1)
        (0, 0)
    """
    if processes == 1:
        return 0, 0
    counts = torch.zeros(processes, dtype=torch.int64, device=values.device)
    counts[rank] = len(values)
    rows = sum_over_processes(counts).tolist()
    return sum(rows[:rank]), sum(rows[rank + 1 :])
