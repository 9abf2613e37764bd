"""Backward passes through float16: the loss is scaled by a power of two, and what comes out is scaled back exactly."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from .batch_gradient import BatchGradient
from .processes import in_several_processes

_FIRST, _TARGET = 12, 8  # exponents of 2: of the first scale, and of where the largest gradient is put
_WINDOW = range(2, 13)  # float16 ends at 2**16, and is exact down to 2**-14
_LOWEST, _HIGHEST = -40, 60


class LossScale:
    """The scale of one pass over data, chosen from the gradients that it brings to the target layers.

    A loss that is a mean over many numbers gives each a gradient below float16's smallest. Scaling by `2ᵏ` moves the
    gradients up by k binary places, and dividing by it afterwards, in float32, is exact, so that the scale is free to
    change from batch to batch. The first batch is looked at once before it counts; where a later one overflows, its
    backward pass is repeated at a smaller scale, and only what was not taken yet is taken. A graph without float16 is
    differentiated as it is.

    Among several processes no pass is repeated, as a sharded model would have to repeat it in all.

    Examples:
        >>> import torch
        >>> from semu_peft.gradients.batch_gradient import DenseGradient
        >>> from semu_peft.gradients.loss_scale import LossScale
        >>> scale, weight = LossScale(), torch.ones(1, 1, dtype=torch.float16, requires_grad=True)
        >>> taken = []
        >>> def hook(gradient):
        ...     taken.append(scale.take("layer", DenseGradient(gradient)))
        >>> _ = weight.register_hook(hook)
        >>> scale.backward((weight * 2).float().sum() * 2.0**-30)
        >>> [gradient.dense().item() == 2.0**-29 for gradient in taken if gradient is not None]
        [True]
    """

    def __init__(self) -> None:
        self.exponent, self._ceiling = _FIRST, _HIGHEST
        self._half: bool | None = None
        self._probing = self._overflown = False
        self._largest = 0.0
        self._taken: Counter[str] = Counter()  # of this batch, by layer, in passes before this one
        self._calls: Counter[str] = Counter()  # in this pass

    def backward(self, loss: Tensor) -> None:
        """Differentiate a loss; the gradients go through [`take`][semu_peft.gradients.loss_scale.LossScale.take]."""
        first = self._half is None
        if first:
            self._half = _passes_float16(loss)
        if not self._half:
            loss.backward()
            return
        self._taken.clear()
        repeats = not in_several_processes()
        if first and repeats:
            self._probing = True
            self._pass(loss)
            while self._adjust():
                self._pass(loss)
            self._probing = False
        self._pass(loss)
        while self._overflown and repeats and self._adjust():
            self._pass(loss)
        self._adjust()

    def take(self, name: str, gradient: BatchGradient) -> BatchGradient | None:
        """The gradient as the loss itself would give it, or None where it is not to be counted in this pass."""
        if not self._half:
            return gradient
        self._calls[name] += 1
        magnitude = _magnitude(gradient)
        self._overflown |= not math.isfinite(magnitude)
        self._largest = max(self._largest, magnitude)
        if self._probing or self._calls[name] <= self._taken[name]:
            return None
        if self._overflown and not in_several_processes() and self.exponent > _LOWEST:
            return None  # this and what the backward pass brings after it comes again
        self._taken[name] += 1
        return gradient.rescaled(2.0**-self.exponent)

    def _pass(self, loss: Tensor) -> None:
        self._overflown, self._largest = False, 0.0
        self._calls.clear()
        wide = loss.float() if loss.dtype.itemsize < 4 else loss
        (wide * 2.0**self.exponent).backward(retain_graph=True)

    def _adjust(self) -> bool:
        """Choose the next scale by what the last pass brought; whether it is another one."""
        before, size = self.exponent, math.frexp(self._largest)[1] if math.isfinite(self._largest) else 0
        if self._overflown:
            self._ceiling = before - _TARGET // 2
            wanted = before - _TARGET
        elif self._largest == 0:
            wanted = before + 2 * _TARGET
        else:
            wanted = before if size in _WINDOW else before + _TARGET - size
        self.exponent = max(_LOWEST, min(wanted, self._ceiling))
        return self.exponent != before


def _magnitude(gradient: BatchGradient) -> float:
    received = gradient.received()
    return float(received.abs().amax()) if received.numel() else 0.0


def _passes_float16(loss: Tensor) -> bool:
    """Whether any gradient on the way of the backward pass is in float16, as autocast makes them too."""
    todo: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if any(metadata.dtype == torch.float16 for metadata in node._input_metadata):
            return True
        todo += [before for before, _ in node.next_functions]
    return False
