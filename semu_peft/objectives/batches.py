"""Read batches and model outputs in the forms that people have them in."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from semu_peft.model_state import out_of_wrappers
from semu_peft.tuner.adapted import base_model, uncompiled

from .adapter_parts import adapter_configs
from .packing import is_packed, masked_apart, transformer_of
from .positions import counted_from_first

IGNORED = -100  # the label of a token that does not count
ALTERNATE = "alternate_"  # how the keys of a second answer to the same prompts begin
_ARRAYS = (Tensor, np.ndarray)
TOKEN_MASK = "token_mask"  # which tokens of an answer are meant, beside `labels`


@dataclass(frozen=True)
class Tokens:
    """What a model predicts at the tokens that count, and which sequence each of them is of.

    Attributes:
        logits: `(T, classes)`.
        labels: `(T,)`, int64.
        sequences: `(T,)`, from 0 on: the row of the batch or, where sequences are packed into rows, the sequence. A
            sequence without a token that counts has no number.

    Examples:
        >>> import torch
        >>> tokens = Tokens(torch.zeros(3, 4), torch.tensor([1, 2, 3]), torch.tensor([0, 0, 1]))
        >>> tokens.sums(torch.ones(3)), tokens.means(torch.tensor([1.0, 3.0, 5.0]))
        (tensor([2., 1.]), tensor([2., 5.]))
        >>> tokens.nll()  # log 4
        tensor([1.3863, 1.3863, 1.3863])
    """

    logits: Tensor
    labels: Tensor
    sequences: Tensor

    def nll(self) -> Tensor:
        """`−log p(y)` of every token, `(T,)`, in float32 or better."""
        return nn.functional.cross_entropy(self.in_float32().logits, self.labels, reduction="none")

    def sums(self, values: Tensor) -> Tensor:
        """Sum values of tokens `(T,)` over each sequence."""
        number = int(self.sequences[-1]) + 1 if len(self.sequences) else 0
        return values.new_zeros(number).index_add(0, self.sequences, values)

    def means(self, values: Tensor) -> Tensor:
        """Average values of tokens `(T,)` over each sequence."""
        return self.sums(values) / self.sums(torch.ones_like(values))

    def places(self) -> Tensor:
        """Which token of its sequence each is, `(T,)`, of those that count, from 0 on."""
        counts = self.sequences.bincount()
        return torch.arange(len(self.sequences), device=counts.device) - (counts.cumsum(0) - counts)[self.sequences]

    def in_float32(self) -> Tokens:
        """The same with logits in float32 or better."""
        return replace(self, logits=self.logits.to(torch.promote_types(self.logits.dtype, torch.float32)))


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


def call_model(model: nn.Module, batch: Any, *, shift_labels: bool | None = None) -> tuple[Tensor, Tensor]:
    """Run the model on a batch and return one row of logits and one label for each example or real token.

    A classifier's logits `(N, classes)` and labels `(N,)` are returned as they are. Of logits `(N, L, classes)` and
    labels `(N, L)` the real tokens are taken, those whose label is not −100 and that no `attention_mask` calls padding.
    A causal language model's prediction at position t is read against the label at t + 1, as transformers' own loss
    reads it; those of an encoder-decoder or a token classifier are read against the label at t. Pixels count like
    tokens, with logits `(N, classes, H, W)` and labels `(N, H, W)`. One logit an example, `(N, 1)` or `(N,)`, with
    labels 0 and 1 is read as two classes.

    Args:
        model: The model, bare or in any wrapper.
        batch: See [`split_batch`][semu_peft.objectives.batches.split_batch].
        shift_labels: Whether labels are one position ahead of the predictions; by default as the model's configuration,
            class or PEFT task type says.

    Returns:
        Logits `(T, classes)` in the model's dtype, and labels `(T,)`, int64.

    Raises:
        TypeError: The batch or the output has an unknown form.
        ValueError: Logits and labels do not fit each other, no label is left, or `shift_labels` must be told.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.batches import call_model
        >>> ids, labels = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[-100, -100, 2, 3]])
        >>> logits, labels = call_model(torch.nn.Embedding(4, 4), (ids, labels), shift_labels=True)
        >>> logits.shape, labels
        (torch.Size([2, 4]), tensor([2, 3]))
    """
    tokens = read_tokens(model, batch, shift_labels=shift_labels)
    return tokens.logits, tokens.labels


def read_tokens(model: nn.Module, batch: Any, *, shift_labels: bool | None = None) -> Tokens:
    """Run the model on a batch as `call_model` does, and tell as well which sequence each token is of.

    Sequences that are packed into one row are told apart by `position_ids` that start again at 0; the first token of
    each has nothing of its own before it that would predict it, and does not count. A model of transformers in which
    they are not apart (Bloom, Falcon, Mamba, MPT, OPT) is refused, see `packing`.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.batches import read_tokens
        >>> packed = {"input": torch.tensor([[0, 1, 2, 3, 0]]), "labels": torch.tensor([[0, 1, 2, 3, 0]])}
        >>> class Model(torch.nn.Embedding):
        ...     def forward(self, input, position_ids):
        ...         return super().forward(input)
        >>> places = torch.tensor([[0, 1, 0, 1, 2]])
        >>> tokens = read_tokens(Model(4, 4), {**packed, "position_ids": places}, shift_labels=True)
        >>> tokens.labels, tokens.sequences
        (tensor([1, 3, 0]), tensor([0, 1, 1]))
    """
    output, inputs, labels = run_batch(model, batch)
    decodes = labels.dim() == 2 and is_encoder_decoder(model)
    makes_inputs = "labels" in inputs
    logits = logits_of(output[1:] if makes_inputs and isinstance(output, tuple) else output)  # after the loss
    labels = labels.to(logits.device)
    sequences = None
    if logits.dim() == 3 and labels.shape == logits.shape[:2]:
        mask = inputs.get("decoder_attention_mask" if decodes else "attention_mask")
        shift = _labels_are_ahead(model) if shift_labels is None else shift_labels
        numbers = _sequence_numbers(labels, None if decodes else inputs.get("position_ids"))
        logits, labels, sequences = _real_tokens(logits, labels, numbers, mask, shift)
    elif logits.dim() > 3 and labels.shape == (len(logits), *logits.shape[2:]):  # a class for each pixel
        labels = labels.flatten(1)
        pixels = logits.movedim(1, -1).flatten(1, -2)
        logits, labels, sequences = _real_tokens(pixels, labels, _sequence_numbers(labels, None), None, shift=False)
    elif _is_one_logit(logits, labels, model):
        logits, labels = _two_classes(logits.reshape(-1)), labels.reshape(-1).long()
    elif labels.shape == (len(logits), 1) and logits.dim() == 2:
        labels = labels.squeeze(1)
    _check_labels(logits, labels)
    if sequences is None:  # every example is one of its own
        sequences = torch.arange(len(labels), device=labels.device)
    return Tokens(logits, labels.long(), sequences)


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


def _is_one_logit(logits: Tensor, labels: Tensor, model: nn.Module) -> bool:
    """Whether each example has one logit, of the second of two classes, and a label that is 0 or 1."""
    single = logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1)
    regression = getattr(getattr(transformer_of(model), "config", None), "problem_type", None) == "regression"
    if not single or regression or labels.numel() != logits.numel():
        return False
    return bool(((labels == 0) | (labels == 1)).all())


def _two_classes(logits: Tensor) -> Tensor:
    """`(N, 2)` logits with the same probabilities as the logits `(N,)` of a sigmoid."""
    return torch.stack([torch.zeros_like(logits), logits], -1)


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless these are logits of classes and class indices, and show what to write else."""
    if logits.dim() == 2 and logits.shape == labels.shape and logits.shape[1] > 1:
        raise ValueError(
            f"Labels must be one class for each example, got {tuple(labels.shape)} like the logits, several labels at "
            "once. " + callable_instead("nn.functional.binary_cross_entropy_with_logits(z, wanted.float())")
        )
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        one = logits.numel() == labels.numel()
        loss = "nn.functional.mse_loss(z, wanted.view_as(z))" if one else "nn.functional.cross_entropy(z, wanted)"
        raise ValueError(
            "Classification needs logits (N, classes) and labels (N,), of tokens (N, L, classes) and (N, L), or of "
            f"pixels (N, classes, H, W) and (N, H, W); got {tuple(logits.shape)} and {tuple(labels.shape)}"
            f"{' of dtype ' + str(labels.dtype) if one else ''}. {callable_instead(loss)}"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"Labels must be integer class indices, got dtype {labels.dtype}. For classes, `labels.long()`. "
            + callable_instead("nn.functional.mse_loss(z, wanted.view_as(z))")
        )
    least, largest = torch.stack(labels.aminmax()).tolist() if labels.numel() else (0, 0)  # one wait for a GPU
    if not 0 <= least <= largest < logits.shape[1]:
        raise ValueError(
            f"Labels must be from 0 to {logits.shape[1] - 1}, as the model has {logits.shape[1]} classes, got {least} "
            f"to {largest}. Renumber them, or use the matching head."
        )


def _sequence_numbers(labels: Tensor, position_ids: Any) -> Tensor:
    """A number for each sequence at each of its places, `(N, L)`, rising over the rows, with gaps."""
    rows, length = labels.shape
    numbers = torch.arange(rows, device=labels.device).unsqueeze(1) * (length + 1)
    if isinstance(position_ids, Tensor) and position_ids.shape[-1] == length and position_ids.numel() <= rows * length:
        starts = (position_ids.to(labels.device) == 0).view(-1, length)
        return numbers + starts.cumsum(1).expand(rows, length)
    return numbers.expand(rows, length)


def _real_tokens(
    logits: Tensor, labels: Tensor, sequences: Tensor, mask: Any, shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The predictions `(T, classes)`, labels and sequences `(T,)` of the tokens that count, of `(N, L, …)`."""
    real = labels != IGNORED
    begun = torch.ones_like(real)
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        mask = mask.to(real.device).bool()
        real, begun = real & mask, mask.cumsum(1) > 0
    if shift:
        # Nothing predicts the first token of a sequence: what stands before it is padding or another sequence.
        real = real[:, 1:] & begun[:, :-1] & (sequences[:, 1:] == sequences[:, :-1])
        logits, labels, sequences = logits[:, :-1], labels[:, 1:], sequences[:, 1:]
    if not real.any():
        raise ValueError(
            f"No label of the batch counts: of {real.numel()} tokens that the model predicts, all are {IGNORED} or "
            "padding. Leave such examples out, or cut prompts so that an answer is left."
        )
    return logits[real], labels[real], sequences[real].unique(return_inverse=True)[1]


def _labels_are_ahead(model: nn.Module) -> bool:
    """Whether the model predicts the next token at each position, as far as it says what it is."""
    if is_encoder_decoder(model):
        return False  # it shifts its decoder's inputs itself
    name = type(transformer_of(model)).__name__
    if re.search("CausalLM|LMHead|ForConditionalGeneration|ForImageTextToText", name):
        return True
    configs = adapter_configs(model).values() if isinstance(model, nn.Module) else ()
    tasks = {str(getattr(config.task_type, "value", config.task_type)) for config in configs}
    if re.search("For[A-Z]", name) or tasks & {"TOKEN_CLS", "SEQ_2_SEQ_LM"}:
        return False
    if "CAUSAL_LM" in tasks:
        return True
    raise ValueError(
        f"{type(model).__name__} does not say whether it predicts the next token or the one at each position. Tell the "
        "objective: `shift_labels=True` for a causal language model, `shift_labels=False` for labels in place."
    )


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether an encoder reads the inputs, and labels are what a decoder says.

    Examples:
        >>> is_encoder_decoder(decoder)
        False
    """
    return bool(getattr(getattr(transformer_of(model), "config", None), "is_encoder_decoder", False))
