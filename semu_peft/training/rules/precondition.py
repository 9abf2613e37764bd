"""Gradients divided by the retain data's curvature, so that a step goes where these data do not mind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from semu_peft.arguments import check_kind, check_number
from semu_peft.gradients.statistics import CoreCovariance

from .base import Rule, Step
from .matrices import TrainedMatrix, of_layer, trained_matrices


@dataclass(eq=False)
class Precondition(Rule):
    """Divide each matrix's gradient by the two factors of a curvature: `G ← (B + λ_B I)⁻¹ G (A + λ_A I)⁻¹`.

    `B ⊗ A` is K-FAC's curvature of the retain loss, `A = E[x xᵀ]` of a layer's inputs and `B = E[g gᵀ]` of its output
    gradients. A step of SGD is then, to second order, the one that gains the most on the forget data for a given rise
    of the retain loss. In a linear regression, with `A` the retain inputs' `Xᵀ X` and no `B`, one step of rate 1 down
    the retain loss, that is up the forget loss from the optimum of both, is retraining without the forget rows.

    Of a SEMU core the gradient is `Uᵀ G V`, and the factors become `Uᵀ B U` and `Vᵀ A V`.

    Source: K-FADE, arXiv 2602.10568, in the form that its abstract implies: no code is public. K-FAC: Martens and
    Grosse 2015, arXiv 1503.05671.

    Args:
        inputs: `A` by layer name, `(n, n)`, or within the core's bases `(r, r)`.
        outputs: `B` by layer name, `(m, m)` or `(r, r)`; the identity for layers that are not named.
        damping: `λ_A` and `λ_B`, relative to the mean of the factor's diagonal; 0 divides by the factors themselves.

    Raises:
        TypeError: The factors are no mappings, `damping` is no number.
        ValueError: `damping` is negative; in a run, a factor does not fit or cannot be divided by.

    Examples:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> layer.weight.grad = torch.tensor([[1.0, 1.0]])
        >>> step = Step(0, torch.nn.Sequential(layer), {"0.weight": layer.weight})
        >>> with torch.no_grad():
        ...     Precondition({"0": torch.diag(torch.tensor([2.0, 4.0]))}, damping=0).gradients(step)
        >>> layer.weight.grad
        tensor([[0.5000, 0.2500]])
    """

    needs_whole_parameters = True

    inputs: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    outputs: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    damping: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("inputs", "outputs"):
            check_kind(name, getattr(self, name), Mapping, "a mapping from layer names to factors", "Gather them.")
        check_number("damping", self.damping, low=0)

    @classmethod
    def by(cls, covariances: Mapping[str, object], damping: float = 1e-3) -> Precondition:
        """With the factors that were gathered as `LayerCovariance` or `CoreCovariance`."""
        found = {name: each for name, each in covariances.items() if isinstance(each, CoreCovariance)}
        if len(found) < len(covariances):
            raise ValueError(
                "`covariances` must be gathered as `LayerCovariance` or `CoreCovariance`, got others among them. Use "
                "`gather(model, retain, objective, statistic=LayerCovariance)`."
            )
        factors = {name: (each.inputs, each.outputs) for name, each in found.items()}
        return cls(
            {name: a for name, (a, _) in factors.items()}, {name: b for name, (_, b) in factors.items()}, damping
        )

    def gradients(self, step: Step) -> None:
        matrices = trained_matrices(step)
        known = {name for matrix in matrices for name in (matrix.layer, matrix.name)}
        if odd := [name for name in {**self.inputs, **self.outputs} if name not in known]:
            raise ValueError(
                f"`inputs` and `outputs` must name trained layers, got {odd[:3]}. The run trains {sorted(known)[:3]} …"
            )
        for matrix in matrices:
            gradient = step.parameters[matrix.name].grad
            inner, outer = of_layer(self.inputs, matrix), of_layer(self.outputs, matrix)
            if gradient is None or (inner is None and outer is None):
                continue
            wide = matrix.read(gradient).double()
            if inner is not None:
                wide = self._divided(wide.mT, inner, matrix.right, matrix, "inputs").mT
            if outer is not None:
                wide = self._divided(wide, outer, matrix.left, matrix, "outputs")
            gradient.copy_(matrix.write(wide))

    def _divided(self, wide: Tensor, factor: Tensor, basis: Tensor | None, matrix: TrainedMatrix, side: str) -> Tensor:
        """`(F + λ I)⁻¹ wide`."""
        factor, size = factor.to(wide), wide.shape[-2]
        if basis is not None and factor.shape[-1] == basis.shape[-2] and factor.shape[-1] != size:
            factor = basis.to(wide).mT @ factor @ basis.to(wide)
        if factor.shape[-2:] != (size, size) or matrix.kind == "diagonal":
            raise ValueError(
                f"`{side}` of layer {matrix.layer!r} must be of shape ({size}, {size}), of a core that is full, got "
                f"{tuple(factor.shape)}. Gather it at this model, with `SemuConfig(core='full')`."
            )
        scale = factor.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        identity = torch.eye(size, dtype=wide.dtype, device=wide.device)
        lower, failed = torch.linalg.cholesky_ex(factor + self.damping * scale * identity)
        if failed.any():
            raise ValueError(
                f"`damping` must be larger, got {self.damping}: the {side} of layer {matrix.layer!r} span less than "
                f"the {size} dimensions that there are. Take 1e-3."
            )
        return torch.cholesky_solve(wide, lower)
