"""Objectives that match stored logits, those of models that were trained without the forget data or a guess at them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft.arguments import check_kind, check_number

from .base import Objective
from .batches import as_labels, check_batches, split_batch
from .tokens import call_model


@dataclass
class OracleMatching(Objective):
    """`mean (z − t)²`: lead the model's logits to stored ones, example by example.

    The targets are the mean logits of models that were retrained without the forget data (oracle matching), or what
    data attribution says that such a model would answer, see
    [`without_influence`][semu_peft.objectives.matching.without_influence] (datamodel matching; Georgiev et al., ICLR
    2025, arXiv 2410.23232). The authors take the forget examples and three times as many retain examples.

    A batch is a pair `(batch, logits)` as [`pair_with_logits`][semu_peft.objectives.matching.pair_with_logits] makes
    it, so that loaders may shuffle. The released code finds targets by an index that the model is called with.

    Raises:
        TypeError: A batch is no such pair.
        ValueError: The logits are of another shape than the model's.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import OracleMatching
        >>> batch = (torch.tensor([[1.0, 3.0]]), torch.tensor([0]))  # the inputs are the logits
        >>> OracleMatching()(torch.nn.Identity(), (batch, torch.tensor([[1.0, 1.0]]))).item()
        2.0
    """

    distribution = "gaussian"
    minimum = 0.0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        given, targets = _as_pair(batch)
        logits = self.outputs(model, batch)
        if targets.shape != logits.shape:
            raise ValueError(
                f"A batch's stored logits must be of the shape of the model's, {tuple(logits.shape)}, got "
                f"{tuple(targets.shape)}. Store one row an example, of all classes."
            )
        return F.mse_loss(logits, targets.to(logits))

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        logits, _ = call_model(model, _as_pair(batch)[0])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def pair_with_logits(batches: Iterable[Any], logits: Tensor) -> list[tuple[Any, Tensor]]:
    """Put stored logits beside the batches that they are of, in their order.

    Args:
        batches: Batches of examples with one label each.
        logits: One row an example, `(N, classes)`.

    Raises:
        TypeError: `logits` is no tensor, or `batches` are none.
        ValueError: There are more or fewer rows than examples.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import pair_with_logits
        >>> batches = [(torch.zeros(2, 3), torch.tensor([0, 1])), (torch.zeros(1, 3), torch.tensor([2]))]
        >>> [tuple(stored.shape) for _, stored in pair_with_logits(batches, torch.zeros(3, 4))]
        [(2, 4), (1, 4)]
    """
    check_batches(batches)
    check_kind("logits", logits, Tensor, "a tensor (N, classes)", "Stack what the models say: `torch.cat([...])`.")
    every = list(batches)
    sizes = [as_labels(split_batch(batch)[2]).numel() for batch in every]
    if logits.dim() != 2 or len(logits) != sum(sizes):
        raise ValueError(
            f"`logits` must have a row for each of the {sum(sizes)} examples of `batches`, got {tuple(logits.shape)}. "
            "Go through both in one order."
        )
    return list(zip(every, logits.split(sizes), strict=True))


def without_influence(logits: Tensor, influence: Tensor, scale: float = 1.0) -> Tensor:
    """`f̃(x) = f(x) − κ Σ_{i∈F} τ_i(x)`: what a model would say that had not seen the forget examples.

    Args:
        logits: `f`, what the model says of `N` examples, `(N, classes)`.
        influence: `τ`, how much each of `F` forget examples adds to each logit, `(F, N, classes)`: datamodels or
            TRAK scores.
        scale: κ.

    Raises:
        TypeError: An argument is no tensor, or `scale` no number.
        ValueError: The shapes do not fit.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import without_influence
        >>> without_influence(torch.tensor([[1.0, 2.0]]), torch.tensor([[[0.5, 0.0]], [[0.25, 1.0]]]))
        tensor([[0.2500, 1.0000]])
    """
    check_number("scale", scale)
    for name, value in (("logits", logits), ("influence", influence)):
        check_kind(name, value, Tensor, "a tensor", "Write `torch.tensor(...)` of an array.")
    if logits.dim() != 2 or influence.shape[1:] != logits.shape:
        raise ValueError(
            f"`influence` must be (forget examples, N, classes) beside `logits` (N, classes), got "
            f"{tuple(influence.shape)} and {tuple(logits.shape)}. Give scores of every logit."
        )
    return logits - scale * influence.to(torch.promote_types(influence.dtype, torch.float32)).sum(0).to(logits)


def _as_pair(batch: Any) -> tuple[Any, Tensor]:
    is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    if is_pair and not isinstance(batch[0], Tensor) and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    raise TypeError(
        f"A batch must be a pair of an ordinary batch and the logits stored for it, got {type(batch).__name__}. Make "
        "them by `forget = pair_with_logits(forget, logits)`."
    )
