"""Usual mistakes in arguments, said in one voice: what the argument must be, what was got, and the mend."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def check_kind(name: str, value: Any, kinds: type | tuple[type, ...], wanted: str, mend: str) -> None:
    """Check that an argument is of a kind.

    Raises:
        TypeError: It is not.

    Examples:
        >>> check_kind("labels", 5, list, "a list", "Write `[5]`.")
        Traceback (most recent call last):
        TypeError: `labels` must be a list, got int. Write `[5]`.
    """
    if not isinstance(value, kinds):
        raise TypeError(f"`{name}` must be {wanted}, got {_short(value)}. {mend}")


def check_model(model: Any, name: str = "model") -> None:
    """Check that an argument is a model.

    Raises:
        TypeError: It is not.

    Examples:
        >>> from torch import nn
        >>> check_model(nn.Linear(2, 2))
    """
    check_kind(name, model, nn.Module, "a model, a torch `nn.Module`", "Load or build it first.")


def check_score(score: Any, *, optional: bool = False) -> None:
    """Check that an argument called `score` can be asked how good a model is, or is None where that is allowed.

    Raises:
        TypeError: It is no function.

    Examples:
        >>> check_score(0.5)
        Traceback (most recent call last):
        TypeError: `score` must be a function of the model, got 0.5. Write `lambda model: ...`, higher if better.
    """
    if optional and score is None:
        return
    wanted, mend = "a function of the model", "Write `lambda model: ...`, higher if better."
    check_kind("score", score, Callable, wanted, mend)  # type: ignore[arg-type]


def check_count(name: str, value: Any, *, least: int = 1, optional: bool = False) -> None:
    """Check that an argument is an integer of at least `least`, or None where that is allowed.

    Raises:
        TypeError: It is no integer.
        ValueError: It is too small.

    Examples:
        >>> check_count("r", 0)
        Traceback (most recent call last):
        ValueError: `r` must be an integer of at least 1, got 0. Give a larger one.
    """
    if optional and value is None:
        return
    wanted = f"an integer of at least {least}" + (" or None" if optional else "")
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be {wanted}, got {value!r}. Write it without quotes or a decimal point.")
    if value < least:
        raise ValueError(f"`{name}` must be {wanted}, got {value!r}. Give a larger one.")


def check_number(name: str, value: Any, *, low: float = -math.inf, high: float = math.inf) -> None:
    """Check that an argument is a finite number between two bounds.

    Raises:
        TypeError: It is no number.
        ValueError: It is out of range.

    Examples:
        >>> check_number("density", 2.0, low=0, high=1)
        Traceback (most recent call last):
        ValueError: `density` must be a finite number from 0 to 1, got 2.0. Give one in that range.
    """
    wanted = "a finite number" + (f" from {low} to {high}" if math.isfinite(high) else "")
    wanted += f" of at least {low}" if math.isfinite(low) and not math.isfinite(high) else ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be {wanted}, got {_short(value)}. Write it as a float, such as 0.5.")
    if not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"`{name}` must be {wanted}, got {value!r}. Give one in that range.")


def check_positive(name: str, value: Any) -> None:
    """Check that an argument is a finite number above zero.

    Raises:
        TypeError: It is no number.
        ValueError: It is zero, negative or not finite.

    Examples:
        >>> check_positive("beta", 0)
        Traceback (most recent call last):
        ValueError: `beta` must be a finite number above 0, got 0. Give a larger one.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        wanted = "a finite number above 0"
        raise TypeError(f"`{name}` must be {wanted}, got {_short(value)}. Write it as a float, such as 0.5.")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be a finite number above 0, got {value!r}. Give a larger one.")


def check_switch(name: str, value: Any) -> None:
    """Check that an argument is True or False.

    Raises:
        TypeError: It is something else.

    Examples:
        >>> check_switch("progress", "no")
        Traceback (most recent call last):
        TypeError: `progress` must be True or False, got 'no'. It is a switch.
    """
    check_kind(name, value, bool, "True or False", "It is a switch.")


def check_path(name: str, value: Any) -> None:
    """Check that an argument is a path.

    Raises:
        TypeError: It is none.

    Examples:
        >>> check_path("path", "folder/file.safetensors")
    """
    check_kind(name, value, (str, os.PathLike), "a path", "Give it as a string or a Path.")


def check_device(name: str, device: Any) -> None:
    """Check that an argument is a device that torch knows, or None.

    Raises:
        TypeError: It is of another kind.
        ValueError: Torch does not know it.

    Examples:
        >>> check_device("device", "cpu")
    """
    if device is None:
        return
    mend = "Give 'cpu', 'cuda', 'cuda:0', a `torch.device` or None."
    check_kind(name, device, (str, torch.device), "a device or None", mend)
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"`{name}` must be a device that torch knows, got {device!r}. {mend}") from error


def check_share(name: str, value: Any, *, optional: bool = False) -> None:
    """Check that an argument is a share in (0, 1], or None where that is allowed.

    Raises:
        TypeError: It is no number.
        ValueError: It is out of range.

    Examples:
        >>> check_share("explained_variance", 0.9)
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a share in (0, 1], got {_short(value)}. Write it as a float, such as 0.9.")
    if not 0 < value <= 1:
        raise ValueError(f"`{name}` must be a share in (0, 1], got {value!r}. 1.0 keeps all.")


def check_adapter_name(adapter_name: Any, *, optional: bool = False) -> None:
    """Check that an argument is the name of one adapter, as modules can have it.

    Raises:
        TypeError: It is no string.
        ValueError: It is empty or has a dot in it.

    Examples:
        >>> check_adapter_name("default")
    """
    if optional and adapter_name is None:
        return
    mend = "Give one name, such as 'default'."
    check_kind("adapter_name", adapter_name, str, "the name of one adapter", mend)
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"`adapter_name` must be a name without dots, got {adapter_name!r}. {mend}")


def _short(value: Any) -> str:
    plain = value is None or isinstance(value, (bool, int, float, str))
    return repr(value) if plain and len(repr(value)) <= 80 and not isinstance(value, int) else type(value).__name__
