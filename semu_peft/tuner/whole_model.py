"""What PEFT's `PeftModel` does for a wrapped model, for adapters that were injected into a bare one (`add_adapter`)."""

from __future__ import annotations

from typing import Any

from peft.utils import _get_submodules
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .adapted import base_model, semu_layers
from .layer import SemuLayer


def restore_layers(root: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of a model's modules; those that then have none become stock modules again."""
    for name, layer in reversed(list(root.named_modules())):  # wrappers around each other: the inner one first
        if isinstance(layer, SemuLayer) and adapter_name in layer.semu_core:
            layer.delete_adapter(adapter_name)
            stock = None if layer.semu_core else layer.base_layer
        elif isinstance(layer, ModulesToSaveWrapper) and set(layer.modules_to_save) == {adapter_name}:
            stock = layer.original_module
        else:
            continue
        if stock is not None:
            parent, _, child = _get_submodules(root, name)
            setattr(parent, child, stock)


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
