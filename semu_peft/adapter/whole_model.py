"""What PEFT's `PeftModel` does for a wrapped model, for adapters that were injected into a bare one (`add_adapter`)."""

from __future__ import annotations

from typing import Any

from torch import nn

from semu_peft.tuner.adapted import base_model, semu_layers
from semu_peft.tuner.loading import restore_layers


def remove_adapter(model: nn.Module, adapter_name: str = "default") -> None:
    """Take an adapter out of the model; layers that then have none become stock layers again. Unknown names pass."""
    root: Any = base_model(model)
    restore_layers(root, adapter_name)
    configs = getattr(root, "peft_config", {})
    configs.pop(adapter_name, None)
    if not configs and "peft_config" in vars(root):
        del root.peft_config
        if "_hf_peft_config_loaded" in vars(root):
            root._hf_peft_config_loaded = False


def merge_and_remove(model: nn.Module, adapter_name: str = "default") -> nn.Module:
    """Add an adapter's correction to the weights for good, and leave a stock model.

    For models with injected adapters; a `PeftModel` has `merge_and_unload`.

    Args:
        model: The model, changed in place.
        adapter_name: The adapter to merge.

    Returns:
        The model.

    Raises:
        ValueError: There is no such adapter, one is merged already, or a merged weight would not be finite; the weights
            are then as they were.
    """
    layers = semu_layers(model, adapter_name)
    if merged := {name for layer in layers.values() for name in layer.merged_adapters}:
        raise ValueError(f"{sorted(merged)} are merged into the weights already: unmerge (`unfuse_lora`) them first.")
    try:
        for layer in layers.values():
            layer.merge(safe_merge=True, adapter_names=[adapter_name])
    except ValueError:
        for layer in layers.values():
            if layer.merged:
                layer.unmerge()
        raise
    remove_adapter(model, adapter_name)
    return model
