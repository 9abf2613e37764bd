"""`semu audit`: the report of one request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .bases import RECORD, classifier, language_model
from .judge import check_judged, measure_images, measure_text, run_attacks
from .options import (
    BatchSize,
    Data,
    ForgetClass,
    Model,
    Neutral,
    OutputDir,
    Progress,
    Reference,
    RequiredAdapter,
    Retain,
    Seed,
    Template,
    Test,
    TimeLimit,
)
from .verbs import Told


def audit(
    model: Model,
    adapter: RequiredAdapter,
    forget: Data,
    output_dir: OutputDir,
    request: Annotated[str | None, typer.Option("--request", help="What was asked, in words.")] = None,
    forget_class: ForgetClass = None,
    retain: Retain = None,
    test: Test = None,
    neutral: Neutral = None,
    reference: Reference = None,
    attacks: Annotated[bool, typer.Option("--attacks/--no-attacks", help="Run the attacks too.")] = True,
    batch_size: BatchSize = 32,
    template: Template = None,
    time_limit: TimeLimit = None,
    seed: Seed = 0,
    progress: Progress = True,
) -> Told:
    """Write a report to sign and to doubt: what was asked, done, measured, attacked, and what was not tested."""
    if output_dir.exists() and not output_dir.is_dir():
        raise typer.BadParameter(f"`--output-dir` must be a folder, got {output_dir}, a file. Choose another path.")
    job = check_judged(model)
    from semu_peft.report import audit as report_on

    if job == "images":
        metrics: Any = measure_images(
            model, adapter, forget, forget_class, retain, test, reference, batch_size, seed
        )  # fmt: skip
        unlearned = classifier(model, adapter)
    else:
        metrics = measure_text(
            model, adapter, forget, retain, neutral, reference, batch_size, template, None, progress=progress
        )
        unlearned = language_model(model, adapter)[0]
    found = None
    if attacks:
        found = run_attacks(
            model, adapter, forget, forget_class, retain, test, reference, batch_size, template, time_limit, seed,
            progress,
        )  # fmt: skip
    settings, training = _recorded(adapter)
    only = Path(forget, forget_class or "")
    paths = {"forget": only if only.is_dir() else forget, "retain": retain, "test": test, "neutral": neutral}
    report = report_on(
        request, model=unlearned, data={name: str(path) for name, path in paths.items() if path is not None},
        adapter_file=adapter, settings=settings, training=training, metrics=metrics, attacks=found,
    )  # fmt: skip
    files = report.write_all(output_dir)
    words = [f"The report is in {output_dir}: {', '.join(file.name for file in files)}."]
    missing = report.contents["not_tested"]
    words.append(f"{len(missing)} kinds of evidence are missing in it; it names them and the reasons.")
    names = [str(file) for file in files]
    return Told({"output_dir": str(output_dir), "files": names, "not_tested": missing}, words)


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
