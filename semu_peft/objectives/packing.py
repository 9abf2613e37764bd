"""Several sequences in one row, told apart by their `position_ids`: whether they are, and whether the model does so."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from semu_peft.model_state import aside, device_of, eval_mode

_LEAK = 0.05  # of what a change of earlier tokens does in one sequence: rounding is far below, no border at all is 1
_OF_WRAPPERS = ("torch.", "accelerate.", "deepspeed.")  # hooks that bring weights in
_APART: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()


def is_packed(inputs: Mapping[str, Any]) -> bool:
    """Whether rows hold several sequences and no padding.

    Args:
        inputs: A model's inputs by name.

    Examples:
        >>> import torch
        >>> is_packed({"position_ids": torch.tensor([[0, 1, 0]])}), is_packed({"position_ids": torch.tensor([[0, 1]])})
        (True, False)
    """
    places, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if not isinstance(places, Tensor) or not 1 <= places.dim() <= 2 or not (places[..., 1:] == 0).any():
        return False
    return mask is None or bool((mask == 1).all())


def masked_apart(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of packed rows, such that transformers lets no sequence see the one before it.

    Its attention finds the borders in `position_ids` itself, but not where there is a cache to fill or a mask; and not
    in every model: some do not hand the positions on (Falcon, OPT), have none (Bloom, MPT), or a state that runs on
    (Mamba). As nothing in a model says so, it is tried once in each, on rows of four tokens that differ in the first of
    two sequences. A model that is none of transformers, or is sharded over processes that would all have to try it, has
    to see to it itself.

    Args:
        model: The model, bare or in wrappers.
        inputs: Its inputs by name.

    Raises:
        ValueError: What stands in one sequence changes what the model says in the next.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.packing import masked_apart
        >>> ids, places = torch.tensor([[3, 4, 5]]), torch.tensor([[0, 1, 0]])
        >>> sorted(masked_apart(decoder, {"input_ids": ids, "position_ids": places, "attention_mask": places * 0 + 1}))
        ['input_ids', 'position_ids', 'use_cache']
    """
    inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
    inner = transformer_of(model)
    if inner is None:
        return inputs
    options = {"use_cache": False} if "use_cache" in inspect.signature(inner.forward).parameters else {}
    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor):
        known = _APART.setdefault(inner, {})
        attention = getattr(inner.config, "_attn_implementation", None)
        if attention not in known and not any(hasattr(weight, "device_mesh") for weight in inner.parameters()):
            tried = _keeps_apart(inner, ids.numel() // ids.shape[-1], options)
            if tried is not None:
                known[attention] = tried
        if not known.get(attention, True):
            raise ValueError(
                f"`position_ids`: {type(inner).__name__} does not keep sequences apart that are packed into one row: "
                "what stands in one changes what it says in the next. Make batches without `packing=True`."
            )
    return {**options, **inputs}


def transformer_of(model: Any) -> PreTrainedModel | None:
    """The outermost model of transformers in the wrappers around it.

    Examples:
        >>> from torch import nn
        >>> transformer_of(nn.Sequential(decoder)) is decoder, transformer_of(nn.Linear(2, 2))
        (True, None)
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return next((module for module in modules if isinstance(module, PreTrainedModel)), None)


def _keeps_apart(model: nn.Module, rows: int, options: Mapping[str, Any]) -> bool | None:
    """Whether other tokens in a row's first sequence leave alone what the model says in its second.

    None where this says nothing, as the model does not look back at all, or numbers have run over.
    """
    device = device_of(model)

    def said(first: list[int], places: list[int]) -> Tensor:
        ids, positions = (torch.tensor([row] * rows, device=device) for row in ([*first, 3, 3], places))
        output = model(input_ids=ids, position_ids=positions, **options)
        return (output if isinstance(output, Tensor) else output[0])[:, 2:].float()

    with torch.no_grad(), eval_mode(model), aside(), _unheard(model):
        packed, one = (
            (said([1, 2], places) - said([2, 1], places)).abs().mean() for places in ([0, 1, 0, 1], [0, 1, 2, 3])
        )
    return bool(packed <= _LEAK * one) if torch.isfinite(packed + one) and one > 0 else None


@contextmanager
def _unheard(model: nn.Module) -> Iterator[None]:
    """Without the hooks by which others read or change a pass; those that wrappers need for their weights stay."""
    hooks = [held for module in model.modules() for held in (module._forward_hooks, module._forward_pre_hooks) if held]
    before = [dict(held) for held in hooks]
    for held in hooks:
        for key, hook in list(held.items()):
            if not str(getattr(hook, "__module__", "")).startswith(_OF_WRAPPERS):
                del held[key]
    try:
        yield
    finally:
        for held, all_of_them in zip(hooks, before, strict=True):
            held.clear()
            held.update(all_of_them)
