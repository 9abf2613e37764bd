"""How large an edit is to be, found by a score of the edited model."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from semu_peft import methods
from semu_peft.edits import Edit, search_step
from semu_peft.edits.deltas import Dense, Scaled

K_FADE = partial(methods.k_fade, damping=1.0)


@pytest.mark.parametrize(
    ("method", "whole_step", "keeps"), [(K_FADE, 1.0, 98.0), (methods.iau, 30.0, 95.0)], ids=["K-FADE", "IAU"]
)
def test_a_step_is_as_long_as_a_score_has_it(
    digits: dict[str, Any], method: Any, whole_step: float, keeps: float
) -> None:
    """The whole step forgets most of the others too; the model keeps its bits."""
    model, accuracies = digits["model"], digits["accuracies"]
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def score(candidate: nn.Module) -> float:
        forgotten, others = accuracies(candidate)
        return others - forgotten

    step = partial(method, model, *digits["data"], step_size=whole_step, progress=False)
    with step().apply(model):
        assert accuracies(model)[1] < 50
    edit = step(score=score)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with edit.apply(model):
        forgotten, others = accuracies(model)
    assert forgotten == 0 and others >= keeps
    asked = method(model, *digits["data"], step_size=edit.settings["step_size"], progress=False)
    for name, delta in asked.deltas.items():
        torch.testing.assert_close(edit.deltas[name].tensors()["values"], delta.tensors()["values"])


def test_what_cannot_be_searched() -> None:
    model = nn.Linear(2, 1, bias=False)
    step = Edit({"weight": Dense(torch.ones(1, 2))}, "newton_step", {"step_size": 2.0})
    with pytest.raises(ValueError, match="nowhere better than without the edit"):
        search_step(model, step, lambda _: 1.0)
    for wrong in (Edit({"weight": Scaled(torch.tensor([0]), torch.ones(1), (1, 2))}, "x", {"step_size": 1.0}),
                  Edit(step.deltas), "step"):  # fmt: skip
        with pytest.raises(TypeError, match="Give what `newton_step` or `influence_step` returned"):
            search_step(model, wrong, lambda _: 1.0)  # type: ignore[arg-type]
    for method in (methods.k_fade, methods.iau, methods.ssd):
        with pytest.raises(TypeError, match="`score` must be a function of the model"):
            method(model, [], [], score=1.0)
