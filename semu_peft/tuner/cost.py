"""When a correction is cheaper inside the weight than beside it."""

from __future__ import annotations


def dense_is_cheaper(m: int, n: int, rank: int, positions: int) -> bool:
    """Whether a training step is cheaper with `W + U R Vᵀ` as the weight than with three thin products beside it.

    In units of the base layer's own product over `N` positions, the thin products of the forward and the backward pass
    cost `2ρ`, `ρ = r (m + n) / (m n)`. The dense weight costs its gradient, 1, and about `3 r / N` for building it and
    for the core's share of that gradient. So it pays at large ranks and many positions only;
    `benchmarks/engine/forward_rule.py` measures it.

    Args:
        m: Outputs of the weight read as a matrix.
        n: Its inputs.
        rank: The rank of all corrections together.
        positions: Tokens, or places of a convolution's output.

    Examples:
        >>> from semu_peft.tuner.cost import dense_is_cheaper
        >>> dense_is_cheaper(64, 64, rank=4, positions=4096), dense_is_cheaper(64, 64, rank=48, positions=4096)
        (False, True)
    """
    return positions * (2 * rank * (m + n) - m * n) > 3 * rank * m * n
