"""Read what a model says of a batch: a row of logits and a label for each example, or each token that counts."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_parts import adapter_configs
from .batches import IGNORED, callable_instead, is_encoder_decoder, logits_of, run_batch
from .packing import transformer_of


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
        >>> from semu_peft.objectives.tokens import call_model
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
        >>> from semu_peft.objectives.tokens import read_tokens
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
