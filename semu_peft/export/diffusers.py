"""Ship a pipeline's adapter: as a LoRA file for diffusers or ComfyUI, as a PEFT folder, or merged into the pipeline."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from transformers import CLIPTextModel

from semu_peft.adapter.whole_model import merge_and_remove
from semu_peft.files import folder_written_whole, save_tensors
from semu_peft.tuner.adapted import base_model, semu_layers
from semu_peft.tuner.adapter_file import forget_older_weights, keep_weights
from semu_peft.tuner.keys import PREFIX, without_prefix, without_wrappers
from semu_peft.tuner.layer import SemuLayer
from semu_peft.tuner.misnomers import check_order
from semu_peft.tuner.model_card import CARD_NAME, card_in, write_model_card
from semu_peft.tuner.parameter import ParamWrapper

from .kohya import kohya_tensors
from .lora import as_json
from .lora_pairs import LoraPair, layers_to_export, lora_pair, one_rank

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"  # diffusers' name for the settings in a file's header


def save_as_diffusers_lora(
    pipe: Any,
    path: str | Path,
    *,
    format: Literal["diffusers", "kohya"] = "diffusers",
    weight_name: str = WEIGHT_NAME,
    adapter_name: str = "default",
) -> Path:
    """Write a pipeline's SEMU adapter as the LoRA file that `pipe.load_lora_weights` reads, with the same `ΔW`.

    All components with an adapter of that name go into the one file (U-Net or transformer, text encoders), linear
    layers and convolutions. Every layer has the same rank, padded with zeros, and `α` is that rank, so that readers of
    every version scale by 1, whether they look at the file's settings or not. Loading needs diffusers and PEFT but not
    `semu_peft`. The same adapter gives the same bytes.

    Args:
        pipe: A pipeline with a SEMU adapter.
        path: The folder to write to.
        format: `"diffusers"`, which ComfyUI reads too for Flux and Stable Diffusion 3; or `"kohya"` for ComfyUI, WebUI,
            Forge and sd-scripts with Stable Diffusion 1, 2 and XL, whose names they do not know otherwise.
        weight_name: The file's name.
        adapter_name: The adapter to export.

    Returns:
        The file.

    Raises:
        ValueError: No component has such an adapter, the format has no place for one that has or for one of its
            layers, or the adapter is no LoRA; nothing is written then.
        TypeError: The arguments are in PEFT's order, the path first.

    Examples:
        >>> import tempfile
        >>> from semu_peft import SemuConfig, save_as_diffusers_lora
        >>> # `pipe` is a loaded pipeline, of Stable Diffusion here
        >>> pipe.unet.add_adapter(SemuConfig(target_modules=["attn2.to_k"], r=2, init_weights=False))
        >>> save_as_diffusers_lora(pipe, tempfile.mkdtemp()).name  # and elsewhere: pipe.load_lora_weights(folder)
        'pytorch_lora_weights.safetensors'
    """
    check_order("save_as_diffusers_lora(pipe, path)", pipe)
    if format not in ("diffusers", "kohya"):
        raise ValueError(f"`format` must be 'diffusers' or 'kohya', got {format!r}.")
    components = dict(_adapted_components(pipe, adapter_name))
    if not components:
        raise ValueError(f"No component of this {type(pipe).__name__} has a SEMU adapter {adapter_name!r}.")
    pairs = one_rank(
        {
            f"{component}.{name}": pair
            for component, model in components.items()
            for name, pair in _pairs(component, model, adapter_name).items()
        }
    )
    target = Path(path) / weight_name
    if format == "kohya":
        return save_tensors(target, _contiguous(kohya_tensors(pipe, pairs)))
    _check_places(pipe, list(components))
    pairs |= _pairs_of_namesakes(components, pairs)
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for component, model in components.items():
        inside = {key.partition(".")[2]: pair for key, pair in pairs.items() if key.startswith(f"{component}.")}
        for name, pair in inside.items():
            layer = f"{component}.{_as_always(model, name)}"
            tensors |= {f"{layer}.lora_A.weight": pair.down, f"{layer}.lora_B.weight": pair.up}
        rank = next(iter(inside.values())).rank
        # All that old and new versions of PEFT have in common, and need. Names without `text_model.` mean the layer
        # with it as well, as PEFT matches endings.
        names = sorted(name.removeprefix("text_model.") for name in inside)
        settings |= {f"{component}.{key}": value for key, value in _settings(rank, names).items()}
    return save_tensors(target, _contiguous(tensors), {_METADATA: json.dumps(settings, sort_keys=True)})


def save_adapter(model: nn.Module, path: str | Path, *, adapter_name: str = "default") -> Path:
    """Save an adapter that was injected into a bare model (`unet.add_adapter`) as a PEFT folder.

    `PeftModel.from_pretrained(unet, path)` loads it; as that works in place, the pipeline then has it too.

    Args:
        model: The model with the adapter.
        path: The folder to write `adapter_config.json`, `adapter_model.safetensors` and the card, `README.md`, to. What
            somebody wrote into a card that is there stays.
        adapter_name: The adapter to save.

    Returns:
        The folder.

    Raises:
        ValueError: The model has no such adapter.
        TypeError: The arguments are in PEFT's order, the path first.

    Examples:
        >>> import tempfile
        >>> from peft import PeftModel, inject_adapter_in_model
        >>> from torch import nn
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.export.diffusers import save_adapter
        >>> config = SemuConfig(target_modules=["0"], r=2, init_weights=False)
        >>> model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(4, 3)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     loaded = PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 3)), save_adapter(model, folder))
        >>> loaded.peft_config["default"].ranks
        {'0': 2}
    """
    check_order("save_adapter(model, path)", model)
    root: Any = base_model(model)
    config = next(iter(semu_layers(model, adapter_name).values())).configs[adapter_name]
    state_dict = get_peft_model_state_dict(root, adapter_name=adapter_name, save_embedding_layers=False)
    weights = {f"{PREFIX}{without_prefix(key)}": value.cpu() for key, value in state_dict.items()}
    older = card_in(Path(path))
    with folder_written_whole(path, [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CARD_NAME]) as folder:
        save_tensors(folder / SAFETENSORS_WEIGHTS_NAME, weights)
        settings = {**config.to_dict(), "inference_mode": True, "weights_sha256": keep_weights(folder)}
        (folder / CONFIG_NAME).write_text(json.dumps(as_json(settings), indent=2, sort_keys=True), encoding="utf-8")
        write_model_card(folder, settings, older)
    forget_older_weights(Path(path), settings["weights_sha256"])
    return Path(path)


def merge_pipeline(pipe: Any, *, adapter_name: str = "default") -> Any:
    """Merge the adapter into the weights of every component that has it, in place: a stock pipeline remains.

    `pipe.save_pretrained` then writes an ordinary checkpoint.

    Args:
        pipe: The pipeline, changed in place.
        adapter_name: The adapter to merge.

    Returns:
        The pipeline.

    Raises:
        ValueError: No component has such an adapter; or see
            [`merge_and_remove`][semu_peft.adapter.whole_model.merge_and_remove].
    """
    components = dict(_adapted_components(pipe, adapter_name))
    if not components:
        raise ValueError(f"No component of this {type(pipe).__name__} has a SEMU adapter {adapter_name!r}.")
    for name, model in components.items():
        setattr(pipe, name, base_model(model))  # out of `get_peft_model`'s wrapper, where it has one
        merge_and_remove(getattr(pipe, name), adapter_name=adapter_name)
    return pipe


def _adapted_components(pipe: Any, adapter_name: str) -> Iterator[tuple[str, nn.Module]]:
    for name, model in pipe.components.items():
        if isinstance(model, nn.Module) and any(
            isinstance(layer, SemuLayer) and adapter_name in layer.semu_core for layer in model.modules()
        ):
            yield name, model


def _pairs(component: str, model: nn.Module, adapter_name: str) -> dict[str, LoraPair]:
    layers = layers_to_export(model, adapter_name)
    config = next(iter(layers.values())).configs[adapter_name]
    more = {name: getattr(config, name) for name in ("modules_to_save", "trainable_token_indices")}
    more |= {"bias": config.bias if config.bias != "none" else None}
    unfit = [f"`{name}`={value!r}" for name, value in more.items() if value]
    unfit += [f"a corrected {type(layer).__name__}, {name!r}" for name, layer in layers.items() if _is_unfit(layer)]
    if unfit:
        raise ValueError(
            f"The adapter of {component!r} has {unfit[0]}, which LoRA files of pipelines have no place for: merge the "
            "adapter (`merge_pipeline`) instead."
        )
    return {name: lora_pair(layer, name, adapter_name) for name, layer in layers.items()}


def _is_unfit(layer: SemuLayer) -> bool:
    return isinstance(layer, ParamWrapper) or isinstance(layer.get_base_layer(), nn.Embedding)


def _check_places(pipe: Any, components: list[str]) -> None:
    if not hasattr(pipe, "save_lora_weights"):
        raise ValueError(f"{type(pipe).__name__} has no LoRA format of its own: use `save_adapter` on its denoiser.")
    accepted = inspect.signature(pipe.save_lora_weights).parameters
    for component in components:
        if f"{component}_lora_layers" not in accepted:
            raise ValueError(
                f"The LoRA format of {type(pipe).__name__} has no place for an adapter in {component!r}: merge that "
                "component (`merge_pipeline`), or ship it with `save_adapter`."
            )


def _pairs_of_namesakes(components: Mapping[str, nn.Module], pairs: Mapping[str, LoraPair]) -> dict[str, LoraPair]:
    """Pairs of zeros for layers that a reader without the settings corrects too, as their names end alike.

    Left out of the file, they would be corrected by whatever is in memory (Flux has a `proj_out` in every block).
    """
    found = {}
    rank = next(iter(pairs.values())).rank
    for component, model in components.items():
        names = {key.partition(".")[2].removeprefix("text_model.") for key in pairs if key.startswith(f"{component}.")}
        endings = tuple(f".{name}" for name in names)
        for path, module in base_model(model).named_modules():
            name = without_wrappers(path)
            if name.endswith(endings) and name.removeprefix("text_model.") not in names:
                found[f"{component}.{name}"] = _zeros(module, name, rank)
    return found


def _zeros(module: nn.Module, name: str, rank: int) -> LoraPair:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    weight: Any = getattr(base, "weight", None)
    if isinstance(base, nn.Linear):
        return LoraPair(weight.new_zeros(rank, base.in_features), weight.new_zeros(base.out_features, rank))
    if isinstance(base, nn.Conv2d) and base.groups == 1:
        down = weight.new_zeros(rank, base.in_channels, *base.kernel_size)
        return LoraPair(down, weight.new_zeros(base.out_channels, rank, 1, 1))
    raise ValueError(
        f"{name!r}, a {type(base).__name__}, ends as a corrected layer does, and diffusers would correct both: leave "
        "that layer out of `target_modules`, or merge the adapter (`merge_pipeline`)."
    )


def _as_always(model: nn.Module, name: str) -> str:
    # transformers 5 has taken a level out of this model, which readers of every version expect in a file.
    flat = isinstance(base_model(model), CLIPTextModel) and not name.startswith("text_model.")
    return f"text_model.{name}" if flat else name


def _settings(rank: int, names: list[str]) -> dict[str, Any]:
    # diffusers up to 0.36 asks for the patterns by name, though nothing is in them.
    return {"r": rank, "lora_alpha": rank, "target_modules": names, "rank_pattern": {}, "alpha_pattern": {}}


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.float().cpu().contiguous() for key, tensor in tensors.items()}
