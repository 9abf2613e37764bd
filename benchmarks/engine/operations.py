"""How many operations, decompositions and waits of the host an initialisation and a step take, by the number of layers.

    OMP_NUM_THREADS=1 python benchmarks/engine/operations.py

Counted with the profiler on a CPU, where there is no GPU to time. *Operations* launch a kernel or more each; views and
allocations are none. *Waits* are numbers that the host asks for. What is within an operation is not seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from run import provenance, write
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from semu_peft import Retain, SemuConfig, gather, initialize_semu_weights
from semu_peft.gradients import GradientSum, Sketch, sketch
from semu_peft.linalg import gram
from semu_peft.subspace import directions, initialize

DECOMPOSITIONS = {"svd", "qr", "eigh", "eigvalsh", "cholesky_ex", "lstsq"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"}
AT_ONCE = ("aten::_foreach", "aten::_fused")
WAITS = {"_local_scalar_dense", "nonzero"}
MIXED = "16 of four shapes"
COUNTS = ("operations", "decompositions", "waits")


class Reads(TorchFunctionMode):
    """What brings numbers to the host and leaves no trace in the profile of a CPU, where they are already."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.count += name in ("tolist", "cpu") or (name == "equal" and args[0].numel() > 0)
        return func(*args, **(kwargs or {}))


def counted(call: Callable[[], object]) -> dict[str, int]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler, Reads() as reads:
        call()
    each = [_within(event) for event in profiler.events() if event.cpu_parent is None]
    names = [name for _, names in each for name in names]
    decompositions = sum(name.removeprefix("linalg_") in DECOMPOSITIONS for name in names)
    found = sum(count for count, _ in each), decompositions, reads.count + sum(name in WAITS for name in names)
    return dict(zip(COUNTS, found, strict=True))


def _within(event: Any) -> tuple[int, list[str]]:
    """How many operations an event is, those that it consists of or itself, and the names of all that is in it."""
    is_one = event.name.startswith(AT_ONCE)
    parts = [] if is_one else [_within(part) for part in event.cpu_children]
    count, (_, is_operation, name) = sum(count for count, _ in parts), event.name.partition("aten::")
    count = count or int(is_one or bool(is_operation) and not _is_nothing(name))
    return count, [name, *(name for _, names in parts for name in names)]


def _is_nothing(name: str) -> bool:
    """Whether it makes room, gives its input in another shape, or gives what is no tensor."""
    packet = getattr(torch.ops.aten, name)
    returns = [each for overload in packet.overloads() for each in getattr(packet, overload)._schema.returns]
    is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in returns)
    return name in ALLOCATIONS or is_view or not any("Tensor" in str(each.type) for each in returns)


def stack(sizes: Sequence[int]) -> nn.Sequential:
    """Layers from each size to the next, orthogonal, so that gradients are as strong in all of them."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(*pair, bias=False) for pair in zip(sizes[:-1], sizes[1:], strict=True)))
    for weight in layers.parameters():
        nn.init.orthogonal_(weight)
    return layers


def batch_of(sizes: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs whose directions fade, as those of real data do, and what the outputs are to grow along."""
    return torch.randn(256, sizes[0]) * torch.arange(1.0, sizes[0] + 1) ** -0.75, torch.randn(256, sizes[-1])


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (model(batch[0]) * batch[1]).mean()


def initialization(
    sizes: Sequence[int], statistic: Any, rule: str | None = None, *, again: bool = False
) -> dict[str, int]:
    """From gathered gradients to an adapter, as an accelerator does it: it leaves small decompositions to the host.

    With a `rule` there are retain gradients too; `again` counts a profile that is used once more, at a lower γ.
    """
    model = get_peft_model(stack(sizes), SemuConfig(target_modules="all-linear"))
    settings: Any = {"statistic": statistic, "adapter_name": "default", "progress": False}
    sums, kept = (gather(model, [batch_of(sizes)], loss, **settings) for _ in range(2))
    retain: Any = {"retain": Retain([batch_of(sizes)], loss), "retain_rule": rule} if rule else {}
    with (
        mock.patch.object(initialize, "_retain_sums", lambda *_: dict(kept.items())),  # gathered already, as the others
        mock.patch.object(gram, "where_quick", partial(gram.where_quick, cores=1)),
        mock.patch.object(sketch, "orthonormal", partial(sketch.orthonormal, by_products=True)),
        mock.patch.object(directions, "_NUMBERS_ON_CPU", directions._NUMBERS_AT_ONCE),
    ):
        if again:
            known = initialize_semu_weights(model, sums, keep_explained_variance=0.99, progress=False)
            return counted(partial(known.initialize, model, explained_variance=0.95))
        return counted(partial(initialize_semu_weights, model, sums, progress=False, **retain))


def step(sizes: Sequence[int], config: Any) -> dict[str, int]:
    """Forward, backward and a fused AdamW, at rank 16."""
    model, batch = get_peft_model(stack(sizes), config(r=16, target_modules="all-linear")), batch_of(sizes)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def once() -> None:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    once()  # the optimiser makes its state
    return counted(once)


# By its name what is counted of layers of some sizes, and how wide they are.
KINDS: dict[str, tuple[Callable[[Sequence[int]], dict[str, int]], int]] = {
    "exact sums, layers of 96": (partial(initialization, statistic=GradientSum), 96),
    "exact sums, layers of 320": (partial(initialization, statistic=GradientSum), 320),
    "sketches of 48, layers of 320": (partial(initialization, statistic=Sketch.of_size(48)), 320),
    "a part projected off, layers of 96": (partial(initialization, statistic=GradientSum, rule="project"), 96),
    "the best ratios, layers of 96": (partial(initialization, statistic=GradientSum, rule="ratio"), 96),
    "a profile again, layers of 96": (partial(initialization, statistic=GradientSum, again=True), 96),
    "a step of SEMU": (partial(step, config=partial(SemuConfig, init_weights=False)), 96),
    "a step of LoRA": (partial(step, config=LoraConfig), 96),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/engine_operations.json"))
    arguments = parser.parse_args()
    columns = [*(f"{number} layers" for number in arguments.layers), MIXED]
    rows = [f"| {'; '.join(COUNTS)} | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    found: dict[str, dict[str, dict[str, int]]] = {}
    for kind, (count, width) in KINDS.items():
        mixed = [width, width + 16, width + 32, width + 48] * 4 + [width]
        sizes = [*([width] * (number + 1) for number in arguments.layers), mixed]
        found[kind] = dict(zip(columns, map(count, sizes), strict=True))
        cells = ("; ".join(map(str, counts.values())) for counts in found[kind].values())
        rows.append(f"| {kind} | {' | '.join(cells)} |")
    write({"measured by": provenance(), "counts": found, "table": rows}, arguments.output)
    print(*rows, f"Written to {arguments.output}", sep="\n")


if __name__ == "__main__":
    main()
