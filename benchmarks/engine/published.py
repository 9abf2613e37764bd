"""The method as its authors released it, in plain PyTorch: the reference that the engine is measured against.

All gradients are computed, kept and summed in full; every one is factorised in full; every step rebuilds the dense
weights, so that autograd forms their dense gradients. Written from the paper (arXiv 2502.07587), not from its code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def extract(
    model: nn.Module,
    names: list[str],
    batches: list[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    explained_variance: float,
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Full `U`, `S`, `Vᵀ` of each target's summed gradient, cut to the rank that explains the energy."""
    model.eval().requires_grad_(True)
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        loss(model, batch).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad
    bases = {}
    for name in names:
        gradient = sums[f"{name}.weight"]
        if gradient.dim() == 4:  # one matrix an input channel
            gradient = gradient.flatten(2).transpose(0, 1)
        u, s, vt = torch.linalg.svd(gradient, full_matrices=False)
        energy = s.square().cumsum(-1)
        rank = int((energy < explained_variance * energy[..., -1:]).sum(-1).max()) + 1
        bases[name] = (u[..., :rank], s, vt[..., :rank, :])
    return bases


class DenseCorrection(nn.Module):
    """`W + U R Vᵀ` as a dense weight, rebuilt whenever the layer is called."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.register_buffer("left", left)
        self.register_buffer("right", right)
        self.core = nn.Parameter(torch.zeros(*left.shape[:-2], left.shape[-1], left.shape[-1]))

    def forward(self, weight: Tensor) -> Tensor:
        delta = self.left @ self.core @ self.right
        if weight.dim() == 4:
            delta = delta.transpose(0, 1)
        return weight + delta.reshape(weight.shape)


def wrap(model: nn.Module, bases: dict[str, tuple[Tensor, Tensor, Tensor]]) -> nn.Module:
    """Put the corrections into the model, everything else frozen."""
    model.requires_grad_(False)
    for name, (left, _, right) in bases.items():
        parametrize.register_parametrization(model.get_submodule(name), "weight", DenseCorrection(left, right))
    return model
