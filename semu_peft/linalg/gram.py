"""Singular values and vectors from Gram matrices in float64, and what these do not resolve."""

from __future__ import annotations

import torch
from torch import Tensor

from .energy import without_noise

# The Gram matrix squares the condition number: in float64 this still leaves half of float32's digits.
_RESOLUTION = 1e-5
# An accelerator decomposes matrices one by one, in two milliseconds where the host needs a part of one; beyond this
# side it is quicker all the same.
_ON_HOST = 128


def gram_values(gram: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Singular values, descending, of matrices `A` from `A Aᵀ`, in float64: as `gram_spectrum`, in a third of its time.

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.gram import gram_values
        >>> gram_values(torch.diag(torch.tensor([4.0, 9.0])).double(), (2, 2), torch.float32).tolist()
        [3.0, 2.0]
    """
    squares = torch.linalg.eigvalsh(_where_quick(gram)).to(gram.device)
    return _roots(squares, shape, dtype)


def gram_spectrum(gram: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Singular values, descending, and left vectors of matrices `A` from `A Aᵀ`, all in float64.

    Args:
        gram: `(..., m, m)`.
        shape: Of `A`.
        dtype: Of `A`, whose rounding is no direction.

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.gram import gram_spectrum
        >>> gram_spectrum(torch.diag(torch.tensor([4.0, 9.0])).double(), (2, 2), torch.float32)[0].tolist()
        [3.0, 2.0]
    """
    squares, left = (found.to(gram.device) for found in torch.linalg.eigh(_where_quick(gram)))
    return _roots(squares, shape, dtype), left.flip(-1)


def _where_quick(gram: Tensor) -> Tensor:
    return gram.cpu() if gram.shape[-1] <= _ON_HOST else gram


def _roots(squares: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # Rounding of the squares leaves half of float64's digits to their roots.
    resolution = max(torch.finfo(torch.float64).eps ** 0.5, torch.finfo(dtype).eps)
    return without_noise(squares.flip(-1).clamp_min(0).sqrt(), shape, resolution)


def inverse(values: Tensor) -> Tensor:
    """One over each singular value; zero for those that the Gram matrix does not resolve."""
    return torch.where(_clear(values), 1 / values, 0)


def resolved(values: Tensor, ranks: Tensor) -> Tensor:
    """Whether the first `rank` values of `(..., k)` stand clear of what the Gram matrix rounds away, `(...)`."""
    return _clear(values).sum(-1) >= ranks


def _clear(values: Tensor) -> Tensor:
    return values > _RESOLUTION * values[..., :1]
