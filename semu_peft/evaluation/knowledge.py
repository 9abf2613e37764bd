"""How much a model knows of some batches, as one number in percent: what attacks measure before and after."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from semu_peft.model_state import device_of, eval_mode
from semu_peft.objectives.base import LossFunction, as_objective
from semu_peft.objectives.batches import split_batch
from semu_peft.objectives.examples import count_examples
from semu_peft.tuner.adapted import find_token_head

from .classification import predict

Measure = Callable[[nn.Module, Sequence[Any]], float]
"""`(model, batches) -> percent`: the more, the better the model knows them."""

Task = Literal["classification", "language", "diffusion"]


def accuracy(model: nn.Module, batches: Sequence[Any]) -> float:
    """The share of examples, pixels or tokens that are recognised, in percent.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation.knowledge import accuracy
        >>> accuracy(nn.Identity(), [(torch.eye(2), torch.tensor([0, 0]))])  # the inputs are the logits
        50.0
    """
    return predict(model, batches, progress=False).accuracy


def answer_probability(model: nn.Module, batches: Sequence[Any]) -> float:
    """The mean probability of the labels, in percent; of language models the mean token probability.

    That is the arithmetic mean over all answers' tokens. The metric `probability` of
    [`evaluate_language`][semu_peft.evaluation.language.evaluate_language] takes the geometric mean of each answer's.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation.knowledge import answer_probability
        >>> answer_probability(nn.Identity(), [(torch.zeros(2, 4), torch.tensor([0, 1]))])
        25.0
    """
    return 100 * float(predict(model, batches, progress=False).confidence.double().mean())


@dataclass(frozen=True)
class LossOfOriginal:
    """The original's loss as a share of the model's, in percent: 100 where it knows them as well as the original.

    For denoisers, whose outputs are no answers. Both are measured with the same draws.

    Args:
        loss: The ordinary training loss, such as `DenoisingLoss(scheduler)`.
        original: The model before it forgot.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation.knowledge import LossOfOriginal
        >>> measure = LossOfOriginal(lambda model, batch: (model(batch) - batch).abs().mean() + 1, nn.Identity())
        >>> measure(nn.Threshold(5.0, 0.0), [torch.ones(3)])  # gives zeros
        50.0
    """

    loss: LossFunction
    original: nn.Module = field(repr=False)

    def __call__(self, model: nn.Module, batches: Sequence[Any]) -> float:
        return 100 * mean_loss(self.original, batches, self.loss) / mean_loss(model, batches, self.loss)


def mean_loss(model: nn.Module, batches: Sequence[Any], loss: LossFunction) -> float:
    """The mean of a loss over the examples, always with the same random draws.

    Each batch counts by its examples. A loss that is a mean over something else, such as the tokens of answers, depends
    on which examples are in one batch: compare models on the same batches.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation.knowledge import mean_loss
        >>> mean_loss(nn.Identity(), [torch.ones(3), torch.zeros(1)], lambda model, batch: model(batch).mean())
        0.75
    """
    objective = as_objective(loss)
    state = copy.deepcopy(objective.state_dict())
    device, total, count = device_of(model), 0.0, 0
    try:
        with torch.no_grad(), eval_mode(model):
            for batch in batches:
                size = count_examples(batch) or 1
                total, count = total + size * float(objective(model, send_to_device(batch, device))), count + size
    finally:
        objective.load_state_dict(state)
    return total / max(count, 1)


def task_of(model: nn.Module, batch: Any, learn: LossFunction | None = None) -> Task:
    """What a model is for, told by its batches and its training loss: classes, answers in tokens, or denoising.

    Examples:
        >>> import torch
        >>> task_of(nn.Identity(), (torch.zeros(2, 3), torch.tensor([0, 1]))), task_of(nn.Identity(), {"latents": 0})
        ('classification', 'diffusion')
    """
    loss = None if learn is None else as_objective(learn)
    if (isinstance(batch, Mapping) and "latents" in batch) or (loss is not None and loss.distribution == "gaussian"):
        return "diffusion"
    labels = split_batch(batch)[2]
    speaks = isinstance(labels, Tensor) and labels.dim() == 2 and find_token_head(model) is not None
    return "language" if speaks else "classification"
