"""Bases in half precision on disk, orthonormal in float32 again once they are loaded."""

from __future__ import annotations

import torch
from torch import Tensor

from semu_peft.linalg.core import polar_factor

_KINDS = (".semu_U", ".semu_V")


def rounded_bases(state_dict: dict[str, Tensor], save_dtype: str | None) -> dict[str, Tensor]:
    """The tensors to save, with `U` and `V` in `save_dtype`; all as they are where that is `None`."""
    if save_dtype is None:
        return state_dict
    dtype: torch.dtype = getattr(torch, save_dtype)
    return {key: value.to(dtype) if is_basis(key) else value for key, value in state_dict.items()}


def restored_bases(state_dict: dict[str, Tensor], save_dtype: str | None) -> dict[str, Tensor]:
    """The inverse of [`rounded_bases`], up to the rounding: `U` and `V` orthonormal, in float32.

    Of all orthonormal matrices the nearest to the rounded one is taken (its polar factor), so that `ΔW` is as near as
    the rounding allows: for bfloat16 within 1%, in the Frobenius norm, of what was saved.
    """
    if save_dtype is None:
        return state_dict
    return {key: polar_factor(value) if is_basis(key) else value for key, value in state_dict.items()}


def is_basis(key: str) -> bool:
    """Whether a tensor of this name, in a file or a model, is a basis `U` or `V`."""
    return key.endswith(_KINDS)
