"""What PEFT's `PeftModel` does for a wrapped model, for adapters that were injected into a bare one (`add_adapter`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from semu_peft.objectives.adapter_parts import adapter_parts
from semu_peft.tuner.adapted import base_model, semu_layers
from semu_peft.tuner.layer import SemuLayer
from semu_peft.tuner.loading import restore_layers

_HANDLES = ("_require_grads_hook", "_require_grads_hooks")  # by which transformers takes its own hooks back


def add_adapter(model: nn.Module, config: PeftConfig, *, adapter_name: str = "default") -> None:
    """Put an adapter into a model beside those that it has: what is active stays active, and only the new one trains.

    diffusers' and transformers' own `add_adapter` switch every other adapter off: a second erasure would bring the
    first concept back. Adapters that are switched off stay off.

    Args:
        model: The model, changed in place: bare, or a `PeftModel`.
        config: The adapter's configuration.
        adapter_name: The adapter's name.

    Raises:
        ValueError: There is such an adapter, or one is merged into the weights. The model is unchanged then.

    Examples:
        >>> from semu_peft import SemuConfig
        >>> from torch import nn
        >>> from semu_peft.adapter.whole_model import add_adapter
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> for name in ("first", "second"):
        ...     add_adapter(model, SemuConfig(target_modules=["0"], r=2, init_weights=False), adapter_name=name)
        >>> cores = model[0].semu_core
        >>> model[0].active_adapters, [name for name in cores if cores.stored_parameter(name).requires_grad]
        (['first', 'second'], ['second'])
    """
    root: Any = base_model(model)
    if adapter_name in getattr(root, "peft_config", {}):
        raise ValueError(f"`adapter_name`: the model has an adapter {adapter_name!r} already. Choose another name.")
    layers = [module for module in root.modules() if isinstance(module, BaseTunerLayer)]
    if merged := {name for layer in layers if isinstance(layer, SemuLayer) for name in layer.merged_adapters}:
        raise ValueError(
            f"`model`: {sorted(merged)} are merged into the weights, so that a new adapter would do nothing beside "
            "them. Unmerge (`unfuse_lora`) them first."
        )
    active = list(
        dict.fromkeys(name for layer in layers if not layer.disable_adapters for name in layer.active_adapters)
    )
    if hasattr(root, "_hf_peft_config_loaded"):
        root._hf_peft_config_loaded = True
    beside = [
        (module, module.active_adapters) for module in root.modules() if isinstance(module, AuxiliaryTrainingWrapper)
    ]
    inject_adapter_in_model(config, root, adapter_name)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter([*active, adapter_name], inference_mode=True)
            module._disable_adapters = False
        elif isinstance(module, BaseTuner):
            module.active_adapter = [*active, adapter_name]
    for wrapper, names in beside:
        if adapter_name not in wrapper._adapters:  # what it trains in full, or some tokens of it, goes on as it was
            wrapper.set_adapter(names, inference_mode=True)
    for part in adapter_parts(root, adapter_name):
        for parameter in part.parameters():
            parameter.requires_grad_(True)


@contextmanager
def taken_back_on_error(model: nn.Module, *, adapter_name: str = "default") -> Iterator[None]:
    """If the block fails, take out the adapter that it put in, and leave the others, flags and hooks as they were.

    Args:
        model: The model, before the adapter is put in.
        adapter_name: The adapter's name.

    Examples:
        >>> from semu_peft import SemuConfig
        >>> from torch import nn
        >>> from semu_peft.adapter.whole_model import add_adapter, taken_back_on_error
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> try:
        ...     with taken_back_on_error(model):
        ...         add_adapter(model, SemuConfig(target_modules=["0"]))
        ...         raise RuntimeError("disk full")
        ... except RuntimeError:
        ...     print(model)
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
        )
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    layers += [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    states = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    tuners = [(module, module.active_adapter) for module in model.modules() if isinstance(module, BaseTuner)]
    hooks = [(module._forward_hooks, set(module._forward_hooks)) for module in model.modules()]
    handles = {name: getattr(model, name) for name in _HANDLES if hasattr(model, name)}
    try:
        yield
    except BaseException:
        remove_adapter(model, adapter_name=adapter_name)
        for layer, active, disabled in states:
            layer._active_adapter, layer._disable_adapters = active, disabled
        for tuner, active in tuners:
            tuner.active_adapter = active
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        # PEFT's model has the embeddings' outputs require gradients, for activations that are recomputed.
        for held, known in hooks:
            for key in held.keys() - known:
                del held[key]
        for name in _HANDLES:
            vars(model).pop(name, None)
        vars(model).update(handles)
        raise


def remove_adapter(model: nn.Module, *, adapter_name: str = "default") -> None:
    """Take an adapter out of the model; layers that then have none become stock layers again. Unknown names pass.

    Args:
        model: The model, changed in place.
        adapter_name: The adapter to take out.

    Examples:
        >>> from peft import inject_adapter_in_model
        >>> from semu_peft import SemuConfig
        >>> from torch import nn
        >>> from semu_peft.adapter.whole_model import remove_adapter
        >>> config = SemuConfig(target_modules=["0"], r=2, init_weights=False)
        >>> model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(4, 3)))
        >>> remove_adapter(model)
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
        )
    """
    root: Any = base_model(model)
    restore_layers(root, adapter_name)
    configs = getattr(root, "peft_config", {})
    configs.pop(adapter_name, None)
    if not configs and "peft_config" in vars(root):
        del root.peft_config
        if "_hf_peft_config_loaded" in vars(root):
            root._hf_peft_config_loaded = False


def merge_and_remove(model: nn.Module, *, adapter_name: str = "default") -> nn.Module:
    """Add an adapter's correction to the weights for good, and leave a stock model.

    For models with injected adapters; a `PeftModel` has `merge_and_unload`.

    Args:
        model: The model, changed in place.
        adapter_name: The adapter to merge.

    Returns:
        The model.

    Raises:
        ValueError: There is no such adapter, one is merged already, or a merged weight would not be finite; the weights
            are then as they were.

    Examples:
        >>> from peft import inject_adapter_in_model
        >>> from semu_peft import SemuConfig
        >>> from torch import nn
        >>> from semu_peft.adapter.whole_model import merge_and_remove
        >>> config = SemuConfig(target_modules=["0"], r=2, init_weights=False)
        >>> model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(4, 3)))
        >>> merge_and_remove(model)
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
        )
    """
    layers = semu_layers(model, adapter_name)
    if merged := {name for layer in layers.values() for name in layer.merged_adapters}:
        raise ValueError(f"{sorted(merged)} are merged into the weights already: unmerge (`unfuse_lora`) them first.")
    try:
        for layer in layers.values():
            with onload_layer(layer):
                layer.merge(safe_merge=True, adapter_names=[adapter_name])
    except ValueError:
        for layer in layers.values():
            if layer.merged:
                with onload_layer(layer):
                    layer.unmerge()
        raise
    for layer in layers.values():  # what is merged for good is the weight itself, beside which the others go on
        layer.merged_adapters.remove(adapter_name)
    remove_adapter(model, adapter_name=adapter_name)
    return model
