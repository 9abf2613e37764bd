"""Adversarial prompts for diffusion models: is there any text embedding that still makes the concept?"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from semu_peft.arguments import check_count, check_model, check_number
from semu_peft.model_state import device_of, eval_mode
from semu_peft.objectives.base import LossFunction, Objective, as_objective
from semu_peft.objectives.diffusion import read_batch

from .knowledge import mean_loss

_WHERE = "encoder_hidden_states"
_LEAST_GAP = 0.05  # of the original's loss: over a smaller one the share of the way says nothing


@dataclass(frozen=True, eq=False)
class PromptSearch:
    """The denoising loss on a concept's images: under its own prompt, and under the best one that was found.

    The lower, the better the model knows how to make them.

    Attributes:
        prompted: Of the unlearned model under the concept's own prompt.
        found: The lowest under a searched embedding, of each seed, on noise that was not searched with.
        known: Of the original model under the concept's own prompt, where it is to be had.
        reference: The lowest that the same search finds in a model that never knew the concept.
        embedding: The best embedding `(1, L, D)`.

    Examples:
        >>> PromptSearch(prompted=0.8, found=(0.5, 0.6), known=0.2, reference=0.6)
        PromptSearch(loss 0.8000 under the prompt, 0.5000 under the best of 2 found; original 0.2000; reference 0.6000;
        back 50%)
    """

    prompted: float
    found: tuple[float, ...]
    known: float | None = None
    reference: float | None = None
    embedding: Tensor | None = field(default=None, repr=False)

    @property
    def best(self) -> float:
        """The lowest loss that was found; NaN where every search has diverged."""
        return min(self.found, key=_lowest)

    @property
    def back(self) -> float | None:
        """How much of the way from the forgotten loss to the original's the search has gone, in percent.

        None without an original, and where the forgotten loss is less than 5% above the original's: what little was
        forgotten is then within what a search gains on any prompt, and a share of it would be thousands of percent.
        """
        if self.known is None or self.prompted - self.known < _LEAST_GAP * self.known:
            return None
        return 100 * (self.prompted - self.best) / (self.prompted - self.known)

    @property
    def row(self) -> tuple[str, str, str]:
        """The attack, what it found, and what it found of the reference."""
        other = "" if self.reference is None else f"loss {self.reference:.4f} under the best found"
        return f"adversarial prompts: {len(self.found)} seeds", self._found(), other

    def _found(self) -> str:
        best = f"{self.best:.4f} under the best of {len(self.found)} found"
        parts = [f"loss {self.prompted:.4f} under the prompt, {best}"]
        parts += [] if self.known is None else [f"original {self.known:.4f}"]
        parts += [] if self.reference is None else [f"reference {self.reference:.4f}"]
        if self.known is not None:
            untold = "how much is back is not told, as the prompt's loss is less than 5% above the original's"
            parts.append(untold if self.back is None else f"back {self.back:.0f}%")
        return "; ".join(parts)

    def __repr__(self) -> str:
        return f"PromptSearch({self._found()})"


def _lowest(loss: float) -> tuple[bool, float]:
    """Orders losses, those of searches that have diverged last."""
    return math.isnan(loss), loss


def search_prompt(
    denoiser: nn.Module,
    images: Iterable[Any],
    loss: LossFunction,
    *,
    steps: int = 100,
    learning_rate: float = 1e-2,
    seeds: Sequence[int] = (0, 1, 2),
    original: nn.Module | None = None,
    reference: nn.Module | None = None,
    progress: bool = True,
) -> PromptSearch:
    """Search a text embedding under which an unlearned denoiser still makes a concept, with the weights at hand.

    Adam lowers the denoising loss on the concept's images by one embedding `(1, L, D)` for all of them, from the
    concept's own prompt plus a little noise of the seed (white-box search in embedding space, as in Pham et al. 2023,
    arXiv 2308.01508, and UnlearnDiffAtk, Zhang et al. 2023, arXiv 2310.11868). It is stronger than any prompt that can
    be typed: embeddings of a long enough prompt can describe images that no model was trained on, so compare with a
    `reference` that never knew the concept. The model is not written.

    Args:
        denoiser: The unlearned U-Net or transformer.
        images: Batches of the concept, with `latents` and `condition`, its text as `encoder_hidden_states`.
        loss: `DenoisingLoss(scheduler)`.
        steps: Of the search, one batch each, in a cycle.
        learning_rate: Of Adam.
        seeds: One search each: of the start, and of the noise that is searched with.
        original: The model before it forgot.
        reference: A model that never knew the concept, searched alike.
        progress: Show a progress bar.

    Returns:
        The losses, and the best embedding.

    Raises:
        TypeError: A batch is of another form.
        ValueError: The condition has no text embedding, or there is no batch.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import search_prompt
        >>> from semu_peft.objectives import DenoisingLoss, NoiseSchedule
        >>> class Denoiser(torch.nn.Linear):  # stands for a U-Net: what it predicts is the mean of the text
        ...     def forward(self, noisy, timestep, encoder_hidden_states, return_dict):
        ...         return (super().forward(encoder_hidden_states.mean(1)),)
        >>> schedule = NoiseSchedule(torch.linspace(1, 0, 10), torch.linspace(0, 1, 10), torch.arange(10), "sample")
        >>> images = [{"latents": torch.ones(4, 2), "condition": {"encoder_hidden_states": torch.zeros(4, 3, 2)}}]
        >>> result = search_prompt(Denoiser(2, 2), images, DenoisingLoss(schedule), steps=50, seeds=[0], progress=False)
        >>> result.found[0] < result.prompted
        True
    """
    check_model(denoiser)
    check_count("steps", steps)
    check_number("learning_rate", learning_rate, low=0)
    if not len(seeds):
        raise ValueError("`seeds` must hold at least one, got none. Write `[0]`.")
    batches = [read_batch(batch) for batch in images]
    if not batches or any(not isinstance(batch["condition"].get(_WHERE), Tensor) for batch in batches):
        raise ValueError(
            f"`images` must be batches whose condition has a text embedding, `{_WHERE}`, got "
            f"{sorted(batches[0]['condition']) if batches else 'none'}. There is no prompt to search for others."
        )
    objective = as_objective(loss)
    state = copy.deepcopy(objective.state_dict())
    try:
        runs = [_search(denoiser, batches, objective, steps, learning_rate, seed, progress) for seed in seeds]
        best = min(runs, key=lambda run: _lowest(run[0]))
        beside = None
        if reference is not None:
            check_model(reference, "reference")
            searched = [_search(reference, batches, objective, steps, learning_rate, seed, progress) for seed in seeds]
            beside = min((found for found, _ in searched), key=_lowest)
        objective.load_state_dict(state)
        prompted = mean_loss(denoiser, batches, objective)
        known = None if original is None else mean_loss(original, batches, objective)
    finally:
        objective.load_state_dict(state)
    return PromptSearch(prompted, tuple(found for found, _ in runs), known, beside, best[1])


def _search(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], objective: Objective, steps: int, rate: float, seed: int,
    progress: bool,
) -> tuple[float, Tensor]:  # fmt: skip
    """The loss under the embedding that was found, on the noise that all are measured with, and the embedding."""
    from tqdm.auto import tqdm

    device = device_of(model)
    measured_with = copy.deepcopy(objective.state_dict())
    generator = torch.Generator().manual_seed(seed)
    if "generator" in measured_with:  # the search has noise of its own
        objective.load_state_dict({**measured_with, "generator": generator.get_state()})
    start = batches[0]["condition"][_WHERE][:1].detach().float().to(device)
    noise = torch.randn(start.shape, generator=generator).to(device)
    embedding = (start + 0.1 * start.std().nan_to_num().clamp(min=0.1) * noise).requires_grad_(True)
    optimizer = torch.optim.Adam([embedding], rate)
    with eval_mode(model):
        for step in tqdm(range(steps), desc=f"searches a prompt, seed {seed}", disable=not progress, leave=False):
            batch = send_to_device(batches[step % len(batches)], device)
            with torch.enable_grad():
                lost = objective(model, _under(batch, embedding))
                (embedding.grad,) = torch.autograd.grad(lost, [embedding])
            optimizer.step()
    objective.load_state_dict(measured_with)
    found = embedding.detach()
    under = [_under(send_to_device(batch, device), found) for batch in batches]
    return mean_loss(model, under, objective), found.cpu()


def _under(batch: Mapping[str, Any], embedding: Tensor) -> dict[str, Any]:
    text = batch["condition"][_WHERE]
    mine = embedding.expand(len(text), *embedding.shape[1:]).to(text.dtype)
    return {**batch, "condition": {**batch["condition"], _WHERE: mine}}
