"""On what the end of a run is compared with its start."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from semu_peft.objectives import CrossEntropy, DecoupledDistillation, KLToOriginal
from semu_peft.training import held_batches
from semu_peft.training.held_batches import examples_of, first_pairs
from semu_peft.training.trials import Trials


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
    assert len(first_pairs(batches(1, 40), [iter(batches(100, 200)), iter(batches(100, 8))])) == 3  # 600 are enough


def test_no_batch_is_looked_at_twice_for_nothing() -> None:
    """Without retain data there is nothing else to see; where these end, whole rounds are kept."""
    assert numbers(first_pairs(batches(2, 5), [])) == [(0,), (1,)]
    assert numbers(first_pairs(batches(2, 5), [iter(batches(5, 8))])) == [(0, 0), (1, 1), (0, 2), (1, 3)]
    assert numbers(first_pairs(batches(2, 5), [iter(batches(9, 8)), iter(batches(1, 8))])) == [(0, 0, 0)]
    assert first_pairs([], [iter(batches(5, 8))]) == []


def test_what_is_kept_of_large_outputs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a large vocabulary are gigabytes: as many batches as fit, and always one."""
    model = torch.nn.Linear(3, 50)
    objectives = [DecoupledDistillation(reference=model), KLToOriginal(reference=model)]
    trials = Trials(model, objectives, [1.0], "default", limit=None, measures_damage=False, mean_over_processes=dict)
    pairs: list[Any] = [((torch.rand(8, 3), torch.arange(8)), [(torch.rand(4, 3), torch.arange(4))]) for _ in range(6)]
    for room, held in ((2**30, 6), (3 * (8 + 4) * 50 * 4, 3), (1, 1)):
        monkeypatch.setattr(held_batches, "_HELD_BYTES", room)
        terms = trials.terms_that_fit(pairs)
        assert [term.batch for term in terms] == [batch for forget, kept in pairs[:held] for batch in (forget, *kept)]


def test_texts_are_enough_when_their_tokens_are() -> None:
    def text(tokens: int) -> dict[str, torch.Tensor]:
        labels = torch.full((2, 600), -100)
        labels.view(-1)[:tokens] = 1
        return {"logits": torch.zeros(2, 600, 3), "labels": labels}

    class Says(torch.nn.Module):
        def forward(self, logits: torch.Tensor) -> torch.Tensor:
            return logits

    objectives = [CrossEntropy(shift_labels=False), CrossEntropy(shift_labels=False)]
    trials = Trials(Says(), objectives, [1.0], "default", limit=None, measures_damage=False, mean_over_processes=dict)
    for forget, kept, held in ((1_100, 1_200, 4), (1_000, 1_200, 5), (1_100, 10, 9), (10, 1_100, 9)):
        assert len(trials.terms_that_fit([(text(forget), [text(kept)])] * 9)) == 2 * held
