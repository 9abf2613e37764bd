"""Steps that are solved, not trained: a Kronecker-factored Newton step, and inputs that get the answers of others."""

from __future__ import annotations

import torch
from torch import Tensor

from .core import LowRank


def kronecker_solve(gradient: Tensor, inputs: Tensor, outputs: Tensor | None = None, damping: float = 0.0) -> Tensor:
    """`X` with `B X A + δ X = G`: the Newton step of a weight whose curvature is `B ⊗ A`, damped.

    With the eigenvectors of both factors it is a division, `Q_B [(Q_Bᵀ G Q_A) / (λ_B λ_Aᵀ + δ)] Q_Aᵀ`, so that the
    damping is that of the whole curvature and not of one factor. Directions that have no curvature and no damping are
    left alone, as by a pseudo-inverse.

    Args:
        gradient: `G`, `(m, n)`.
        inputs: `A`, `(n, n)`, symmetric and positive semidefinite.
        outputs: `B`, `(m, m)`, as well; by default the identity.
        damping: `δ`, added to each eigenvalue of `B ⊗ A`.

    Returns:
        `X`, `(m, n)`, in float64.

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.closed_form import kronecker_solve
        >>> kronecker_solve(torch.tensor([[6.0, 6.0]]), torch.diag(torch.tensor([2.0, 3.0])))
        tensor([[3., 2.]], dtype=torch.float64)
    """
    values, vectors = torch.linalg.eigh(inputs.double())
    turned, scales = gradient.double() @ vectors, values.unsqueeze(0)
    left = None
    if outputs is not None:
        others, left = torch.linalg.eigh(outputs.double())
        turned, scales = left.mT @ turned, others.unsqueeze(1) * scales
    smallest = torch.finfo(torch.float64).eps * max(gradient.shape) * scales.abs().max()
    scales = scales + damping
    step = torch.where(scales > smallest, turned / scales, 0.0) @ vectors.mT
    return step if left is None else left @ step


def redirection(sources: Tensor, targets: Tensor, kept: Tensor, ridge: float) -> LowRank:
    """The change of a linear map's *input side* after which it answers `sources` as it did `targets`.

    For any `W` the minimiser of `Σ ‖W' c − W a‖² + Σ ‖W' p − W p‖² + δ ‖W' − W‖²` is `W' = W + W D`, with
    `D = (A − C) Cᵀ (C Cᵀ + P Pᵀ + δ I)⁻¹` the same for all `W`: one solve serves every layer that reads these inputs,
    and its rank is that of `A − C`, no more than the number of sources.

    Source: UCE, Gandikota et al. 2024, arXiv 2308.14761, equation 7, written as a change.

    Args:
        sources: `C`, `(n, k)`: the inputs to redirect, scaled by the roots of their weights.
        targets: `A`, `(n, k)`: whose answers they are to get, scaled alike.
        kept: `P`, `(n, p)`: inputs whose answers stay, scaled by the roots of their weights.
        ridge: `δ` above zero.

    Returns:
        `D = L Rᵀ`, `(n, n)`, float64, with a core of ones on the diagonal.

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.closed_form import redirection
        >>> cat, dog, car = torch.eye(3).double().split(1, dim=1)
        >>> change = redirection(cat, dog, car, ridge=1e-9)
        >>> (cat + change.left @ change.core @ change.right.mT @ cat).T.round(decimals=3)
        tensor([[0., 1., 0.]], dtype=torch.float64)
    """
    sources, targets, kept = sources.double(), targets.double(), kept.double()
    moments = sources @ sources.mT + kept @ kept.mT
    moments.diagonal().add_(ridge)
    right = torch.cholesky_solve(sources, torch.linalg.cholesky(moments))
    return LowRank(targets - sources, right, torch.eye(sources.shape[1], dtype=torch.float64, device=sources.device))
