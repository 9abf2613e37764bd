"""`semu audit`: the report of one request."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Annotated, Any

import typer

from .bases import PROFILE, RECORD, check_place
from .judge import Judged, attacked, in_verbs, judged, planned
from .options import (
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
    OutputDir,
    PlanOnly,
    Progress,
    Reference,
    Related,
    RequiredAdapter,
    Samples,
    Seed,
    Shadow,
    ShowAnswers,
    Template,
    Test,
    TimeLimit,
)
from .verbs import RUN, Told

_FILES = ("report.json", "report.md", "report.html")
_JUDGING = (
    "seed", "batch_size", "template", "columns", "metrics", "samples", "show_answers", "num_inference_steps",
    "forget_examples", "time_limit",
)  # fmt: skip
_TRAINING: dict[str, type] = {
    "steps": int, "examples_seen": int, "trainable_parameters": int, "seconds": Real, "stopped_early": bool,
    "stop_reason": str, "history": list,
}  # fmt: skip


def audit(
    model: Model,
    adapter: RequiredAdapter,
    forget: Data,
    output_dir: OutputDir,
    request: Annotated[str | None, typer.Option("--request", metavar="TEXT", help="What was asked, in words.")] = None,
    forget_class: ForgetClass = None,
    retain: Kept = None,
    test: Test = None,
    neutral: Neutral = None,
    reference: Reference = None,
    related: Related = None,
    shadow: Shadow = None,
    forget_examples: ForgetExamples = None,
    attacks: Annotated[
        bool, typer.Option("--attacks/--no-attacks", help="Run the attacks too.", rich_help_panel=RUN)
    ] = True,
    classifier: Classifier = None,
    samples: Samples = None,
    show_answers: ShowAnswers = None,
    num_inference_steps: InferenceSteps = None,
    batch_size: AtATime = None,
    columns: Columns = None,
    template: Template = None,
    time_limit: TimeLimit = None,
    seed: Seed = 0,
    dry_run: PlanOnly = False,
    progress: Progress = True,
) -> Told:
    """Write a report to sign and to doubt: what was asked, done, measured, attacked, and what was not tested."""
    flags = dict(locals())
    _check_output(output_dir)
    subject = judged(flags)
    from semu_peft.report import audit as report_on
    from semu_peft.report.figure import new_figure

    new_figure(1, 1)  # that matplotlib is missing is said now, and not when all has been measured
    (settings, training), profile = _recorded(adapter), _profile(adapter)
    if dry_run:
        return planned(subject, flags, measures=True, attacks=attacks, shows=True)
    metrics, samples_of_both = subject.measured(shows=True)
    shown = list(samples_of_both[0]) if samples_of_both else []
    found = attacked(subject, flags) if attacks else None
    report = report_on(
        request, model=subject.unlearned(), data=subject.files, adapter_file=adapter, profile=profile,
        settings={**settings, **_judging(subject, flags)}, training=training, metrics=metrics, attacks=found,
        samples=samples_of_both, forgotten=[row for row in shown if row not in (retain or ())],
    )  # fmt: skip
    data = report.contents["request"]["data"]  # digests of files, which may hold many examples, or other things as well
    for role in data.keys() & subject.counts.keys():
        data[role]["examples"] = subject.counts[role]
    for row in report.contents["attacks"]:
        row["found"] = in_verbs(row["found"])
    files, missing = report.write_all(output_dir), report.contents["not_tested"]
    words = [
        f"The report is in {output_dir}: {', '.join(file.name for file in files)}.",
        f"{len(missing)} kinds of evidence are missing in it; it names them and the reasons.",
    ]
    return Told({"output_dir": str(output_dir), "files": list(map(str, files)), "not_tested": missing}, words)


def _check_output(folder: Path) -> None:
    """Raise a usage error unless a report can go there: an older one may be written over, no other files stand by."""
    check_place(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _FILES[0]).is_file():
        raise typer.BadParameter(f"`--output-dir`: {folder} has other files in it. Choose a new folder.")


def _recorded(adapter: Path) -> tuple[dict[str, Any], Any]:
    """Settings and training, where `semu unlearn` wrote them beside the adapter; of paths the names alone."""
    from semu_peft import UnlearnResult

    path = adapter / RECORD
    if not path.is_file():
        return {}, None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        settings, training = dict(record["settings"]), dict(record["training"])
        for name, kind in _TRAINING.items():
            if not isinstance(training[name], kind):
                raise TypeError(f"`{name}` is {training[name]!r}")
        training["history"] = [_step(entry) for entry in training["history"]]
        return {name: _without_places(value) for name, value in settings.items()}, UnlearnResult(**training)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Remove it, or copy it again.") from None


def _step(entry: Any) -> dict[str, Any]:
    """One entry of a history, whose numbers that JSON cannot have are null in the record."""
    numbers = {name: math.nan if value is None else value for name, value in entry.items()}
    for name, value in numbers.items():
        if not isinstance(value, Real):
            raise TypeError(f"`{name}` of a step is {value!r}")
    return numbers


def _profile(adapter: Path) -> Any:
    """What the initialisation found, where `semu unlearn` wrote it beside the adapter."""
    from semu_peft import SubspaceProfile

    path = adapter / PROFILE
    return SubspaceProfile.load(path) if path.is_file() else None


def _judging(subject: Judged, flags: Mapping[str, Any]) -> dict[str, Any]:
    """How it was judged, beside how it was made to forget, and the digests of the models that it was set beside."""
    given = {**flags, **{each.name: getattr(subject, each.name) for each in dataclasses.fields(subject)}}  # type: ignore[arg-type]
    told = {f"judging: {name}": given[name] for name in _JUDGING if given.get(name) is not None}
    places = {name: given[name] for name in ("reference", "shadow", "classifier") if given.get(name)}
    told |= {f"judging: {name}": _without_places(place) for name, place in places.items()}
    return told | {f"judging: SHA-256 of the weights of {name}": digest for name, digest in subject.digests().items()}


def _without_places(value: Any) -> Any:
    """A setting as a report has it: of a path on this machine the last part, which tells nothing of the machine."""
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    is_path = isinstance(value, str) and value and (os.path.isabs(value) or os.path.exists(value))
    return Path(value).absolute().name if is_path else value
