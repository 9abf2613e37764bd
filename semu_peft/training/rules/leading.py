"""Steps without the directions that forget data share with everything else, which is where relearning goes first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from semu_peft.arguments import check_count, check_kind
from semu_peft.gradients.covariance import LayerCovariance
from semu_peft.linalg.factorize import leading_factors

from .base import Rule, Step
from .matrices import TrainedMatrix, of_layer, trained_matrices


@dataclass
class RemoveLeading(Rule):
    """Take the leading singular directions out of each matrix's change, which other data share the most.

    With `Δ = U S Vᵀ` and `q` the rank: `"soft"` brings the first `q` singular values down to the last of them,
    `S_i → S_q`; `"quadratic"` to `S_q² / S_i`, as the soft form on both sides does; `"hard"` to 0. All others stay. It
    is applied to the change that is really made, so it means what it says with any optimiser. Train in one large step
    by SGD to do as the paper does: its gradient is that of a whole pass.

    On a SEMU core `Δ = U_W (ΔR) V_Wᵀ` has the singular values of `ΔR`. To choose a subspace without these directions
    see `skip_leading` of [`initialize_semu_weights`][semu_peft.subspace.initialize.initialize_semu_weights].

    Source: RepSelect, arXiv 2606.17168.

    Args:
        rank: `q`; 0 leaves the step as it is.
        mode: `"soft"`, `"quadratic"` or `"hard"`.

    Raises:
        TypeError: `rank` is no integer.
        ValueError: `rank` is negative, or there is no such mode.

    Examples:
        >>> weight = torch.nn.Parameter(torch.diag(torch.tensor([5.0, 3.0, 1.0])))
        >>> step = Step(0, torch.nn.Identity(), {"weight": weight}, {"weight": torch.zeros(3, 3)})
        >>> with torch.no_grad():
        ...     RemoveLeading(2).update(step)
        >>> weight.diagonal()
        tensor([3., 3., 1.], grad_fn=...)
    """

    needs_whole_parameters = True

    rank: int
    mode: Literal["soft", "hard", "quadratic"] = "soft"

    def __post_init__(self) -> None:
        check_count("rank", self.rank, least=0)
        if self.mode not in ("soft", "hard", "quadratic"):
            raise ValueError(f"`mode` must be 'soft', 'hard' or 'quadratic', got {self.mode!r}. Take 'soft'.")

    def update(self, step: Step) -> None:
        if self.rank == 0:
            return
        for matrix in trained_matrices(step):
            before = step.before[matrix.name]
            change = matrix.read(step.parameters[matrix.name].detach() - before)
            if change.any():
                changed = matrix.write(without_leading(change, self.rank, self.mode))
                step.parameters[matrix.name].copy_(before + changed)


def without_leading(matrix: Tensor, rank: int, mode: Literal["soft", "hard", "quadratic"] = "soft") -> Tensor:
    """A matrix, or each of a batch, with its first `rank` singular values made smaller.

    Args:
        matrix: `(..., m, n)`.
        rank: `q`.
        mode: As for [`RemoveLeading`][semu_peft.training.rules.leading.RemoveLeading].

    Examples:
        >>> without_leading(torch.diag(torch.tensor([4.0, 2.0, 1.0])), 2, "quadratic").diagonal()
        tensor([1., 2., 1.])
    """
    batch = matrix.reshape(-1, *matrix.shape[-2:])
    return torch.stack([_without(each, rank, mode) for each in batch]).view(matrix.shape)


def _without(matrix: Tensor, rank: int, mode: str) -> Tensor:
    factors = leading_factors(matrix, 1.0, rank)
    if factors.rank == 0:
        return matrix
    values = factors.singular_values[: factors.rank]
    least = values[-1]
    kept = {"soft": least.expand_as(values), "hard": torch.zeros_like(values), "quadratic": least**2 / values}[mode]
    removed = factors.left * (values - kept) @ factors.right.mT
    return (matrix.to(removed) - removed).to(matrix)


@dataclass(eq=False)
class RemoveDirections(Rule):
    """Keep each layer's change free of given directions of its inputs and outputs: `ΔW Q = 0` and `Pᵀ ΔW = 0`.

    `Δ ← (I − P Pᵀ) Δ (I − Q Qᵀ)`. With `Q` the mean and the leading principal components of a layer's inputs and `P`
    those of its output gradients, the gradient that is left is the paper's `Σ g̃ ãᵀ`; as it is the change that is
    projected, momentum and second moments do not bring them back. A SEMU core is projected within its bases, which is
    exact as well: `ΔR` loses the directions `Vᵀ Q` and `Uᵀ P`.

    Source: CIR, collapse of irrelevant representations, arXiv 2509.11816; it removes the mean and 23 components of
    the inputs, and the mean and 35 of the output gradients.

    Args:
        inputs: `Q` by layer name, `(n, k)`, see
            [`LayerCovariance.directions`][semu_peft.gradients.covariance.LayerCovariance].
        outputs: `P` by layer name, `(m, k)`. Layers that are not named stay as they are.

    Raises:
        TypeError: They are no mappings.
        ValueError: In a run, directions fit no layer, or a diagonal core cannot lose them.

    Examples:
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     before = layer.weight - 1.0
        ...     step = Step(0, torch.nn.Sequential(layer), {"0.weight": layer.weight}, {"0.weight": before})
        ...     RemoveDirections({"0": torch.tensor([[1.0], [0.0]])}).update(step)
        >>> (layer.weight - before).tolist()[0]
        [0.0, 1.0]
    """

    needs_whole_parameters = True

    inputs: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    outputs: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("inputs", "outputs"):
            wanted = "a mapping from layer names to directions"
            check_kind(name, getattr(self, name), Mapping, wanted, "See `LayerCovariance.directions`.")

    @classmethod
    def shared(cls, covariances: Mapping[str, object], *, inputs: int = 23, outputs: int = 35) -> RemoveDirections:
        """Those that the data share: the mean and so many leading components of inputs and output gradients.

        Args:
            covariances: By layer, of `gather(model, forget, objective, statistic=LayerCovariance)`.
            inputs: How many components of the inputs.
            outputs: How many of the output gradients.

        Raises:
            ValueError: Something else was gathered.
        """
        found = {name: each for name, each in covariances.items() if isinstance(each, LayerCovariance)}
        if not found or len(found) < len(covariances):
            raise ValueError(
                "`covariances` must be gathered as `LayerCovariance`, got others among them. Use `gather(model, "
                "forget, objective, statistic=LayerCovariance)`."
            )
        bases = {name: each.directions(inputs, outputs) for name, each in found.items()}
        return cls(
            {name: right for name, (right, _) in bases.items()}, {name: left for name, (_, left) in bases.items()}
        )

    def gradients(self, step: Step) -> None:
        """Check the names, before anything has moved."""
        matrices = trained_matrices(step)
        _check_names(self.inputs, "inputs", matrices)
        _check_names(self.outputs, "outputs", matrices)

    def update(self, step: Step) -> None:
        for matrix in trained_matrices(step):
            right, left = of_layer(self.inputs, matrix), of_layer(self.outputs, matrix)
            if right is None and left is None:
                continue
            before = step.before[matrix.name]
            change = matrix.read(step.parameters[matrix.name].detach() - before)
            wide = change.to(torch.promote_types(change.dtype, torch.float32))
            if right is not None:
                wide = _outside(wide.mT, _within(right, matrix.right, matrix, "inputs")).mT
            if left is not None:
                wide = _outside(wide, _within(left, matrix.left, matrix, "outputs"))
            step.parameters[matrix.name].copy_(before + matrix.write(wide.to(change)))


def _check_names(directions: Mapping[str, Tensor], argument: str, matrices: list[TrainedMatrix]) -> None:
    known = {name for matrix in matrices for name in (matrix.layer, matrix.name)}
    if odd := [name for name in directions if name not in known]:
        raise ValueError(
            f"`{argument}` must name trained layers, got {odd[:3]}. The run trains {sorted(known)[:3]} …: name those."
        )


def _within(directions: Tensor, basis: Tensor | None, matrix: TrainedMatrix, argument: str) -> Tensor:
    """An orthonormal basis, float64, of the directions as the matrix sees them: of a core, from within its bases."""
    size = matrix.matrix_shape[-1 if argument == "inputs" else -2] if basis is None else basis.shape[-2]
    if directions.dim() != 2 or len(directions) != size:
        raise ValueError(
            f"`{argument}` of layer {matrix.layer!r} must be of shape ({size}, k), got {tuple(directions.shape)}. "
            "Gather them at this model."
        )
    if matrix.kind == "diagonal":
        raise ValueError(
            f"`{argument}`: layer {matrix.layer!r} has a diagonal core, which cannot lose a direction. Use "
            "`SemuConfig(core='full')`."
        )
    wide = directions.double() if basis is None else basis.double().mT @ directions.to(basis).double()
    left, values, _ = torch.linalg.svd(wide, full_matrices=False)
    kept = values > 1e-10 * values[..., :1].clamp_min(1e-300)
    return left * kept.unsqueeze(-2)


def _outside(matrix: Tensor, basis: Tensor) -> Tensor:
    """Each column less its part in the span of the basis; twice, for the rounding of the first time."""
    wide, basis = matrix.double(), basis.to(matrix.device)
    for _ in range(2):
        wide = wide - basis @ (basis.mT @ wide)
    return wide.to(matrix)
