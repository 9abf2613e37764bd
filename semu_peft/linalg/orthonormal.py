"""Orthonormal columns from products of matrices and small Cholesky factors, for many matrices at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Far above the rounding of a Gram matrix in float64, far below the squares of what float32 resolves.
_SHIFT = 1e-12


class Orthonormal(NamedTuple):
    """Orthonormal columns, and whether they are.

    Attributes:
        columns: `(batch, m, b)`; columns of zeros stand for those that added nothing.
        sound: `(batch,)`, true where the columns that are not zero are orthonormal, of each other and of the basis.
    """

    columns: Tensor
    sound: Tensor


def orthonormal_beyond(basis: Tensor, block: Tensor) -> Orthonormal:
    """Orthonormal columns for what each block adds to its basis.

    Each round projects and then orthonormalises by a Cholesky factor of the columns' Gram matrix in float64. The second
    takes off what rounding left in the first (Giraud, Langou, Rozložník 2005: twice is enough). The third is for
    columns that add next to nothing, as where singular values repeat: they are rounding errors, scaled up. Where even
    these lie in the basis, they are set to zero. Nothing waits for the device, and nothing fails: whether the columns
    came out orthonormal is a tensor too.

    Source: Cholesky QR with a shift, Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa 2020, arXiv 1809.11085.

    Args:
        basis: `(batch, m, k)`, orthonormal columns or zeros.
        block: `(batch, m, b)`.

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.orthonormal import orthonormal_beyond
        >>> found = orthonormal_beyond(torch.eye(3)[None, :, :1], torch.tensor([[[5.0], [2.0], [0.0]]]))
        >>> found.columns[0, :, 0].tolist(), found.sound.tolist()
        ([0.0, 1.0, 0.0], [True])
    """
    for _ in range(2):
        exact = _outside(basis, block).double()
        block = (exact @ _inverse_factor(exact.mT @ exact)).to(block.dtype)
    exact = _outside(basis, block).double()
    gram = exact.mT @ exact
    added = (gram.diagonal(dim1=-2, dim2=-1) > 0.5).to(gram.dtype)
    gram *= added.unsqueeze(-1) * added.unsqueeze(-2)
    inverse = _inverse_factor(gram)
    gram.diagonal(dim1=-2, dim2=-1).sub_(added)
    sound = gram.abs().amax((-2, -1)) < 0.1  # this round then brought it to rounding; NaN is not sound
    return Orthonormal((exact @ inverse).to(block.dtype), sound)


def orthonormal(blocks: Tensor, by_products: bool | None = None) -> Tensor:
    """Orthonormal columns that span those of each block, `(batch, m, b)`; some may be zeros where these are dependent.

    Args:
        blocks: `(batch, m, b)`.
        by_products: By Cholesky factors, checked, and by reflections (QR) where the check fails; or by reflections at
            once, which a CPU does faster. By default what is faster on the device.

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.orthonormal import orthonormal
        >>> columns = orthonormal(torch.tensor([[[3.0, 0.0], [4.0, 0.0]]]), by_products=True)
        >>> (columns.mT @ columns).round(decimals=5).tolist()
        [[[1.0, 0.0], [0.0, 0.0]]]
    """
    if blocks.device.type != "cpu" if by_products is None else by_products:
        columns, sound = orthonormal_beyond(blocks[..., :0], blocks)
        if sound.all():
            return columns
    return torch.linalg.qr(blocks)[0]


def _outside(basis: Tensor, block: Tensor) -> Tensor:
    return block - basis @ (basis.mT @ block) if basis.shape[-1] else block


def _inverse_factor(gram: Tensor) -> Tensor:
    """`X` such that `X` times the columns is orthonormal, from their Gram matrix; a column of zeros stays one."""
    squares = gram.diagonal(dim1=-2, dim2=-1)
    scales = squares.rsqrt().nan_to_num_(posinf=0.0).unsqueeze(-1)
    even = gram * scales * scales.mT
    even.diagonal(dim1=-2, dim2=-1).fill_(1 + _SHIFT)
    inverse = torch.linalg.solve_triangular(
        torch.linalg.cholesky_ex(even).L, torch.diag_embed(scales.squeeze(-1)), upper=False
    )
    return inverse.mT
