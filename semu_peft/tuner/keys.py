"""How an adapter's tensors and a model's layers are named, in files and under other adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping

PREFIX = "base_model.model."
"""What PEFT's files put before a layer's full name."""

_WRAPPERS = ("base_layer", "_orig_mod")  # what PEFT's layers and `torch.compile` put between the names of modules


def without_prefix(key: str) -> str:
    """A file's key as a model without PEFT's wrapper has it.

    Examples:
        >>> from semu_peft.tuner.keys import without_prefix
        >>> without_prefix("base_model.model.encoder.fc1.semu_core.semu_core")
        'encoder.fc1.semu_core.semu_core'
    """
    return key.removeprefix(PREFIX)


def without_compilation(name: str) -> str:
    """The name that a module or parameter has before it, or a module around it, was compiled.

    Examples:
        >>> from semu_peft.tuner.keys import without_compilation
        >>> without_compilation("_orig_mod.encoder._orig_mod.fc1")
        'encoder.fc1'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def without_wrappers(name: str) -> str:
    """The name that a module or parameter has in the model without adapters, and before it was compiled.

    Examples:
        >>> from semu_peft.tuner.keys import without_wrappers
        >>> without_wrappers("experts.base_layer.gate_up_proj")
        'experts.gate_up_proj'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def renamed_as_saved(name: str, key_mapping: Mapping[str, str]) -> str:
    """A name as PEFT renames the keys of a file: by the first pattern of the mapping that is found in it.

    Examples:
        >>> from semu_peft.tuner.keys import renamed_as_saved
        >>> renamed_as_saved("visual.fc1", {"^visual": "model.visual", "^model": "model.language_model"})
        'model.visual.fc1'
    """
    for pattern, replacement in key_mapping.items():
        renamed, times = re.subn(pattern, replacement, name)
        if times:
            return renamed
    return name


_TENSOR = re.compile(r"(?P<layer>.+?)\.(?P<kind>semu_(?:U|V|core|offset))(?:\.[^.]+)?\.(?P=kind)")


def layer_of(key: str) -> str | None:
    """The layer that an adapter's tensor belongs to, by the tensor's key in a file or a model; None for other tensors.

    Examples:
        >>> from semu_peft.tuner.keys import layer_of
        >>> layer_of("fc1.semu_core.semu_core"), layer_of("fc1.semu_core.default.semu_core"), layer_of("fc1.bias")
        ('fc1', 'fc1', None)
    """
    match = _TENSOR.fullmatch(key)
    return match["layer"] if match else None


def without_adapter_name(key: str) -> str:
    """The key in a file of an adapter's tensor, by its key in a model; other keys are as they are.

    Examples:
        >>> from semu_peft.tuner.keys import without_adapter_name
        >>> without_adapter_name("layers.1.fc1.semu_core.1.semu_core"), without_adapter_name("layers.1.bias")
        ('layers.1.fc1.semu_core.semu_core', 'layers.1.bias')
    """
    match = _TENSOR.fullmatch(key)
    return tensor_key(match["layer"], match["kind"]) if match else key


def tensor_key(layer: str, kind: str, adapter_name: str | None = None) -> str:
    """The key of an adapter's tensor in a model, or in a file, where no adapter is named.

    Examples:
        >>> from semu_peft.tuner.keys import tensor_key
        >>> tensor_key("fc1", "semu_core", "default"), tensor_key("fc1", "semu_core")
        ('fc1.semu_core.default.semu_core', 'fc1.semu_core.semu_core')
    """
    return ".".join(part for part in (layer, kind, adapter_name, kind) if part)
