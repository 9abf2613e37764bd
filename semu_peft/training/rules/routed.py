"""Gradients on two paths: what a few sharp examples say changes some weights, and the rest the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from semu_peft.arguments import check_kind, check_model, check_number, check_positive, check_switch
from semu_peft.gradients.gather import check_loss
from semu_peft.model_state import device_of, eval_mode
from semu_peft.objectives.base import LossFunction, as_objective
from semu_peft.objectives.examples import Examples

from .base import Rule, Step


@dataclass(eq=False)
class RoutedGradient(Rule):
    """`G ← ω ĝ ∘ m + (G − ĝ) ∘ (1 − m)`, with `ĝ` the projection of `G` on a direction.

    Where a class was learnt by a shortcut, plain ascent forgets the shortcut and the class comes back without it. Here
    the part along the mean gradient of the *causal* examples changes the weights that those depend on, and the rest
    changes the others. The projection is over all parameters together.

    Source: CUPID, AAAI 2026, arXiv 2602.21773. No code exists: this is built from the equations, as a rule for any
    forget objective (there `GradientAscent`); step sizes and the number of epochs are not known.

    Args:
        causal: The direction by parameter name: the mean gradient of the forget loss on the sharpest examples, of
            [`example_sharpness`][semu_peft.training.rules.routed.example_sharpness] and
            [`gradients_of_parameters`][semu_peft.training.rules.mask.gradients_of_parameters]. The sign does not count.
        masks: `m` by parameter name, True where the weights serve the causal examples, see
            [`causal_mask`][semu_peft.training.rules.routed.causal_mask].
        weight: ω.

    Raises:
        TypeError: An argument is no mapping.
        ValueError: The two name different parameters, or the direction is zero; in a run, they do not fit it.

    Examples:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> causal, mask = torch.tensor([2.0, 0.0]), torch.tensor([True, False])
        >>> rule = RoutedGradient({"w": causal}, {"w": mask}, weight=0.5)
        >>> rule.gradients(Step(0, nn.Identity(), {"w": weight}))
        >>> weight.grad
        tensor([1.5000, 4.0000])
    """

    needs_whole_parameters = True

    causal: Mapping[str, Tensor] = field(repr=False)
    masks: Mapping[str, Tensor] = field(repr=False)
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_kind("causal", self.causal, Mapping, "a mapping by parameter name", "See `gradients_of_parameters`.")
        check_kind("masks", self.masks, Mapping, "a mapping by parameter name", "See `causal_mask`.")
        check_number("weight", self.weight)
        if self.causal.keys() != self.masks.keys():
            raise ValueError("`masks` must be of the same parameters as `causal`. Make both of the same names.")
        if not any(bool(direction.any()) for direction in self.causal.values()):
            raise ValueError("`causal` must not be zero everywhere. Take examples that the model is not certain of.")

    def gradients(self, step: Step) -> None:
        gradients = step.gradients
        if not gradients.keys() <= self.causal.keys():
            missing = sorted(gradients.keys() - self.causal.keys())[:3]
            raise ValueError(f"`causal` must name all that is trained, got nothing for {missing}. Gather it anew.")
        directions = {name: self.causal[name].to(gradient) for name, gradient in gradients.items()}
        length = sum(float(direction.float().square().sum()) for direction in directions.values())
        along = sum(float((gradient.float() * directions[name].float()).sum()) for name, gradient in gradients.items())
        for name, gradient in gradients.items():
            part = directions[name] * (along / length if length else 0.0)
            mask = self.masks[name].to(gradient)
            gradient.copy_(self.weight * part * mask + (gradient - part) * (1 - mask))


def causal_mask(parameters: Mapping[str, Tensor], curvature: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`½ θ_i² H_ii ≥ median`: the half of the entries that the causal examples' loss depends on most.

    Args:
        parameters: `θ` by name. Of an adapter that starts at zero it says nothing: take plain weights.
        curvature: The diagonal of the Hessian of the loss on the causal examples, by some of these names; squared
            gradients stand for it.

    Raises:
        ValueError: `curvature` names a parameter that is not there.

    Examples:
        >>> theta = {"w": torch.tensor([1.0, 2.0, 0.0, 1.0])}
        >>> causal_mask(theta, {"w": torch.tensor([1.0, 1.0, 9.0, 0.5])})
        {'w': tensor([ True,  True, False, False])}
    """
    if not curvature or not curvature.keys() <= parameters.keys():
        raise ValueError("`curvature` must be of some of the `parameters`, by their names. Gather it of this model.")
    scores = {name: 0.5 * parameters[name].detach().square() * each for name, each in curvature.items()}
    flat = torch.cat([score.flatten().cpu().float() for score in scores.values()])
    median = torch.quantile(flat, 0.5) if len(flat) < 2**24 else flat.median()
    return {name: score >= median.to(score) for name, score in scores.items()}


def example_sharpness(
    model: nn.Module, batches: Iterable[Any], objective: LossFunction, *, radius: float = 0.1, progress: bool = True
) -> Tensor:
    """`L(θ + η g / ‖g‖, x) − L(θ, x)` with `g = ∇L(θ, x)`: how steeply each example's loss rises around the weights.

    Where a model has learnt a shortcut, the examples that it does not fit are among the sharpest; CUPID takes the
    sharpest 5% of the forget examples as the causal set (arXiv 2602.21773).

    Args:
        model: The model; its trainable parameters move and come back.
        batches: The forget batches, gone through once; each example takes three passes of its own.
        objective: The loss, such as `CrossEntropy()`.
        radius: η.
        progress: Show a progress bar.

    Returns:
        One value an example in the order of the batches, `(N,)`, float32.

    Raises:
        ValueError: Nothing can be trained, a loss has no gradient, or there is no example.

    Examples:
        >>> from semu_peft.objectives import CrossEntropy
        >>> batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
        >>> bool((example_sharpness(nn.Linear(3, 2), batches, CrossEntropy(), progress=False) > 0).all())
        True
    """
    check_model(model)
    check_positive("radius", radius)
    check_switch("progress", progress)
    loss_of, examples, device = as_objective(objective), Examples(batches), device_of(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.numel()]
    if not parameters:
        raise ValueError("`model` has no trainable parameter. Set `requires_grad` of those that are to be moved.")
    begun = [parameter.detach().clone() for parameter in parameters]
    found = []
    with eval_mode(model):
        for number, row in enumerate(tqdm(examples.rows, desc="Sharpness", disable=not progress, leave=False)):
            batch = send_to_device(examples.batches_of([row])[0], device)
            with torch.enable_grad():
                loss = loss_of(model, batch)
                check_loss(loss, f"example {number}")
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            norm = torch.stack([each.float().norm() for each in gradients if each is not None]).norm()
            try:
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        if gradient is not None:
                            parameter.add_(radius * gradient / norm.clamp_min(1e-30).to(gradient))
                    found.append((loss_of(model, batch) - loss).float().reshape(()).cpu())
            finally:
                with torch.no_grad():
                    for parameter, value in zip(parameters, begun, strict=True):
                        parameter.copy_(value)
    return torch.stack(found).detach()
