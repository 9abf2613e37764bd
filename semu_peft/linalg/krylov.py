"""Leading singular directions of many large matrices of one shape, within Krylov spaces that grow together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .energy import ranks_for_energy
from .gram import gram_spectrum, gram_values, inverse, resolved
from .orthonormal import orthonormal_beyond

_BLOCK = 32
_OVERSAMPLING = 8
# Directions have settled once one more block changes neither their number nor their energy by more than this.
_SETTLED = 0.02
# So many blocks are there before it is asked whether the others will be too many.
_WARM_UP = 4


class Triplets(NamedTuple):
    """Leading singular triplets of a matrix: `U`, `(m, r)`, all values that are known, `(k,)`, and `V`, `(n, r)`."""

    left: Tensor
    values: Tensor
    right: Tensor

    def turned(self) -> Triplets:
        return Triplets(self.right, self.values, self.left)


def krylov_factors(
    matrices: Sequence[Tensor], energies: Tensor, explained_variance: float, max_rank: int | None
) -> list[Triplets | None]:
    """The leading directions of each matrix; None where a full decomposition is quicker or needed.

    Block Krylov iteration with a fixed seed, until the directions of the wanted share have settled. Each block costs
    one product with the matrix and one with its transpose, which also is what the next block starts from: nothing is
    ever multiplied again. The spaces of all matrices grow block by block together, and so do their small
    decompositions. However many matrices there are, the host asks twice a block how far they are; those that have
    settled drop out, and so do those that would have to hold too many directions.

    Source: Musco and Musco 2015, arXiv 1504.05477, algorithm 2.

    Args:
        matrices: All `(m, n)`, none of zeros; they are not copied.
        energies: `‖A‖²` of each, `(batch,)`, float64.
        explained_variance: γ in (0, 1].
        max_rank: Upper bound on the rank.

    Examples:
        >>> import torch
        >>> from semu_peft.linalg.krylov import krylov_factors
        >>> matrix = torch.outer(torch.arange(300.0), torch.ones(400))
        >>> (found,) = krylov_factors([matrix], matrix.square().sum()[None].double(), 0.9, None)
        >>> found.left.shape, found.right.shape
        (torch.Size([300, 1]), torch.Size([400, 1]))
    """
    m, n = matrices[0].shape
    if m > n:
        turned = krylov_factors([matrix.mT for matrix in matrices], energies, explained_variance, max_rank)
        return [triplets and triplets.turned() for triplets in turned]
    found: list[Triplets | None] = [None] * len(matrices)
    if explained_variance == 1 and (max_rank or m) > m // 2:
        return found
    spaces, ends = _Spaces(matrices, energies), (max_rank or m) + _OVERSAMPLING <= m // 2
    while spaces.indices and spaces.size + _BLOCK <= m // 2:
        spaces.grow()
        enough = spaces.size >= (max_rank or m) + _OVERSAMPLING
        expected = [0.0] * len(spaces.indices) if enough else spaces.expected_sizes(explained_variance)
        places = [place for place, size in enumerate(expected) if size <= spaces.size]
        ranks, lost = spaces.look(places, explained_variance, max_rank or m) if places else ({}, set())
        for index, triplets in (spaces.directions(ranks) if ranks else {}).items():
            found[index] = triplets
        too_slow = {place for place, size in enumerate(expected) if size > m // 2 and not ends}
        spaces.drop({*ranks, *lost, *too_slow})
    return found


class _Rows:
    """Rows of each matrix in a batch, in memory that grows by halves: appending block by block copies little."""

    def __init__(self, count: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self._held, self.size = torch.empty(count, _BLOCK, length, dtype=dtype, device=device), 0

    def append(self, block: Tensor) -> None:
        """Take in `(batch, b, length)`."""
        count, capacity, length = self._held.shape
        if self.size + block.shape[1] > capacity:
            grown = self._held.new_empty(count, _BLOCK * (1 + 3 * capacity // (2 * _BLOCK)), length)
            grown[:, : self.size] = self.all
            self._held = grown
        self._held[:, self.size : self.size + block.shape[1]] = block
        self.size += block.shape[1]

    @property
    def all(self) -> Tensor:
        """`(batch, size, length)`, a view."""
        return self._held[:, : self.size]

    def keep(self, chosen: Tensor) -> None:
        """Only those of the matrices."""
        self._held = self._held[chosen]


class _Spaces:
    """The Krylov spaces that still grow, side by side.

    Attributes:
        indices: Whose they are.
        basis: `Qᵀ`, `(batch, k, m)`, orthonormal rows or zeros.
        rows: `Qᵀ A`, `(batch, k, n)`, in float64.
        gram: `Qᵀ A Aᵀ Q`, `(batch, k, k)`, in float64.
        sound: Whether every block came out orthonormal, `(batch,)`.
        last: Number and energy of the directions one block ago, `(batch, 2)`; infinite before there are any.
        shares: Of its matrix's energy, what each space held when it was last asked, on the host.
        was_looked_at: Whether they have been looked at, after which they mostly have settled.
        seen: What the last look has seen: at which places, and the values and vectors within these spaces.
    """

    def __init__(self, matrices: Sequence[Tensor], energies: Tensor) -> None:
        (m, n), count, like = matrices[0].shape, len(matrices), matrices[0]
        exact: dict[str, Any] = {"dtype": torch.float64, "device": like.device}
        self.indices = list(range(count))
        self._matrices, self._energies = list(matrices), energies
        self.basis, self.rows = _Rows(count, m, like.dtype, like.device), _Rows(count, n, **exact)
        self.gram = torch.empty(count, 0, 0, **exact)
        self.sound = torch.ones(count, dtype=torch.bool, device=like.device)
        self.last = torch.full((count, 2), torch.inf, **exact)
        self.shares, self.was_looked_at = [0.0] * count, [False] * count
        self.seen: tuple[list[int], Tensor, Tensor] | None = None
        start = torch.randn(n, _BLOCK, generator=torch.Generator().manual_seed(0)).to(like)
        self._seen = torch.nn.functional.normalize(start, dim=0).mT.expand(count, _BLOCK, n)

    @property
    def size(self) -> int:
        return self.basis.size

    def grow(self) -> None:
        """Each space by one block."""
        like = self._matrices[0]
        block = like.new_empty(len(self.indices), like.shape[0], _BLOCK)
        for matrix, seen, place in zip(self._matrices, self._seen, block, strict=True):
            torch.mm(matrix, seen.mT, out=place)
        fresh, sound = orthonormal_beyond(self.basis.all.mT, block)
        self.sound = self.sound & sound
        self.basis.append(fresh.mT)
        seen_rows = like.new_empty(len(self.indices), _BLOCK, like.shape[1])
        for matrix, columns, place in zip(self._matrices, self.basis.all[:, -_BLOCK:], seen_rows, strict=True):
            torch.mm(columns, matrix, out=place)
        self.rows.append(seen_rows)
        self._seen = torch.nn.functional.normalize(seen_rows, dim=-1)
        beside = self.rows.all @ self.rows.all[:, -_BLOCK:].mT
        self.gram = torch.cat([torch.cat([self.gram, beside[:, :-_BLOCK].mT], 1), beside], 2)

    def expected_sizes(self, explained_variance: float) -> list[float]:
        """How large each space will about be once it holds that share of its matrix's energy; as it is where it does.

        What a space leaves out shrinks from block to block by a factor, which comes nearer to 1: larger spaces are
        needed rather than smaller ones.
        """
        shares = (self.gram.diagonal(dim1=-2, dim2=-1).sum(-1) / self._energies).tolist()
        sizes = [_expected_size(self.size, *each, explained_variance) for each in zip(self.shares, shares, strict=True)]
        self.shares = shares
        return sizes

    def look(self, places: list[int], explained_variance: float, max_rank: int) -> tuple[dict[int, int], set[int]]:
        """Look whether the directions within some of the spaces have settled.

        Returns:
            The ranks of those that have, by place, and the places of those that need another decomposition.
        """
        like, chosen = self._matrices[0], self._choice(places)
        # An accelerator finds vectors in the same time; elsewhere they are worth it where spaces may have settled.
        with_vectors = like.device.type != "cpu" or any(self.was_looked_at[place] for place in places)
        self.seen = None
        if with_vectors:
            values, inside = self._spectrum(places)
            self.seen = places, values, inside
        else:
            values = gram_values(self.gram[chosen], like.shape, like.dtype)
        for place in places:
            self.was_looked_at[place] = True
        ranks = ranks_for_energy(values, explained_variance, self._energies[chosen]).clamp_max(max_rank)
        held = torch.where(torch.arange(self.size, device=like.device) < ranks[:, None], values, 0).square().sum(-1)
        now, last = torch.stack([ranks.double(), held], -1), self.last[chosen]
        settled = (now[:, 0] >= (1 - _SETTLED) * last[:, 0]) & (now[:, 1] <= (1 + _SETTLED) * last[:, 1])
        self.last[chosen] = now
        lost = ~(resolved(values, ranks) & self.sound[chosen])
        report = list(zip(places, torch.stack([ranks, settled.long(), lost.long()], -1).tolist(), strict=True))
        done = {place: rank for place, (rank, is_settled, is_lost) in report if is_settled and not is_lost}
        return done, {place for place, (_, _, is_lost) in report if is_lost}

    def directions(self, ranks: dict[int, int]) -> dict[int, Triplets]:
        """As many directions as that of each of the spaces, by whose they are."""
        like = self._matrices[0]
        places, values, inside = self.seen or (list(ranks), *self._spectrum(list(ranks)))
        weights = inside * inverse(values).unsqueeze(-2)
        found = {}
        for nth, place in enumerate(places):
            if (rank := ranks.get(place)) is not None:
                left = self.basis.all[place].mT @ inside[nth, :, :rank].to(like.dtype)
                right = self.rows.all[place].mT @ weights[nth, :, :rank]
                found[self.indices[place]] = Triplets(left, values[nth].to(like.dtype), right.to(like.dtype))
        return found

    def _spectrum(self, places: list[int]) -> tuple[Tensor, Tensor]:
        like = self._matrices[0]
        return gram_spectrum(self.gram[self._choice(places)], like.shape, like.dtype)

    def _choice(self, places: list[int]) -> Any:
        """An index of those places; of all, one that copies nothing."""
        return slice(None) if len(places) == len(self.indices) else torch.tensor(places, device=self.gram.device)

    def drop(self, done: set[int]) -> None:
        """Forget about those that are done."""
        if not done:
            return
        kept = [place for place in range(len(self.indices)) if place not in done]
        chosen = torch.tensor(kept, dtype=torch.int64, device=self.gram.device)
        self.indices, self._matrices = [self.indices[i] for i in kept], [self._matrices[i] for i in kept]
        for rows in (self.basis, self.rows):
            rows.keep(chosen)
        self._energies, self.gram, self._seen = self._energies[chosen], self.gram[chosen], self._seen[chosen]
        self.sound, self.last = self.sound[chosen], self.last[chosen]
        self.shares = [self.shares[place] for place in kept]
        self.was_looked_at = [self.was_looked_at[place] for place in kept]


def _expected_size(size: int, before: float, share: float, explained_variance: float) -> float:
    """From the share of the energy that a space of this size holds and the one that it held a block before."""
    if share >= explained_variance:
        return size
    if size < _WARM_UP * _BLOCK or before == 0:  # the first blocks catch less than those that come from them
        return size + _BLOCK
    shrinking = math.log1p(-before) - math.log1p(-share)
    wanted = math.log1p(-share) - math.log1p(-explained_variance)
    return size + _BLOCK * wanted / shrinking if shrinking > 0 else math.inf
