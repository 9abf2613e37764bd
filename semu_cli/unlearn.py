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
from .image_folder import ImageFolder, read_images, read_others
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
    Texts,
)
from .text_file import check_texts, read_apart, written_out
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
    explained_variance: ExplainedVariance = 0.9,
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

    from semu_peft import SemuConfig, initialize_semu_weights, objectives, unlearn

    base = classifier(model)
    data = read_images(forget, base, only=forget_class)
    targets = target_modules or last_third(base)
    if dry_run:
        return _estimated(base, targets, data.loader(batch_size), len(data), max_steps, step_seconds)
    objective = getattr(objectives, way.objective)()
    held = None if retain is None else _kept_images(retain, base, forget_class, data)
    kept = None if held is None else _hold(held.loader(batch_size, shuffle=True), max_retain_kl)
    parts = {"forget": data} | _other_classes(forget, base, forget_class)
    before = _recognised(base, parts, batch_size)
    config = SemuConfig(target_modules=targets, explained_variance=explained_variance)
    adapted = get_peft_model(base, config, adapter_name=adapter_name)
    profile = initialize_semu_weights(
        adapted, data.loader(batch_size), objective, adapter_name=adapter_name, progress=progress
    )
    result = unlearn(
        adapted, data.loader(batch_size, shuffle=True), objective, retain=kept, max_retain_kl=max_retain_kl,
        max_steps=max_steps, seed=seed, progress=progress, adapter_name=adapter_name,
    )  # fmt: skip
    after = _recognised(adapted, parts, batch_size)
    found = {f"{name}_accuracy": {"before": before[name], "after": after[name]} for name in before}
    record = _record("images", settings, profile, result, {**found, "examples": len(data)})
    write_adapter(output_dir, _saver(adapted, adapter_name), record)
    then = ["--forget", str(forget), *(["--forget-class", forget_class] if forget_class else [])]
    return _told(record, _of_images(record, forget, retain), output_dir, _evaluation(settings, *then))


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
    columns: Columns = None,
    template: Template = None,
    target_modules: TargetModules = None,
    explained_variance: ExplainedVariance = 0.9,
    seed: Seed = 0,
    adapter_name: AdapterName = "default",
    dry_run: DryRun = False,
    step_seconds: StepSeconds = None,
    progress: Progress = True,
) -> Told:
    """Make a language model forget facts, answers or texts."""
    settings = dict(locals())
    method_of("text", method)
    files = {"forget": forget, "retain": retain, "neutral": neutral}
    check_texts(columns, **files)
    check_output(output_dir)
    check_job(model, "text")
    data = read_apart(files, columns)
    from semu_peft import SemuConfig, forget_text
    from semu_peft.language import text_examples

    base, tokenizer = language_model(model)
    is_seq2seq = bool(base.config.is_encoder_decoder)
    targets = target_modules or "all-linear"
    if dry_run:
        rows = text_examples(tokenizer, data["forget"], template=written_out(template), seq2seq=is_seq2seq)
        return _estimated(
            base, targets, rows.loader(min(batch_size, len(rows))), len(rows), max_steps, step_seconds
        )  # fmt: skip
    config = SemuConfig(
        target_modules=targets, task_type="SEQ_2_SEQ_LM" if is_seq2seq else "CAUSAL_LM",
        explained_variance=explained_variance,
    )  # fmt: skip
    done = forget_text(
        base, tokenizer, **data, method=method, template=written_out(template), max_retain_kl=max_retain_kl,
        max_steps=max_steps or 80, batch_size=batch_size, seed=seed, config=config, progress=progress,
        adapter_name=adapter_name,
    )  # fmt: skip
    first, last = done.training.history[0], done.training.history[-1]
    probability = {"before": first.get("answer_probability"), "after": last.get("answer_probability")}
    found = {"token_probability": probability, "examples": len(done.examples)}
    record = _record("text", settings, done.profile, done.training, found)
    write_adapter(output_dir, _saver(done.model, adapter_name), record)
    then = ["--forget", forget, *(["--columns", columns] if columns else [])]
    then += [] if template is None else ["--template", template]
    return _told(record, _of_texts(record), output_dir, _evaluation(settings, *then, "--metrics", "probability"))


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
    explained_variance: ExplainedVariance = 0.9,
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
    from semu_peft import SemuConfig, unlearn_concept
    from semu_peft.concept import concept_examples
    from semu_peft.concept.families import denoiser_of
    from semu_peft.concept.targets import denoiser_targets
    from semu_peft.export.diffusers import save_adapter

    pipe = pipeline(model)
    denoiser = denoiser_of(pipe)
    targets = denoiser_targets(denoiser)
    if dry_run:
        examples = samples_per_prompt * len(forget)
        return estimate(
            denoiser, targets, examples=examples, batches=-(-examples // batch_size), steps=max_steps,
            step_seconds=step_seconds,
        ).told()  # fmt: skip
    examples_made = concept_examples(
        pipe, forget, anchor=anchor or "", retain=retain or "", samples_per_prompt=samples_per_prompt,
        num_inference_steps=num_inference_steps, batch_size=batch_size, seed=seed, progress=progress,
    )  # fmt: skip
    done = unlearn_concept(
        pipe, examples_made, objective=method,
        config=SemuConfig(target_modules=targets, explained_variance=explained_variance), max_steps=max_steps,
        batch_size=batch_size, seed=seed, progress=progress, adapter_name=adapter_name,
    )  # fmt: skip
    losses = {"before": done.training.history[0]["loss"], "after": done.training.history[-1]["loss"]}
    record = _record("concept", settings, done.profile, done.training, {"loss": losses, "examples": len(examples_made)})
    write_adapter(output_dir, lambda folder: save_adapter(denoiser, folder, adapter_name=adapter_name), record)
    words = [f"{', '.join(map(repr, forget))}: the loss went from {losses['before']:.4f} to {losses['after']:.4f}."]
    then = ["semu", "export", "--model", model, "--adapter", str(output_dir), "--to", "diffusers"]
    return _told(record, words, output_dir, shlex.join([*then, "--output-dir", f"{output_dir}-lora"]))


def _recognised(model: Any, parts: Mapping[str, Any], batch_size: int) -> dict[str, float]:
    """How much of each part is recognised, in percent."""
    from semu_peft.evaluation import predict

    return {name: predict(model, part.loader(batch_size), progress=False).accuracy for name, part in parts.items()}


def _other_classes(forget: Path, base: Any, forget_class: str | None) -> dict[str, Any]:
    """The images beside those of the class to forget, which are looked at and not trained on."""
    others = None if forget_class is None else read_others(forget, base, forget_class, "forget")
    return {} if others is None else {"retain": others}


def _kept_images(retain: str, base: Any, forget_class: str | None, data: ImageFolder) -> ImageFolder:
    """What is held while training; none of it may be among what is to be forgotten."""
    kept = read_others(retain, base, forget_class)
    if kept is None:
        raise typer.BadParameter(f"`--retain`: {retain} has no class but {forget_class!r}. Add images of others.")
    both = {file.resolve() for file in kept.files} & {file.resolve() for file in data.files}
    if both:
        raise typer.BadParameter(
            f"`--retain`: {retain} holds {len(both)} of the images to be forgotten, {min(both).name} among them. Give "
            "a folder without them, or name the class, --forget-class."
        )
    return kept


def _hold(loader: Any, max_retain_kl: float | None) -> Any:
    """Retain data that count by a weight or, with a budget, by that alone."""
    from semu_peft import Retain as Keep
    from semu_peft.objectives import KLToOriginal

    return Keep(loader, KLToOriginal(), 1.0 if max_retain_kl is None else 0.0)


def _of_images(record: Mapping[str, Any], forget: Path, retain: str | None) -> list[str]:
    """What became of the images, in words."""
    of = record["forget_accuracy"]
    words = [f"{_count(record, 'image')}: {of['before']:.1f}% were recognised before, {of['after']:.1f}% are now."]
    if (others := record.get("retain_accuracy")) is not None:
        words.append(f"Images of the other classes: {others['before']:.1f}% before, {others['after']:.1f}% now.")
        if others["before"] - others["after"] > 1 and retain is None:
            words.append(f"To hold the others better, give them: --retain {forget}")
    return [*words, _hardly_forgotten(record["settings"])] if of["after"] > 0.9 * of["before"] else words


def _of_texts(record: Mapping[str, Any]) -> list[str]:
    """What became of the texts, in words."""
    before, after = (record["token_probability"][when] for when in ("before", "after"))
    if before is None or after is None:
        return [f"{_count(record, 'text or answer', 'texts or answers')}."]
    words = [
        f"{_count(record, 'text or answer', 'texts or answers')}. The tokens had probability {before:.3f} on average, "
        f"and have now {after:.3f}, in the batches that were trained on."
    ]
    return [*words, _hardly_forgotten(record["settings"])] if after > 0.9 * before else words


def _hardly_forgotten(settings: Mapping[str, Any]) -> str:
    """What to try where a run ended with all as well known as before: it is no success because it ended."""
    tries = []
    if "neutral" in settings and settings["retain"] is None and settings["neutral"] is None:
        tries.append("say what must stay, --retain others.jsonl or rather texts of any kind, --neutral texts.txt")
    if "template" in settings and settings["template"] is None:
        tries.append("write --template as the model was trained")
    if settings["max_retain_kl"] is not None:
        tries.append("allow more damage, --max-retain-kl")
    if settings["explained_variance"] < 0.99:
        tries.append("keep more directions, --explained-variance 0.99")
    return f"Hardly anything was forgotten. Things to try: {'; '.join([*tries, 'take another --method'])}."


def _count(record: Mapping[str, Any], one: str, more: str | None = None) -> str:
    number = record["examples"]
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def _evaluation(settings: Mapping[str, Any], *flags: str) -> str:
    """The command that measures what was done."""
    model, adapter = settings["model"], str(settings["output_dir"])
    return shlex.join(["semu", "evaluate", "--model", model, "--adapter", adapter, *flags])


def _estimated(
    base: Any, targets: Any, loader: Any, examples: int, steps: int | None, step_seconds: float | None
) -> Told:
    """What training on such batches takes."""
    return estimate(
        base, targets, examples=examples, batches=len(loader), steps=steps, step_seconds=step_seconds,
        trial=_trial(base, loader),
    ).told()  # fmt: skip


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
