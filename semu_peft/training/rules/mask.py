"""Entries that stay what they were, and the scores by which the others are chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from semu_peft.arguments import check_kind, check_model, check_number, check_share
from semu_peft.gradients.gather import check_loss
from semu_peft.gradients.processes import sum_over_processes
from semu_peft.localize.layers import top_mask
from semu_peft.model_state import device_of, eval_mode
from semu_peft.objectives.base import LossFunction, as_objective
from semu_peft.objectives.batches import check_batches

from .base import Rule, Step


@dataclass(eq=False)
class Mask(Rule):
    """Train the entries of a mask alone: all others keep their bits, whatever the optimiser does.

    A mask that only multiplies the gradient freezes nothing: weight decay and momentum go on moving what it hides. Here
    masked entries are put back after each step, and what the optimiser keeps of them is set to zero.

    Source: SalUn, Fan et al., ICLR 2024, arXiv 2310.12508, section 4; WAGLE, Jia et al. 2024, arXiv 2410.17509, for
    the score; both released codes masked gradients alone at first.

    Args:
        masks: By parameter name, True where an entry may be trained, of the parameter's shape. Parameters that are not
            named are trained whole. See [`top_fraction`][semu_peft.training.rules.mask.top_fraction].

    Raises:
        TypeError: A mask is no boolean tensor.
        ValueError: In a run, a mask fits no trained parameter.

    Examples:
        >>> weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> step = Step(0, nn.Identity(), {"weight": weight}, {"weight": torch.tensor([0.0, 0.0])})
        >>> with torch.no_grad():
        ...     Mask({"weight": torch.tensor([True, False])}).update(step)
        >>> weight.data
        tensor([1., 0.])
    """

    needs_whole_parameters = True

    masks: Mapping[str, Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        check_kind("masks", self.masks, Mapping, "a mapping from parameter names to masks", "See `top_fraction`.")
        for name, mask in self.masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"`masks` must hold boolean tensors, got {got} for {name!r}. Write `scores > limit`.")

    def gradients(self, step: Step) -> None:
        for name, hidden in self._hidden(step).items():
            if (gradient := step.parameters[name].grad) is not None:
                gradient.masked_fill_(hidden, 0.0)

    def update(self, step: Step) -> None:
        for name, hidden in self._hidden(step).items():
            parameter = step.parameters[name]
            parameter.copy_(torch.where(hidden, step.before[name], parameter))
            for kept in step.state_of(name).values():
                if isinstance(kept, Tensor) and kept.shape == parameter.shape:
                    kept.masked_fill_(hidden, 0)

    def _hidden(self, step: Step) -> dict[str, Tensor]:
        for name, mask in self.masks.items():
            parameter = step.parameters.get(name)
            if parameter is None or parameter.shape != mask.shape:
                got = "no such parameter" if parameter is None else f"one of shape {tuple(parameter.shape)}"
                raise ValueError(
                    f"`masks` must fit what is trained, got {name!r} of shape {tuple(mask.shape)}, and the run has "
                    f"{got}. Name parameters as `model.named_parameters()` does: {list(step.parameters)[:3]} …"
                )
        return {name: ~mask.to(step.parameters[name].device) for name, mask in self.masks.items()}


def top_fraction(scores: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """Masks of the largest scores over all parameters together, exact to one entry.

    Of equal scores those win that come first, in the mapping's order, as in
    [`top_mask`][semu_peft.localize.layers.top_mask].

    Args:
        scores: By parameter name.
        fraction: The share of all entries that is True, rounded to the nearest entry.

    Raises:
        ValueError: `fraction` is not in (0, 1], or a score is NaN.

    Examples:
        >>> scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([1.0, 0.0])}
        >>> top_fraction(scores, 0.5)
        {'a': tensor([True, True]), 'b': tensor([False, False])}
    """
    check_share("fraction", fraction)
    return top_mask(scores, fraction)


def gradients_of_parameters(
    model: nn.Module, batches: Iterable[Any], objective: LossFunction, *, progress: bool = True
) -> dict[str, Tensor]:
    """The gradient of every trainable parameter, summed over batches: SalUn's saliency is its magnitude.

    In several processes it is summed over these as well, so that all of them make the same mask of it.

    Args:
        model: The model, run in eval mode.
        batches: The batches; tensors are moved to the model's device.
        objective: `(model, batch) -> scalar loss`.
        progress: Show a progress bar.

    Raises:
        ValueError: There is no batch, nothing can be trained, or a loss has no gradient.

    Examples:
        >>> from semu_peft.objectives import CrossEntropy
        >>> batches = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> found = gradients_of_parameters(nn.Linear(4, 3), batches, CrossEntropy(), progress=False)
        >>> masks = top_fraction({name: gradient.abs() for name, gradient in found.items()}, 0.4)
        >>> sum(int(mask.sum()) for mask in masks.values())
        6
    """
    check_model(model)
    check_batches(batches)
    as_objective(objective)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad and each.numel()}
    if not trained:
        raise ValueError("`model` has no trainable parameter. Set `requires_grad` of those that are to be scored.")
    totals = {name: torch.zeros_like(each.detach().float()) for name, each in trained.items()}
    device, number = device_of(model), 0
    with eval_mode(model), torch.enable_grad():
        for batch in tqdm(batches, desc="Gradients", disable=not progress, leave=False):
            loss = objective(model, send_to_device(batch, device))
            check_loss(loss, f"batch {number}")
            found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            for name, gradient in zip(trained, found, strict=True):
                if gradient is not None:
                    totals[name] += gradient
            number += 1
    if not number:
        raise ValueError("`batches` must give at least one batch, got none. An iterator may have been used up before.")
    return {name: sum_over_processes(total) for name, total in totals.items()}


def wagle_scores(
    parameters: Mapping[str, Tensor], forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], mu: float = 1e-6
) -> dict[str, Tensor]:
    """WAGLE's attribution of each entry, `|(θ − g_r / μ) · g_f|`.

    Source: Jia et al. 2024, arXiv 2410.17509, section 4; μ stands for the curvature of the retain loss.

    Args:
        parameters: `θ` by name, such as `dict(model.named_parameters())`.
        forget: `g_f` by name, see [`gradients_of_parameters`][semu_peft.training.rules.mask.gradients_of_parameters].
        retain: `g_r`, by the same names.
        mu: `μ`.

    Examples:
        >>> one = {"w": torch.tensor([1.0])}
        >>> wagle_scores(one, {"w": torch.tensor([3.0])}, {"w": torch.tensor([2.0])}, mu=0.5)
        {'w': tensor([9.])}
    """
    check_number("mu", mu, low=0)
    if mu == 0 or forget.keys() != retain.keys() or not forget.keys() <= parameters.keys():
        raise ValueError("`mu` must be above zero, and `forget` and `retain` of the same of the `parameters`.")
    weights = {name: parameters[name].detach() for name in forget}
    return {name: ((weight - retain[name] / mu) * forget[name]).abs() for name, weight in weights.items()}
