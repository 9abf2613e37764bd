"""Objectives that read no labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base import Objective
from .batches import is_encoder_decoder, logits_of, named_for_task, placed_inputs, split_batch


@dataclass
class SquaredLogits(Objective):
    """`mean ‖logits‖²`: how strongly a model answers, which says what its weights matter for without any label.

    Of tokens it is the mean over those that are no padding, prompts as well as answers.

    Source: LFSSD, Foster et al. 2024, arXiv 2402.19308: the importance of a weight is the absolute value of this
    gradient, [`AbsoluteSum`][semu_peft.gradients.parameters.AbsoluteSum].

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import SquaredLogits
        >>> SquaredLogits()(torch.nn.Identity(), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))  # the inputs are the logits
        tensor(13.)
    """

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        logits = logits_of(run_without_labels(model, batch))
        squares = logits.to(torch.promote_types(logits.dtype, torch.float32)).square().sum(-1)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if isinstance(mask, Tensor) and mask.shape == squares.shape and not is_encoder_decoder(model):
            squares = squares[mask.to(squares.device).bool()]
        return squares.mean()


def run_without_labels(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch whose labels, if it has any, are left out; read as `run_batch` does otherwise.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.label_free import run_without_labels
        >>> run_without_labels(torch.nn.ReLU(), (torch.tensor([-1.0, 2.0]), torch.tensor([0, 1])))
        tensor([0., 2.])
    """
    inputs: tuple[Any, ...]
    if isinstance(batch, Tensor):
        inputs, named = (batch,), {}
    elif isinstance(batch, Mapping) and not {"labels", "label"} & set(batch):
        inputs, named = (), dict(batch)
    elif isinstance(batch, (tuple, list)) and len(batch) == 1:
        inputs, named = (batch[0],), {}
    else:
        inputs, named, _ = split_batch(batch)
    inputs, named = named_for_task(model, inputs, placed_inputs(model, named))
    return model(*inputs, **named)
