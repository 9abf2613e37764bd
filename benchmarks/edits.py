"""Forgetting without training on the demo's model: SLUG, and SSD of all weights or of the last block and the head.

What is left of the forgotten class (FA) and of the others (RA), on training and on test images, and the processor
seconds of a whole call, with its passes over the data. `make demo` trains the model first:

    OMP_NUM_THREADS=1 python benchmarks/edits.py --model runs/forget_class/original

Results go to `benchmarks/results/edits.json`.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parent / "zoo"))

from image_data import PreparedImages, image_preparation, match_classes, read_image, read_images
from results import write

from semu_peft import methods
from semu_peft.evaluation import evaluate_forgetting, predict

RESULT = Path(__file__).parent / "results" / "edits.json"
FORGOTTEN = 3  # the demo's digit
Batches = Mapping[str, list[Any]]


def last_block(model: nn.Module) -> list[str]:
    """The last transformer block, the norm behind it and the head."""
    layers: Any = model.get_submodule("vit.layers")
    return [f"vit.layers.{len(layers) - 1}", "vit.layernorm", "classifier"]


def scored(batches: Batches) -> Callable[[nn.Module], float]:
    """How much is kept less how much is known of what is to go."""

    def score(candidate: nn.Module) -> float:
        kept, gone = (predict(candidate, batches[part], progress=False).accuracy for part in ("retain", "forget"))
        return kept - gone

    return score


def slug(model: nn.Module, batches: Batches) -> nn.Module:
    methods.slug(model, batches["forget"], batches["retain"], score=scored(batches), progress=False)
    return model


def ssd(threshold: float | None, lower: float, *, last: bool) -> Callable[[nn.Module, Batches], nn.Module]:
    def edited(model: nn.Module, batches: Batches) -> nn.Module:
        edit = methods.ssd(
            model, batches["forget"], batches["retain"], threshold=threshold, lower=lower,
            score=scored(batches) if threshold is None else None, targets=last_block(model) if last else None,
            progress=False,
        )  # fmt: skip
        edit.apply(model, undoable=False)
        return model

    return edited


def edits() -> dict[str, Callable[[nn.Module, Batches], nn.Module]]:
    """By name: SSD with several thresholds and one that is searched, with its λ as in the paper and with 0."""
    made: dict[str, Callable[[nn.Module, Batches], nn.Module]] = {"SLUG": slug}
    for last, where in ((False, "all weights"), (True, "last block and head")):
        for lower in (1.0, 0.0):
            for threshold in (2.0, 3.0, 4.0, 5.0, None):
                how = "α searched" if threshold is None else f"α {threshold:g}"
                made[f"SSD of {where}, {how}, λ {lower:g}"] = ssd(threshold, lower, last=last)
    return made


def batches_of(model: Any) -> Batches:
    """The demo's images as it splits them."""
    train, test, names = read_images(None, 0)
    classes, _ = match_classes(names, model)
    prepare = image_preparation(model, read_image(train, 0))
    found = {}
    for rows, kinds in ((train, ("forget", "retain")), (test, ("forgotten_test", "test"))):
        images = PreparedImages(rows, torch.tensor(classes)[torch.tensor(rows["label"])], prepare)
        chosen = images.labels == FORGOTTEN
        for kind, part in zip(kinds, (images.where(chosen), images.where(~chosen)), strict=True):
            found[kind] = list(DataLoader(part, 64))
    return found


def measured(model: nn.Module, batches: Batches) -> dict[str, float]:
    found = evaluate_forgetting(model, **batches, progress=False)  # type: ignore[arg-type]
    return {
        "FA": round(100 - found.unlearning_accuracy, 2), "RA": round(found.retain_accuracy, 2),
        "TA": round(found.test_accuracy or 0.0, 2), "forgotten, test": round(found.forgotten_test_accuracy or 0.0, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the demo's folder `original`")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    if not args.model.is_dir():
        parser.error(f"there is no folder {args.model}: `make demo` writes it")
    disable_progress_bar()
    datasets.disable_progress_bars()
    original = AutoModelForImageClassification.from_pretrained(args.model).eval()
    batches = batches_of(original)
    rows: dict[str, dict[str, float]] = {"original": measured(original, batches)}
    for name, edit in edits().items():
        started = time.process_time()
        model = edit(copy.deepcopy(original), batches)
        seconds = time.process_time() - started
        rows[name] = {**measured(model, batches), "seconds": round(seconds, 1)}
        print(name, rows[name], flush=True)
    machine = f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    write(args.output, {"machine": machine, "torch": torch.__version__, "rows": rows})
    print(f"Written to {args.output}")


if __name__ == "__main__":
    main()
