"""The forget sets that are hardest, or easiest, to show as forgotten."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from semu_peft.arguments import (
    check_count,
    check_kind,
    check_model,
    check_number,
    check_positive,
    check_share,
    check_switch,
)  # fmt: skip
from semu_peft.model_state import device_of, eval_mode
from semu_peft.objectives.batches import check_batches
from semu_peft.objectives.tokens import call_model


def worst_case_forget_set(
    model: nn.Module,
    batches: Iterable[Any],
    share: float,
    *,
    hardest: bool = True,
    rounds: int = 20,
    steps: int = 10,
    learning_rate: float = 1e-3,
    weight_rate: float = 1e-2,
    penalty: float = 1e-4,
    progress: bool = True,
) -> Tensor:
    """Choose the examples that a model still knows best after it was trained on all others.

    `min_w Σ w_i ℓ_i(θ(w)) + γ ‖w‖²` with `θ(w)` a few steps of sign descent on `Σ (1 − w_i) ℓ_i` and `w ∈ [0, 1]ᴺ`,
    `Σ w = share · N`; the largest weights are the set (Fan et al., ECCV 2024, arXiv 2403.07362). A method that is
    judged on such a set has to change what even a retrained model would not forget, so its gap to the retrained model
    says more than on a random set: report the hardest, random and easiest sets together.

    The trained parameters move meanwhile and come back as they were.

    Args:
        model: A classifier that was trained on the examples; its trainable parameters are those that move.
        batches: All training batches, gone through once and kept.
        share: The share of examples to choose.
        hardest: Choose the opposite where False: what is forgotten at once.
        rounds: Steps of the weights.
        steps: Of the model in each round, from where it was.
        learning_rate: Of the model's steps.
        weight_rate: Of the weights' steps.
        penalty: γ.
        progress: Show a progress bar.

    Returns:
        The places of the chosen examples in the order of the batches, `(round(share · N),)`, int64, rising.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: A number is out of range, there is no example, or nothing can be trained.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import worst_case_forget_set
        >>> x = torch.tensor([[5.0, 0.0], [0.0, 5.0], [0.1, 0.0], [0.0, 0.1]])
        >>> model = torch.nn.Linear(2, 2)
        >>> _ = model.weight.data.copy_(torch.eye(2))
        >>> worst_case_forget_set(model, [(x, torch.tensor([0, 1, 0, 1]))], 0.5, progress=False)
        tensor([0, 1])
    """
    check_model(model)
    check_batches(batches)
    check_share("share", share)
    check_switch("hardest", hardest)
    check_count("rounds", rounds)
    check_count("steps", steps)
    check_positive("learning_rate", learning_rate)
    check_positive("weight_rate", weight_rate)
    check_number("penalty", penalty, low=0)
    check_switch("progress", progress)
    device = device_of(model)
    every = [send_to_device(batch, device) for batch in batches]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.numel()]
    if not every or not parameters:
        lacks = "at least one batch, got none" if not every else "a model with a trainable parameter, got none"
        raise ValueError(f"`batches` and `model` must give {lacks}. Check `requires_grad` and the loader.")
    begun = [parameter.detach().clone() for parameter in parameters]
    weights: Tensor | None = None
    direction = 1.0 if hardest else -1.0
    with eval_mode(model):
        for _ in tqdm(range(rounds), desc="Worst case", disable=not progress, leave=False):
            try:
                if weights is not None:
                    _descend(model, every, parameters, 1 - weights, steps, learning_rate)
                with torch.no_grad():
                    losses = torch.cat([_losses(model, batch) for batch in every]).double().cpu()
            finally:
                _put_back(parameters, begun)
            total = max(1, round(share * len(losses)))
            if weights is None:  # the first round finds out how many examples there are
                weights = torch.full_like(losses, total / len(losses))
            gradient = direction * losses + 2 * penalty * weights
            weights = project_to_sum(weights - weight_rate * gradient, total)
    assert weights is not None
    return weights.argsort(descending=True, stable=True)[:total].sort().values


def project_to_sum(values: Tensor, total: float) -> Tensor:
    """The nearest point of `{w ∈ [0, 1]ᴺ, Σ w = total}`: `clip(v − μ, 0, 1)`, with μ found by bisection.

    Args:
        values: `v`, `(N,)`.
        total: What the weights sum to, from 0 to N.

    Raises:
        TypeError: `values` is no tensor.
        ValueError: `total` is not between 0 and N.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation.worst_case import project_to_sum
        >>> project_to_sum(torch.tensor([2.0, 0.5, 0.5, -1.0]), 2)
        tensor([1.0000, 0.5000, 0.5000, 0.0000], dtype=torch.float64)
    """
    check_kind("values", values, Tensor, "a vector", "Write `torch.tensor([...])` of a list.")
    check_number("total", total, low=0, high=values.numel())
    exact = values.double()
    low, high = exact.min() - 1, exact.max()  # all ones, and all zeros
    for _ in range(100):
        middle = (low + high) / 2
        if (exact - middle).clamp(0, 1).sum() > total:
            low = middle
        else:
            high = middle
    return (exact - (low + high) / 2).clamp(0, 1)


def _losses(model: nn.Module, batch: Any) -> Tensor:
    logits, labels = call_model(model, batch)
    return F.cross_entropy(logits.float(), labels, reduction="none")


def _descend(
    model: nn.Module, batches: list[Any], parameters: list[nn.Parameter], weights: Tensor, steps: int, rate: float
) -> None:
    """Sign descent on the weighted losses."""
    for _ in range(steps):
        totals = [torch.zeros_like(parameter) for parameter in parameters]
        at = 0
        for batch in batches:
            with torch.enable_grad():
                losses = _losses(model, batch)
                weighted = losses @ weights[at : at + len(losses)].to(losses)
                found = torch.autograd.grad(weighted, parameters, allow_unused=True)
            at += len(losses)
            for total, gradient in zip(totals, found, strict=True):
                if gradient is not None:
                    total += gradient
        with torch.no_grad():
            for parameter, total in zip(parameters, totals, strict=True):
                parameter.sub_(rate * total.sign())


@torch.no_grad()
def _put_back(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
