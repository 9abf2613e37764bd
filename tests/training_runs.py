"""Models, data and schedules that the tests of training share."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from models import Cnn, Mlp, image_batches, vector_batches
from peft import LoraConfig, OFTConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from semu_peft import SemuConfig, UnlearnResult, initialize_semu_weights, unlearn
from semu_peft.objectives import CrossEntropy

QUIET: dict[str, Any] = {"progress": False}


def train(*arguments: Any, **options: Any) -> UnlearnResult:
    """`unlearn` by AdamW for two epochs unless told otherwise: runs whose steps can be counted beforehand."""
    return unlearn(*arguments, **{"epochs": 2, "learning_rate": 3e-2, **options})


def semu(kind: type[Mlp | Cnn] = Mlp, **options: Any) -> nn.Module:
    """A model with an initialised SEMU adapter, the same at every call."""
    torch.manual_seed(11)
    model = get_peft_model(kind(), SemuConfig(target_modules=kind.targets, **options))
    batches = vector_batches() if kind is Mlp else image_batches()
    initialize_semu_weights(model, batches, CrossEntropy(), progress=False)
    return model


def lora() -> nn.Module:
    torch.manual_seed(11)
    return get_peft_model(Mlp(), LoraConfig(target_modules=["fc1", "fc2"], lora_dropout=0.5))


def oft() -> nn.Module:
    torch.manual_seed(11)
    return get_peft_model(Mlp(), OFTConfig(target_modules=["fc2"], oft_block_size=2))


def plain() -> nn.Module:
    torch.manual_seed(11)
    model = Mlp()
    model.fc1.requires_grad_(False)
    return model


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


def constant(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name, tensor in actual.items() if not torch.equal(tensor, expected[name])]
    assert not different


def loader(count: int = 13, size: int = 4, seed: int = 0, **options: Any) -> DataLoader[Any]:
    """A shuffled loader whose last batch is smaller."""
    x, y = (torch.cat(part) for part in zip(*vector_batches(count, 1, seed), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=size, **{"shuffle": True, **options})


class Interrupted(Exception):
    pass


class Schedule(torch.optim.lr_scheduler.CosineAnnealingLR):
    """A schedule that pulls the plug: it raises instead of taking a step after `dies_after`."""

    dies_after: ClassVar[float] = math.inf

    def step(self, epoch: int | None = None) -> None:
        if self.last_epoch >= self.dies_after:
            raise Interrupted
        super().step(epoch)
