"""Which tokens of a forward pass are padding, as the model was told: they have no say in the moments of its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from semu_peft.objectives.batches import is_encoder_decoder


class SeenMask:
    """The `attention_mask` of the last forward pass, `(N, tokens)`, if it had one."""

    def __init__(self) -> None:
        self._mask: Tensor | None = None

    def of(self, rows: Tensor) -> Tensor | None:
        """Which of the rows `(N, tokens, …)` are no padding, `(N, tokens)`, bool; None where nobody said so of them."""
        if self._mask is None or rows.dim() < 3 or rows.shape[:2] != self._mask.shape:
            return None
        return self._mask.to(rows.device)

    def see(self, mask: Any) -> None:
        """Keep what a forward pass is given as its `attention_mask`."""
        self._mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


@contextmanager
def watch_mask(model: nn.Module) -> Iterator[SeenMask]:
    """Look at what each forward pass is told of padding while the context lasts.

    An encoder-decoder has tokens of two kinds, of which the mask is about the one: there nothing is said of any.

    Examples:
        >>> import torch
        >>> class Model(nn.Module):
        ...     def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        ...         return x
        >>> model, x = Model(), torch.zeros(1, 2, 4)
        >>> with watch_mask(model) as seen:
        ...     _ = model(x, attention_mask=torch.tensor([[1, 0]]))
        ...     seen.of(x), seen.of(x.flatten(0, 1))
        (tensor([[ True, False]]), None)
    """
    seen, is_of_two_kinds = SeenMask(), is_encoder_decoder(model)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.see(None if is_of_two_kinds else kwargs.get("attention_mask"))

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
