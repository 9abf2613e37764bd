"""Ship a trained adapter as an exact LoRA that stock PEFT loads."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from semu_peft.arguments import check_path, check_switch
from semu_peft.files import folder_written_whole, save_tensors
from semu_peft.tuner.adapted import semu_layers
from semu_peft.tuner.embedding import Embedding
from semu_peft.tuner.keys import PREFIX
from semu_peft.tuner.layer import SemuLayer
from semu_peft.tuner.misnomers import check_order
from semu_peft.tuner.parameter import ParamWrapper
from semu_peft.tuner.peft_type import NAME
from semu_peft.tuner.tied import TiedLayer

from .lora_pairs import LoraPair, layers_to_export, lora_pair, one_rank
from .lora_targets import check_conversion, lora_targets, parameter_places, rank_patterns

_LORA_BIAS = {"none": "none", "all": "all", "semu_only": "lora_only"}


def to_lora(
    model: nn.Module, *, uniform_rank: bool = True, adapter_name: str = "default"
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Write a SEMU adapter as a LoRA with the same `ΔW`: `B = U R` (times the adapter's scale) and `A = Vᵀ`.

    No decomposition and no approximation is needed, except that a convolution read channel by channel, which has no
    common basis, is factorised numerically. A grouped convolution of rank `r` becomes a LoRA of rank `groups · r`.
    Layers of rank 0 are left out. A layer tied to the embedding gets a pair of its own; PEFT warns that it cannot merge
    both into one weight. Corrected parameters become LoRA's `target_parameters`, and so do the weights of layers whose
    names PEFT would take for those of fused experts; `modules_to_save`, trained biases and token rows go along.

    Args:
        model: A model with a SEMU adapter.
        uniform_rank: Pad every layer to the largest rank with zeros, so that `α` over the rank is 1 however a reader
            comes by them: PEFT from its patterns, vLLM from one rank for all, others from each tensor's shape. With
            `False` every layer keeps its rank, under LoRA's patterns, which PEFT alone reads rightly; the file is
            smaller.
        adapter_name: The adapter to convert.

    Returns:
        The LoRA's configuration and its state dict with PEFT's file keys, float32. They load with stock PEFT.

    Raises:
        ValueError: There is no such adapter, it has no direction at all, or PEFT's LoRA cannot carry it: it ignores a
            convolution's dilation and padding modes other than zeros, adds up the weights of an
            `nn.MultiheadAttention` wrongly, cannot name every parameter, and renames some models' layers on loading.
        NotInitializedError: The adapter has no bases yet.
        TypeError: `model` is a path.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, to_lora
        >>> network = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
        >>> model = get_peft_model(network, SemuConfig(target_modules=["0"], r=2, init_weights=False))
        >>> config, state_dict = to_lora(model)
        >>> {key: tuple(value.shape) for key, value in state_dict.items()}
        {'base_model.model.0.lora_A.weight': (2, 8), 'base_model.model.0.lora_B.weight': (6, 2)}
    """
    check_order("to_lora(model)", model)
    check_switch("uniform_rank", uniform_rank)
    layers = layers_to_export(model, adapter_name)
    pairs = {name: lora_pair(layer, name, adapter_name) for name, layer in layers.items()}
    if uniform_rank:
        pairs = one_rank(pairs)
    parameters = {name: layer for name, layer in layers.items() if isinstance(layer, ParamWrapper)}
    modules, moved = lora_targets(model, [name for name in layers if name not in parameters])
    places = parameter_places(model, parameters, moved)
    config = _configuration(model, layers, pairs, moved, adapter_name)
    config.target_modules = modules
    config.target_parameters = list(places) or None
    state_dict: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        key = "lora_embedding_{}" if isinstance(layers[name], Embedding) else "lora_{}.weight"
        # A layer tied to another has the same bases, and a file may not hold one tensor twice.
        shared = isinstance(layers[name], TiedLayer)
        for part, tensor in (("A", pair.down), ("B", pair.up)):
            value = tensor.clone() if shared else tensor.contiguous()
            state_dict[f"{PREFIX}{places.get(name, name)}.{key.format(part)}"] = value
    state_dict |= _trained_in_full(model, set(pairs), adapter_name)
    check_conversion(model, config, state_dict)
    return config, state_dict


def save_as_lora(
    model: nn.Module, path: str | Path, *, uniform_rank: bool = True, adapter_name: str = "default"
) -> Path:
    """Save a SEMU adapter as a LoRA folder that stock PEFT loads, without `semu_peft` being installed there.

    The same adapter gives the same bytes. Over an older export the two files are replaced as one.

    Args:
        model: A model with a SEMU adapter.
        path: The folder to write `adapter_config.json` and `adapter_model.safetensors` to.
        uniform_rank: Pad every layer to the largest rank with zeros, see [`to_lora`][semu_peft.export.lora.to_lora].
        adapter_name: The adapter to export.

    Returns:
        The folder.

    Raises:
        ValueError: See [`to_lora`][semu_peft.export.lora.to_lora], or the folder holds a SEMU adapter, whose files have
            the same names; nothing is written then.
        TypeError: The arguments are in the order of PEFT's own `save_as_lora(path, model)`.

    Examples:
        >>> import tempfile, torch
        >>> from peft import PeftModel, get_peft_model
        >>> from semu_peft import SemuConfig, save_as_lora
        >>> network = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
        >>> model = get_peft_model(network, SemuConfig(target_modules=["0"], r=2, init_weights=False))
        >>> folder = save_as_lora(model, tempfile.mkdtemp())
        >>> sorted(file.name for file in folder.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    check_order("save_as_lora(model, path)", model)
    check_path("path", path)
    if _holds_semu(Path(path)):
        raise ValueError(
            f"`path` must not be the folder of a SEMU adapter, got {str(path)!r}: the LoRA's files would take the "
            "place of the adapter's. Give another folder."
        )
    config, state_dict = to_lora(model, uniform_rank=uniform_rank, adapter_name=adapter_name)
    settings = json.dumps(as_json(config.to_dict()), indent=2, sort_keys=True)
    with folder_written_whole(path, [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]) as folder:
        save_tensors(folder / SAFETENSORS_WEIGHTS_NAME, {key: value.cpu() for key, value in state_dict.items()})
        (folder / CONFIG_NAME).write_text(settings, encoding="utf-8")
    return Path(path)


def _holds_semu(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["peft_type"] == NAME)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON has it, the same for the same settings: sets as sorted lists, enumerations as values."""
    return json.loads(
        json.dumps(settings, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )


def _configuration(
    model: nn.Module, layers: dict[str, SemuLayer], pairs: dict[str, LoraPair], moved: list[str], adapter_name: str
) -> LoraConfig:
    """The LoRA's settings but its targets; with the patterns, every layer's scaling `α / r` is 1."""
    source = next(iter(layers.values())).configs[adapter_name]
    ranks = {f"{name}.weight" if name in moved else name: pair.rank for name, pair in pairs.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    patterns = rank_patterns(ranks, common)
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        modules_to_save=source.modules_to_save,
        bias=_LORA_BIAS[source.bias],  # type: ignore[arg-type]
        trainable_token_indices=source.trainable_token_indices,
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        base_model_name_or_path=source.base_model_name_or_path,
        revision=source.revision,
        task_type=source.task_type,
        inference_mode=True,
    )


def _trained_in_full(model: nn.Module, exported: set[str], adapter_name: str) -> dict[str, Tensor]:
    """What the adapter trains besides its cores: whole modules, biases, token rows."""
    layers = semu_layers(model, adapter_name)
    source = next(iter(layers.values())).configs[adapter_name]
    if not (source.modules_to_save or source.trainable_token_indices or source.bias != "none"):
        return {}
    bare = {f"{PREFIX}{name}.base_layer": f"{PREFIX}{name}" for name in layers if name not in exported}
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    found = {}
    for key, value in saved.items():
        if ".semu_" not in key:
            layer, _, parameter = key.rpartition(".")
            found[f"{bare.get(layer, layer)}.{parameter}"] = value
    return found
