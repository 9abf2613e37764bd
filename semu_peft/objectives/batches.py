"""Read batches and model outputs in the forms that people have them in."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from semu_peft.model_state import out_of_wrappers
from semu_peft.tuner.adapted import base_model, uncompiled

from .packing import is_packed, masked_apart, transformer_of
from .positions import counted_from_first

IGNORED = -100  # the label of a token that does not count
ALTERNATE = "alternate_"  # how the keys of a second answer to the same prompts begin
_ARRAYS = (Tensor, np.ndarray)
TOKEN_MASK = "token_mask"  # which tokens of an answer are meant, beside `labels`


def check_batches(batches: Any, name: str = "batches") -> None:
    """Check that an argument is something to take batches from, and not one batch.

    Args:
        batches: The argument.
        name: What it is called.

    Raises:
        TypeError: It is one batch (a tensor, a mapping, inputs with labels), a function, or nothing to go through.

    Examples:
        >>> check_batches(torch.zeros(4, 3), "forget")
        Traceback (most recent call last):
        TypeError: `forget` must be a loader or a list of batches, got one Tensor. Write `[batch]`.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise TypeError(
            f"`{name}` must be a loader or a list of batches, got one {type(batches).__name__}. Write `[batch]`."
        )
    if _is_inputs_and_labels(batches):
        raise TypeError(
            f"`{name}` must be a loader or a list of batches, got one tuple of inputs and labels. Write "
            "`[(inputs, labels)]`."
        )
    if isinstance(batches, (str, bytes)) or callable(batches) or not isinstance(batches, Iterable):
        raise TypeError(
            f"`{name}` must be a loader or a list of batches, got {type(batches).__name__}. Give a `DataLoader`, or a "
            "list such as `[(inputs, labels)]`."
        )


def _is_inputs_and_labels(batches: Any) -> bool:
    """Whether this is one batch: two batches of inputs alone, as `split` gives them, are of one kind."""
    if not isinstance(batches, tuple) or len(batches) != 2 or not all(isinstance(each, _ARRAYS) for each in batches):
        return False
    first, second = batches
    return first.shape[:1] == second.shape[:1] and (first.ndim > second.ndim or first.dtype != second.dtype)


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Split a batch into positional inputs, keyword inputs and labels.

    Args:
        batch: `(inputs, labels)` or `(*inputs, labels)`; or a mapping with the key `labels` (or `label`), as
            transformers' collators make it.

    Raises:
        TypeError: The batch is neither, or has no labels.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.batches import split_batch
        >>> split_batch({"input_ids": torch.tensor([[3, 4]]), "labels": torch.tensor([1])})
        ((), {'input_ids': tensor([[3, 4]])}, tensor([1]))
    """
    if isinstance(batch, Mapping):
        inputs = dict(batch)
        for key in ("labels", "label"):
            if key in inputs:
                return (), inputs, inputs.pop(key)
        raise TypeError(f"A batch must have the key 'labels', got {sorted(inputs)}. Add the labels under it.")
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return tuple(batch[:-1]), {}, batch[-1]
    raise TypeError(
        f"A batch must be a tuple `(inputs, labels)` or a mapping with the key 'labels', got {type(batch).__name__}. "
        "If inputs and labels were given as they are, write `[(inputs, labels)]`."
    )


def logits_of(output: Any) -> Tensor:
    """Find the logits in a model's output: a tensor, an object or mapping with `logits`, or a tuple's first item.

    A model of two towers, such as CLIP, gives `logits_per_image`: the classes are the texts of the batch.

    Raises:
        TypeError: The output is none of these.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.batches import logits_of
        >>> logits_of({"logits": torch.zeros(1, 3), "loss": None})
        tensor([[0., 0., 0.]])
    """
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "logits_per_image"):
        logits = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(logits, Tensor):
            return logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(
        f"A model must return logits, or an output with `logits`, got {type(output).__name__}. Wrap it so that it "
        "does. " + callable_instead("nn.functional.mse_loss(z, wanted)", "inputs, wanted = batch; z = model(inputs)[0]")
    )


def callable_instead(loss: str, outputs: str = "inputs, wanted = batch; z = model(inputs)") -> str:
    """How to write an objective for outputs that are no classification, for an error.

    Args:
        loss: The loss to show, of outputs `z` and what is wanted of them. Not an ascent: that has no end, and would be
            copied for retain data too.
        outputs: What gives them.
    """
    return (
        "Or write the objective as a callable, with what is to be answered as `wanted`: "
        f"`def objective(model, batch): {outputs}; return {loss}`."
    )


def run_batch(model: nn.Module, batch: Any, **options: Any) -> tuple[Any, dict[str, Any], Tensor]:
    """Run the model on the inputs in a batch: not on second answers nor masks that are there for objectives.

    An encoder-decoder without inputs for its decoder makes them of the labels, which it is given for that. A decoder
    with absolute positions is told them where a row is padded on the left, see `positions`.

    Args:
        model: The model.
        batch: See `split_batch`.
        options: What to ask of the model besides, such as `output_router_logits=True`.

    Returns:
        The output, the keyword inputs and the labels.

    Raises:
        TypeError: The model takes other inputs, such as tensors for arrays, or fewer of them; or the batch is one
            example.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.batches import run_batch
        >>> run_batch(torch.nn.Identity(), (torch.zeros(1, 2), [1]))
        (tensor([[0., 0.]]), {}, tensor([1]))
    """
    args, kwargs, labels = split_batch(batch)
    labels = as_labels(labels)
    if not labels.dim():  # before the model fails on inputs without a batch dimension, in words of its own
        raise TypeError(
            "A batch must have a label for each of its examples, got a single label, as a data set gives single "
            "examples. Write `DataLoader(dataset, batch_size=64)`, or `(inputs[None], labels[None])` for one of them."
        )
    if labels.dim() == 2 and is_encoder_decoder(model):
        inputs = _of_model(kwargs)
        if not {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs):
            inputs["labels"] = labels
    else:
        inputs = placed_inputs(model, kwargs)
    args, inputs = named_for_task(model, args, inputs)
    try:
        return model(*args, **inputs, **options), inputs, labels
    except (TypeError, AttributeError) as error:
        _check_inputs(model, args, inputs, error)
        raise


def _check_inputs(model: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any], error: Exception) -> None:
    """Raise what is wrong with a batch, where that is why a model has failed on it."""
    if any(isinstance(value, np.ndarray) for value in (*args, *inputs.values())):
        raise TypeError(
            "Inputs must be tensors, got a NumPy array. Write `torch.as_tensor(inputs)`, or let a `DataLoader` collate."
        ) from error
    if len(args) < 2 or not isinstance(model, nn.Module):
        return
    base = base_model(model)
    try:
        inspect.signature(base.forward).bind(*args, **inputs)
    except TypeError as why:
        raise TypeError(
            "A batch must be a tuple `(inputs, labels)`, or `(*inputs, labels)` with all inputs of the model, or a "
            f"mapping with the key 'labels', got a tuple of {len(args) + 1}, and {type(base).__name__}'s `forward` "
            f"says: {why}. Leave out what is no input, such as an index."
        ) from error


def placed_inputs(model: nn.Module, named: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a batch as the model takes them: packed sequences apart, and padding on the left not counted.

    Examples:
        >>> from semu_peft.objectives.batches import placed_inputs
        >>> placed_inputs(torch.nn.Identity(), {"input_ids": 1, "alternate_input_ids": 2})
        {'input_ids': 1}
    """
    inputs = _of_model(named)
    return masked_apart(model, inputs) if is_packed(inputs) else counted_from_first(model, inputs)


def named_for_task(
    model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs by position and by name; the first by the model's own name in a wrapper of PEFT for a task.

    That takes what stands first for `input_ids`, also around a model of images.

    Examples:
        >>> from semu_peft.objectives.batches import named_for_task
        >>> named_for_task(torch.nn.Identity(), (1,), {})
        ((1,), {})
    """
    root = uncompiled(out_of_wrappers(uncompiled(model))) if len(args) == 1 else None
    if not isinstance(root, PeftModel) or type(root).forward is PeftModel.forward:
        return args, named
    name = getattr(base_model(root), "main_input_name", None)
    return (args, named) if name in (None, "input_ids") else ((), {name: args[0], **named})


def _of_model(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if not name.startswith((ALTERNATE, TOKEN_MASK))}


def alternate_batch(batch: Any) -> dict[str, Any]:
    """The batch of the second answers to the same prompts, which a batch holds under keys that begin `alternate_`.

    Raises:
        TypeError: The batch holds none.

    Examples:
        >>> from semu_peft.objectives.batches import alternate_batch
        >>> batch = {"input_ids": 1, "labels": 2, "alternate_input_ids": 3, "alternate_labels": 4}
        >>> alternate_batch(batch)
        {'input_ids': 3, 'labels': 4}
    """
    named = dict(batch) if isinstance(batch, Mapping) else {}
    found = {key.removeprefix(ALTERNATE): value for key, value in named.items() if key.startswith(ALTERNATE)}
    if "labels" not in found:
        raise TypeError(
            "A batch must hold a second answer to its prompts under `alternate_input_ids`, `alternate_attention_mask` "
            f"and `alternate_labels`, got {sorted(named) or type(batch).__name__}. Add a refusal or another answer."
        )
    return found


def as_labels(labels: Any) -> Tensor:
    """Labels as a tensor, from a list, a NumPy array or a tensor of any dtype.

    Raises:
        TypeError: They hold something else than numbers.

    Examples:
        >>> from semu_peft.objectives.batches import as_labels
        >>> as_labels([2, 0])
        tensor([2, 0])
    """
    if isinstance(labels, Tensor):
        return labels
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"Labels must be integer class indices in a tensor, an array or a list, got {type(labels).__name__}: "
            f"{error}. Number the classes from 0 first."
        ) from error


def token_runs(tokens: Sequence[int], length: int) -> list[tuple[int, ...]]:
    """All runs of so many tokens in a row; of fewer tokens, the one that there is.

    Examples:
        >>> from semu_peft.objectives.batches import token_runs
        >>> token_runs([4, 5, 6], 2), token_runs([4], 2), token_runs([], 2)
        ([(4, 5), (5, 6)], [(4,)], [])
    """
    size = min(length, len(tokens))
    return [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)] if size else []


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether an encoder reads the inputs, and labels are what a decoder says.

    Examples:
        >>> is_encoder_decoder(decoder)
        False
    """
    return bool(getattr(getattr(transformer_of(model), "config", None), "is_encoder_decoder", False))
