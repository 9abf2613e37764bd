"""Unlearning on as many processes as this is launched with; writes the trained cores for `test_distributed.py`."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from models import llama
from peft import PeftModel
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from semu_peft import unlearn
from semu_peft.tuner.adapted import semu_layers

folder, mode, accumulation, precision = sys.argv[1:]


def next_token_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


torch.manual_seed(0)
model = PeftModel.from_pretrained(llama(), f"{folder}/adapter", is_trainable=True)
tokens = torch.randint(32, (32, 6), generator=torch.Generator().manual_seed(1))
accelerator = Accelerator(
    cpu=True,
    gradient_accumulation_steps=int(accumulation),
    mixed_precision=precision,
    dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
)
if mode == "fsdp2":  # which Accelerate itself knows on accelerators only
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model._is_accelerate_prepared = True  # or it would be wrapped for DDP
assert accelerator.num_processes == (1 if mode == "single" else 2), accelerator.distributed_type
examples = [{"input_ids": row, "labels": row} for row in tokens]
loader = DataLoader(examples, batch_size=8 // accelerator.num_processes, shuffle=False)
result = unlearn(
    model, loader, next_token_loss, epochs=2, learning_rate=3e-2, max_grad_norm=0.05, accelerator=accelerator,
    progress=False,
)  # fmt: skip
cores = {}
for name, layer in semu_layers(model).items():
    core = layer.semu_core["default"].detach()
    assert isinstance(core, DTensor) == (mode == "fsdp2")
    cores[name] = (core.full_tensor() if isinstance(core, DTensor) else core).contiguous()
if accelerator.is_main_process:
    losses = {"losses": torch.tensor([entry["loss"] for entry in result.history])}
    save_file({**cores, **losses}, f"{folder}/{mode}-{accumulation}-{precision}.safetensors")
accelerator.end_training()
