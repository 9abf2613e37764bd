"""Ship a pipeline's adapter: as diffusers' LoRA file, as a PEFT folder, or merged into a stock pipeline."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from semu_peft.adapter.whole_model import merge_and_remove
from semu_peft.files import written_whole
from semu_peft.tuner.adapted import base_model, semu_layers
from semu_peft.tuner.keys import PREFIX, without_prefix
from semu_peft.tuner.layer import SemuLayer

from .lora import to_lora

WEIGHT_NAME = "pytorch_lora_weights.safetensors"


def save_as_diffusers_lora(
    pipe: Any, path: str | Path, adapter_name: str = "default", weight_name: str = WEIGHT_NAME
) -> Path:
    """Write a pipeline's SEMU adapter as the LoRA file that `pipe.load_lora_weights` reads, with the same `ΔW`.

    All components with an adapter of that name go into the one file (U-Net or transformer, text encoders), linear
    layers and convolutions, with the configuration beside the weights, so that ranks come back as they are. Loading
    needs diffusers and PEFT but not `semu_peft`. See [`to_lora`][semu_peft.export.lora.to_lora] for what is exact.

    Args:
        pipe: A pipeline with a SEMU adapter and `save_lora_weights`.
        path: The folder to write to.
        adapter_name: The adapter to export.
        weight_name: The file's name.

    Returns:
        The file.

    Raises:
        ValueError: No component has such an adapter, the pipeline's LoRA format has no place for one that has, or the
            adapter is no LoRA; nothing is written then.
    """
    if not hasattr(pipe, "save_lora_weights"):
        raise ValueError(f"{type(pipe).__name__} has no LoRA format of its own: use `save_adapter` on its denoiser.")
    accepted = inspect.signature(pipe.save_lora_weights).parameters
    arguments: dict[str, Any] = {}
    for component, model in _adapted_components(pipe, adapter_name):
        if f"{component}_lora_layers" not in accepted:
            raise ValueError(
                f"The LoRA format of {type(pipe).__name__} has no place for an adapter in {component!r}: merge that "
                "component (`merge_pipeline`), or ship it with `save_adapter`."
            )
        config, state_dict = to_lora(model, adapter_name)
        arguments[f"{component}_lora_layers"] = {without_prefix(key): value.cpu() for key, value in state_dict.items()}
        if config.modules_to_save:
            raise ValueError(
                f"{component!r} has `modules_to_save`={config.modules_to_save}, which diffusers' LoRA files have no "
                "place for: merge the adapter (`merge_pipeline`) instead."
            )
        if f"{component}_lora_adapter_metadata" in accepted:
            arguments[f"{component}_lora_adapter_metadata"] = _plain(config.to_dict())
    if not arguments:
        raise ValueError(f"No component of this {type(pipe).__name__} has a SEMU adapter {adapter_name!r}.")
    target = Path(path) / weight_name
    with written_whole(target) as file, TemporaryDirectory(dir=file.parent) as scratch:
        type(pipe).save_lora_weights(scratch, **arguments, weight_name=weight_name)
        (Path(scratch) / weight_name).rename(file)
    return target


def save_adapter(model: nn.Module, path: str | Path, adapter_name: str = "default") -> Path:
    """Save an adapter that was injected into a bare model (`unet.add_adapter`) as a PEFT folder.

    `PeftModel.from_pretrained(unet, path)` loads it; as that works in place, the pipeline then has it too.

    Args:
        model: The model with the adapter.
        path: The folder to write `adapter_config.json` and `adapter_model.safetensors` to.
        adapter_name: The adapter to save.

    Returns:
        The folder.

    Raises:
        ValueError: The model has no such adapter.
    """
    root: Any = base_model(model)
    config = next(iter(semu_layers(model, adapter_name).values())).configs[adapter_name]
    state_dict = get_peft_model_state_dict(root, adapter_name=adapter_name, save_embedding_layers=False)
    folder = Path(path)
    with written_whole(folder / SAFETENSORS_WEIGHTS_NAME) as file:
        weights = {f"{PREFIX}{without_prefix(key)}": value.cpu() for key, value in state_dict.items()}
        save_file(weights, file, metadata={"format": "pt"})
    before = config.inference_mode
    config.inference_mode = True
    try:
        with written_whole(folder / CONFIG_NAME) as file, TemporaryDirectory() as scratch:
            config.save_pretrained(scratch)
            file.write_bytes((Path(scratch) / CONFIG_NAME).read_bytes())
    finally:
        config.inference_mode = before
    return folder


def merge_pipeline(pipe: Any, adapter_name: str = "default") -> Any:
    """Merge the adapter into the weights of every component that has it, in place: a stock pipeline remains.

    `pipe.save_pretrained` then writes an ordinary checkpoint.

    Raises:
        ValueError: No component has such an adapter; or see
            [`merge_and_remove`][semu_peft.adapter.whole_model.merge_and_remove].
    """
    components = dict(_adapted_components(pipe, adapter_name))
    if not components:
        raise ValueError(f"No component of this {type(pipe).__name__} has a SEMU adapter {adapter_name!r}.")
    for name, model in components.items():
        setattr(pipe, name, base_model(model))  # out of `get_peft_model`'s wrapper, where it has one
        merge_and_remove(getattr(pipe, name), adapter_name)
    return pipe


def _adapted_components(pipe: Any, adapter_name: str) -> Iterator[tuple[str, nn.Module]]:
    for name, model in pipe.components.items():
        if isinstance(model, nn.Module) and any(
            isinstance(layer, SemuLayer) and adapter_name in layer.semu_core for layer in model.modules()
        ):
            yield name, model


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """A configuration as JSON has it: sets as lists, enumerations as their values."""
    return json.loads(
        json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )
