"""Objectives for recommenders by hand, and a toy recommender that forgets some interactions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from semu_peft import SemuConfig, methods
from semu_peft.evaluation import evaluate_ranking
from semu_peft.objectives import BPR, ReverseBPR, sample_negatives

USERS, ITEMS, SIZE = 30, 40, 8


class Factors(nn.Module):
    """A user's and an item's embedding, multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(USERS, SIZE), nn.Embedding(ITEMS, SIZE)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        return (self.user(users) * self.item(items)).sum(-1)


class Scores(nn.Module):
    """One score an item, which is trained."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(scores))

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        return self.scores[items]


def pair(first: int, second: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor([0]), torch.tensor([first]), torch.tensor([second])


@pytest.mark.parametrize(("difference", "value", "gradient"), [(0.0, 0.6931, 0.5), (2.0, 2.1269, 0.8808)])
def test_reverse_bpr_by_hand(difference: float, value: float, gradient: float) -> None:
    """Acceptance: log 2 and +½ on the item where both are alike; it is BPR with the pair swapped."""
    model = Scores([difference, 0.0])
    loss = ReverseBPR()(model, pair(0, 1))
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=1e-4)
    assert model.scores.grad.tolist() == pytest.approx([gradient, -gradient], abs=1e-4)
    assert loss == BPR()(model, pair(1, 0))
    assert loss.item() - BPR()(model, pair(0, 1)).item() == pytest.approx(difference, abs=1e-6)
    assert ReverseBPR()(model, dict(zip(("users", "items", "negatives"), pair(0, 1), strict=True))) == loss


@pytest.mark.parametrize("objective", [BPR(), ReverseBPR()])
def test_half_precision_is_lifted_in_either_form(objective: BPR) -> None:
    users, items, negatives = torch.zeros(4).long(), torch.tensor([3, 3, 3, 3]), torch.tensor([3, 2, 1, 0])
    flat, column = (
        objective(lambda users, items, shape=shape: (items / 300).bfloat16().view(shape), (users, items, negatives))
        for shape in ((-1,), (-1, 1))
    )
    assert flat.dtype == torch.float32 and flat == column


def test_negatives_are_items_without_an_interaction() -> None:
    draw = torch.Generator().manual_seed(0)
    users, items = torch.randint(5, (60,), generator=draw), torch.randint(20, (60,), generator=draw)
    known = set(zip(users.tolist(), items.tolist(), strict=True))
    drawn = sample_negatives(users, items, 20, seed=1)
    assert not known & set(zip(users.tolist(), drawn.tolist(), strict=True))
    assert torch.equal(drawn, sample_negatives(users, items, 20, seed=1))
    assert not torch.equal(drawn, sample_negatives(users, items, 20, seed=2))


def interactions() -> tuple[Tensor, Tensor]:
    """What users of two kinds chose of items of two kinds; the first tenth is to be forgotten, of five users."""
    draw = torch.Generator().manual_seed(0)
    chosen = torch.rand(USERS, ITEMS, generator=draw) < 0.35
    chosen &= torch.arange(USERS)[:, None] % 2 == torch.arange(ITEMS)[None] % 2
    pairs = chosen.nonzero()
    forgotten = (pairs[:, 0] < 10) & (torch.rand(len(pairs), generator=draw) < 0.5)
    return pairs[forgotten], pairs[~forgotten]


def batches(pairs: Tensor, every: Tensor, passes: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    found = []
    for seed in range(passes):
        own = torch.cat([pairs, every])
        drawn = sample_negatives(own[:, 0], own[:, 1], ITEMS, seed=seed)[: len(pairs)]
        found.append((pairs[:, 0], pairs[:, 1], drawn))
    return found


def trained(pairs: Tensor, every: Tensor) -> Factors:
    torch.manual_seed(0)
    model = Factors()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.05)
    for batch in batches(pairs, every, 150):
        optimizer.zero_grad()
        BPR()(model, batch).backward()
        optimizer.step()
    return model


@torch.no_grad()
def auc(model: nn.Module, pairs: Tensor, known: Tensor) -> float:
    every = torch.cartesian_prod(torch.arange(USERS), torch.arange(ITEMS))
    scores = model(every[:, 0], every[:, 1]).view(USERS, ITEMS)
    return evaluate_ranking(scores, pairs, known=known).auc


def test_a_recommender_forgets_interactions() -> None:
    """Acceptance: the forgotten ones fall below where a model has them that never saw them; the rest stays."""
    forget, retain = interactions()
    everything = torch.cat([forget, retain])
    gold, model = trained(retain, everything), trained(everything, everything)
    assert auc(model, forget, retain) > 0.99
    beside = batches(retain, everything, 60)
    methods.mmrecun(
        model, batches(forget, everything, 60), beside, weight=3.0, epochs=1, learning_rate=0.02, progress=False
    )
    assert auc(model, forget, retain) <= auc(gold, forget, retain)
    assert auc(model, retain, forget) >= 0.99


def test_users_and_items_that_are_not_touched_keep_their_bits() -> None:
    """Acceptance: also in a SEMU adapter, whose bases are those of the gradient's rows."""
    forget, retain = interactions()
    every = torch.cat([forget, retain])
    base = trained(every, every)
    users, items, negatives = batches(forget, every, 1)[0]
    model = get_peft_model(base, SemuConfig(target_modules=["user"]))
    methods.mmrecun(model, [(users, items, negatives)], max_steps=5, learning_rate=0.1, progress=False)
    untouched = torch.tensor(sorted(set(range(USERS)) - set(users.tolist())))
    pairs = torch.cartesian_prod(untouched, torch.arange(ITEMS))
    with torch.no_grad():
        after = model(pairs[:, 0], pairs[:, 1])
        touched = model(users, items)
        with model.disable_adapter():
            assert torch.equal(after, model(pairs[:, 0], pairs[:, 1]))
            assert (model(users, items) - touched).abs().max() > 0.1


def test_ranking_by_hand() -> None:
    """Ties count half; recall and gain are of the best that there can be."""
    scores = torch.tensor([[0.9, 0.5, 0.5, 0.1], [0.1, 0.2, 0.3, 0.4]])
    found = evaluate_ranking(scores, torch.tensor([[0, 1], [1, 3], [1, 0]]), k=2)
    assert found.auc == pytest.approx(((1 + 0.5) / 3 + 1 + 0) / 3)
    assert found.recall == pytest.approx((0.5 + 0.5) / 2)
    log3 = 1 / torch.tensor(3.0).log2().item()
    assert found.ndcg == pytest.approx((0.5 * log3 + 1 / (1 + log3)) / 2)


def test_ties_count_as_if_their_order_were_drawn() -> None:
    """Acceptance: constant scores find any item by chance; the mean over all orders, without known items."""
    for item in (0, 49):
        found = evaluate_ranking(torch.zeros(1, 50), torch.tensor([[0, item]]), k=5)
        assert found.recall == pytest.approx(5 / 50) and found.auc == 0.5
    scores, wanted, known = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0, 9.0, 2.0]]), [1, 3, 4], torch.tensor([[0, 5]])
    orders = [[0, *tied, 4] for tied in itertools.permutations([1, 2, 3, 6])]
    discount = 1 / torch.arange(2, 10).double().log2()
    for k in (1, 2, 3, 4, 6, 20):
        hits = torch.tensor([[item in wanted for item in order[:k]] for order in orders]).double()
        best, length = min(3, k), hits.shape[1]
        found = evaluate_ranking(scores, torch.tensor([[0, item] for item in wanted]), known=known, k=k)
        assert found.recall == pytest.approx(float(hits.sum(1).mean()) / best)
        assert found.ndcg == pytest.approx(float((hits @ discount[:length]).mean() / discount[:best].sum()))


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: BPR()(Scores([0.0]), [1]), TypeError, r"must be `\(users, items, negatives\)`"),
        (lambda: BPR()(lambda u, i: torch.zeros(2, 3), pair(0, 1)), ValueError, "must return one score a pair"),
        (lambda: sample_negatives(torch.tensor([0]), torch.tensor([3]), 2), ValueError, "`items` must be from 0"),
        (lambda: sample_negatives(torch.tensor([0]), torch.tensor([0]), 1), ValueError, "`users` must each"),
        (lambda: evaluate_ranking(torch.zeros(2, 2), torch.zeros(3)), ValueError, "`interactions` must be pairs"),
        (lambda: evaluate_ranking(torch.zeros(1, 1), torch.tensor([[0, 0]])), ValueError, "leave each user an item"),
        (
            lambda: evaluate_ranking(torch.zeros(1, 3), torch.tensor([[0, -1]])),
            ValueError,
            "`interactions` must be int",
        ),
        (
            lambda: evaluate_ranking(torch.tensor([[torch.nan, 0.0]]), torch.tensor([[0, 0]])),
            ValueError,
            "`scores` must be numbers without NaN, got 1 of 2",
        ),
    ],
)
def test_mistakes(call: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        call()
