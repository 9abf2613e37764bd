"""Rules that take gradients of their own, on as many processes as this is launched with; writes the trained cores."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from models import vector_batches
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset
from training_runs import QUIET, semu, trained_state

from semu_peft import Retain, RetainSafe, Rule, unlearn
from semu_peft.objectives import CrossEntropy, UniformDistribution
from semu_peft.training.rules import PrivateGradient, SharpnessAware, gradients_of_parameters, top_fraction


def loader(processes: int, seed: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Sixteen examples in batches of eight, which the processes share."""
    x, y = (torch.cat(part) for part in zip(*vector_batches(2, seed=seed), strict=True))
    return DataLoader(TensorDataset(x[:16], y[:16]), batch_size=8 // processes, shuffle=False)


def run(accelerator: Accelerator, rule: Rule, **options: float) -> dict[str, torch.Tensor]:
    processes = accelerator.num_processes
    model, keep = semu(explained_variance=0.999), Retain(loader(processes, 4), CrossEntropy(), weight=0)
    unlearn(
        model, loader(processes, 0), UniformDistribution(), retain=keep, rules=rule, max_steps=4,
        accelerator=accelerator, **options, **QUIET,
    )  # fmt: skip
    return trained_state(model)


def salient(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Every process's mask, which must be the same for them to train the same entries."""
    model = semu(explained_variance=0.999)
    mine = accelerator.prepare(loader(accelerator.num_processes, 0))
    found = gradients_of_parameters(model, mine, CrossEntropy(), progress=False)
    masks = top_fraction({name: gradient.abs() for name, gradient in found.items()}, 0.3)
    return {name: mask.float() for name, mask in masks.items()}


def main(folder: str) -> None:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    runs = {
        "salient": salient(accelerator),
        "safe": run(accelerator, RetainSafe(memory=1), learning_rate=1e-2),
        "sharp": run(accelerator, SharpnessAware(0.1), learning_rate=1e-2),
        "private": run(accelerator, PrivateGradient(1.0, 0.5), learning_rate=1e-2),
        "safe, natural": run(accelerator, RetainSafe(memory=1)),
        "sharp, natural": run(accelerator, SharpnessAware(0.1)),
    }
    cores = {f"{name}: {key}": value for name, state in runs.items() for key, value in state.items()}
    save_file(cores, f"{folder}/{accelerator.num_processes}-{accelerator.process_index}.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
