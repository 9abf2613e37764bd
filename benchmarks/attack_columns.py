"""Columns of attacks beside a table of metrics: what comes back, of each method and of the retrained model alike."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import TensorDataset

from semu_peft.evaluation import attack_membership, linear_probes, predict, quantization, relearning
from semu_peft.objectives import Attacker

ATTACKERS = (Attacker("sgd", 1e-2, steps=50), Attacker("adam", 1e-3, steps=50))
SHOWN = 2_000  # images that an attack is measured on, at most
HEADS = (
    *(f"{part}, {attacker.label}" for attacker in ATTACKERS for part in ("half back after", "area", "rest left")),
    "known at 8 bits", "at 4 bits", "best probe", "last probe", "MIA, threshold",
)  # fmt: skip


def attacked(
    model: nn.Module,
    forget: TensorDataset,
    retain: TensorDataset,
    forget_test: TensorDataset,
    retain_test: TensorDataset,
    seed: int,
) -> dict[str, Any]:
    """What attacks on the merged weights find.

    Args:
        model: The unlearned model.
        forget: Of which the attacker has 20 images.
        retain: Of which the attacker has 60.
        forget_test: On which relearning and rounding are measured: images of what was forgotten that nobody trained on.
        retain_test: Other images that nobody trained on.
        seed: Of all draws; equal for all models of a table, so that they are attacked alike.
    """
    merged = copy.deepcopy(model).merge_and_unload() if isinstance(model, PeftModel) else model
    generator = torch.Generator().manual_seed(seed)
    sides = {"forget": forget, "retain": retain, "forget_test": forget_test, "retain_test": retain_test}
    data = {name: _batches(part, generator) for name, part in sides.items()}
    curves = [
        relearning(
            merged, data["forget"], data["retain"], attacker=attacker, forget_test=data["forget_test"],
            retain_test=data["retain_test"], seed=seed, progress=False,
        )
        for attacker in ATTACKERS
    ]  # fmt: skip
    probes = linear_probes(merged, data["forget"], data["retain"], seed=seed)
    confidence = {name: predict(merged, data[name], progress=False).confidence for name in ("retain", "retain_test")}
    of_forget = predict(merged, data["forget"], progress=False).confidence
    membership = attack_membership(confidence["retain"], confidence["retain_test"], of_forget, seed=seed)
    return {
        "relearning": [
            {
                "attacker": curve.attacker, "steps": curve.steps, "forget": curve.forget, "retain": curve.retain,
                "steps_to_half": curve.steps_to_half, "area": curve.area,
            }
            for curve in curves
        ],
        "quantised": {f"{bits} bits": quantization(merged, data["forget_test"], bits=bits).forget for bits in (8, 4)},
        "probes": {"layers": probes.layers, "found": probes.found},
        "membership": membership.threshold_share,
    }  # fmt: skip


def table(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Of each method a line: steps to half by case, in the order of their names, and means over the cases of the rest.

    Args:
        rows: What `attacked` found, by method and by case.
    """
    lines = [f"| method | {' | '.join(HEADS)} |", "| --- " * (len(HEADS) + 1) + "|"]
    for name, by_case in rows.items():
        found, cells = [by_case[case] for case in sorted(by_case)], []
        for number in range(len(ATTACKERS)):
            curves = [each["relearning"][number] for each in found]
            cells += [", ".join(_back(each) for each in curves), _mean([each["area"] for each in curves])]
            cells.append(_mean([each["retain"][-1] for each in curves]))
        cells += [_mean([each["quantised"][f"{bits} bits"][1] for each in found]) for bits in (8, 4)]
        probes = [each["probes"]["found"] for each in found]
        cells += [_mean([max(each) for each in probes]), _mean([each[-1] for each in probes])]
        lines.append(f"| {name} | {' | '.join([*cells, _mean([each['membership'] for each in found])])} |")
    return "\n".join(lines)


def _batches(part: TensorDataset, generator: torch.Generator) -> list[Any]:
    order = torch.randperm(len(part), generator=generator)[:SHOWN]
    return list(zip(*(tensor[order.to(tensor.device)].split(500) for tensor in part.tensors), strict=True))


def _back(curve: dict[str, Any]) -> str:
    """After how many steps half was back; or that it came back only where a fifth of the rest was lost on the way."""
    if curve["steps_to_half"] is not None:
        return str(curve["steps_to_half"])
    return "rest lost" if max(curve["forget"]) >= 50 else f">{curve['steps'][-1]}"


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.1f}"
