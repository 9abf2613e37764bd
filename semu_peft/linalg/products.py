"""Products in float32 or better of factors that may be in half precision, which a GPU multiplies as they are."""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def product(left: Tensor, right: Tensor) -> Tensor:
    """`A B`, accumulated and given in float32 or better.

    Args:
        left: `A`, `(m, k)`.
        right: `B`, `(k, n)`, on the same device.

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.products import product
        >>> product(torch.ones(1, 300).bfloat16(), torch.ones(300, 1).bfloat16())  # bfloat16 knows no 300.5
        tensor([[300.]])
    """
    dtype = _wide(left, right)
    if multiplies_half(left, right) and dtype == torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.to(dtype) @ right.to(dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """`T += scale · A B` in the precision of `T`, without the product in memory.

    Args:
        total: `T`, `(m, n)`, float32 or better, contiguous.
        left: `A`, `(m, k)`.
        right: `B`, `(k, n)`, on the same device.

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.products import add_product
        >>> total = torch.ones(1, 1)
        >>> add_product(total, torch.ones(1, 300).bfloat16(), torch.ones(300, 1).bfloat16(), scale=2.0)
        >>> total
        tensor([[601.]])
    """
    if multiplies_half(left, right) and total.dtype == torch.float32:
        torch.addmm(total, left, right, alpha=scale, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype), alpha=scale)


def _wide(*factors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for factor in factors:
        dtype = torch.promote_types(dtype, factor.dtype)
    return dtype


def multiplies_half(left: Tensor, right: Tensor) -> bool:
    """Whether the device makes this product of half precision in float32 at once (torch 2.8, on a GPU).

    Examples:
        >>> multiplies_half(torch.ones(2, 2).half(), torch.ones(2, 2).half())  # not on a CPU
        False
    """
    half = left.dtype in _HALF and left.dtype == right.dtype
    return half and left.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out")
