"""One class of scikit-learn's digits, forgotten in many carriers by one objective: what the place of the change costs.

    OMP_NUM_THREADS=1 python benchmarks/carriers.py

Struck-out distillation without retain data, 100 steps of AdamW for every carrier, at the rate that is best by UA + RA
on class 0 with seed 0; the table is of class 3 with seeds 0 to 2. SEMU stands there with the same AdamW as the others,
and by natural gradients as it comes. Random orthonormal bases and those of the weight (LoRA-XS) have SEMU's core.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import get_peft_model
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "requests"))
from subjects import SUBJECTS, Data, train

from semu_peft import SemuConfig, initialize_semu_weights, unlearn
from semu_peft.evaluation import predict
from semu_peft.files import written_whole
from semu_peft.objectives import DecoupledDistillation
from semu_peft.tuner.adapted import semu_layers

LAYERS, STEPS = ["0", "2", "4"], 100
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
FURTHEST = (1e-4, 1.0)
TUNED_ON, SHOWN, SEEDS = 0, 3, (0, 1, 2)
SUBJECT = SUBJECTS["digits, MLP"]


@dataclass(frozen=True)
class Carrier:
    """A name, what makes it of a model and forget batches, and whether it is trained as it comes, without a rate."""

    name: str
    attach: Callable[[nn.Module, Any], nn.Module]
    takes_rate: bool = True
    optimizer: Callable[[float], Any] | None = None


def method(config: str, **options: Any) -> Callable[[nn.Module, Any], nn.Module]:
    """A method of PEFT on all layers."""
    return lambda model, forget: get_peft_model(model, getattr(peft, config)(target_modules=LAYERS, **options))


def semu(**options: Any) -> Callable[[nn.Module, Any], nn.Module]:
    def attach(model: nn.Module, forget: Any) -> nn.Module:
        adapted = get_peft_model(model, SemuConfig(target_modules=LAYERS, **options))
        if options.get("init_weights", True) is True:
            initialize_semu_weights(adapted, forget, DecoupledDistillation(), progress=False)
        for layer in semu_layers(adapted).values():
            layer.semu_core["default"].data.zero_()
        return adapted

    return attach


def galore(rate: float) -> Any:
    from galore_torch import GaLoreAdamW

    def make(named_parameters: Any) -> torch.optim.Optimizer:
        matrices = [parameter for _, parameter in named_parameters if parameter.dim() == 2]
        others = [parameter for _, parameter in named_parameters if parameter.dim() != 2]
        projected = {"params": matrices, "rank": 4, "update_proj_gap": 50, "scale": 1.0, "proj_type": "std"}
        return GaLoreAdamW([projected, {"params": others}], lr=rate, no_deprecation_warning=True)

    return make


CARRIERS = (
    Carrier("SEMU, γ = 0.9, natural gradients", semu(explained_variance=0.9), takes_rate=False),
    Carrier("SEMU, rank 4, natural gradients", semu(explained_variance=1.0, r=4), takes_rate=False),
    Carrier("SEMU, γ = 1, natural gradients", semu(explained_variance=1.0), takes_rate=False),
    Carrier("SEMU, γ = 0.9", semu(explained_variance=0.9)),
    Carrier("SEMU, rank 4", semu(explained_variance=1.0, r=4)),
    Carrier("bases of the weight (LoRA-XS), rank 4", semu(init_weights="weight", r=4)),
    Carrier("random orthonormal bases, rank 4", semu(init_weights=False, r=4)),
    Carrier("bases of the weight (LoRA-XS), rank 16", semu(init_weights="weight", r=16)),
    Carrier("random orthonormal bases, rank 16", semu(init_weights=False, r=16)),
    Carrier("LoRA, rank 4", method("LoraConfig", r=4, lora_alpha=4)),
    Carrier("DoRA, rank 4", method("LoraConfig", r=4, lora_alpha=4, use_dora=True)),
    Carrier("PiSSA, rank 4", method("LoraConfig", r=4, lora_alpha=4, init_lora_weights="pissa")),
    Carrier("RandLoRA, rank 4", method("RandLoraConfig", r=4)),
    Carrier("VeRA, rank 64", method("VeraConfig", r=64)),
    Carrier("OSF", method("OSFConfig")),
    Carrier("OFT, blocks of 2", method("OFTConfig", oft_block_size=2)),
    Carrier("whole weights", lambda model, forget: model),
    Carrier("whole weights by GaLore, rank 4", lambda model, forget: model, optimizer=galore),
)


def forget_in(carrier: Carrier, original: nn.Module, data: Data, label: int, rate: float | None) -> dict[str, Any]:
    own, own_test = (data.labels[part] == label for part in (data.train, data.test))
    forget = list(data.loader(data.train[own]))
    torch.manual_seed(0)
    model = carrier.attach(copy.deepcopy(original), forget)
    objective = DecoupledDistillation(reference=original)
    settings: dict[str, Any] = {}
    if rate is not None and carrier.optimizer is not None:
        settings = {"optimizer": carrier.optimizer(rate), "max_steps": STEPS, "epochs": STEPS}
    elif rate is not None:
        settings = {"learning_rate": rate, "max_steps": STEPS, "epochs": STEPS}
    result = unlearn(model, forget, objective, progress=False, **settings)

    def accuracy(chosen: torch.Tensor) -> float:
        return predict(model, data.loader(chosen), progress=False).accuracy

    return {
        "UA": 100 - accuracy(data.train[own]), "RA": accuracy(data.train[~own]), "TA": accuracy(data.test[~own_test]),
        "trained": result.trainable_parameters, "seconds": result.seconds, "steps": result.steps,
    }  # fmt: skip


def best_rate(carrier: Carrier, original: nn.Module, data: Data) -> float | None:
    """The rate with the highest UA + RA on the class that the table does not show; the search goes on past an end."""
    if not carrier.takes_rate:
        return None

    def score(rate: float) -> float:
        found = forget_in(carrier, original, data, TUNED_ON, rate)
        return found["UA"] + found["RA"]

    scores = {rate: score(rate) for rate in RATES}
    for end, factor in ((min(RATES), 0.3), (max(RATES), 3.0)):
        while max(scores, key=lambda rate: scores[rate]) == end and FURTHEST[0] < end < FURTHEST[1]:
            end = float(f"{end * factor:.0e}")
            scores[end] = score(end)
    return max(scores, key=lambda rate: scores[rate])


def measure(only: list[str]) -> list[dict[str, Any]]:
    cases = []
    for seed in SEEDS:
        data = SUBJECT.read(seed)
        cases.append((data, train(SUBJECT.build, data, data.train, seed)))
    rows = []
    for carrier in CARRIERS:
        if only and carrier.name not in only:
            continue
        rate = best_rate(carrier, cases[0][1], cases[0][0])
        for seed, (data, original) in zip(SEEDS, cases, strict=True):
            rows.append(
                {"carrier": carrier.name, "rate": rate, "seed": seed, **forget_in(carrier, original, data, SHOWN, rate)}
            )
        print(rows[-1], flush=True)
    for seed, (data, original) in zip(SEEDS, cases, strict=True):
        rows.append({"carrier": "nothing is done", "rate": None, "seed": seed, **before(original, data)})
    return rows


def before(original: nn.Module, data: Data) -> dict[str, Any]:
    own, own_test = (data.labels[part] == SHOWN for part in (data.train, data.test))
    parts = {"UA": data.train[own], "RA": data.train[~own], "TA": data.test[~own_test]}
    found = {name: predict(original, data.loader(part), progress=False).accuracy for name, part in parts.items()}
    return {**found, "UA": 100 - found["UA"], "trained": 0, "seconds": 0.0, "steps": 0}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line a carrier, sorted by UA + TA."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["carrier"], []).append(row)

    def mean(name: str, key: str) -> float:
        return statistics.mean(row[key] for row in groups[name])

    lines = ["| carrier | rate | UA | RA | TA, mean and worst | trained | seconds |", "| --- " * 7 + "|"]
    for name in sorted(groups, key=lambda name: -mean(name, "UA") - mean(name, "TA")):
        rate, worst = groups[name][0]["rate"], min(row["TA"] for row in groups[name])
        lines.append(
            f"| {name} | {'–' if rate is None else f'{rate:g}'} | {mean(name, 'UA'):.1f} | {mean(name, 'RA'):.1f} | "
            f"{mean(name, 'TA'):.1f}, {worst:.1f} | {mean(name, 'trained'):,.0f} | {mean(name, 'seconds'):.1f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/carriers.json"), help="the result file")
    parser.add_argument("--only", nargs="+", default=[], help="measure these carriers anew, and keep the other rows")
    arguments = parser.parse_args()
    rows = measure(arguments.only)
    if arguments.only:
        anew = {row["carrier"] for row in rows}
        earlier = json.loads(arguments.output.read_text(encoding="utf-8"))["rows"]
        rows = [row for row in earlier if row["carrier"] not in anew] + rows
    document = {
        "measured by": {
            "command": "python benchmarks/carriers.py",
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU",
            "versions": f"torch {torch.__version__}, peft {peft.__version__}, python {platform.python_version()}",
        },
        "table": table(rows),
        "rows": rows,
    }
    with written_whole(arguments.output) as file:
        file.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")
    print(*document["table"], sep="\n")


if __name__ == "__main__":
    main()
