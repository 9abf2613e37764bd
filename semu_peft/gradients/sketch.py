"""A random sketch of a sum of gradients, of a size that does not grow with the matrix, and its random matrices."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from semu_peft.arguments import check_count, check_device
from semu_peft.linalg.energy import check_explained_variance, ranks_for_energy, without_noise
from semu_peft.linalg.factorize import SingularFactors
from semu_peft.linalg.gram import gram_spectrum, inverse, resolved
from semu_peft.linalg.orthonormal import orthonormal
from semu_peft.linalg.products import add_product, product

from .batch_gradient import BatchGradient, DenseGradient, TokenGradient
from .statistics import GradientSum, MatrixSum, StatisticFactory

ERROR_PROBES = 16
_ROWS_AT_ONCE = 512
# A sketch must be this much smaller than its matrix: near its size it takes longer to fill and catches less.
_WORTHWHILE = 0.4


@dataclass(frozen=True)
class RandomMatrices:
    """The random matrices of one sketch of size `k`: normal draws, rounded to what bfloat16 holds, of variance 1.

    Attributes:
        of_outputs: `(m, ≥ 2k + 1 + ERROR_PROBES)`: the first `k` columns of `Φ`, which are `Ψ`; the probes; the rest of
            `Φ`; and columns that fill up a multiple of eight, as GPUs want it.
        of_inputs: `(n, ≥ 2k + 1)`: `Ξ`, whose first `k` columns are `Ω`, filled up likewise.
        size: `k`.
    """

    of_outputs: Tensor
    of_inputs: Tensor
    size: int

    @property
    def seen(self) -> Tensor:
        """`Ψ` and the probes, `(m, k + ERROR_PROBES)`."""
        return self.of_outputs[:, : self.size + ERROR_PROBES]

    @property
    def probes(self) -> Tensor:
        """`Θ`, `(m, ERROR_PROBES)`."""
        return self.of_outputs[:, self.size : self.size + ERROR_PROBES]

    @property
    def rest(self) -> Tensor:
        """The columns of `Φ` that are not in `Ψ`, `(m, k + 1)`."""
        return self.of_outputs[:, self.size + ERROR_PROBES : 2 * self.size + 1 + ERROR_PROBES]

    @property
    def inputs(self) -> Tensor:
        """`Ξ`, `(n, 2k + 1)`."""
        return self.of_inputs[:, : 2 * self.size + 1]


class RandomMatrixPool:
    """Draws each test matrix once: layers share the leading rows of the largest that any of them needs.

    Args:
        seed: Seed of the draws, which are made on the CPU and so are the same on every device and process.

    Examples:
        >>> pool = RandomMatrixPool(seed=0)
        >>> small, large = (pool.of(m, n=5, size=3, device=torch.device("cpu")) for m in (4, 9))
        >>> torch.equal(small.of_outputs, large.of_outputs[:4])
        True
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._drawn: dict[tuple[int, str, torch.device, torch.dtype], Tensor] = {}

    def of(self, m: int, n: int, size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> RandomMatrices:
        """The matrices for a gradient `(m, n)` and sketches of this size, the same numbers in any dtype."""
        outputs = self._draw(m, 2 * size + 1 + ERROR_PROBES, "outputs", device, dtype)
        return RandomMatrices(outputs, self._draw(n, 2 * size + 1, "inputs", device, dtype), size)

    def _draw(self, rows: int, columns: int, side: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = (columns, side, device, dtype)
        if len(self._drawn.get(key, ())) < rows:
            drawn = self._grown(rows, columns, side, device)
            self._drawn[key] = drawn if dtype == drawn.dtype else drawn.to(dtype)
        return self._drawn[key][:rows]

    def _grown(self, rows: int, columns: int, side: str, device: torch.device) -> Tensor:
        """In bfloat16, of which those in other dtypes are copies."""
        key, width = (columns, side, device, torch.bfloat16), -(-columns // 8) * 8
        drawn = self._drawn.get(key, torch.empty(0, width, device=device, dtype=torch.bfloat16))
        # In blocks with seeds of their own, so that it does not matter which layer asks first.
        if missing := range(len(drawn) // _ROWS_AT_ONCE, -(-rows // _ROWS_AT_ONCE)):
            levels = _levels().to(drawn)
            blocks = (levels[self._block(index, width, side).to(device).long()] for index in missing)
            drawn = self._drawn[key] = torch.cat([drawn, *blocks])
        return drawn

    def _block(self, index: int, columns: int, side: str) -> Tensor:
        """A byte for each number: drawn in words, an eighth of the draws of as many normal numbers."""
        salt = 2 * (index * 65_537 + columns) + ("outputs", "inputs").index(side)
        generator = torch.Generator().manual_seed((self.seed * 2_654_435_761 + salt) % 2**63)
        words = torch.randint(-(2**63), 2**63 - 1, (_ROWS_AT_ONCE * columns // 8,), generator=generator)
        return words.view(torch.uint8).view(_ROWS_AT_ONCE, columns)


def _levels() -> Tensor:
    """The normal distribution in 256 equally likely numbers that bfloat16 holds, so that its products are exact."""
    places = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
    return torch.special.ndtri(places).bfloat16().float()


class Sketch(MatrixSum):
    """A single-pass two-sided sketch: `G Ω`, `Ψᵀ G` and a core `Φᵀ G Ξ`, `k (m + n) + k²` numbers in all.

    From `Q = orth(G Ω)` and `P = orth(Gᵀ Ψ)` it recovers `G ≈ Q C Pᵀ`, with the core `C` by least squares from
    `Φᵀ G Ξ = (Φᵀ Q) C (Ξᵀ P)ᵀ`, without a second look at `G`. `Ω` and `Ψ` are the first `k` of the `2k + 1` columns of
    `Ξ` and `Φ`: `Φ` stays independent of `Q` and `Ξ` of `P`, as the least squares need, and of the core only what the
    other `k + 1` columns see has to be kept, as the rest of it follows from `G Ω` and `Ψᵀ G`.
    A few more probes `Θᵀ G` give an unbiased estimate of the squared error, `E ‖Θᵀ (G − Ĝ)‖² = q ‖G − Ĝ‖²`, and with
    it of the energy that the sketch did not catch.

    Source: Tropp, Yurtsever, Udell, Cevher, *Streaming Low-Rank Matrix Approximation*, SIAM J. Sci. Comput. 2019,
    arXiv 1902.08651, sections 2 and 6.

    Half precision is multiplied as it is, also what was projected where the device does so: it loses no more in it than
    the gradient has lost already, far less than a sketch leaves out.

    Args:
        shape: `(m, n)`.
        size: `k`, the most directions that can be recovered; half as many are recovered well.
        pool: Where the test matrices come from.
        device: Where the sketch is kept and computed.

    Examples:
        >>> from semu_peft.gradients.batch_gradient import TokenGradient
        >>> matrix = torch.outer(torch.arange(40.0), torch.arange(50.0))  # of rank 1
        >>> sketch = Sketch((40, 50), size=4, pool=RandomMatrixPool(seed=0), device=torch.device("cpu"))
        >>> sketch.add(TokenGradient(torch.arange(40.0)[None], torch.arange(50.0)[None]))
        >>> factors = sketch.factorize(explained_variance=0.99)
        >>> factors.rank, round(float(factors.singular_values[0] / matrix.norm()), 3)
        (1, 1.0)
    """

    def __init__(self, shape: tuple[int, int], size: int, pool: RandomMatrixPool, device: torch.device) -> None:
        self.shape = shape
        m, n = shape
        self.size = size
        self._pool, self._device = pool, device
        self.left = torch.zeros(m, size, device=device)
        self.below = torch.zeros(size + ERROR_PROBES, n, device=device)
        self.core = torch.zeros(size + 1, size + 1, device=device)

    @property
    def right(self) -> Tensor:
        """`Ψᵀ G`, `(k, n)`."""
        return self.below[: self.size]

    @property
    def probed(self) -> Tensor:
        """`Θᵀ G`, `(ERROR_PROBES, n)`."""
        return self.below[self.size :]

    @classmethod
    def of_size(cls, size: int = 192, *, seed: int = 0, device: torch.device | str | None = None) -> StatisticFactory:
        """For `gather`: sketches of this size where they save most of the memory, exact sums elsewhere.

        Args:
            size: The most directions a sketch can recover; the first half of them well.
            seed: Of the random matrices.
            device: Where sketches and sums are kept; by default beside their weights.

        Raises:
            ValueError: `size` is too small.
        """
        if isinstance(size, bool) or not isinstance(size, int) or size < 2:
            raise ValueError(f"`size` of a sketch must be an integer of 2 or more, got {size!r}.")
        check_count("seed", seed, least=0)
        check_device("device", device)
        pool = RandomMatrixPool(seed)

        def make(shape: tuple[int, ...], dtype: torch.dtype, home: torch.device) -> MatrixSum:
            place = home if device is None else torch.device(device)
            if cls.pays(shape, size):
                return cls((shape[0], shape[1]), size, pool, place)
            return GradientSum(shape, dtype, place)

        return make

    def copy(self) -> Sketch:
        m, n = self.shape
        duplicate = Sketch((m, n), self.size, self._pool, self._device)
        for tensor, value in zip(duplicate.tensors(), self.tensors(), strict=True):
            tensor.copy_(value)
        return duplicate

    def _test(self, dtype: torch.dtype = torch.float32) -> RandomMatrices:
        # Asked for when needed: views taken before the pool has grown would keep the smaller matrices alive.
        m, n = self.shape
        return self._pool.of(m, n, self.size, self._device, dtype)

    @staticmethod
    def pays(shape: tuple[int, ...], size: int) -> bool:
        """Whether a sketch of this size is so much smaller than the matrix that it is worth its error."""
        if len(shape) != 2:
            return False
        m, n = shape
        numbers = size * (m + n) + (size + 1) ** 2 + ERROR_PROBES * n
        return size < min(m, n) and numbers < _WORTHWHILE * m * n

    def add(self, gradient: BatchGradient, scale: float = 1.0) -> None:
        for part in gradient.parts():
            self._add_part(part, scale)

    def _add_part(self, gradient: BatchGradient, scale: float) -> None:
        if isinstance(gradient, DenseGradient):
            self._add_matrix(gradient.matrix.to(self._device), scale)
        elif isinstance(gradient, TokenGradient):
            outputs, inputs = gradient.rows
            self._add_rows(outputs.to(self._device), inputs.to(self._device), scale)
        else:
            # The device first: a gradient that only knows its dense form would be made for the question.
            half = self._device.type == "cuda" and _is_half(gradient.received())
            with _on_tensor_cores() if half else nullcontext():
                self._add_products(gradient, scale)

    def _add_matrix(self, matrix: Tensor, scale: float) -> None:
        test, exact, size = self._test(_kind(matrix)), self._test(), self.size
        seen = product(matrix, test.of_inputs)
        self.left.add_(seen[:, :size], alpha=scale)
        add_product(self.below, test.seen.mT, matrix, scale)
        add_product(self.core, exact.rest.mT, seen[:, size : 2 * size + 1], scale)

    def _add_rows(self, outputs: Tensor, inputs: Tensor, scale: float) -> None:
        test, size, shown = self._test(_kind(outputs)), self.size, self.size + ERROR_PROBES
        of_outputs, of_inputs = product(outputs, test.of_outputs), product(inputs, test.of_inputs)
        add_product(self.left, outputs.mT, _beside(outputs, of_inputs[:, :size]), scale)
        add_product(self.below, _beside(inputs, of_outputs[:, :shown]).mT, inputs, scale)
        add_product(self.core, of_outputs[:, shown : shown + size + 1].mT, of_inputs[:, size : 2 * size + 1], scale)

    def _add_products(self, gradient: BatchGradient, scale: float) -> None:
        test, size, shown = self._test(), self.size, self.size + ERROR_PROBES
        outputs, inputs = gradient.project(test.of_outputs, test.inputs)
        self.left.add_(gradient.times(inputs[:, :size]), alpha=scale)
        self.below.add_(gradient.transposed_times(outputs[:, :shown]), alpha=scale)
        add_product(self.core, outputs[:, shown : shown + size + 1].mT, inputs[:, size:], scale)

    def tensors(self) -> list[Tensor]:
        return [self.left, self.below, self.core]

    def factorize(self, explained_variance: float, max_rank: int | None = None) -> SingularFactors:
        return self.factorize_each([self], explained_variance, max_rank)[0]

    @classmethod
    def factorize_each(
        cls, sums: Sequence[MatrixSum], explained_variance: float, max_rank: int | None = None
    ) -> list[SingularFactors]:
        check_explained_variance(explained_variance)
        sketches = [each for each in sums if isinstance(each, Sketch)]
        q, cores, p = _recovered(sketches)
        energies = cores.square().sum((-2, -1)) + _missed_energies(sketches, q, cores, p)
        values, left = gram_spectrum(cores @ cores.mT, sketches[0].shape, torch.float32)
        ranks = ranks_for_energy(values.float(), explained_variance, energies)
        ranks = ranks if max_rank is None else ranks.clamp_max(max_rank)
        right = cores.mT @ (left * inverse(values).unsqueeze(-2))
        report = torch.stack([ranks, resolved(values, ranks)], -1).tolist()
        found = []
        for nth, (rank, is_clear) in enumerate(report):
            inside = SingularFactors(left[nth], right[nth], values[nth].float(), energies[nth].clone(), estimated=True)
            if not is_clear:
                inside = _decomposed(cores[nth], inside, sketches[nth].shape)
            bases = q[nth] @ inside.left[:, :rank].float(), p[nth] @ inside.right[:, :rank].float()
            found.append(replace(inside, left=bases[0], right=bases[1]))
        return found

    @property
    def alike(self) -> Hashable:
        return type(self), self.shape, self.size, id(self._pool), self._device

    def inner_product(self, matrix: Tensor) -> Tensor:
        q, core, p = (part[0] for part in _recovered([self]))
        return torch.sum(core * (q.mT @ matrix.to(q) @ p))


def _kind(factor: Tensor) -> torch.dtype:
    """The dtype of random matrices to multiply it with."""
    return torch.bfloat16 if factor.is_cuda and factor.dtype == torch.bfloat16 else torch.float32


def _beside(factor: Tensor, projected: Tensor) -> Tensor:
    """What was projected, to be multiplied with this factor again."""
    return projected.to(_kind(factor))


def _is_half(factor: Tensor) -> bool:
    return factor.is_cuda and factor.dtype in (torch.float16, torch.bfloat16)


@contextmanager
def _on_tensor_cores() -> Iterator[None]:
    """Let a GPU round to the 11 bits of TF32 in products with a half-precision factor, which has no more itself.

    The random matrices and what was projected lose their last bits in it, some 2e-4 of each number: far less than a
    sketch leaves out. torch does so in convolutions anyway.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _decomposed(core: Tensor, inside: SingularFactors, shape: tuple[int, ...]) -> SingularFactors:
    """The same with directions that the Gram matrix of the core does not resolve."""
    left, values, right_transposed = torch.linalg.svd(core)
    values = without_noise(values, shape, torch.finfo(torch.float32).eps)
    return replace(inside, left=left, right=right_transposed.mT, singular_values=values.float())


def _recovered(sketches: Sequence[Sketch]) -> tuple[Tensor, Tensor, Tensor]:
    """`Q`, `C` (in float64) and `P` of each `G ≈ Q C Pᵀ`; all sketches are alike."""
    lefts, rights = (torch.stack(parts) for parts in zip(*((each.left, each.right) for each in sketches), strict=True))
    q, p = orthonormal(lefts), orthonormal(rights.mT)
    test, size = sketches[0]._test(), sketches[0].size
    seen, beyond = test.of_outputs[:, :size], test.rest
    from_left = torch.cat([seen.mT @ q, beyond.mT @ q], -2).double()
    from_right = (test.inputs.mT @ p).double()
    below = torch.cat([beyond.mT @ lefts, torch.stack([each.core for each in sketches])], -1)
    cores = torch.cat([rights @ test.inputs, below], 1).double()
    return q, _least_squares(from_right, _least_squares(from_left, cores).mT).mT, p


def _least_squares(matrices: Tensor, values: Tensor) -> Tensor:
    """`X` with the least `‖A X − B‖` of each `A`, far from singular as they are Gaussian, but for columns of zeros.

    Their squared condition number loses little in float64: with twice as many rows as columns it is about 30.
    """
    normal = matrices.mT @ matrices
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    diagonal.add_((diagonal == 0).to(diagonal.dtype))
    return torch.cholesky_solve(matrices.mT @ values, torch.linalg.cholesky_ex(normal).L)


def _missed_energies(sketches: Sequence[Sketch], q: Tensor, cores: Tensor, p: Tensor) -> Tensor:
    approximations = (sketches[0]._test().probes.mT @ q).double() @ cores @ p.mT.double()
    probed = torch.stack([each.probed for each in sketches]).double()
    variance = float(_levels().double().square().mean())
    return (probed - approximations).square().sum((-2, -1)) / (ERROR_PROBES * variance)
