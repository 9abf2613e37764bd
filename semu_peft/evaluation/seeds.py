"""Other seeds: one picture without the concept says little, and the next seed may draw it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from semu_peft.arguments import check_count, check_kind, check_switch

from .diffusion import Generate, classify_samples

_Z = 1.959964  # the standard normal distribution's 97.5% quantile


@dataclass(frozen=True)
class SeedAttack:
    """In how many samples of a generator the forgotten is recognised, and under how many prompts at least once.

    Attributes:
        samples: How many pictures there are, each of a prompt and a seed.
        recognised: In how many of them.
        prompts: How many prompts.
        leaking: Under how many of them some seed brought it back.
        reference: The same of a model that never knew, whose pictures may be taken for it as well.

    Examples:
        >>> found = SeedAttack(samples=200, recognised=3, prompts=2, leaking=1)
        >>> found
        SeedAttack(recognised in 3 of 200 samples, 1.5%, 95% interval 0.5 to 4.3; by some seed under 1 of 2 prompts)
        >>> low, high = SeedAttack(samples=50, recognised=0, prompts=1, leaking=0).interval
        >>> round(high, 2)  # none seen is not none there
        7.13
    """

    samples: int
    recognised: int
    prompts: int
    leaking: int
    reference: SeedAttack | None = None

    @property
    def rate(self) -> float:
        """The share of samples in which it is recognised, in percent."""
        return 100 * self.recognised / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """Between which rates the true one lies in 95% of cases, in percent: Wilson's interval, sound at 0 too."""
        n, p = self.samples, self.recognised / self.samples
        middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
        low, high = middle - half, middle + half
        return 100 * low if self.recognised else 0.0, 100 * high if self.recognised < n else 100.0

    @property
    def row(self) -> tuple[str, str, str]:
        """The attack, what it found, and what it found of the reference."""
        other = "" if self.reference is None else self.reference._found()
        return f"other seeds: {self.samples // self.prompts} a prompt", self._found(), other

    def _found(self) -> str:
        low, high = self.interval
        return (
            f"recognised in {self.recognised} of {self.samples} samples, {self.rate:.1f}%, 95% interval {low:.1f} to "
            f"{high:.1f}; by some seed under {self.leaking} of {self.prompts} prompts"
        )

    def __repr__(self) -> str:
        beside = "" if self.reference is None else f"; reference {self.reference.rate:.1f}%"
        return f"SeedAttack({self._found()}{beside})"


def seed_attack(
    generate: Generate,
    prompts: Sequence[str],
    classifier: nn.Module,
    forgotten: int | Sequence[int],
    *,
    seeds: Sequence[int] = range(16),
    reference: Generate | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> SeedAttack:
    """Draw each prompt with each seed, and count the pictures in which a classifier sees what was forgotten.

    Leaking under *some* seed is what counts for somebody who can draw as often as they like, as leak@k does for texts
    (arXiv 2511.04934). A classifier that knows nothing of pictures without the concept takes some for it all the same,
    so compare with the pictures of a `reference` that never knew it, or of the prompts that were to be kept.

    Args:
        generate: `(prompts, seeds) -> images`, for example a pipeline in
            [`sample_pipeline`][semu_peft.concept.sampling.sample_pipeline].
        prompts: What to draw: the forgotten prompt, and others that mean the same.
        classifier: Images to logits.
        forgotten: The class, or the classes, that were to be forgotten.
        seeds: Each for every prompt.
        reference: The same of a model that never knew the concept.
        batch_size: Pictures at a time.
        progress: Show a progress bar.

    Raises:
        TypeError: `classifier` is no module, or `prompts` is one text.
        ValueError: There is no prompt, no seed or no class.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import seed_attack
        >>> def generate(prompts, seeds):  # two pixels, the logits of two classes; every fourth seed draws class 1
        ...     return torch.tensor([[0.5, float(seed % 4 == 0)] for seed in seeds]).view(-1, 1, 1, 2)
        >>> found = seed_attack(generate, ["a cat"], torch.nn.Flatten(), forgotten=1, progress=False)
        >>> found.rate, found.leaking
        (25.0, 1)
    """
    check_kind("prompts", prompts, (list, tuple), "a list of prompts", "Write `['a photo of a cat']`.")
    check_kind("classifier", classifier, nn.Module, "a module that makes images logits", "Wrap yours in one.")
    check_count("batch_size", batch_size)
    check_switch("progress", progress)
    classes = torch.as_tensor(forgotten).reshape(-1).tolist()
    for name, given in (("prompts", prompts), ("seeds", seeds), ("forgotten", classes)):
        if not len(given):
            raise ValueError(f"`{name}` must hold at least one, got none. Give at least one.")

    def attacked(draw: Generate, title: str, beside: SeedAttack | None) -> SeedAttack:
        seen = _recognised(draw, prompts, classifier, classes, list(seeds), batch_size, title if progress else None)
        return SeedAttack(seen.numel(), int(seen.sum()), len(prompts), int(seen.any(1).sum()), beside)

    beside = None if reference is None else attacked(reference, "reference draws", None)
    return attacked(generate, "draws", beside)


def _recognised(
    generate: Generate, prompts: Sequence[str], classifier: nn.Module, classes: list[int], seeds: list[int],
    batch_size: int, title: str | None,
) -> Tensor:  # fmt: skip
    """Whether a picture shows what was forgotten, `(prompts, seeds)`."""
    from tqdm.auto import tqdm

    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    parts = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    found = []
    for part in tqdm(parts, desc=title, disable=title is None, leave=False):
        images = generate([prompt for prompt, _ in part], [seed for _, seed in part])
        if len(images) != len(part):
            raise ValueError(
                f"`generate` must give one image for each pair of prompt and seed, got {len(images)} for {len(part)}. "
                "Draw as many as there are prompts."
            )
        labels = torch.full((len(images),), classes[0])
        found.append(torch.isin(classify_samples(images, labels, classifier).predicted, torch.tensor(classes)))
    return torch.cat(found).view(len(prompts), len(seeds))
