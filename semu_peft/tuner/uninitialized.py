"""What an adapter answers to those who ask for more than it can do before it has its bases, or their values."""

from __future__ import annotations

from collections.abc import Sequence
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


class OffloadedError(RuntimeError):
    """An adapter is to be trained whose core a library keeps elsewhere, so that its gradient would be lost.

    Examples:
        >>> from semu_peft.tuner.uninitialized import OffloadedError
        >>> str(OffloadedError("default")).partition(",")[0]
        "The SEMU adapter 'default' is offloaded"
    """

    def __init__(self, adapter_name: str) -> None:
        super().__init__(
            f"The SEMU adapter {adapter_name!r} is offloaded, so that gradients of its cores would be lost. Take the "
            "hooks off before training (`accelerate.hooks.remove_hook_from_submodules(model)`), or offload the base "
            "model first and add the adapter then, which stays in memory."
        )


class AtBackward(torch.autograd.Function):
    """Pass a layer's output through unchanged; in the backward pass raise, or give an empty core its gradient.

    Distributed training waits for a gradient of every parameter, of those without entries as well.
    """

    generate_vmap_rule = True  # gradients of single examples: `torch.func.vmap` over `torch.func.grad`

    @staticmethod
    def forward(output: Tensor, core: Tensor, error: type | None, adapter_name: str) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, core, ctx.error, ctx.adapter_name = inputs
        ctx.shape, ctx.options = core.shape, {"dtype": core.dtype, "device": core.device}

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        if ctx.error is not None:
            raise ctx.error(ctx.adapter_name)
        return grad_outputs[0], grad_outputs[0].new_zeros(ctx.shape, **ctx.options), None, None


def check_values(layer: Any, adapter_names: Sequence[str]) -> None:
    """Raise where an adapter has no values in a layer and nothing brings them: meta tensors compute garbage in silence.

    Args:
        layer: The SEMU layer, about to be run; one whose base layer is on the meta device too may be.
        adapter_names: The adapters that are to be run.

    Raises:
        RuntimeError: An adapter lies on the meta device.

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.tuner.uninitialized import check_values
        >>> config = SemuConfig(target_modules=["0"], r=2, init_weights=False)
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), config)
        >>> check_values(model.base_model.model[0], ["default"])  # it has some
    """
    for name in adapter_names:
        if any(tensors.lacks_values(name) for tensors in layer.tensors_of(name)) and not layer.is_only_planned:
            raise RuntimeError(
                f"Layer {layer.layer_name!r}: the adapter {name!r} lies on the meta device, without values, and the "
                "layer is run with data. Load its weights first (`load_adapter`, or `set_peft_model_state_dict` with "
                "`low_cpu_mem_usage=True`); or offload the model by Accelerate's or diffusers' functions, which bring "
                "them back when they are needed."
            )
