"""The tuner: which layers become SEMU layers, and how their weights are named in a file."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, cast_adapter_dtype
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, _get_submodules
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .adapted import base_model
from .config import SemuConfig
from .conv import Conv1d, Conv2d, Conv3d
from .embedding import Embedding
from .layer import SemuLayer
from .linear import Linear

LAYER_CLASSES: dict[type[nn.Module], type[SemuLayer]] = {
    nn.Linear: Linear,
    Conv1D: Linear,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.Embedding: Embedding,
}


class SemuModel(BaseTuner):
    """A model whose target layers carry SEMU corrections; made by `peft.get_peft_model(model, SemuConfig(...))`.

    Source: Sendera et al., *SEMU: Singular Value Decomposition for Efficient Machine Unlearning*, ICML 2025,
    arXiv 2502.07587, section 3.

    Args:
        model (`torch.nn.Module`): The model to adapt.
        config ([`SemuConfig`]): The adapter's configuration.
        adapter_name (`str`): The adapter's name, `"default"` unless PEFT is told otherwise.
        low_cpu_mem_usage (`bool`): Create the adapter on the meta device, to be filled by loading.
    """

    prefix: str = "semu_"
    tuner_layer_cls = SemuLayer
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        # Ranks are written into the configuration, so each adapter has its own, whatever else the caller uses it for.
        own = copy.deepcopy(peft_config)
        for name, config in self.peft_config.items():
            if config is peft_config:
                self.peft_config[name] = own
        return super()._prepare_adapter_config(own, model_config)

    def _prepare_model(self, peft_config: SemuConfig, model: nn.Module) -> None:  # type: ignore[override]
        if "_requires_grad_before" not in vars(self):
            self._requires_grad_before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        # PEFT replaces layer after layer: what cannot work must be refused before the first one.
        names = dict(model.named_modules())
        unknown = sorted(set(peft_config.rank_pattern) - set(names))
        if unknown:
            raise ValueError(
                f"`rank_pattern` names layers that {type(model).__name__} does not have: {unknown[:3]} ({len(unknown)} "
                "in all). The adapter was made for another architecture: load it onto the model it was trained on, or "
                "clear `rank_pattern` to start afresh."
            )
        targets: SemuConfig = peft_config
        wanted: Any = nn.Module
        if peft_config.target_modules == "all-linear":  # PEFT resolves it later; all but the excluded are meant
            targets, wanted = copy.copy(peft_config), (nn.Linear, Conv1D)
            targets.target_modules = ".*"
        inside = tuple(f"{name}." for name, module in names.items() if isinstance(module, BaseTunerLayer))
        for name, module in names.items():
            if not name or name.startswith(inside) or not isinstance(module, wanted):
                continue
            if self._check_target_module_exists(targets, name):
                _layer_class(module, name)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: SemuConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        ranks = peft_config.rank_pattern
        known = current_key in ranks
        rank = ranks[current_key] if known else 0
        if peft_config.init_weights is not True:
            rank = rank if known else (peft_config.r or 0)
        if isinstance(target, SemuLayer):
            target.update_layer(adapter_name, rank=rank, config=peft_config, known=known)
        else:
            layer_class = _layer_class(target, current_key)
            new_module = layer_class(target, adapter_name, config=peft_config, rank=rank, known=known)
            if adapter_name not in self.active_adapters:
                new_module.requires_grad_(False)
            self._replace_module(parent, target_name, new_module, target)
            target = new_module
        if peft_config.init_weights is not True:
            ranks[current_key] = target.r[adapter_name]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if autocast_adapter_dtype:
            cast_adapter_dtype(self.model, adapter_name=adapter_name)
            return
        for layer in self.model.modules():
            if isinstance(layer, SemuLayer) and adapter_name in layer.semu_core:
                dtype = layer.get_base_layer().weight.dtype
                if dtype.is_floating_point:
                    layer.semu_U[adapter_name] = layer.semu_U[adapter_name].to(dtype)
                    layer.semu_V[adapter_name] = layer.semu_V[adapter_name].to(dtype)
                    layer.semu_core[adapter_name].data = layer.semu_core[adapter_name].data.to(dtype)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        problem = _mismatch(model, adapter_name, remapped)
        if problem:
            name = type(base_model(model)).__name__
            if config.inference_mode or not _has_basis(model, adapter_name):
                _withdraw(model, adapter_name)
            raise ValueError(
                f"The saved adapter does not fit {name}: {problem} It was trained on another architecture or rank: "
                "load it onto the model named in its adapter_config.json. The model given is left as it was."
            )
        return remapped


def _layer_class(module: nn.Module, name: str) -> type[SemuLayer]:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    kind = next((kind for kind in LAYER_CLASSES if isinstance(base, kind)), None)
    reason = LAYER_CLASSES[kind].refusal(base) if kind else "that type is not supported"
    if kind and reason is None:
        return LAYER_CLASSES[kind]
    supported = ", ".join(cls.__name__ for cls in LAYER_CLASSES)
    raise TypeError(
        f"SEMU cannot correct target module {name!r}, a {type(base).__name__}: {reason}. Supported are {supported}: "
        "name such layers in `target_modules`, or put this one into `exclude_modules`."
    )


def _mismatch(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> str | None:
    """Say in a sentence how the adapter's tensors in `state_dict` differ from those in `model`, if they do."""
    expected: dict[str, torch.Size] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SemuLayer) and adapter_name in layer.semu_core:
            for kind in ("semu_U", "semu_V", "semu_core"):
                expected[f"{name}.{kind}.{adapter_name}"] = getattr(layer, kind)[adapter_name].shape
    found = {
        key: value.shape
        for key, value in state_dict.items()
        if ".semu_U" in key or ".semu_V" in key or ".semu_core" in key
    }
    # Where the layers were injected into a bare model, keys that match nothing keep PEFT's prefix.
    found = {key if key in expected else key.removeprefix("base_model.model."): shape for key, shape in found.items()}
    if missing := sorted(set(expected) - set(found)):
        return f"it has no weights for {missing[0]!r} ({len(missing)} such)."
    if extra := sorted(set(found) - set(expected)):
        return f"the model has no place for {extra[0]!r} ({len(extra)} such)."
    for key, shape in expected.items():
        if found[key] != shape:
            return f"{key!r} has shape {tuple(found[key])} in the file and {tuple(shape)} in the model."
    return None


def _has_basis(model: nn.Module, adapter_name: str) -> bool:
    """Whether the adapter had been in use before it was to be loaded over."""
    layers = [layer for layer in model.modules() if isinstance(layer, SemuLayer) and adapter_name in layer.semu_core]
    return any(not layer.semu_core[adapter_name].is_meta and layer.has_basis(adapter_name) for layer in layers)


def _withdraw(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter that could not be loaded out of the model again, leaving no trace of it."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SemuLayer) and adapter_name in layer.semu_core:
            layer.delete_adapter(adapter_name)
            if not layer.semu_core:
                parent, _, child = _get_submodules(model, name)
                setattr(parent, child, layer.base_layer)
        elif isinstance(layer, ModulesToSaveWrapper) and set(layer.modules_to_save) == {adapter_name}:
            parent, _, child = _get_submodules(model, name)
            setattr(parent, child, layer.original_module)
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    configs.pop(adapter_name, None)
    for module in list(model.modules()):
        if not configs and isinstance(module, SemuModel):
            if "peft_config" in vars(module.model):
                del module.model.peft_config
            for parameter, flag in module._requires_grad_before:
                parameter.requires_grad_(flag)
