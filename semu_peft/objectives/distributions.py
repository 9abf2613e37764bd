"""What a model's output says as a distribution: how far two outputs are apart, and random square roots of its Fisher.

A denoiser's prediction is the mean of a Gaussian of variance ½, whose negative log-likelihood is the squared error. All
values are means over rows (examples or tokens) of logits, or over the numbers of a prediction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Distribution, Outputs

_INDEPENDENT_DRAWS = 2**20  # above that many, rows share one draw up to its sign


def divergence(distribution: Distribution, before: Tensor, after: Tensor) -> Tensor:
    """`KL(before ‖ after)` of two outputs for the same inputs, a scalar in nats.

    Args:
        distribution: What the outputs are.
        before: Logits `(T, classes)`, or a prediction of any shape. No gradient is taken through them.
        after: The same of another state of the model.

    Examples:
        >>> before, after = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> round(divergence("categorical", before, after).item(), 4)  # ½ log ¼ − ½ log p₀ p₁
        0.1201
        >>> divergence("gaussian", torch.zeros(2, 3), torch.full((2, 3), 0.5)).item()
        0.25
    """
    before, after = before.detach().float(), after.float()
    if distribution == "gaussian":
        return F.mse_loss(after, before)
    return F.kl_div(after.log_softmax(-1), before.log_softmax(-1), reduction="batchmean", log_target=True)


def strike_out(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits `(T, classes − 1)` of all classes but each row's label: what a model says of its other answers.

    Examples:
        >>> strike_out(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([0, 2]))
        tensor([[2., 3.],
                [4., 5.]])
    """
    rows, classes = logits.shape
    others = torch.arange(classes, device=logits.device) != labels.unsqueeze(1)
    return logits[others].view(rows, classes - 1)


@torch.no_grad()
def answer_probability(outputs: Sequence[Outputs]) -> Tensor | None:
    """The mean probability of the labels, `()`, of all outputs that have any; None where none has.

    Examples:
        >>> answer_probability([Outputs(torch.zeros(3, 4), torch.tensor([0, 1, 2]))])
        tensor(0.2500)
    """
    told = [
        output.values.detach().float().softmax(-1).gather(1, output.labels.unsqueeze(1)).mean()
        for output in outputs
        if output.labels is not None
    ]
    return torch.stack(told).mean() if told else None


def probe(
    distribution: Distribution, outputs: Tensor, generator: torch.Generator, *, before: int = 0, after: int = 0
) -> Tensor:
    """A scalar whose gradients, example by example, are random vectors `v` with `E[Σ v vᵀ] = F`, the Fisher matrix.

    `F` is the second derivative of the mean divergence in whatever the outputs depend on. The seed of the backward pass
    is `B z` with random signs `z` and a square root `B` of the output's own Fisher matrix: for a softmax
    `B = diag(√p) − p √pᵀ`, which stays informative where a label drawn from a confident `p` would tell nothing; for a
    Gaussian the identity.

    Args:
        distribution: What the outputs are.
        outputs: Logits `(T, classes)`, or a prediction `(N, …)`, with their graph.
        generator: Draws the signs, on the CPU.
        before: How many rows other processes have before this one's in the same step.
        after: How many they have after it.

    Examples:
        >>> logits = torch.zeros(1, 2, requires_grad=True)
        >>> (gradient,) = torch.autograd.grad(probe("categorical", logits, torch.Generator().manual_seed(0)), logits)
        >>> gradient.T @ gradient  # p (1 − p) on the diagonal, or half of the time nothing
        tensor([[ 0.5000, -0.5000],
                [-0.5000,  0.5000]])
    """
    rows = outputs.flatten(1) if outputs.dim() > 1 else outputs.unsqueeze(1)
    number, width = rows.shape
    total = before + number + after
    if total * width <= _INDEPENDENT_DRAWS:
        signs = _signs((total, width), generator)[before : before + number]
    else:
        signs = _signs((1, width), generator) * _signs((total, 1), generator)[before : before + number]
    with torch.no_grad():
        signs = signs.to(rows.device, torch.promote_types(rows.dtype, torch.float32))
        if distribution == "gaussian":
            seed = signs * (2.0 / (total * width)) ** 0.5
        else:
            probabilities = rows.to(signs.dtype).softmax(-1)
            root = probabilities.sqrt()
            seed = (root * signs - probabilities * (root * signs).sum(-1, keepdim=True)) / total**0.5
    return (rows.to(seed.dtype) * seed).sum()


def _signs(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1
