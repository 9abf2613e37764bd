"""The trade-off of a run: how much was forgotten for how much damage, step by step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from semu_peft.training.unlearn import UnlearnResult

from .figure import MARK, TEXT, new_figure, save_figure

_COLOURS = (MARK, "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito, safe for the colour-blind
_WORDS = {
    "answer_probability": "probability of the forgotten answers",
    "damage": "damage: KL(original ‖ now) on what is kept, nats",
    "forget_loss": "forget loss",
    "retain_loss": "retain loss",
    "loss": "loss",
    "kl": "KL of a step, nats",
}


def plot_tradeoff(
    results: UnlearnResult | Mapping[str, UnlearnResult],
    path: str | os.PathLike[str],
    *,
    forgetting: str = "answer_probability",
    damage: str = "damage",
    dpi: int = 150,
) -> Path:
    """Draw forgetting against damage over the steps of one or several runs; the dot is where a run was left.

    A run by natural gradients records both where it has a damage budget (`max_retain_kl`) or a choice to make
    (`choose`), which takes one of the points drawn.

    Args:
        results: What [`unlearn`][semu_peft.training.unlearn.unlearn] returned, or several by name.
        path: The picture to write; its suffix chooses the format (`.png`, `.pdf`, `.svg`).
        forgetting: The entry of the history to draw upwards; lower is more forgotten.
        damage: The entry to draw to the right.
        dpi: Pixels per inch of a bitmap. The picture is 7 × 5 inches.

    Returns:
        The path written.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is no run, a history lacks one of the two entries, or the suffix is no picture format.

    Examples:
        >>> import tempfile
        >>> from semu_peft.report import plot_tradeoff
        >>> points = [{"damage": 0.0, "answer_probability": 0.9}, {"damage": 0.01, "answer_probability": 0.1}]
        >>> result = UnlearnResult(points, 1, 64, 81, 0.5, True, "the forget data are forgotten")
        >>> plot_tradeoff(result, f"{tempfile.mkdtemp()}/tradeoff.png").name
        'tradeoff.png'
    """
    by_name = {"": results} if isinstance(results, UnlearnResult) else dict(results)
    if not by_name:
        raise ValueError("`results` must hold at least one run, got none. Give what `unlearn` returned.")
    figure = new_figure(7, 5)
    ax = figure.subplots()
    for index, (name, result) in enumerate(by_name.items()):
        horizontal, vertical = (_column(result, key, name) for key in (damage, forgetting))
        colour = _COLOURS[index % len(_COLOURS)]
        ax.plot(horizontal, vertical, color=colour, lw=1.5, marker=".", ms=4, label=name)
        ax.plot(horizontal[-1:], vertical[-1:], color=colour, marker="o", ms=9)
    ax.set_xlabel(_WORDS.get(damage, damage), color=TEXT)
    ax.set_ylabel(_WORDS.get(forgetting, forgetting), color=TEXT)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#e6e6e6", lw=0.8)
    if any(by_name):
        ax.legend(frameon=False)
    return save_figure(figure, path, dpi)


def _column(result: UnlearnResult, key: str, name: str) -> list[float]:
    values = [entry[key] for entry in result.history if key in entry]
    if not values:
        known = sorted({each for entry in result.history for each in entry})
        raise ValueError(
            f"`results` must be runs whose history has {key!r}, got {known} in the run {name!r}. Unlearn with "
            "`max_retain_kl`, or name two of these as `forgetting` and `damage`."
        )
    return values
