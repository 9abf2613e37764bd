"""Objectives for language models that tell the sequences of a batch apart, and those that only tokens have.

A batch is what [`call_model`][semu_peft.objectives.batches.call_model] reads: labels of −100 and padding do not count,
on whichever side they stand, and sequences packed into one row are told apart by their `position_ids`. All losses are
in float32 whatever the model's dtype. The original model is the model itself without its adapter, not a second copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Evaluation, Outputs
from .batches import Tokens, read_tokens
from .classification import ClassificationObjective
from .original import reference_model


@dataclass
class SequenceObjective(ClassificationObjective):
    """What objectives share that see which sequence each token is of.

    Args:
        shift_labels: Whether a token's label stands one position after its prediction; by default as the model says.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.language import SequenceObjective
        >>> class LongestAnswer(SequenceObjective):
        ...     def token_loss(self, tokens, prepared):
        ...         return tokens.sums(tokens.nll()).max()
        >>> logits, labels = torch.zeros(2, 3, 4), torch.tensor([[-100, 0, 1], [-100, 2, -100]])
        >>> round(LongestAnswer(shift_labels=True)(torch.nn.Identity(), (logits, labels)).item(), 4)  # 2 log 4
        2.7726
    """

    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        tokens = self._read_tokens(model, batch)
        return Evaluation(self.token_loss(tokens, prepared), (Outputs(tokens.logits, tokens.labels),))

    def token_loss(self, tokens: Tokens, prepared: Any) -> Tensor:
        """The loss of a batch's tokens, and of what `prepare` returned for it."""
        raise NotImplementedError

    def _read_tokens(self, model: nn.Module, batch: Any) -> Tokens:
        return read_tokens(model, batch, shift_labels=self.shift_labels).in_float32()

    @torch.no_grad()
    def _original_tokens(self, model: nn.Module, batch: Any, reference: nn.Module | None) -> Tokens:
        """What the reference says, or else the model without its adapter."""
        with reference_model(model, reference) as original:
            return self._read_tokens(original, batch)


@dataclass
class KLToOriginal(ClassificationObjective):
    """`KL(p₀ ‖ p)`, the mean over tokens of how far the model's predictions are from the original's, for retain data.

    It keeps all that the original says on text that need not be what the model was trained on, and is the damage that
    a budget bounds. OpenUnlearning's `KL` averages over prompt and padding as well.

    Args:
        reference: A frozen original model. By default the model itself without its adapter.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import KLToOriginal
        >>> model, uniform = torch.nn.Identity(), lambda x: torch.zeros(1, 2)
        >>> loss = KLToOriginal(reference=uniform)(model, (torch.tensor([[0.0, 1.0]]), torch.tensor([0])))
        >>> round(loss.item(), 4)  # ½ log ¼ − ½ log p₀ p₁
        0.1201
    """

    reference: nn.Module | None = field(default=None, repr=False)
    minimum = 0.0

    def prepare(self, model: nn.Module, batch: Any) -> Tensor:
        return self._read_original(model, batch, self.reference)[0].log_softmax(-1)

    def loss(self, logits: Tensor, labels: Tensor, prepared: Any) -> Tensor:
        return F.kl_div(logits.log_softmax(-1), prepared, reduction="batchmean", log_target=True)
