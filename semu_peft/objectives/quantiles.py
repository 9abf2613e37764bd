"""Where a value stands in an order, and what stands there in another one."""

from __future__ import annotations

import torch
from torch import Tensor

from semu_peft.arguments import check_kind


def quantiles_of(values: Tensor, among: Tensor | None = None) -> Tensor:
    """At which quantiles values lie, `(N,)` in (0, 1): the middle of each one's place among all, or among themselves.

    Args:
        values: `(N,)`.
        among: `(M,)`, all values, of which these are some but for rounding: each has the place of the nearest. By
            default they themselves, where equal ones have an order too.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.quantiles import quantiles_of
        >>> values = torch.tensor([2.999, 1.0])
        >>> quantiles_of(values).tolist(), quantiles_of(values, among=torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
        ([0.75, 0.25], [0.625, 0.125])
    """
    if among is None:
        return (values.argsort(stable=True).argsort() + 0.5).to(values) / len(values)
    order, values = among.to(values).sort().values, values.contiguous()
    above = torch.searchsorted(order, values).clamp(1, max(len(order) - 1, 1))
    pairs = order[torch.stack([above - 1, above.clamp_max(len(order) - 1)])]
    nearest = pairs.gather(0, (pairs - values).abs().argmin(0, keepdim=True)).squeeze(0)
    below, up_to = (torch.searchsorted(order, nearest, right=right) for right in (False, True))
    return (below + up_to).to(values) / (2 * len(order))


def at_quantiles(values: Tensor, quantiles: Tensor) -> Tensor:
    """What stands at quantiles `(N,)` of values `(M,)`, in the quantiles' dtype and on their device.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.quantiles import at_quantiles
        >>> at_quantiles(torch.tensor([0.0, 1.0]), torch.tensor([0.25, 1.0])).tolist()
        [0.25, 1.0]
    """
    return torch.quantile(values.to(quantiles), quantiles)


def check_ranked_among(name: str, values: Tensor | None, mend: str) -> Tensor | None:
    """Read what is ranked among: numbers that are no NaN, `(M,)`, float32 on the CPU; None stays None.

    Raises:
        TypeError: It is no tensor.
        ValueError: It has no number, or one that is NaN.

    Examples:
        >>> from semu_peft.objectives.quantiles import check_ranked_among
        >>> check_ranked_among("forget_nll", torch.tensor([]), "Take `sequence_nll(model, forget)`.")
        Traceback (most recent call last):
        ValueError: `forget_nll` must hold a number for each forget example, got 0 with 0 NaN. Take `sequence_nll(mo...
    """
    if values is None:
        return None
    check_kind(name, values, Tensor, "a tensor of a number for each forget example", mend)
    numbers = values.detach().flatten().float().cpu()
    if not numbers.numel() or numbers.isnan().any():
        raise ValueError(
            f"`{name}` must hold a number for each forget example, got {numbers.numel()} with "
            f"{int(numbers.isnan().sum())} NaN. {mend}"
        )
    return numbers
