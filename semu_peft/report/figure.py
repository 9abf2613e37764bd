"""What all pictures have in common: made without pyplot, written whole, in the same colours, with a text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semu_peft.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT = "#444444"
MARK = "#0072b2"  # a blue that no colour map used here contains, safe for the colour-blind
COLOURS = (MARK, "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito, safe for the colour-blind
DASHES = ("-", "--", ":", "-.")  # for those who see no colours at all
_TEXT_ENTRY = {"png": "Description", "svg": "Description", "svgz": "Description", "pdf": "Subject"}


def clipped(name: str, longest: int = 20) -> str:
    """Cut a class's name at the end."""
    return name if len(name) <= longest else name[: longest - 1] + "…"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of the size in inches, outside pyplot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: run `pip install ".[report]"` in a clone of semu-peft.') from error
    return Figure(figsize=(width, height), layout="constrained")


def panels(
    ax: Axes | Sequence[Axes] | None, size: tuple[float, float], rows: int = 1, columns: int = 1, **how: Any
) -> tuple[Figure, list[Axes]]:
    """The figure to draw into, and its panels row by row: new ones, those given, or the one given divided.

    Args:
        ax: Axes of somebody's own, one a panel, or a single one that makes room for all of them.
        size: Of a new figure, in inches.
        rows: Rows of panels.
        columns: Columns of panels.
        how: What `Figure.subplots` takes beside.

    Raises:
        ValueError: There are too many axes or too few, or the one to be divided stands in no grid.
    """
    figure = new_figure(*size)
    if ax is None:
        return figure, list(figure.subplots(rows, columns, squeeze=False, **how).ravel())
    given = list(ax) if isinstance(ax, Sequence) else [ax]
    root: Any = given[0].figure.figure if given else figure
    if len(given) == rows * columns:
        return root, given
    place = given[0].get_subplotspec() if len(given) == 1 else None
    if place is None:
        raise ValueError(
            f"`ax` must be {rows * columns} axes, one a panel, or a single one from `subplots` to be divided, got "
            f"{len(given)}. Leave it out for a figure of its own."
        )
    divided = place.subgridspec(rows, columns, **how).subplots(squeeze=False)
    given[0].remove()
    return root, list(divided.ravel())


def finished(
    figure: Figure,
    axes: Axes | Sequence[Axes] | None,
    text: str | Sequence[str],
    path: str | os.PathLike[str] | None,
    dpi: int,
) -> Figure:
    """Put the text for those who do not see the picture on it, and write it where there is a path.

    The text is the figure's label, or where the figure is somebody's own that of the axes (`get_label()`): of several
    texts each panel has its own, and the figure all.
    """
    texts = [text] if isinstance(text, str) else text
    holders: Sequence[Any] = [figure] if axes is None else axes if isinstance(axes, Sequence) else [axes]
    for index, holder in enumerate(holders):
        holder.set_label(texts[index] if len(texts) == len(holders) else " ".join(texts))
    if path is not None:
        save_figure(figure, path, dpi)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int) -> Path:
    """Write the figure, whole or not at all, with its text in the file where the format has a place for one."""
    target = Path(path)
    formats = figure.canvas.get_supported_filetypes()
    kind = target.suffix[1:].lower()
    if kind not in formats:
        raise ValueError(f"`path` must end in '.png', '.svg' or another picture format, got {target.suffix!r}.")
    text: Any = figure.get_label()
    metadata = {_TEXT_ENTRY[kind]: text} if text and kind in _TEXT_ENTRY else None
    with written_whole(target) as temporary:
        figure.savefig(temporary, dpi=dpi, facecolor="white", metadata=metadata)
    return target
