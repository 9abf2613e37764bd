"""Objectives that make answers less likely than the original finds them, each answer as a whole: a sigmoid of a margin.

`−2/β log σ(β · margin)`, the mean over answers: bounded below by zero, and its push fades once the margin is many times
`1/β`. They differ in what the margin is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft.arguments import check_number, check_positive

from .batches import Tokens
from .language import SequenceObjective


@dataclass
class NPO(SequenceObjective):
    """`2/β log(1 + (p(y | x) / p₀(y | x))^β)` of whole answers (Zhang et al. 2024, arXiv 2404.05868).

    The margin is `N − N₀`, how much less likely the answer is now, `N = −Σ log p` over its tokens, not divided by their
    number. At the original the gradient is that of `log p(y | x)` for every β; it fades as the answer becomes unlikely,
    the later the smaller β is.

    Args:
        beta: How soon the push fades, β.
        reference: A frozen original model. By default the model itself without its adapter.

    Raises:
        ValueError: `beta` is not above zero.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import NPO
        >>> batch = (torch.zeros(2, 4), torch.tensor([0, 1]))  # the inputs are the logits
        >>> model = torch.nn.Identity()
        >>> round(NPO(reference=model)(model, batch).item(), 4)  # 2/β log 2 at the original
        13.8629
    """

    beta: float = 0.1
    reference: nn.Module | None = field(default=None, repr=False)
    minimum = 0.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)

    def prepare(self, model: nn.Module, batch: Any) -> Tensor:
        tokens = self._original_tokens(model, batch, self.reference)
        return tokens.sums(tokens.nll())

    def token_loss(self, tokens: Tokens, prepared: Any) -> Tensor:
        return _sigmoid_margin(tokens.sums(tokens.nll()) - prepared, self.beta)


@dataclass
class SimNPO(SequenceObjective):
    """NPO without a reference, `−2/β log σ(β (n − δ))` with `n = −1/|y| log p(y | x)` (Fan et al. 2024, 2410.07163).

    The likelihood is a mean over an answer's tokens, so that long answers do not count for more.

    Args:
        beta: How soon the push fades, β.
        delta: The negative log-likelihood per token that is aimed at, δ, before the push has half faded.

    Raises:
        ValueError: `beta` is not above zero.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import SimNPO
        >>> batch = (torch.zeros(2, 4), torch.tensor([0, 1]))  # the inputs are the logits
        >>> round(SimNPO(beta=1.0)(torch.nn.Identity(), batch).item(), 4)  # 2 log(1 + 1/4)
        0.4463
    """

    beta: float = 4.5
    delta: float = 0.0
    minimum = 0.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_number("delta", self.delta)

    def token_loss(self, tokens: Tokens, prepared: Any) -> Tensor:
        return _sigmoid_margin(tokens.means(tokens.nll()) - self.delta, self.beta)


def _sigmoid_margin(margin: Tensor, beta: float) -> Tensor:
    """`−2/β log σ(β · margin)`, the mean."""
    return 2.0 / beta * F.softplus(-beta * margin).mean()
