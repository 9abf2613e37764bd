"""Starts that split the weight itself: its first or last part, or what lies in some output directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from semu_peft.arguments import check_count, check_number, check_switch
from semu_peft.gradients.gather import Gathered
from semu_peft.gradients.moments import FactoredFisher, InputMoment
from semu_peft.gradients.statistics import SquaredSum
from semu_peft.linalg.factorize import SingularFactors
from semu_peft.tuner.layer import SemuLayer

from ..base_weight import whole_weight
from .base import LayerStart, as_core, svd_of_product

# FILA adds it to what it divides by, ReGLU to the diagonal of second moments.
_FLOOR = 1e-5
_RIDGE = 1e-4


@dataclass(frozen=True, eq=False)
class WeightSplit:
    """A part of the weight itself: what PiSSA, LoKU, KaSA and LoLDU train.

    They train a factorised part of `W` and subtract its start from `W`. Here the same product is `Q R₀ Vᵀ`, with
    orthonormal `Q` and `V`, and `R₀` an offset: `W` stays, the model computes what it did, and the core alone is
    trained, within the bases. There are as many directions as the layer's rank, of which the forget gradient says no
    more; without forget data γ is the share of the weight's own energy.

    - `basis="first"`: the leading singular triplets of `diag(w) W`, `diag(1/w) U S Vᵀ`; without weights PiSSA's.
    - `basis="last"`: the last singular triplets of `W`, as in KaSA.
    - `basis="lu"`: `P L_r D_r U_r` of a pivoted LU decomposition, the first columns of `L` and rows of `U`, as in
      LoLDU. Theirs is an oblique basis, of which they train the diagonal; bases here are orthonormal, so that it is
      this part of `W`, in its singular directions, and not their trajectory.

    Source: PiSSA, arXiv 2404.02948; FILA in LoKU, Cha et al., ICLR 2025, arXiv 2408.06621, section 3.3; KaSA, arXiv
    2412.06071; LoLDU, arXiv 2410.13618.

    Args:
        row_weights: `w` by layer name, `(m,)`, one positive number for each row of the weight's matrix, see
            [`fila_row_weights`][semu_peft.subspace.starts.weight.fila_row_weights]; ones where a layer is not named.
            `1e-5` is added to each. For `"first"` alone.
        basis: Which part.
        drop: Take the part away at once, `ΔW = −Q R₀ Vᵀ`, as KaSA does with the last part: the model changes by the
            norm of the part, `√Σ σ²`, and the correction can give it back. Their code drops nothing where a layer has
            fewer outputs than inputs.

    Raises:
        ValueError: `basis` is another word; rows are weighted for a part that has no row weights.

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
    basis: Literal["first", "last", "lu"] = "first"
    drop: bool = False
    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.basis not in ("first", "last", "lu"):
            raise ValueError(f"`basis` must be 'first', 'last' or 'lu', got {self.basis!r}. Use one of these.")
        if self.row_weights and self.basis != "first":
            raise ValueError(f"`row_weights` are for `basis='first'`, got {self.basis!r}. Leave one of them out.")
        check_switch("drop", self.drop)

    def __call__(self, layer: SemuLayer, directions: SingularFactors, adapter_name: str) -> LayerStart:
        matrix = layer.weight_to_matrix(whole_weight(layer).detach(), adapter_name).double()
        weights = self.row_weights.get(layer.layer_name)
        if weights is not None:
            left, offset, right = self._weighted(weights, matrix, directions.rank, layer, adapter_name)
        else:
            left, values, right = self._part(matrix, directions.rank)
            offset = as_core(values, layer, adapter_name)
        return LayerStart(left, right, core=-offset) if self.drop else LayerStart(left, right, offset=offset)

    def _part(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.basis == "lu":
            rows, lower, upper = torch.linalg.lu(matrix)
            return svd_of_product(rows @ lower[..., :rank], upper[..., :rank, :].mT)
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        part = slice(rank) if self.basis == "first" else slice(values.shape[-1] - rank, None)
        return left[..., part], values[..., part], right.mT[..., part]

    def _weighted(
        self, weights: Tensor, matrix: Tensor, rank: int, layer: SemuLayer, adapter_name: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        if layer.configs[adapter_name].core == "diagonal":
            raise ValueError(
                f"`row_weights` of layer {layer.layer_name!r} need a full core, got `core='diagonal'`: the core of the "
                "weighted part is not diagonal. Use `SemuConfig(core='full')`."
            )
        rows = self._checked(weights, matrix, layer.layer_name)
        left, values, right = torch.linalg.svd(rows * matrix, full_matrices=False)
        left, inside = torch.linalg.qr(left[..., :rank] / rows)
        return left, inside * values[..., None, :rank], right.mT[..., :rank]

    def _checked(self, weights: Tensor, matrix: Tensor, name: str) -> Tensor:
        """`w + 1e-5` as a column."""
        if weights.shape != matrix.shape[:-1] or not (torch.isfinite(weights) & (weights >= 0)).all():
            raise ValueError(
                f"`row_weights` of layer {name!r} must be finite, zero or more, and of shape "
                f"{tuple(matrix.shape[:-1])}, got {tuple(weights.shape)} from {float(weights.min())} to "
                f"{float(weights.max())}. Give one for each row."
            )
        return (weights.to(matrix) + _FLOOR).unsqueeze(-1)


@dataclass(frozen=True, eq=False)
class FeatureDifference:
    """The part of the weight in the output directions that forget data use and retain data do not: ReGLU's RILA.

    With the second moments of a layer's outputs, `C_f` and `C_r`, and `Δ = (1 − β) C_f − β C_r`, the basis `Q` is
    `Δ`'s leading eigenvectors, and the part `Q Qᵀ W`, of which the core starts as an offset: the model computes what
    it did. ReGLU adds the penalty `Σ ‖Qᵀ P‖²` on the leading `k` eigenvectors `P` of `C_r` to the loss; here `Q` is
    frozen, so that `avoid=k` takes them out of `Q` beforehand, and the penalty is 0.

    Source: ReGLU, arXiv 2604.17396. Their features sum over padding as well;
    [`InputMoment`][semu_peft.gradients.moments.InputMoment] counts rows that the loss depends on, or with
    `InputMoment.per_example` sums over those of each example, as theirs do.

    Args:
        forget: Gathered on the forget data with `statistic=InputMoment`.
        retain: The same on the retain data.
        beta: `β` from 0 to 1, how much the retain data count.
        avoid: How many leading directions of the retain outputs `Q` is to be orthogonal to.

    Raises:
        ValueError: The two are not of the same layers, or of another statistic, or a number is out of range.

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import InputMoment, SemuConfig, gather, initialize_semu_weights, objectives
        >>> base, loss = torch.nn.Sequential(torch.nn.Linear(4, 3)), objectives.CrossEntropy()
        >>> data = [[(torch.randn(8, 4), torch.randint(3, (8,)))] for _ in range(2)]
        >>> forget, retain = (gather(base, part, loss, statistic=InputMoment, progress=False) for part in data)
        >>> model = get_peft_model(base, SemuConfig(target_modules=["0"], r=2))
        >>> initialize_semu_weights(model, start=FeatureDifference(forget, retain)).ranks
        {'0': 2}
    """

    forget: Gathered = field(repr=False)
    retain: Gathered = field(repr=False)
    beta: float = 0.7
    avoid: int = 0
    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0.0, high=1.0)
        check_count("avoid", self.avoid, least=0)
        check_alike(self.forget, self.retain, InputMoment)

    @property
    def layer_names(self) -> set[str]:
        """The layers that have moments."""
        return set(self.forget)

    def __call__(self, layer: SemuLayer, directions: SingularFactors, adapter_name: str) -> LayerStart:
        name = layer.layer_name
        if name not in self.forget:
            raise ValueError(f"`forget` has no moments of layer {name!r}. Gather at all layers of the adapter.")
        matrix = layer.weight_to_matrix(whole_weight(layer).detach(), adapter_name)
        left, values, right = within(matrix.double(), self.basis(layer, matrix, directions.rank), name)[1:]
        return LayerStart(left, right, offset=as_core(values, layer, adapter_name))

    def basis(self, layer: SemuLayer, matrix: Tensor, rank: int) -> Tensor:
        """`Q`, `(m, rank)`."""
        bias = getattr(layer.get_base_layer(), "bias", None)
        forget, retain = (
            moments[layer.layer_name].outputs(matrix, bias)  # type: ignore[attr-defined]
            + _RIDGE * torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
            for moments in (self.forget, self.retain)
        )
        difference = (1 - self.beta) * forget - self.beta * retain
        if self.avoid:
            room = len(matrix) - self.avoid
            if room < rank:
                raise ValueError(
                    f"`avoid` leaves {room} directions of layer {layer.layer_name!r}, which has rank {rank}. Give a "
                    "smaller one, or a smaller `r`."
                )
            # Within the complement, so that no rounding of eigenvectors leads back into what is avoided.
            allowed = torch.linalg.eigh(retain)[1][:, :room]
            return allowed @ torch.linalg.eigh(allowed.mT @ difference @ allowed)[1].flip(-1)[:, :rank]
        return torch.linalg.eigh(difference)[1].flip(-1)[:, :rank]


def within(matrix: Tensor, directions: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Q`, and the part `Q Qᵀ W = U S Vᵀ` of a matrix in the output directions that `Q` spans, all in float64.

    Args:
        matrix: `W`, `(m, n)`.
        directions: `(m, q)`, columns that span `Q`.
        name: The layer's name, for errors.

    Raises:
        ValueError: The directions do not fit the matrix, or are not independent of each other.
    """
    fits = isinstance(directions, Tensor) and directions.dim() == 2 and matrix.dim() == 2
    if not fits or len(directions) != len(matrix) or not 1 <= directions.shape[1] <= len(matrix):
        raise ValueError(
            f"`directions` of layer {name!r} must be (m, q) for its weight {tuple(matrix.shape)}, got "
            f"{tuple(directions.shape)}. Give columns as long as the layer's output."
        )
    basis, mix = torch.linalg.qr(directions.to(matrix))
    if not mix.diagonal().abs().min() > 1e-6 * mix.diagonal().abs().max():
        raise ValueError(
            f"`directions` of layer {name!r} must be independent columns, got {directions.shape[1]} of a lower rank. "
            "Keep those that an SVD finds."
        )
    inner, values, right = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return basis, basis @ inner, values, right.mT


def check_alike(forget: Gathered, retain: Gathered, kind: type | tuple[type, ...]) -> None:
    """Check that two gatherings are of the same layers, and of a statistic of that kind.

    Raises:
        ValueError: They are not.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if forget.keys() != retain.keys():
        odd = sorted(forget.keys() ^ retain.keys())
        raise ValueError(f"`forget` and `retain` differ at the layers {odd[:3]}. Gather both with the same `targets`.")
    for name, one in forget.items():
        other = retain[name]
        if not isinstance(one, kinds) or not isinstance(other, kinds):
            raise ValueError(
                f"Layer {name!r} has {type(one).__name__} and {type(other).__name__}, and needs "
                f"{' or '.join(each.__name__ for each in kinds)}. Gather with `statistic={kinds[0].__name__}`."
            )


def fila_row_weights(forget: Gathered, retain: Gathered) -> dict[str, Tensor]:
    """How much more each row of a weight matters to the forget data than to the retain data.

    `w = √(Σ_columns F_forget / (F_retain + 1e-5))`, of the two diagonal Fisher informations.

    Source: FILA in LoKU, Cha et al., ICLR 2025, arXiv 2408.06621, section 3.3.

    Args:
        forget: Gathered on the forget data with `statistic=SquaredSum` (the paper's code squares whole batches:
            `SquaredSum.per_batch`), or `FactoredFisher` for VILA's importance.
        retain: The same on the retain data.

    Returns:
        `w` by layer name, `(m,)`, for [`WeightSplit`][semu_peft.subspace.starts.weight.WeightSplit].

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
    check_alike(forget, retain, (SquaredSum, FactoredFisher))
    weights = {}
    for name, fisher in forget.items():
        ratio = fisher.mean / (retain[name].mean + _FLOOR)  # type: ignore[attr-defined]
        weights[name] = ratio.sum(-1).sqrt()
    return weights
