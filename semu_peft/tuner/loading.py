"""Check saved weights against the model that is to have them, and take back an adapter that does not fit."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import _get_submodules
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from .layer import SemuLayer
from .tied import TiedLayer


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


def mismatch(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> str | None:
    """Say in a sentence how the adapter's tensors in `state_dict` differ from those in `model`, if they do."""
    expected: dict[str, torch.Size] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SemuLayer) and adapter_name in layer.semu_core and not isinstance(layer, TiedLayer):
            for kind in ("semu_U", "semu_V", "semu_core"):
                expected[f"{name}.{kind}.{adapter_name}"] = getattr(layer, kind)[adapter_name].shape
    found = {
        key: value.shape
        for key, value in state_dict.items()
        if ".semu_U" in key or ".semu_V" in key or ".semu_core" in key
    }
    # Where the layers were injected into a bare model, keys that match nothing keep PEFT's prefix.
    found = {key if key in expected else key.removeprefix("base_model.model."): shape for key, shape in found.items()}
    if missing := sorted(set(expected) - set(found)):
        return f"it has no weights for {missing[0]!r} ({len(missing)} such)."
    if extra := sorted(set(found) - set(expected)):
        return f"the model has no place for {extra[0]!r} ({len(extra)} such)."
    for key, shape in expected.items():
        if found[key] != shape:
            return f"{key!r} has shape {tuple(found[key])} in the file and {tuple(shape)} in the model."
    return None


def in_use(model: nn.Module, adapter_name: str) -> bool:
    """Whether the adapter had been in use before it was to be loaded over."""
    layers = [layer for layer in model.modules() if isinstance(layer, SemuLayer) and adapter_name in layer.semu_core]
    return any(not layer.semu_core[adapter_name].is_meta and layer.has_basis(adapter_name) for layer in layers)


def withdraw(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter that could not be loaded out of the model again, leaving no trace of it."""
    restore_layers(model, adapter_name)
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    configs.pop(adapter_name, None)
    for module in list(model.modules()):
        if not configs and isinstance(module, BaseTuner):
            if "peft_config" in vars(module.model):
                del module.model.peft_config
            module._remove_hooks()
            for parameter, flag in module._requires_grad_before:
                parameter.requires_grad_(flag)
