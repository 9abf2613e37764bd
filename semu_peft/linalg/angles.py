"""How much two subspaces have in common."""

from __future__ import annotations

import torch
from torch import Tensor


def principal_cosines(first: Tensor, second: Tensor) -> Tensor:
    """The cosines of the principal angles between the column spaces of two matrices, the largest first, in float64.

    With orthonormal bases `Q₁`, `Q₂` they are the singular values of `Q₁ᵀ Q₂` (Björck and Golub 1973). Their squares
    add up to `‖Q₁ᵀ Q₂‖²_F`, which over their number is 1 where one space holds the other and 0 where they are
    orthogonal.

    Args:
        first: `(m, p)` or `(batch, m, p)`, of full column rank.
        second: `(m, q)` or `(batch, m, q)`, likewise.

    Returns:
        `(min(p, q),)` or `(batch, min(p, q))`, from 0 to 1.

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.angles import principal_cosines
        >>> principal_cosines(torch.eye(3)[:, :2], torch.eye(3)[:, 1:])
        tensor([1., 0.], dtype=torch.float64)
    """
    bases = [torch.linalg.qr(basis.double())[0] for basis in (first, second)]
    return torch.linalg.svdvals(bases[0].mT @ bases[1]).clamp(0, 1)
