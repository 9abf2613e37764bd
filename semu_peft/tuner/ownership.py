"""Whose a configuration object is: that of the adapter that took it last."""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from .config import SemuConfig
from .layer import ROOM, SemuLayer

_OWNERS: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()  # the model with the adapter, by the object's id
_RESOLVED = ("target_modules", "target_parameters")  # written over by the names that a wish turns out to mean


def take(config: SemuConfig, model: nn.Module, adapter_name: str) -> None:
    """Make a configuration the new adapter's own, before anything is written into it.

    The object that a user gives is the one that is used, as in every PEFT method. Ranks are written into it, though:
    where another adapter has it already, that one keeps a copy, and the new one starts from what was asked for. In the
    same model it has room for the other's tensors, as trainers clone an adapter by giving its configuration again and
    copying its parameters by name.

    Args:
        config: The configuration that was given.
        model: The model that the adapter is put into.
        adapter_name: The new adapter's name.
    """
    owner = _OWNERS.get(id(config))
    vars(config).pop(ROOM, None)
    for name, other in list(getattr(owner, "peft_config", {}).items()):
        if other is config and (owner is not model or name != adapter_name):
            _leave_a_copy(config, owner, name)
    given: dict[str, Any] = vars(config).pop("_given", {})
    for name, (wish, outcome) in given.items():
        if getattr(config, name) is outcome:  # else the user has changed it since
            setattr(config, name, wish)
    if given:
        if owner is model:
            vars(config)[ROOM] = {name: (rank, name in config.offsets) for name, rank in config.ranks.items()}
        config.ranks, config.offsets = {}, []
    _OWNERS[id(config)] = model


def remember_wish(config: SemuConfig, wish: dict[str, Any]) -> None:
    """Note what was asked for before it was resolved, for the day that the object is given again.

    Args:
        config: The configuration, resolved.
        wish: What [`wish_of`] said before.
    """
    vars(config)["_given"] = {name: (value, getattr(config, name)) for name, value in wish.items()}


def wish_of(config: SemuConfig) -> dict[str, Any]:
    """The fields that will be resolved, as they are."""
    return {name: getattr(config, name) for name in _RESOLVED}


def _leave_a_copy(config: SemuConfig, owner: Any, adapter_name: str) -> None:
    kept = copy.deepcopy(config)
    owner.peft_config[adapter_name] = kept
    for layer in owner.modules():
        if isinstance(layer, SemuLayer) and layer.configs.get(adapter_name) is config:
            layer.configs[adapter_name] = kept
