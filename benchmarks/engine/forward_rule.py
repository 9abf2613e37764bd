"""Measure when a correction is cheaper inside the weight, and hold `semu_peft.tuner.cost` against it.

    OMP_NUM_THREADS=1 python benchmarks/engine/forward_rule.py

Prints the training step of one linear layer in units of the frozen layer's own, beside the weight and inside it, and
what the rule would have chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from semu_peft.tuner.cost import dense_is_cheaper

SHAPES = ((768, 768), (3072, 768), (1280, 1280))
RANKS = (16, 64, 128, 256, 384, 512)
POSITIONS = (256, 1024, 4096)


def fastest(step: Callable[[], None], turns: int = 5) -> float:
    """Processor seconds of the fastest turn."""
    step()
    times = []
    for _ in range(turns):
        started = time.process_time()
        step()
        times.append(time.process_time() - started)
    return min(times)


def measure(m: int, n: int, positions: int, rank: int) -> tuple[float, float]:
    """A training step with the correction beside the weight and inside it, over one of the frozen layer alone."""
    weight = torch.randn(m, n)
    left, right = torch.linalg.qr(torch.randn(m, rank))[0], torch.linalg.qr(torch.randn(n, rank))[0]
    core = torch.zeros(rank, rank, requires_grad=True)
    x, slope = torch.randn(positions, n, requires_grad=True), torch.randn(positions, m)

    def alone() -> None:
        F.linear(x, weight).backward(slope)

    def beside() -> None:
        hidden = F.linear(F.linear(x, right.mT), core)
        (F.linear(x, weight) + F.linear(hidden, left)).backward(slope)

    def inside() -> None:
        F.linear(x, weight + left @ core @ right.mT).backward(slope)

    base = fastest(alone)
    return fastest(beside) / base, fastest(inside) / base


def main() -> None:
    torch.manual_seed(0)
    lost = []
    print("    m     n positions rank  beside  inside  the rule says")
    for m, n in SHAPES:
        for positions in POSITIONS:
            for rank in (rank for rank in RANKS if rank <= min(m, n)):
                beside, inside = measure(m, n, positions, rank)
                joins = dense_is_cheaper(m, n, rank, positions)
                lost.append((inside if joins else beside) / min(beside, inside))
                says = "inside" if joins else "beside"
                print(f"{m:5} {n:5} {positions:9} {rank:4}  {beside:6.2f}  {inside:6.2f}  {says}", flush=True)
    mean = sum(lost) / len(lost)
    print(f"The rule's choice takes {mean:.2f} of the better one's time on average, {max(lost):.2f} at worst.")


if __name__ == "__main__":
    main()
