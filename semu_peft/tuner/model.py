"""The tuner: which layers become SEMU layers, and how their weights are named in a file."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    cast_adapter_dtype,
    find_parameter_name_by_module,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.quantization_utils import get_quantization_kwargs
from safetensors.torch import load_file
from torch import Tensor, nn

from semu_peft.arguments import check_adapter_name

from .adapted import initialized_layers, named_for_a_file, named_for_the_model, targets_for, uncompiled
from .all_layers import layers_that_pass, name_every_layer, word_in
from .attention import attention_weights, keep_called, keep_padded
from .config import SemuConfig
from .fused_experts import name_fused_experts
from .keys import (
    layer_of,
    renamed_as_saved,
    without_adapter_name,
    without_compilation,
    without_prefix,
    without_wrappers,
)
from .layer import SemuLayer
from .loading import check_uncompiled, fitted, impossible_tensor, keep_room_to_load, refuse, unless_refused
from .mixed_batch import adapter_per_example
from .ownership import remember_wish, take, wish_of
from .parameter import ParamWrapper
from .patterns import requested_rank
from .quantized import QuantizedLinear
from .reduced_bases import restored_bases, rounded_bases
from .targets import (
    check_experts,
    check_names_of_ranks,
    check_parameter,
    check_target,
    check_task,
    check_tied,
    check_trained_in_full,
    layer_class,
    untied,
)
from .tensors import left_out, places_of, with_values
from .tied import TiedLayer, part_shared_embeddings
from .weighted import AdapterSum, CombinationType, check_summable, config_of_the_sum, modules_to_save_of

_TRAINED_BESIDE = ("modules_to_save", "trainable_tokens_delta", "trainable_tokens_original")


class SemuModel(BaseTuner):
    """A model whose target layers carry SEMU corrections; made by `peft.get_peft_model(model, SemuConfig(...))`.

    Source: Sendera et al., *SEMU: Singular Value Decomposition for Efficient Machine Unlearning*, ICML 2025,
    arXiv 2502.07587, section 3.

    Args:
        model (`torch.nn.Module`): The model to adapt.
        config ([`SemuConfig`]): The adapter's configuration.
        adapter_name (`str`): The adapter's name, `"default"` unless PEFT is told otherwise.
        low_cpu_mem_usage (`bool`): Create the adapter on the meta device, to be filled by loading.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, SemuModel
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), SemuConfig(target_modules=["0"]))
        >>> isinstance(model.base_model, SemuModel)
        True
    """

    prefix: str = "semu_"
    tuner_layer_cls = SemuLayer
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config: Any = peft_config
        if config.target_modules is None and config.target_parameters:
            default = self.target_module_mapping.get(model_config["model_type"])
            config.target_modules = default if isinstance(default, str) else set(default or ())
        return super()._prepare_adapter_config(config, model_config)

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        # A compiled module and the one inside go by one name, that of the module in the plain model.
        if key.rpartition(".")[2] == "_orig_mod":
            return False
        return BaseTuner._check_target_module_exists(peft_config, without_compilation(key))

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, from_file: bool = True, **kwargs: Any
    ) -> None:
        config: Any = self.peft_config[adapter_name]
        take(config, model, adapter_name)
        wish = wish_of(config)
        try:
            with unless_refused(self, adapter_name), warnings.catch_warnings():
                # PEFT looks for these among layers alone; `_prepare_model` refuses names that the model does not have.
                warnings.filterwarnings("ignore", message="The following rank_pattern keys")
                if config.ranks and from_file:
                    check_uncompiled(model, config.modules_to_save)
                super().inject_adapter(model, adapter_name, *args, **_named_by_layer(kwargs))
        finally:
            remember_wish(config, wish)
        if (handle := keep_room_to_load(model)) is not None:
            self._handles = [*vars(self).get("_handles", ()), handle]
        layers = [layer for layer in self.model.modules() if isinstance(layer, SemuLayer)]
        names = {layer.layer_name for layer in layers if adapter_name in layer.semu_core}
        config.ranks = {name: rank for name, rank in config.ranks.items() if name in names}
        config.offsets = [name for name in config.offsets if name in names]

    def _check_new_adapter_config(self, config: SemuConfig) -> None:  # type: ignore[override]
        super()._check_new_adapter_config(config)
        self._check_same_parameters(config)
        for name, other in self.peft_config.items():
            if getattr(other, "ensure_weight_tying", False) != config.ensure_weight_tying:
                raise ValueError(
                    "All adapters of a model must have the same `ensure_weight_tying`: the new one has "
                    f"{config.ensure_weight_tying}, {name!r} has {not config.ensure_weight_tying}."
                )

    def _check_same_parameters(self, config: SemuConfig) -> None:
        parameters = set(config.target_parameters or ())
        for name, other in self.peft_config.items():
            others = set(getattr(other, "target_parameters", None) or ())
            if parameters and others and parameters != others:  # a file names a wrapper by its place among the others
                raise ValueError(
                    "All adapters of a model must have the same `target_parameters`, if any: the new one has "
                    f"{sorted(parameters)}, {name!r} has {sorted(others)}."
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
        for layer in self.model.modules():  # before the first of them is merged
            if isinstance(layer, SemuLayer) and any(layer.r.values()) and (reason := layer.no_place_for_merge()):
                raise ValueError(reason)
        if not all(getattr(config, "ensure_weight_tying", False) for config in self.peft_config.values()):
            super()._check_merge_allowed()  # warns of tied weights, which are merged once where they are tied here

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        tied = {without_wrappers(name) for name in tied_weight_keys}
        peft_config.target_modules_to_tie = tied
        embedding = find_parameter_name_by_module(self.model, self.model.get_input_embeddings())
        targets = peft_config.target_modules
        if isinstance(targets, str):
            peft_config.target_modules = rf"(?:{targets}|^{re.escape(embedding)}$)"
        else:
            peft_config.target_modules = untied(targets, tied) | {embedding}

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
        if any("_orig_mod" in name for name, _ in model.named_modules()):
            _name_as_uncompiled(peft_config)
        parameters = {
            without_wrappers(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        self._full_names = {*(without_wrappers(name) for name, _ in model.named_modules()), *parameters}
        mapping = getattr(model, "_checkpoint_conversion_mapping", None) or {}  # PEFT renames a file's keys by it
        if mapping and not self._full_names.issuperset(peft_config.ranks):
            peft_config.ranks = {renamed_as_saved(name, mapping): rank for name, rank in peft_config.ranks.items()}
            peft_config.offsets = [renamed_as_saved(name, mapping) for name in peft_config.offsets]
        check_names_of_ranks(peft_config, self._full_names, type(model).__name__)
        check, word = partial(check_target, model), word_in(peft_config)
        if word:
            name_every_layer(peft_config, model, check)
        name_fused_experts(peft_config, model, layers_that_pass(model, check), everything=word is not None)
        self._check_same_parameters(peft_config)
        self._check_target_modules(peft_config, model)
        targets = [f".{target}" for target in peft_config.target_parameters or ()]
        corrected = {name: each for name, each in parameters.items() if f".{name}".endswith(tuple(targets))}
        for name, parameter in corrected.items():
            owner = name.rpartition(".")[0]
            also_as_layer = bool(owner) and bool(self._check_target_module_exists(peft_config, owner))
            check_parameter(model, name, parameter, also_as_layer)
        check_experts(peft_config, corrected)
        check_task(peft_config, model)
        check_trained_in_full(
            peft_config, model, lambda name: bool(self._check_target_module_exists(peft_config, name))
        )

    def _check_target_modules(self, targets: SemuConfig, model: nn.Module) -> None:
        modules = {name: uncompiled(module) for name, module in model.named_modules()}
        inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
        for name, module in modules.items():
            if not name or name.startswith(inside):
                continue
            if self._check_tied_module_exists(targets, name):
                check_tied(model, module, name)
            elif self._check_target_module_exists(targets, name):
                check_target(model, module, name)

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
        target = uncompiled(target)  # a single compiled layer is run uncompiled once it is corrected
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
        name = without_wrappers(name)
        requested = requested_rank(config.rank_pattern, name, self._full_names)
        existing: nn.Module | None = target
        if parameter_name is not None:
            existing = target.wrapper_of(parameter_name) if isinstance(target, ParamWrapper) else None
        if isinstance(existing, SemuLayer):
            existing.update_layer(adapter_name, config, requested)
            return target
        if parameter_name is not None:
            return ParamWrapper(target, adapter_name, config, name, requested, parameter_name=parameter_name)
        kind = layer_class(target, name)
        more = get_quantization_kwargs(self.model) if kind is QuantizedLinear else {}
        return kind(target, adapter_name, config, name, requested, **more)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own would move the adapter of an offloaded layer to the meta device, and hang the child's `weight` onto
        # the new module, which one with corrected parameters or trained token rows need not have.
        setattr(parent, child_name, new_module)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_are_there(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _check_are_there(self, adapter_names: Any) -> None:
        # PEFT passes over names that it does not know: what is then shipped as merged has forgotten nothing.
        unknown = [] if isinstance(adapter_names, str) else set(adapter_names or ()) - set(self.peft_config)
        if unknown:
            raise ValueError(
                f"`adapter_names` must be names of adapters that are there, got {sorted(unknown)}. There are "
                f"{sorted(self.peft_config)}."
            )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        self._check_are_there(kwargs.get("adapter_names"))
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
                layer.follow_dtype(adapter_name)

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
            combination_type: `"cat"`: exact, of the sum of the ranks (cut it by energy with
                [`rerank`][semu_peft.adapter.rerank.rerank]). `"svd"`: the best approximation of rank `svd_rank`.
                `"linear"`: the sum of the cores, exact, for adapters that share their bases. `"ties_svd"`,
                `"dare_linear_svd"`, `"dare_ties_svd"` and `"magnitude_prune_svd"` as in LoRA: on the dense
                corrections, then as `"svd"`.
            svd_rank: The rank of the result, or less where there is no more; each layer's largest by default.
            density: Share of the entries to keep, for the last four.
            majority_sign_method: `"total"` or `"frequency"`, for `"ties_svd"` and `"dare_ties_svd"`.

        Raises:
            ValueError: The name is taken, an adapter does not exist, an argument is out of range, or the adapters
                cannot be added up: different `conv_mode`, different bases with `"linear"`, `trainable_token_indices`,
                or one `modules_to_save` in more than one of them. The model is as before then.
            NotInitializedError: One of them is not initialised.

        Examples:
            >>> from peft import get_peft_model
            >>> from torch import nn
            >>> from semu_peft import SemuConfig
            >>> config = SemuConfig(target_modules=["0"], r=2, init_weights=False)
            >>> model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
            >>> model.add_adapter("cats", config)
            >>> model.add_weighted_adapter(["default", "cats"], [1.0, 0.5], "both", combination_type="cat")
            >>> model.peft_config["both"].ranks
            {'0': 4}
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.peft_config:
            raise ValueError(
                f"`adapter_name` must be new, got {adapter_name!r}, which already exists. Delete it first, or give the "
                "sum another name."
            )
        rule = AdapterSum(adapters, weights, combination_type, svd_rank, density, majority_sign_method)
        for name in adapters:
            if name not in self.peft_config:
                raise ValueError(
                    f"`adapters` must be names of adapters that are there, got {name!r}, which does not exist. "
                    f"There are {sorted(self.peft_config)}."
                )
        layers = {key: layer for name in adapters for key, layer in initialized_layers(self.model, name).items()}
        configs = {name: self.peft_config[name] for name in adapters}
        check_summable(adapters, list(configs.values()), layers)
        saved = modules_to_save_of(self.model, adapters)
        sums = {key: rule.at(layer, key) for key, layer in layers.items()}
        ranks = {layers[key].layer_name: total.core.shape[-1] for key, total in sums.items()}
        self.peft_config[adapter_name] = config_of_the_sum(configs, targets_for(self.model, list(layers)), ranks)
        self.inject_adapter(self.model, adapter_name, from_file=False)
        for key, total in sums.items():
            layers[key].set_basis(adapter_name, *total)
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
        # PEFT goes on with the same dict, for saved modules and embeddings.
        state_dict.update(left_out(model, state_dict, unwanted_adapter_names))
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # Where every key has another's name in it, PEFT leaves them all in.
        theirs = places_of(model, unwanted_adapter_names)
        found = {key: tensor for key, tensor in found.items() if not key.startswith(theirs)}
        return rounded_bases(named_for_a_file(model, with_values(model, found)), config.save_dtype)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's own would take the name out of any key that has it before its last word: out of `layers.1.bias` too.
        trained = any(f".{kind}.{adapter_name}." in f"{key}." for kind in _TRAINED_BESIDE)
        return super()._remove_adapter_name_from_key(key, adapter_name) if trained else without_adapter_name(key)

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: SemuConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if config._kept_weights is not None:
            state_dict = load_file(config._kept_weights)
        if problem := impossible_tensor(state_dict):
            refuse(model, config, adapter_name, f"The saved adapter is damaged: {problem}")
        state_dict = restored_bases(named_for_the_model(model, state_dict), config.save_dtype)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        config._kept_weights = None
        return fitted(model, config, adapter_name, remapped)


def _named_by_layer(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with a state dict's keys cut down to what PEFT finds layers by.

    It takes what stands before the last `.semu_`, and the names of this tuner's tensors have that twice.
    """
    state_dict = arguments.get("state_dict")
    if state_dict is None:
        return arguments
    layers = {layer: tensor for key, tensor in state_dict.items() if (layer := layer_of(without_prefix(key)))}
    return {**arguments, "state_dict": {f"{layer}.semu_core": tensor for layer, tensor in layers.items()}}


def _name_as_uncompiled(config: SemuConfig) -> None:
    """Name the targets as they are called in the model before it was compiled, which is what a file is to say."""
    if isinstance(config.target_modules, (list, set)):
        config.target_modules = {without_compilation(name) for name in config.target_modules}  # type: ignore[assignment]
