"""`semu merge`, `export`, `inspect` and `compare`: what is done with an adapter that is there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from .bases import check_adapter, check_new, classifier, job_of, language_model, pipeline, write_model
from .options import Model, OutputDir, RequiredAdapter
from .tables import Numbers
from .verbs import Told


def merge(model: Model, adapter: RequiredAdapter, output_dir: OutputDir) -> Told:
    """Write a whole model with the adapter merged in: nothing of SEMU is needed to load it."""
    check_new(output_dir)
    check_adapter(adapter)
    from semu_peft.adapter.saved import inspect_adapter

    job = job_of(model)
    parts: list[Any] = []
    if job == "concept":
        from semu_peft.export.diffusers import merge_pipeline

        parts = [merge_pipeline(pipeline(model, adapter, as_stored=True))]
    elif job == "text":
        adapted, tokenizer = language_model(model, adapter, as_stored=True)
        parts = [adapted.merge_and_unload(safe_merge=True), tokenizer]
    else:
        parts = [classifier(model, adapter, as_stored=True).merge_and_unload(safe_merge=True), *_processor(model)]
    is_idle = _is_idle(inspect_adapter(adapter))
    write_model(output_dir, lambda folder: [part.save_pretrained(str(folder)) for part in parts])
    words = [f"The merged model is in {output_dir}. It loads like any other, and cannot be switched back."]
    if is_idle:
        words = [f"The adapter changes nothing: the model in {output_dir} still knows all that it knew."]
    return Told({"job": job, "output_dir": str(output_dir), "changes_nothing": is_idle}, words)


def export(
    model: Model,
    adapter: RequiredAdapter,
    output_dir: OutputDir,
    to: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="lora (PEFT), or of a pipeline diffusers or kohya.")
    ] = "lora",
) -> Told:
    """Write the adapter as a LoRA with exactly the same effect, for programs that know nothing of SEMU."""
    if to not in ("lora", "diffusers", "kohya"):
        raise typer.BadParameter(f"`--to` must be lora, diffusers or kohya, got {to!r}.")
    check_new(output_dir)
    check_adapter(adapter)
    job = job_of(model)
    if to != "lora" and job != "concept":
        raise typer.BadParameter(f"`--to {to}` is for pipelines of diffusers, and this model is for {job}. Take lora.")
    from semu_peft import save_as_diffusers_lora, save_as_lora
    from semu_peft.adapter.saved import inspect_adapter
    from semu_peft.concept.families import denoiser_of, family_of

    is_idle = _is_idle(inspect_adapter(adapter))
    pipe: Any = pipeline(model, adapter) if job == "concept" else None
    if to != "lora":
        names: list[str] = []
        # As a whole folder: what a killed run left in it would keep the next one from writing there.
        write_model(output_dir, lambda folder: names.append(save_as_diffusers_lora(pipe, folder, format=to).name))  # type: ignore[arg-type]
        written = output_dir / names[0]
        how = f"Load it with pipe.load_lora_weights({str(output_dir)!r})."
        if to == "kohya":
            how = "It is for ComfyUI, WebUI, Forge and sd-scripts: put it where these look for LoRAs."
    else:
        loaded: Any = {
            "images": lambda: classifier(model, adapter, as_stored=True),
            "text": lambda: language_model(model, adapter, as_stored=True)[0],
            "concept": lambda: denoiser_of(pipe),
        }[job]()
        written = save_as_lora(loaded, output_dir)
        inside = f"pipe.{family_of(pipe).denoiser}" if pipe is not None else "model"
        how = f"Load it with PeftModel.from_pretrained({inside}, {str(output_dir)!r})."
    words = ["The adapter changes nothing: with the LoRA the model still knows all that it knew."] if is_idle else []
    data = {"to": to, "output_dir": str(output_dir), "changes_nothing": is_idle}
    return Told(data, [*words, f"Written to {written}. {how}"])


def inspect(adapter: RequiredAdapter) -> Told:
    """Show ranks, norms and energies of an adapter, what it was made for, and whether its files are whole."""
    check_adapter(adapter)
    from semu_peft.adapter.saved import inspect_adapter

    found, rows = inspect_adapter(adapter), []
    for name, layer in found.layers.items():
        count, height, width = layer.shape
        shape = f"{f'{count}×' if count > 1 else ''}{height}×{width}"
        numbers = (f"{layer.norm:.4g}", f"{layer.largest:.4g}", f"{layer.energy:.1%}")
        rows.append((name, shape, str(layer.rank), *numbers))
    table = Numbers("layer", ("shape", "rank", "‖ΔW‖", "largest", "energy"), rows)
    is_sound = found.digest in ("ok", "absent")
    words: list[Any] = [
        table,
        f"Base model: {found.base_model or 'not said'}. {found.file_bytes:,} bytes, ‖ΔW‖ = {found.norm:.4g}.",
        *(["It changes nothing: the model is as it was without it."] if _is_idle(found) else []),
        *([f"Made of or beside the adapters {', '.join(found.parents)}."] if found.parents else []),
        *(f"Forgets {prompt!r}, and gives {', '.join(map(repr, given))}." for prompt, given in found.forgotten.items()),
        {"ok": "The digest fits.", "absent": "The configuration has no digest of the weights."}.get(
            found.digest, found.digest
        ),
    ]
    data = {
        each.name: getattr(found, each.name) for each in dataclasses.fields(found) if each.name != "settings"
    } | {"norm": found.norm}  # fmt: skip
    return Told(data, words, code=0 if is_sound else 1)


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of an adapter.")],
    second: Annotated[Path, typer.Argument(help="Folder of another one, of the same base model.")],
) -> Told:
    """Show how far two adapters correct the same directions, layer by layer."""
    check_adapter(first, "`first`")
    check_adapter(second, "`second`")
    from semu_peft.adapter.saved import compare_adapters

    found = compare_adapters(first, second)
    if not found:
        return Told({"layers": found}, ["They have no layer in common."])
    rows = [
        (name, f"{layer.left:.3f}", f"{layer.right:.3f}", f"{layer.cosine:+.3f}", f"{layer.angles[0]:.3f}")
        for name, layer in found.items()
        if layer.cosine is not None
    ]
    table = Numbers("layer", ("outputs in common", "inputs in common", "cosine of ΔW", "largest cosine"), rows)
    meaning = "1: the same directions, 0: none in common. Where the cosine of ΔW is negative, one undoes the other."
    words: list[Any] = [table, meaning] if rows else []
    for side, folder in enumerate((first, second)):
        if idle := [name for name, layer in found.items() if not layer.norms[side]]:
            where = "any layer that both correct" if len(idle) == len(found) else ", ".join(idle)
            words.append(f"Nothing to compare: {folder} changes nothing in {where}.")
    return Told({"layers": found}, words)


def _is_idle(found: Any) -> bool:
    """Whether an adapter leaves a model as it is: corrections of zero, and nothing trained in full beside them."""
    in_full = found.settings.get("modules_to_save") or found.settings.get("trainable_token_indices")
    return not found.norm and not in_full


def _processor(model: str) -> list[Any]:
    """What prepares images for the model, where it has one."""
    from transformers import AutoImageProcessor

    try:
        return [AutoImageProcessor.from_pretrained(model)]
    except (OSError, ValueError):
        return []
