"""Sums of gradients over batches: exact, or as a sketch of a size that does not grow with the matrix.

Both are linear in the gradient, so that sums over batches, micro-batches and processes commute with them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch_gradient import BatchGradient, DenseGradient
from .factorize import Factors, all_finite, leading_factors, without_noise

ERROR_PROBES = 16


class Accumulator(ABC):
    """A layer's gradient `G`, `(m, n)` or `(batch, m, n)`, summed over batches."""

    shape: tuple[int, ...]

    @abstractmethod
    def add(self, gradient: BatchGradient, scale: float = 1.0) -> None:
        """Add one batch's gradient, times `scale`."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """What holds the sum: adding these up over processes, in place, adds up the gradients."""

    @abstractmethod
    def factorize(self, explained_variance: float, max_rank: int | None = None) -> Factors:
        """The leading singular directions, at least as many as explain the given share of the energy where possible."""

    @abstractmethod
    def inner_product(self, matrix: Tensor) -> Tensor:
        """`⟨G, matrix⟩`, a float64 scalar; of a sketch, that of its approximation."""

    def remove_component(self, matrix: Tensor) -> None:
        """`G ← G − (⟨G, M⟩ / ‖M‖²) M`: afterwards `G` is orthogonal to `M`, shaped like `G`."""
        squared_norm = matrix.double().square().sum()
        if squared_norm > 0:
            self.add(DenseGradient(matrix), scale=-float(self.inner_product(matrix) / squared_norm))

    def is_finite(self) -> bool:
        return all(all_finite(tensor) for tensor in self.tensors())


class ExactSum(Accumulator):
    """The sum itself, in float32 (float64 for float64 gradients).

    Args:
        shape: `(m, n)` or `(batch, m, n)`.
        dtype: Of the sum.
        device: Where it is kept; on `"cpu"` each batch's gradient is moved there as soon as it is known.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.total = torch.zeros(shape, dtype=dtype, device=device)

    def add(self, gradient: BatchGradient, scale: float = 1.0) -> None:
        if scale == 1.0:
            gradient.add_to(self.total)
        else:
            self.total.add_(gradient.dense().to(self.total), alpha=scale)

    def tensors(self) -> list[Tensor]:
        return [self.total]

    def factorize(self, explained_variance: float, max_rank: int | None = None) -> Factors:
        return leading_factors(self.total, explained_variance, max_rank)

    def inner_product(self, matrix: Tensor) -> Tensor:
        return torch.sum(self.total * matrix.to(self.total), dtype=torch.float64)


@dataclass(frozen=True)
class RandomMatrices:
    """The random matrices of sketches of one shape, `(m, s)`, `(n, s)` and `(m, ERROR_PROBES)`, standard normal."""

    left: Tensor
    right: Tensor
    probes: Tensor


class RandomMatrixPool:
    """Draws each test matrix once: layers of equal sides share theirs.

    Args:
        seed: Seed of the draws, which are made on the CPU and so are the same on every device and process.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._drawn: dict[tuple[int, int, str, torch.device], Tensor] = {}

    def of(self, m: int, n: int, columns: int, device: torch.device) -> RandomMatrices:
        return RandomMatrices(
            self._draw(m, columns, "left", device),
            self._draw(n, columns, "right", device),
            self._draw(m, ERROR_PROBES, "probes", device),
        )

    def _draw(self, rows: int, columns: int, side: str, device: torch.device) -> Tensor:
        key = (rows, columns, side, device)
        if key not in self._drawn:
            salt = 3 * (rows * 65_537 + columns) + ("left", "right", "probes").index(side)
            generator = torch.Generator().manual_seed((self.seed * 2_654_435_761 + salt) % 2**63)
            self._drawn[key] = torch.randn(rows, columns, generator=generator).to(device)
        return self._drawn[key]


class Sketch(Accumulator):
    """A single-pass two-sided sketch: `G Ω`, `Ψᵀ G` and a core `Φᵀ G Ξ`, `k (m + n) + (2k)²` numbers in all.

    From `Q = orth(G Ω)` and `P = orth(Gᵀ Ψ)` it recovers `G ≈ Q C Pᵀ`, with the core `C` by least squares from
    `Φᵀ G Ξ = (Φᵀ Q) C (Ξᵀ P)ᵀ`, without a second look at `G`. `Ω` and `Ψ` are the first `k` of the `2k + 1` columns of
    `Ξ` and `Φ`, which saves their products; `Φ` stays independent of `Q` and `Ξ` of `P`, as the least squares need.
    A few more probes `Θᵀ G` give an unbiased estimate of the squared error, `E ‖Θᵀ (G − Ĝ)‖² = q ‖G − Ĝ‖²`, and with
    it of the energy that the sketch did not catch.

    Source: Tropp, Yurtsever, Udell, Cevher, *Streaming Low-Rank Matrix Approximation*, SIAM J. Sci. Comput. 2019,
    arXiv 1902.08651, sections 2 and 6.

    Args:
        shape: `(m, n)`.
        size: `k`, the most directions that can be recovered; half as many are recovered well.
        pool: Where the test matrices come from.
        device: Where the sketch is kept and computed.
    """

    def __init__(self, shape: tuple[int, int], size: int, pool: RandomMatrixPool, device: torch.device) -> None:
        self.shape = shape
        m, n = shape
        self.size = size
        self._test = pool.of(m, n, 2 * size + 1, device)
        self.left = torch.zeros(m, size, device=device)
        self.right = torch.zeros(size, n, device=device)
        self.core = torch.zeros(2 * size + 1, 2 * size + 1, device=device)
        self.probed = torch.zeros(ERROR_PROBES, n, device=device)

    @staticmethod
    def pays(shape: tuple[int, ...], size: int) -> bool:
        """Whether a sketch of this size is smaller than the matrix, its share of test matrices not counted."""
        if len(shape) != 2:
            return False
        m, n = shape
        return size < min(m, n) and size * (m + n) + (2 * size + 1) ** 2 + ERROR_PROBES * n < m * n

    def add(self, gradient: BatchGradient, scale: float = 1.0) -> None:
        outputs, inputs = gradient.project(torch.cat([self._test.left, self._test.probes], 1), self._test.right)
        outputs, probed = outputs[:, :-ERROR_PROBES], outputs[:, -ERROR_PROBES:]
        self.left.add_(gradient.times(inputs[:, : self.size]), alpha=scale)
        both = gradient.transposed_times(torch.cat([outputs[:, : self.size], probed], 1))
        self.right.add_(both[: self.size], alpha=scale)
        self.probed.add_(both[self.size :], alpha=scale)
        self.core.add_(outputs.mT @ inputs, alpha=scale)

    def tensors(self) -> list[Tensor]:
        return [self.left, self.right, self.core, self.probed]

    def factorize(self, explained_variance: float, max_rank: int | None = None) -> Factors:
        left, values, right = self._svd()
        caught = values.square().sum()
        missed = self._missed_energy(left, values, right)
        values = without_noise(values, self.shape, torch.finfo(torch.float32).eps)
        factors = Factors(left.float(), right.float(), values.float(), caught + missed, estimated=True)
        return factors.reaching(explained_variance, max_rank)

    def inner_product(self, matrix: Tensor) -> Tensor:
        left, values, right = self._svd()
        return torch.einsum("mk,mn,nk,k->", left, matrix.to(left), right, values)

    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        q = torch.linalg.qr(self.left)[0].double()
        p = torch.linalg.qr(self.right.mT)[0].double()
        from_left = torch.linalg.pinv(self._test.left.double().mT @ q)
        from_right = torch.linalg.pinv(self._test.right.double().mT @ p)
        u, values, vt = torch.linalg.svd(from_left @ self.core.double() @ from_right.mT)
        return q @ u, values, p @ vt.mT

    def _missed_energy(self, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
        approximation = (self._test.probes.double().mT @ left) * values @ right.mT
        return (self.probed.double() - approximation).square().sum() / ERROR_PROBES
