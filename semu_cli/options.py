"""The flags, each declared once, so that it is called and explained alike in every verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .verbs import RUN


def _above_zero(value: float | None) -> float | None:
    if value is not None and not value > 0:
        raise typer.BadParameter("It must be above zero. Take 0.01, or leave it out for no bound.")
    return value


Model = Annotated[
    str,
    typer.Option("--model", metavar="MODEL", help="Folder of the model, or its name on the Hub.", show_default=False),
]
Adapter = Annotated[
    Path | None, typer.Option("--adapter", metavar="FOLDER", help="Folder of an adapter. Without: the bare model.")
]
RequiredAdapter = Annotated[
    Path, typer.Option("--adapter", metavar="FOLDER", help="Folder of the adapter.", show_default=False)
]
OutputDir = Annotated[
    Path, typer.Option("--output-dir", metavar="FOLDER", help="Folder to write to.", show_default=False)
]
Data = Annotated[
    list[str],
    typer.Option(
        "--forget", metavar="DATA", show_default=False,
        help="What was to be forgotten, as `semu unlearn` took it: a folder, a file, or a prompt (again for more).",
    ),
]  # fmt: skip
ImageData = Annotated[
    Path,
    typer.Option(
        "--forget",
        metavar="FOLDER",
        help="Folder of images, flat or with a subfolder a class; what to forget.",
        show_default=False,
    ),
]
Prompts = Annotated[
    list[str],
    typer.Option("--forget", metavar="PROMPT", help="A prompt to forget; again for more.", show_default=False),
]
Texts = Annotated[
    str,
    typer.Option(
        "--forget", metavar="FILE", show_default=False,
        help="File of what to forget: .jsonl with question and answer or text in each line, .txt, .json or .parquet.",
    ),
]  # fmt: skip
ForgetClass = Annotated[
    str | None,
    typer.Option(
        "--forget-class", metavar="CLASS", help="Only this class of --forget; the others are kept, if measured."
    ),
]
Retain = Annotated[str | None, typer.Option("--retain", metavar="DATA", help="What to keep, in the form of --forget.")]
RetainPrompts = Annotated[
    list[str] | None, typer.Option("--retain", metavar="PROMPT", help="A prompt to hold as it is; again for more.")
]
Kept = Annotated[
    list[str] | None,
    typer.Option("--retain", metavar="DATA", help="What was to be kept, in the form of --forget; prompts again."),
]
Classifier = Annotated[
    str | None,
    typer.Option(
        "--classifier",
        metavar="MODEL",
        help="Of pipelines: an image classifier, or a CLIP model, that judges the pictures.",
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        "--samples", metavar="N", help="Of pipelines: pictures of each prompt, a seed each; by default 16.", min=1
    ),
]
ShowAnswers = Annotated[
    int | None,
    typer.Option(
        "--show-answers", metavar="N", min=1,
        help="Of language models: show the first N questions of --forget, and what is answered before and after. What "
        "was to be forgotten can then be read in the report; by default none are shown.",
    ),
]  # fmt: skip
InferenceSteps = Annotated[
    int | None,
    typer.Option(
        "--num-inference-steps", metavar="N", help="Of pipelines: steps of sampling a picture; by default 25.", min=1
    ),
]
Related = Annotated[
    list[str] | None,
    typer.Option(
        "--related", metavar="DATA", show_default=False,
        help="Data like what was forgotten, in its form, to relearn from instead; prompts again.",
    ),
]  # fmt: skip
Shadow = Annotated[
    list[str] | None,
    typer.Option(
        "--shadow", metavar="MODEL", show_default=False,
        help="Of classifiers: a model trained neither on --forget nor on --test, for LiRA and RMIA; again for more.",
    ),
]  # fmt: skip
ForgetExamples = Annotated[
    int | None,
    typer.Option(
        "--forget-examples", metavar="N", min=1, help="Forgotten examples that an attacker relearns from, 20 if unsaid."
    ),
]
Test = Annotated[
    str | None,
    typer.Option("--test", metavar="DATA", help="Data that no model was trained on, in the form of --forget."),
]
Neutral = Annotated[
    str | None, typer.Option("--neutral", metavar="FILE", help="File of texts of any kind, which must not change.")
]
Reference = Annotated[
    str | None,
    typer.Option("--reference", metavar="MODEL", help="A model retrained without what was forgotten, to compare with."),
]
MaxSteps = Annotated[int | None, typer.Option("--max-steps", metavar="N", help="Training steps at most.", min=1)]
MaxRetainKl = Annotated[
    float | None,
    typer.Option(
        "--max-retain-kl",
        metavar="X",
        help="Damage that no step exceeds, in nats, on what is to be kept.",
        callback=_above_zero,
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="N", help="Examples a step.", min=1)]
AtATime = Annotated[
    int | None,
    typer.Option(
        "--batch-size", metavar="N", help="Examples at a time; by default 32, and of pictures that are drawn 4.", min=1
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="PAIRS",
        help="Of files of text: their names for columns, such as question=prompt,answer=reply.",
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        "--template",
        metavar="TEXT",
        help="How question and answer are written, such as 'Q: {question}\\nA: {answer}'; by default as the chat "
        "template of the tokenizer says, or as 'Question: {question}\\nAnswer: {answer}'.",
    ),
]
TargetModules = Annotated[
    str | None,
    typer.Option("--target-modules", metavar="LAYERS", help="Layers to correct: all-linear or a regular expression."),
]
ExplainedVariance = Annotated[
    float,
    typer.Option(
        "--explained-variance", metavar="SHARE", help="Share of each layer's gradient energy to keep, γ, of 0 to 1."
    ),
]
TimeLimit = Annotated[
    float | None, typer.Option("--time-limit", metavar="S", help="Begin no attack after so many seconds.", min=0)
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of everything drawn.", min=0)]
AdapterName = Annotated[str, typer.Option("--adapter-name", metavar="NAME", help="The adapter's name.")]
Progress = Annotated[bool, typer.Option("--progress/--no-progress", help="Show progress bars.", rich_help_panel=RUN)]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Load model and data, estimate memory and time, write nothing.")
]
PlanOnly = Annotated[
    bool, typer.Option("--dry-run", help="Load model and data, say what would be done and what not, write nothing.")
]
StepSeconds = Annotated[
    float | None,
    typer.Option("--step-seconds", metavar="S", help="With --dry-run: what a step takes, instead of trying one."),
]
