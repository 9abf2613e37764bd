"""`semu merge`, `export`, `inspect` and `compare`: what is done with an adapter that is there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from .bases import check_adapter, check_new, classifier, job_of, language_model, pipeline, write_model
from .options import Model, OutputDir, RequiredAdapter
from .verbs import Told


def merge(model: Model, adapter: RequiredAdapter, output_dir: OutputDir) -> Told:
    """Write a whole model with the adapter merged in: nothing of SEMU is needed to load it."""
    check_new(output_dir)
    check_adapter(adapter)
    job = job_of(model)
    parts: list[Any] = []
    if job == "concept":
        from semu_peft.export.diffusers import merge_pipeline

        parts = [merge_pipeline(pipeline(model, adapter))]
    elif job == "text":
        adapted, tokenizer = language_model(model, adapter, as_stored=True)
        parts = [adapted.merge_and_unload(safe_merge=True), tokenizer]
    else:
        parts = [classifier(model, adapter, as_stored=True).merge_and_unload(safe_merge=True), *_processor(model)]
    write_model(output_dir, lambda folder: [part.save_pretrained(str(folder)) for part in parts])
    return Told(
        {"job": job, "output_dir": str(output_dir)},
        [f"The merged model is in {output_dir}. It loads like any other, and cannot be switched back."],
    )


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
    from semu_peft.concept.families import denoiser_of

    if to != "lora":
        pipe, names = pipeline(model, adapter), []
        # As a whole folder: what a killed run left in it would keep the next one from writing there.
        write_model(output_dir, lambda folder: names.append(save_as_diffusers_lora(pipe, folder, format=to).name))  # type: ignore[arg-type]
        written = output_dir / names[0]
        how = f"pipe.load_lora_weights({str(output_dir)!r})"
    else:
        loaded: Any = {
            "images": lambda: classifier(model, adapter, as_stored=True),
            "text": lambda: language_model(model, adapter, as_stored=True)[0],
            "concept": lambda: denoiser_of(pipeline(model, adapter)),
        }[job]()
        written = save_as_lora(loaded, output_dir)
        how = f"PeftModel.from_pretrained(model, {str(output_dir)!r})"
    return Told({"to": to, "output_dir": str(output_dir)}, [f"Written to {written}. Load it with {how}."])


def inspect(adapter: RequiredAdapter) -> Told:
    """Show ranks, norms and energies of an adapter, what it was made for, and whether its files are whole."""
    check_adapter(adapter)
    from rich.table import Table

    from semu_peft.adapter.saved import inspect_adapter

    found = inspect_adapter(adapter)
    table = Table(_layer_column(), "shape", "rank", "‖ΔW‖", "largest", "energy")
    for name, layer in found.layers.items():
        count, rows, columns = layer.shape
        shape = f"{f'{count}×' if count > 1 else ''}{rows}×{columns}"
        numbers = (f"{layer.norm:.4g}", f"{layer.largest:.4g}", f"{layer.energy:.1%}")
        table.add_row(name, shape, str(layer.rank), *numbers)
    is_sound = found.digest in ("ok", "absent")
    words: list[Any] = [
        table,
        f"Base model: {found.base_model or 'not said'}. {found.file_bytes:,} bytes, ‖ΔW‖ = {found.norm:.4g}.",
        *([] if found.norm else ["It changes nothing: the model is as it was without it."]),
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
    from rich.table import Table

    from semu_peft.adapter.saved import compare_adapters

    found = compare_adapters(first, second)
    if not found:
        return Told({"layers": found}, ["They have no layer in common."])
    table = Table(_layer_column(), "outputs in common", "inputs in common", "cosine of ΔW", "largest cosine")
    alike = {name: layer for name, layer in found.items() if layer.cosine is not None}
    for name, layer in alike.items():
        numbers = (f"{layer.left:.3f}", f"{layer.right:.3f}", f"{layer.cosine:+.3f}", f"{layer.angles[0]:.3f}")
        table.add_row(name, *numbers)
    meaning = "1: the same directions, 0: none in common. Where the cosine of ΔW is negative, one undoes the other."
    words: list[Any] = [table, meaning] if alike else []
    for side, folder in enumerate((first, second)):
        if idle := [name for name, layer in found.items() if not layer.norms[side]]:
            where = "any layer that both correct" if len(idle) == len(found) else ", ".join(idle)
            words.append(f"Nothing to compare: {folder} changes nothing in {where}.")
    return Told({"layers": found}, words)


def _layer_column() -> Any:
    """A column of layers' names, which begin alike and are told apart by their ends: the others are narrowed first."""
    from rich.table import Column

    return Column("layer", no_wrap=True, overflow="fold")


def _processor(model: str) -> list[Any]:
    """What prepares images for the model, where it has one."""
    from transformers import AutoImageProcessor

    try:
        return [AutoImageProcessor.from_pretrained(model)]
    except (OSError, ValueError):
        return []
