"""Exchange an adapter's weights in place, so that compiled code and captured graphs go on running."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.utils import load_peft_weights
from safetensors.torch import load_file
from torch import Tensor, nn

from semu_peft.arguments import check_path
from semu_peft.tuner.adapted import initialized_layers
from semu_peft.tuner.config import SemuConfig
from semu_peft.tuner.keys import PREFIX, tensor_key
from semu_peft.tuner.loading import impossible_tensor
from semu_peft.tuner.reduced_bases import restored_bases
from semu_peft.tuner.tensors import TENSORS

# What the shapes of the tensors do not tell, but the forward pass depends on.
_FIELDS = ("conv_mode", "core", "target_experts")


@torch.no_grad()
def hotswap_adapter(model: nn.Module, model_name_or_path: str, *, adapter_name: str = "default", **kwargs: Any) -> None:
    """Replace the weights of an adapter by those of a saved one with the same layers and ranks, in place.

    PEFT's function of this name is for LoRA alone. Every tensor keeps its place in memory, so a model compiled with
    `torch.compile` is not compiled again. The adapter keeps its name and scale, and whether it is active. A merged
    adapter is refused. Optimisers made before go on with their old momenta.

    Args:
        model: A `PeftModel`, a model with an injected adapter, or either compiled.
        model_name_or_path: The saved adapter, a folder or a Hub repository.
        adapter_name: The adapter to overwrite.
        **kwargs: For finding the saved adapter: `subfolder`, `revision`, `token`, `cache_dir` …

    Raises:
        ValueError: The adapters differ in layers, shapes, experts, `conv_mode` or `core`, the saved one carries more
            than corrections (`modules_to_save`, `bias`), only one of them has offsets, or the adapter is unknown,
            merged or offloaded. Nothing is changed then.
        NotInitializedError: The adapter to overwrite has no bases yet: load the saved one with `load_adapter`.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, hotswap_adapter
        >>> config, x = SemuConfig(target_modules=["0"], r=2, init_weights=False), torch.ones(1, 4)
        >>> first, second = (get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), config) for _ in range(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     second.save_pretrained(folder)
        ...     hotswap_adapter(first, folder)
        >>> torch.equal(first.base_model.model[0].semu_U["default"], second.base_model.model[0].semu_U["default"])
        True
    """
    layers = initialized_layers(getattr(model, "_orig_mod", model), adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"The adapter {adapter_name!r} is merged into the weights; call `unmerge_adapter` first.")
    if any(layer.is_brought(adapter_name) for layer in layers.values()):
        raise ValueError(
            f"`model`: the adapter {adapter_name!r} is offloaded, so that its weights have no place to stay at. Load "
            "the other one beside it instead (`load_adapter`), or remove the hooks of offloading first."
        )
    check_path("model_name_or_path", model_name_or_path)
    config = SemuConfig.from_pretrained(model_name_or_path, **kwargs)
    current = next(iter(layers.values())).configs[adapter_name]
    for name in _FIELDS:
        if getattr(config, name) != getattr(current, name):
            raise ValueError(
                f"Configs are incompatible: for {name}, {getattr(current, name)!r} != {getattr(config, name)!r}. "
                "Load the adapter beside the other one instead (`load_adapter`)."
            )
    kept = config._kept_weights
    saved = load_file(kept) if kept is not None else load_peft_weights(model_name_or_path, device="cpu", **kwargs)
    if problem := impossible_tensor(saved):
        raise ValueError(f"The saved adapter is damaged: {problem} The model is left as it was.")
    found = restored_bases(saved, config.save_dtype)
    places = {
        tensor_key(PREFIX + name, kind): getattr(layer, kind).stored_parameter(adapter_name)
        for name, layer in layers.items()
        for kind in TENSORS
        if adapter_name in getattr(layer, kind)
    }
    _check_same_places(places, found, model_name_or_path)
    for key, place in places.items():
        place.copy_(found[key])


def _check_same_places(places: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> None:
    if differing := sorted(places.keys() ^ found.keys()):
        where = "the model" if differing[0] in places else source
        raise ValueError(
            f"The adapters are of different layers: only {where} has {differing[0]!r} ({len(differing)} such). Load "
            "the adapter beside the other one instead (`load_adapter`)."
        )
    for key, place in places.items():
        if found[key].shape != place.shape:
            raise ValueError(
                f"{key!r} has shape {tuple(found[key].shape)} in {source} and {tuple(place.shape)} in the "
                "model. Adapters of other ranks are loaded beside the old one (`load_adapter`)."
            )
