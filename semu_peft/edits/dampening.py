"""Selective synaptic dampening: shrink the weights that matter more to what is forgotten than to everything."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from semu_peft.arguments import check_kind, check_number, check_share
from semu_peft.gradients.gather import Gathered, of_each_weight
from semu_peft.gradients.statistics import SquaredSum

from .deltas import Scaled, at_places
from .edit import Edit
from .search import best_edit


def dampen(
    forget: Gathered,
    everything: Gathered,
    *,
    threshold: float | None = None,
    share: float | None = None,
    lower: float = 1.0,
) -> Edit:
    """SSD: `θ ← θ · min(λ I_D / I_F, 1)` wherever `I_F > α I_D`, with no step of training.

    `I_F` and `I_D` are the diagonals of the Fisher information of the data to forget and of *all* data, these included.
    Gather them with [`SquaredSum`][semu_peft.gradients.statistics.SquaredSum], of all parameters
    ([`gather_parameters`][semu_peft.gradients.parameters.gather_parameters], as the paper: biases and norms too) or of
    the weights of layers ([`gather`][semu_peft.gradients.gather.gather], a batch at a time).

    Take them per example, which is what `SquaredSum` does unless told otherwise. The released code squares the means of
    whole batches instead, in which the gradients of unlike examples cancel: how many weights its threshold selects then
    depends on the batch size. Per example `I_F ≤ (n_D / n_F) I_D` always, so that the published `α = 10` selects
    nothing for one class of ten; 1.5 to 4 does there. Or say what `share` of the weights to dampen.

    Source: Foster, Schoepf, Brintrup 2024, arXiv 2308.07707, equations 4 to 7. Without labels (LFSSD, arXiv
    2402.19308): gather [`AbsoluteSum`][semu_peft.gradients.parameters.AbsoluteSum] of
    [`SquaredLogits`][semu_peft.objectives.label_free.SquaredLogits].

    Args:
        forget: The importance of the data to forget.
        everything: The importance of all data.
        threshold: `α`; a larger one selects fewer weights.
        share: In its place, the share of these weights to select; `settings` of the edit tells the `α` that does.
        lower: `λ`: by how much a selected weight is damped, more with less.

    Returns:
        The edit, factors on the selected weights; it grows none.

    Raises:
        ValueError: Neither or both of `threshold` and `share` are given, or the importances are not of the same
            parameters and kind.
        TypeError: They are no gathered means of squares.

    Examples:
        >>> from semu_peft import SquaredSum, objectives
        >>> from semu_peft.edits import dampen
        >>> from semu_peft.gradients.parameters import gather_parameters
        >>> model, loss = torch.nn.Linear(4, 3), objectives.CrossEntropy()
        >>> data = [(torch.randn(8, 4), torch.full((8,), label)) for label in (0, 1, 2)]
        >>> forget, everything = (gather_parameters(model, part, loss, progress=False) for part in (data[:1], data))
        >>> dampen(forget, everything, share=0.2).apply(model).edit
        Edit(dampen(threshold=..., share=0.2, lower=1): 3 numbers of 2 parameters)
    """
    if (threshold is None) == (share is None):
        raise ValueError(
            f"`threshold` or `share` must be given, and not both, got {threshold!r} and {share!r}. Give `share=0.05` "
            "to dampen a twentieth of the weights."
        )
    check_number("lower", lower, low=0.0)
    check_share("share", share, optional=True)
    means = _importances(forget, everything)
    if threshold is None:
        assert share is not None
        threshold = _threshold_for(means, share)
    else:
        check_number("threshold", threshold, low=0.0)
    settings = {"threshold": threshold, **({} if share is None else {"share": share}), "lower": lower}
    bound = _largest_ratio(forget, everything)
    # Above it lies what rounding has left, but for means over tokens, whose examples depend on their batch.
    if bound is not None and threshold >= bound and _highest_ratio(means) <= bound * (1 + 1e-3):
        warnings.warn(
            f"`threshold`: {threshold:g} selects nothing, as no importance per example is more than n_D / n_F = "
            f"{bound:g} times that of all data. Give a smaller one, such as {max(1.0, bound / 4):g}, or `share`.",
            stacklevel=2,
        )
        return Edit({}, "dampen", settings)
    deltas = {}
    for name, (part, whole) in means.items():
        factors = (lower * (whole / part)).clamp(max=1.0)
        selected = (_ratios(part, whole) > threshold) & (factors < 1)
        if bool(selected.any()):
            deltas[name] = at_places(Scaled, selected, factors)
    return Edit(deltas, "dampen", settings)


def search_dampening(
    model: nn.Module,
    forget: Gathered,
    everything: Gathered,
    score: Callable[[nn.Module], float],
    *,
    lower: float = 1.0,
    highest: float = 0.5,
    halvings: int = 8,
) -> Edit:
    """Look for the share of weights at which dampening them scores best: no threshold does for all requests.

    The importances are gathered once and searched as by [`best_edit`][semu_peft.edits.search.best_edit]; of equal
    scores the smallest share is taken, so that no more is damped than has to be.

    Args:
        model: The model, which is as it was before when the search is done, whatever happens in it.
        forget: The importance of the data to forget.
        everything: The importance of all data.
        score: `(model) -> float`, better where larger: such as the accuracy on retain data less that on forget data.
        lower: `λ`.
        highest: The largest share tried.
        halvings: How fine the search is.

    Returns:
        The best edit; its `settings` tell share and threshold.

    Raises:
        ValueError: No share is better than to do nothing, or a score is not finite.

    Examples:
        >>> import torch
        >>> from semu_peft import objectives
        >>> from semu_peft.edits.dampening import search_dampening
        >>> from semu_peft.gradients.parameters import gather_parameters
        >>> model, loss = torch.nn.Linear(4, 3), objectives.CrossEntropy()
        >>> data = [(torch.randn(8, 4), torch.full((8,), label)) for label in (0, 1, 2)]
        >>> forget, everything = (gather_parameters(model, part, loss, progress=False) for part in (data[:1], data))
        >>> search_dampening(model, forget, everything, lambda model: float(loss(model, data[0])))
        Edit(dampen(threshold=..., share=..., lower=1): ... numbers of ... parameters)
    """
    check_share("highest", highest)
    return best_edit(
        model, lambda share: dampen(forget, everything, share=share, lower=lower), score, highest=highest,
        halvings=halvings,
    )  # fmt: skip


def _importances(forget: Gathered, everything: Gathered) -> dict[str, tuple[Tensor, Tensor]]:
    """Both means of each parameter."""
    for role, gathered in (("forget", forget), ("everything", everything)):
        mend = "Call `gather_parameters(model, batches, objective)`, or `gather(..., statistic=SquaredSum)`."
        check_kind(role, gathered, Mapping, "gathered statistics", mend)
        for statistic in gathered.values():
            if not isinstance(getattr(statistic, "mean", None), Tensor):
                raise TypeError(f"`{role}` must hold means, got {type(statistic).__name__}. {mend}")
    kinds = {(type(s), getattr(s, "per", None)) for part in (forget, everything) for s in part.values()}
    shapes = [{name: tuple(s.mean.shape) for name, s in part.items()} for part in (forget, everything)]  # type: ignore[attr-defined]
    if shapes[0] != shapes[1] or len(kinds) > 1:
        raise ValueError(
            "`forget` and `everything` must be statistics of one kind of the same parameters. Gather both in one way."
        )
    return {name: (forget[name].mean, everything[name].mean) for name in of_each_weight(forget)}  # type: ignore[attr-defined]


def _largest_ratio(forget: Gathered, everything: Gathered) -> float | None:
    """`n_D / n_F`, above which no ratio can be where examples are squared by themselves; else None."""
    per_example = all(isinstance(s, SquaredSum) and s.per == "example" for s in forget.values())
    if not per_example or not getattr(forget, "examples", None) or not getattr(everything, "examples", None):
        return None
    assert forget.examples is not None and everything.examples is not None
    return everything.examples / forget.examples


def _highest_ratio(means: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    return max(float(_ratios(*each).max()) for each in means.values())


def _threshold_for(means: Mapping[str, tuple[Tensor, Tensor]], share: float) -> float:
    """The smallest `α` above which at most this share of all numbers lies."""
    ratios = torch.cat([_ratios(part, whole).reshape(-1) for part, whole in means.values()])
    allowed = math.floor(share * len(ratios))
    return 0.0 if allowed == len(ratios) else float(ratios.kthvalue(len(ratios) - allowed).values)


def _ratios(part: Tensor, whole: Tensor) -> Tensor:
    """`I_F / I_D`, finite, and 0 where the data to forget does not need the weight."""
    return torch.where(part > 0, part / whole, 0.0).nan_to_num(posinf=torch.finfo(part.dtype).max)
