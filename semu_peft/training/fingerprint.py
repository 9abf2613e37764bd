"""What a run is, in words that two runs can be compared by: its data, objective, optimiser and seeds."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from semu_peft.gradients.processes import whole

Fingerprint = dict[str, Any]
"""Plain values by what they are of, as JSON has them."""


def describe(value: Any) -> Any:
    """Say what a value is, in plain values that are the same in another process: tensors by a digest, code by its name.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import CrossEntropy
        >>> describe({"objective": CrossEntropy(), "steps": 3})["steps"]
        3
        >>> describe([torch.zeros(2)]) == describe([torch.zeros(2)])
        True
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if value == value else "nan"  # JSON's NaN is unequal to itself
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {_digest(bytes_of(value))}"
    if isinstance(value, (np.ndarray, np.generic)):
        return f"{value.dtype} {value.shape} {_digest(value.tobytes())}"
    if isinstance(value, bytes):
        return _digest(value)
    if isinstance(value, Mapping):
        return {str(key): describe(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(each) for each in value]
    return _describe_object(value)


def _describe_object(value: Any) -> Any:
    if isinstance(value, functools.partial):
        return {
            "type": "partial",
            "function": describe(value.func),
            "arguments": describe([value.args, value.keywords]),
        }
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: describe(getattr(value, field.name, None)) for field in fields(value)}
        return {"type": type(value).__qualname__, **parts}
    if hasattr(value, "tobytes") and hasattr(value, "size"):  # an image of Pillow
        return f"{type(value).__name__} {value.size} {_digest(value.tobytes())}"
    return getattr(value, "__qualname__", type(value).__qualname__)


def bytes_of(tensor: Tensor) -> bytes:
    """The memory of a tensor, gathered where it is sharded.

    Examples:
        >>> import torch
        >>> bytes_of(torch.tensor([1, 2], dtype=torch.uint8))
        b'\\x01\\x02'
    """
    flat = whole(tensor).detach().to_dense().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def describe_optimizer(optimizer: Optimizer) -> Any:
    """An optimiser's kind and the settings of its groups, before a schedule has changed them."""
    inner = getattr(optimizer, "optimizer", optimizer)
    groups = [
        {key: describe(value) for key, value in group.items() if key not in ("params", "param_names", "initial_lr")}
        for group in inner.param_groups
    ]
    return {"type": type(inner).__qualname__, "groups": groups}


def differences(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Where two runs differ, in words; what an earlier version did not say of a run is not compared.

    Examples:
        >>> differences({"seed": 0, "steps": 4}, {"seed": 1, "steps": 4})
        ['seed is 1 here and 0 there']
    """
    names = [name for name in present if present[name] != saved.get(name, present[name])]
    return [f"{name} is {_short(present[name])} here and {_short(saved.get(name))} there" for name in names]


def _short(value: Any, most: int = 120) -> str:
    text = repr(value) if not isinstance(value, Sequence) or isinstance(value, str) else str(list(value))
    return text if len(text) <= most else f"{text[:most]} …"
