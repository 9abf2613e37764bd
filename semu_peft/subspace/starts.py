"""Where the training of an adapter starts: the bases and the first core of each layer.

The base weight is never written. A start whose core is not zero is kept as an offset, `ΔW = U (R − R₀) Vᵀ`, so that the
model computes what it did and "adapter off" is always the original; or as the core itself, `ΔW = U R Vᵀ`, where the
method means the model to change at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from semu_peft.gradients.gather import Gathered
from semu_peft.gradients.statistics import SquaredSum
from semu_peft.linalg.factorize import SingularFactors
from semu_peft.tuner.layer import SemuLayer

from .base_weight import whole_weight

# FILA adds it to what it divides by.
_FLOOR = 1e-5


@dataclass(frozen=True, eq=False)
class LayerStart:
    """What a layer starts from; shapes as [`set_basis`][semu_peft.tuner.layer.SemuLayer.set_basis] takes them.

    Attributes:
        left: `U`, `(m, r)`, orthonormal columns.
        right: `V`, `(n, r)`, orthonormal columns.
        core: `R`, `(r, r)`; by default the offset, or zeros without one.
        offset: `R₀`, `(r, r)`, which is taken off the core: the layer computes with `R − R₀`.
    """

    left: Tensor
    right: Tensor
    core: Tensor | None = None
    offset: Tensor | None = None


class Start(Protocol):
    """Anything that says what a layer starts from, called for one layer after the other.

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


@dataclass(frozen=True)
class Zero:
    """The forget gradient's directions and a core of zeros: SEMU's own start.

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, initialize_semu_weights, objectives
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), SemuConfig(target_modules=["0"]))
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> _ = initialize_semu_weights(model, batches, objectives.CrossEntropy(), start=Zero(), progress=False)
        >>> bool(model.base_model.model[0].semu_core["default"].any())
        False
    """

    def __call__(self, layer: SemuLayer, directions: SingularFactors, adapter_name: str) -> LayerStart:
        return LayerStart(directions.left, directions.right)


@dataclass(frozen=True, eq=False)
class WeightSplit:
    """The leading part of the weight itself, with its rows weighted: what LoKU, and PiSSA without weights, train.

    With `U S Vᵀ` the leading singular triplets of `diag(w) W`, as many as the layer's rank, they train
    `diag(1/w) U S Vᵀ` and subtract its start from `W`. Here the same product is `Q R₀ Vᵀ`, with `Q` orthonormal, and
    `R₀` an offset: `W` stays, the model computes what it did, and the core alone is trained, within the bases. The
    forget gradient gives no more than the rank.

    Source: FILA in LoKU, Cha et al., ICLR 2025, arXiv 2408.06621, section 3.3; PiSSA, arXiv 2404.02948.

    Args:
        row_weights: `w` by layer name, `(m,)`, one positive number for each row of the weight's matrix, see
            [`fila_row_weights`][semu_peft.subspace.starts.fila_row_weights]; ones where a layer is not named. `1e-5` is
            added to each.

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, initialize_semu_weights, objectives
        >>> base, batches = torch.nn.Sequential(torch.nn.Linear(4, 3)), [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> model, expected = get_peft_model(base, SemuConfig(target_modules=["0"])), base(batches[0][0])
        >>> _ = initialize_semu_weights(model, batches, objectives.CrossEntropy(), start=WeightSplit(), progress=False)
        >>> bool(model.base_model.model[0].semu_core["default"].any()), torch.equal(model(batches[0][0]), expected)
        (True, True)
    """

    row_weights: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def __call__(self, layer: SemuLayer, directions: SingularFactors, adapter_name: str) -> LayerStart:
        diagonal = layer.configs[adapter_name].core == "diagonal"
        weights = self.row_weights.get(layer.layer_name)
        if diagonal and weights is not None:
            raise ValueError(
                f"`row_weights` of layer {layer.layer_name!r} need a full core, got `core='diagonal'`: the core of the "
                "weighted part is not diagonal. Use `SemuConfig(core='full')`."
            )
        matrix = layer.weight_to_matrix(whole_weight(layer).detach(), adapter_name).double()
        rank = directions.rank
        if weights is None:
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            values = values[..., :rank]
            offset = values if diagonal else torch.diag_embed(values)
            return LayerStart(left[..., :rank], right.mT[..., :rank], offset=offset)
        rows = self._checked(weights, matrix, layer.layer_name)
        left, values, right = torch.linalg.svd(rows * matrix, full_matrices=False)
        left, inside = torch.linalg.qr(left[..., :rank] / rows)
        return LayerStart(left, right.mT[..., :rank], offset=inside * values[..., None, :rank])

    def _checked(self, weights: Tensor, matrix: Tensor, name: str) -> Tensor:
        """`w + 1e-5` as a column."""
        if weights.shape != matrix.shape[:-1] or not (torch.isfinite(weights) & (weights >= 0)).all():
            raise ValueError(
                f"`row_weights` of layer {name!r} must be finite, zero or more, and of shape "
                f"{tuple(matrix.shape[:-1])}, got {tuple(weights.shape)} from {float(weights.min())} to "
                f"{float(weights.max())}. Give one for each row."
            )
        return (weights.to(matrix) + _FLOOR).unsqueeze(-1)


def fila_row_weights(forget: Gathered, retain: Gathered) -> dict[str, Tensor]:
    """How much more each row of a weight matters to the forget data than to the retain data.

    `w = √(Σ_columns F_forget / (F_retain + 1e-5))`, of the two diagonal Fisher informations.

    Source: FILA in LoKU, Cha et al., ICLR 2025, arXiv 2408.06621, section 3.3.

    Args:
        forget: Gathered on the forget data with `statistic=SquaredSum` (the paper's code squares whole batches:
            `SquaredSum.per_batch`).
        retain: The same on the retain data.

    Returns:
        `w` by layer name, `(m,)`, for [`WeightSplit`][semu_peft.subspace.starts.WeightSplit].

    Raises:
        ValueError: The two are not of the same layers, or of another statistic.

    Examples:
        >>> from semu_peft import SquaredSum, gather, objectives
        >>> model, loss = torch.nn.Sequential(torch.nn.Linear(4, 3)), objectives.CrossEntropy()
        >>> data = [[(torch.randn(8, 4), torch.randint(3, (8,)))] for _ in range(2)]
        >>> forget, retain = (gather(model, part, loss, statistic=SquaredSum, progress=False) for part in data)
        >>> fila_row_weights(forget, retain)["0"].shape
        torch.Size([3])
    """
    weights = {}
    if forget.keys() != retain.keys():
        odd = sorted(forget.keys() ^ retain.keys())
        raise ValueError(f"`forget` and `retain` differ at the layers {odd[:3]}. Gather both with the same `targets`.")
    for name, fisher in forget.items():
        other = retain[name]
        if not isinstance(fisher, SquaredSum) or not isinstance(other, SquaredSum):
            raise ValueError(
                f"Layer {name!r} has {type(fisher).__name__} and {type(other).__name__}, and needs squared gradients. "
                "Gather with `statistic=SquaredSum`."
            )
        weights[name] = (fisher.mean / (other.mean + _FLOOR)).sum(-1).sqrt()
    return weights
