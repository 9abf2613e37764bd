"""Read batches and model outputs in the forms that people have them in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Split a batch into positional inputs, keyword inputs and labels.

    Args:
        batch: `(inputs, labels)` or `(*inputs, labels)`; or a mapping with the key `labels` (or `label`), as
            transformers' collators make it.

    Raises:
        TypeError: The batch is neither, or has no labels.
    """
    if isinstance(batch, Mapping):
        inputs = dict(batch)
        for key in ("labels", "label"):
            if key in inputs:
                return (), inputs, inputs.pop(key)
        raise TypeError(f"The batch has the keys {sorted(inputs)} but no labels: expected a key 'labels'.")
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return tuple(batch[:-1]), {}, batch[-1]
    raise TypeError(
        f"A batch must be a tuple `(inputs, labels)` or a mapping with the key 'labels', got {type(batch).__name__}."
    )


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: a tensor, an object or mapping with `logits`, or the first item of a tuple.

    Raises:
        TypeError: The output is none of these.
    """
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if logits is None and isinstance(output, (tuple, list)) and output:
        logits = output[0]
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(f"The model returned {type(output).__name__}: expected logits, or an output with `logits`.")


def call_model(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Run the model on a classification batch and return its logits `(N, classes)` and the labels `(N,)`.

    Raises:
        TypeError: The batch or the output has an unknown form.
        ValueError: Logits and labels do not fit each other.
    """
    args, kwargs, labels = split_batch(batch)
    logits = logits_of(model(*args, **kwargs))
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"Classification needs logits (N, classes) and labels (N,), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"Labels must be integer class indices, got dtype {labels.dtype}.")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(
            f"The labels run from {int(labels.min())} to {int(labels.max())}; expected 0 to {logits.shape[1] - 1}, as "
            f"the model has {logits.shape[1]} classes."
        )
    return logits, labels
