"""Time and peak memory of one call, on a CPU or a GPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(call: Callable[[], object]) -> float:
    """Processor time of this process on a CPU, which other work on the machine disturbs least; by events on a GPU."""
    gc.collect()
    if DEVICE.type == "cpu":
        started = time.process_time()
        call()
        return time.process_time() - started
    torch.cuda.synchronize()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1000


def seconds_and_peak(call: Callable[[], object]) -> tuple[float, float | None]:
    """Its time, and the most MiB that a GPU's allocator had given out meanwhile; None on a CPU."""
    if DEVICE.type == "cpu":
        return seconds(call), None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    taken = seconds(call)
    return taken, torch.cuda.max_memory_allocated() / 2**20
