"""`semu evaluate` and `semu attack`: is it forgotten, what was kept, and what brings it back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from .bases import classifier, job_of, language_model
from .image_folder import read_images, read_others
from .options import (
    Adapter,
    AtATime,
    Classifier,
    Data,
    ForgetClass,
    InferenceSteps,
    Kept,
    Model,
    Neutral,
    Progress,
    Reference,
    Samples,
    Seed,
    Template,
    Test,
    TimeLimit,
)
from .pictures import DRAWN, Drawing
from .verbs import Told

READ = 32
"""Examples of a classifier or a language model at a time, by default."""


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
        list[str] | None, typer.Option("--metrics", help="Of language models: only this metric; again for more.")
    ] = None,
    classifier: Classifier = None,
    samples: Samples = 16,
    num_inference_steps: InferenceSteps = 25,
    batch_size: AtATime = None,
    template: Template = None,
    seed: Seed = 0,
    progress: Progress = True,
) -> Told:
    """Measure what a model still knows, beside the original and a retrained model."""
    job = job_of(model)
    rows: Any
    if job == "concept":
        rows, _ = Drawing(
            model, adapter, forget, retain or [], reference, classifier, forget_class, samples, num_inference_steps,
            batch_size or DRAWN, seed, progress,
        ).measured()  # fmt: skip
    elif job == "images":
        rows = measure_images(
            model, adapter, one(forget, "forget"), forget_class, one(retain, "retain"), test, reference,
            batch_size or READ, seed,
        )  # fmt: skip
    if job != "text":
        shown = {
            name: {key: f"{value:.4f}" if key.endswith("loss") else f"{value:.1f}%" for key, value in row.items()}
            for name, row in rows.items()
        }
        rows = {name: {key.replace(" ", "_"): value for key, value in row.items()} for name, row in rows.items()}
    else:
        rows = measure_text(
            model, adapter, one(forget, "forget"), one(retain, "retain"), neutral, reference,
            batch_size or READ, template, metrics, progress=progress,
        )  # fmt: skip
        shown = {name: row.row() for name, row in rows.items()}
    return Told({"job": job, "models": rows}, [_table(shown)])


def attack(
    model: Model,
    forget: Data,
    adapter: Adapter = None,
    forget_class: ForgetClass = None,
    retain: Kept = None,
    test: Test = None,
    reference: Reference = None,
    classifier: Classifier = None,
    samples: Samples = 16,
    num_inference_steps: InferenceSteps = 25,
    batch_size: AtATime = None,
    template: Template = None,
    time_limit: TimeLimit = None,
    seed: Seed = 0,
    progress: Progress = True,
) -> Told:
    """Try to bring back what was forgotten: relearning, rounding, probes, membership, other questions and seeds."""
    if job_of(model) == "concept":
        report = Drawing(
            model, adapter, forget, retain or [], reference, classifier, forget_class, samples, num_inference_steps,
            batch_size or DRAWN, seed, progress,
        ).attacked(time_limit)  # fmt: skip
    else:
        report = run_attacks(
            model, adapter, one(forget, "forget"), forget_class, one(retain, "retain"), test, reference,
            batch_size or READ, template, time_limit, seed, progress,
        )  # fmt: skip
    rows = [dict(zip(("attack", "model", "reference"), row, strict=True)) for row in report.rows]
    missing = [dataclasses.asdict(each) for each in report.not_run]
    data = {"has_reference": report.has_reference, "attacks": rows, "not_run": missing, "seconds": report.seconds}
    return Told(data, [str(report)])


def run_attacks(
    model: str, adapter: Path | None, forget: str, forget_class: str | None, retain: str | None, test: str | None,
    reference: str | None, batch_size: int, template: str | None, time_limit: float | None, seed: int, progress: bool,
) -> Any:  # fmt: skip
    """All attacks that the data allow, as an `AttackReport`."""
    from semu_peft import evaluation

    further = {}
    if job_of(model) == "images":
        base = classifier(model, adapter)
        batches = _image_batches(base, forget, forget_class, retain, test, batch_size)
        other = None if reference is None else classifier(reference)
    else:
        base, tokenizer = language_model(model, adapter)
        template = written_out(template)
        batches, has_questions = _text_batches(tokenizer, forget, retain, test, template, batch_size)
        other = None if reference is None else language_model(reference)[0]
        asking: dict[str, Any] = {"gold": other, "template": template, "batch_size": batch_size, "seed": seed}
        if has_questions:
            further["prompts"] = lambda attacked: evaluation.prompt_attacks(
                attacked, tokenizer, forget, progress=False, **asking
            )
    return evaluation.attack(
        base, **batches, reference=other, further=further, time_limit=time_limit, seed=seed, progress=progress
    )


def measure_text(
    model: str, adapter: Path | None, forget: str, retain: str | None, neutral: str | None, reference: str | None,
    batch_size: int, template: str | None, metrics: list[str] | None, *, progress: bool,
) -> dict[str, Any]:  # fmt: skip
    """`LanguageMetrics` of each model."""
    from semu_peft.evaluation import evaluate_language

    options: dict[str, Any] = {
        "utility": None if retain is None else {"retain": _file(retain, "retain")},
        "neutral": None if neutral is None else _file(neutral, "neutral"),
        "metrics": metrics, "template": written_out(template), "batch_size": batch_size, "progress": progress,
    }  # fmt: skip
    rows = {}
    for name, place, own in _models(model, adapter, reference):
        measured, tokenizer = language_model(place, own)
        rows[name] = evaluate_language(measured, tokenizer, _file(forget, "forget"), **options)
    return rows


def written_out(template: str | None) -> str | None:
    """A template with the line breaks that a shell passes on as two signs."""
    return None if template is None else template.replace("\\n", "\n")


def _image_batches(
    base: Any, forget: str, forget_class: str | None, retain: str | None, test: str | None, batch_size: int
) -> dict[str, Any]:
    data = {
        "forget": read_images(forget, base, only=forget_class),
        "retain": _kept(retain, forget, forget_class, base),
        "test": None if test is None else read_images(test, base, "test"),
    }
    return {name: None if part is None else list(part.loader(batch_size)) for name, part in data.items()}


def _text_batches(
    tokenizer: Any, forget: str, retain: str | None, test: str | None, template: str | None, batch_size: int
) -> tuple[dict[str, Any], bool]:
    """The batches of each set, and whether what was forgotten are answers to questions."""
    from semu_peft.language import read_text, text_examples

    batches: dict[str, Any] = {"forget": None, "retain": None, "test": None}
    for name, path in (("forget", forget), ("retain", retain), ("test", test)):
        if path is not None:
            rows = text_examples(tokenizer, _file(path, name), template=template, name=name)
            batches[name] = list(rows.loader(min(batch_size, len(rows)), shuffle=False))
    return batches, not any(row.is_plain for row in read_text(forget))


def one(values: list[str] | None, flag: str) -> Any:
    """The one folder or file that a classifier or a language model is judged by; None where there is none.

    Raises:
        typer.BadParameter: There are several.
    """
    if values is not None and len(values) > 1:
        raise typer.BadParameter(f"`--{flag}` may be given again for prompts of a pipeline only, got {len(values)}.")
    return values[0] if values else None


def _models(model: str, adapter: Path | None, reference: str | None) -> list[tuple[str, str, Path | None]]:
    """The models to set beside each other: a name, a place and an adapter of each."""
    rows: list[tuple[str, str, Path | None]] = [("original" if adapter else "model", model, None)]
    if adapter is not None:
        rows.append(("unlearned", model, adapter))
    return rows if reference is None else [*rows, ("reference", reference, None)]


def _file(path: str, flag: str) -> str:
    if not Path(path).exists():
        raise typer.BadParameter(f"`--{flag}`: there is no file {path}. Give one with texts or questions.")
    return path


def _kept(retain: str | None, forget: str, forget_class: str | None, base: Any) -> Any:
    """What was kept: the folder that is named, or the other classes of the one with the class to forget."""
    if retain is not None:
        return read_others(retain, base, forget_class)
    return None if forget_class is None else read_others(forget, base, forget_class, "forget")


def measure_images(
    model: str, adapter: Path | None, forget: str, forget_class: str | None, retain: str | None, test: str | None,
    reference: str | None, batch_size: int, seed: int,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Accuracies of each model in percent and, with data of all three kinds, the membership attack's share."""
    from semu_peft.evaluation import evaluate_forgetting, predict

    rows = {}
    for name, place, own in _models(model, adapter, reference):
        base = classifier(place, own)
        parts = {"forget": read_images(forget, base, only=forget_class)}
        kept = _kept(retain, forget, forget_class, base)
        parts |= {} if kept is None else {"retain": kept}
        parts |= {} if test is None else {"test": read_images(test, base, "test")}
        said: dict[str, Any] = {
            part: predict(base, data.loader(batch_size), progress=False) for part, data in parts.items()
        }
        rows[name] = {f"{part} accuracy": each.accuracy for part, each in said.items()}
        if len(said) == 3:
            judged = evaluate_forgetting(base, **said, seed=seed, progress=False)
            rows[name]["membership inference"] = judged.membership_inference
    return rows


def _table(rows: dict[str, dict[str, str]]) -> Any:
    """One row a model, one column a number."""
    from rich.table import Table

    heads = list(dict.fromkeys(head for row in rows.values() for head in row))
    table = Table("", *heads)
    for name, row in rows.items():
        table.add_row(name, *(row.get(head, "–") for head in heads))
    return table
