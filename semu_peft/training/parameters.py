"""Which parameters a run trains, and their values wherever they lie."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from semu_peft.objectives.adapter_parts import adapter_configs, adapter_parts
from semu_peft.objectives.split_weights import starts_elsewhere
from semu_peft.tuner.layer import NotInitializedError, SemuLayer
from semu_peft.tuner.tensors import is_sharded


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what requires gradients and is not empty, by name.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
        >>> list(trained_parameters(model))
        ['0.weight', '0.bias']
    """
    return {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}


def check_trainable(model: nn.Module) -> None:
    """Check that there is something to train, and that SEMU adapters have been initialised.

    Raises:
        NotInitializedError: An adapter that is to be trained has not been initialised.
        ValueError: Adapters are merged or disabled, or nothing requires gradients.
    """
    semu = [layer for layer in model.modules() if isinstance(layer, SemuLayer)]
    _check_running(model, semu or [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)])
    for layer in semu:
        _check_initialized(layer)
    adapters = list(dict.fromkeys(name for layer in semu for name in layer.active_adapters if _trains(layer, name)))
    if len(adapters) > 1:
        warnings.warn(
            f"The adapters {adapters} are all trained, earlier ones as well. To train a new one on top of the others, "
            f"name it: `adapter_name={adapters[-1]!r}`.",
            stacklevel=3,
        )
    if not trained_parameters(model):
        raise ValueError(
            "`model` has no trainable parameter. An adapter loaded for inference is frozen: load it with "
            "`is_trainable=True`, activate it with `set_adapter`, or name it in `adapter_name`."
        )
    _warn_of_starts(model)


def _check_running(model: nn.Module, layers: Sequence[Any]) -> None:
    """Raise where layers that are to be trained take no part in a forward pass."""
    own: set[int] = set()
    for layer in layers:
        base = {id(parameter) for parameter in layer.get_base_layer().parameters()}
        trained = {id(parameter) for parameter in layer.parameters() if parameter.requires_grad} - base
        own |= trained
        if layer.merged and trained:
            raise ValueError(
                f"`model`: the adapters {sorted(layer.merged_adapters)} are merged into the weights, so that no "
                "gradient reaches what is to be trained; call `unmerge_adapter` first."
            )
    others = [parameter for parameter in trained_parameters(model).values() if id(parameter) not in own]
    if layers and not others and all(layer.disable_adapters for layer in layers):
        raise ValueError(
            "`model`: its adapters are disabled, so that no gradient reaches them; call "
            "`model.base_model.enable_adapter_layers()` first (`enable_adapters()` in transformers and diffusers)."
        )


def _warn_of_starts(model: nn.Module) -> None:
    """Say so where a method changes the model by being added, before anything is forgotten."""
    mends = {name: (config, starts_elsewhere(config)) for name, config in adapter_configs(model).items()}
    for name, (config, mend) in mends.items():
        if mend is not None and any(part.is_trained for part in adapter_parts(model, name)):
            method = getattr(config.peft_type, "value", config.peft_type)
            warnings.warn(
                f"The adapter {name!r} of {method} did not start at the original model, so that the model's answers "
                f"changed before the first step. {mend}",
                stacklevel=4,
            )


def _trains(layer: SemuLayer, adapter_name: str) -> bool:
    core = layer.semu_core.stored_parameter(adapter_name) if adapter_name in layer.semu_core else None
    return core is not None and core.requires_grad and core.numel() > 0


def _check_initialized(layer: SemuLayer) -> None:
    for adapter in layer.active_adapters:
        trained = adapter in layer.semu_core and layer.semu_core.stored_parameter(adapter).requires_grad
        if trained and not layer.is_initialized(adapter):
            raise NotInitializedError(adapter)


@contextmanager
def only_adapter_trains(model: nn.Module, adapter_name: str | None) -> Iterator[None]:
    """Let gradients reach one adapter alone, and give every parameter its own flag back; None changes nothing.

    Args:
        model: A model with adapters of any PEFT method.
        adapter_name: The adapter. Others stay as active as they are, and frozen.

    Raises:
        ValueError: There is no such adapter, or it is not active.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0"]))
        >>> _ = model.requires_grad_(False)
        >>> with only_adapter_trains(model, "default"):
        ...     print(len(trained_parameters(model)))
        2
        >>> len(trained_parameters(model))
        0
    """
    if adapter_name is None:
        yield
        return
    with only_these_train(model, _parameters_of(model, adapter_name)):
        yield


@contextmanager
def only_these_train(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let gradients reach these parameters alone, and give every parameter its own flag back.

    Args:
        model: The model.
        parameters: Some of its parameters, or none.

    Examples:
        >>> model = nn.Linear(2, 2)
        >>> with only_these_train(model, [model.bias]):
        ...     list(trained_parameters(model))
        ['bias']
    """
    chosen = list(parameters)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def empty_ones_frozen(model: nn.Module) -> Iterator[None]:
    """Freeze parameters without entries, such as the core of a layer of rank 0, and unfreeze them afterwards.

    Distributed training waits for a gradient of each parameter that requires one, also in layers that are never called.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(0, 2, bias=False))
        >>> with empty_ones_frozen(model):
        ...     [parameter.requires_grad for parameter in model.parameters()]
        [True, True, False]
    """
    waited_for = isinstance(model, DistributedDataParallel)  # it has asked already, and the layers give them one
    every = () if waited_for else model.parameters()
    frozen = [parameter for parameter in every if parameter.requires_grad and not parameter.numel()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _parameters_of(model: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    found = [layer for layer in layers if adapter_name in layer._get_available_adapters()]
    if not found:
        names = sorted({name for layer in layers for name in layer._get_available_adapters()})
        raise ValueError(
            f"`adapter_name`: {type(model).__name__} has no adapter {adapter_name!r}; it has {names or 'none'}. Add it "
            "first, or name one of these."
        )
    active = list(dict.fromkeys(name for layer in found for name in layer.active_adapters))
    if adapter_name not in active:
        raise ValueError(
            f"`adapter_name`: the adapter {adapter_name!r} is not active, so that training would not move it. Activate "
            f"it beside the others: `model.base_model.set_adapter({[*active, adapter_name]})`; `set_adapter("
            f"{adapter_name!r})` would switch them off, and bring back what they have forgotten."
        )
    return [parameter for part in adapter_parts(model, adapter_name) for parameter in part.parameters()]


def leave_shards_alone(model: nn.Module) -> None:
    """Free what FSDP2 has gathered: its root keeps that of a forward pass until a backward pass, in the shards' places.

    Examples:
        >>> leave_shards_alone(nn.Linear(2, 2))  # nothing is sharded
    """
    for module in model.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            module.reshard()  # type: ignore[operator]


def put_into(parameter: Any, value: Tensor) -> None:
    """Write a value into a parameter, each process its own part where the parameter is sharded and the value is not.

    Examples:
        >>> import torch
        >>> parameter = torch.zeros(2)
        >>> put_into(parameter, torch.ones(2))
        >>> parameter
        tensor([1., 1.])
    """
    parameter.copy_(shared_out(value, parameter))


def shared_out(value: Tensor, parameter: Any) -> Tensor:
    """A whole value as the parameter is: sharded over the processes where the parameter is sharded, on its device.

    Examples:
        >>> import torch
        >>> shared_out(torch.ones(2), torch.zeros(2))
        tensor([1., 1.])
    """
    value = value.to(parameter.device)
    if is_sharded(parameter) and not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
