"""The original model, without a second copy of it: the same model with its adapters switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """Switch off all PEFT adapters of the model, of any method, for the length of the block.

    Unlike `PeftModel.disable_adapter` it leaves `requires_grad` alone and works on injected adapters and inside
    distributed wrappers.

    Raises:
        ValueError: The model has no adapter, so that there is no original to go back to; or an adapter is merged.
    """
    wrappers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if not wrappers:
        raise ValueError(
            f"{type(model).__name__} has no PEFT adapter to switch off, so its original predictions are not to be had "
            "from it. Wrap it with an adapter, or give the objective a frozen copy as `reference`."
        )
    if any(getattr(wrapper, "merged_adapters", None) for wrapper in wrappers):
        raise ValueError("An adapter is merged into the weights; call `unmerge_adapter` to have the original back.")
    states = [wrapper._disable_adapters for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper._disable_adapters = True
        yield model
    finally:
        for wrapper, state in zip(wrappers, states, strict=True):
            wrapper._disable_adapters = state
