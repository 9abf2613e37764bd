"""One batch's gradient of a weight, in the form that the backward pass has it in.

The gradient of a linear layer is a product, `G = dYᵀ X` over the batch's tokens, and that of a convolution is one over
its windows. A sketch needs only thin products with `G`, which cost a fraction of `G` itself when they are taken factor
by factor. All three forms answer the same questions: `G` itself in the precision that autograd would give it (products
are accumulated in float32 there, and rounded once), and the thin products in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BatchGradient(ABC):
    """A gradient `G`, `(m, n)`, as the product `AᵀB` of `(N, m)` and `(N, n)` factors that may never be formed."""

    @abstractmethod
    def dense(self) -> Tensor:
        """`G` itself, in memory of its own, shaped as the layer's matrix (or batch of matrices) reads the weight."""

    @abstractmethod
    def add_to(self, total: Tensor) -> None:
        """`total += G`, without a second matrix of that size where the form allows it."""

    @abstractmethod
    def project(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """`A left` and `B right`, `(N, k)` each, for `left` `(m, k)` and `right` `(n, k)`."""

    @abstractmethod
    def times(self, projected: Tensor) -> Tensor:
        """`Aᵀ projected`, `(m, k)`; with `projected = B right` it is `G right`."""

    @abstractmethod
    def transposed_times(self, projected: Tensor) -> Tensor:
        """`projectedᵀ B`, `(k, n)`; with `projected = A left` it is `leftᵀ G`."""


@dataclass(frozen=True)
class DenseGradient(BatchGradient):
    """A gradient that is there as a matrix, or as a batch of matrices, `(..., m, n)`."""

    matrix: Tensor

    def dense(self) -> Tensor:
        return self.matrix.clone()  # autograd may have given the same memory to another weight

    def add_to(self, total: Tensor) -> None:
        total.add_(self.matrix.to(total.device))

    def project(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return left, self.matrix.to(right) @ right

    def times(self, projected: Tensor) -> Tensor:
        return projected

    def transposed_times(self, projected: Tensor) -> Tensor:
        return projected.mT @ self.matrix.to(projected)


@dataclass(frozen=True)
class TokenGradient(BatchGradient):
    """A linear layer's gradient, from its output gradients `(N, m)` and its inputs `(N, n)`."""

    outputs: Tensor
    inputs: Tensor

    def dense(self) -> Tensor:
        return self.outputs.mT @ self.inputs

    def add_to(self, total: Tensor) -> None:
        if total.device == self.inputs.device and total.dtype == self.inputs.dtype == self.outputs.dtype:
            total.addmm_(self.outputs.mT, self.inputs)
        else:
            total.add_(self.dense().to(total.device))

    def project(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return self.outputs.to(left) @ left, self.inputs.to(right) @ right

    def times(self, projected: Tensor) -> Tensor:
        return self.outputs.to(projected).mT @ projected

    def transposed_times(self, projected: Tensor) -> Tensor:
        return projected.mT @ self.inputs.to(projected)


@dataclass(frozen=True)
class ConvGradient(BatchGradient):
    """A convolution's gradient read as `out × (in/groups · kernel)`, from output gradients and (padded) inputs.

    The products of a sketch are convolutions themselves: `B right` is one with `k` filters, `projectedᵀ B` the weight
    gradient of one with `k` output channels. No window is ever copied out. Only `dense` knows groups.
    """

    outputs: Tensor
    inputs: Tensor
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, conv: nn.Module, outputs: Tensor, inputs: Tensor) -> ConvGradient:
        """From a convolution of any dimension, what it returned a gradient for and what it was given."""
        base: Any = conv
        padding = base.padding
        if isinstance(padding, str) or base.padding_mode != "zeros":
            mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
            inputs = F.pad(inputs, base._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(base.kernel_size)
        return cls(outputs, inputs, base.kernel_size, base.stride, padding, base.dilation, base.groups)

    def dense(self) -> Tensor:
        return self._weight_gradient(self.outputs, self.groups).flatten(1)

    def add_to(self, total: Tensor) -> None:
        total.add_(self.dense().to(total.device))

    def project(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        filters = right.mT.reshape(right.shape[1], self.inputs.shape[1], *self.kernel_size)
        hidden = torch.convolution(
            self.inputs.to(filters), filters, None, self.stride, self.padding, self.dilation, False,
            [0] * len(self.kernel_size), 1,
        )  # fmt: skip
        return _rows(self.outputs).to(left) @ left, _rows(hidden)

    def times(self, projected: Tensor) -> Tensor:
        return _rows(self.outputs).to(projected).mT @ projected

    def transposed_times(self, projected: Tensor) -> Tensor:
        batch, _, *size = self.outputs.shape
        outputs = projected.reshape(batch, *size, -1).movedim(-1, 1)
        return self._weight_gradient(outputs, 1).flatten(1)

    def _weight_gradient(self, outputs: Tensor, groups: int) -> Tensor:
        inputs = self.inputs.to(outputs)
        weight = outputs.new_empty(outputs.shape[1], inputs.shape[1] // groups, *self.kernel_size)
        result = torch.ops.aten.convolution_backward(
            outputs, inputs, weight, None, self.stride, self.padding, self.dilation, False,
            [0] * len(self.kernel_size), groups, [False, True, False],
        )  # fmt: skip
        return result[1]


def _rows(features: Tensor) -> Tensor:
    """`(N, channels, *size)` as `(N · size, channels)`."""
    return features.movedim(1, -1).reshape(-1, features.shape[1])
