"""How a recommender ranks: what was forgotten among what a user never chose, and whether the rest is found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from semu_peft.arguments import check_count, check_kind


@dataclass(frozen=True)
class RankingMetrics:
    """How high interactions are ranked among the other items of their users.

    Attributes:
        auc: The share of other items that an interaction is scored above, the mean over interactions; chance is 0.5.
            Forgotten interactions are to be where a model has them that never saw them.
        recall: The share of a user's interactions among the first `k`, of the first `k` that there can be. Of items
            with one score it is the mean over all orders of these, as of the gain.
        ndcg: The same discounted by rank, `Σ 1 / log2(rank + 1)` over its best value.
        k: How many items are shown.

    Examples:
        >>> RankingMetrics(0.5, 0.1, 0.2, 20)
        RankingMetrics(auc=0.500, recall@20=0.100, ndcg@20=0.200)
    """

    auc: float
    recall: float
    ndcg: float
    k: int

    def __repr__(self) -> str:
        return f"RankingMetrics(auc={self.auc:.3f}, recall@{self.k}={self.recall:.3f}, ndcg@{self.k}={self.ndcg:.3f})"


def evaluate_ranking(
    scores: Tensor, interactions: Tensor, *, known: Tensor | None = None, k: int = 20
) -> RankingMetrics:
    """Rank the items of each user by their scores, and look where some interactions are.

    Args:
        scores: Of all items for all users, `(users, items)`.
        interactions: Pairs `(user, item)` to look for, `(N, 2)`.
        known: Other pairs, `(M, 2)`, which are neither looked for nor in the way, such as those trained on.
        k: How many items are shown.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: The shapes do not fit, there is no pair, a user has nothing but interactions, or a score is NaN.

    Examples:
        >>> scores = torch.tensor([[0.9, 0.5, 0.1, 0.7]])
        >>> evaluate_ranking(scores, torch.tensor([[0, 1]]), k=1)  # above one of three others
        RankingMetrics(auc=0.333, recall@1=0.000, ndcg@1=0.000)
        >>> evaluate_ranking(scores, torch.tensor([[0, 1]]), known=torch.tensor([[0, 0], [0, 3]]), k=1)
        RankingMetrics(auc=1.000, recall@1=1.000, ndcg@1=1.000)
    """
    check_kind("scores", scores, Tensor, "a tensor (users, items)", "Score all pairs first.")
    check_count("k", k)
    wanted = _marked("interactions", interactions, scores)
    if scores.isnan().any():  # which compares as nothing, and is sorted to the front
        raise ValueError(
            f"`scores` must be numbers without NaN, got {int(scores.isnan().sum())} of {scores.numel()}. A model that "
            "gives NaN has diverged: lower the learning rate."
        )
    hidden = torch.zeros_like(wanted) if known is None else _marked("known", known, scores) & ~wanted
    if not bool(wanted.any()):
        raise ValueError("`interactions` must hold a pair at least, got none. Give what is to be looked for.")
    others = ~wanted & ~hidden
    users = wanted.any(1).nonzero().squeeze(1)
    if not bool(others[users].any(1).all()):
        raise ValueError("`interactions` must leave each user an item without, got one who has all. Leave it out.")
    user, item = wanted.nonzero().unbind(1)
    own, rest = scores[user, item].double()[:, None], scores[user].double()
    below = ((rest < own) + 0.5 * (rest == own)) * others[user]
    auc = below.sum(1) / others[user].sum(1)
    shown = min(k, scores.shape[1])
    # An item has each of the ranks of those with its score equally often: after `first` others, up to `last`.
    first, tied = ((place & ~hidden[user]).sum(1) for place in (rest > own, rest == own))
    last = (first + tied).clamp(max=shown)
    first = first.clamp(max=shown)
    gains = 1 / torch.arange(2, shown + 2, device=scores.device).double().log2()
    until = torch.cat([gains.new_zeros(1), gains.cumsum(0)])
    found, gained = (
        until.new_zeros(len(scores)).index_add(0, user, each / tied)[users]
        for each in ((last - first).double(), until[last] - until[first])
    )
    most = wanted[users].sum(1).clamp(max=shown)
    recall, ndcg = found / most, gained / until[most]
    return RankingMetrics(float(auc.mean()), float(recall.mean()), float(ndcg.mean()), k)


def _marked(name: str, pairs: Tensor, scores: Tensor) -> Tensor:
    check_kind(name, pairs, Tensor, "a tensor (N, 2)", "Stack users and items: `torch.stack([users, items], 1)`.")
    if scores.dim() != 2 or pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(
            f"`{name}` must be pairs (N, 2) beside `scores` (users, items), got {tuple(pairs.shape)} and "
            f"{tuple(scores.shape)}. Write `torch.stack([users, items], 1)`."
        )
    most = torch.tensor(scores.shape, device=pairs.device)
    if pairs.numel() and (pairs.is_floating_point() or ((pairs < 0) | (pairs >= most)).any()):
        raise ValueError(
            f"`{name}` must be integers, users from 0 to {scores.shape[0] - 1} and items to {scores.shape[1] - 1}, got "
            f"{pairs.dtype} from {pairs.amin(0).tolist()} to {pairs.amax(0).tolist()}. Leave padding out."
        )
    marked = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    marked[pairs[:, 0].long(), pairs[:, 1].long()] = True
    return marked
