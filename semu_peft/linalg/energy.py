"""How much of a matrix its leading singular values hold, and which of them are nothing but rounding."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from semu_peft.arguments import check_share


def check_explained_variance(explained_variance: float) -> None:
    """Raise TypeError unless γ is a number, ValueError unless it lies in (0, 1]."""
    check_share("explained_variance", explained_variance)


def rank_for_energy(singular_values: Tensor, explained_variance: float, energy: Tensor | None = None) -> int:
    """The smallest rank whose leading singular values hold the wanted share of the energy.

    The smallest `r ≥ 1` with `Σ_{i≤r} s_i² ≥ γ ‖G‖²` (SEMU, arXiv 2502.07587, section 3), summed in float64; 0 for a
    matrix of zeros. For a batch of matrices it is the largest rank that any of them needs. Where the values given do
    not reach the share, it is their number.

    Args:
        singular_values: `(k,)` or `(batch, k)`, in descending order.
        explained_variance: γ in (0, 1].
        energy: `‖G‖²`, `()` or `(batch,)`, where the values are not all of them; by default the sum of their squares.

    Raises:
        ValueError: γ is outside (0, 1].

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.energy import rank_for_energy
        >>> [rank_for_energy(torch.tensor([3.0, 1.0, 0.5]), gamma) for gamma in (0.5, 0.9, 1.0)]
        [1, 2, 3]
    """
    check_explained_variance(explained_variance)
    ranks = ranks_for_energy(singular_values, explained_variance, energy)
    return int(ranks.max()) if ranks.numel() else 0


def ranks_for_energy(
    singular_values: Tensor, explained_variance: float | Tensor, energy: Tensor | None = None
) -> Tensor:
    """As [`rank_for_energy`][semu_peft.linalg.energy.rank_for_energy], for each matrix by itself, on the device.

    Args:
        singular_values: `(..., k)`, each in descending order.
        explained_variance: γ in (0, 1], one for all or `(...)`.
        energy: `‖G‖²`, `(...)`, where the values are not all of them.

    Returns:
        The ranks, `(...)`, int64.

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.energy import ranks_for_energy
        >>> ranks_for_energy(torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, 0.0]]), 0.9).tolist()
        [1, 2, 0]
    """
    if singular_values.shape[-1] == 0:
        return torch.zeros(singular_values.shape[:-1], dtype=torch.int64, device=singular_values.device)
    sums = singular_values.double().square().cumsum(-1)
    total = sums[..., -1] if energy is None else torch.maximum(energy.to(sums), sums[..., -1])
    ranks = (sums < (explained_variance * total).unsqueeze(-1)).sum(-1) + 1
    # At γ = 1 rounding may keep the sum below an energy that was summed otherwise; a direction of 0 adds nothing.
    return torch.minimum(ranks, (singular_values > 0).sum(-1))


def squared_norm(matrix: Tensor) -> Tensor:
    """`‖G‖_F²` in float64, of each matrix in a batch.

    Norms of rows come first: a sum over the whole matrix in float32 would lose digits, a copy in float64 takes longer.
    Those of half precision are taken in float32, or they would be rounded to its digits.
    """
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    return torch.linalg.vector_norm(matrix, dim=-1, dtype=dtype).double().square().sum(-1)


def largest_magnitude(tensor: Tensor) -> float:
    """The largest absolute value, in one pass without a copy; NaN if there is one, 0 of an empty tensor."""
    return largest_magnitudes([tensor])[0]


def largest_magnitudes(tensors: Iterable[Tensor]) -> list[float]:
    """The largest absolute value of each tensor; the host waits once for all that lie on one device.

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.energy import largest_magnitudes
        >>> largest_magnitudes([torch.tensor([1.0, -3.0]), torch.zeros(0)])
        [3.0, 0.0]
    """
    largest: list[float] = []
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for tensor in tensors:
        if tensor.numel():
            extremes = torch.stack(tensor.aminmax()).abs().max().double()
            by_device.setdefault(tensor.device, []).append((len(largest), extremes))
        largest.append(0.0)
    for found in by_device.values():
        for (place, _), value in zip(found, torch.stack([each for _, each in found]).tolist(), strict=True):
            largest[place] = value
    return largest


def without_noise(values: Tensor, shape: tuple[int, ...], resolution: float) -> Tensor:
    """Singular values with zeros for what rounding alone would give: it must not count as a direction (at γ = 1)."""
    noise = max(shape[-2:], default=0) * resolution * values[..., :1]
    return torch.where(values > noise, values, torch.zeros_like(values))
