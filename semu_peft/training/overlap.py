"""Examples that are both to be forgotten and to be kept, looked for among a run's first batches as they come."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from semu_peft.objectives.examples import count_examples

from .held_batches import Pair

_FIRST = 8  # forget batches, with the retain batches beside them: each is copied to the CPU once


class Overlap:
    """Says once where a retain batch has an example of a forget batch, with its labels: one would undo the other.

    Only the first batches are looked at, as the run has them, so that data of any size cost the same. What
    `attention_mask` leaves out is not a part of an example; what is augmented otherwise in the two is not recognised.

    Examples:
        >>> import torch
        >>> overlap = Overlap()
        >>> batch = (torch.eye(3), torch.arange(3))
        >>> with warnings.catch_warnings(record=True) as said:
        ...     overlap.look([(batch, [(torch.eye(3)[2:], torch.tensor([2]))])])
        >>> len(said), overlap.is_over
        (1, True)
    """

    def __init__(self) -> None:
        self.left = _FIRST
        self.forgotten: set[int] = set()
        self.kept: set[int] = set()

    @property
    def is_over(self) -> bool:
        """Whether it has looked at enough, or has found some."""
        return self.left <= 0

    def look(self, pairs: list[Pair]) -> None:
        """Look at the batches of one more step."""
        if self.is_over or not any(kept for _, kept in pairs):
            return
        self.left -= len(pairs)
        for forget, kept in pairs:
            self.forgotten |= _examples(forget)
            self.kept |= {example for batch in kept for example in _examples(batch)}
        if both := self.forgotten & self.kept:
            self.left = 0
            warnings.warn(
                f"The first batches of `retain` hold {len(both)} of the examples of `forget`, which one asks to keep "
                "and the other to forget. Take them out of `retain`.",
                stacklevel=7,
            )


def _examples(batch: Any) -> set[int]:
    """A number for each example of a batch, which another with the same inputs and labels has as well."""
    size = count_examples(batch)
    columns = list(_columns(batch, size, _mask(batch))) if size else []
    if None in columns:
        return set()
    return {hash(example) for example in zip(*columns, strict=True)}


def _mask(batch: Any) -> Tensor | None:
    """Where the tokens of padded rows are, `(N, T)`; None where a batch does not say."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _columns(value: Any, size: int | None, mask: Tensor | None) -> Iterator[list[Hashable] | None]:
    """What each example has of every tensor and list of plain values; None of what cannot be told apart by example."""
    if isinstance(value, Tensor):
        if not value.dim():
            return  # a setting
        rowwise = not value.is_nested and value.layout == torch.strided and len(value) == size and value.numel() > 0
        yield _rows(value, mask) if rowwise else None
        return
    parts = list(value.values()) if isinstance(value, Mapping) else value
    if not isinstance(parts, (list, tuple)):
        yield from () if parts is None or isinstance(parts, (bool, int, float, str)) else (None,)
        return
    if len(parts) == size and all(isinstance(part, (int, float, str)) for part in parts):
        yield list(parts)
        return
    for part in parts:
        yield from _columns(part, size, mask)


def _rows(value: Tensor, mask: Tensor | None) -> list[Hashable]:
    if mask is not None and value.shape[:2] == mask.shape:
        return [_rows(row[None, kept], None)[0] for row, kept in zip(value, mask, strict=True)]
    rows = value.detach().cpu().resolve_conj().resolve_neg().reshape(len(value), value[0].numel())
    # A copy, as strides that do not matter for one row would forbid the view.
    return [row.tobytes() for row in rows.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()]
