"""What attacks on a model found: a result each, what it says of the reference, and what was not run and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .comparison import markdown_cell
from .knowledge import Task


@dataclass(frozen=True)
class NotRun:
    """An attack that was not tried, or failed.

    Attributes:
        attack: Its name.
        reason: Why, and what it would need.

    Examples:
        >>> NotRun("membership: LiRA", "no shadow models were given")
        NotRun(attack='membership: LiRA', reason='no shadow models were given')
    """

    attack: str
    reason: str


@dataclass(frozen=True)
class Compared:
    """What an attack says of a model, beside what it says of the reference.

    Attributes:
        attack: Its name.
        found: Of the model.
        reference: Of the reference.

    Examples:
        >>> Compared("membership", 97.0, 96.5).row
        ('membership', '97.0', '96.5')
    """

    attack: str
    found: Any
    reference: Any = None

    @property
    def row(self) -> tuple[str, str, str]:
        """The attack, what it found, and what it found of the reference."""
        return self.attack, str(self.found), "" if self.reference is None else str(self.reference)


@dataclass(frozen=True, eq=False)
class AttackReport:
    """What a model stood, and what nobody asked it.

    Attributes:
        task: What the model is for.
        results: One result an attack, each with a `row`.
        not_run: The attacks that were left out or failed, and those that the reference could not stand.
        seconds: How long it took.
        has_reference: Whether there was a retrained model to compare with.
        planned: Of a dry run, the names of the attacks that would be run.

    Examples:
        >>> report = AttackReport("classification", (), (NotRun("stripping", "the time limit"),), 1.0, False)
        >>> report
        AttackReport(classification: 0 attacks, 1 not run, without a reference, 1.0 s)
    """

    task: Task
    results: tuple[Any, ...] = field(repr=False)
    not_run: tuple[NotRun, ...]
    seconds: float
    has_reference: bool
    planned: tuple[str, ...] = field(default=(), repr=False)

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """Of each attack its name, what it found, and what it found of the reference."""
        return [result.row for result in self.results]

    def to_markdown(self) -> str:
        """A table of the attacks, and a list of those that were not run; of a dry run, of those that would be."""
        lines = []
        if not self.planned:
            lines = ["| attack | this model | the reference |", "| --- | --- | --- |"]
            lines += [f"| {' | '.join(markdown_cell(str(part)) or '–' for part in row)} |" for row in self.rows]
        if not self.has_reference and not self.planned:
            lines += ["", "No retrained model was given, `reference`: an attack may find what any model would give."]
        if self.planned:
            lines += ["Would be run:", "", *(f"- {name}" for name in self.planned)]
        if self.not_run:
            lines += ["", "Not run:", "", *(f"- {each.attack}: {each.reason}" for each in self.not_run)]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_markdown()

    def __repr__(self) -> str:
        beside = "with" if self.has_reference else "without"
        return (
            f"AttackReport({self.task}: {len(self.results)} attacks, {len(self.not_run)} not run, {beside} a "
            f"reference, {self.seconds:.1f} s)"
        )
