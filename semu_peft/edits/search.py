"""Find how large an edit is to be: the size at which a score of the edited model is largest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from semu_peft.adapter.search_scale import best_trial
from semu_peft.arguments import check_count, check_kind, check_model, check_number, check_score

from .deltas import Dense
from .edit import Edit


def best_edit(
    model: nn.Module,
    edit_at: Callable[[float], Edit],
    score: Callable[[nn.Module], float],
    *,
    highest: float,
    halvings: int = 8,
) -> Edit:
    """The edit of the size that scores best, of sizes from 0 to `highest`; of equal ones the smallest.

    A trial costs one edit and one call of `score`, of which there are about twenty: the search is that of
    [`search_scale`][semu_peft.adapter.search_scale.search_scale].

    Args:
        model: The model, which is as it was before when the search is done, whatever happens in it.
        edit_at: Makes the edit of a size above 0.
        score: `(model) -> float`, better where larger: such as the accuracy on retain data less that on forget data.
        highest: The largest size tried.
        halvings: How fine the search is.

    Raises:
        ValueError: No size is better than to do nothing, or a score is not finite.
        TypeError: `score` is no function.

    Examples:
        >>> import torch
        >>> from semu_peft.edits.search import best_edit
        >>> model = nn.Linear(1, 1, bias=False)
        >>> nn.init.zeros_(model.weight).shape
        torch.Size([1, 1])
        >>> edit = best_edit(
        ...     model,
        ...     lambda size: Edit({"weight": Dense(torch.full((1, 1), size))}, settings={"size": size}),
        ...     lambda model: 9 - abs(model.weight.item() - 0.25),
        ...     highest=1.0,
        ... )
        >>> edit.settings["size"], model.weight.item()
        (0.25, 0.0)
    """
    check_model(model)
    check_number("highest", highest, low=0.0)
    check_count("halvings", halvings, least=0)
    check_score(score)

    def at(size: float) -> float:
        if size == 0.0:
            return score(model)
        with edit_at(size).apply(model):
            return score(model)

    found = best_trial(at, highest=highest, halvings=halvings)
    if found.scale == 0.0:
        raise ValueError(
            f"`score` is nowhere better than without the edit ({found.score:g}), up to a size of {highest:g}. Give "
            "other settings, of a step a larger `step_size`, or parameters to change, or a score that the edit moves."
        )
    return edit_at(found.scale)


def search_step(
    model: nn.Module, step: Edit, score: Callable[[nn.Module], float], *, highest: float = 1.0, halvings: int = 8
) -> Edit:
    """Look for the share of a step at which it scores best: how long it may be differs by request by factors of ten.

    Args:
        model: The model, which is as it was before when the search is done.
        step: An [`influence_step`][semu_peft.edits.influence.influence_step] or
            [`newton_step`][semu_peft.edits.influence.newton_step], made once.
        score: `(model) -> float`, better where larger.
        highest: The largest multiple of the step that is tried.
        halvings: How fine the search is.

    Returns:
        The best multiple of the step; its `settings` tell the `step_size`.

    Raises:
        ValueError: No multiple is better than to do nothing, or a score is not finite.
        TypeError: The edit is no step, or `score` no function.

    Examples:
        >>> import torch
        >>> from semu_peft.edits import search_step
        >>> model = nn.Linear(2, 1, bias=False)
        >>> before = model.weight.detach().clone()
        >>> step = Edit({"weight": Dense(torch.ones(1, 2))}, "newton_step", {"step_size": 2.0})
        >>> found = search_step(model, step, lambda model: 9 - abs((model.weight - before).sum().item() - 0.5))
        >>> found.settings["step_size"]
        0.5
    """
    check_kind("step", step, Edit, "an edit", "Give what `newton_step` or `influence_step` returned.")
    values = {name: delta.values for name, delta in step.deltas.items() if isinstance(delta, Dense)}
    if len(values) < len(step.deltas) or "step_size" not in step.settings:
        raise TypeError(f"`step` must be a step, got {step!r}. Give what `newton_step` or `influence_step` returned.")

    def times(share: float) -> Edit:
        deltas = {name: Dense(share * each) for name, each in values.items()}
        return replace(step, deltas=deltas, settings={**step.settings, "step_size": share * step.settings["step_size"]})

    return best_edit(model, times, score, highest=highest, halvings=halvings)
