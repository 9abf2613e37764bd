"""One of two processes that initialise an adapter together: `python initialize_in_processes.py WRAPPER FOLDER RANK`.

Each brings the batches of its rank and writes the profile that it ends with. With the wrapper `torch` there is no
launcher and no Accelerate: torch alone knows of the processes, as in its own tutorials.
"""

from __future__ import annotations

import faulthandler
import gc
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from semu_peft import SemuConfig, initialize_semu_weights, objectives, unlearn
from semu_peft.gradients import CoreCovariance, GradientSum, Sketch, SquaredSum
from semu_peft.gradients.gather import Gathered, gather
from semu_peft.tuner.adapted import semu_layers

BATCHES = 4
UNGROUPED = ["hidden.0", "hidden.2", "head", "body.0"]
STATISTICS = {"exact": GradientSum, "sketch": Sketch.of_size(8)}


class Network(nn.Module):
    """Linear layers and convolutions, one of them differentiated as a parameter (it has groups)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(12, 12, 3, groups=2), nn.Flatten()
        )
        self.hidden = nn.Sequential(nn.Linear(12 * 16, 96), nn.Tanh(), nn.Linear(96, 30), nn.Tanh())
        self.head = nn.Linear(30, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(self.body(x)))


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 3, 6, 6, generator=draw), torch.randint(4, (5,), generator=draw)) for _ in range(BATCHES)]


def tensors_of(gathered: Gathered) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{index}": tensor
        for name, statistic in gathered.items()
        for index, tensor in enumerate(statistic.tensors())
    }


def config(wrapper: str) -> SemuConfig:
    # FSDP makes the gradient of a sharded parameter its own affair; the grouped convolution needs it.
    targets = UNGROUPED + ([] if wrapper == "fsdp2" else ["body.2"])
    return SemuConfig(target_modules=targets, explained_variance=0.95, orthogonal_to_weight=True)


def main(wrapper: str, folder: Path, rank: int) -> None:
    faulthandler.dump_traceback_later(90, exit=True)  # a process that waits for the other says where
    if wrapper == "torch":
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    else:
        PartialState(cpu=True)
    mine = batches()[rank :: dist.get_world_size()]
    model: nn.Module = network()
    if wrapper == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in (model.body, model.hidden, model):
            fully_shard(part, mesh=mesh)
    model = get_peft_model(model, config(wrapper))
    wrapped = model
    if wrapper == "ddp":
        model.get_base_model().head.base_layer.bias.requires_grad_(True)  # DDP wants something to train
        wrapped = DistributedDataParallel(model)
    for kind, statistic in STATISTICS.items():
        profile = initialize_semu_weights(wrapped, mine, objectives.CrossEntropy(), statistic=statistic, progress=False)
        profile.save(folder / f"{kind}-{rank}.safetensors")
        bases = {n: layer.semu_U["default"] for n, layer in semu_layers(model).items()}
        assert all(torch.equal(profile.layers[n].directions.left, basis) for n, basis in bases.items())
    for kind, statistic in (("fisher", SquaredSum), ("covariance", CoreCovariance.of_adapter(model))):
        gathered = gather(
            wrapped, mine, objectives.CrossEntropy(), targets=UNGROUPED, statistic=statistic, progress=False,
            adapter_name="default",
        )  # fmt: skip
        assert (gathered.batches, gathered.examples) == (BATCHES, 5 * BATCHES)
        save_file(tensors_of(gathered), folder / f"{kind}-{rank}.safetensors")
    if wrapper == "torch":
        unlearn_together(model, mine)
    del wrapped  # DDP's own clean-up needs the process group
    gc.collect()
    dist.destroy_process_group()


def unlearn_together(model: nn.Module, mine: list[Any]) -> None:
    """Refused where each process would train a core of its own; in DDP's wrapper both end with the same."""
    try:
        unlearn(model, mine, objectives.CrossEntropy(), epochs=1, progress=False)
    except ValueError as error:
        assert "DistributedDataParallel" in str(error) and "2 processes" in str(error)
    else:
        raise AssertionError("each process has trained for itself")
    unlearn(DistributedDataParallel(model), mine, objectives.CrossEntropy(), epochs=1, progress=False)
    for layer in semu_layers(model).values():
        other = layer.semu_core["default"].detach().clone()
        assert other.any()
        dist.broadcast(other, src=0)
        assert torch.equal(other, layer.semu_core["default"])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
