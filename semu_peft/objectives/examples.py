"""Single examples out of batches of any form: drawn, left over, and put together again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .batches import check_batches
from .denoiser import SHARED

Row = tuple[int, int]
"""Where an example stands: the number of its batch, and its place in it."""


class Examples:
    """The examples of some batches, kept as the batches are.

    Args:
        batches: A loader or a list of batches; gone through once.
        name: What the argument is called in errors.

    Raises:
        TypeError: They are no collection of batches, or hold no tensors.
        ValueError: There is none.

    Examples:
        >>> import torch
        >>> examples = Examples([(torch.arange(3), torch.zeros(3)), (torch.arange(3, 5), torch.ones(2))])
        >>> rows = examples.draw(2, torch.Generator().manual_seed(0))
        >>> len(examples), examples.batches_of(sorted(rows))
        (5, [(tensor([0, 4]), tensor([0., 1.]))])
        >>> examples.batches_of(examples.without(rows))
        [(tensor([1, 2, 3]), tensor([0., 0., 1.]))]
    """

    def __init__(self, batches: Iterable[Any], name: str = "batches") -> None:
        check_batches(batches, name)
        self.batches = list(batches)
        self.rows: list[Row] = []
        for number, batch in enumerate(self.batches):
            size = count_examples(batch)
            if size is None:
                raise TypeError(
                    f"`{name}` must give batches of tensors, got {type(batch).__name__}. Let the loader collate them."
                )
            self.rows += [(number, place) for place in range(size)]
        if not self.rows:
            raise ValueError(f"`{name}` must give at least one example, got none. Give a list of batches.")

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, count: int, generator: torch.Generator) -> list[Row]:
        """Draw as many different examples, or all where there are fewer."""
        order = torch.randperm(len(self.rows), generator=generator)[:count]
        return [self.rows[index] for index in order.tolist()]

    def without(self, rows: Iterable[Row]) -> list[Row]:
        """All other examples."""
        left_out = set(rows)
        return [row for row in self.rows if row not in left_out]

    def batches_of(self, rows: Sequence[Row], size: int | None = None) -> list[Any]:
        """Some examples as few batches: one, or one for each shape that they come in, of at most `size` examples."""
        pieces = [rows] if size is None else [rows[start : start + size] for start in range(0, len(rows), size)]
        return [batch for piece in pieces for batch in self._joined(piece)]

    def _joined(self, rows: Sequence[Row]) -> list[Any]:
        places: dict[int, list[int]] = {}
        for number, place in rows:
            places.setdefault(number, []).append(place)
        return join_alike(
            select_examples(self.batches[number], torch.tensor(chosen), count_examples(self.batches[number]))
            for number, chosen in places.items()
        )


def join_alike(batches: Iterable[Any]) -> list[Any]:
    """Join batches of the same form and shape, so that there is one for each shape that they come in.

    Examples:
        >>> import torch
        >>> join_alike([(torch.zeros(1, 2), torch.tensor([3])), (torch.ones(1, 2), torch.tensor([4]))])[0][1]
        tensor([3, 4])
    """
    parts: dict[Any, list[Any]] = {}
    for batch in batches:
        parts.setdefault(_shape(batch), []).append(batch)
    return [_join(alike) for alike in parts.values()]


def count_examples(batch: Any) -> int | None:
    """The number of examples: the first dimension of the first tensor that has one; `None` where none has.

    Examples:
        >>> import torch
        >>> count_examples({"input_ids": torch.zeros(4, 9), "labels": torch.zeros(4)}), count_examples("text")
        (4, None)
    """
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else None
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    if not isinstance(values, (list, tuple)):
        return None
    return next((size for size in map(count_examples, values) if size is not None), None)


def check_not_empty(batch: Any, where: str) -> None:
    """Check that a batch has examples, as far as it says how many.

    Args:
        batch: The batch.
        where: What to call it in the error.

    Raises:
        ValueError: It has none.

    Examples:
        >>> import torch
        >>> check_not_empty((torch.zeros(0, 9), torch.zeros(0)), "batch 3 of `forget`")
        Traceback (most recent call last):
        ValueError: Batches must have examples, got none in batch 3 of `forget`. Leave empty ones out.
    """
    if count_examples(batch) == 0:
        raise ValueError(f"Batches must have examples, got none in {where}. Leave empty ones out.")


def examples_in(batches: Iterable[Any]) -> int:
    """The number of examples in several batches; one that does not say how many it has counts as one.

    Examples:
        >>> import torch
        >>> examples_in([(torch.zeros(4, 9), torch.zeros(4)), "text"])
        5
    """
    return sum(count_examples(batch) or 1 for batch in batches)


def single_examples(batch: Any) -> list[Any]:
    """The examples of a batch as batches of one: tensors are cut, and lists of as many labels or texts.

    Raises:
        TypeError: The batch holds no tensor, so that it does not say how many there are.

    Examples:
        >>> import torch
        >>> [(len(inputs), names) for inputs, names in single_examples((torch.zeros(2, 3), ["cat", "dog"]))]
        [(1, ['cat']), (1, ['dog'])]
    """
    size = count_examples(batch)
    if size is None:
        raise TypeError(
            f"`batches` must hold tensors whose first dimension is the examples, got {type(batch).__name__} without "
            "one. Put a tensor into it."
        )
    return [_one(batch, index, size) for index in range(size)]


def _one(value: Any, index: int, size: int, name: str = "") -> Any:
    if isinstance(value, Tensor):
        return value[index : index + 1] if _is_by_example(value, size, name) else value
    if isinstance(value, Mapping):
        return {key: _one(each, index, size, str(key)) for key, each in value.items()}
    if not isinstance(value, (list, tuple)):
        return value
    if not any(isinstance(each, (Tensor, Mapping, list, tuple)) for each in value):  # labels, texts: one each
        return value[index : index + 1] if len(value) == size else value
    parts = [_one(each, index, size) for each in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def _is_by_example(value: Tensor, size: int | None, name: str) -> bool:
    shared = name in SHARED and value.dim() == 2  # positions, the same for all
    return value.dim() > 0 and len(value) == size and not shared


def select_examples(value: Any, places: Tensor, size: int | None, name: str = "") -> Any:
    """Some examples of a batch, in its form: of every tensor that has one row an example, these rows.

    Args:
        value: The batch, or a part of it.
        places: Which examples, int64.
        size: How many the batch has.
        name: The key that the value stands under.

    Examples:
        >>> select_examples({"input_ids": torch.arange(4), "labels": torch.arange(4)}, torch.tensor([3, 0]), 4)
        {'input_ids': tensor([3, 0]), 'labels': tensor([3, 0])}
    """
    if isinstance(value, Mapping):
        return {key: select_examples(each, places, size, str(key)) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(select_examples(each, places, size) for each in value)
    if isinstance(value, Tensor) and _is_by_example(value, size, name):
        return value[places.to(value.device)]
    return value


def _shape(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((key, _shape(each)) for key, each in value.items())
    if isinstance(value, tuple):
        return tuple(_shape(each) for each in value)
    return (tuple(value.shape[1:]), value.dtype) if isinstance(value, Tensor) else str(type(value))


def _join(parts: list[Any], name: str = "") -> Any:
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Mapping):
        return {key: _join([part[key] for part in parts], str(key)) for key in first}
    if isinstance(first, tuple):
        return tuple(_join([part[index] for part in parts]) for index in range(len(first)))
    joins = isinstance(first, Tensor) and first.dim() > 0 and not (name in SHARED and first.dim() == 2)
    return torch.cat(parts) if joins else first
