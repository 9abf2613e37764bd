"""A picture of where in a model something lies: one bar for each place, or the two axes of SLUG's front."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from semu_peft.arguments import check_kind
from semu_peft.localize import Localization

from .figure import MARK, TEXT, clipped, finished, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BARS = 40  # more do not fit


def plot_localization(
    localization: Localization,
    path: str | os.PathLike[str] | None = None,
    *,
    ax: Axes | None = None,
    dpi: int = 150,
) -> Figure:
    """Draw a localization: importance against alignment where it has both, with the front's layers named; else bars.

    Args:
        localization: What one of [`semu_peft.localize`] found.
        path: A picture to write; its suffix chooses the format.
        ax: Axes to draw into instead of a new figure.
        dpi: Pixels per inch of a bitmap.

    Returns:
        The figure. Its label, or that of `ax`, describes it for those who do not see it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The suffix is no picture format.

    Examples:
        >>> from semu_peft.localize import Localization
        >>> from semu_peft.report import plot_localization
        >>> table = Localization.of({"fc1": {"ratio": 0.5}, "fc2": {"ratio": 2.0}}, by="ratio")
        >>> plot_localization(table).get_label()
        'ratio of 2 places, the largest first: fc2, fc1.'
    """
    check_kind("localization", localization, Localization, "a `Localization`", "Take one from `semu_peft.localize`.")
    figure, [axes] = panels(ax, (7, 1.2 + 0.22 * min(len(localization), _BARS)))
    if {"importance", "alignment"} <= localization.columns.keys():
        _scatter(axes, localization)
        words = "Importance against alignment"
    else:
        _bars(axes, localization)
        words = next(iter(localization.columns))
    axes.spines[["top", "right"]].set_visible(False)
    text = f"{words} of {len(localization)} places, the largest first: {', '.join(localization.top(3))}."
    return finished(figure, ax, text, path, dpi)


def _scatter(axes: Any, table: Localization) -> None:
    across, up = table.columns["importance"], table.columns["alignment"]
    front = table.columns.get("front", (0.0,) * len(table))
    axes.scatter(across, up, c=[MARK if on else "#bbbbbb" for on in front], zorder=2)
    for name, x, y, on in zip(table.names, across, up, front, strict=True):
        if on:
            axes.annotate(clipped(name, 32), (x, y), textcoords="offset points", xytext=(5, 3), color=TEXT, fontsize=8)
    axes.set_xlabel("importance, ‖G_forget‖ / ‖W‖")
    axes.set_ylabel("alignment, |cos(G_forget, G_retain)|")


def _bars(axes: Any, table: Localization) -> None:
    column = next(iter(table.columns))
    shown, values = table.top(_BARS), table.columns[column][:_BARS]
    axes.barh(range(len(shown)), values, color=MARK)
    axes.set_yticks(range(len(shown)), [clipped(name, 44) for name in shown], fontsize=8, color=TEXT)
    axes.invert_yaxis()
    axes.set_xlabel(column)
