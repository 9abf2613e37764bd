"""Unlearning on as many processes as this is launched with; writes the trained cores for `test_distributed.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DataLoaderConfiguration
from models import llama
from peft import PeftModel
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from semu_peft import NaturalGradient, unlearn
from semu_peft.objectives import CrossEntropy, DecoupledDistillation
from semu_peft.tuner.adapted import semu_layers

BUDGET = 1e-3  # just above the damage where the run begins, so that steps are refused for it
folder, mode, accumulation, precision, clip, optimizer = sys.argv[1:]


def adapted(accelerator: Accelerator) -> torch.nn.Module:
    """The model with the adapter, in shards where the mode says so."""
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(llama(), f"{folder}/adapter", is_trainable=True)
    if mode.startswith("fsdp2"):  # which Accelerate itself knows on accelerators only
        mesh = init_device_mesh("cpu", (accelerator.num_processes,))
        blocks = model.base_model.model.model.layers
        apart = {"fsdp2": blocks, "fsdp2-layers": semu_layers(model).values(), "fsdp2-root": []}[mode]
        for module in [*apart, model]:
            fully_shard(module, mesh=mesh)
        model._is_accelerate_prepared = True  # or it would be wrapped for DDP
        with torch.no_grad():
            model(tokens[:4])  # after which a root keeps what it has gathered
    if mode == "wrapped":  # by its owner
        model = accelerator.prepare(model)
        assert isinstance(model, DistributedDataParallel)
        accelerator._models[:] = [model]
    return model


def next_token_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


tokens = torch.randint(32, (32, 6), generator=torch.Generator().manual_seed(1))
zero = None
if mode.startswith("zero"):
    zero = DeepSpeedPlugin(hf_ds_config=str(Path(__file__).parents[2] / "examples" / "deepspeed" / f"{mode}.json"))
accelerator = Accelerator(
    cpu=zero is None,
    deepspeed_plugin=zero,
    gradient_accumulation_steps=int(accumulation),
    mixed_precision=precision,
    dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, even_batches=optimizer != "uneven"),
)
model = adapted(accelerator)
# DeepSpeed without an accelerator shards the parameters over both processes, and Accelerate gives both all of the data.
shares = 1 if mode == "single" or zero else 2
assert accelerator.num_processes == shares, accelerator.distributed_type
assert mode == "single" or torch.distributed.get_world_size() == 2
examples = [{"input_ids": row, "labels": row} for row in tokens]
number = 12 if optimizer == "uneven" else 32  # of which one process gets two batches and the other one
loader = DataLoader(examples[:number], batch_size=8 // shares, shuffle=False)
common: dict[str, Any] = {
    "epochs": 2,
    "max_grad_norm": float(clip) or None,
    "accelerator": accelerator,
    "progress": False,
}
if optimizer == "uneven":
    try:
        unlearn(model, loader, DecoupledDistillation(), **common)
    except ValueError as refused:
        save_file({"refused": torch.tensor("as many batches" in str(refused))}, f"{folder}/{accelerator.process_index}")
    accelerator.end_training()
    sys.exit()
if optimizer == "fails":

    def failing(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        model(**batch)
        raise RuntimeError("of the objective")

    try:
        unlearn(model, loader, failing, **common)
    except RuntimeError as failed:
        parts = [isinstance(parameter, DTensor) for parameter in model.parameters()]
        save_file({"whole": torch.tensor("of the objective" in str(failed) and all(parts))}, f"{folder}/fails")
    accelerator.end_training()
    sys.exit()
objective: Any = DecoupledDistillation()
if optimizer.startswith("adamw"):
    objective = next_token_loss
    common["learning_rate"] = 3e-2
else:
    common["optimizer"] = NaturalGradient(tolerance=1e-4)
if optimizer == "budget":
    objective = -1.0 * CrossEntropy()
    common["max_retain_kl"] = BUDGET
if optimizer.endswith("resumed"):
    output = f"{folder}/{mode}"
    unlearn(model, loader, objective, output_dir=output, checkpointing_steps=3, **common)
    accelerator.free_memory()  # which holds the model that it was given as prepared
    model = adapted(accelerator)
    common["resume_from_checkpoint"] = f"{output}/checkpoint-3"
result = unlearn(model, loader, objective, **common)
cores = {}
for name, layer in semu_layers(model).items():
    core = layer.semu_core["default"]
    assert isinstance(core, DTensor) == mode.startswith("fsdp2")
    if mode == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters([core]):
            cores[name] = core.detach().clone()
    else:
        core = core.detach()
        cores[name] = (core.full_tensor() if isinstance(core, DTensor) else core).contiguous()
if accelerator.is_main_process:
    losses = {"losses": torch.tensor([entry["loss"] for entry in result.history])}
    save_file({**cores, **losses}, f"{folder}/{mode}-{accumulation}-{precision}.safetensors")
accelerator.end_training()
