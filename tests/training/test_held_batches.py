"""On what the end of a run is compared with its start."""

from __future__ import annotations

from typing import Any

import torch

from semu_peft.training.held_batches import examples_of, first_pairs


def batches(number: int, size: int) -> list[Any]:
    return [(torch.full((size,), index), torch.zeros(size)) for index in range(number)]


def numbers(pairs: list[Any]) -> list[tuple[int, ...]]:
    """Which forget batch stands beside which retain batches."""
    return [(int(forget[0][0]), *(int(each[0][0]) for each in kept)) for forget, kept in pairs]


def test_each_forget_batch_has_retain_batches_of_its_own() -> None:
    assert numbers(first_pairs(batches(3, 256), [iter(batches(9, 8)), iter(batches(9, 8))])) == [(0, 0, 0), (1, 1, 1)]


def test_few_forget_examples_meet_more_of_the_retain_data() -> None:
    pairs = first_pairs(batches(2, 50), [iter(batches(100, 8))])
    assert numbers(pairs) == [(index % 2, index) for index in range(12)] and examples_of(pairs) == 600
    assert len(first_pairs(batches(1, 1), [iter(batches(100, 8))])) == 8
    assert len(first_pairs(batches(1, 400), [iter(batches(100, 8))])) == 2


def test_no_batch_is_looked_at_twice_for_nothing() -> None:
    """Without retain data there is nothing else to see; where these end, whole rounds are kept."""
    assert numbers(first_pairs(batches(2, 5), [])) == [(0,), (1,)]
    assert numbers(first_pairs(batches(2, 5), [iter(batches(5, 8))])) == [(0, 0), (1, 1), (0, 2), (1, 3)]
    assert numbers(first_pairs(batches(2, 5), [iter(batches(9, 8)), iter(batches(1, 8))])) == [(0, 0, 0)]
    assert first_pairs([], [iter(batches(5, 8))]) == []
