"""`semu unlearn`: images, texts and concepts."""

from __future__ import annotations

from typing import Annotated

import typer

from .forget_concept import ConceptRequest
from .forget_images import ImageRequest
from .forget_text import TextRequest
from .options import (
    AdapterName,
    BatchSize,
    Columns,
    DryRun,
    ExplainedVariance,
    ForgetClass,
    ImageData,
    MaxRetainKl,
    MaxSteps,
    Model,
    Neutral,
    OutputDir,
    Progress,
    Prompts,
    Retain,
    RetainPrompts,
    Seed,
    StepSeconds,
    TargetModules,
    Template,
    Test,
    Texts,
)
from .request import carry_out
from .verbs import Told


def images(
    model: Model,
    forget: ImageData,
    output_dir: OutputDir,
    forget_class: ForgetClass = None,
    retain: Retain = None,
    test: Test = None,
    method: Annotated[
        str, typer.Option("--method", metavar="METHOD", help="See `semu methods --job images`.")
    ] = "delete",
    max_steps: MaxSteps = None,
    max_retain_kl: MaxRetainKl = None,
    batch_size: BatchSize = 64,
    target_modules: TargetModules = None,
    explained_variance: ExplainedVariance = 0.9,
    seed: Seed = 0,
    adapter_name: AdapterName = "default",
    dry_run: DryRun = False,
    step_seconds: StepSeconds = None,
    progress: Progress = True,
) -> Told:
    """Make an image classifier forget a class, or single images of classes that it goes on knowing."""
    return carry_out(ImageRequest, dict(locals()))


def text(
    model: Model,
    forget: Texts,
    output_dir: OutputDir,
    retain: Retain = None,
    neutral: Neutral = None,
    method: Annotated[str, typer.Option("--method", metavar="METHOD", help="See `semu methods --job text`.")] = "wga",
    max_steps: MaxSteps = 80,
    max_retain_kl: MaxRetainKl = None,
    batch_size: BatchSize = 32,
    columns: Columns = None,
    template: Template = None,
    target_modules: TargetModules = None,
    explained_variance: ExplainedVariance = 0.99,
    seed: Seed = 0,
    adapter_name: AdapterName = "default",
    dry_run: DryRun = False,
    step_seconds: StepSeconds = None,
    progress: Progress = True,
) -> Told:
    """Make a language model forget facts, answers or texts."""
    return carry_out(TextRequest, dict(locals()))


def concept(
    model: Model,
    forget: Prompts,
    output_dir: OutputDir,
    anchor: Annotated[
        list[str] | None,
        typer.Option("--anchor", metavar="PROMPT", help="A prompt for what to give instead; again for more."),
    ] = None,
    retain: RetainPrompts = None,
    preserve: Annotated[
        float,
        typer.Option(
            "--preserve", metavar="X", help="How firmly --retain and --anchor are held, beside forgetting.", min=0
        ),
    ] = 1.0,
    method: Annotated[
        str, typer.Option("--method", metavar="METHOD", help="See `semu methods --job concept`.")
    ] = "condition-matching",
    max_steps: MaxSteps = 200,
    batch_size: BatchSize = 4,
    samples_per_prompt: Annotated[
        int,
        typer.Option("--samples-per-prompt", metavar="N", help="Latents to sample for each prompt to forget.", min=1),
    ] = 16,
    num_inference_steps: Annotated[
        int, typer.Option("--num-inference-steps", metavar="N", help="Steps of sampling one of them.", min=1)
    ] = 25,
    explained_variance: ExplainedVariance = 1.0,
    seed: Seed = 0,
    adapter_name: AdapterName = "default",
    dry_run: DryRun = False,
    step_seconds: StepSeconds = None,
    progress: Progress = True,
) -> Told:
    """Make a text-to-image pipeline forget a concept; no images are needed."""
    return carry_out(ConceptRequest, dict(locals()))
