"""Metrics and attacks as plain values, whatever their class: names, numbers and intervals, and what was not tried."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
from torch import Tensor

from semu_peft.arguments import check_kind
from semu_peft.evaluation import ForgettingComparison

# Student's t, two-sided 95%, by degrees of freedom from 1 on; beyond, the normal distribution's.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_THIS = "this model"
_REFERENCES = ("reference", "gold", "retrained", "retrained (gold)")  # what rows of a retrained model are called
ORIGINALS = ("original", "before", "do nothing", "base", "base model", "original model")  # and those of the original


@dataclass(frozen=True)
class Test:
    """A kind of evidence that a report should have.

    Attributes:
        title: What would have been shown.
        words: What in the name of a result or a metric says that it is there.
        tasks: What it is for; empty for all.
    """

    __test__ = False  # pytest takes classes of that name for tests

    title: str
    words: tuple[str, ...]
    tasks: tuple[str, ...] = ()


TESTS = (
    Test("whether it was forgotten at all", ("unlearning", "forget", "probability", "rouge")),
    Test("what the model keeps", ("retain", "utility", "test accuracy", "damage", "neutral kl")),
    Test("a model retrained without the data, beside which alone a number has a meaning", ("reference", "gold")),
    Test("several seeds", ("several seeds",)),
    Test("membership inference", ("membership", "min_k", "lira", "rmia"), ("classification", "language")),
    Test("relearning from a few examples", ("relearning",)),
    Test("rounding the weights to few bits", ("quantisation", "rounded")),
    Test("probes of inner layers", ("probe", "lens"), ("classification", "language")),
    Test("other prompts: paraphrases, prefixes, many samples", ("prompts", "leak@"), ("language",)),
    Test("adversarial prompts", ("adversarial prompt", "searched"), ("diffusion",)),
    Test("other seeds, each prompt with many", ("other seeds",), ("diffusion",)),
    Test("changed inputs: noise, flips", ("inputs",), ("classification",)),
    Test("the adapter switched off (stripping)", ("stripping",)),
)
_TASKS = {
    "ForgettingMetrics": "classification",
    "MembershipInference": "classification",
    "LanguageMetrics": "language",
    "PromptAttacks": "language",
    "TextRelearning": "language",
    "ErasureMetrics": "diffusion",
    "UnlearnCanvasMetrics": "diffusion",
    "SeedAttack": "diffusion",
    "PromptSearch": "diffusion",
}


# Attacks that fit one kind of model alone, by how their names begin.
_FITS = {
    "inputs": ("classification",),
    "linear probes": ("classification", "language"),
    "logit lens": ("language",),
    "lens": ("language",),
    "adversarial prompts": ("diffusion",),
    "membership: confidence": ("classification",),
}


def plain(value: Any) -> Any:
    """A value as JSON has it: dataclasses as dictionaries, what is not finite as text, tensors by their shape alone.

    Examples:
        >>> from semu_peft.evaluation import ErasureMetrics
        >>> from semu_peft.report.measured import plain
        >>> plain({"metrics": ErasureMetrics(1.5, float("inf"))})["metrics"]["retain_accuracy"]
        'inf'
    """
    value = _scalar(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}"
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value) if not _hidden(field.name)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(each) for each in value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return getattr(value, "__qualname__", type(value).__qualname__)


def read_metrics(metrics: Any) -> dict[str, Any]:
    """Metrics by the name of the model that they are of, with intervals where several runs or the result give one.

    Args:
        metrics: One result, several (of as many seeds), a mapping of either by name, or a
            [`ForgettingComparison`][semu_peft.evaluation.comparison.ForgettingComparison]. A result is a dataclass or
            a mapping of numbers. A number's interval stands beside it, as `(value, low, high)` or under its name with
            `_interval`: `membership_interval`; where a field of a dataclass is a mapping, a mapping.

    Returns:
        `rows`, each with `name`, `kind`, `runs` and `values` (`value`, `interval` and its `source`), and `reference`,
        the row of the retrained model: that of a comparison, unless it is called like the original, or one that is
        called so.

    Raises:
        TypeError: A result is neither.
        ValueError: A model has no result, or the bounds of an interval are out of order.

    Examples:
        >>> from semu_peft.report.measured import read_metrics
        >>> read_metrics([{"forget accuracy": 1.0}, {"forget accuracy": 3.0}])["rows"][0]["values"]
        {'forget accuracy': {'value': 2.0, 'interval': [-10.70..., 14.70...], 'source': '2 seeds'}}
    """
    if metrics is None:
        return {"rows": [], "reference": None}
    if isinstance(metrics, ForgettingComparison):
        read = read_metrics(metrics.rows)
        if metrics.reference.lower() in ORIGINALS:  # which does not show what a model is like that never knew
            return read
        gaps = {name: row.average_gap(metrics.rows[metrics.reference]) for name, row in metrics.rows.items()}
        for row in read["rows"]:
            row["values"]["average gap to the reference"] = _number(gaps[row["name"]])
        return {**read, "reference": metrics.reference}
    by_name = metrics if isinstance(metrics, Mapping) and not _is_numbers(metrics) else {_THIS: metrics}
    reference = next((str(name) for name in by_name if str(name).lower() in _REFERENCES), None)
    return {"rows": [_row(str(name), result) for name, result in by_name.items()], "reference": reference}


def read_attacks(attacks: Any) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Attacks as rows, and those that were not run, each with its reason.

    Args:
        attacks: Results with a `row` (the attack, what it found, what it found of a reference), other dataclasses, or a
            report that has them as `results` and `not_run`; one, several, or a mapping of either by name.

    Raises:
        TypeError: One is none of these.

    Examples:
        >>> from semu_peft.evaluation import PromptAttacks
        >>> from semu_peft.report.measured import read_attacks
        >>> read_attacks(PromptAttacks({"plain": 0.31}))[0][0]["found"]
        'plain 0.310'
    """
    rows = []
    for name, result in flat_attacks(attacks):
        attack, found, reference = _told(result)
        kind = type(result).__qualname__
        rows.append(
            {
                "attack": name or str(attack), "found": str(found), "reference": str(reference) or None, "kind": kind,
                "result": plain(result),
            }
        )  # fmt: skip
    not_run = dict.fromkeys(
        (each.attack, each.reason) for report in _given(attacks) for each in getattr(report, "not_run", ())
    )
    return rows, [{"attack": name, "reason": reason} for name, reason in not_run]


def _told(result: Any) -> Sequence[Any]:
    row = getattr(result, "row", None)
    if isinstance(row, (tuple, list)) and len(row) == 3:
        return row
    if not is_dataclass(result) or isinstance(result, type):
        mend = "Give what `attack` or another function of `semu_peft.evaluation` returned, or dataclasses with a `row`."
        check_kind("attacks", result, (), "results of attacks", mend)
    return type(result).__name__, str(result), ""


def flat_attacks(attacks: Any) -> list[tuple[str, Any]]:
    """All results with the names that they were given, out of reports, lists and mappings."""
    if attacks is None:
        return []
    if hasattr(attacks, "results"):
        return flat_attacks(list(attacks.results))
    if isinstance(attacks, Mapping):
        return [
            (f"{name}: {own or _told(result)[0]}" if _is_several(given) else str(name), result)
            for name, given in attacks.items()
            for own, result in (flat_attacks(given) if _is_several(given) else [("", given)])
        ]
    if isinstance(attacks, (list, tuple)):
        return [pair for each in attacks for pair in flat_attacks(each)]
    return [("", attacks)]


def _given(attacks: Any) -> Iterable[Any]:
    """What was given as attacks, one by one, reports as they are."""
    given = attacks.values() if isinstance(attacks, Mapping) else attacks
    return given if isinstance(given, Iterable) else [given]


def _is_several(attacks: Any) -> bool:
    return isinstance(attacks, (list, tuple)) or hasattr(attacks, "results")


def read_task(metrics: Mapping[str, Any], attacks: Sequence[Mapping[str, Any]], given: Any = None) -> str | None:
    """What the model is for, as a report of attacks or the kinds of the results tell; `None` where they do not."""
    if (told := next((report.task for report in _given(given) if hasattr(report, "task")), None)) is not None:
        return str(told)
    kinds = [each["kind"] for each in (*metrics["rows"], *attacks)]
    return next((_TASKS[kind] for kind in kinds if kind in _TASKS), None)


def untested(
    metrics: Mapping[str, Any],
    attacks: Sequence[Mapping[str, Any]],
    task: str | None,
    further: Iterable[str] = (),
    not_run: Iterable[str] = (),
) -> list[str]:
    """The kinds of evidence that no result is of, but those that `not_run` names: these have reasons of their own."""
    beside = any(_has_reference(each["result"]) for each in attacks)
    there = {"reference"} if metrics["reference"] or beside else set()
    there |= {"several seeds"} if any(row["runs"] > 1 for row in metrics["rows"]) else set()
    names = " ".join(str(row["name"]).lower() for row in metrics["rows"])  # of models, which may be called anything
    there |= {"reference"} if any(word in names for word in ("reference", "gold", "retrained")) else set()
    there |= {name.lower() for row in metrics["rows"] for name in row["values"]}
    there |= {each["attack"].lower() for each in attacks} | set(further) | {name.lower() for name in not_run}
    return [
        test.title
        for test in TESTS
        if (not test.tasks or task is None or task in test.tasks)
        and not any(word in name for word in test.words for name in there)
    ]


def fits(attack: str, task: str | None) -> bool:
    """Whether an attack fits the kind of model at all, so that it is missing where it was not run.

    Examples:
        >>> from semu_peft.report.measured import fits
        >>> fits("logit lens", "language"), fits("logit lens", "diffusion"), fits("stripping", "diffusion")
        (True, False, True)
    """
    return task is None or not any(attack.startswith(name) and task not in tasks for name, tasks in _FITS.items())


def _row(name: str, result: Any) -> dict[str, Any]:
    runs = list(result) if isinstance(result, (list, tuple)) else [result]
    if not runs:
        raise ValueError(f"`metrics` must hold at least one result for {name!r}, got none. Leave it out.")
    read = [_values(each) for each in runs]
    kind = "mapping" if isinstance(runs[0], Mapping) else type(runs[0]).__qualname__
    return {"name": name, "kind": kind, "runs": len(runs), "values": read[0] if len(runs) == 1 else _over_runs(read)}


def _values(result: Any) -> dict[str, dict[str, Any]]:
    if isinstance(result, Mapping):
        parts: Mapping[str, Any] = result
    elif is_dataclass(result) and not isinstance(result, type):
        parts = {field.name: getattr(result, field.name) for field in fields(result)}
    else:
        raise TypeError(
            f"`metrics` must be results of an evaluation, or mappings of numbers, got {type(result).__name__}. Give "
            "what `evaluate_forgetting` or another evaluation returned."
        )
    values: dict[str, dict[str, Any]] = {}
    for name, value in parts.items():
        words = str(name).replace("_", " ")
        if _is_number(value) or (parts is result and _is_measured(value)):  # a field may be a curve of three points
            values[words] = _number(value)
        elif isinstance(value, Mapping) and not _is_interval(name):
            values |= {_part(words, key): _number(each) for key, each in value.items()}
    for name, value in parts.items():
        if _is_interval(name) and value is not None:
            stem = str(name).removesuffix("interval").replace("_", " ").strip()
            begun = (each for each in values if each.startswith(stem) and not each.startswith(_part(stem, "")))
            of = stem if stem in values else next(begun, stem)
            several = isinstance(value, Mapping)
            bounds = {_part(stem, key): each for key, each in value.items()} if several else {of: value}
            for each in values.keys() & bounds.keys():
                low, high = map(float, bounds[each])
                _check_order(low, high, bounds[each])
                values[each] |= {"interval": plain([low, high]), "source": "examples"}
    return values


def _part(words: str, key: Any) -> str:
    """What one of several numbers under a name is called."""
    return f"{words}: {str(key).replace('_', ' ')}"


def _over_runs(runs: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Means over seeds, with Student's interval of the mean."""
    found = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        numbers = [float(run[name]["value"]) for run in runs if name in run]
        mean, count = sum(numbers) / len(numbers), len(numbers)
        found[name] = _number(mean)
        if count > 1 and all(map(math.isfinite, numbers)):
            deviation = math.sqrt(sum((number - mean) ** 2 for number in numbers) / (count - 1))
            quantile = _STUDENT[count - 2] if count - 2 < len(_STUDENT) else 1.96
            half = quantile * deviation / math.sqrt(count)
            found[name] |= {"interval": [mean - half, mean + half], "source": f"{count} seeds"}
    return found


def _number(value: Any) -> dict[str, Any]:
    if not _with_interval(value):
        return {"value": plain(value), "interval": None, "source": None}
    number, *bounds = value
    _check_order(bounds[0], bounds[1], value)
    return {"value": plain(number), "interval": plain(bounds), "source": "given"}


def _check_order(low: float, high: float, given: Any) -> None:
    if low > high:
        raise ValueError(
            "`metrics` must give a value with its interval as `(value, low, high)`, or that as `(low, high)`, got "
            f"{given}. Give the bounds in order."
        )


def _is_number(value: Any) -> bool:
    value = _scalar(value)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _scalar(value: Any) -> Any:
    """A number of NumPy or torch as Python's own; anything else as it is."""
    is_scalar = isinstance(value, np.generic) or (isinstance(value, Tensor) and not value.dim())
    return value.item() if is_scalar else value


def _with_interval(value: Any) -> bool:
    """Whether it is `(value, low, high)`."""
    return isinstance(value, (tuple, list)) and len(value) == 3 and all(map(_is_number, value))


def _is_measured(value: Any) -> bool:
    return _is_number(value) or _with_interval(value)


def _is_interval(name: Any) -> bool:
    return str(name).endswith("interval")


def _is_numbers(metrics: Mapping[str, Any]) -> bool:
    """Whether a mapping is one model's numbers, as far as they are known, and not models by name."""
    known = [value for name, value in metrics.items() if value is not None and not _is_interval(name)]
    return bool(known) and all(map(_is_measured, known))


def _has_reference(result: Any) -> bool:
    """Whether the attack was tried on a model that never knew as well; what an attack knows by construction is none."""
    return isinstance(result, Mapping) and bool(result.get("reference") or result.get("gold"))


def _hidden(name: str) -> bool:
    return name.startswith("_")
