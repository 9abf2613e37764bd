"""What is kept of the gradients of one weight: their sum, the sum of their squares, or K-FAC's two factors.

A statistic is summed over batches and processes. What can also be factorised into directions for an adapter is a
[`MatrixSum`][semu_peft.gradients.statistics.MatrixSum]; its other form is a
[`Sketch`][semu_peft.gradients.sketch.Sketch].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from semu_peft.linalg.energy import largest_magnitude, squared_norm
from semu_peft.linalg.factorize import SingularFactors, leading_factors, leading_factors_of_each
from semu_peft.tuner.adapted import semu_layers

from .batch_gradient import BatchGradient, DenseGradient

# Gradients of single examples are formed so many numbers at a time, or one by one where one has more.
_NUMBERS_AT_ONCE = 2**22


class Statistic(ABC):
    """Something that is summed over the gradients of one weight, batch by batch.

    [`gather`][semu_peft.gradients.gather.gather] calls `add` in the backward pass, once for each call of the layer,
    and `end_batch` after it. A class, or any function, that makes one from `(shape, dtype, device)` can be given to it:
    the shape of the weight's matrix, `(m, n)` or `(batch, m, n)`, the dtype to sum in, and where the weight lies.

    Examples:
        >>> class Largest(Statistic):
        ...     def __init__(self, shape, dtype, device):
        ...         self.norm = torch.zeros((), dtype=dtype, device=device)
        ...     def add(self, gradient):
        ...         self.norm += gradient.dense().norm()
        ...     def tensors(self):
        ...         return [self.norm]
        >>> largest = Largest((2, 2), torch.float32, torch.device("cpu"))
        >>> largest.add(DenseGradient(torch.tensor([[3.0, 0.0], [0.0, 4.0]])))
        >>> largest.norm
        tensor(5.)

    Attributes:
        takes_sums: Whether it is the same for a sum of gradients as for these one by one, and asks nothing of their
            form, so that autograd may add up those of several calls.
    """

    takes_sums: bool = False

    @abstractmethod
    def add(self, gradient: BatchGradient) -> None:
        """Take in a gradient: all of a batch's, or that of one of several calls of the layer."""

    def end_batch(self, examples: int | None) -> None:  # noqa: B027 - most statistics need not know
        """Called after each batch with the number of its examples, `None` where the batch does not say.

        Raises:
            ValueError: The statistic cannot be taken from this batch.
        """

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """What holds the sum: adding these up over processes, in place, adds up the statistic."""

    def is_finite(self) -> bool:
        return all(math.isfinite(largest_magnitude(tensor)) for tensor in self.tensors())

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in self.tensors())
        return f"{type(self).__name__}({shapes})"


StatisticFactory = Callable[[tuple[int, ...], torch.dtype, torch.device], Statistic]


class MatrixSum(Statistic):
    """A sum of gradients `G`, `(m, n)` or `(batch, m, n)`, that can be factorised into directions.

    It is linear in the gradient, so that sums over batches, micro-batches and processes commute with it.

    Examples:
        >>> import torch
        >>> from semu_peft.gradients import DenseGradient, GradientSum
        >>> total = GradientSum((2, 2), torch.float32, torch.device("cpu"))  # a `MatrixSum`
        >>> total.add(DenseGradient(torch.diag(torch.tensor([4.0, 3.0]))))
        >>> total.factorize(explained_variance=0.5).rank
        1
    """

    shape: tuple[int, ...]
    takes_sums = True

    @abstractmethod
    def add(self, gradient: BatchGradient, scale: float = 1.0) -> None:
        """Add a gradient, times `scale`."""

    @abstractmethod
    def copy(self) -> MatrixSum:
        """A copy of the sum, in memory of its own."""

    @abstractmethod
    def factorize(self, explained_variance: float, max_rank: int | None = None) -> SingularFactors:
        """The leading singular directions, at least as many as explain that much of the energy where possible."""

    @classmethod
    def factorize_each(
        cls, sums: Sequence[MatrixSum], explained_variance: float, max_rank: int | None = None
    ) -> list[SingularFactors]:
        """Factorise sums that are [`alike`][semu_peft.gradients.statistics.MatrixSum.alike], each for itself.

        A kind of sum that can do so side by side, in fewer and larger steps, does it here.
        """
        return [each.factorize(explained_variance, max_rank) for each in sums]

    @property
    def alike(self) -> Hashable:
        """What sums must have in common to be factorised side by side."""
        return type(self), self.shape

    @abstractmethod
    def inner_product(self, matrix: Tensor) -> Tensor:
        """`⟨G, matrix⟩`, a float64 scalar; of a sketch, that of its approximation."""

    def remove_component(self, matrix: Tensor) -> None:
        """`G ← G − (⟨G, M⟩ / ‖M‖²) M`: afterwards `G` is orthogonal to `M`, shaped like `G`."""
        squares = squared_norm(matrix).sum()
        # Worked out where the sum lies, which waits for nothing.
        share = torch.where(squares > 0, self.inner_product(matrix).to(squares) / squares, 0)
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        self.add(DenseGradient(matrix * share.to(matrix)), scale=-1.0)


class GradientSum(MatrixSum):
    """The gradient itself, summed over batches in float32 (float64 for float64 gradients).

    Args:
        shape: `(m, n)` or `(batch, m, n)`.
        dtype: Of the sum.
        device: Where it is kept; see [`on`][semu_peft.gradients.statistics.GradientSum.on].

    Examples:
        >>> total = GradientSum((2, 2), torch.float32, torch.device("cpu"))
        >>> for _ in range(3):
        ...     total.add(DenseGradient(torch.eye(2)))
        >>> total.total.tolist(), total.factorize(explained_variance=0.9).rank
        ([[3.0, 0.0], [0.0, 3.0]], 2)
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self._dtype, self._device = dtype, device
        self._total: Tensor | None = None

    @classmethod
    def on(cls, device: torch.device | str) -> StatisticFactory:
        """For `gather`: sums that are kept on this device, to which each batch's gradient is moved at once."""
        return lambda shape, dtype, _: cls(shape, dtype, torch.device(device))

    @property
    def total(self) -> Tensor:
        """The sum, shaped as the matrix."""
        if self._total is None:
            self._total = torch.zeros(self.shape, dtype=self._dtype, device=self._device)
        return self._total

    def add(self, gradient: BatchGradient, scale: float = 1.0) -> None:
        for part in gradient.parts():
            if scale != 1.0:
                self.total.add_(part.dense().to(self.total), alpha=scale)
            elif self._total is None:  # filling a matrix with zeros first takes as long as adding to it
                self._total = part.dense().to(self._device, self._dtype, memory_format=torch.contiguous_format)
            else:
                part.add_to(self._total)

    def copy(self) -> GradientSum:
        duplicate = GradientSum(self.shape, self._dtype, self._device)
        duplicate._total = self.total.clone()
        return duplicate

    def tensors(self) -> list[Tensor]:
        return [self.total]

    def factorize(self, explained_variance: float, max_rank: int | None = None) -> SingularFactors:
        return leading_factors(self.total, explained_variance, max_rank)

    @classmethod
    def factorize_each(
        cls, sums: Sequence[MatrixSum], explained_variance: float, max_rank: int | None = None
    ) -> list[SingularFactors]:
        totals = [total for each in sums for total in each.tensors()]
        return leading_factors_of_each(totals, explained_variance, max_rank)

    @property
    def alike(self) -> Hashable:
        return type(self), self.shape, self._dtype, self._device

    def inner_product(self, matrix: Tensor) -> Tensor:
        return (self.total * matrix.to(self.total)).sum(-1).double().sum()


class SquaredSum(Statistic):
    """The diagonal of the Fisher information: squared gradients, of single examples or of whole batches.

    The two are different quantities. For an objective that is a mean over the `N` examples of a batch, example `i` has
    `g_i = N ∂L/∂W` restricted to it, and

    - `per="example"`: `Σ_i g_i ∘ g_i`, whose mean over examples is the (empirical) Fisher information. It does not
      depend on how the examples are split into batches, and a subset's mean is at most `n_all / n_subset` times the
      mean of all;
    - `per="batch"`: `Σ_b (∂L_b/∂W) ∘ (∂L_b/∂W)`, what much published code calls Fisher. Between unlike examples the
      gradients of a batch cancel: its mean falls with the batch size, and ratios of two such means grow with it.

    For an objective that is a mean over tokens, `g_i` is `N` times the example's part of that mean: a long example
    counts as it does in the loss of its batch, and what is said of splits and subsets holds for examples of one length,
    or in batches of one, alone. For a sum over examples it is `N` times too large, so use batches of one.

    Gradients of single examples come from a layer's inputs and output gradients, whose first dimension must be the
    examples; they are formed a few at a time, or not at all where an example is one row. A weight that is
    differentiated as a parameter (an embedding, a grouped convolution, a weight that several layers share) has no
    gradient of single examples but in batches of one. Until a batch ends, the inputs and output gradients of its layers
    are kept, since a layer may be called more than once.

    Source: the diagonal Fisher of SSD, Foster et al., arXiv 2308.07707, equation 4.

    Args:
        shape: `(m, n)` or `(batch, m, n)`.
        dtype: Of the sum.
        device: Where it is kept.
        per: Whose gradients are squared.

    Examples:
        >>> from semu_peft.gradients.batch_gradient import TokenGradient
        >>> both = torch.tensor([[1.0], [-1.0]])  # two examples, `∂L/∂y = ±1/2` for a mean over them
        >>> fisher = SquaredSum((1, 1), torch.float32, torch.device("cpu"))
        >>> fisher.add(TokenGradient(both / 2, torch.ones(2, 1)))
        >>> fisher.end_batch(examples=2)
        >>> fisher.mean  # per="batch" would be 0
        tensor([[1.]])
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        per: Literal["example", "batch"] = "example",
    ) -> None:
        if per not in ("example", "batch"):
            raise ValueError(f"`per` must be 'example' or 'batch', got {per!r}.")
        self.shape, self.per = shape, per
        self.total = torch.zeros(shape, dtype=dtype, device=device)
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._calls: list[BatchGradient] = []
        self._squared = False

    @classmethod
    def per_batch(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> SquaredSum:
        """For `gather`: the squares of whole batches' gradients."""
        return cls(shape, dtype, device, per="batch")

    @property
    def count(self) -> int:
        """How many gradients were squared: examples, or batches."""
        return int(self._count)

    @property
    def mean(self) -> Tensor:
        """The sum over `count`: the diagonal of the Fisher information, shaped as the matrix."""
        return self.total / self._count.clamp_min(1).to(self.total.dtype)

    def add(self, gradient: BatchGradient) -> None:
        if self._squared:
            raise ValueError(
                "the gradient of this weight comes in several parts that cannot be put together, as under reentrant "
                "checkpointing. Use `gradient_checkpointing_kwargs={'use_reentrant': False}`, or leave the layer out."
            )
        if gradient.examples is None:  # held back, all weights' dense gradients would be there at once
            self._add_square(gradient.dense())
            self._squared = True
        else:
            self._calls.append(gradient)

    def end_batch(self, examples: int | None) -> None:
        calls, squared = self._calls, self._squared
        self._calls, self._squared = [], False
        if self.per == "batch":
            self._count += 1
            if calls:
                self._add_square(_sum_of(calls, self.total))
            return
        if examples is None:
            raise ValueError(
                "the number of examples of the batch is not known, as it holds no tensor. Put one into it whose first "
                "dimension is the examples, or square whole batches (`SquaredSum.per_batch`)."
            )
        self._count += examples
        if examples == 1 and calls:
            self._add_square(_sum_of(calls, self.total))
        elif squared and examples != 1:
            raise ValueError(
                "its weight is differentiated as a parameter, which has no gradients of single examples, and the "
                f"batch has {examples}. Use batches of one, or square whole batches (`SquaredSum.per_batch`)."
            )
        elif calls:
            self._add_examples(calls, examples)

    def tensors(self) -> list[Tensor]:
        return [self.total, self._count]

    def _add_examples(self, calls: list[BatchGradient], examples: int) -> None:
        odd = [call.examples for call in calls if call.examples != examples]
        if odd:
            raise ValueError(
                f"it is called with {odd[0]} rows where the batch has {examples} examples, so that they cannot be told "
                "apart. Use batches of one, or square whole batches (`SquaredSum.per_batch`)."
            )
        squares = calls[0].squared_per_example() if len(calls) == 1 else None
        if squares is not None:
            self.total.add_(squares.to(self.total), alpha=examples**2)
            return
        step = max(1, _NUMBERS_AT_ONCE // math.prod(self.shape))
        for start in range(0, examples, step):
            stop = min(start + step, examples)
            gradients = calls[0].per_example(start, stop)
            for call in calls[1:]:
                gradients = gradients + call.per_example(start, stop)
            self.total.add_(gradients.square().sum(0).to(self.total), alpha=examples**2)

    def _add_square(self, gradient: Tensor) -> None:
        gradient = gradient.to(self.total)
        self.total.addcmul_(gradient, gradient)


class CoreCovariance(Statistic):
    """K-FAC's two factors inside a core: the second moments of what it takes in and of the gradient of what it gives.

    With `h = x V`, `(r,)`, and `g = N dY U`, `(r,)`, of each row (token, or window of a convolution) of a layer with
    the correction `U R Vᵀ`, they are `A = E[h hᵀ]` and `B = E[g gᵀ]`: the Fisher information of the core is about
    `B ⊗ A`, its natural gradient `B⁻¹ ∇R A⁻¹`. `N` is the number of examples of the batch, over which the objective
    is a mean: `B` does not depend on how the examples are split into batches. Padding is left out.

    Source: Martens and Grosse 2015, arXiv 1503.05671, section 3; for windows Grosse and Martens 2016, arXiv 1602.01407.

    Args:
        left: `U`, `(m, r)`.
        right: `V`, `(n, r)`.

    Raises:
        ValueError: The bases are those of a batch of matrices.

    Examples:
        >>> from semu_peft.gradients.batch_gradient import TokenGradient
        >>> covariance = CoreCovariance(left=torch.eye(2)[:, :1], right=torch.eye(3)[:, :2])
        >>> covariance.add(TokenGradient(torch.tensor([[0.5, 9.0]]), torch.tensor([[1.0, 2.0, 9.0]])))
        >>> covariance.end_batch(examples=2)
        >>> covariance.inputs.tolist(), covariance.outputs.tolist()
        ([[1.0, 2.0], [2.0, 4.0]], [[1.0]])
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        if left.dim() != 2 or right.dim() != 2:
            raise ValueError(
                f"`left` and `right` must be matrices, got {tuple(left.shape)} and {tuple(right.shape)}: a layer with "
                "a batch of cores has no two factors for all. Leave it out of `targets`."
            )
        self.left, self.right = left, right
        self._outputs = left.new_zeros(left.shape[1], left.shape[1])
        self._inputs = right.new_zeros(right.shape[1], right.shape[1])
        self._rows = left.new_zeros((), dtype=torch.float64)
        self._batch_outputs = torch.zeros_like(self._outputs)

    @classmethod
    def of_adapter(cls, model: nn.Module, adapter_name: str = "default") -> Mapping[str, StatisticFactory]:
        """For `gather`: the statistic of each layer of a SEMU adapter that is corrected through one core."""
        layers = semu_layers(model, adapter_name)
        bases = {name: (layer.semu_U[adapter_name], layer.semu_V[adapter_name]) for name, layer in layers.items()}
        return {name: cls.within(left, right) for name, (left, right) in bases.items() if left.dim() == 2}

    @classmethod
    def within(cls, left: Tensor, right: Tensor) -> StatisticFactory:
        """For `gather`: the statistic of one layer."""
        return lambda shape, dtype, device: cls(left, right)

    @classmethod
    def of_weight(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> CoreCovariance:
        """For `gather`: the factors of a whole weight, `(n, n)` and `(m, m)`, with no bases around them."""
        if len(shape) != 2:
            raise ValueError(f"`shape` must be that of one matrix, got {shape}. Leave this layer out of `targets`.")
        left, right = (torch.eye(size, dtype=dtype, device=device) for size in shape)
        return cls(left, right)

    @property
    def rows(self) -> float:
        """How many rows were seen: each example has one, or as many as tokens without padding, or as windows."""
        return float(self._rows)

    @property
    def inputs(self) -> Tensor:
        """`A`, `(r, r)`."""
        return self._inputs / self._rows.clamp_min(1).to(self._inputs.dtype)

    @property
    def outputs(self) -> Tensor:
        """`B`, `(r, r)`."""
        return self._outputs / self._rows.clamp_min(1).to(self._outputs.dtype)

    def add(self, gradient: BatchGradient) -> None:
        if isinstance(gradient, DenseGradient):
            raise ValueError(
                "its weight is differentiated as a parameter, so that there are no inputs and output gradients to take "
                "second moments of. Leave this layer out of `targets`."
            )
        for part in gradient.parts():
            outputs, inputs = part.project(self.left, self.right)
            self._batch_outputs.add_(outputs.mT @ outputs)
            counts = getattr(part, "counts", None)
            # An attention without a token to look at may give no number at padding.
            counted = inputs if counts is None else torch.where(counts.reshape(-1, 1), inputs, 0.0)
            self._inputs.add_(counted.mT @ counted)
            self._rows += len(inputs) if counts is None else counts.sum()

    def end_batch(self, examples: int | None) -> None:
        if examples is None:
            raise ValueError(
                "the number of examples of the batch is not known, as it holds no tensor. Put one into it whose first "
                "dimension is the examples."
            )
        self._outputs.add_(self._batch_outputs, alpha=examples**2)
        self._batch_outputs.zero_()

    def tensors(self) -> list[Tensor]:
        return [self._inputs, self._outputs, self._rows]


def _sum_of(calls: list[BatchGradient], like: Tensor) -> Tensor:
    total = calls[0].dense().to(like)
    for call in calls[1:]:
        call.add_to(total)
    return total
