"""What all pictures have in common: made without pyplot, written whole, in the same colours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from semu_peft.files import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT = "#444444"
MARK = "#0072b2"  # a blue that no colour map used here contains, safe for the colour-blind


def clipped(name: str, longest: int = 20) -> str:
    """Cut a class's name at the end."""
    return name if len(name) <= longest else name[: longest - 1] + "…"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of the size in inches, outside pyplot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: run `pip install semu-peft[report]`.") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int) -> Path:
    """Write the figure, whole or not at all."""
    target = Path(path)
    formats = figure.canvas.get_supported_filetypes()
    if target.suffix[1:].lower() not in formats:
        raise ValueError(f"`path` must end in '.png', '.svg' or another picture format, got {target.suffix!r}.")
    with written_whole(target) as temporary:
        figure.savefig(temporary, dpi=dpi, facecolor="white")
    return target
