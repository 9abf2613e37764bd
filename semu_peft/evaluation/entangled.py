"""Was a concept taken out of an image and nothing else: what changed inside a mask, what stayed outside."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from semu_peft.arguments import check_kind, check_share


@dataclass(frozen=True)
class Entangled:
    """How well an edit took out what is inside a mask, each from 0 to 1.

    Attributes:
        inside: RMSE between the images inside the mask: how much was changed.
        outside: RMSE outside: how much was damaged.
        similarity: `S = 2 S_in (1 − S_out) / (S_in + 1 − S_out)`, of both.
        consistency: `C`, how like its surroundings the inside has become, by mean and spread.
        score: `D`, the weighted harmonic mean of both.

    Examples:
        >>> entangled_of(0.6, 0.1, means=(0.4, 0.5), spreads=(0.2, 0.3))
        Entangled(score=0.800, inside 0.600, outside 0.100)
    """

    inside: float
    outside: float
    similarity: float
    consistency: float
    score: float

    def __repr__(self) -> str:
        return f"Entangled(score={self.score:.3f}, inside {self.inside:.3f}, outside {self.outside:.3f})"


def entangled(original: Tensor, edited: Tensor, mask: Tensor, *, alpha: float = 0.5) -> Entangled:
    """Measure an edit: `D = S C / (α C + (1 − α) S)`, with `S` for what changed where, and `C` for what it became.

    An unchanged image gets 0. The released code takes `S_in = 1 − RMSE`, which gives it 1.

    Source: ForgetMe, arXiv 2504.12574 (Entangled-D; with `alpha=0` Entangled-S, which is `C`).

    Args:
        original: Images `(…, H, W)` with values in [0, 1].
        edited: The same images after the edit.
        mask: True where the concept was, `(H, W)` or of a shape that broadcasts to the images'.
        alpha: The share of `S`.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: The shapes do not fit, or the mask is empty or full.

    Examples:
        >>> import torch
        >>> image, mask = torch.rand(3, 8, 8), torch.zeros(8, 8, dtype=torch.bool)
        >>> mask[2:6, 2:6] = True
        >>> entangled(image, image, mask).score
        0.0
    """
    for name, value in (("original", original), ("edited", edited), ("mask", mask)):
        check_kind(name, value, Tensor, "a tensor", "Write `torchvision.transforms.functional.to_tensor(image)`.")
    if alpha != 0:
        check_share("alpha", alpha)
    if original.shape != edited.shape:
        raise ValueError(
            f"`edited` must be of the shape of `original`, {tuple(original.shape)}, got {tuple(edited.shape)}. "
            "Resize it."
        )
    try:
        inner = mask.bool().to(original.device).expand(original.shape)
    except RuntimeError as error:
        raise ValueError(
            f"`mask` must broadcast to {tuple(original.shape)}, got {tuple(mask.shape)}. Give (H, W)."
        ) from error
    if not 0 < int(inner.sum()) < inner.numel():
        raise ValueError("`mask` must hold some of the image and leave some, got all or nothing. Check its threshold.")
    before, after = original.double(), edited.double()
    apart = (after - before).square()
    sides = inner, ~inner
    rmse = [float(apart[side].mean().sqrt()) for side in sides]
    means = [float(after[side].mean()) for side in sides]
    spreads = [float(after[side].std(correction=0)) for side in sides]
    return entangled_of(*rmse, means=(means[0], means[1]), spreads=(spreads[0], spreads[1]), alpha=alpha)


def entangled_of(
    inside: float, outside: float, *, means: tuple[float, float], spreads: tuple[float, float], alpha: float = 0.5
) -> Entangled:
    """The score from its parts: the two errors, and the edited image's mean and spread inside and outside.

    Examples:
        >>> found = entangled_of(0.6, 0.1, means=(0.4, 0.5), spreads=(0.2, 0.3))
        >>> round(found.similarity, 3), round(found.consistency, 4), round(found.score, 4)
        (0.72, 0.9006, 0.8002)
    """
    similarity = _likeness(inside, 1 - outside, harmonic=True)
    consistency = _likeness(*means) * _likeness(*spreads)
    weighted = alpha * consistency + (1 - alpha) * similarity
    score = similarity * consistency / weighted if weighted else 0.0
    return Entangled(inside, outside, similarity, consistency, score)


def _likeness(first: float, second: float, harmonic: bool = False) -> float:
    """`2ab / (a + b)`, or `2ab / (a² + b²)`, which is 1 where both are alike, also where both are 0."""
    if first == second == 0:
        return 0.0 if harmonic else 1.0
    return 2 * first * second / (first + second if harmonic else first**2 + second**2)
