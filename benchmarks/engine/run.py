"""Time and memory of finding a subspace and of training in it, beside the floor, the published method and LoRA.

    python benchmarks/engine/run.py --subject vit-b16

Each figure is a ratio of two things measured in this one run, on this machine. Times: all variants take turns in one
process, round after round, and the fastest turn of each counts, as other work can only slow a turn down. On a CPU it is
processor time; set OMP_NUM_THREADS=1, or idle threads count too. Memory: each
variant runs in a fresh process, and its peak is the resident set beyond what Python and its imports took; on a GPU, the
peak of allocated memory.

The figures come in parts, none of which compares with another's: `--parts` measures some of them again, and keeps
the others of the result file that is there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import published
import torch
import transformers
from measure import DEVICE, seconds
from models import SUBJECTS, Subject
from peft import (
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_loraga,
)
from torch import nn

from semu_peft import SemuConfig, initialize_semu_weights
from semu_peft.files import written_whole
from semu_peft.gradients import GradientSum, Sketch
from semu_peft.gradients.gather import gather
from semu_peft.linalg.factorize import SingularFactors, leading_factors_of_each
from semu_peft.tuner.adapted import semu_layers

RANKS = (16, 64)


def batches_of(subject: Subject, count: int) -> list[Any]:
    return [{key: value.to(DEVICE) for key, value in subject.batch(seed).items()} for seed in range(count)]


def built(subject: Subject, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return subject.build().to(dtype).eval().requires_grad_(False)


def target_names(model: nn.Module, subject: Subject) -> list[str]:
    return list(semu_layers(get_peft_model(model, SemuConfig(target_modules=subject.targets))))


# ---- what is measured ----


def floor_pass(model: nn.Module, subject: Subject, batches: list[Any], arguments: argparse.Namespace) -> None:
    """One forward and backward pass over the batches, with the targets' weight gradients."""
    names = arguments.names
    weights = [model.get_submodule(name).weight for name in names]
    for weight in weights:
        weight.requires_grad_(True)
    for batch in batches:
        subject.loss(model, batch).backward()
        for weight in weights:
            weight.grad = None
    model.requires_grad_(False)


def to_initialize(
    model: nn.Module, subject: Subject, arguments: argparse.Namespace, rank: int | None = None
) -> PeftModel:
    """The model with an adapter to fill, of as many directions as explain γ, of so many at the most."""
    config = SemuConfig(target_modules=subject.targets, explained_variance=arguments.explained_variance, r=rank)
    return get_peft_model(model, config)


def initialization(
    accumulate: str, model: PeftModel, subject: Subject, batches: list[Any], arguments: argparse.Namespace
) -> None:
    statistic = Sketch.of_size(arguments.sketch_size) if accumulate == "sketch" else GradientSum
    initialize_semu_weights(model, batches, subject.loss, statistic=statistic, progress=False)


def extraction(accumulate: str) -> Callable[..., None]:
    def run(model: nn.Module, subject: Subject, batches: list[Any], arguments: argparse.Namespace) -> None:
        wrapped = to_initialize(model, subject, arguments)
        initialization(accumulate, wrapped, subject, batches, arguments)
        wrapped.unload()

    return run


def published_extraction(model: nn.Module, subject: Subject, batches: list[Any], arguments: argparse.Namespace) -> None:
    published.extract(model, arguments.names, batches, subject.loss, arguments.explained_variance)
    model.zero_grad()
    model.requires_grad_(False)


def floor_step(model: nn.Module, subject: Subject, batches: list[Any], arguments: argparse.Namespace) -> None:
    """One forward and one input-gradient backward: no adapter on frozen weights can do with less."""
    firsts = (module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Embedding)))
    first = next(firsts, None) or model.get_submodule("x_embedder")  # Flux's is a linear layer
    handle = first.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    try:
        subject.loss(model, batches[0]).backward()
    finally:
        handle.remove()


def adapter(kind: str, rank: int, **settings: Any) -> Callable[[nn.Module, Subject], nn.Module]:
    def wrap(model: nn.Module, subject: Subject) -> nn.Module:
        if kind == "lora":
            return get_peft_model(model, LoraConfig(r=rank, target_modules=subject.targets, **settings))
        return get_peft_model(model, SemuConfig(r=rank, target_modules=subject.targets, init_weights=False))

    return wrap


def step(model: nn.Module, subject: Subject, batch: Any, optimizer: torch.optim.Optimizer) -> None:
    subject.loss(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


EXTRACTIONS: dict[str, Callable[..., None]] = {
    "floor pass": floor_pass,
    "exact": extraction("exact"),
    "sketch": extraction("sketch"),
    "published": published_extraction,
}


# ---- time ----


def time_extractions(subject: Subject, arguments: argparse.Namespace) -> dict[str, float]:
    batches = batches_of(subject, arguments.batches)
    best: dict[str, float] = {}
    for turn in range(arguments.rounds):
        for name, run in EXTRACTIONS.items():
            if turn and name == "published":
                continue  # minutes of decompositions, which one turn measures well enough
            model = built(subject, arguments.dtype)
            taken = seconds(partial(run, model, subject, batches, arguments))
            best[name] = min(best.get(name, taken), taken)
            print(f"  {name}: {taken:.2f} s", flush=True)
            del model
    return best | time_lora_ga(subject, arguments) | time_eva(subject, arguments)


def time_steps(subject: Subject, arguments: argparse.Namespace) -> dict[str, float]:
    (batch,) = batches_of(subject, 1)
    model = built(subject, arguments.dtype)
    best: dict[str, float] = {}
    for _ in range(arguments.rounds):
        for name in ["floor step", *(f"{kind} {rank}" for rank in RANKS for kind in ("lora", "semu"))]:
            turns = range(1 + arguments.steps)
            if name == "floor step":
                times = [seconds(partial(floor_step, model, subject, [batch], arguments)) for _ in turns]
            else:
                kind, rank = name.split()
                wrapped = adapter(kind, int(rank))(model, subject)
                optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad])
                times = [seconds(partial(step, wrapped, subject, batch, optimizer)) for _ in turns]
                model = wrapped.unload().requires_grad_(False)
            best[name] = min(best.get(name, times[1]), *times[1:])
            print(f"  {name}: {best[name]:.3f} s", flush=True)
    return best


def time_factorising(subject: Subject, arguments: argparse.Namespace) -> dict[str, float]:
    """The part of an exact extraction that comes after the pass over the data."""
    model = built(subject, arguments.dtype)
    batches = batches_of(subject, arguments.batches)
    gathered = gather(model, batches, subject.loss, targets=arguments.names, progress=False)

    layers: dict[Any, list[torch.Tensor]] = {}
    for gradient in gathered.values():
        layers.setdefault(gradient.shape, []).append(gradient.total)
    # Side by side as an initialisation takes them: one by one on a CPU, where caches are small.
    step = 1 if DEVICE.type == "cpu" else 4

    def run() -> None:
        for alike in layers.values():
            for start in range(0, len(alike), step):
                leading_factors_of_each(alike[start : start + step], arguments.explained_variance)

    return {"seconds": seconds(run)}


def time_lora_ga(subject: Subject, arguments: argparse.Namespace) -> dict[str, float]:
    """LoRA-GA's initialisation from gradients over the same batches, at rank 16."""
    batches = batches_of(subject, arguments.batches)
    model = built(subject, arguments.dtype).requires_grad_(True)
    config = LoraConfig(
        r=16, target_modules=subject.targets, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
    )

    def train_step() -> None:
        for batch in batches:
            subject.loss(model, batch).backward()

    def run() -> None:
        preprocess_loraga(model, config, train_step)
        get_peft_model(model, config)

    return {"LoRA-GA": seconds(run)}


class PassDone(Exception):
    """One pass over the batches is over."""


def time_eva(subject: Subject, arguments: argparse.Namespace) -> dict[str, float]:
    """One pass of LoRA's EVA initialisation over the same batches, at rank 16, whether or not it has converged then.

    It looks at layer inputs only, so it needs no backward pass; its principal components are those of linear layers.
    """
    batches = batches_of(subject, arguments.batches)
    model = built(subject, arguments.dtype)
    linear = [name for name in arguments.names if isinstance(model.get_submodule(name), nn.Linear)]
    config = LoraConfig(r=16, target_modules=linear, init_lora_weights="eva", eva_config=EvaConfig())
    model = get_peft_model(model, config, low_cpu_mem_usage=True)
    # One forward pass more than batches: by the first it finds out which layers have the same inputs.
    passes = iter(range(1 + len(batches)))

    @torch.no_grad()
    def forward(model: nn.Module, batch: Any) -> None:
        if next(passes, None) is None:
            raise PassDone
        subject.loss(model, batch)

    def run() -> None:
        with contextlib.suppress(PassDone):
            initialize_lora_eva_weights(
                model, batches, forward_fn=forward, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None,
                show_progress_bar=False,
            )  # fmt: skip

    return {"EVA": seconds(run)}


# ---- memory ----


def peak_memory(subject: Subject, variant: str, arguments: argparse.Namespace) -> tuple[float, float]:
    """Peak in MiB of one variant, run here and now, in all and beyond the loaded model."""
    before = _resident()
    model = built(subject, arguments.dtype)
    loaded = _resident()
    if variant in EXTRACTIONS:
        EXTRACTIONS[variant](model, subject, batches_of(subject, 2), arguments)
    elif variant == "floor step":
        floor_step(model, subject, batches_of(subject, 1), arguments)
    else:
        kind, rank = variant.split()
        wrapped = adapter(kind, int(rank))(model, subject)
        optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad])
        for batch in batches_of(subject, 2):
            step(wrapped, subject, batch, optimizer)
    if DEVICE.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return peak - before, peak - loaded


def _resident() -> float:
    if DEVICE.type == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure_memory(subject: Subject, arguments: argparse.Namespace) -> dict[str, tuple[float, float]]:
    variants = [*EXTRACTIONS, "floor step", *(f"{kind} {rank}" for rank in RANKS for kind in ("lora", "semu"))]
    found = {}
    for variant in variants:
        command = [
            sys.executable, __file__, "--subject", arguments.subject, "--memory-of", variant,
            "--explained-variance", str(arguments.explained_variance), "--sketch-size", str(arguments.sketch_size),
            "--dtype", str(arguments.dtype).removeprefix("torch."),
        ]  # fmt: skip
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[variant] = tuple(json.loads(output.splitlines()[-1]))
        print(f"  {variant}: {found[variant][0]:.0f} MiB, {found[variant][1]:.0f} beyond the model", flush=True)
    return found


# ---- quality ----


def captured_energy(subject: Subject, arguments: argparse.Namespace) -> dict[str, float]:
    """How good the directions are: those of exact sums beside full decompositions, those of sketches beside them."""
    batches = batches_of(subject, arguments.batches)
    model = get_peft_model(
        built(subject, arguments.dtype),
        SemuConfig(target_modules=subject.targets, explained_variance=arguments.explained_variance),
    )
    exact = initialize_semu_weights(model, batches, subject.loss, progress=False)
    energy = sum(float(layer.singular_values[: layer.rank].double().square().sum()) for layer in exact.layers.values())
    sketched = initialize_semu_weights(
        model, batches, subject.loss, statistic=Sketch.of_size(arguments.sketch_size), keep_explained_variance=1.0,
        progress=False,
    )  # fmt: skip
    gathered = gather(model, batches, subject.loss, progress=False, adapter_name="default")
    caught = 0.0
    rank_ratios, energy_ratios = [], []
    for name, gradient in gathered.items():
        matrix = gradient.total
        squares = squared_singular_values(matrix).cumsum(0)
        smallest = int((squares < arguments.explained_variance * squares[-1]).sum()) + 1
        rank_ratios.append(exact.ranks[name] / smallest)
        directions = exact.layers[name].directions.leading(exact.ranks[name])
        energy_ratios.append(energy_between(directions, matrix) / float(squares[exact.ranks[name] - 1]))
        caught += energy_between(sketched.layers[name].directions.leading(exact.ranks[name]), matrix)
    ranks = sorted(exact.ranks.values())
    return {
        "captured": caught / energy,
        "median rank": ranks[len(ranks) // 2],
        "largest rank": ranks[-1],
        "layers sketched": sum(layer.estimated for layer in sketched.layers.values()),
        "layers": len(ranks),
        "exact rank over the smallest, mean": sum(rank_ratios) / len(rank_ratios),
        "exact rank over the smallest, largest": max(rank_ratios),
        "energy of exact directions over the best, least": min(energy_ratios),
    }


def squared_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """All of them, descending, in float64."""
    short = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).double()
    return torch.linalg.eigvalsh(short @ short.T).flip(0).clamp_min(0)


def energy_between(directions: SingularFactors, matrix: torch.Tensor) -> float:
    """`‖Uᵀ G V‖²`."""
    return float((directions.left.to(matrix).T @ matrix @ directions.right.to(matrix)).double().square().sum())


def import_overhead(subject: Subject, arguments: argparse.Namespace) -> dict[str, float]:
    """What `import semu_peft` takes after `import peft`, the median of five fresh processes, from compiled bytecode."""
    code = (
        "import time, peft; started = time.process_time(); import semu_peft; "
        "print(1000 * (time.process_time() - started))"
    )
    caching = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", code]
    times = [
        float(subprocess.run(command, check=True, capture_output=True, text=True, env=caching).stdout) for _ in range(6)
    ]
    return {"milliseconds": sorted(times[1:])[2]}  # the first one compiles


# ---- the table ----


def ratios(
    memory: dict[str, tuple[float, float]],
    steps: dict[str, float],
    times: dict[str, float],
    quality: dict[str, float],
    imports: dict[str, float],
) -> list[str]:
    def row(figure: str, value: float, goal: str) -> str:
        return f"| {figure} | {value:.2f} | {goal} |"

    def total(variant: str) -> float:
        return memory[variant][0]

    rows = ["| figure | measured | goal |", "| --- | --- | --- |"]
    for kind in ("exact", "sketch"):
        rows.append(row(f"extraction time / floor pass, {kind}", times[kind] / times["floor pass"], "≤ 1.15"))
    rows += [
        row("published method's time / extraction time, exact", times["published"] / times["exact"], "≥ 5"),
        row("published method's time / extraction time, sketch", times["published"] / times["sketch"], "≥ 5"),
        row("extraction's peak memory (sketch) / LoRA step, rank 16", total("sketch") / total("lora 16"), "≤ 1.0"),
        row("extraction's peak memory (exact) / published", total("exact") / total("published"), "≤ 1/3"),
        row("extraction's peak memory (sketch) / published", total("sketch") / total("published"), "≤ 1/3"),
    ]
    for rank, goal in zip(RANKS, ("≤ 1.0", "≤ 0.95"), strict=True):
        rows.append(row(f"step time / LoRA step, rank {rank}", steps[f"semu {rank}"] / steps[f"lora {rank}"], goal))
    for rank in RANKS:
        rows.append(
            row(f"step's peak memory / LoRA step, rank {rank}", total(f"semu {rank}") / total(f"lora {rank}"), "≤ 0.9")
        )
        beyond = memory[f"semu {rank}"][1] / memory[f"lora {rank}"][1]
        rows.append(row(f"the same, beyond the model's weights, rank {rank}", beyond, ""))
    rows.append(row("step time / floor step, rank 16", steps["semu 16"] / steps["floor step"], "≤ 1.10"))
    rows.append(row("`import semu_peft` over `import peft`, ms", imports["milliseconds"], "≤ 50"))
    rows.append(row("sketch's captured energy / exact, at the exact rank", quality["captured"], "≥ 0.98"))
    rows.append(row("extraction time (exact) / LoRA-GA's", times["exact"] / times["LoRA-GA"], ""))
    rows.append(row("extraction time (exact) / one pass of EVA's", times["exact"] / times["EVA"], ""))
    return rows


PARTS: dict[str, Callable[[Subject, argparse.Namespace], dict[str, Any]]] = {
    "memory": measure_memory,
    "steps": time_steps,
    "extraction": time_extractions,
    "factorising": time_factorising,
    "quality": captured_energy,
    "import": import_overhead,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", choices=list(SUBJECTS), required=True)
    parser.add_argument("--batches", type=int, default=8, help="forget batches of an extraction")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each variant")
    parser.add_argument("--steps", type=int, default=3, help="training steps a turn, after one to warm up")
    parser.add_argument("--sketch-size", type=int, default=192)
    parser.add_argument("--explained-variance", type=float, default=0.9)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the result file")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="measure these alone")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    subject = SUBJECTS[arguments.subject]()
    with torch.device("meta"):
        arguments.names = target_names(subject.build(), subject)
    if arguments.memory_of:
        print(json.dumps(peak_memory(subject, arguments.memory_of, arguments)))
        return
    path = arguments.output / f"engine_{arguments.subject}.json"
    document = {}
    if path.exists():
        earlier = json.loads(path.read_text())
        document = {part: earlier[part] for part in PARTS if part in earlier and part not in arguments.parts}
    for part in arguments.parts:
        print(part, flush=True)
        document[part] = PARTS[part](subject, arguments) | {"measured by": provenance()}
        write(document, path)
    missing = [part for part in PARTS if part not in document]
    if missing:
        print(f"Not measured yet: {', '.join(missing)}")
        return
    document["table"] = ratios(*(document[part] for part in ("memory", "steps", "extraction", "quality", "import")))
    write(document, path)
    print(*document["table"], f"Written to {path}", sep="\n")


def provenance() -> dict[str, str]:
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU"
    return {
        "command": " ".join(["python benchmarks/engine/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": torch.cuda.get_device_name() if DEVICE.type == "cuda" else cpu,
        "versions": f"torch {torch.__version__}, peft {peft.__version__}, python {platform.python_version()}",
    }


def write(document: dict[str, Any], path: Path) -> None:
    with written_whole(path) as file:
        file.write_text(json.dumps(document, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
