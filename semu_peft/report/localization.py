"""A picture of where in a model something lies: one bar for each place, or the two axes of SLUG's front."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semu_peft.arguments import check_kind
from semu_peft.localize import Localization

from .figure import MARK, TEXT, clipped, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BARS = 40  # more do not fit


def plot_localization(
    localization: Localization,
    path: str | os.PathLike[str] | None = None,
    *,
    ax: Axes | None = None,
    dpi: int = 150,
) -> Path | Axes:
    """Draw a localization: importance against alignment where it has both, with the front's layers named; else bars.

    Args:
        localization: What one of [`semu_peft.localize`] found.
        path: The picture to write; its suffix chooses the format.
        ax: Axes to draw into instead.
        dpi: Pixels per inch of a bitmap.

    Returns:
        The path written, or the axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: Neither a path nor axes are given, or both.

    Examples:
        >>> import tempfile
        >>> from semu_peft.localize import Localization
        >>> from semu_peft.report import plot_localization
        >>> table = Localization.of({"fc1": {"ratio": 0.5}, "fc2": {"ratio": 2.0}}, by="ratio")
        >>> plot_localization(table, f"{tempfile.mkdtemp()}/where.png").name
        'where.png'
    """
    check_kind("localization", localization, Localization, "a `Localization`", "Take one from `semu_peft.localize`.")
    if (path is None) == (ax is None):
        raise ValueError("`path` or `ax` must be given, got neither or both. Give `path` to write a picture.")
    figure = new_figure(7, 1.2 + 0.22 * min(len(localization), _BARS)) if ax is None else None
    axes: Any = figure.subplots() if figure is not None else ax
    if {"importance", "alignment"} <= localization.columns.keys():
        _scatter(axes, localization)
    else:
        _bars(axes, localization)
    axes.spines[["top", "right"]].set_visible(False)
    if figure is None or path is None:
        return axes
    return save_figure(figure, path, dpi)


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
