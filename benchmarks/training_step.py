"""What a natural-gradient step costs beside one of AdamW, on the cores of a real architecture with random weights.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py --subject vit-b16

Both train the same cores on the same batches with the same objective, through `unlearn`, by turns. Times are of a step,
without the first ones, of the faster of two turns: processor time, or on a GPU that of the wall; the ratio is what
counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from semu_peft import Callback, NaturalGradient, SemuConfig, initialize_semu_weights, unlearn
from semu_peft.files import written_whole
from semu_peft.objectives import ConditionMatching, DecoupledDistillation, NoiseSchedule, Objective

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GOAL = 1.5  # times a step of AdamW
Subject = tuple[nn.Module, list[Any], Objective, str]


def vit() -> Subject:
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(num_labels=10))
    batches = [{"pixel_values": torch.randn(8, 3, 224, 224), "labels": torch.randint(10, (8,))} for _ in range(2)]
    return model, batches, DecoupledDistillation(), r".*layers?\.\d+\.(attention\.\w+|mlp\.fc[12]|.*\.dense)"


def unet() -> Subject:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(cross_attention_dim=768, sample_size=32)
    alphas = torch.linspace(0.999, 0.01, 1000)
    schedule = NoiseSchedule(alphas.sqrt(), (1 - alphas).sqrt(), torch.arange(1000))
    batches = [
        {
            "latents": torch.randn(2, 4, 32, 32),
            "condition": {"encoder_hidden_states": torch.randn(2, 77, 768)},
            "anchor": {"encoder_hidden_states": torch.randn(2, 77, 768)},
        }
        for _ in range(2)
    ]
    return model, batches, ConditionMatching(schedule), r".*attn2\.to_[kv]"


SUBJECTS: dict[str, Callable[[], Subject]] = {"vit-b16": vit, "sd15-unet": unet}


def now() -> float:
    """Seconds: of the processor, or on a GPU of the wall, when all that was asked of it is done."""
    if DEVICE.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Clock(Callback):
    """The time at the end of each batch, with the steps taken until then."""

    def __init__(self) -> None:
        self.ends: list[tuple[int, float]] = []

    def on_step_end(self, context: Any) -> None:
        self.ends.append((context.progress.step, now()))

    def seconds_a_step(self) -> float:
        (first, started), (last, ended) = self.ends[0], self.ends[-1]
        return (ended - started) / (last - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", choices=list(SUBJECTS), default="vit-b16")
    parser.add_argument("--steps", type=int, default=12, help="steps of each optimiser (default: 12)")
    parser.add_argument("--turns", type=int, default=2, help="turns of each optimiser, the fastest counts (default: 2)")
    parser.add_argument("--refresh", type=int, help="steps between two curvatures (default: the optimiser's)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the result file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with DEVICE:
        model, batches, objective, targets = SUBJECTS[arguments.subject]()
    model = get_peft_model(model.eval(), SemuConfig(target_modules=targets, explained_variance=0.9, r=16))
    initialize_semu_weights(model, batches, objective, progress=False)
    start = {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}
    optimizers: dict[str, dict[str, Any]] = {
        "AdamW": {"learning_rate": 1e-4, "epochs": arguments.steps},
        # So tolerant of nothing that it does not stop before the steps are done.
        "natural gradient": {"optimizer": NaturalGradient(tolerance=1e-9, patience=10**6, refresh=arguments.refresh)},
    }
    seconds: dict[str, float] = {}
    for name, options in list(optimizers.items()) * arguments.turns:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key in start:
                    parameter.copy_(start[key])
        clock = Clock()
        result = unlearn(
            model, batches, objective, max_steps=arguments.steps, callbacks=clock, progress=False, **options
        )
        seconds[name] = min(clock.seconds_a_step(), seconds.get(name, float("inf")))
        print(f"{name}: {seconds[name]:.3f} s a step, {result.trainable_parameters} numbers", flush=True)
    ratio = seconds["natural gradient"] / seconds["AdamW"]
    print(f"natural gradient / AdamW: {ratio:.2f} (goal: at most {GOAL})")
    write(arguments, {"seconds a step": seconds, "ratio": ratio, "trained": result.trainable_parameters})


def write(arguments: argparse.Namespace, measured: dict[str, Any]) -> None:
    """Put a subject's figures into the file of results."""
    path = arguments.output / "training_step.json"
    document = json.loads(path.read_text()) if path.exists() else {}
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads, no GPU, processor time"
    row = arguments.subject if arguments.refresh is None else f"{arguments.subject}, refresh {arguments.refresh}"
    document[row] = {
        **measured, "steps": arguments.steps, "turns": arguments.turns, "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if DEVICE.type == "cuda" else cpu,
    }  # fmt: skip
    with written_whole(path) as file:
        file.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
