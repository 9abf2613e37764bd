"""What a natural-gradient step costs beside one of AdamW, on the cores of a real architecture with random weights.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py --subject vit-b16

Both train the same cores on the same batches with the same objective, through `unlearn`. Times are processor time a
step, without the first ones; the ratio is what counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from semu_peft import Callback, NaturalGradient, SemuConfig, initialize_semu_weights, unlearn
from semu_peft.objectives import ConditionMatching, DecoupledDistillation, NoiseSchedule, Objective

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


class Clock(Callback):
    """The processor time at the end of each batch, with the steps taken until then."""

    def __init__(self) -> None:
        self.ends: list[tuple[int, float]] = []

    def on_step_end(self, context: Any) -> None:
        self.ends.append((context.progress.step, time.process_time()))

    def seconds_a_step(self) -> float:
        (first, started), (last, ended) = self.ends[0], self.ends[-1]
        return (ended - started) / (last - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", choices=list(SUBJECTS), default="vit-b16")
    parser.add_argument("--steps", type=int, default=12, help="steps of each optimiser (default: 12)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, batches, objective, targets = SUBJECTS[arguments.subject]()
    model = get_peft_model(model.eval(), SemuConfig(target_modules=targets, explained_variance=0.9, r=16))
    initialize_semu_weights(model, batches, objective, progress=False)
    start = {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}
    optimizers: dict[str, dict[str, Any]] = {
        "AdamW": {"learning_rate": 1e-4, "epochs": arguments.steps},
        # So tolerant of nothing that it does not stop before the steps are done.
        "natural gradient": {"optimizer": NaturalGradient(tolerance=1e-9, patience=10**6)},
    }
    seconds = {}
    for name, options in optimizers.items():
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key in start:
                    parameter.copy_(start[key])
        clock = Clock()
        result = unlearn(
            model, batches, objective, max_steps=arguments.steps, callbacks=clock, progress=False, **options
        )
        seconds[name] = clock.seconds_a_step()
        print(f"{name}: {seconds[name]:.2f} s a step, {result.trainable_parameters} numbers", flush=True)
    print(f"natural gradient / AdamW: {seconds['natural gradient'] / seconds['AdamW']:.2f}")


if __name__ == "__main__":
    main()
