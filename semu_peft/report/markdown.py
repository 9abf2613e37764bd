"""A report in GitHub's Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .document import Items, Picture, Section, Table, Text

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#$&~])")


def to_markdown(title: str, created: str, sections: Sequence[Section]) -> str:
    """Write sections; of a picture its text stands there.

    Examples:
        >>> from semu_peft.report.document import Section, Text
        >>> from semu_peft.report.markdown import to_markdown
        >>> print(to_markdown("Report", "today", [Section("limits", "Limits", (Text("None <known>."),))]))
        # Report
        <BLANKLINE>
        today
        <BLANKLINE>
        ## Limits
        <BLANKLINE>
        None \\<known\\>.
        <BLANKLINE>
    """
    blocks = [f"# {escaped(title)}", escaped(created)]
    for section in sections:
        blocks.append(f"## {escaped(section.title)}")
        blocks += [_part(part) for part in section.parts]
    return "\n\n".join(blocks) + "\n"


def escaped(text: str) -> str:
    """A text that means nothing to Markdown, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _part(part: Text | Items | Table | Picture) -> str:
    if isinstance(part, Text):
        paragraphs = [escaped(paragraph) for paragraph in re.split(r"\n\s*\n", part.text)]
        mark = "*" if part.missing else "**" if part.lead else ""
        return "\n\n".join(f"{mark}{text}{mark}" for text in paragraphs)
    if isinstance(part, Items):
        return "\n".join(f"- {escaped(item)}" for item in part.items)
    if isinstance(part, Picture):
        return f"*Picture: {escaped(part.caption)}.* {escaped(part.text)}"
    lines = [part.columns, ("---",) * len(part.columns), *part.rows]
    cells = [[cell if cell == "---" else escaped(cell) for cell in line] for line in lines]
    return f"**{escaped(part.caption)}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in cells)
