"""Every plot draws into axes of somebody's own, and says in words what it shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from semu_peft import UnlearnResult
from semu_peft.evaluation import Predictions, TextRelearning
from semu_peft.linalg.factorize import SingularFactors
from semu_peft.localize import Localization
from semu_peft.report import (
    plot_attack,
    plot_before_after,
    plot_confusion,
    plot_localization,
    plot_losses,
    plot_samples,
    plot_spectra,
    plot_tradeoff,
)
from semu_peft.subspace.profile import LayerSpectrum, SubspaceProfile

VALUES = torch.tensor([2.0, 1.0])
SPECTRUM = LayerSpectrum(SingularFactors(torch.zeros(4, 1), torch.zeros(4, 1), VALUES, torch.tensor(5.0)), 1, (4, 4))
LABELS = torch.tensor([0, 1])
SAID = Predictions(LABELS, LABELS, torch.ones(2), 2)
ROWS = {"cat": torch.rand(2, 1, 8, 8), "dog": torch.rand(2, 1, 8, 8)}
RUN = UnlearnResult(
    [{"loss": 2.0, "damage": 0.0, "answer_probability": 0.9}, {"loss": 1.0, "damage": 0.01, "answer_probability": 0.1}],
    2, 8, 4, 0.1, True, "done",
)  # fmt: skip

PLOTS: dict[str, tuple[Callable[..., Figure], int, str]] = {
    "confusion": (lambda **how: plot_confusion(SAID, SAID, forgotten=0, **how), 2, "accuracy on class 0: 100.0%"),
    "spectra": (lambda **how: plot_spectra(SubspaceProfile({"fc": SPECTRUM}, 1), **how), 2, "of 1 layers"),
    "trade-off": (lambda **how: plot_tradeoff(RUN, **how), 1, "Ends at 0.1, for 0.01"),
    "losses": (lambda **how: plot_losses(RUN, **how), 1, "Loss: 2 to 1"),
    "attack": (
        lambda **how: plot_attack(TextRelearning("Adam", (0, 9), (0.1, 0.2)), **how), 1, "Adam: 0.1 to 0.2"
    ),
    "places": (
        lambda **how: plot_localization(Localization.of({"fc1": {"ratio": 1.0}}, by="ratio"), **how), 1, "first: fc1"
    ),
    "samples": (lambda **how: plot_samples(ROWS, marked=["cat"], **how), 2, "cat (to be forgotten), dog"),
    "before and after": (lambda **how: plot_before_after(ROWS, ROWS, **how), 4, "before and after of cat, dog"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLOTS)
def test_axes_of_ones_own_are_drawn_into_and_described(name: str, tmp_path: Path) -> None:
    plot, panels, words = PLOTS[name]
    path = tmp_path / "plot.png"
    alone = plot(path=path, dpi=30)
    assert isinstance(alone, Figure) and words in alone.get_label()
    assert Image.open(path).info["Description"] == alone.get_label(), "a file has its text too"

    own = Figure(layout="constrained")
    left, right = own.subplots(1, 2)
    assert plot(ax=left) is own
    drawn = [axes for axes in own.axes if axes is not right and axes.get_label() != "<colorbar>"]
    assert len(drawn) == panels and all(words in axes.get_label() for axes in drawn)
    assert not right.has_data() and own.get_label() == "", "what is somebody else's stays"
    own.canvas.draw()


def test_one_panel_each_or_one_to_be_divided() -> None:
    plot = PLOTS["spectra"][0]
    apart: list[Any] = [Figure().subplots(), Figure().subplots()]
    assert plot(ax=apart) is apart[0].figure and apart[1].patches
    with pytest.raises(ValueError, match="`ax` must be 2 axes, one a panel, or a single one"):
        plot(ax=[*apart, apart[0]])
    free = Figure().add_axes((0, 0, 1, 1))
    with pytest.raises(ValueError, match="`ax` must be 2 axes"):
        plot(ax=free)
