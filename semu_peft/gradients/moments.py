"""Second moments of what layers take in, over the rows that a loss depends on, and Fisher information by factors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .batch_gradient import BatchGradient, ConvGradient, TokenGradient
from .statistics import Statistic, StatisticFactory


class InputMoment(Statistic):
    """The second moment and the mean of what a layer takes in, `E[x xᵀ]` and `E[x]`, and so of what it gives.

    A row (a token, a window of a convolution) counts where the loss depends on what the layer gives for it: padding, on
    which nothing depends, does not, however much of it there is. The outputs need no statistic of their own: with
    `x̃ = (x, 1)` they are `y = (W b) x̃`.

    Args:
        shape: `(m, n)`.
        dtype: Of the sum.
        device: Where it is kept.
        per: What is one observation: each row, or the sum over the rows of one example.

    Raises:
        ValueError: The layer is read as a batch of matrices.

    Examples:
        >>> from semu_peft.gradients.batch_gradient import TokenGradient
        >>> moment = InputMoment((1, 2), torch.float32, torch.device("cpu"))
        >>> moment.add(TokenGradient(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 2.0], [9.0, 9.0]])))
        >>> moment.count, moment.second.tolist(), moment.mean.tolist()  # nothing depends on the second row
        (1, [[1.0, 2.0], [2.0, 4.0]], [1.0, 2.0])
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        per: Literal["row", "example"] = "row",
    ) -> None:
        if per not in ("row", "example"):
            raise ValueError(f"`per` must be 'row' or 'example', got {per!r}. Use one of these.")
        if len(shape) != 2:
            raise ValueError(f"it is a batch of {shape[0]} matrices, which share no inputs. Leave it out of `targets`.")
        self.per = per
        self._total = torch.zeros(shape[1] + 1, shape[1] + 1, dtype=dtype, device=device)
        self._count = torch.zeros((), dtype=torch.float64, device=device)

    @classmethod
    def per_example(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> InputMoment:
        """For `gather`: of the sums over each example's rows, as ReGLU takes them."""
        return cls(shape, dtype, device, per="example")

    @property
    def count(self) -> int:
        """How many rows, or examples, were seen."""
        return int(self._count)

    @property
    def augmented(self) -> Tensor:
        """`E[x̃ x̃ᵀ]` with `x̃ = (x, 1)`, `(n + 1, n + 1)`."""
        return self._total / self._count.clamp_min(1).to(self._total.dtype)

    @property
    def second(self) -> Tensor:
        """`E[x xᵀ]`, `(n, n)`."""
        return self.augmented[:-1, :-1]

    @property
    def mean(self) -> Tensor:
        """`E[x]`, `(n,)`."""
        return self.augmented[:-1, -1]

    def outputs(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`E[y yᵀ]`, `(m, m)`, of `y = W x + b`, in float64.

        Args:
            weight: `W`, `(m, n)`.
            bias: `b`, `(m,)`, where there is one.
        """
        both = self._with_bias(weight, bias)
        return both @ self.augmented.double() @ both.mT

    def mean_output(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`E[y]`, `(m,)`, of `y = W x + b`, in float64."""
        return self._with_bias(weight, bias) @ self.augmented[:, -1].double()

    @staticmethod
    def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
        column = weight.new_zeros(len(weight)) if bias is None else bias.detach().to(weight)
        return torch.cat([weight.detach(), column[:, None]], 1).double()

    def add(self, gradient: BatchGradient) -> None:
        outputs, inputs = (factor.to(self._total) for factor in _rows_of(gradient))
        live = (outputs != 0).any(-1, keepdim=True)
        rows = torch.cat([torch.where(live, inputs, 0.0), live.to(self._total)], -1)
        rows = rows.sum(1) if self.per == "example" else rows.flatten(0, 1)
        self._total.add_(rows.mT @ rows)
        self._count += (live.any(1) if self.per == "example" else live).sum()

    def tensors(self) -> list[Tensor]:
        return [self._total, self._count]


def _rows_of(gradient: BatchGradient) -> tuple[Tensor, Tensor]:
    """Output gradients `(N, rows, m)` and inputs `(N, rows, n)`."""
    if isinstance(gradient, TokenGradient):
        outputs, inputs = gradient.outputs, gradient.inputs
        return outputs.reshape(len(outputs), -1, outputs.shape[-1]), inputs.reshape(len(inputs), -1, inputs.shape[-1])
    if isinstance(gradient, ConvGradient):
        size = gradient.inputs.shape[1] * torch.Size(gradient.kernel_size).numel()
        windows = gradient.project_inputs(torch.eye(size, dtype=gradient.inputs.dtype, device=gradient.inputs.device))
        return gradient.outputs.flatten(2).mT, windows.flatten(2).mT
    raise ValueError(
        "its weight is differentiated as a parameter, so that there are no inputs to take moments of. Leave this layer "
        "out of `targets`."
    )


class FactoredFisher(Statistic):
    """The diagonal of the Fisher information by two thin factors, as VILA estimates it, with the mean taken off.

    With random `A`, `(r, n)`, and `B`, `(m, r)`, the gradients of a LoRA `W + B A` are `g_B = G Aᵀ` and `g_A = Bᵀ G`.
    With their variances `F = E[g²] − E[g]² ≥ 0` over batches (give batches of one for those over examples) the
    importance of `W` is `F_B F_A`, `(m, n)`. FILA's `E[g²]` alone counts what every example wants as well.

    Source: VILA, Kim et al., COLM 2025, arXiv 2508.21300. Here the gradient is that at `W` itself, so that no LoRA is
    put into the model, and one pair of factors is drawn, the same for every statistic of a shape.

    Args:
        shape: `(m, n)` or `(batch, m, n)`.
        dtype: Of the sums.
        device: Where they are kept.
        r: The factors' rank.
        seed: Of what is drawn.

    Examples:
        >>> from semu_peft.gradients.batch_gradient import DenseGradient
        >>> fisher = FactoredFisher((2, 3), torch.float32, torch.device("cpu"), r=1)
        >>> for _ in range(4):
        ...     fisher.add(DenseGradient(torch.ones(2, 3)))
        ...     fisher.end_batch(examples=1)
        >>> fisher.mean.shape, bool(fisher.mean.max() < 1e-6)  # all batches want the same: no variance
        (torch.Size([2, 3]), True)
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, r: int = 8, seed: int = 0
    ) -> None:
        *batch, m, n = shape
        generator = torch.Generator().manual_seed(seed)
        rank = min(r, m, n)
        self._right = (0.05 * torch.randn(*batch, n, rank, generator=generator)).to(device, dtype)
        self._left = (0.05 * torch.randn(*batch, m, rank, generator=generator)).to(device, dtype)
        self._sums = [torch.zeros_like(factor) for factor in (self._left, self._left, self._right, self._right)]
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._batch = [torch.zeros_like(self._left), torch.zeros_like(self._right)]

    @classmethod
    def of_rank(cls, r: int, seed: int = 0) -> StatisticFactory:
        """For `gather`: with factors of that rank."""
        return lambda shape, dtype, device: cls(shape, dtype, device, r, seed)

    def add(self, gradient: BatchGradient) -> None:
        for part in gradient.parts():
            outputs, inputs = part.project(self._left, self._right)
            self._batch[0] += part.times(inputs)
            self._batch[1] += part.transposed_times(outputs).mT

    def end_batch(self, examples: int | None) -> None:
        self._count += 1
        for place, gradient in enumerate(self._batch):
            self._sums[2 * place] += gradient
            self._sums[2 * place + 1] += gradient.square()
            gradient.zero_()

    @property
    def mean(self) -> Tensor:
        """`F_B F_A`, shaped as the matrix."""
        count = self._count.clamp_min(1).double()
        sums = [part.double() / count for part in self._sums]
        left, right = ((sums[i + 1] - sums[i].square()).clamp_min(0.0) for i in (0, 2))
        return (left @ right.mT).to(self._left)

    def tensors(self) -> list[Tensor]:
        return [*self._sums, self._count]
