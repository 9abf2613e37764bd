"""`semu audit`: the report of one request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .bases import RECORD, job_of, language_model, pipeline
from .bases import classifier as image_classifier
from .judge import READ, measure_images, measure_text, one, run_attacks
from .options import (
    AtATime,
    Classifier,
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
from .pictures import DRAWN, Drawing
from .verbs import Told


def audit(
    model: Model,
    adapter: RequiredAdapter,
    forget: Data,
    output_dir: OutputDir,
    request: Annotated[str | None, typer.Option("--request", help="What was asked, in words.")] = None,
    forget_class: ForgetClass = None,
    retain: Kept = None,
    test: Test = None,
    neutral: Neutral = None,
    reference: Reference = None,
    attacks: Annotated[bool, typer.Option("--attacks/--no-attacks", help="Run the attacks too.")] = True,
    classifier: Classifier = None,
    samples: Samples = 16,
    num_inference_steps: InferenceSteps = 25,
    batch_size: AtATime = None,
    template: Template = None,
    time_limit: TimeLimit = None,
    seed: Seed = 0,
    progress: Progress = True,
) -> Told:
    """Write a report to sign and to doubt: what was asked, done, measured, attacked, and what was not tested."""
    if output_dir.exists() and not output_dir.is_dir():
        raise typer.BadParameter(f"`--output-dir` must be a folder, got {output_dir}, a file. Choose another path.")
    job = job_of(model)
    from semu_peft.report import audit as report_on

    pictures = found = None
    paths: dict[str, Any] = {}
    if job == "concept":
        drawing = Drawing(
            model, adapter, forget, retain or [], reference, classifier, forget_class, samples, num_inference_steps,
            batch_size or DRAWN, seed, progress,
        )  # fmt: skip
        metrics: Any
        metrics, pictures = drawing.measured()
        found = drawing.attacked(time_limit) if attacks else None
        from semu_peft.concept.families import denoiser_of

        unlearned = denoiser_of(pipeline(model, adapter))
    else:
        place, kept, at_a_time = one(forget, "forget"), one(retain, "retain"), batch_size or READ
        if job == "images":
            metrics = measure_images(
                model, adapter, place, forget_class, kept, test, reference, at_a_time, seed
            )  # fmt: skip
            unlearned = image_classifier(model, adapter)
        else:
            metrics = measure_text(
                model, adapter, place, kept, neutral, reference, at_a_time, template, None, progress=progress
            )
            unlearned = language_model(model, adapter)[0]
        if attacks:
            found = run_attacks(
                model, adapter, place, forget_class, kept, test, reference, at_a_time, template, time_limit, seed,
                progress,
            )  # fmt: skip
        only = Path(place, forget_class or "")
        paths = {"forget": only if only.is_dir() else place, "retain": kept, "test": test, "neutral": neutral}
    settings, training = _recorded(adapter)
    report = report_on(
        request, model=unlearned, data={name: str(path) for name, path in paths.items() if path is not None},
        adapter_file=adapter, settings=settings, training=training, metrics=metrics, attacks=found,
        samples=pictures, forgotten=forget if pictures else None,
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
