"""Sums of gradients over batches: exact, or as a sketch of a size that does not grow with the matrix.

Both are linear in the gradient, so that sums over batches, micro-batches and processes commute with them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from semu_peft.linalg.energy import largest_magnitude, squared_norm, without_noise
from semu_peft.linalg.factorize import SingularFactors, leading_factors

from .batch_gradient import BatchGradient, DenseGradient

ERROR_PROBES = 16
_ROWS_AT_ONCE = 512
# A sketch must be this much smaller than its matrix: near its size it takes longer to fill and catches less.
_WORTHWHILE = 0.4


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
    def factorize(self, explained_variance: float, max_rank: int | None = None) -> SingularFactors:
        """The leading singular directions, at least as many as explain the given share of the energy where possible."""

    @abstractmethod
    def inner_product(self, matrix: Tensor) -> Tensor:
        """`⟨G, matrix⟩`, a float64 scalar; of a sketch, that of its approximation."""

    def remove_component(self, matrix: Tensor) -> None:
        """`G ← G − (⟨G, M⟩ / ‖M‖²) M`: afterwards `G` is orthogonal to `M`, shaped like `G`."""
        squares = float(squared_norm(matrix).sum())
        if squares > 0:
            self.add(DenseGradient(matrix), scale=-float(self.inner_product(matrix)) / squares)

    def is_finite(self) -> bool:
        return all(math.isfinite(largest_magnitude(tensor)) for tensor in self.tensors())


class ExactSum(Accumulator):
    """The sum itself, in float32 (float64 for float64 gradients).

    Args:
        shape: `(m, n)` or `(batch, m, n)`.
        dtype: Of the sum.
        device: Where it is kept; on `"cpu"` each batch's gradient is moved there as soon as it is known.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self._dtype, self._device = dtype, device
        self._total: Tensor | None = None

    @property
    def total(self) -> Tensor:
        if self._total is None:
            self._total = torch.zeros(self.shape, dtype=self._dtype, device=self._device)
        return self._total

    def add(self, gradient: BatchGradient, scale: float = 1.0) -> None:
        if scale != 1.0:
            self.total.add_(gradient.dense().to(self.total), alpha=scale)
        elif self._total is None:  # filling a matrix with zeros first takes as long as adding to it
            self._total = gradient.dense().to(self._device, self._dtype, memory_format=torch.contiguous_format)
        else:
            gradient.add_to(self._total)

    def tensors(self) -> list[Tensor]:
        return [self.total]

    def factorize(self, explained_variance: float, max_rank: int | None = None) -> SingularFactors:
        return leading_factors(self.total, explained_variance, max_rank)

    def inner_product(self, matrix: Tensor) -> Tensor:
        return (self.total * matrix.to(self.total)).sum(-1).double().sum()


@dataclass(frozen=True)
class RandomMatrices:
    """The random matrices of one sketch, `(m, s)`, `(n, s)` and `(m, ERROR_PROBES)`, standard normal."""

    left: Tensor
    right: Tensor
    probes: Tensor


class RandomMatrixPool:
    """Draws each test matrix once: layers share the leading rows of the largest that any of them needs.

    Args:
        seed: Seed of the draws, which are made on the CPU and so are the same on every device and process.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._drawn: dict[tuple[int, str, torch.device], Tensor] = {}

    def of(self, m: int, n: int, columns: int, device: torch.device) -> RandomMatrices:
        return RandomMatrices(
            self._draw(m, columns, "left", device),
            self._draw(n, columns, "right", device),
            self._draw(m, ERROR_PROBES, "probes", device),
        )

    def _draw(self, rows: int, columns: int, side: str, device: torch.device) -> Tensor:
        key = (columns, side, device)
        drawn = self._drawn.get(key, torch.empty(0, columns, device=device))
        # In blocks with seeds of their own, so that it does not matter which layer asks first.
        missing = range(len(drawn) // _ROWS_AT_ONCE, -(-rows // _ROWS_AT_ONCE))
        if missing:
            blocks = (self._block(index, columns, side).to(device) for index in missing)
            drawn = self._drawn[key] = torch.cat([drawn, *blocks])
        return drawn[:rows]

    def _block(self, index: int, columns: int, side: str) -> Tensor:
        salt = 3 * (index * 65_537 + columns) + ("left", "right", "probes").index(side)
        generator = torch.Generator().manual_seed((self.seed * 2_654_435_761 + salt) % 2**63)
        return torch.randn(_ROWS_AT_ONCE, columns, generator=generator)


class Sketch(Accumulator):
    """A single-pass two-sided sketch: `G Ω`, `Ψᵀ G` and a core `Φᵀ G Ξ`, `k (m + n) + k²` numbers in all.

    From `Q = orth(G Ω)` and `P = orth(Gᵀ Ψ)` it recovers `G ≈ Q C Pᵀ`, with the core `C` by least squares from
    `Φᵀ G Ξ = (Φᵀ Q) C (Ξᵀ P)ᵀ`, without a second look at `G`. `Ω` and `Ψ` are the first `k` of the `2k + 1` columns of
    `Ξ` and `Φ`: `Φ` stays independent of `Q` and `Ξ` of `P`, as the least squares need, and of the core only what the
    other `k + 1` columns see has to be kept, as the rest of it follows from `G Ω` and `Ψᵀ G`.
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
        self._pool, self._device = pool, device
        self.left = torch.zeros(m, size, device=device)
        self.right = torch.zeros(size, n, device=device)
        self.core = torch.zeros(size + 1, size + 1, device=device)
        self.probed = torch.zeros(ERROR_PROBES, n, device=device)

    @property
    def _test(self) -> RandomMatrices:
        # Asked for when needed: views taken before the pool has grown would keep the smaller matrices alive.
        m, n = self.shape
        return self._pool.of(m, n, 2 * self.size + 1, self._device)

    @staticmethod
    def pays(shape: tuple[int, ...], size: int) -> bool:
        """Whether a sketch of this size is so much smaller than the matrix that it is worth its error."""
        if len(shape) != 2:
            return False
        m, n = shape
        numbers = size * (m + n) + (size + 1) ** 2 + ERROR_PROBES * n
        return size < min(m, n) and numbers < _WORTHWHILE * m * n

    def add(self, gradient: BatchGradient, scale: float = 1.0) -> None:
        test = self._test
        outputs, inputs = gradient.project(torch.cat([test.left, test.probes], 1), test.right)
        outputs, probed = outputs[:, :-ERROR_PROBES], outputs[:, -ERROR_PROBES:]
        self.left.add_(gradient.times(inputs[:, : self.size]), alpha=scale)
        both = gradient.transposed_times(torch.cat([outputs[:, : self.size], probed], 1))
        self.right.add_(both[: self.size], alpha=scale)
        self.probed.add_(both[self.size :], alpha=scale)
        self.core.add_(outputs[:, self.size :].mT @ inputs[:, self.size :], alpha=scale)

    def tensors(self) -> list[Tensor]:
        return [self.left, self.right, self.core, self.probed]

    def factorize(self, explained_variance: float, max_rank: int | None = None) -> SingularFactors:
        q, core, p = self._recovered()
        u, values, vt = torch.linalg.svd(core)
        energy = values.square().sum() + self._missed_energy(q, core, p)
        values = without_noise(values, self.shape, torch.finfo(torch.float32).eps)
        inside = SingularFactors(u.float(), vt.mT.float(), values.float(), energy, estimated=True)
        inside = inside.reaching(explained_variance, max_rank)
        return replace(inside, left=q @ inside.left, right=p @ inside.right)

    def inner_product(self, matrix: Tensor) -> Tensor:
        q, core, p = self._recovered()
        return torch.sum(core * (q.mT @ matrix.to(q) @ p))

    def _recovered(self) -> tuple[Tensor, Tensor, Tensor]:
        """`Q`, `C` (in float64) and `P` of `G ≈ Q C Pᵀ`."""
        q, p = torch.linalg.qr(self.left)[0], torch.linalg.qr(self.right.mT)[0]
        test = self._test
        from_left, from_right = (test.left.mT @ q).double(), (test.right.mT @ p).double()
        below = torch.cat([test.left[:, self.size :].mT @ self.left, self.core], 1)
        core = torch.cat([self.right @ test.right, below]).double()
        half = torch.linalg.lstsq(from_left, core, driver="gels").solution
        return q, torch.linalg.lstsq(from_right, half.mT, driver="gels").solution.mT, p

    def _missed_energy(self, q: Tensor, core: Tensor, p: Tensor) -> Tensor:
        approximation = (self._test.probes.mT @ q).double() @ core @ p.mT.double()
        return (self.probed.double() - approximation).square().sum() / ERROR_PROBES
