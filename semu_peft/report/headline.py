"""What a reader of a report should know after its first lines: is it forgotten, what did it cost, what is not tested.

Nothing is measured here: a number that no result has is said to be missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .document import Table, Text
from .measured import ORIGINALS, TESTS
from .tradeoff import is_in_nats, is_of_retain_data
from .wording import measured, model_name, shown

_FURTHER = "utility: "  # before the metrics of a language model's sets that were to be kept
_MOST_MODELS, _MOST_TESTS = 4, 3
_KINDS = {test.title for test in TESTS}
_OF_REFERENCE = ", of the reference"  # after the name of an attack that the reference alone could not stand
_NEAR = 0.1  # of the way from the original to a model that never knew


@dataclass(frozen=True)
class _Metric:
    """A metric by which a report is summed up, the first that the model was measured by.

    Attributes:
        name: As in the report's contents.
        top: What is known is the number itself (None), what it lacks of this number, or, at infinity, one over it.
    """

    name: str
    top: float | None = None

    def known(self, value: float) -> float:
        """How much is known, from 0 on."""
        if self.top is None:
            return value
        return self.top - value if self.top < float("inf") else 1 / value if value > 0 else float("inf")


_FORGOTTEN = (
    _Metric("forget accuracy"),
    _Metric("unlearning accuracy", top=100.0),
    _Metric("probability"),
    _Metric("rouge"),
    _Metric("forget loss", top=float("inf")),
)
_NAMES = {"probability": "probability of the forgotten answers", "rouge": "ROUGE-L of the forgotten answers"}
_KEPT = (
    "retain accuracy", "model utility", "utility: retain probability", "in domain retain accuracy", "retain loss",
    "test accuracy", "neutral kl",
)  # fmt: skip


def headline(contents: Mapping[str, Any]) -> list[Text | Table]:
    """One sentence, and a small table of the models by the metrics that it names.

    Args:
        contents: What [`audit`][semu_peft.report.audit.audit] gathered.

    Examples:
        >>> from semu_peft.report import audit
        >>> from semu_peft.report.headline import headline
        >>> rows = {"original": {"forget accuracy": 99.0}, "unlearned": {"forget accuracy": 0.5}}
        >>> headline(audit("Forget the threes.", metrics=rows).contents)[0].text
        'Forgotten: the forget accuracy went from 99 to 0.5; what it cost of what was to be kept was not measured; not
        tested: what the model keeps, a model retrained without the data, several seeds and 9 more.'
    """
    models = _Models.of(contents["metrics"])
    metric = next((each for each in _FORGOTTEN if models.value(models.now, each.name) is not None), None)
    kept = next((name for name in _kept_names(models.now) if models.value(models.now, name) is not None), None)
    told = [_forgetting(models, metric), _cost(models, kept, contents["training"]), _missing(contents["not_tested"])]
    parts: list[Text | Table] = [Text(f"{'; '.join(told)}.", lead=True)]
    rows = [] if metric is None else [(_label(metric), *models.cells(metric.name))]
    rows += [] if kept is None else [(f"kept: {_called(kept)}", *models.cells(kept))]
    if rows:
        parts.append(Table("In short", ("what", *models.heads), tuple(rows)))
    return parts


@dataclass(frozen=True)
class _Models:
    """The rows that were measured, by what they are: before, now, and a model that never knew."""

    rows: Sequence[Mapping[str, Any]]
    reference: str | None
    before: Mapping[str, Any] | None
    now: Mapping[str, Any] | None
    gold: Mapping[str, Any] | None
    several: int

    @classmethod
    def of(cls, metrics: Mapping[str, Any]) -> _Models:
        before = next((row for row in metrics["rows"] if row["name"].lower() in ORIGINALS), None)
        gold = next((row for row in metrics["rows"] if row["name"] == metrics["reference"]), None)
        others = [row for row in metrics["rows"] if row is not before and row is not gold]
        now = others[0] if others else None
        rows = [row for row in metrics["rows"] if row in (before, *others, gold)]
        if len(rows) > _MOST_MODELS:
            rows = [row for row in rows if row in (before, now, gold)]
        return cls(rows, metrics["reference"], before, now, gold, len(others))

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(model_name(row["name"], self.reference) for row in self.rows)

    def cells(self, name: str) -> tuple[str, ...]:
        return tuple(measured(row["values"].get(name)) for row in self.rows)

    @staticmethod
    def value(row: Mapping[str, Any] | None, name: str) -> Any:
        found = None if row is None else row["values"].get(name)
        return None if found is None else found["value"]

    def change(self, name: str) -> str:
        """From what to what it went."""
        before, now = self.value(self.before, name), self.value(self.now, name)
        gold, called = self.value(self.gold, name), _called(name)
        if self.several > 1 and self.now is not None:
            called += f" of {self.now['name']!r}, the first of {self.several},"
        beside = "" if gold is None else f", where a model that never knew has {shown(gold)}"
        if before is None:
            return f"the {called} is {shown(now)}{beside}, and what it was before is not known"
        moved = (
            f"stayed at {shown(now)}" if shown(now) == shown(before) else f"went from {shown(before)} to {shown(now)}"
        )
        return f"the {called} {moved}{beside}"


def _forgetting(models: _Models, metric: _Metric | None) -> str:
    if metric is None:
        return "Whether it was forgotten was not measured"
    numbers = [models.value(row, metric.name) for row in (models.before, models.now, models.gold)]
    grade = _grade(metric, *numbers)
    told = models.change(metric.name)
    return f"{grade}: {told}" if grade else f"{told[0].upper()}{told[1:]}"


def _grade(metric: _Metric, before: Any, now: Any, gold: Any) -> str:
    """How far a model went from the original to one that never knew; empty where that is not to be told.

    Without such a model as reference, one that never knew is taken to know nothing.
    """
    if not all(isinstance(each, (int, float)) for each in (before, now)):
        return ""
    least = metric.known(gold) if isinstance(gold, (int, float)) else 0.0
    known = metric.known(before)
    if not least < known < float("inf"):
        return ""
    way = (known - metric.known(now)) / (known - least)
    return "Forgotten" if way >= 1 - _NEAR else "Hardly forgotten" if way <= _NEAR else "Forgotten in part"


def _cost(models: _Models, kept: str | None, training: Sequence[Mapping[str, Any]]) -> str:
    if kept is not None:
        return f"its cost: {models.change(kept)}"
    history = [entry for run in training for entry in run["history"]]
    damage = [entry["damage"] for entry in history if "damage" in entry]
    if len(training) == 1 and damage:
        in_nats = is_in_nats(history)
        cost = f"a damage of {shown(damage[-1])}{' nats' if in_nats else ''}"
        other = training[0].get("damage_on")
        if is_of_retain_data(history) and other is None:
            return f"its cost: {cost} on what was to be kept, as the run recorded"
        other = other or f"the other {'answers to' if in_nats else 'conditions of'} what was forgotten"
        return f"its cost: {cost} on {other}, as the run recorded; what it cost of other data was not measured"
    return "what it cost of what was to be kept was not measured"


def _missing(not_tested: Sequence[Mapping[str, str]]) -> str:
    names = [_in_short(row["test"]) for row in not_tested]
    if len(names) > _MOST_TESTS + 1:
        names = [*names[:_MOST_TESTS], f"{len(names) - _MOST_TESTS} more"]
    told = " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
    return f"not tested: {told or 'nothing of what this report knows'}"


def _in_short(name: str) -> str:
    """A kind of evidence without its examples; an attack by its whole name, as others of its kind may have been run."""
    if name in _KINDS:
        return name.partition(":")[0].partition(",")[0]
    kind, _, which = name.removesuffix(_OF_REFERENCE).partition(": ")
    told = f"{kind} ({which})" if which else kind
    return f"{told} of the reference" if name.endswith(_OF_REFERENCE) else told


def _called(name: str) -> str:
    return _NAMES.get(name, name.removeprefix(_FURTHER))


def _label(metric: _Metric) -> str:
    return f"forgotten: {_called(metric.name)}" + ("" if metric.top is None else " (high where it is forgotten)")


def _kept_names(row: Mapping[str, Any] | None) -> list[str]:
    """The metrics of what was to be kept, and those of further sets of a language model's utility."""
    further = [] if row is None else [name for name in row["values"] if name.startswith(_FURTHER)]
    return [*_KEPT, *(name for name in further if name.endswith("probability")), *further]
