"""Numbers by name: as a table for people, which cuts none however narrow a terminal is, and with their intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_LEAST = 16  # signs of a name in a line, below which a table of wrapped names is no longer read


def with_interval(name: str, percent: float, count: int) -> dict[str, Any]:
    """A share of so many examples, in percent, with Wilson's 95% interval of it, which holds at 0 and 100 as well.

    Args:
        name: What it is the share of.
        percent: The share.
        count: Of how many examples.

    Examples:
        >>> from semu_cli.tables import with_interval
        >>> with_interval("accuracy", 0.0, 6)
        {'accuracy': 0.0, 'accuracy interval': (0.0, 39.0...)}
    """
    from semu_peft.evaluation.auc import share_interval

    low, high = share_interval(percent / 100, count)
    return {name: percent, f"{name} interval": (100 * low, 100 * high)}


@dataclass(frozen=True)
class Numbers:
    """Rows of a name and numbers, printed by rich as a table.

    Numbers stand whole in any width. Where there is no room, headings are wrapped, then names, and in a terminal too
    narrow for that each row becomes a paragraph.

    Attributes:
        head: What the names are of.
        heads: What the numbers are.
        rows: The name first, then a number for each of `heads`.

    Examples:
        >>> from rich.console import Console
        >>> from semu_cli.tables import Numbers
        >>> table = Numbers("layer", ("rank", "largest"), [("mid_block.attentions.0.to_k", "3", "0.0631")])
        >>> Console(width=30).print(table)
        mid_block.attentions.0.to_k
          rank 3, largest 0.0631
    """

    head: str
    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.cells import cell_len
        from rich.table import Column, Table

        def least(heading: str, number: int) -> int:
            return max(cell_len(part) for part in (*heading.split(), *(row[number] for row in self.rows)))

        names = max(cell_len(part) for part in (self.head, *(row[0] for row in self.rows)))
        whole = [max(cell_len(head), least(head, number)) for number, head in enumerate(self.heads, 1)]
        narrow = [least(head, number) for number, head in enumerate(self.heads, 1)]
        borders = 3 * len(self.heads) + 4
        widths = next((each for each in (whole, narrow) if names + sum(each) + borders <= options.max_width), narrow)
        room = options.max_width - sum(widths) - borders
        if room < min(names, _LEAST):
            yield from self._paragraphs()
            return
        numbers = [Column(head, width=width) for head, width in zip(self.heads, widths, strict=True)]
        table = Table(Column(self.head, width=min(names, room), overflow="fold"), *numbers)
        for row in self.rows:
            table.add_row(*row)
        yield table

    def _paragraphs(self) -> Iterator[Any]:
        from rich.text import Text

        for name, *numbers in self.rows:
            told = ", ".join(f"{head} {number}" for head, number in zip(self.heads, numbers, strict=True))
            yield Text(f"{name}\n  {told}")
