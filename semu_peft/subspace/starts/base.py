"""What a start is: a function that says with which bases and which first core a layer begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from semu_peft.linalg.factorize import SingularFactors
from semu_peft.tuner.layer import SemuLayer


@dataclass(frozen=True, eq=False)
class LayerStart:
    """What a layer starts from; shapes as [`set_basis`][semu_peft.tuner.layer.SemuLayer.set_basis] takes them.

    Attributes:
        left: `U`, `(m, r)`, orthonormal columns.
        right: `V`, `(n, r)`, orthonormal columns.
        core: `R`, `(r, r)`; by default the offset, or zeros without one.
        offset: `R₀`, `(r, r)`, which is taken off the core: the layer computes with `R − R₀`.

    Examples:
        >>> import torch
        >>> from semu_peft.subspace.starts import LayerStart
        >>> LayerStart(torch.eye(3, 1), torch.eye(4, 1), core=torch.ones(1, 1)).offset is None
        True
    """

    left: Tensor
    right: Tensor
    core: Tensor | None = None
    offset: Tensor | None = None


class Start(Protocol):
    """Anything that says what a layer starts from, called for one layer after the other.

    A start that has an attribute `needs_gradient = False` brings its own bases, and works without forget data. One with
    `prepare(total) -> total` is shown each layer's summed gradient before that is factorised. One with `layer_names`
    says which layers it is about.

    Examples:
        >>> def small(layer, directions, adapter_name):  # a start of one's own: U R Vᵀ with a small random core
        ...     core = 0.01 * torch.randn(directions.rank, directions.rank)
        ...     return LayerStart(directions.left, directions.right, core=core)
    """

    def __call__(self, layer: SemuLayer, directions: SingularFactors, adapter_name: str) -> LayerStart:
        """The start of one layer.

        Args:
            layer: The layer; `layer.layer_name` is its name.
            directions: The directions that it was given, as many as its rank.
            adapter_name: The adapter's name.
        """


def as_core(values: Tensor, layer: SemuLayer, adapter_name: str) -> Tensor:
    """Singular values `(…, r)` as the layer's core: `(…, r)` where it is diagonal, else `(…, r, r)`."""
    return values if layer.configs[adapter_name].core == "diagonal" else torch.diag_embed(values)


def svd_of_product(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`U, s, V` of `left rightᵀ`, at most as many as its smallest side, in float64.

    Args:
        left: `(…, m, k)`.
        right: `(…, n, k)`.

    Examples:
        >>> left, values, right = svd_of_product(torch.tensor([[3.0], [0.0]]), torch.tensor([[0.0], [2.0]]))
        >>> values.tolist(), left.shape, right.shape
        ([6.0], torch.Size([2, 1]), torch.Size([2, 1]))
    """
    left, left_mix = torch.linalg.qr(left.double())
    right, right_mix = torch.linalg.qr(right.double())
    inner, values, outer = torch.linalg.svd(left_mix @ right_mix.mT, full_matrices=False)
    return left @ inner, values, right @ outer.mT
