"""Find a model's SEMU layers by the names that the configuration knows them by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from semu_peft.arguments import check_adapter_name, check_model
from semu_peft.model_state import out_of_wrappers

from .keys import layer_of, without_compilation, without_prefix, without_wrappers
from .layer import NotInitializedError, SemuLayer
from .parameter import ParamWrapper, parameter_path
from .tied import TiedLayer


def base_model(model: nn.Module) -> nn.Module:
    """The model that the adapters were put into, out of whatever it is in: compiled, distributed, in a `PeftModel`."""
    root: Any = uncompiled(out_of_wrappers(uncompiled(model)))
    return uncompiled(root.get_base_model()) if hasattr(root, "get_base_model") else root


def find_token_head(model: nn.Module) -> Any:
    """The layer that reads tokens from hidden states (the unembedding); None where a model has none.

    Examples:
        >>> from semu_peft.tuner.adapted import find_token_head
        >>> find_token_head(decoder) is decoder.lm_head, find_token_head(nn.Linear(2, 2))
        (True, None)
    """
    return getattr(base_model(model), "get_output_embeddings", lambda: None)()


def find_embedding(model: nn.Module) -> Any:
    """The layer that looks tokens up; None where a model has none, or several, as one of two towers.

    Examples:
        >>> from semu_peft.tuner.adapted import find_embedding
        >>> find_embedding(decoder) is decoder.model.embed_tokens, find_embedding(nn.Linear(2, 2))
        (True, None)
    """
    try:
        return getattr(base_model(model), "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return None


def token_head(model: nn.Module) -> Any:
    """The layer that reads tokens from hidden states, of a model that must have one.

    Raises:
        ValueError: It has none.

    Examples:
        >>> from semu_peft.tuner.adapted import token_head
        >>> token_head(decoder) is decoder.lm_head
        True
    """
    head = find_token_head(model)
    if head is None:
        raise ValueError(
            f"`model` must be a language model with a head over tokens, got {type(base_model(model)).__name__}, whose "
            "`get_output_embeddings` gives none. Load it with `AutoModelForCausalLM`."
        )
    return head


def semu_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, SemuLayer]:
    """The layers that carry the adapter, by their full names in the base model (the keys of `SemuConfig.ranks`).

    Where a parameter is corrected instead of a layer, it is the parameter's full name. Layers tied to another, which
    compute with its adapter, are not listed.

    Args:
        model: A `PeftModel`, a model with an injected adapter, or either inside a distributed wrapper or in a module
            of the user's own, where the names are those in the part that holds the adapter. Where several parts have
            an adapter of that name, and layers of one name, they are the full names in the whole.
        adapter_name: The adapter's name.

    Raises:
        ValueError: No layer of the model carries a SEMU adapter of that name.

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.tuner.adapted import semu_layers
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), SemuConfig(target_modules=["0"]))
        >>> {name: layer.is_initialized("default") for name, layer in semu_layers(model).items()}
        {'0': False}
    """
    check_model(model)
    check_adapter_name(adapter_name)
    root = base_model(model)
    full = {
        parameter_path(name, layer) if isinstance(layer, ParamWrapper) else without_wrappers(name): layer
        for name, layer in root.named_modules()
        if isinstance(layer, SemuLayer) and adapter_name in layer.semu_core and not isinstance(layer, TiedLayer)
    }
    found = {layer.layer_name: layer for layer in full.values()}
    if len(found) < len(full):  # parts with adapters of their own, which call their layers the same
        return full
    if not found:
        names = sorted({name for layer in root.modules() if isinstance(layer, SemuLayer) for name in layer.semu_core})
        raise ValueError(
            f"`adapter_name`: {type(root).__name__} has no SEMU adapter {adapter_name!r}; it has {names or 'none'}. "
            "Add one with `get_peft_model(model, SemuConfig(...))`, or name one of these."
        )
    return found


def initialized_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, SemuLayer]:
    """The layers that carry the adapter, by name, of an adapter that has bases in some of them at least.

    Raises:
        NotInitializedError: It has none yet.
        ValueError: No layer of the model carries a SEMU adapter of that name.
    """
    layers = semu_layers(model, adapter_name)
    if not any(layer.is_initialized(adapter_name) for layer in layers.values()):
        raise NotInitializedError(adapter_name)
    return layers


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's own modules, by the names that they have without adapters; the adapters' are left out.

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.tuner.adapted import own_modules
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), SemuConfig(target_modules=["0"]))
        >>> list(own_modules(model))
        ['', '0']
    """
    return dict(_own_modules(base_model(model)))


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters, by the names that they have without adapters; tied ones under each of their names.

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.tuner.adapted import own_parameters
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), SemuConfig(target_modules=["0"]))
        >>> list(own_parameters(model))
        ['0.weight', '0.bias']
    """
    return {
        f"{path}.{name}" if path else name: parameter
        for path, module in own_modules(model).items()
        for name, parameter in module.named_parameters(recurse=False)
    }


def _own_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, BaseTunerLayer):
        yield from _own_modules(module.get_submodule("base_layer"), name)
        return
    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from _own_modules(module.original_module, name)
        return
    yield without_wrappers(name), module
    for child, inside in module.named_children():
        yield from _own_modules(inside, f"{name}.{child}" if name else child)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module itself, out of `torch.compile`'s wrapper where it is in one."""
    while isinstance(inside := getattr(model, "_orig_mod", None), nn.Module):
        model = inside
    return model


def exactly(name: str) -> str:
    """A pattern that matches this layer alone, where PEFT would also take every name that ends in it."""
    return "^" + name.replace(".", r"\.")


def named_for_a_file(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors under the names that they have where nothing is compiled and no other method is around SEMU."""
    paths = _paths_in_files(model)
    if all(path == plain for path, plain in paths.items()):
        return state_dict
    renamed = {}
    for key, value in state_dict.items():
        path = layer_of(key)
        plain = without_compilation(key) if path is None else paths.get(path, path) + key.removeprefix(path)
        renamed[plain] = value
    return renamed


def named_for_the_model(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of [`named_for_a_file`] for the tensors of SEMU's layers, with PEFT's prefix or without."""
    paths = {plain: path for path, plain in _paths_in_files(model).items() if plain != path}
    if not paths:
        return state_dict
    renamed = {}
    for key, value in state_dict.items():
        path = layer_of(key) or ""
        rest = key.removeprefix(path)
        if path not in paths and without_prefix(path) in paths:  # injected into a bare model
            path = without_prefix(path)
        renamed[paths.get(path, path) + rest] = value
    return renamed


def _paths_in_files(model: nn.Module) -> dict[str, str]:
    paths = {}
    for path, layer in model.named_modules():
        if isinstance(layer, SemuLayer):
            parts: list[str] = []
            parent: Any = model
            for part in path.split("."):
                # A file says of SEMU's own wrappers around each other which one a tensor belongs to.
                foreign = part == "base_layer" and not isinstance(parent, SemuLayer)
                if part != "_orig_mod" and not foreign:
                    parts.append(part)
                parent = getattr(parent, part)
            paths[path] = ".".join(parts)
    return paths


def targets_for(model: nn.Module, names: list[str]) -> list[str] | str:
    """`target_modules` for just these layers: a list where PEFT's matching by ending means them alone, else a pattern.

    Args:
        model: The model, with or without adapters.
        names: Full names in the base model.

    Examples:
        >>> from semu_peft.tuner.adapted import targets_for
        >>> model = nn.ModuleDict({"head": nn.Linear(4, 3), "aux": nn.ModuleDict({"head": nn.Linear(4, 3)})})
        >>> targets_for(model, ["aux.head"]), targets_for(model, ["head"])
        (['aux.head'], 'head')
    """
    endings = tuple(f".{name}" for name in names)
    if any(without_wrappers(other).endswith(endings) for other, _ in base_model(model).named_modules()):
        return "|".join(exactly(name)[1:] for name in names)
    return names
