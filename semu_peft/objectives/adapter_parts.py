"""Which layers belong to an adapter, of any PEFT method, and how it is left out of them."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import nn

from semu_peft.tuner.layer import SemuLayer


class Part(NamedTuple):
    """One layer of an adapter, or a module or token rows that are trained beside it under its name."""

    layer: Any
    adapter_name: str
    beside: bool

    def parameters(self) -> Iterator[nn.Parameter]:
        """Go through what this adapter has in this layer to be trained."""
        for path in self.layer.adapter_layer_names:
            for name, item in _held(self.layer, path).items():
                if name == self.adapter_name:
                    yield from item.parameters() if isinstance(item, nn.Module) else (item,)

    @property
    def is_trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def is_merged(self) -> bool:
        return self.adapter_name in getattr(self.layer, "merged_adapters", ())

    @property
    def method(self) -> tuple[str, ...]:
        """The PEFT method, told by the attributes that hold its parameters in every layer of that kind."""
        return tuple(type(self.layer).adapter_layer_names)  # DoRA adds one to the layers that it is in

    def leave_out(self) -> None:
        """Take the adapter out of the active ones; with none left, the layer computes with its base layer alone."""
        if getattr(self.layer, "merged_adapters", None):
            return  # PEFT computes with the base layer and what is merged into it, and with no other adapter
        others = [name for name in self.layer.active_adapters if name != self.adapter_name]
        if others != list(self.layer.active_adapters):
            self.layer._active_adapter = others
            self.layer._disable_adapters = self.layer._disable_adapters or not others

    def put_in(self) -> None:
        """Make the adapter one of the active ones."""
        others = [] if self.layer._disable_adapters else list(self.layer.active_adapters)
        self.layer._active_adapter = [*others, *({self.adapter_name} - set(others))]
        self.layer._disable_adapters = False


def adapter_parts(model: nn.Module, adapter_name: str | None = None) -> list[Part]:
    """Find the layers of an adapter, by default of the adapters that are trained, or else of the active ones.

    A LoRA and an adapter over it may have the same name. Then the one that is trained is meant, or the outer one.

    Raises:
        ValueError: The model has no adapter, or none of that name.

    Examples:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.objectives.adapter_parts import adapter_parts
        >>> base = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model = get_peft_model(base, SemuConfig(target_modules=["0"], modules_to_save=["1"]))
        >>> [(part.adapter_name, part.beside) for part in adapter_parts(model)]
        [('default', False), ('default', True)]
    """
    every = all_parts(model)
    if not every:
        raise ValueError(
            f"{type(model).__name__} has no PEFT adapter to switch off, so its original predictions are not to be had "
            "from it. Wrap it with an adapter, or give the objective a frozen copy as `reference`."
        )
    names = {part.adapter_name for part in every}
    if adapter_name is not None and adapter_name not in names:
        raise ValueError(f"`adapter_name` must be one of the adapters {sorted(names)}, got {adapter_name!r}.")
    chosen = _names_in_use(every) if adapter_name is None else {adapter_name}
    return [part for name in sorted(chosen) for part in _of_one_method(every, name)]


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules of a model once, each before what it contains: `model.modules()`, without making names, in a tenth.

    Examples:
        >>> from torch import nn
        >>> from semu_peft.objectives.adapter_parts import modules_of
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> modules_of(model) == list(model.modules())
        True
    """
    modules: dict[int, nn.Module] = {}
    todo: list[nn.Module | None] = [model]
    while todo:
        module = todo.pop()
        if module is not None and id(module) not in modules:
            modules[id(module)] = module
            todo += reversed(vars(module).get("_modules", {}).values())  # what is scripted shows none
    return list(modules.values())


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """The adapters' configurations by name, which PEFT keeps at the model that it was given, wherever that is now.

    Examples:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.objectives.adapter_parts import adapter_configs
        >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), SemuConfig(target_modules=["0"]))
        >>> list(adapter_configs(nn.Sequential(model)))
        ['default']
    """
    configs: dict[str, Any] = {}
    for module in modules_of(model):
        for name, config in (vars(module).get("peft_config") or {}).items():
            configs.setdefault(name, config)
    return configs


def all_parts(model: nn.Module) -> list[Part]:
    """Every layer of every adapter in a model, and what is trained beside it; none where there is no adapter."""
    modules = modules_of(model)
    beside = {id(module) for module in modules if isinstance(module, AuxiliaryTrainingWrapper)}
    beside |= {id(module.token_adapter) for module in modules if isinstance(module, TrainableTokensWrapper)}
    layers = [module for module in modules if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    return [
        Part(layer, name, id(layer) in beside) for layer in layers for name in sorted(layer._get_available_adapters())
    ]


def _names_in_use(parts: list[Part]) -> set[str]:
    trained = {part.adapter_name for part in parts if part.is_trained}
    if trained:
        return trained
    semu = [part for part in parts if isinstance(part.layer, SemuLayer)]
    return {part.adapter_name for part in semu or parts if part.adapter_name in part.layer.active_adapters}


def _of_one_method(parts: list[Part], adapter_name: str) -> list[Part]:
    named = [part for part in parts if part.adapter_name == adapter_name]
    methods = list(dict.fromkeys(part.method for part in named if not part.beside))  # the outermost first
    if len(methods) < 2:
        return named
    kept = {part.method for part in named if part.is_trained and not part.beside} or set(methods[:1])
    return [part for part in named if (part.is_trained if part.beside else part.method in kept)]


def _held(layer: nn.Module, path: str) -> Any:
    try:
        return attrgetter(path)(layer)
    except AttributeError:
        return {}
