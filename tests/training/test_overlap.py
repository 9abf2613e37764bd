"""What a run takes for one example in its forget and its retain batches, and what it does not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from semu_peft.training.overlap import Overlap

TABLE = torch.arange(12).reshape(2, 6)
PICTURES = [torch.zeros(3, 4), torch.ones(3, 4)]  # of three patches each, for two examples
SPARSE = [torch.sparse_coo_tensor(torch.zeros(1, 1).long(), torch.full((1,), value), (2,)) for value in (1.0, 2.0)]


def told(forget: Any, *kept: Any) -> bool:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Overlap().look([(forget, list(kept))])
    return bool(said)


@pytest.mark.parametrize(
    "batch",
    [
        (torch.ones(2, 3), torch.tensor([0, 1])),
        (torch.ones(1, 3), TABLE[:1, 1]),  # a column of a table, whose stride is the table's
        {"input_ids": TABLE, "labels": TABLE, "use_cache": False, "scale": torch.tensor(2.0)},
        (torch.ones(2, 3, dtype=torch.bfloat16).mT.contiguous().mT, ["a", "b"]),
        (torch.view_as_complex(torch.ones(2, 3, 2)).conj(), torch.tensor([0, 1])),
    ],
)
def test_the_same_examples_are_found(batch: Any) -> None:
    assert told(batch, batch)


@pytest.mark.parametrize("inputs", [PICTURES, SPARSE])
def test_batches_that_cannot_be_told_apart_by_example_say_nothing(inputs: list[Any]) -> None:
    """Question and answer alike, the pictures not: it is another example."""
    ids = torch.ones(2, 5, dtype=torch.long)
    forget, kept = ({"pixel_values": value, "input_ids": ids, "labels": ids} for value in inputs)
    assert not told(forget, kept)


def test_other_labels_are_other_examples() -> None:
    inputs = torch.ones(2, 3)
    assert not told((inputs, torch.tensor([0, 1])), (inputs, torch.tensor([2, 3])))


def padded(batch: dict[str, torch.Tensor], before: int, after: int) -> dict[str, torch.Tensor]:
    """A batch of the same texts, padded as the tokenizer pads and as a collator pads the labels."""
    filled = {"input_ids": 7, "attention_mask": 0, "labels": -100}
    pad = torch.nn.functional.pad
    return {key: pad(value, (before, after), value=filled[key]) for key, value in batch.items()}


@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 2)])
def test_texts_are_found_however_they_are_padded(before: int, after: int) -> None:
    batch = {"input_ids": TABLE, "attention_mask": torch.ones_like(TABLE), "labels": TABLE}
    assert told(batch, padded(batch, before, after))
    others = {**batch, "labels": TABLE + 1}
    assert not told(batch, padded(others, before, after))


def test_a_text_that_another_begins_with_is_another() -> None:
    ids, labels = torch.ones(2, 1, 4, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 0]])
    begun = {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(mask), "labels": labels}
    assert not told(whole, begun)
    nothing = {**begun, "attention_mask": torch.zeros_like(mask)}
    assert told(nothing, nothing) and not told(begun, nothing)
