"""How an adapter's tensors and a model's layers are named, in files and under other adapters."""

from __future__ import annotations

PREFIX = "base_model.model."
"""What PEFT's files put before a layer's full name."""

_WRAPPERS = ("base_layer", "_orig_mod")  # what PEFT's layers and `torch.compile` put between the names of modules


def without_prefix(key: str) -> str:
    """A file's key as a model without PEFT's wrapper has it.

    Examples:
        >>> from semu_peft.tuner.keys import without_prefix
        >>> without_prefix("base_model.model.encoder.fc1.semu_core")
        'encoder.fc1.semu_core'
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
