"""How a LoRA's configuration names what is corrected, so that PEFT finds just that when it loads the file."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn

from semu_peft.tuner.adapted import base_model, exactly, targets_for
from semu_peft.tuner.keys import without_wrappers
from semu_peft.tuner.parameter import ParamWrapper

try:
    from peft.utils import transformers_weight_conversion as _conversion
except ImportError:  # it is only there with transformers 5 and a PEFT that knows of it
    _conversion = None  # type: ignore[assignment]


def lora_targets(model: nn.Module, names: Iterable[str]) -> tuple[list[str] | str, list[str]]:
    """`target_modules` for just these layers, and those of them that only `target_parameters` can name.

    In mixtures of experts of transformers 5, PEFT takes the names of projections (`gate_proj`, `up_proj`, `down_proj`
    …) for those of the experts, as they were before the experts were fused, and moves them to the fused parameters:
    also the names of dense and shared layers (github.com/huggingface/peft/issues/3711). Such a layer goes by the name
    of its weight, which stays and means the same: `mlp.gate_proj.weight` in `target_parameters`.

    Args:
        model: The model, with or without adapters.
        names: Full names of layers in the base model.

    Returns:
        `target_modules`, and the names of layers whose weight is to be in `target_parameters`.
    """
    root, every = base_model(model), list(names)
    moved = [name for name in every if _is_moved(root, name)]
    return targets_for(model, [name for name in every if name not in moved]), moved


def parameter_places(model: nn.Module, parameters: dict[str, ParamWrapper], weights: Iterable[str]) -> dict[str, str]:
    """Where PEFT's LoRA puts the correction of each parameter: wrappers around each other, the first one inmost.

    Args:
        model: The model with the adapter.
        parameters: The corrected parameters by their full names.
        weights: Full names of layers whose weight is corrected as a parameter.

    Returns:
        The module's name in the LoRA's file keys, for each parameter and each of those weights.

    Raises:
        ValueError: PEFT's LoRA of that parameter is wrong, or cannot be told from another one.
    """
    every = [without_wrappers(name) for name, _ in base_model(model).named_parameters()]
    places = {f"{name}.weight": name for name in weights}
    targeted = {*parameters, *places}
    for name in targeted:
        also = [other for other in every if other.endswith(f".{name}") and other not in targeted]
        if also:
            raise ValueError(
                f"LoRA's `target_parameters` cannot name {name!r} without {also[0]!r}, which ends alike and is not "
                "corrected: merge the adapter instead (`merge_and_unload`)."
            )
    for name, layer in parameters.items():
        if isinstance(layer.get_base_layer(), nn.MultiheadAttention):
            raise ValueError(
                f"{name!r} belongs to an `nn.MultiheadAttention`. PEFT's LoRA of it adds the correction of `out_proj` "
                "twice (peft 0.21, github.com/huggingface/peft/pull/3774), so no file is right wherever it is loaded: "
                "merge the adapter instead (`merge_and_unload`), or leave attentions out of `target_modules`."
            )
        owner = name.removesuffix(f".{layer.parameter_name}")
        siblings = [sibling for sibling, _ in layer.get_base_layer().named_parameters(recurse=False)]
        siblings = [sibling for sibling in siblings if f"{owner}.{sibling}" in parameters]
        places[name] = owner + ".base_layer" * (len(siblings) - 1 - siblings.index(layer.parameter_name))
    return places


def rank_patterns(ranks: dict[str, int], common: int) -> dict[str, int]:
    """The ranks that are not the common one, each under a pattern for that layer alone."""
    return {exactly(name): rank for name, rank in ranks.items() if rank != common}


def check_conversion(model: nn.Module, config: LoraConfig, state_dict: dict[str, Tensor]) -> None:
    """Raise where PEFT, on loading this LoRA onto this model, would rename a target or a tensor.

    PEFT rewrites a LoRA's targets and file keys from the names of transformers 4 to those of 5, and cannot know that
    a file has the new ones already. Its own conversion is run here on a copy.

    Args:
        model: The model that the LoRA is made of.
        config: Its configuration.
        state_dict: Its weights, with PEFT's file keys.

    Raises:
        ValueError: The LoRA would not be loaded as it is written.
    """
    root = base_model(model)
    if not _is_converted(root):
        return
    converted, error = copy.deepcopy(config), ""
    keys: Iterable[str] = ()
    try:
        _conversion.convert_peft_config_for_transformers(converted, root, None)
        keys = _conversion.convert_peft_adapter_state_dict_for_transformers(root, converted, dict(state_dict))
    except Exception as problem:  # of whatever kind, as it is PEFT's own
        error = f" ({type(problem).__name__}: {problem})"
    lost = sorted(_targets(config) ^ _targets(converted)) or sorted(set(state_dict) ^ set(keys))
    if lost or error:
        raise ValueError(
            f"PEFT's LoRA cannot be loaded onto a {type(root).__name__} as it is: PEFT converts names of transformers "
            f"4 on loading, and would change {', '.join(map(repr, lost[:2])) or 'them'}{error}. Merge the adapter "
            "instead (`merge_and_unload`), or ship it as it is (`save_pretrained`)."
        )


def _is_converted(root: nn.Module) -> bool:
    return _conversion is not None and hasattr(getattr(root, "config", None), "model_type")


def _is_moved(root: nn.Module, name: str) -> bool:
    if not _is_converted(root):
        return False
    config = LoraConfig(target_modules=[name])
    try:
        _conversion.convert_peft_config_for_transformers(config, root, None)
    except ValueError:  # one of several projections that PEFT takes for parts of a fused one
        return True
    return set(config.target_modules or ()) != {name}


def _targets(config: LoraConfig) -> set[str]:
    modules: Any = config.target_modules or ()
    return {*([modules] if isinstance(modules, str) else modules), *(config.target_parameters or ())}
