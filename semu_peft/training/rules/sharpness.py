"""Gradients taken where the loss is worst nearby, so that what is forgotten lies in a flat place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from semu_peft.objectives.base import finite_number

from .base import Rule, Step, norm_of


@dataclass
class SharpnessAware(Rule):
    """Take the gradient of the loss at the worst point of a ball: `∇L(θ + ρ ∇L / ‖∇L‖)`.

    A minimum that is flat in this sense is harder to leave again, by relearning or rounding. Costs a second forward and
    backward pass a step, of the same batches and random draws. It makes the gradient anew, so other rules for gradients
    come after it, `max_grad_norm` as `ClipGradientNorm`.

    Source: SAM, Foret et al., ICLR 2021, arXiv 2010.01412; for unlearning Fan et al. 2025, arXiv 2502.05374.

    Args:
        radius: `ρ`.

    Raises:
        TypeError: `radius` is no number.
        ValueError: `radius` is not above zero.

    Examples:
        >>> from semu_peft import objectives, unlearn
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> loss = objectives.UniformDistribution()
        >>> unlearn(torch.nn.Linear(4, 3), batches, loss, rules=SharpnessAware(), max_steps=3, progress=False).steps
        3
    """

    radius: float = 0.05

    def __post_init__(self) -> None:
        if finite_number(self.radius, "radius") <= 0:
            raise ValueError(f"`radius` must be above zero, got {self.radius!r}. Take 0.05.")

    def gradients(self, step: Step) -> None:
        data, here = step.needed_data(self), {name: p.detach().clone() for name, p in step.parameters.items()}
        gradients = step.gradients
        norms = [norm_of(gradient, torch.float32) for gradient in gradients.values()]
        norm = torch.stack(norms).norm().item() if norms else 0.0
        if norm == 0:
            return
        try:
            for name, gradient in gradients.items():
                step.parameters[name].add_(gradient, alpha=self.radius / norm)
            worst = data.gradient()
        finally:
            for name, value in here.items():
                step.parameters[name].copy_(value)
        for name, gradient in gradients.items():
            gradient.copy_(worst[name])
