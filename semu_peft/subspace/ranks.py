"""How many directions a layer gets."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_for_energy(singular_values: Tensor, explained_variance: float) -> int:
    """The smallest rank whose leading singular values hold the wanted share of the energy.

    The smallest `r ≥ 1` with `Σ_{i≤r} s_i² ≥ γ Σ_i s_i²` (SEMU, arXiv 2502.07587, section 3), summed in float64; 0 for
    a matrix of zeros. For a batch of matrices it is the largest rank that any of them needs.

    Args:
        singular_values: `(k,)` or `(batch, k)`, in descending order.
        explained_variance: γ in (0, 1].

    Raises:
        ValueError: γ is outside (0, 1].
    """
    if not 0 < explained_variance <= 1:
        raise ValueError(f"`explained_variance` must be in (0, 1], got {explained_variance!r}.")
    energy = singular_values.double().square().cumsum(-1)
    if energy.shape[-1] == 0:
        return 0
    total = energy[..., -1:]
    ranks = (energy < explained_variance * total).sum(-1) + 1
    return int(torch.where(total.squeeze(-1) > 0, ranks, 0).max())
