"""K-FAC's two factors of a whole layer, with the means and leading directions of what they are the moments of."""

from __future__ import annotations

import torch
from torch import Tensor

from semu_peft.arguments import check_count

from .batch_gradient import BatchGradient, DenseGradient
from .statistics import CoreCovariance


class LayerCovariance(CoreCovariance):
    """The second moments and means of a layer's inputs and of its output gradients: `A = E[x xᵀ]`, `B = E[g gᵀ]`.

    As [`CoreCovariance`][semu_peft.gradients.statistics.CoreCovariance], for the layer's whole weight. Rows whose
    output gradient is zero, such as padding, have no say in the weight's gradient and are left out.

    Args:
        shape: `(m, n)`.
        dtype: Of the sums.
        device: Where they are kept.

    Raises:
        ValueError: The layer is a batch of matrices.

    Examples:
        >>> from semu_peft.gradients.batch_gradient import TokenGradient
        >>> covariance = LayerCovariance((1, 2), torch.float32, torch.device("cpu"))
        >>> covariance.add(TokenGradient(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 2.0], [9.0, 9.0]])))
        >>> covariance.end_batch(examples=2)
        >>> covariance.inputs.tolist(), covariance.outputs.tolist()
        ([[1.0, 2.0], [2.0, 4.0]], [[4.0]])
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        if len(shape) != 2:
            raise ValueError(f"`shape` must be that of one matrix, got {shape}. Leave the layer out of `targets`.")
        left, right = (torch.eye(size, dtype=dtype, device=device) for size in shape)
        super().__init__(left, right)
        self._output_sum, self._input_sum = left.new_zeros(shape[0]), right.new_zeros(shape[1])
        self._batch_output_sum = torch.zeros_like(self._output_sum)

    def add(self, gradient: BatchGradient) -> None:
        if isinstance(gradient, DenseGradient):
            super().add(gradient)  # says why not
        for part in gradient.parts():
            outputs, inputs = part.project(self.left, self.right)
            counts = outputs.any(1)
            outputs, inputs = outputs[counts], inputs[counts]
            self._batch_outputs.add_(outputs.mT @ outputs)
            self._batch_output_sum.add_(outputs.sum(0))
            self._inputs.add_(inputs.mT @ inputs)
            self._input_sum.add_(inputs.sum(0))
            self._rows += len(inputs)

    def end_batch(self, examples: int | None) -> None:
        super().end_batch(examples)
        self._output_sum.add_(self._batch_output_sum, alpha=examples or 0)
        self._batch_output_sum.zero_()

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), self._input_sum, self._output_sum]

    @property
    def input_mean(self) -> Tensor:
        """`E[x]`, `(n,)`."""
        return self._input_sum / self._rows.clamp_min(1).to(self._input_sum.dtype)

    @property
    def output_mean(self) -> Tensor:
        """`E[g]`, `(m,)`."""
        return self._output_sum / self._rows.clamp_min(1).to(self._output_sum.dtype)

    def directions(self, inputs: int = 23, outputs: int = 35) -> tuple[Tensor, Tensor]:
        """`Q`, `(n, ≤ 1 + inputs)`, and `P`, `(m, ≤ 1 + outputs)`: orthonormal bases of mean and leading components.

        The components are the eigenvectors of the covariance, those with the largest eigenvalues.

        Args:
            inputs: How many principal components of the inputs, beside their mean; the default is CIR's.
            outputs: The same of the output gradients.
        """
        check_count("inputs", inputs, least=0)
        check_count("outputs", outputs, least=0)
        return (
            _mean_and_components(self.inputs, self.input_mean, inputs),
            _mean_and_components(self.outputs, self.output_mean, outputs),
        )


def _mean_and_components(moment: Tensor, mean: Tensor, count: int) -> Tensor:
    moment, mean = moment.double(), mean.double()
    values, vectors = torch.linalg.eigh(moment - torch.outer(mean, mean))
    clear = values.flip(0)[:count] > 1e-10 * values[-1].clamp_min(0)
    both = torch.cat([mean[:, None], vectors.flip(1)[:, :count][:, clear]], dim=1)
    length = torch.linalg.vector_norm(mean)
    if length <= 1e-12 * moment.trace().clamp_min(0).sqrt():  # no mean to speak of
        both = both[:, 1:]
    left, sizes, _ = torch.linalg.svd(both / torch.linalg.vector_norm(both, dim=0), full_matrices=False)
    return left[:, sizes > 1e-10 * sizes[:1].clamp_min(0)]
