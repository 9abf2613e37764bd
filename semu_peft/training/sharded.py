"""Checkpoints of a model that its owner has sharded (`fully_shard`): whole tensors on disk, each process its part here.

Accelerate does so for models that it has sharded itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from semu_peft.gradients.processes import whole
from semu_peft.tuner.tensors import is_sharded

from .parameters import leave_shards_alone, put_into, shared_out


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, whole; where it is sharded all processes have to ask.

    Examples:
        >>> model = nn.Linear(2, 2).requires_grad_(False)
        >>> _ = model.bias.requires_grad_(True)
        >>> list(trained_state(model))
        ['bias']
    """
    return {name: whole(p.detach()).contiguous() for name, p in model.named_parameters() if p.requires_grad}


def weights_file(folder: Path, index: int) -> Path:
    """Where Accelerate writes the weights of its `index`-th model.

    Examples:
        >>> [weights_file(Path("checkpoint-8"), index).name for index in (0, 1)]
        ['model.safetensors', 'model_1.safetensors']
    """
    return folder / f"model{f'_{index}' if index else ''}.safetensors"


@contextmanager
def whole_on_disk(accelerator: Accelerator) -> Iterator[None]:
    """Let what Accelerate saves and loads be whole tensors, also of parameters that it has not sharded itself.

    Args:
        accelerator: It holds the model and the optimiser.

    Examples:
        >>> with whole_on_disk(Accelerator(cpu=True)):  # nothing is sharded
        ...     pass
    """
    with ExitStack() as stack:
        if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            put_weights = partial(_put_weights, accelerator)
            stack.callback(accelerator.register_load_state_pre_hook(put_weights).remove)
            for wrapped in accelerator._optimizers:
                optimizer: Optimizer = wrapped.optimizer
                if any(map(is_sharded, _parameters(optimizer))):
                    stack.callback(optimizer.register_state_dict_post_hook(_gather).remove)
                    stack.callback(optimizer.register_load_state_dict_pre_hook(_share_out).remove)
        yield


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def _put_weights(accelerator: Accelerator, models: list[nn.Module], folder: str) -> None:
    """Load the weights in Accelerate's place.

    It would copy whole tensors into shards, and find no name in a model that its owner has put into
    DistributedDataParallel.
    """
    for index, model in enumerate(models):
        leave_shards_alone(model)
        weights = load_file(weights_file(Path(folder), index))
        for name, parameter in accelerator.unwrap_model(model).named_parameters():
            if name in weights:
                put_into(parameter, weights[name])
    models.clear()


def _gather(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "state": {index: _each(whole, values) for index, values in state["state"].items()}}


def _share_out(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    indices = [index for group in state["param_groups"] for index in group["params"]]
    owners = dict(zip(indices, _parameters(optimizer), strict=True))

    def shares(index: int, values: dict[str, Any]) -> dict[str, Any]:
        owner = owners[index]
        # Counts of steps are a number each and stay whole.
        return _each(lambda value: shared_out(value, owner) if value.shape == owner.shape else value, values)

    return {**state, "state": {index: shares(index, values) for index, values in state["state"].items()}}


def _each(function: Callable[[Tensor], Tensor], values: dict[str, Any]) -> dict[str, Any]:
    return {key: function(value) if isinstance(value, Tensor) else value for key, value in values.items()}
