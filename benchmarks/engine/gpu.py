"""Extraction and training steps of large models on a GPU, beside the floor and LoRA: the whole table in one call.

    python benchmarks/engine/gpu.py --seconds 420

Time is by events, memory the peak of what the allocator gave out. The figures that matter most come first: extractions
from few batches of the first two subjects, then those from many batches and steps, then compiled steps. Each figure is
written when it is there, nothing is begun that has no time left, and a call that finds figures in the result file
measures only those that are missing: the same command again completes the table. `--subjects llama-tiny unet-tiny
flux-tiny` tries all of it on a CPU, where memory is not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import DEVICE, seconds_and_peak
from models import SUBJECTS, Subject
from run import (
    RANKS,
    adapter,
    batches_of,
    floor_pass,
    initialization,
    provenance,
    step,
    target_names,
    to_initialize,
    write,
)
from torch import nn

LARGE = ("sd15-unet", "llama-8b", "sdxl-unet", "flux")
# By its name, how an extraction sums gradients, and the rank at the most. Random weights and tokens have gradients of
# nearly full rank: at γ alone a layer of 4096 inputs gets some 1,800 directions, which no adapter would have.
EXTRACTIONS = {"exact, r=64": ("exact", 64), "sketch": ("sketch", None), "exact": ("exact", None)}
# At γ alone decompositions of such sides take half a minute, from however many batches the gradients are.
ONCE = {("llama-8b", "exact"), ("flux", "exact")}
LONG = 8.0  # seconds; a turn over few batches that takes longer is not repeated
# Compiled one by one: the blocks of a model are alike, so that this takes seconds where the whole takes minutes.
BLOCKS = (
    "BasicTransformerBlock", "ResnetBlock2D", "LlamaDecoderLayer", "ViTLayer", "FluxTransformerBlock",
    "FluxSingleTransformerBlock",
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One thing to measure: an extraction from so many batches, or a training step."""

    kind: str
    name: str
    call: Callable[[nn.Module, Subject, argparse.Namespace], tuple[float, float | None]]


@dataclass(frozen=True)
class Stage:
    """What is measured of a subject while its model is loaded."""

    subject: str
    figures: list[Figure]


def stages(arguments: argparse.Namespace) -> list[Stage]:
    """In order of value: what takes half a minute alone comes after the rest, and steps are compiled last."""
    main, later = arguments.subjects[:2], arguments.subjects[2:]
    first, *more = arguments.batches
    few, long = ({name: _extractions(name, first, once=once) for name in arguments.subjects} for once in (False, True))
    rest = {name: [figure for count in more for figure in _extractions(name, count)] for name in arguments.subjects}
    compiled = _steps("compiled") if arguments.compile else []
    return [
        *(Stage(name, few[name]) for name in main),
        *(Stage(name, [*rest[name], *_steps("eager"), *long[name]]) for name in main),
        *(Stage(name, compiled) for name in main),
        *(Stage(name, [*few[name], *_steps("eager"), *rest[name], *long[name], *compiled]) for name in later),
    ]


def _extractions(name: str, count: int, *, once: bool = False) -> list[Figure]:
    """Those that are measured once alone, or the others."""
    kinds = [kind for kind in ("floor pass", *EXTRACTIONS) if ((name, kind) in ONCE) == once]
    return [Figure(kind, f"{kind}, {count} batches", partial(measure_extraction, kind, count)) for kind in kinds]


def _steps(mode: str) -> list[Figure]:
    return [
        Figure(kind, f"{kind} step, rank {rank}, {mode}", partial(measure_step, kind, rank, mode))
        for rank in RANKS
        for kind in ("lora", "semu")
    ]


def measure_extraction(
    kind: str, count: int, model: nn.Module, subject: Subject, arguments: argparse.Namespace
) -> tuple[float, float | None]:
    """The faster of two turns over few batches, the only turn over many or of a long one; one batch warms up before.

    Of the floor, one pass forward and backward with the targets' weight gradients; of the others, an initialisation.
    Making the adapter is not counted, as it takes the same, or longer, of LoRA.
    """
    batches, turns = batches_of(subject, count), []
    for turn in (batches[:1], batches, batches) if count <= 8 else (batches[:1], batches):
        if len(turns) > 1 and turns[-1][0] > LONG:
            break
        if kind == "floor pass":
            turns.append(seconds_and_peak(partial(floor_pass, model, subject, turn, arguments)))
            continue
        accumulate, rank = EXTRACTIONS[kind]
        wrapped = to_initialize(model, subject, arguments, rank)
        turns.append(seconds_and_peak(partial(initialization, accumulate, wrapped, subject, turn, arguments)))
        wrapped.unload().requires_grad_(False)
    return min(turns[1:], key=lambda turn: turn[0])


def measure_step(
    kind: str, rank: int, mode: str, model: nn.Module, subject: Subject, arguments: argparse.Namespace
) -> tuple[float, float | None]:
    """The fastest of a few, after some to warm up and compile; the peak of all of these."""
    (batch,) = batches_of(subject, 1)
    wrapped = adapter(kind, rank)(model, subject)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad])
    with compiled_blocks(wrapped, arguments.backend) if mode == "compiled" else contextlib.nullcontext():
        for _ in range(3):
            step(wrapped, subject, batch, optimizer)
        turns = [seconds_and_peak(partial(step, wrapped, subject, batch, optimizer)) for _ in range(arguments.steps)]
    wrapped.unload().requires_grad_(False)
    return min(taken for taken, _ in turns), max((peak for _, peak in turns if peak is not None), default=None)


@contextlib.contextmanager
def compiled_blocks(model: nn.Module, backend: str) -> Iterator[None]:
    """The model's blocks compiled while the context lasts."""
    blocks = [module for module in model.modules() if type(module).__name__ in BLOCKS]
    if not blocks:
        raise ValueError(f"No module of the model is one of {BLOCKS}: name the class of its blocks there.")
    torch.compiler.reset()
    torch._dynamo.config.cache_size_limit = 256  # blocks of many widths share their code; beyond it they run eagerly
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is seen again


def loaded(subject: Subject, dtype: torch.dtype) -> nn.Module:
    """Made in its dtype at once: a model of 8B in float32 would not fit beside its copy."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            return subject.build().to(dtype).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


# ---- the table ----


def table(measured: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    """Ratios of one subject, with the goals; "–" where a part of one has not been measured."""
    rows = ["| figure | measured | goal |", "| --- | --- | --- |"]

    def row(figure: str, part: str, upper: str, lower: str, goal: str) -> None:
        values = [measured.get(name, {}).get(part) for name in (upper, lower)]
        ratio = f"{values[0] / values[1]:.2f}" if all(values) else "–"
        rows.append(f"| {figure} | {ratio} | {goal} |")

    for count in arguments.batches:
        for kind in EXTRACTIONS:
            name, floor = f"{kind}, {count} batches", f"floor pass, {count} batches"
            row(f"extraction / floor, {name}", "seconds", name, floor, "≤ 1.15" if count >= 64 else "≤ 1.5 (8B: ≤ 2.5)")
    name = f"sketch, {arguments.batches[0]} batches"
    row("peak memory of the sketch / LoRA step, rank 16", "MiB", name, "lora step, rank 16, eager", "≤ 1.0")
    for part, goal in (("seconds", "≤ 0.95"), ("MiB", "≤ 0.9")):
        for mode in ("eager", "compiled"):
            for rank in RANKS:
                names = (f"{kind} step, rank {rank}, {mode}" for kind in ("semu", "lora"))
                row(f"step / LoRA step, {part}, rank {rank}, {mode}", part, *names, goal)
    return rows


def measure(stage: Stage, document: dict[str, Any], path: Path, arguments: argparse.Namespace) -> None:
    """All that is missing of one stage, as long as there is time."""
    name = stage.subject
    measured = document.setdefault(name, {})
    missing = [figure for figure in stage.figures if "seconds" not in measured.get(figure.name, {})]
    if not missing or time.monotonic() > arguments.deadline:
        return
    started = time.monotonic()
    subject = SUBJECTS[name]()
    with torch.device("meta"):
        arguments.names = target_names(subject.build(), subject)
    model = loaded(subject, arguments.dtype)
    print(f"{name}, made in {time.monotonic() - started:.1f} s", flush=True)
    for figure in missing:
        if time.monotonic() > arguments.deadline:
            break
        try:
            taken, peak = figure.call(model, subject, arguments)
            measured[figure.name] = {"seconds": taken, "MiB": peak}
            print(f"  {name}, {figure.name}: {taken:.3f} s, {peak or 0:.0f} MiB", flush=True)
        except torch.OutOfMemoryError as error:
            measured[figure.name] = {"out of memory": str(error)[:200]}
            print(f"  {name}, {figure.name}: out of memory", flush=True)
            break  # what it leaves behind would be in the way of the next
        except Exception as error:  # a figure that fails must not take the others with it
            measured[figure.name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
            print(f"  {name}, {figure.name}: failed", flush=True)
            traceback.print_exc()
            model = loaded(subject, arguments.dtype)  # it may have kept its adapter
        finally:
            measured["table"] = table(measured, arguments)
            write(document, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), default=list(LARGE))
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 64], help="forget batches of the extractions")
    parser.add_argument("--steps", type=int, default=5, help="training steps of which the fastest counts")
    parser.add_argument("--seconds", type=float, default=420, help="begin no figure after so long")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="compiled steps too")
    parser.add_argument("--backend", default="inductor", help="of the compiler")
    parser.add_argument("--sketch-size", type=int, default=192)
    parser.add_argument("--explained-variance", type=float, default=0.9)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.bfloat16)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/engine_gpu.json"), help="result file")
    arguments = parser.parse_args()
    arguments.deadline = time.monotonic() + arguments.seconds
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    path = arguments.output
    document = json.loads(path.read_text()) if path.exists() else {}
    document["measured by"] = provenance()
    for stage in stages(arguments):
        measure(stage, document, path, arguments)
    for name in arguments.subjects:
        print(name, *document.get(name, {}).get("table", []), sep="\n")
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
