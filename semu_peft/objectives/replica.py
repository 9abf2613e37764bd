"""A second tree of modules over the tensors of a model, so that flags can be set in it which the model does not see."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from semu_peft.model_state import leave_recomputation

from .adapter_parts import modules_of

_COMPILED = "_orig_mod"  # where `torch.compile(module)` keeps the module
_FORWARDS = ("forward", "_old_forward")  # what a library puts on an instance, in place of the class's method
_PLAIN = frozenset({bool, int, float, str, type(None), Tensor, torch.dtype, torch.device})
_CONTAINERS = frozenset({"_parameters", "_buffers", "_non_persistent_buffers_set"})


def replicate(model: nn.Module, values: Mapping[int, Tensor] | None = None) -> dict[int, nn.Module] | None:
    """Make a second tree of modules over the same parameters and buffers, as `torch.nn.DataParallel` makes them.

    Every module has a counterpart with attributes of its own, in which references to other modules of the tree,
    bound methods and hooks lead to their counterparts. Compiled modules are replaced by what they were compiled from.

    Args:
        model: Any model, on any device, offloaded by Accelerate or quantised.
        values: What stands in place of some parameters there, by the parameter's `id`: a parameter, or a tensor with a
            graph, as it is; another tensor as a frozen parameter.

    Returns:
        The counterpart of every module, by the module's `id`; None where a module's `forward` was replaced by a
        function that cannot be turned to another module.

    Examples:
        >>> from torch import nn
        >>> from semu_peft.objectives.replica import replicate
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> replica = replicate(model)[id(model)].eval()
        >>> replica[0].weight is model[0].weight, model[1].training
        (True, True)
    """
    originals = {id(module): module for module in modules_of(model)}
    replicas: dict[int, nn.Module] = {}
    for number, module in originals.items():
        if not is_compiled(module):
            shared = _is_scripted(module) or (not values and _only_holds(module))
            replicas[number] = module if shared else _shallow(module)
    for number, module in reversed(originals.items()):  # what was compiled stands after its wrapper
        if is_compiled(module):
            replicas[number] = replicas[id(module._orig_mod)]
    for number, module in originals.items():
        if replicas[number] is not module and not is_compiled(module):
            attributes = vars(replicas[number])
            _connect(attributes, replicas)
            _exchange(attributes["_parameters"], values or {})
            if any(_reaches(attributes[name], originals) for name in _FORWARDS if name in attributes):
                return None
    return replicas


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile(module)` made this module.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.replica import is_compiled
        >>> is_compiled(torch.compile(torch.nn.Linear(2, 2))), is_compiled(torch.nn.Linear(2, 2))
        (True, False)
    """
    return _COMPILED in module.__dict__.get("_modules", {})


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """Run what is compiled of a model as it was written while the context lasts.

    A compiled graph does not call the hooks that were put in after it was made, and says nothing of that.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.replica import eagerly
        >>> model, seen = torch.compile(torch.nn.Linear(2, 2), backend="eager"), []
        >>> _ = model(torch.ones(1, 2))
        >>> _ = model._orig_mod.register_forward_hook(lambda *_: seen.append(1))
        >>> with eagerly(model):
        ...     _ = model(torch.ones(1, 2))
        >>> seen
        [1]
    """
    if any(is_compiled(module) or module._compiled_call_impl is not None for module in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _is_scripted(module: nn.Module) -> bool:
    return "ScriptModule" in {kind.__name__ for kind in type(module).__mro__}


def _only_holds(module: nn.Module) -> bool:
    """Whether a module holds parameters or buffers for another one and computes nothing, such as a `ParameterDict`."""
    return type(module).forward is nn.Module.forward and not vars(module)["_modules"]


def _shallow(module: nn.Module) -> nn.Module:
    replica = object.__new__(type(module))
    vars(replica).update(vars(module))  # past `__setattr__`, which classes write anew
    return replica


def _connect(attributes: dict[str, Any], replicas: dict[int, nn.Module]) -> None:
    """Give a replica containers of its own, and lead what refers to modules to their replicas."""
    for name, value in attributes.items():
        kind = type(value)
        if kind in _PLAIN:
            continue
        if kind is OrderedDict:  # hooks
            attributes[name] = hooks = value.copy()
            for key, hook in value.items():
                hooks[key] = _rebound(hook, replicas)
        elif name == "_modules":
            attributes[name] = {key: replicas.get(id(child), child) for key, child in value.items()}
        elif name in _CONTAINERS:
            attributes[name] = value.copy()
        elif name == "_hf_hook":  # Accelerate's, which keeps the state of a pass in itself
            attributes[name] = _own_hook(value)
        else:
            attributes[name] = _rebound(value, replicas)
    attributes.pop("_compiled_call_impl", None)  # by `module.compile()`
    leave_recomputation(attributes)


def _exchange(parameters: dict[str, nn.Parameter | None], values: Mapping[int, Tensor]) -> None:
    for name, parameter in parameters.items():
        value = values.get(id(parameter))
        if value is not None:
            as_it_is = isinstance(value, nn.Parameter) or value.grad_fn is not None
            parameters[name] = value if as_it_is else nn.Parameter(value, requires_grad=False)  # type: ignore[assignment]


def _rebound(value: Any, replicas: dict[int, nn.Module]) -> Any:
    """The value with the modules in it exchanged for their replicas; the value itself where there are none."""
    if isinstance(value, nn.Module):
        return replicas.get(id(value), value)
    if isinstance(value, MethodType):
        owner = replicas.get(id(value.__self__))
        return value if owner is None else MethodType(value.__func__, owner)
    if isinstance(value, partial):
        arguments = [_rebound(argument, replicas) for argument in value.args]
        keywords = {key: _rebound(argument, replicas) for key, argument in value.keywords.items()}
        rebound = partial(_rebound(value.func, replicas), *arguments, **keywords)
        vars(rebound).update({key: _rebound(item, replicas) for key, item in vars(value).items()})
        return rebound
    if type(value) in (tuple, list):
        items = [_rebound(item, replicas) for item in value]
        same = all(new is old for new, old in zip(items, value, strict=True))
        return value if same else type(value)(items)
    if type(value) is dict and any(isinstance(item, nn.Module) for item in value.values()):
        return {key: _rebound(item, replicas) for key, item in value.items()}
    return value


def _own_hook(hook: Any) -> Any:
    hook = copy.copy(hook)
    if hasattr(hook, "hooks"):  # several in a row
        hook.hooks = tuple(copy.copy(inner) for inner in hook.hooks)
    return hook


def _reaches(function: Any, originals: dict[int, nn.Module]) -> bool:
    """Whether a function would call a module of the original tree, as far as its closures and arguments show."""
    todo, seen = [function], set()
    while todo:
        value = todo.pop()
        if id(value) in seen or value is None or isinstance(value, (type, ModuleType, Tensor)):
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            if id(value) in originals:
                return True
        elif isinstance(value, MethodType):
            todo += [value.__self__, value.__func__]
        elif isinstance(value, FunctionType):
            named = (value.__globals__.get(name) for name in value.__code__.co_names)
            todo += [item for item in named if isinstance(item, nn.Module)]
            todo += [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        elif isinstance(value, partial):
            todo += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, (tuple, list)):
            todo += value
        else:
            todo += getattr(value, "__dict__", {}).values()
    return False


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - raises where a variable has no value yet
    except ValueError:
        return False
    return True
