"""`semu unlearn`: images, texts and concepts."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .bases import check_job, check_output, classifier, language_model, pipeline, write_adapter
from .catalogue import method_of
from .estimate import estimate, last_third
from .image_folder import read_images, read_others
from .options import (
    AdapterName,
    BatchSize,
    DryRun,
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
    Texts,
)
from .verbs import Told


def images(
    model: Model,
    forget: ImageData,
    output_dir: OutputDir,
    forget_class: ForgetClass = None,
    retain: Retain = None,
    method: Annotated[str, typer.Option("--method", help="See `semu methods --job images`.")] = "delete",
    max_steps: MaxSteps = None,
    max_retain_kl: MaxRetainKl = None,
    batch_size: BatchSize = 64,
    target_modules: TargetModules = None,
    seed: Seed = 0,
    adapter_name: AdapterName = "default",
    dry_run: DryRun = False,
    step_seconds: StepSeconds = None,
    progress: Progress = True,
) -> Told:
    """Make an image classifier forget a class, or the images of a folder."""
    settings = dict(locals())
    way = method_of("images", method)
    if max_retain_kl is not None and retain is None:
        raise typer.BadParameter("`--max-retain-kl` is measured on what is to be kept: give --retain as well.")
    check_output(output_dir)
    check_job(model, "images")
    from peft import get_peft_model

    from semu_peft import Retain as Keep
    from semu_peft import SemuConfig, initialize_semu_weights, objectives, unlearn
    from semu_peft.evaluation import predict

    base = classifier(model)
    data = read_images(forget, base, only=forget_class)
    targets = target_modules or last_third(base)
    if dry_run:
        loader = data.loader(batch_size)
        return estimate(
            base, targets, examples=len(data), batches=len(loader), steps=max_steps, step_seconds=step_seconds,
            trial=_trial(base, loader),
        ).told()  # fmt: skip
    objective = getattr(objectives, way.objective)()
    kept = None
    if retain is not None:
        held = _others(retain, base, forget_class).loader(batch_size, shuffle=True)
        kept = Keep(held, objectives.KLToOriginal(), 0.0 if max_retain_kl is not None else 1.0)
    others = None if forget_class is None else read_others(forget, base, forget_class, "forget")

    def recognised(model: Any) -> dict[str, float]:
        parts = {"forget": data} if others is None else {"forget": data, "retain": others}
        said = {name: predict(model, part.loader(batch_size), progress=False) for name, part in parts.items()}
        return {name: each.accuracy for name, each in said.items()}

    before = recognised(base)
    adapted = get_peft_model(base, SemuConfig(target_modules=targets), adapter_name=adapter_name)
    profile = initialize_semu_weights(
        adapted, data.loader(batch_size), objective, adapter_name=adapter_name, progress=progress
    )
    result = unlearn(
        adapted, data.loader(batch_size, shuffle=True), objective, retain=kept, max_retain_kl=max_retain_kl,
        max_steps=max_steps, seed=seed, progress=progress, adapter_name=adapter_name,
    )  # fmt: skip
    after = recognised(adapted)
    found = {f"{name}_accuracy": {"before": before[name], "after": after[name]} for name in before}
    record = _record("images", settings, profile, result, {**found, "examples": len(data)})
    write_adapter(output_dir, _saver(adapted, adapter_name), record)
    words = [f"{len(data)} images: {before['forget']:.1f}% were recognised before, {after['forget']:.1f}% are now."]
    if "retain" in before:
        words.append(f"Images of the other classes: {before['retain']:.1f}% before, {after['retain']:.1f}% now.")
    if before.get("retain", 0.0) - after.get("retain", 0.0) > 1 and retain is None:
        words.append(f"To hold the others better, give them: --retain {forget}")
    then = ["semu", "evaluate", "--model", model, "--adapter", str(output_dir), "--forget", str(forget)]
    then += ["--forget-class", forget_class] if forget_class else []
    return _told(record, words, output_dir, shlex.join(then))


def text(
    model: Model,
    forget: Texts,
    output_dir: OutputDir,
    retain: Retain = None,
    neutral: Neutral = None,
    method: Annotated[str, typer.Option("--method", help="See `semu methods --job text`.")] = "npo",
    max_steps: MaxSteps = 80,
    max_retain_kl: MaxRetainKl = None,
    batch_size: BatchSize = 32,
    template: Template = None,
    target_modules: TargetModules = None,
    seed: Seed = 0,
    adapter_name: AdapterName = "default",
    dry_run: DryRun = False,
    step_seconds: StepSeconds = None,
    progress: Progress = True,
) -> Told:
    """Make a language model forget facts, answers or texts."""
    settings = dict(locals())
    method_of("text", method)
    for flag, path in (("forget", forget), ("retain", retain), ("neutral", neutral)):
        if path is not None and not Path(path).exists():
            raise typer.BadParameter(f"`--{flag}`: there is no file {path}. Give one with texts or questions.")
    check_output(output_dir)
    check_job(model, "text")
    from semu_peft import SemuConfig, forget_text
    from semu_peft.language import text_examples

    template = None if template is None else template.replace("\\n", "\n")
    base, tokenizer = language_model(model)
    is_seq2seq = bool(base.config.is_encoder_decoder)
    targets = target_modules or "all-linear"
    if dry_run:
        rows = text_examples(tokenizer, forget, template=template, seq2seq=is_seq2seq)
        loader = rows.loader(min(batch_size, len(rows)))
        return estimate(
            base, targets, examples=len(rows), batches=len(loader), steps=max_steps, step_seconds=step_seconds,
            trial=_trial(base, loader),
        ).told()  # fmt: skip
    done = forget_text(
        base, tokenizer, forget, retain=retain, neutral=neutral, method=method, template=template,
        max_retain_kl=max_retain_kl, max_steps=80 if max_steps is None else max_steps, batch_size=batch_size, seed=seed,
        config=SemuConfig(target_modules=targets, task_type="SEQ_2_SEQ_LM" if is_seq2seq else "CAUSAL_LM"),
        progress=progress, adapter_name=adapter_name,
    )  # fmt: skip
    first, last = done.training.history[0], done.training.history[-1]
    before, after = first.get("answer_probability"), last.get("answer_probability")
    probability = {"before": before, "after": after}
    found = {"token_probability": probability, "examples": len(done.examples)}
    record = _record("text", settings, done.profile, done.training, found)
    write_adapter(output_dir, _saver(done.model, adapter_name), record)
    words = [f"{len(done.examples)} texts or answers."]
    if before is not None and after is not None:
        words[0] += f" Their tokens had probability {before:.3f} on average, and have now "
        words[0] += f"{after:.3f}, in the batches that were trained on."
        if after > 0.9 * before:
            words.append(_hardly_forgotten(retain, template))
    then = ["semu", "evaluate", "--model", model, "--adapter", str(output_dir), "--forget", forget]
    then += [] if settings["template"] is None else ["--template", settings["template"]]
    return _told(record, words, output_dir, shlex.join([*then, "--metrics", "probability"]))


def concept(
    model: Model,
    forget: Prompts,
    output_dir: OutputDir,
    anchor: Annotated[
        list[str] | None, typer.Option("--anchor", help="A prompt for what to give instead; again for more.")
    ] = None,
    retain: RetainPrompts = None,
    method: Annotated[str, typer.Option("--method", help="See `semu methods --job concept`.")] = "condition-matching",
    max_steps: MaxSteps = 200,
    batch_size: BatchSize = 4,
    samples_per_prompt: Annotated[
        int, typer.Option("--samples-per-prompt", help="Latents to sample for each prompt to forget.", min=1)
    ] = 16,
    num_inference_steps: Annotated[
        int, typer.Option("--num-inference-steps", help="Steps of sampling one of them.", min=1)
    ] = 25,
    seed: Seed = 0,
    adapter_name: AdapterName = "default",
    dry_run: DryRun = False,
    step_seconds: StepSeconds = None,
    progress: Progress = True,
) -> Told:
    """Make a text-to-image pipeline forget a concept; no images are needed."""
    settings = dict(locals())
    method_of("concept", method)
    check_output(output_dir)
    check_job(model, "concept")
    from semu_peft import unlearn_concept
    from semu_peft.concept import concept_examples
    from semu_peft.concept.families import denoiser_of
    from semu_peft.concept.targets import denoiser_targets
    from semu_peft.export.diffusers import save_adapter

    pipe = pipeline(model)
    denoiser = denoiser_of(pipe)
    if dry_run:
        examples = samples_per_prompt * len(forget)
        return estimate(
            denoiser, denoiser_targets(denoiser), examples=examples, batches=-(-examples // batch_size),
            steps=max_steps, step_seconds=step_seconds,
        ).told()  # fmt: skip
    examples_made = concept_examples(
        pipe, forget, anchor=anchor or "", retain=retain or "", samples_per_prompt=samples_per_prompt,
        num_inference_steps=num_inference_steps, batch_size=batch_size, seed=seed, progress=progress,
    )  # fmt: skip
    done = unlearn_concept(
        pipe, examples_made, objective=method, max_steps=max_steps, batch_size=batch_size, seed=seed,
        progress=progress, adapter_name=adapter_name,
    )  # fmt: skip
    losses = {"before": done.training.history[0]["loss"], "after": done.training.history[-1]["loss"]}
    record = _record("concept", settings, done.profile, done.training, {"loss": losses, "examples": len(examples_made)})
    write_adapter(output_dir, lambda folder: save_adapter(denoiser, folder, adapter_name=adapter_name), record)
    words = [f"{', '.join(map(repr, forget))}: the loss went from {losses['before']:.4f} to {losses['after']:.4f}."]
    then = ["semu", "export", "--model", model, "--adapter", str(output_dir), "--to", "diffusers"]
    return _told(record, words, output_dir, shlex.join([*then, "--output-dir", f"{output_dir}-lora"]))


def _hardly_forgotten(retain: str | None, template: str | None) -> str:
    """What to try where a run ended with the answers as likely as before: it is no success because it ended."""
    tries = [] if retain is not None else ["give data that must stay, --retain others.jsonl"]
    tries += [] if template is not None else ["write --template as the model was trained"]
    tries.append("take another --method")
    return f"Hardly anything was forgotten. Things to try: {'; '.join(tries)}."


def _others(retain: str, base: Any, forget_class: str | None) -> Any:
    kept = read_others(retain, base, forget_class)
    if kept is None:
        raise typer.BadParameter(f"`--retain`: {retain} has no class but {forget_class!r}. Add images of others.")
    return kept


def _trial(model: Any, loader: Any) -> Any:
    """A pass forward and backward on the first batch."""
    from semu_peft.objectives import CrossEntropy

    batch = {key: value.to(model.device) for key, value in next(iter(loader)).items()}
    return lambda: CrossEntropy()(model, batch).backward()


def _saver(model: Any, adapter_name: str) -> Any:
    """Saves an adapter of a `PeftModel`, which puts all names but `default` into a folder of their own, without one."""

    def save(folder: Path) -> None:
        model.save_pretrained(str(folder), selected_adapters=[adapter_name])
        inside = folder / adapter_name
        if adapter_name != "default" and inside.is_dir():
            for file in inside.iterdir():
                file.replace(folder / file.name)
            inside.rmdir()

    return save


def _record(job: str, settings: Mapping[str, Any], profile: Any, result: Any, found: Mapping[str, Any]) -> Any:
    """What was done, for the file beside the adapter and for `--json`."""
    import torch

    import semu_peft

    return {
        "job": job,
        "settings": {name: value for name, value in settings.items() if name not in ("dry_run", "progress")},
        **found,
        "ranks": {name: layer.rank for name, layer in profile.layers.items()},
        "training": {
            "steps": result.steps, "examples_seen": result.examples_seen, "seconds": result.seconds,
            "trainable_parameters": result.trainable_parameters,
            "stopped_early": result.stopped_early, "stop_reason": result.stop_reason,
            "history": result.history,
        },
        "versions": {
            "semu_peft": semu_peft.__version__, "torch": torch.__version__, "python": platform.python_version()
        },
    }  # fmt: skip


def _told(record: Mapping[str, Any], words: list[str], output_dir: Path, then: str) -> Told:
    training = record["training"]
    words = [
        *words,
        f"{training['trainable_parameters']:,} numbers were trained, {training['steps']} steps in "
        f"{training['seconds']:.1f} s ({training['stop_reason']}).",
        f"The adapter is in {output_dir}.",
        f"Next: {then}",
    ]
    return Told({"output_dir": str(output_dir), "next": then, **record}, words)
