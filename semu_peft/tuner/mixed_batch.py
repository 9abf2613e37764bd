"""One batch, several adapters: each example of a batch goes through the adapter that it names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer import BASE, SemuLayer


@contextmanager
def adapter_per_example(model: nn.Module, adapter_names: Sequence[str], num_beams: int = 1) -> Iterator[None]:
    """While the context lasts, the example at position `i` of every batch uses the adapter `adapter_names[i]`.

    For inference only, as in LoRA. With beam search every example is repeated `num_beams` times, and so are the names,
    except in the encoder of an encoder-decoder model, which sees each example once.

    Args:
        model: The model with the adapters.
        adapter_names: An adapter's name, or `"__base__"`, for each example.
        num_beams: How many beams `generate` searches with.

    Raises:
        ValueError: The model is in train mode, or no layer has an adapter of one of the names.
        TypeError: `adapter_names` is not a list.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.tuner.mixed_batch import adapter_per_example
        >>> base, x = nn.Sequential(nn.Linear(4, 3)), torch.ones(2, 4)
        >>> original = base(x)
        >>> model = get_peft_model(base, SemuConfig(target_modules=["0"], r=2, init_weights=False)).eval()
        >>> with adapter_per_example(model, ["default", "__base__"]):
        ...     output = model(x)
        >>> torch.equal(output[0], original[0]), torch.equal(output[1], original[1])
        (False, True)
    """
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call `model.eval()` first.")
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        raise TypeError(f"`adapter_names` must be a list of names, one for each example, got {adapter_names!r}.")
    known = {name for layer in model.modules() if isinstance(layer, SemuLayer) for name in layer.semu_core}
    unknown = sorted(set(adapter_names) - known - {BASE})
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. `adapter_names` may be of "
            f"{sorted(known)} and {BASE!r}."
        )
    get_encoder = getattr(model, "get_encoder", None)
    encoder = get_encoder() if get_encoder is not None else None
    once = set(encoder.modules()) if encoder is not None and encoder is not model else set()
    repeated = [name for name in adapter_names for _ in range(num_beams)]
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, (SemuLayer, AuxiliaryTrainingWrapper)):
                names = list(adapter_names) if module in once else repeated
                hook = partial(_add_names, adapter_names=names)
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _add_names(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]) -> Any:
    return args, {**kwargs, "adapter_names": adapter_names}
