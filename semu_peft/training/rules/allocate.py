"""AdaLoRA's budget, moved between layers while a run goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import AdaLoraConfig
from torch import nn

from semu_peft.arguments import check_adapter_name

from .base import Rule, Step


@dataclass
class AllocateRanks(Rule):
    """Let AdaLoRA take singular values away where they matter least, step by step, down to its target rank.

    PEFT leaves the call of `update_and_allocate` to the training loop; without it the adapter keeps its first rank
    everywhere. It reads each step's gradients, so it is a rule: callbacks come after they are gone. Give
    `AdaLoraConfig` the run's number of steps as `total_step`.

    AdaLoRA's masks set singular values to zero, from step `tinit` on every `deltaT` steps; after `total_step − tfinal`
    the budget stays. Its orthogonality penalty is in the `loss` that PEFT's model returns, which objectives of ours do
    not read.

    Source: AdaLoRA, Zhang et al., ICLR 2023, arXiv 2303.10512.

    Args:
        adapter_name: The AdaLoRA adapter; by default the one that PEFT trains.

    Raises:
        ValueError: In a run, the model has no such AdaLoRA adapter, or the run is by natural gradients.

    Examples:
        >>> import torch
        >>> from peft import AdaLoraConfig, get_peft_model
        >>> from semu_peft import objectives, unlearn
        >>> config = AdaLoraConfig(
        ...     target_modules=["0"], init_r=4, target_r=1, total_step=8, tinit=1, tfinal=2, deltaT=1
        ... )
        >>> model = get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), config)
        >>> batches = [(torch.randn(8, 6), torch.randint(3, (8,)))]
        >>> _ = unlearn(
        ...     model, batches, objectives.UniformDistribution(), rules=AllocateRanks(), max_steps=8, progress=False
        ... )
        >>> int((model.base_model.model[0].lora_E["default"] != 0).sum())
        1
    """

    needs_whole_parameters = True

    adapter_name: str | None = None

    def __post_init__(self) -> None:
        check_adapter_name(self.adapter_name, optional=True)

    def update(self, step: Step) -> None:
        step.needed_optimizer(self, "reads the gradients of an optimiser's step")
        tuner = self._tuner(step.model)
        before = tuner.trainable_adapter_name
        tuner.trainable_adapter_name = self.adapter_name or before
        try:
            tuner.update_and_allocate(step.number)
        finally:
            tuner.trainable_adapter_name = before

    def _tuner(self, model: nn.Module) -> Any:
        for module in model.modules():
            configs = getattr(module, "peft_config", None)
            if callable(getattr(type(module), "update_and_allocate", None)) and isinstance(configs, dict):
                name = self.adapter_name or getattr(module, "trainable_adapter_name", None)
                if isinstance(configs.get(name), AdaLoraConfig):
                    return module
        raise ValueError(
            f"`rules`: AllocateRanks needs an AdaLoRA adapter{f' {self.adapter_name!r}' if self.adapter_name else ''}, "
            "which the model does not have. Make it by `get_peft_model(model, AdaLoraConfig(...))`."
        )
