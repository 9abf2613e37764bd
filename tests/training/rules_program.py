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

folder = sys.argv[1]
accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
processes = accelerator.num_processes


def loader(seed: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Sixteen examples in batches of eight, which the processes share."""
    x, y = (torch.cat(part) for part in zip(*vector_batches(2, seed=seed), strict=True))
    return DataLoader(TensorDataset(x[:16], y[:16]), batch_size=8 // processes, shuffle=False)


def run(rule: Rule, **options: float) -> dict[str, torch.Tensor]:
    model, keep = semu(explained_variance=0.999), Retain(loader(4), CrossEntropy(), weight=0)
    unlearn(
        model, loader(0), UniformDistribution(), retain=keep, rules=rule, max_steps=4, accelerator=accelerator,
        **options, **QUIET,
    )  # fmt: skip
    return trained_state(model)


def salient() -> dict[str, torch.Tensor]:
    """Every process's mask, which must be the same for them to train the same entries."""
    model, mine = semu(explained_variance=0.999), accelerator.prepare(loader(0))
    found = gradients_of_parameters(model, mine, CrossEntropy(), progress=False)
    masks = top_fraction({name: gradient.abs() for name, gradient in found.items()}, 0.3)
    return {name: mask.float() for name, mask in masks.items()}


runs = {
    "salient": salient(),
    "safe": run(RetainSafe(memory=1), learning_rate=1e-2),
    "sharp": run(SharpnessAware(0.1), learning_rate=1e-2),
    "private": run(PrivateGradient(1.0, 0.5), learning_rate=1e-2),
    "safe, natural": run(RetainSafe(memory=1)),
    "sharp, natural": run(SharpnessAware(0.1)),
}
cores = {f"{name}: {key}": value for name, state in runs.items() for key, value in state.items()}
save_file(cores, f"{folder}/{processes}-{accelerator.process_index}.safetensors")
accelerator.end_training()
