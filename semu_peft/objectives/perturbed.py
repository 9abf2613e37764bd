"""Objectives at the worst hidden states nearby, so that no push inside the model brings back what is forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from semu_peft.arguments import check_count, check_kind, check_positive
from semu_peft.model_state import aside

from .base import Evaluation, LossFunction, PreparedObjective, as_objective
from .representation import find_layer


@dataclass
class PerturbedLatents(PreparedObjective):
    """`max L(h + δ)` over `‖δ‖ ≤ ρ ‖h‖`: an objective at the worst hidden states of one layer, for each example.

    Some gradient steps look for the `δ` that raises the loss most, that is, brings back what it forgets; then the loss
    is minimised there, with `δ` as given. Where [`SharpnessAware`][semu_peft.training.rules.sharpness.SharpnessAware]
    moves the weights, for all examples in the same way, this moves what one layer gives, for each in its own: a change
    `ΔW` of a layer's weight moves its output by `ΔW x`, so that of one layer and one example a ball of weights is one
    of hidden states. Both can be had together. Of a denoiser the layer may be any too, its first convolution for the
    latents themselves.

    Source: latent adversarial training, Casper et al. 2024, arXiv 2403.05030; for unlearning AGT^AO, arXiv 2602.01703
    (layer 10, four steps). See [`methods.lat`][semu_peft.methods.geometry.lat].

    Args:
        objective: The loss `L`.
        layer: Whose output is perturbed: the number of a decoder layer, or the end of a module's name.
        radius: `ρ`, a share of the norm of the layer's output for the example.
        steps: Steps of the search, each of `2 ρ / steps`.

    Raises:
        ValueError: A number is out of range; the model has no such layer, or does not run it.

    Examples:
        >>> from semu_peft.objectives import PerturbedLatents
        >>> model = nn.Sequential(nn.Identity())
        >>> norm = lambda model, batch: model(batch).norm()
        >>> round(PerturbedLatents(norm, "0", radius=0.1)(model, torch.tensor([[3.0, 4.0]])).item(), 4)  # 1.1 · 5
        5.5
    """

    objective: LossFunction
    layer: int | str
    radius: float = field(default=0.1, kw_only=True)
    steps: int = field(default=4, kw_only=True)

    def __post_init__(self) -> None:
        check_kind("layer", self.layer, (int, str), "a layer's number or name", "Write 10, or 'layers.10'.")
        check_positive("radius", self.radius)
        check_count("steps", self.steps)
        self._inner = as_objective(self.objective)
        self.distribution, self.is_random = self._inner.distribution, self._inner.is_random
        self.is_costly, self.turns = self._inner.is_costly, self._inner.turns
        self.is_steady, self.minimum = self._inner.is_steady, self._inner.minimum
        self.forgets = self._inner.forgets

    def prepare(self, model: nn.Module, batch: Any) -> tuple[Any, Tensor]:
        given = self._inner.prepare(model, batch)
        shift: Tensor | None = None
        for _ in range(self.steps):
            gradient, norms = self._look(model, batch, given, shift)
            radii = self.radius * norms
            begun = torch.zeros_like(gradient) if shift is None else shift
            shift = begun + _unit(gradient) * (2 * radii / self.steps)
            shift = _unit(shift) * torch.minimum(_norms(shift), radii)
        assert shift is not None
        return given, shift

    def _look(self, model: nn.Module, batch: Any, given: Any, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gradient of the loss by the shift, and the norms of what the layer gives by itself."""
        name, module = find_layer(model, self.layer)
        with torch.enable_grad(), aside(), _shifted(module, shift, searches=True) as seen:
            loss = self._inner.evaluate(model, batch, given).loss
            if not seen:
                raise ValueError(
                    f"`layer` must be a layer that the model runs, got {name!r}, which it did not. Name another."
                )
            output, leaf = seen[0]
            (gradient,) = torch.autograd.grad(loss, [leaf], allow_unused=True)
        if gradient is None:
            raise ValueError(f"`layer` must have a say in the loss, got {name!r}. Name one below what it reads.")
        return gradient, _norms(output)

    def evaluate(self, model: nn.Module, batch: Any, prepared: tuple[Any, Tensor]) -> Evaluation:
        given, shift = prepared
        with _shifted(find_layer(model, self.layer)[1], shift):
            return replace(self._inner.evaluate(model, batch, given), damage=None)  # that of what nobody runs

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state)


@contextmanager
def _shifted(module: nn.Module, shift: Tensor | None, searches: bool = False) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Add to what a module gives, None being zeros, and yield what it gave and what was added, with a gradient.

    It is added at every call with outputs of that shape, so that activations are recomputed as they were.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def add(_: nn.Module, __: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, (tuple, list)) else output
        if not seen:
            added = torch.zeros_like(first, dtype=torch.float32) if shift is None else shift
            seen.append((first.detach().float(), added.detach().requires_grad_(searches)))
        added = seen[0][1]
        if added.shape != first.shape:
            return output
        moved = first + added.to(first)
        return type(output)([moved, *output[1:]]) if isinstance(output, (tuple, list)) else moved

    handle = module.register_forward_hook(add)
    try:
        yield seen
    finally:
        handle.remove()


def _norms(values: Tensor) -> Tensor:
    """The norm of each example, such that it meets the values."""
    return torch.linalg.vector_norm(values.flatten(1), dim=1).view(-1, *[1] * (values.dim() - 1))


def _unit(values: Tensor) -> Tensor:
    return values / _norms(values).clamp_min(1e-30)
