"""`semu evaluate` and `semu attack`: is it forgotten, what was kept, and what brings it back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Protocol

import typer

from .answers import Answers
from .bases import check_adapter, job_of
from .estimate import Plan
from .options import (
    Adapter,
    AtATime,
    Classifier,
    Columns,
    Data,
    ForgetClass,
    ForgetExamples,
    InferenceSteps,
    Kept,
    Model,
    Neutral,
    PlanOnly,
    Progress,
    Reference,
    Related,
    Samples,
    Seed,
    Shadow,
    Template,
    Test,
    TimeLimit,
)
from .pictures import Drawing
from .recognised import Recognised
from .tables import Numbers
from .verbs import Told, flags_by_name, in_flags_or_python, plain


class Judged(Protocol):
    """What can be measured and attacked, whatever kind of model it is."""

    @property
    def files(self) -> dict[str, Any]:
        """What is measured on, by flag, for its digests: a path, or rows."""

    @property
    def counts(self) -> Mapping[str, int]:
        """How many examples there are, by what they are for."""

    def check(self) -> None:
        """Raise for a mistake that can be seen while nothing is loaded."""

    def digests(self) -> Mapping[str, str | None]:
        """Of the weights of the models that it is compared with or judged by, by flag."""

    def measured(self, shows: bool) -> tuple[Mapping[str, Any], Any]:
        """The numbers of each model by its name, and what is to be shown before and after: pictures or answers."""

    def plan(self, measures: bool, attacks: bool, shows: bool) -> Plan:
        """What would be loaded, and measured and tried as far as it is to be."""

    def attacked(self, time_limit: float | None, *, dry_run: bool = False) -> Any:
        """All attacks that fit it, as an `AttackReport`; of a dry run those that would be tried."""

    def unlearned(self) -> Any:
        """The model that the adapter is in."""


_MERGE = "`model = model.merge_and_unload()`"  # what the library tells who works in Python
_KINDS: dict[str, Any] = {"concept": Drawing, "images": Recognised, "text": Answers}


def _check_use(name: str, job: str, model: str) -> None:
    """Raise for a flag that is of another kind of model alone."""
    jobs = [other for other, kind in _KINDS.items() if any(each.name == name for each in dataclasses.fields(kind))]
    if jobs:
        mend = f"it is for {' and '.join(jobs)}, and {model} is a model of {job}. Leave it out."
        raise typer.BadParameter(mend, param_hint=f"`--{name.replace('_', '-')}`")


def _check_other(flag: str, place: str, job: str) -> None:
    """Raise for a model beside the one that is judged that is absent or of another kind: before all work, not after."""
    try:
        found = job_of(place)
    except typer.BadParameter as error:
        raise typer.BadParameter(error.message.replace("--model", f"--{flag}")) from None
    if found != job:
        raise typer.BadParameter(
            f"`--{flag}` must be a model of {job} as --model is, got {place!r}, a model of {found}. Give another."
        )


def judged(flags: Mapping[str, Any]) -> Judged:
    """What a verb is to judge, of the kind that the model is.

    Args:
        flags: What the verb was given, by the names of its parameters.

    Raises:
        typer.BadParameter: There is no such model or adapter, several files where one is read, a model to compare with
            that is of another kind, or a flag that a model of this kind has no use for.
    """
    check_adapter(flags["adapter"])
    job = job_of(flags["model"])
    kind: Any = _KINDS[job]
    given = {name: value for name, value in flags.items() if value is not None}
    fields = {each.name for each in dataclasses.fields(kind)}
    for name in given:
        if name not in fields:
            _check_use(name, job, flags["model"])
    for flag in ("reference", "shadow"):
        places = given.get(flag, [])
        for place in [places] if isinstance(places, str) else places:
            _check_other(flag, place, job)
    if job != "concept":
        given |= {name: _one(given[name], name) for name in ("forget", "retain", "related") if name in given}
    subject = kind(**{"adapter": None, **{name: value for name, value in given.items() if name in fields}})
    subject.check()
    return subject


def in_verbs(found: str) -> str:
    """What an attack found, with what to do about it as a verb.

    Examples:
        >>> from semu_cli.judge import in_verbs
        >>> in_verbs("merge it, `model = model.merge_and_unload()`, and give away that")
        'merge it, `semu merge`, and give away that'
    """
    return found.replace(_MERGE, "`semu merge`")


def attacked(subject: Judged, flags: Mapping[str, Any]) -> Any:
    """All attacks that fit, as an `AttackReport`; why others were not run is said in flags, as far as there are such.

    Args:
        subject: What is attacked.
        flags: What the verb was given, by the names of its parameters.
    """
    report = subject.attacked(flags["time_limit"])
    return dataclasses.replace(report, not_run=_in_flags(report.not_run, flags))


def _in_flags(not_run: Iterable[Any], flags: Mapping[str, Any]) -> tuple[Any, ...]:
    from semu_peft.evaluation import attack as attack_from_python

    names, place = flags_by_name(flags), "semu_peft.evaluation.attack"

    def said(reason: str) -> str:
        return in_flags_or_python(reason, names, attack_from_python, place)

    return tuple(dataclasses.replace(each, reason=said(each.reason)) for each in not_run)


def planned(subject: Judged, flags: Mapping[str, Any], *, measures: bool, attacks: bool, shows: bool = False) -> Told:
    """What a verb would load, measure and try, and what not and why: model and data are loaded, and nothing is done.

    Args:
        subject: What would be judged.
        flags: What the verb was given, by the names of its parameters.
        measures: Whether it would be measured.
        attacks: Whether it would be attacked.
        shows: Whether what it draws or says would be shown.
    """
    plan = subject.plan(measures, attacks, shows)
    return dataclasses.replace(plan, not_run=_in_flags(plan.not_run, flags)).told()


def evaluate(
    model: Model,
    forget: Data,
    adapter: Adapter = None,
    forget_class: ForgetClass = None,
    retain: Kept = None,
    test: Test = None,
    neutral: Neutral = None,
    reference: Reference = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metrics", metavar="METRIC", help="Of language models: only this metric; again for more."),
    ] = None,
    classifier: Classifier = None,
    samples: Samples = None,
    num_inference_steps: InferenceSteps = None,
    batch_size: AtATime = None,
    columns: Columns = None,
    template: Template = None,
    seed: Seed = 0,
    dry_run: PlanOnly = False,
    progress: Progress = True,
) -> Told:
    """Measure what a model still knows, beside the original and a retrained model."""
    flags = dict(locals())
    subject = judged(flags)
    if dry_run:
        return planned(subject, flags, measures=True, attacks=False)
    rows, _ = subject.measured(shows=False)
    data = {name: _by_key(row) for name, row in rows.items()}
    return Told({"job": job_of(model), "models": data}, [_table({name: _cells(row) for name, row in rows.items()})])


def attack(
    model: Model,
    forget: Data,
    adapter: Adapter = None,
    forget_class: ForgetClass = None,
    retain: Kept = None,
    test: Test = None,
    reference: Reference = None,
    related: Related = None,
    shadow: Shadow = None,
    forget_examples: ForgetExamples = None,
    classifier: Classifier = None,
    samples: Samples = None,
    num_inference_steps: InferenceSteps = None,
    batch_size: AtATime = None,
    columns: Columns = None,
    template: Template = None,
    time_limit: TimeLimit = None,
    seed: Seed = 0,
    dry_run: PlanOnly = False,
    progress: Progress = True,
) -> Told:
    """Try to bring back what was forgotten: relearning, rounding, probes, membership, other questions and seeds."""
    flags = dict(locals())
    subject = judged(flags)
    if dry_run:
        return planned(subject, flags, measures=False, attacks=True)
    report = attacked(subject, flags)
    told = [(name, in_verbs(found), beside) for name, found, beside in report.rows]
    rows = [
        {**dict(zip(("attack", "model", "reference"), row, strict=True)), "result": plain(result)}
        for row, result in zip(told, report.results, strict=True)
    ]
    missing = [dataclasses.asdict(each) for each in report.not_run]
    data = {"has_reference": report.has_reference, "attacks": rows, "not_run": missing, "seconds": report.seconds}
    return Told(data, _said(report, told))


def _said(report: Any, rows: list[tuple[str, str, str]]) -> list[Any]:
    """What attacks found as a table for people, how it is counted, and what was not run."""
    from rich.table import Table

    table = Table("attack", "this model", *(["the reference"] if report.has_reference else []), show_lines=True)
    for row in rows:
        table.add_row(*row[: len(table.columns)])
    words: list[Any] = [table] if rows else []
    if report.task == "diffusion":
        words.append("Percentages are the original's training loss as a share of the model's: at 100 it knows as much.")
    if not report.has_reference:
        words.append("No retrained model was given, `--reference`: an attack may find what any model would give.")
    if report.not_run:
        words += ["Not run:", *(f"- {each.attack}: {each.reason}" for each in report.not_run)]
    return words


def _one(values: list[str], flag: str) -> str:
    """The one folder or file that a classifier or a language model is judged by."""
    if len(values) > 1:
        raise typer.BadParameter(f"`--{flag}` may be given again for prompts of a pipeline only, got {len(values)}.")
    return values[0]


def _by_key(row: Any) -> Any:
    """Numbers for machines: keys without blanks."""
    return {key.replace(" ", "_"): value for key, value in row.items()} if isinstance(row, Mapping) else row


def _cells(row: Any) -> dict[str, str]:
    """Numbers for people."""
    if not isinstance(row, Mapping):
        return row.row()
    numbers = {key: value for key, value in row.items() if isinstance(value, float)}
    return {key: f"{value:.4f}" if key.endswith("loss") else f"{value:.1f}%" for key, value in numbers.items()}


def _table(rows: dict[str, dict[str, str]]) -> Numbers:
    """One row a number, one column a model: a language model has more numbers than a terminal has room for."""
    heads = list(dict.fromkeys(head for row in rows.values() for head in row))
    return Numbers("", tuple(rows), [(head, *(row.get(head, "–") for row in rows.values())) for head in heads])
