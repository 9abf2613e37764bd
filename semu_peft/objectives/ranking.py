"""Objectives for recommenders: which of two items a user is to be shown first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft.arguments import check_count, check_kind

from .base import Objective

_KEYS = ("users", "items", "negatives")


@dataclass
class BPR(Objective):
    """`−log σ(s(user, item) − s(user, negative))`: an item that a user chose comes before one that they did not.

    The model is called as `model(users, items)` and returns one score a pair, `(N,)`. A batch is a tuple
    `(users, items, negatives)` or a mapping with these keys; negatives come from
    [`sample_negatives`][semu_peft.objectives.ranking.sample_negatives].

    Source: Bayesian personalised ranking, Rendle et al., UAI 2009, arXiv 1205.2618.

    Raises:
        TypeError: A batch is neither.
        ValueError: There is not one score a pair.

    Examples:
        >>> from semu_peft.objectives import BPR
        >>> model = lambda users, items: items.float()  # the later the item, the higher its score
        >>> round(BPR()(model, (torch.tensor([0]), torch.tensor([3]), torch.tensor([3]))).item(), 4)  # log 2
        0.6931
    """

    minimum = 0.0
    forgets = False

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        users, chosen, other = _pairs(batch)
        return F.softplus(-self.margin(_scores(model, users, chosen), _scores(model, users, other))).mean()

    def margin(self, chosen: Tensor, other: Tensor) -> Tensor:
        """How far the pair is in the wanted order, `(N,)`."""
        return chosen - other


@dataclass
class ReverseBPR(BPR):
    """`−log σ(s(user, negative) − s(user, item))`: an interaction that is to be forgotten comes after the others.

    The pair is swapped, which is all: its gradient is +½ on the item's score where both are alike. One public
    re-implementation changes the sign of the loss and of the difference at once and raises the item instead.

    Source: MMRecUn, arXiv 2405.15328; see
    [`methods.mmrecun`][semu_peft.methods.multimodal.mmrecun].

    Examples:
        >>> from semu_peft.objectives import BPR, ReverseBPR
        >>> model, batch = lambda users, items: items.float(), (torch.tensor([0]), torch.tensor([3]), torch.tensor([1]))
        >>> round(ReverseBPR()(model, batch).item(), 4), round(BPR()(model, batch).item(), 4)  # a difference of 2
        (2.1269, 0.1269)
    """

    def margin(self, chosen: Tensor, other: Tensor) -> Tensor:
        return other - chosen


def sample_negatives(users: Tensor, items: Tensor, num_items: int, *, seed: int = 0) -> Tensor:
    """For each interaction an item that its user has none with, evenly drawn.

    Args:
        users: The users of all known interactions, `(N,)`.
        items: Their items, `(N,)`.
        num_items: How many items there are.
        seed: Of the draw.

    Raises:
        TypeError: `users` or `items` is no tensor.
        ValueError: They differ in shape, an item has a number that there is not, or a user has chosen every item.

    Examples:
        >>> users, items = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])
        >>> sample_negatives(users, items, 3)[:2]  # the only one left for the first user
        tensor([2, 2])
    """
    for name, value in (("users", users), ("items", items)):
        check_kind(name, value, Tensor, "a tensor of numbers", "Number users and items from 0 on.")
    check_count("num_items", num_items)
    if users.shape != items.shape or users.dim() != 1:
        raise ValueError(f"`items` must be one a user, {tuple(users.shape)}, got {tuple(items.shape)}. Give pairs.")
    if len(items) and not 0 <= int(items.min()) <= int(items.max()) < num_items:
        raise ValueError(f"`items` must be from 0 to {num_items - 1}, got up to {int(items.max())}. Renumber them.")
    known = torch.unique(users.cpu().long() * num_items + items.cpu().long())
    _, counts = torch.unique(known // num_items, return_counts=True)
    if len(counts) and int(counts.max()) == num_items:
        raise ValueError("`users` must each have an item that is left, got one who chose all. Leave it out.")
    generator, own = torch.Generator().manual_seed(seed), users.cpu().long()
    drawn = torch.randint(num_items, own.shape, generator=generator)
    while (taken := torch.isin(own * num_items + drawn, known)).any():
        drawn[taken] = torch.randint(num_items, (int(taken.sum()),), generator=generator)
    return drawn.to(items)


def _pairs(batch: Any) -> tuple[Any, Any, Any]:
    if isinstance(batch, Mapping) and set(_KEYS) <= set(batch):
        return batch["users"], batch["items"], batch["negatives"]
    if isinstance(batch, (tuple, list)) and len(batch) == 3:
        return batch[0], batch[1], batch[2]
    raise TypeError(
        f"A batch must be `(users, items, negatives)` or a mapping with these keys, got {type(batch).__name__}. Draw "
        "the negatives by `sample_negatives(users, items, num_items)`."
    )


def _scores(model: nn.Module, users: Any, items: Any) -> Tensor:
    scores: Tensor = model(users, items)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.squeeze(-1) if scores.dim() > 1 else scores
    if scores.shape != users.shape:
        raise ValueError(
            f"`model(users, items)` must return one score a pair, {tuple(users.shape)}, got {tuple(scores.shape)}. "
            "Wrap a model that scores all items."
        )
    return scores
