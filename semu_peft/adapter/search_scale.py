"""Find how far a correction is to be dialled: a bracket over a grid, and bisection inside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from semu_peft.arguments import check_adapter_name, check_count, check_model, check_number, check_score
from semu_peft.tuner.adapted import initialized_layers
from semu_peft.tuner.layer import SemuLayer

from .scale import set_scale

_COARSE = 6  # the grid of the bracket: the largest scale over 2⁰ to 2⁵, and 0


@dataclass(frozen=True, repr=False)
class ScaleSearch:
    """What a search has tried, and the best of it, which the model was left with.

    Attributes:
        scale: The best scale; of several equal ones the smallest.
        score: Its score.
        trials: All scales that were tried, with their scores, in order.

    Examples:
        >>> from semu_peft.adapter.search_scale import ScaleSearch
        >>> ScaleSearch(0.5, 99.0, ((0.0, 50.0), (0.5, 99.0)))
        ScaleSearch(scale=0.5, score=99, 2 trials)
    """

    scale: float
    score: float
    trials: tuple[tuple[float, float], ...] = field(repr=False)

    def __repr__(self) -> str:
        return f"ScaleSearch(scale={self.scale:g}, score={self.score:g}, {len(self.trials)} trials)"


def search_scale(
    model: nn.Module,
    score: Callable[[nn.Module], float],
    *,
    highest: float = 8.0,
    halvings: int = 10,
    adapter_name: str = "default",
) -> ScaleSearch:
    """Look for the scale of a correction at which a score is largest, and leave the model with it.

    A grid of `0` and `highest / 2⁵ … highest` brackets the maximum; the bracket is then halved from both sides around
    the best trial. It is found exactly enough where the score rises to one top, or plateau, and falls again; a score
    that steps up at some scale is given the smallest one behind the step, to `highest / 2^(halvings + 1)`. The best
    trial is left whatever the score does in between. The scale is written into the cores, so that it is saved with the
    adapter, whose own scale is 1 again: a correction that starts at SLUG's `λ S` ends at the best multiple.

    Source: SLUG, Cai et al., ICML 2025, arXiv 2407.11867, whose code leaves the last trial and not the best.

    Args:
        model: A model with an initialised SEMU adapter whose correction is not zero.
        score: `model -> float`, the more the better: say, retained accuracy minus forget accuracy.
        highest: The largest scale to try, above 0.
        halvings: How often to halve the bracket.
        adapter_name: The adapter to scale.

    Raises:
        TypeError: `score` is no function.
        ValueError: An argument is out of range, a score is not finite, or no scale scores better than 0, the model
            without the correction. The model is as before then.
        NotInitializedError: The adapter has no bases yet.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, search_scale
        >>> base = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
        >>> model = get_peft_model(base, SemuConfig(target_modules=["0"], r=1, init_weights=False))
        >>> search_scale(model, lambda m: 9 - abs(m.base_model.model[0].scaling["default"] - 3))
        ScaleSearch(scale=3, score=9, ... trials)
    """
    check_model(model)
    check_adapter_name(adapter_name)
    check_number("highest", highest, low=0.0)
    check_count("halvings", halvings, least=0)
    check_score(score)
    if highest == 0:
        raise ValueError("`highest` must be above 0, got 0. Give the largest scale to try.")
    layers = initialized_layers(model, adapter_name)
    before = {name: layer.scaling[adapter_name] for name, layer in layers.items()}

    def at(scale: float) -> float:
        set_scale(model, scale, adapter_name=adapter_name)
        return score(model)

    try:
        found = best_trial(at, highest=highest, halvings=halvings)
        if found.scale == 0.0:
            raise ValueError(
                f"`score` is nowhere from 0 to {highest:g} better than at 0, without the correction ({found.score:g}): "
                "the model is left as it was. Raise `highest`, or give a correction that moves the score."
            )
    except BaseException:
        for name, layer in layers.items():
            layer.set_scale(adapter_name, before[name])
        raise
    for layer in {id(layer.semu_core[adapter_name]): layer for layer in layers.values()}.values():
        _write(layer, found.scale, adapter_name)
    set_scale(model, 1.0, adapter_name=adapter_name)
    return found


def best_trial(score: Callable[[float], float], *, highest: float, halvings: int = 10) -> ScaleSearch:
    """Where from 0 to `highest` a score is largest; of equal ones the smallest: the search of `search_scale`.

    Args:
        score: What to make large, of a number.
        highest: The largest number tried.
        halvings: How often the bracket of the grid is halved, with two trials each.

    Raises:
        ValueError: A score is not finite.

    Examples:
        >>> best_trial(lambda number: 1 - abs(number - 0.25), highest=1.0)
        ScaleSearch(scale=0.25, score=1, ... trials)
    """
    trials: dict[float, float] = {}

    def tried(number: float) -> tuple[float, float]:
        """What to compare by: the score, and with equal ones the smaller number."""
        if number not in trials:
            trials[number] = _checked(score(number), number)
        return trials[number], -number

    _search(tried, highest, halvings)
    best = max(trials, key=tried)
    return ScaleSearch(best, trials[best], tuple(trials.items()))


def _search(tried: Callable[[float], tuple[float, float]], highest: float, halvings: int) -> None:
    grid = [0.0, *(highest / 2**step for step in reversed(range(_COARSE)))]
    place = max(range(len(grid)), key=lambda index: tried(grid[index]))
    low, middle, high = grid[max(place - 1, 0)], grid[place], grid[min(place + 1, len(grid) - 1)]
    for _ in range(halvings):
        for left in (True, False):
            edge = low if left else high
            if edge == middle:
                continue
            between = (edge + middle) / 2
            if tried(between) > tried(middle):
                low, middle, high = (low, between, middle) if left else (middle, between, high)
            elif left:
                low = between
            else:
                high = between


def _checked(value: float, scale: float) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"`score` must be finite, got {number} at scale {scale:g}. Check what it divides by.")
    return number


@torch.no_grad()
def _write(layer: SemuLayer, scale: float, adapter_name: str) -> None:
    """The correction times the scale, as the core itself: the products are those that the trial ran with."""
    core = layer.get_core(adapter_name, scaled=False) * scale
    core = core.diagonal(dim1=-2, dim2=-1) if layer.configs[adapter_name].core == "diagonal" else core
    layer.set_basis(adapter_name, layer.semu_U[adapter_name], layer.semu_V[adapter_name], core)
