"""Dial how much of its forgetting an adapter applies."""

from __future__ import annotations

from torch import nn

from semu_peft.arguments import check_adapter_name, check_model, check_number
from semu_peft.tuner.adapted import semu_layers


def set_scale(model: nn.Module, scale: float, *, adapter_name: str = "default") -> None:
    """Apply `scale` times an adapter's correction: `W' = W + scale · U R Vᵀ`, in all of its layers.

    0 is the original model, 1 the trained forgetting; between them the forgetting is partial, beyond 1 it is stronger,
    and a negative scale moves the other way, towards what was to be forgotten. The scale is not saved with the adapter,
    but goes into everything made from it: merged weights, an exported LoRA, a sum of adapters.

    Args:
        model: A `PeftModel`, or a model with an injected adapter.
        scale: Any finite number.
        adapter_name: The adapter to scale; others keep their scales.

    Raises:
        ValueError: `scale` is not finite, or the adapter is unknown or merged. Nothing is changed then.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, set_scale
        >>> base, x = torch.nn.Sequential(torch.nn.Linear(4, 3)), torch.randn(2, 4)
        >>> original = base(x)
        >>> model = get_peft_model(base, SemuConfig(target_modules=["0"], r=2, init_weights=False))
        >>> set_scale(model, 0.0)
        >>> torch.equal(model(x), original)
        True
    """
    check_model(model)
    check_adapter_name(adapter_name)
    check_number("scale", scale)
    layers = semu_layers(model, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"The adapter {adapter_name!r} is merged into the weights; call `unmerge_adapter` first.")
    for layer in layers.values():
        layer.set_scale(adapter_name, float(scale))
