"""What PEFT's `PeftModel` does for a wrapped model, for adapters that were injected into a bare one (`add_adapter`)."""

from __future__ import annotations

from typing import Any

from torch import nn

from semu_peft.tuner.adapted import base_model, semu_layers
from semu_peft.tuner.loading import restore_layers


def remove_adapter(model: nn.Module, *, adapter_name: str = "default") -> None:
    """Take an adapter out of the model; layers that then have none become stock layers again. Unknown names pass.

    Args:
        model: The model, changed in place.
        adapter_name: The adapter to take out.

    Examples:
        >>> from peft import inject_adapter_in_model
        >>> from semu_peft import SemuConfig
        >>> from torch import nn
        >>> from semu_peft.adapter.whole_model import remove_adapter
        >>> config = SemuConfig(target_modules=["0"], r=2, init_weights=False)
        >>> model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(4, 3)))
        >>> remove_adapter(model)
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
        )
    """
    root: Any = base_model(model)
    restore_layers(root, adapter_name)
    configs = getattr(root, "peft_config", {})
    configs.pop(adapter_name, None)
    if not configs and "peft_config" in vars(root):
        del root.peft_config
        if "_hf_peft_config_loaded" in vars(root):
            root._hf_peft_config_loaded = False


def merge_and_remove(model: nn.Module, *, adapter_name: str = "default") -> nn.Module:
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

    Examples:
        >>> from peft import inject_adapter_in_model
        >>> from semu_peft import SemuConfig
        >>> from torch import nn
        >>> from semu_peft.adapter.whole_model import merge_and_remove
        >>> config = SemuConfig(target_modules=["0"], r=2, init_weights=False)
        >>> model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(4, 3)))
        >>> merge_and_remove(model)
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
        )
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
    remove_adapter(model, adapter_name=adapter_name)
    return model
