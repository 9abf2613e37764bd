"""The parts that a report is made of, whatever it is written in: sections of texts, lists, tables and pictures."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .figure import new_figure


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: What it says.
        missing: It says that something is missing.
        lead: It sums up what follows.

    Examples:
        >>> from semu_peft.report.document import Text
        >>> Text("No metrics were given.", missing=True).missing
        True
    """

    text: str
    missing: bool = False
    lead: bool = False


@dataclass(frozen=True)
class Items:
    """A list.

    Examples:
        >>> from semu_peft.report.document import Items
        >>> len(Items(("relearning", "probes")).items)
        2
    """

    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Attributes:
        caption: What stands above it.
        columns: The heads.
        rows: Cells, as many as there are columns.
        even: The columns are of one width, as texts need that would take it from each other.

    Examples:
        >>> from semu_peft.report.document import Table
        >>> Table("Versions", ("package", "version"), (("torch", "2.7.0"),)).columns[0]
        'package'
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    even: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture with the text for those who do not see it, as SVG or as a PNG.

    Attributes:
        section: The section that it belongs to.
        caption: What stands below it.
        text: What is to be seen.
        svg: An `<svg>` element without anything outside itself.
        png: Or the bytes of a PNG.

    Examples:
        >>> from semu_peft.report.document import Picture
        >>> Picture("samples", "Before and after", "Two rows of digits", png=b"...").svg
        ''
    """

    section: str
    caption: str
    text: str
    svg: str = ""
    png: bytes = b""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it.

    Examples:
        >>> from semu_peft.report.document import Section, Text
        >>> Section("limits", "Limits", (Text("This is approximate unlearning."),)).title
        'Limits'
    """

    name: str
    title: str
    parts: tuple[Text | Items | Table | Picture, ...]


def vector_picture(
    section: str, caption: str, draw: Callable[[Any], Any], *, width: float = 5.0, height: float = 3.8
) -> Picture:
    """Draw into axes of a new figure, small enough that its letters can be read on a phone, and keep it as SVG.

    Args:
        section: The section that it belongs to.
        caption: What stands below it.
        draw: Called with the axes; it leaves its text as their label.
        width: In inches.
        height: In inches.

    Examples:
        >>> from semu_peft.report.document import vector_picture
        >>> picture = vector_picture("attacks", "A line", lambda axes: axes.plot([0, 1], label="x"))
        >>> picture.svg[:4], "http" in picture.svg
        ('<svg', False)
    """
    figure = new_figure(width, height)
    from matplotlib import rc_context

    # Names of layers and classes are no formulas; text that stays text can be searched, enlarged and read aloud.
    with rc_context({"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": caption}):
        axes = figure.subplots()
        draw(axes)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    label = axes.get_label()
    return Picture(section, caption, str(label) if label else caption, svg=_bare(written.getvalue()))


def _bare(svg: str) -> str:
    """The `<svg>` element alone: no document type, comments, metadata or namespaces, which a page has no use for."""
    element = svg[svg.index("<svg") :].strip()
    element = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", element, flags=re.S)
    box = re.search(r'viewBox="([^"]*)"', element)
    return f'<svg viewBox="{box[1] if box else ""}">{element[element.index(">") + 1 :]}'
