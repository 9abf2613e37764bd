"""How large a correction may become, and how fast each of its rows grows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from semu_peft.gradients.processes import whole
from semu_peft.objectives.base import finite_number
from semu_peft.training.parameters import shared_out
from semu_peft.tuner.layer import SemuLayer

from .base import Rule, Step, norm_of
from .matrices import trained_matrices


@dataclass
class NormCap(Rule):
    """Keep each layer's correction within a norm: `‖ΔW‖_F ≤ limit` after every step.

    As `U` and `V` are orthonormal, `‖ΔW‖_F = ‖R − R₀‖_F`: a core is scaled back onto the ball, stays of its rank and
    can be exported. Of a parameter that is no core the distance from where the run began is capped, which for a plain
    weight is `‖ΔW‖_F` again.

    Source: for what bounded functions of a low-rank product are made for (bounded PEFT, arXiv 2509.24166), without
    giving up its rank. The projection is that of projected gradient descent.

    Args:
        limit: The largest norm of each parameter's correction.

    Raises:
        TypeError: `limit` is no number.
        ValueError: `limit` is not above zero.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> with torch.no_grad():
        ...     NormCap(1.0).update(Step(0, torch.nn.Identity(), {"weight": weight}, {"weight": torch.zeros(2)}))
        >>> weight.data
        tensor([0.6000, 0.8000])
    """

    limit: float

    def __post_init__(self) -> None:
        if finite_number(self.limit, "limit") <= 0:
            raise ValueError(f"`limit` must be above zero, got {self.limit!r}. Leave the rule out to cap nothing.")
        self._origins: dict[str, Tensor] = {}

    def gradients(self, step: Step) -> None:
        self._note_origins(step)

    def update(self, step: Step) -> None:
        self._note_origins(step)
        for name, parameter in step.parameters.items():
            origin = shared_out(self._origins[name], parameter)
            correction = parameter.detach() - origin
            norm = norm_of(correction, torch.float64).item()
            if norm > self.limit:
                parameter.copy_(origin + correction * (self.limit / norm))

    def _note_origins(self, step: Step) -> None:
        if step.number == 0:
            self._origins = {}
        if self._origins.keys() != step.before.keys():
            offsets = _offsets(step)
            self._origins = {
                name: offsets.get(id(step.parameters[name]), value).detach().clone()
                for name, value in step.before.items()
            }

    def state_dict(self) -> dict[str, Any]:
        return {"origins": {name: whole(origin) for name, origin in self._origins.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._origins = dict(state["origins"])


def _offsets(step: Step) -> dict[int, Tensor]:
    """The cores at which SEMU's layers correct nothing, by the identity of the core that is trained."""
    layers = [each for each in step.model.modules() if isinstance(each, SemuLayer) and "semu_core" in each._modules]
    offsets = {}
    for layer in layers:
        for adapter in layer.semu_core:
            core = layer.semu_core.stored_parameter(adapter)
            has_one = adapter in layer.semu_offset
            offsets[id(core)] = layer.semu_offset[adapter] if has_one else torch.zeros_like(core)
    return offsets


@dataclass
class RowScale(Rule):
    """Scale the gradient of each row of a matrix by how small the row is: `1 / √(‖row‖₂ + 1/η²)`, η for a zero row.

    Rows near zero, as all are where a low-rank factor starts, learn faster and slow down as they grow; the factor
    follows the rows at every step.

    Source: ALLoRA, arXiv 2410.09692, equation 7; made for LoRA's factors, and for any optimiser that keeps the scale of
    a gradient, as SGD does (AdamW divides most of it out again).

    Args:
        eta: `η`.

    Raises:
        TypeError: `eta` is no number.
        ValueError: `eta` is not above zero.

    Examples:
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> layer.weight.data, layer.weight.grad = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.ones(2, 2)
        >>> RowScale(2.0).gradients(Step(0, layer, {"weight": layer.weight}))
        >>> layer.weight.grad
        tensor([[2.0000, 2.0000],
                [0.4364, 0.4364]])
    """

    needs_whole_parameters = True

    eta: float

    def __post_init__(self) -> None:
        if finite_number(self.eta, "eta") <= 0:
            raise ValueError(f"`eta` must be above zero, got {self.eta!r}. Take 2.")

    def gradients(self, step: Step) -> None:
        for matrix in trained_matrices(step):
            parameter = step.parameters[matrix.name]
            if parameter.grad is not None:
                lengths = torch.linalg.vector_norm(matrix.read(parameter.detach()), dim=-1, keepdim=True)
                scale = (lengths + self.eta**-2).rsqrt()
                parameter.grad.copy_(matrix.write(matrix.read(parameter.grad) * scale))
