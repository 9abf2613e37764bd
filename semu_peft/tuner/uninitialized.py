"""What an adapter answers to those who ask for more than it can do before its initialisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class NotInitializedError(RuntimeError, ValueError):
    """An adapter is asked for something that it cannot do before its initialisation.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import NotInitializedError, SemuConfig, rerank
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), SemuConfig(target_modules=["0"]))
        >>> try:
        ...     rerank(model, r=1)
        ... except NotInitializedError as error:
        ...     print(str(error).partition(":")[0])
        The SEMU adapter 'default' is not initialised
    """

    def __init__(self, adapter_name: str) -> None:
        super().__init__(
            f"The SEMU adapter {adapter_name!r} is not initialised: it has no bases yet, and does nothing. Call "
            "`initialize_semu_weights(model, forget, objective)` first, or load a saved adapter."
        )


class RefuseTraining(torch.autograd.Function):
    """Pass a layer's output through unchanged; raise when a backward pass wants to train an empty adapter."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, core: Tensor, adapter_name: str) -> Tensor:
        ctx.adapter_name = adapter_name
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise NotInitializedError(ctx.adapter_name)
