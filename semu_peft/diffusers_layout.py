"""Ship the adapters of a diffusion pipeline as the one LoRA file that `pipe.load_lora_weights` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from .export import to_lora
from .files import written_whole

DIFFUSERS_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
_METADATA_KEY = "lora_adapter_metadata"
_PREFIX = "base_model.model."
# What a reader needs to rebuild the LoRA. Other fields of LoraConfig come and go with PEFT's versions, and diffusers
# refuses a file with a field that it does not know.
_CONFIG_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")


def save_as_diffusers_lora(
    components: Mapping[str, nn.Module], path: str | Path, adapter_name: str = "default", *, uniform_rank: bool = False
) -> Path:
    """Save the SEMU adapters of a pipeline's components as one exact LoRA in diffusers' layout.

    The file holds `unet.<layer>.lora_A.weight` and so on, with each component's ranks in its header, and loads with
    `pipe.load_lora_weights(path)` where `semu_peft` is not installed.

    Args:
        components: The models by their names in the pipeline: `{"unet": pipe.unet}`, `{"transformer": …}`, with
            `"text_encoder"` and `"text_encoder_2"` where these carry the adapter too. A `PeftModel` or a model with an
            injected adapter.
        path: The folder to write `pytorch_lora_weights.safetensors` to.
        adapter_name: The adapter to export, in every component.
        uniform_rank: Pad all layers of a component to its largest rank with zeros, for readers that expect one rank.

    Returns:
        The folder.

    Raises:
        ValueError: `components` is empty; one has no such adapter, or an adapter that no LoRA equals (see
            [`to_lora`][semu_peft.export.to_lora]) or that the layout has no room for (`modules_to_save`, `bias`).
            Nothing is written then.
    """
    if not components:
        raise ValueError('`components` is empty: give the models by their names in the pipeline, {"unet": pipe.unet}.')
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for component, model in components.items():
        config, state_dict = to_lora(model, adapter_name, uniform_rank=uniform_rank)
        foreign = [key for key in state_dict if ".lora_" not in key]
        if foreign:
            raise ValueError(
                f"The adapter {adapter_name!r} of {component!r} also changes {foreign[0]!r} ({len(foreign)} such), "
                "which diffusers' LoRA files have no place for. Train it without `modules_to_save` and `bias`, or "
                "merge it."
            )
        tensors |= {f"{component}.{key.removeprefix(_PREFIX)}": value.cpu() for key, value in state_dict.items()}
        fields = {name: getattr(config, name) for name in _CONFIG_FIELDS}
        targets = fields["target_modules"]
        fields["target_modules"] = targets if isinstance(targets, str) else sorted(targets)
        metadata |= {f"{component}.{name}": value for name, value in fields.items()}
    folder = Path(path)
    header = {"format": "pt", _METADATA_KEY: json.dumps(metadata, indent=2, sort_keys=True)}
    with written_whole(folder / DIFFUSERS_WEIGHTS_NAME) as file:
        save_file(tensors, file, metadata=header)
    return folder
