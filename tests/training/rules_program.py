"""Rules that take gradients of their own, on as many processes as this is launched with; writes the trained cores."""

from __future__ import annotations

import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from models import vector_batches
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset
from training_runs import QUIET, semu, trained_state

from semu_peft import Retain, RetainSafe, Rule, unlearn
from semu_peft.gradients.processes import whole
from semu_peft.objectives import CrossEntropy, UniformDistribution
from semu_peft.training.rules import (
    NormCap,
    PrivateGradient,
    RowScale,
    SharpnessAware,
    gradients_of_parameters,
    top_fraction,
)


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


def sharded(accelerator: Accelerator, rule: Rule) -> dict[str, torch.Tensor]:
    """The cores that a rule leaves where each process holds a part of them (FSDP2), or a single one all."""
    processes, model = accelerator.num_processes, semu(explained_variance=0.999)
    if processes > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (processes,)))
        model._is_accelerate_prepared = True  # or it would be wrapped for DDP
    unlearn(
        model, loader(processes, 0), UniformDistribution(), rules=rule, max_steps=4, learning_rate=1e-2,
        accelerator=accelerator, **QUIET,
    )  # fmt: skip
    state = rule.state_dict()
    assert all(type(value) is torch.Tensor for value in state.get("origins", {}).values())  # as it is saved
    return {name: whole(value).contiguous() for name, value in trained_state(model).items()}


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
    runs["sharded, capped"] = sharded(accelerator, NormCap(0.05))
    runs["sharded, sharp"] = sharded(accelerator, SharpnessAware(0.1))
    if accelerator.num_processes > 1:
        for rule in (RetainSafe(), RowScale(2.0)):
            with pytest.raises(ValueError, match=f"`rules`: {type(rule).__name__} reads whole parameters"):
                sharded(accelerator, rule)
    cores = {f"{name}: {key}": value for name, state in runs.items() for key, value in state.items()}
    save_file(cores, f"{folder}/{accelerator.num_processes}-{accelerator.process_index}.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
