"""A model as it is without some of its adapters, and its layers as they are with one of them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from semu_peft.objectives.adapter_parts import adapter_parts
from semu_peft.objectives.original import without_adapter

from .intervention import Intervention


def without_adapters(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """The model without those of the adapters that it has, over the same tensors; with every other one as it is.

    Args:
        model: The model, which stays as it is.
        names: The adapters to leave out; those that are not there are passed over.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.gates.closed import without_adapters
        >>> base, x = nn.Sequential(nn.Linear(4, 3)), torch.ones(1, 4)
        >>> expected = base(x)
        >>> model = get_peft_model(base, SemuConfig(target_modules=["0"], r=2, init_weights=False))
        >>> torch.equal(without_adapters(model, ["default", "other"])(x), expected)
        True
    """
    if isinstance(model, Intervention):
        model = model.model
    for name in dict.fromkeys(names):
        if has_adapter(model, name):
            model = without_adapter(model, name)
    return model


def has_adapter(model: nn.Module, name: str) -> bool:
    """Whether a model has an adapter of that name.

    Examples:
        >>> from semu_peft.gates.closed import has_adapter
        >>> has_adapter(nn.Linear(2, 2), "default")
        False
    """
    try:
        return bool(adapter_parts(model, name))
    except ValueError:
        return False
