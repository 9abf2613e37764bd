"""`semu audit`: the report of one request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .bases import RECORD, check_place
from .judge import attacked, judged
from .options import (
    AtATime,
    Classifier,
    Columns,
    Data,
    ForgetClass,
    InferenceSteps,
    Kept,
    Model,
    Neutral,
    OutputDir,
    Progress,
    Reference,
    RequiredAdapter,
    Samples,
    Seed,
    Template,
    Test,
    TimeLimit,
)
from .verbs import RUN, Told


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
    attacks: Annotated[
        bool, typer.Option("--attacks/--no-attacks", help="Run the attacks too.", rich_help_panel=RUN)
    ] = True,
    classifier: Classifier = None,
    samples: Samples = 16,
    num_inference_steps: InferenceSteps = 25,
    batch_size: AtATime = None,
    columns: Columns = None,
    template: Template = None,
    time_limit: TimeLimit = None,
    seed: Seed = 0,
    progress: Progress = True,
) -> Told:
    """Write a report to sign and to doubt: what was asked, done, measured, attacked, and what was not tested."""
    check_place(output_dir)
    flags = dict(locals())
    subject = judged(flags)
    from semu_peft.report import audit as report_on

    settings, training = _recorded(adapter)
    metrics, pictures = subject.measured()
    found = attacked(subject, flags) if attacks else None
    report = report_on(
        request, model=subject.unlearned(), data=subject.files, adapter_file=adapter, settings=settings,
        training=training, metrics=metrics, attacks=found, samples=pictures, forgotten=forget if pictures else None,
    )  # fmt: skip
    files, missing = report.write_all(output_dir), report.contents["not_tested"]
    words = [
        f"The report is in {output_dir}: {', '.join(file.name for file in files)}.",
        f"{len(missing)} kinds of evidence are missing in it; it names them and the reasons.",
    ]
    return Told({"output_dir": str(output_dir), "files": list(map(str, files)), "not_tested": missing}, words)


def _recorded(adapter: Path) -> tuple[Any, Any]:
    """Settings and training, where `semu unlearn` wrote them beside the adapter."""
    from semu_peft import UnlearnResult

    path = adapter / RECORD
    if not path.is_file():
        return None, None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record["settings"], UnlearnResult(**record["training"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Remove it, or copy it again.") from None
