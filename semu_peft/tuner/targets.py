"""What can be corrected, and by which SEMU layer; the rest is refused before a model is changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .adapted import uncompiled
from .config import SemuConfig
from .conv import Conv1d, Conv2d, Conv3d
from .embedding import Embedding
from .keys import without_wrappers
from .layer import SemuLayer
from .linear import NEVER_CALLED, UNKNOWN_QUANTIZATION, Linear
from .parameter import ParamWrapper
from .patterns import match_pattern, unmatched
from .quantized import QuantizedLinear, quantization_backend
from .state_space import read_past_layer
from .tied import TiedLayer

LAYER_CLASSES: dict[type[nn.Module], type[SemuLayer]] = {
    nn.Linear: Linear,
    Conv1D: Linear,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.Embedding: Embedding,
    nn.MultiheadAttention: ParamWrapper,
}


def layer_class(module: nn.Module, name: str) -> type[SemuLayer]:
    """The SEMU layer for a module of that name; raise where there is none."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    backend = quantization_backend(base)
    if backend is not None and backend.supports_merge:
        return QuantizedLinear
    kind = next((kind for kind in LAYER_CLASSES if isinstance(base, kind)), None)
    reason: str | None = UNKNOWN_QUANTIZATION if backend else "that type is not supported"
    if kind and not backend:
        reason = LAYER_CLASSES[kind].refusal(base)
        if reason is None:
            return LAYER_CLASSES[kind]
    parameters = [f"{name}.{key}" for key, p in base.named_parameters() if p.dim() in (2, 3)]
    also = f"; or correct its parameters themselves, `target_parameters={parameters[:2]}`" if parameters else ""
    supported = ", ".join(cls.__name__ for cls in LAYER_CLASSES) + ", linear layers quantised by bitsandbytes, torchao"
    raise TypeError(
        f"SEMU cannot correct target module {name!r}, a {type(base).__name__}: {reason}. Supported are {supported} "
        f"or HQQ: name such layers in `target_modules`, or put this one into `exclude_modules`{also}."
    )


def check_target(model: nn.Module, module: nn.Module, name: str) -> None:
    """Raise a `TypeError` unless the module of that name in the model can be corrected where it stands."""
    layer_class(module, name)
    parent, _, child = name.rpartition(".")
    if read_past_layer(uncompiled(model.get_submodule(parent)), child):
        raise TypeError(
            f"SEMU cannot correct target module {name!r}: the fused kernels of {type(model).__name__}'s state-space "
            "layers read its weight without calling it. Leave it out of `target_modules` (`in_proj` can be corrected), "
            "or put it into `exclude_modules`."
        )


def check_names_of_ranks(config: SemuConfig, names: Collection[str], model_name: str) -> None:
    """Raise where the wished or the recorded ranks name layers that the model does not have.

    Args:
        config: The adapter's configuration.
        names: The full names of the model's modules and parameters.
        model_name: The model's class, for the error.
    """
    if unknown := unmatched(config.rank_pattern, names):
        raise ValueError(
            f"`rank_pattern` names layers that {model_name} does not have: {unknown[:3]} ({len(unknown)} in all). Name "
            "layers by their full names, by how those end, or by a regular expression."
        )
    if foreign := sorted(set(config.ranks) - set(names)):
        raise ValueError(
            f"`ranks` names layers that {model_name} does not have: {foreign[:3]} ({len(foreign)} in all). The adapter "
            "was made for another architecture: load it onto the model it was trained on, or clear `ranks` to start "
            "afresh. Where the layers only have other names (`key_mapping`), load its configuration with "
            "`SemuConfig.from_pretrained`, rename them in `ranks`, `offsets` and `target_modules`, and pass it as "
            "`config` together with `key_mapping`."
        )


_GENERATES = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def check_task(config: SemuConfig, model: nn.Module) -> None:
    """Raise where PEFT's class for the task would look for methods that the model does not have."""
    task = getattr(config.task_type, "value", config.task_type)
    if task in _GENERATES and not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(
            f"`task_type` must fit the model, got {task!r} for {type(model).__name__}, which does not generate. Leave "
            "`task_type` out: the adapter works all the same."
        )


def check_trained_in_full(config: SemuConfig, model: nn.Module, is_target: Callable[[str], bool]) -> None:
    """Raise where something is to be corrected and trained in full at once, or tokens of what has none.

    Args:
        config: The adapter's configuration.
        model: The model.
        is_target: Whether the layer of this full name is corrected.
    """
    indices = config.trainable_token_indices
    tokens = list(indices) if isinstance(indices, dict) else []
    for path, module in model.named_modules():
        name = without_wrappers(path)
        inside: Any = uncompiled(module)
        base = inside.get_base_layer() if isinstance(inside, BaseTunerLayer) else inside
        ours = isinstance(inside, SemuLayer)
        for argument, names in (("modules_to_save", config.modules_to_save), ("trainable_token_indices", tokens)):
            named = [each for each in names or () if path == name and f".{name}".endswith(f".{each}")]
            if named and (ours or is_target(name)):
                raise ValueError(
                    f"`{argument}` must name modules that are not corrected, got {named[0]!r}, which means {name!r}: "
                    "it is in `target_modules` as well, or has an adapter. Name it in one of the two."
                )
            if named and argument == "trainable_token_indices" and not isinstance(base, (nn.Embedding, nn.Linear)):
                raise ValueError(
                    f"`trainable_token_indices` must name embeddings, got {named[0]!r}, which is a "
                    f"{type(base).__name__}. Name the token embedding, or give the indices as a list."
                )


def untied(names: Any, tied: set[str]) -> set[str]:
    """The names, or name endings, but those that mean one of the tied modules."""
    return {name for name in names or () if not any(f".{key}".endswith(f".{name}") for key in tied)}


def check_tied(model: Any, module: nn.Module, name: str) -> None:
    """Raise unless a module that is to be tied to the input embedding has its weight, and no adapter of its own."""
    source = model.get_input_embeddings()
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(module, BaseTunerLayer) and not isinstance(module, TiedLayer):
        raise ValueError(f"{name!r} has an adapter of its own already, so that it cannot be tied to the embedding now.")
    if not isinstance(base, (nn.Linear, nn.Embedding)) or base.weight is not source.weight:
        raise ValueError(
            f"`ensure_weight_tying`: {name!r} is said to be tied to the input embedding, but does not hold its weight. "
            "Call `model.tie_weights()` first, or set `ensure_weight_tying=False`."
        )


def check_experts(config: SemuConfig, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise where `target_experts` names what is not corrected, is not fused, or has fewer experts.

    Args:
        config: The adapter's configuration.
        parameters: The parameters that it corrects, by full name.
    """
    if unknown := unmatched(config.target_experts, parameters):
        raise ValueError(
            f"`target_experts` must name parameters that are corrected, got {unknown[:3]}. Name them in "
            "`target_parameters` as well; an expert that is a layer of its own goes by its name in `target_modules`."
        )
    for name, parameter in parameters.items():
        experts = match_pattern(config.target_experts, name)
        if experts is not None and (parameter.dim() != 3 or max(experts) >= len(parameter)):
            raise ValueError(
                f"`target_experts` must be indices of experts of {name!r}, got {experts} for its shape "
                f"{tuple(parameter.shape)}. Fused experts are `(experts, m, n)`, counted from 0."
            )


def check_parameter(model: nn.Module, name: str, parameter: nn.Parameter, also_as_layer: bool) -> None:
    """Raise unless the parameter of that full name in the model without adapters can be corrected as one."""
    owner_name, _, short_name = name.rpartition(".")
    if not owner_name:
        raise ValueError(
            f"Target parameter {name!r} belongs to the top-level {type(model).__name__}, where nothing can be put in "
            "its place. Put the model into a module of its own, or take another parameter."
        )
    owner: Any = model.get_submodule(owner_name)
    if also_as_layer or (isinstance(owner, SemuLayer) and not isinstance(owner, ParamWrapper)):
        raise ValueError(
            f"{owner_name!r} is named in `target_modules` and its {short_name!r} in `target_parameters`. Leave one of "
            "them out; with `target_modules=[]` only the parameters are corrected."
        )
    owner = owner.get_base_layer() if isinstance(owner, BaseTunerLayer) else owner
    reason = None
    if isinstance(owner, (nn.MultiheadAttention, NEVER_CALLED)):
        reason = "an `nn.MultiheadAttention` is corrected as a whole, so name the module in `target_modules`"
    if parameter.dim() not in (2, 3) or not parameter.is_floating_point():
        reason = f"it has shape {tuple(parameter.shape)} and dtype {parameter.dtype}"
    if reason:
        raise TypeError(
            f"SEMU cannot correct target parameter {name!r}: {reason}. Supported are floating-point parameters of two "
            "or three dimensions, of modules that are called; name layers in `target_modules` instead."
        )
