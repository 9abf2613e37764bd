"""Where models are, how much is judged at once there, and which seconds count."""

from __future__ import annotations

import os
import platform
import time

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOGETHER = 128 if DEVICE.type == "cuda" else 8  # answers that are judged in one batch


def clock() -> float:
    """Seconds: of the wall on a GPU, when all that was asked of it is done; of one processor without a GPU."""
    if DEVICE.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def about(processes: int = 1) -> dict[str, str]:
    """The machine, in words, and what the column of seconds counts on it."""
    cores = f"{os.cpu_count()} CPU cores"
    if DEVICE.type != "cuda":
        machine, counted = cores, "of one processor"
    else:
        machine, counted = f"{torch.cuda.get_device_name()}, {cores}", f"wall, {processes} processes side by side"
    return {"torch": torch.__version__, "machine": machine, "seconds": counted, "python": platform.python_version()}
