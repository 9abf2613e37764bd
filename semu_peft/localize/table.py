"""One table for all that says where: a row for each place, best first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

_SHOWN = 40


@dataclass(frozen=True, eq=False, repr=False)
class Localization(Sequence[str]):
    """Places in a model, the best first, and what was measured at each: a sequence of names, to be named as targets.

    `str()` gives it as a table; [`plot_localization`][semu_peft.report.localization.plot_localization] draws it.

    Attributes:
        names: The places, best first.
        columns: What was measured, by the name of the column; the first is that which they are sorted by.

    Examples:
        >>> table = Localization.of({"fc1": {"importance": 0.5}, "fc2": {"importance": 2.0}}, by="importance")
        >>> table.top(1), table[0], table.row("fc1")
        (['fc2'], 'fc2', {'importance': 0.5})
        >>> print(table)
        place  importance
        fc2             2
        fc1           0.5
    """

    names: tuple[str, ...]
    columns: dict[str, tuple[float, ...]]

    @classmethod
    def of(cls, rows: Mapping[str, Mapping[str, float]], *, by: str, descending: bool = True) -> Localization:
        """Make a table of rows by name, sorted by a column; equal ones stay in the order they come in."""
        names = sorted(rows, key=lambda name: rows[name][by], reverse=descending)
        keys = [by, *(key for key in next(iter(rows.values()), {}) if key != by)]
        return cls(tuple(names), {key: tuple(float(rows[name][key]) for name in names) for key in keys})

    def top(self, k: int) -> list[str]:
        """The names of the first `k` places."""
        return list(self.names[:k])

    def row(self, name: str) -> dict[str, float]:
        """What was measured at a place.

        Raises:
            KeyError: There is no such place.
        """
        if name not in self.names:
            raise KeyError(f"{name!r} is not in the table, which has {list(self.names)[:3]} ({len(self)} in all).")
        place = self.names.index(name)
        return {key: values[place] for key, values in self.columns.items()}

    def sorted_by(self, column: str, *, descending: bool = True) -> Localization:
        """The same places in another order."""
        return self.of({name: self.row(name) for name in self.names}, by=column, descending=descending)

    def only(self, names: Sequence[str]) -> Localization:
        """These places alone, in the order of the table."""
        kept = [place for place, name in enumerate(self.names) if name in set(names)]
        columns = {key: tuple(values[place] for place in kept) for key, values in self.columns.items()}
        return Localization(tuple(self.names[place] for place in kept), columns)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: Any) -> Any:
        return list(self.names[index]) if isinstance(index, slice) else self.names[index]

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        rows = [["place", *self.columns]]
        for place, name in enumerate(self.names[:_SHOWN]):
            rows.append([name, *(f"{values[place]:.4g}" for values in self.columns.values())])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        left_out = len(self) - _SHOWN
        return "\n".join([*(line.rstrip() for line in lines), *([f"… and {left_out} more"] if left_out > 0 else [])])

    def __repr__(self) -> str:
        first = f", first {self.names[0]!r}" if self.names else ""
        return f"Localization({len(self)} places by {next(iter(self.columns), 'nothing')}{first})"
