"""One batch's gradient of a weight, in the form that the backward pass has it in.

The gradient of a linear layer is a product, `G = dYᵀ X` over the batch's tokens, and that of a convolution is one over
its windows. A sketch needs only thin products with `G`, which cost a fraction of `G` itself when they are taken factor
by factor. All three forms answer the same questions: `G` itself in the precision that autograd would give it (products
are accumulated in float32 there, and rounded once), and the thin products in float32. Where the examples of the batch
can be told apart, so can their gradients: within example `i` a linear layer has `G_i = Σ_t dy_it x_itᵀ`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft.linalg.products import add_product, multiplies_half

_ROWS_AT_ONCE = 8192  # bounds the float32 copies of half-precision activations


class BatchGradient(ABC):
    """A gradient `G`, `(m, n)`, as the product `AᵀB` of `(N, m)` and `(N, n)` factors that may never be formed.

    A layer type of your own may bring a form of its own, see
    [`register_source`][semu_peft.gradients.sources.register_source].

    Examples:
        >>> outputs, inputs = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
        >>> gradient = TokenGradient(outputs, inputs)
        >>> gradient.dense().tolist()
        [[1.0, 0.0, 1.0], [2.0, 3.0, 2.0]]
        >>> gradient.examples, gradient.per_example(0, 2).shape
        (2, torch.Size([2, 2, 3]))
    """

    @property
    def examples(self) -> int | None:
        """The number of examples where their gradients can be told apart; `None` where only the sum is known."""
        return None

    def received(self) -> Tensor:
        """What the backward pass made: the output gradients, or `G` where it made that."""
        return self.dense()

    def rescaled(self, factor: float) -> BatchGradient:
        """`factor · G`, in float32 or better."""
        return DenseGradient(_wide(self.dense()) * factor)

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

    def parts(self) -> Iterator[BatchGradient]:
        """The gradient as a sum of gradients that are small enough to be copied into float32; examples may be cut."""
        yield self

    def per_example(self, start: int, stop: int) -> Tensor:
        """The gradients of the examples `start … stop - 1`, `(stop - start, m, n)`, in float32 or better.

        Raises:
            NotImplementedError: Only their sum is known (`examples` is `None`).
        """
        raise NotImplementedError(f"{type(self).__name__} knows the sum over the batch alone.")

    def squared_per_example(self) -> Tensor | None:
        """`Σ_i G_i ∘ G_i`, `(m, n)`, where the form has it without forming any `G_i`; `None` where it has not."""
        return None


@dataclass(frozen=True)
class DenseGradient(BatchGradient):
    """A gradient that is there as a matrix, or as a batch of matrices, `(..., m, n)`.

    Examples:
        >>> import torch
        >>> from semu_peft.gradients import DenseGradient
        >>> total = torch.zeros(2, 3)
        >>> DenseGradient(torch.ones(2, 3)).add_to(total)
        >>> total.sum()
        tensor(6.)
    """

    matrix: Tensor

    def received(self) -> Tensor:
        return self.matrix

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
    """A linear layer's gradient, from its output gradients and its inputs.

    Attributes:
        outputs: `(N, m)`, or `(N, tokens, m)` for examples of several tokens.
        inputs: `(N, n)` or `(N, tokens, n)`.
        counts: `(N, tokens)`, bool: which tokens are no padding, whose gradient is zero; None where nobody said so.

    Examples:
        >>> import torch
        >>> from semu_peft.gradients import TokenGradient
        >>> outputs, inputs = torch.randn(5, 2), torch.randn(5, 3)  # of five tokens
        >>> torch.allclose(TokenGradient(outputs, inputs).dense(), outputs.T @ inputs)
        True
    """

    outputs: Tensor
    inputs: Tensor
    counts: Tensor | None = None

    @property
    def examples(self) -> int:
        return len(self.outputs)

    def received(self) -> Tensor:
        return self.outputs

    def rescaled(self, factor: float) -> TokenGradient:
        return TokenGradient(_wide(self.outputs) * factor, _wide(self.inputs), self.counts)

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """`A`, `(rows, m)`, and `B`, `(rows, n)`: all tokens of all examples."""
        return self.outputs.flatten(0, -2), self.inputs.flatten(0, -2)

    def dense(self) -> Tensor:
        outputs, inputs = self.rows
        return outputs.mT @ inputs

    def add_to(self, total: Tensor) -> None:
        outputs, inputs = self.rows
        at_once = total.dtype == inputs.dtype == outputs.dtype or multiplies_half(outputs, inputs)
        if total.device == inputs.device and at_once:
            add_product(total, outputs.mT, inputs)
        else:
            total.add_(self.dense().to(total.device))

    def project(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        outputs, inputs = self.rows
        return outputs.to(left) @ left, inputs.to(right) @ right

    def times(self, projected: Tensor) -> Tensor:
        return self.rows[0].to(projected).mT @ projected

    def transposed_times(self, projected: Tensor) -> Tensor:
        return projected.mT @ self.rows[1].to(projected)

    def parts(self) -> Iterator[BatchGradient]:
        outputs, inputs = self.rows
        if len(outputs) <= _ROWS_AT_ONCE:
            yield self
            return
        sides = outputs.split(_ROWS_AT_ONCE), inputs.split(_ROWS_AT_ONCE)
        counts = [None] * len(sides[0]) if self.counts is None else self.counts.flatten().split(_ROWS_AT_ONCE)
        for part in zip(*sides, counts, strict=True):
            yield TokenGradient(*part)

    def per_example(self, start: int, stop: int) -> Tensor:
        outputs, inputs = (_examples_of_tokens(_wide(factor[start:stop])) for factor in (self.outputs, self.inputs))
        return outputs.mT @ inputs

    def squared_per_example(self) -> Tensor | None:
        outputs, inputs = (_examples_of_tokens(factor) for factor in (self.outputs, self.inputs))
        if outputs.shape[1] != 1:
            return None
        return _wide(outputs[:, 0]).square().mT @ _wide(inputs[:, 0]).square()


@dataclass(frozen=True)
class ConvGradient(BatchGradient):
    """A convolution's gradient read as `out × (in/groups · kernel)`, from output gradients and (padded) inputs.

    The products of a sketch are convolutions themselves: `B right` is one with `k` filters, `projectedᵀ B` the weight
    gradient of one with `k` output channels. No window is ever copied out. Only `dense` and `per_example` know groups.

    Examples:
        >>> import torch
        >>> from semu_peft.gradients import ConvGradient
        >>> conv, images = torch.nn.Conv2d(2, 4, kernel_size=3), torch.randn(5, 2, 6, 6)
        >>> output = conv(images)
        >>> output.sum().backward()
        >>> gradient = ConvGradient.of(conv, torch.ones_like(output), images)
        >>> torch.allclose(gradient.dense(), conv.weight.grad.flatten(1), atol=1e-4)
        True
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
        """Make the gradient of a convolution of any dimension from its output gradients and its inputs."""
        base: Any = conv
        padding = base.padding
        if isinstance(padding, str) or base.padding_mode != "zeros":
            mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
            inputs = F.pad(inputs, base._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(base.kernel_size)
        return cls(outputs, inputs, base.kernel_size, base.stride, padding, base.dilation, base.groups)

    @property
    def examples(self) -> int:
        return len(self.outputs)

    def received(self) -> Tensor:
        return self.outputs

    def rescaled(self, factor: float) -> ConvGradient:
        return replace(self, outputs=_wide(self.outputs) * factor, inputs=_wide(self.inputs))

    def dense(self) -> Tensor:
        return self._weight_gradient(self.outputs, self.groups).flatten(1)

    def per_example(self, start: int, stop: int) -> Tensor:
        examples = (
            replace(self, outputs=_wide(self.outputs[index : index + 1]), inputs=_wide(self.inputs[index : index + 1]))
            for index in range(start, stop)
        )
        return torch.stack([example.dense() for example in examples])

    def add_to(self, total: Tensor) -> None:
        total.add_(self.dense().to(total.device))

    def project(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return _rows(self.outputs).to(left) @ left, _rows(self.project_inputs(right))

    def project_inputs(self, right: Tensor) -> Tensor:
        """`B right` as the feature maps that it is, `(N, k, *positions)`; the output gradients are not looked at."""
        filters = right.mT.reshape(right.shape[1], self.inputs.shape[1], *self.kernel_size)
        return torch.convolution(
            self.inputs.to(filters), filters, None, self.stride, self.padding, self.dilation, False,
            [0] * len(self.kernel_size), 1,
        )  # fmt: skip

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


def _wide(factor: Tensor) -> Tensor:
    """In float32 or better."""
    return factor.to(torch.promote_types(factor.dtype, torch.float32))


def _examples_of_tokens(factor: Tensor) -> Tensor:
    """`(N, k)` or `(N, …, k)` as `(N, tokens, k)`."""
    return factor.reshape(len(factor), -1, factor.shape[-1])
