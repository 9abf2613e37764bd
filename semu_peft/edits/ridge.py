"""A ridge head over frozen features, from which rows are taken out exactly, with a certificate."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from semu_peft.arguments import check_count, check_kind, check_number, check_path
from semu_peft.files import load_tensors, save_tensors

from .deltas import LowRank
from .edit import Edit

# How far below zero rounding may leave an eigenvalue of what remains, as a share of the largest one before.
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class RidgeHead:
    """A linear head `W = Cᵀ (G + γ I)⁻¹` that keeps what it was fitted with: `G = XᵀX` and `C = XᵀY`, in float64.

    Both are sums over rows, so that rows are added and taken out again exactly, in any order, without the others:
    what remains is what a fit without them gives. It is solved anew each time; the Woodbury update of the inverse
    that the paper writes is unstable where the matrix is nearly singular.

    Source: ACU, analytic continual unlearning, arXiv 2505.12239, from its equations (no code is public).

    Attributes:
        gram: `G`, `(n, n)`.
        cross: `C`, `(n, c)`.
        penalty: `γ`.
        count: How many rows there are in it.

    Examples:
        >>> import torch
        >>> from semu_peft.edits import RidgeHead
        >>> head = RidgeHead.empty(1, 1).add(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [3.0]]))
        >>> head, certificate = head.forget(torch.tensor([[2.0]]), torch.tensor([[3.0]]))
        >>> round(head.weight.item(), 9), certificate.removed, certificate.remaining
        (0.5, 1, 1)
    """

    gram: Tensor = field(repr=False)
    cross: Tensor = field(repr=False)
    penalty: float = 1.0
    count: int = 0

    def __post_init__(self) -> None:
        check_number("penalty", self.penalty, low=0.0)
        if self.penalty == 0:
            raise ValueError("`penalty` must be above zero, got 0. Give a small one such as 1e-6.")
        if self.gram.dim() != 2 or self.cross.dim() != 2 or self.gram.shape != (len(self.cross),) * 2:
            raise ValueError(
                f"`gram` and `cross` must be (n, n) and (n, c), got {tuple(self.gram.shape)} and "
                f"{tuple(self.cross.shape)}. Start from `RidgeHead.empty(features, outputs)`."
            )

    @classmethod
    def empty(cls, features: int, outputs: int, penalty: float = 1.0, device: torch.device | str = "cpu") -> RidgeHead:
        """A head that has seen nothing, with weights of zero.

        Args:
            features: `n`.
            outputs: `c`, the number of classes.
            penalty: `γ` above zero.
            device: Where its moments are kept.
        """
        check_count("features", features)
        check_count("outputs", outputs)
        zeros = torch.zeros(features, features + outputs, dtype=torch.float64, device=device)
        return cls(zeros[:, :features].clone(), zeros[:, features:].clone(), penalty)

    @property
    def weight(self) -> Tensor:
        """`W`, `(c, n)`, as an `nn.Linear` has it, float64."""
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(self._regularized)).mT

    @property
    def _regularized(self) -> Tensor:
        return self.gram + self.penalty * torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)

    def add(self, features: Tensor, targets: Tensor) -> RidgeHead:
        """The head with more rows.

        Args:
            features: `X`, `(N, n)`: what the frozen part of the model gives.
            targets: `Y`, `(N, c)`, or class labels `(N,)`.
        """
        x, y = self._rows(features, targets)
        return replace(self, gram=self.gram + x.mT @ x, cross=self.cross + x.mT @ y, count=self.count + len(x))

    def forget(self, features: Tensor, targets: Tensor) -> tuple[RidgeHead, Certificate]:
        """The head without these rows, which it was fitted with, and the certificate of it.

        Args:
            features: `X_F`, `(N, n)`, as they were added.
            targets: `Y_F`, `(N, c)`, or class labels `(N,)`.

        Raises:
            ValueError: There are not so many rows in it, or what remains could not be a sum over rows: these were never
                added.
        """
        x, y = self._rows(features, targets)
        if len(x) > self.count:
            raise ValueError(f"`features` must be rows of this head, which has {self.count}, got {len(x)}. Check them.")
        if len(x) == self.count:
            after = RidgeHead.empty(len(self.gram), self.cross.shape[1], self.penalty, self.gram.device)
        else:
            after = replace(self, gram=self.gram - x.mT @ x, cross=self.cross - x.mT @ y, count=self.count - len(x))
        values = torch.linalg.eigvalsh(after.gram)
        if float(values.min()) < -_ROUNDING * max(1.0, float(torch.linalg.eigvalsh(self.gram).max())):
            raise ValueError(
                "`features` must be rows that this head was fitted with: without them its second moments would not be "
                f"positive (smallest eigenvalue {float(values.min()):.3g}). Give the features as they were added."
            )
        return after, Certificate.of(self, after, x, y)

    def edit(self, before: RidgeHead, name: str) -> Edit:
        """The change from an earlier state of the head to this one, for an `nn.Linear` that holds its weight.

        Its rank is no more than the number of rows that differ, or of classes: as a SEMU adapter it is exact.

        Args:
            before: The head whose weight the layer has.
            name: The layer's name.

        Examples:
            >>> before = RidgeHead.empty(3, 5).add(torch.randn(20, 3), torch.randint(5, (20,)))
            >>> edit = before.add(torch.ones(1, 3), torch.tensor([4])).edit(before, "head")
            >>> edit.deltas["head"].left.shape
            torch.Size([5, 1])
        """
        check_kind("before", before, RidgeHead, "a `RidgeHead`", "Keep the one that `forget` was called on.")
        left, values, right = torch.linalg.svd(self.weight - before.weight, full_matrices=False)
        scale = max(float(self.weight.norm()), float(before.weight.norm()))
        rank = int((values > 1e-12 * scale).sum())
        delta = LowRank((left[:, :rank] * values[:rank]).contiguous(), right[:rank].mT.contiguous())
        return Edit({name: delta}, "RidgeHead", {"penalty": self.penalty, "count": self.count})

    def save(self, path: str | Path) -> Path:
        """Write the head's moments, from which rows can be forgotten later, as one safetensors file."""
        check_path("path", path)
        header = json.dumps({"penalty": self.penalty, "count": self.count})
        tensors = {"gram": self.gram.cpu().contiguous(), "cross": self.cross.cpu().contiguous()}
        return save_tensors(path, tensors, {"ridge_head": header})

    @classmethod
    def load(cls, path: str | Path) -> RidgeHead:
        """Read a head from its file.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged, or no head.
        """
        tensors, metadata = load_tensors(path, "RidgeHead.save")
        try:
            header = json.loads(metadata["ridge_head"])
            return cls(tensors["gram"], tensors["cross"], header["penalty"], header["count"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`path`: {path} holds no ridge head ({error}). Give what `RidgeHead.save` wrote."
            ) from error

    def _rows(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Features and targets as float64 rows."""
        for name, value in (("features", features), ("targets", targets)):
            check_kind(name, value, Tensor, "a tensor", "Convert it with `torch.as_tensor`.")
        n, c = self.cross.shape
        if features.dim() != 2 or features.shape[1] != n or not bool(torch.isfinite(features).all()):
            raise ValueError(
                f"`features` must be finite rows (N, {n}), got {tuple(features.shape)}. Flatten or check them."
            )
        if targets.dim() == 1 and not targets.is_floating_point():
            if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < c:
                raise ValueError(f"`targets` must be labels below {c}, got {int(targets.max())}. Give more `outputs`.")
            targets = torch.nn.functional.one_hot(targets.long(), c)
        if targets.shape != (len(features), c):
            raise ValueError(
                f"`targets` must be labels (N,) or rows (N, {c}) for {len(features)} features, got "
                f"{tuple(targets.shape)}. Give one for each."
            )
        return features.to(self.gram), targets.to(self.gram)


@dataclass(frozen=True)
class Certificate:
    """What was taken out of a ridge head, and how well the weights that it has now solve the problem without it.

    Attributes:
        removed: How many rows were taken out.
        remaining: How many are left.
        digest: SHA-256 of the rows that were taken out, features and targets in float64.
        residual: `‖(G + γ I) Wᵀ − C‖ / ‖C‖` of what is left; rounding alone where the forgetting is exact.
        condition: The condition number of `G + γ I`: a refit may differ by about `condition × residual`.
        rank: The rank of the change of the weight, no more than the rows or the classes.

    Examples:
        >>> from semu_peft.edits import RidgeHead
        >>> x, y = torch.randn(30, 4), torch.randint(3, (30,))
        >>> _, certificate = RidgeHead.empty(4, 3).add(x, y).forget(x[:2], y[:2])
        >>> certificate.removed, certificate.rank, certificate.residual < 1e-12
        (2, 2, True)
    """

    removed: int
    remaining: int
    digest: str
    residual: float
    condition: float
    rank: int

    @classmethod
    def of(cls, before: RidgeHead, after: RidgeHead, features: Tensor, targets: Tensor) -> Certificate:
        """Measure it on the two heads and the rows between them."""
        system = after._regularized
        norm = float(after.cross.norm())
        residual = float((system @ after.weight.mT - after.cross).norm()) / norm if norm else 0.0
        change = after.weight - before.weight
        digest = hashlib.sha256()
        for rows in (features, targets):
            digest.update(rows.cpu().contiguous().numpy().tobytes())
        scale = max(float(before.weight.norm()), float(after.weight.norm()))
        rank = int((torch.linalg.svdvals(change) > 1e-12 * scale).sum())
        condition = float(torch.linalg.cond(system))
        return cls(len(features), after.count, digest.hexdigest(), residual, condition, rank)
