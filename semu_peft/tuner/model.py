"""The tuner: which layers become SEMU layers, and how their weights are named in a file."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, cast_adapter_dtype, find_parameter_name_by_module
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .adapted import base_model, semu_layers, targets_for
from .adapter_file import without_wrappers
from .attention import attention_weights, keep_called, keep_padded
from .config import SemuConfig
from .layer import SemuLayer
from .mixed_batch import adapter_per_example
from .parameter import ParamWrapper
from .patterns import match_pattern, name_matches
from .quantized import QuantizedLinear
from .reduced_bases import restored_bases, rounded_bases
from .targets import check_parameter, check_tied, layer_class, untied
from .tied import TiedLayer, part_shared_embeddings
from .weighted import CombinationType, WeightedSum
from .whole_model import restore_layers


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
        own: Any = copy.deepcopy(peft_config)
        for name, config in self.peft_config.items():
            if config is peft_config:
                self.peft_config[name] = own
        if own.target_modules is None and own.target_parameters:
            default = self.target_module_mapping.get(model_config["model_type"])
            own.target_modules = default if isinstance(default, str) else set(default or ())
        return super()._prepare_adapter_config(own, model_config)

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # PEFT looks for these among the layers alone; `_prepare_model` refuses names that the model does not have.
            warnings.filterwarnings("ignore", message="The following rank_pattern keys")
            super().inject_adapter(*args, **kwargs)

    def _check_new_adapter_config(self, config: SemuConfig) -> None:  # type: ignore[override]
        super()._check_new_adapter_config(config)
        wanted = set(config.target_parameters or ())
        for name, other in self.peft_config.items():
            theirs = set(getattr(other, "target_parameters", None) or ())
            if wanted and theirs and wanted != theirs:  # a file names a wrapper by its place among the others
                raise ValueError(
                    "All adapters of a model must have the same `target_parameters`, if any: the new one has "
                    f"{sorted(wanted)}, {name!r} has {sorted(theirs)}."
                )
            if getattr(other, "ensure_weight_tying", False) != config.ensure_weight_tying:
                raise ValueError(
                    "All adapters of a model must have the same `ensure_weight_tying`: the new one has "
                    f"{config.ensure_weight_tying}, {name!r} has {not config.ensure_weight_tying}."
                )

    def _check_tied_modules(self, model: Any, peft_config: Any) -> None:
        # PEFT knows tied layers by two usual names; here the embedding counts by whatever name it is targeted.
        if peft_config.ensure_weight_tying and peft_config.target_modules and hasattr(model, "get_input_embeddings"):
            embedding = find_parameter_name_by_module(model, model.get_input_embeddings())
            tied = self._get_module_names_tied_with_embedding()
            if tied and self._check_target_module_exists(peft_config, embedding):
                self._add_targets_to_tie(peft_config, tied)
                return
        super()._check_tied_modules(model, peft_config)

    def _check_merge_allowed(self) -> None:
        if not all(getattr(config, "ensure_weight_tying", False) for config in self.peft_config.values()):
            super()._check_merge_allowed()  # warns of tied weights, which are merged once where they are tied here

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        tied = {without_wrappers(name) for name in tied_weight_keys}
        peft_config.target_modules_to_tie = tied
        embedding = find_parameter_name_by_module(self.model, self.model.get_input_embeddings())
        wanted = peft_config.target_modules
        if isinstance(wanted, str):
            peft_config.target_modules = rf"(?:{wanted}|^{re.escape(embedding)}$)"
        else:
            peft_config.target_modules = untied(wanted, tied) | {embedding}

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        tied = {without_wrappers(name) for name in tied_weight_keys}
        peft_config.modules_to_tie = tied
        embedding = find_parameter_name_by_module(self.model, self.model.get_input_embeddings())
        peft_config.modules_to_save = sorted(untied(peft_config.modules_to_save, {*tied, embedding}) | {embedding})

    def _prepare_model(self, peft_config: SemuConfig, model: nn.Module) -> None:  # type: ignore[override]
        if "_requires_grad_before" not in vars(self):
            self._requires_grad_before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        part_shared_embeddings(model, getattr(peft_config, "target_modules_to_tie", None) or ())
        # PEFT replaces layer after layer: what cannot work must be refused before the first one.
        names = dict(model.named_modules())
        parameters = {
            without_wrappers(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        patterns = peft_config.rank_pattern
        known = {*names, *parameters}
        unknown = [
            key for key in sorted(patterns) if key not in known and not any(name_matches(name, key) for name in known)
        ]
        if unknown:
            raise ValueError(
                f"`rank_pattern` names layers that {type(model).__name__} does not have: {unknown[:3]} ({len(unknown)} "
                "in all). The adapter was made for another architecture: load it onto the model it was trained on, or "
                "clear `rank_pattern` to start afresh."
            )
        # A key that is a layer's full name means that layer alone; the others are endings or expressions.
        loose = {key: rank for key, rank in patterns.items() if key not in known}
        found: list[str] = []
        targets: SemuConfig = peft_config
        wanted: Any = nn.Module
        if peft_config.target_modules == "all-linear":  # PEFT resolves it later; all but the excluded are meant
            targets, wanted = copy.copy(peft_config), (nn.Linear, Conv1D)
            targets.target_modules = ".*"
        inside = tuple(f"{name}." for name, module in names.items() if isinstance(module, BaseTunerLayer))
        for name, module in names.items():
            if not name or name.startswith(inside) or not isinstance(module, wanted):
                continue
            if self._check_tied_module_exists(peft_config, name):
                check_tied(model, module, name)
            elif self._check_target_module_exists(targets, name):
                layer_class(module, name)
                found.append(name)
        for name, parameter in parameters.items():
            if any(name == target or name.endswith(f".{target}") for target in peft_config.target_parameters or ()):
                owner = name.rpartition(".")[0]
                also = bool(owner) and bool(self._check_target_module_exists(targets, owner))
                check_parameter(model, name, parameter, also)
                found.append(name)
        wished = ((name, patterns.get(name, match_pattern(loose, name))) for name in found)
        peft_config.rank_pattern = {name: rank for name, rank in wished if rank is not None}

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
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        layer: nn.Module = target
        if self._check_tied_module_exists(peft_config, current_key):
            if not isinstance(target, TiedLayer):
                layer = TiedLayer.of(target, self.model.get_input_embeddings())
        elif parameter_name is None and isinstance(base, nn.MultiheadAttention):
            for weight in attention_weights(base):
                layer = self._correct(peft_config, adapter_name, layer, f"{current_key}.{weight}", weight)
        else:
            layer = self._correct(peft_config, adapter_name, target, current_key, parameter_name)
        if layer is not target:
            keep_called(layer, parent)
            self._handles = [*vars(self).get("_handles", ()), *keep_padded(self.model, current_key)]
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _correct(
        self, config: SemuConfig, adapter_name: str, target: nn.Module, name: str, parameter_name: str | None
    ) -> nn.Module:
        """Add the adapter to a layer, or to a parameter of it, under its full `name`; return what takes its place."""
        ranks = config.rank_pattern
        known = name in ranks
        rank = ranks[name] if known else 0
        if config.init_weights is not True:
            rank = rank if known else (config.r or 0)
        existing: nn.Module | None = target
        if parameter_name is not None:
            existing = target.wrapper_of(parameter_name) if isinstance(target, ParamWrapper) else None
        if isinstance(existing, SemuLayer):
            existing.update_layer(adapter_name, rank=rank, config=config, known=known)
            layer, result = existing, target
        elif parameter_name is not None:
            result = layer = ParamWrapper(target, adapter_name, config, rank, known, parameter_name=parameter_name)
        else:
            kind = layer_class(target, name)
            more = get_quantization_kwargs(self.model) if kind is QuantizedLinear else {}
            result = layer = kind(target, adapter_name, config, rank, known, **more)
        if config.init_weights is not True:
            ranks[name] = layer.r[adapter_name]
        return result

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own would move the adapter of an offloaded layer to the meta device, and hang the child's `weight` onto
        # the new module, which one with corrected parameters or trained token rows need not have.
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        self._remove_hooks()
        return model

    def _remove_hooks(self) -> None:
        for handle in vars(self).pop("_handles", ()):
            handle.remove()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if autocast_adapter_dtype:
            cast_adapter_dtype(self.model, adapter_name=adapter_name)
            return
        for layer in self.model.modules():
            if isinstance(layer, SemuLayer) and adapter_name in layer.semu_core:
                dtype = layer.weight.dtype
                if dtype.is_floating_point:
                    layer.semu_U[adapter_name] = layer.semu_U[adapter_name].to(dtype)
                    layer.semu_V[adapter_name] = layer.semu_V[adapter_name].to(dtype)
                    layer.semu_core[adapter_name].data = layer.semu_core[adapter_name].data.to(dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's hook for `model(..., adapter_names=[...])`: an adapter for each example of the batch."""
        names = kwargs.get("adapter_names")
        with adapter_per_example(self.model, names, kwargs.get("num_beams") or 1) if names else nullcontext():
            yield

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: CombinationType = "svd",
        svd_rank: int | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Add an adapter whose correction is the weighted sum of others', `ΔW = Σ wᵢ ΔWᵢ`, each at its current scale.

        As in LoRA the new adapter is neither active nor trainable until `set_adapter`. Its bases are orthonormal and
        its cores full. A layer's dense weight is formed only by the `combination_type`s that look at single entries.

        Args:
            adapters: Names of the adapters to add up; a layer takes part with those that it carries.
            weights: Their weights, which may be negative.
            adapter_name: The new adapter's name.
            combination_type: `"cat"`: exact, of the sum of the ranks (call [`rerank`][semu_peft.export.rerank] to cut
                it by energy). `"svd"`: the best approximation of rank `svd_rank`. `"linear"`: the sum of the cores,
                exact, for adapters that share their bases. `"ties_svd"`, `"dare_linear_svd"`, `"dare_ties_svd"` and
                `"magnitude_prune_svd"` as in LoRA: on the dense corrections, then as `"svd"`.
            svd_rank: The rank of the result, or less where there is no more; each layer's largest by default.
            density: Share of the entries to keep, for the last four.
            majority_sign_method: `"total"` or `"frequency"`, for `"ties_svd"` and `"dare_ties_svd"`.

        Raises:
            ValueError: The name is taken, an adapter does not exist, an argument is out of range, or the adapters
                cannot be added up: different `conv_mode`, different bases with `"linear"`, `trainable_token_indices`,
                or one `modules_to_save` in more than one of them. The model is as before then.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} already exists. Delete it first, or give the sum another name.")
        for name in adapters:
            if name not in self.peft_config:
                raise ValueError(f"Adapter {name} does not exist")
        rule = WeightedSum(adapters, weights, combination_type, svd_rank, density, majority_sign_method)
        saved = _modules_to_save_of(self.model, adapters)
        configs: list[Any] = [self.peft_config[name] for name in adapters]
        if any(config.trainable_token_indices for config in configs):
            raise ValueError("Adapters with `trainable_token_indices` cannot be added up: their rows are not weighted.")
        layers = {key: layer for name in adapters for key, layer in semu_layers(self.model, name).items()}
        convolutions = [key for key, layer in layers.items() if layer.weight.dim() > 2]
        if convolutions and len({config.conv_mode for config in configs}) > 1:
            raise ValueError(
                f"{adapters} read convolutions ({convolutions[0]!r} …) with different `conv_mode`, so their bases have "
                "nothing in common. Combine adapters of one `conv_mode`."
            )
        sums = {key: rule.at(layer, key) for key, layer in layers.items()}
        self.peft_config[adapter_name] = replace(
            configs[0],
            target_modules=targets_for(self.model, list(layers)),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            modules_to_save=sorted({name for config in configs for name in config.modules_to_save or []}) or None,
            rank_pattern={key: core.shape[-1] for key, (_, _, core) in sums.items()},
            r=None,
            core="full",
            init_weights=True,
            bias="none",
        )
        self.inject_adapter(self.model, adapter_name)
        for key, factors in sums.items():
            layers[key].set_basis(adapter_name, *factors)
        for wrapper, name in saved.items():
            wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[name].state_dict())

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SemuConfig,  # type: ignore[override]
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return rounded_bases(found, config.save_dtype)

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: SemuConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state_dict = restored_bases(state_dict, config.save_dtype)
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


def _modules_to_save_of(model: nn.Module, adapters: list[str]) -> dict[ModulesToSaveWrapper, str]:
    """The modules that one of the adapters trains in full, and which.

    Raises:
        ValueError: Several of them train the same module, which cannot be added up.
    """
    found: dict[ModulesToSaveWrapper, str] = {}
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            users = [adapter for adapter in adapters if adapter in wrapper.modules_to_save]
            if len(users) > 1:
                raise ValueError(
                    "Cannot add weighted adapters if they target the same module with modules_to_save, but "
                    f"{users} all train {name!r}."
                )
            if users:
                found[wrapper] = users[0]
    return found


def _mismatch(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> str | None:
    """Say in a sentence how the adapter's tensors in `state_dict` differ from those in `model`, if they do."""
    expected: dict[str, torch.Size] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SemuLayer) and adapter_name in layer.semu_core and not isinstance(layer, TiedLayer):
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
    restore_layers(model, adapter_name)
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    configs.pop(adapter_name, None)
    for module in list(model.modules()):
        if not configs and isinstance(module, SemuModel):
            if "peft_config" in vars(module.model):
                del module.model.peft_config
            module._remove_hooks()
            for parameter, flag in module._requires_grad_before:
                parameter.requires_grad_(flag)
