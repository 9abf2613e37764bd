"""Check saved weights against the model that is to have them, and take back an adapter that does not fit."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import _get_submodules
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .adapted import base_model, find_embedding, find_token_head, own_modules
from .config import SemuConfig
from .keys import layer_of, tensor_key, without_compilation, without_prefix, without_wrappers
from .layer import SemuLayer
from .reduced_bases import is_basis
from .tensors import is_sharded
from .tied import TiedLayer

_ROUNDING = 0.05  # bfloat16's is below 0.01
_AUXILIARY = ("original_module", "token_adapter")  # what PEFT puts between the names of modules that it trains in full


def restore_layers(root: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of a model's modules; those that then have none become stock modules again."""
    for name, layer in reversed(list(root.named_modules())):  # wrappers around each other: the inner one first
        if isinstance(layer, SemuLayer) and adapter_name in layer.semu_core:
            layer.delete_adapter(adapter_name)
            stock = None if layer.semu_core else layer.base_layer
        elif isinstance(layer, ModulesToSaveWrapper) and set(layer.modules_to_save) == {adapter_name}:
            stock = layer.original_module
        else:
            continue
        if stock is not None:
            parent, _, child = _get_submodules(root, name)
            setattr(parent, child, stock)


def fitted(model: nn.Module, config: SemuConfig, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Saved tensors as the model has them, with room made for all of them.

    Args:
        model: The model with the adapter, which may wait for its bases: it takes its ranks from the tensors then.
        config: The adapter's configuration.
        adapter_name: The adapter to fill.
        state_dict: The tensors, by the model's keys as far as it has a place for them.

    Returns:
        The tensors, all by the model's keys.

    Raises:
        ValueError: They do not fit. An adapter that was there before stays as it was, one that was put in to be loaded
            is taken out again.
    """
    if any(adapter_name in layer.merged_adapters for layer in _layers(model, adapter_name).values()):
        raise ValueError(
            f"The adapter {adapter_name!r} is merged into the weights, which others could not be taken out of again; "
            "call `unmerge_adapter` first. The model given is left as it was."
        )
    # An offset that the model has no place for yet.
    state_dict = {_named_for_a_place(key, adapter_name): tensor for key, tensor in state_dict.items()}
    problem = mismatch(model, adapter_name, state_dict)
    if problem:
        refuse(
            model,
            config,
            adapter_name,
            f"The saved adapter does not fit {type(base_model(model)).__name__}: {problem} It was trained on another "
            "architecture or rank: load it onto the model named in its adapter_config.json.",
        )
    embeddings = embedding_parameters(model)
    foreign = _foreign_tensors(model, config, adapter_name, state_dict, embeddings)
    brought = {key: place for key, place in foreign.items() if not _same(place, state_dict[key])}
    merged = [
        layer.base_weight.data_ptr() for layer in model.modules() if isinstance(layer, SemuLayer) and layer.merged
    ]
    for key, place in brought.items():
        if place.data_ptr() in merged:
            problem = f"The embedding {key!r} has an adapter merged into it; call `unmerge_adapter` first."
            refuse(model, config, adapter_name, problem)
        if problem := _no_embedding(key, place, state_dict[key], embeddings):
            refuse(model, config, adapter_name, problem)
    make_room(model, adapter_name, state_dict)
    others = {name for layer in model.modules() if isinstance(layer, SemuLayer) for name in layer.r} - {adapter_name}
    if brought and others:
        warnings.warn(
            f"The file of adapter {adapter_name!r} brings {sorted(brought)[0]!r}, whose numbers are not the model's: "
            f"they are the embedding from now on, for {sorted(others)} and with all adapters off too. Save it with "
            "`save_embedding_layers=False` where that is not meant.",
            stacklevel=2,
        )
    for key, place in brought.items():
        # Not left to PEFT, which may give the model the file's dtype, and part tied weights.
        place.copy_(state_dict[key])
    return {key: value for key, value in state_dict.items() if key not in foreign}


def refuse(model: nn.Module, config: SemuConfig, adapter_name: str, problem: str) -> NoReturn:
    """Raise, after an adapter that was put in to be loaded is taken out again; one that was there before stays.

    Raises:
        ValueError: Always.
    """
    if made_to_load(model, config, adapter_name):
        withdraw(model, adapter_name)
    raise ValueError(f"{problem} The model given is left as it was.")


def impossible_tensor(state_dict: Mapping[str, Tensor]) -> str | None:
    """Say in a sentence which tensor no SEMU adapter can have, if there is one.

    That is numbers that are not finite, integers, and bases that are not orthonormal (saved ones may be rounded).

    Examples:
        >>> import torch
        >>> impossible_tensor({"fc.semu_U": torch.eye(3), "fc.semu_core": torch.ones(3, 3)})
        >>> impossible_tensor({"fc.semu_U": 2 * torch.eye(3)})
        "'fc.semu_U' must have orthonormal columns, got some with `UᵀU` off by 3."
    """
    for key, value in state_dict.items():
        ours = ".semu_" in key
        if ours and not value.is_floating_point():
            return f"{key!r} must have floating-point numbers, got {value.dtype}."
        if value.is_meta or not value.is_floating_point():
            continue
        wide = value.detach().float()
        if (ours and not wide.isfinite().all()) or wide.isnan().any():
            return f"{key!r} must have finite numbers, got NaN or infinity."
        if is_basis(key) and wide.numel():
            gram = wide.mT @ wide
            error = float((gram - torch.eye(gram.shape[-1], device=gram.device)).abs().max())
            if error > _ROUNDING:
                return f"{key!r} must have orthonormal columns, got some with `UᵀU` off by {error:.2g}."
    return None


def embedding_parameters(model: nn.Module) -> dict[str, Tensor]:
    """A model's input and output embedding, which PEFT saves along where it thinks that they were changed.

    Returns:
        Their own parameters without gradients, by the names that they have without adapters.
    """
    root: Any = base_model(model)
    found = [find_embedding(root), find_token_head(root)]
    every = dict(root.named_modules(remove_duplicate=False))
    own = own_modules(root)
    names = {without_wrappers(name) for name, module in every.items() if any(module is each for each in found)}
    return {
        f"{name}.{kind}": parameter.detach()
        for name in sorted(names & set(own))
        for kind, parameter in own[name].named_parameters(recurse=False)
    }


def _foreign_tensors(
    model: nn.Module,
    config: SemuConfig,
    adapter_name: str,
    state_dict: Mapping[str, Tensor],
    embeddings: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The model's own tensors that a file has others for, by the file's keys."""
    places = model.state_dict()
    trained = {f".{kind}.{adapter_name}" for kind in ("modules_to_save", "trainable_tokens_delta")}
    biases = {"none": (), "all": ("bias",), "semu_only": tuple(f"{name}.base_layer.bias" for name in _names(model))}
    found = {}
    for key in state_dict:
        own = ".semu_" in key or any(part in key for part in trained) or key.endswith(biases[config.bias])
        place = places.get(key, places.get(without_prefix(key), embeddings.get(_without_any_wrapper(key))))
        if not own and place is not None:
            found[key] = place
    return found


def _no_embedding(key: str, place: Tensor, value: Tensor, embeddings: Mapping[str, Tensor]) -> str | None:
    """Say in a sentence why a tensor of a file is not to take its place in the model, if it is not to."""
    if _without_any_wrapper(key) not in embeddings:
        return (
            f"The file of an adapter must hold its own tensors, got {key!r}, which would overwrite weights of the "
            "model with others. Train what is to be saved beside the adapter as `modules_to_save`, or load those "
            "weights into the model yourself."
        )
    if place.shape != value.shape or not place.is_floating_point():
        return (
            f"The embedding {key!r}, which was saved with the adapter, has shape {tuple(value.shape)} and "
            f"{value.dtype} in the file, and {tuple(place.shape)} and {place.dtype} in the model. Resize the model's "
            f"before loading: `model.resize_token_embeddings({len(value) if value.ndim else 0})`."
        )
    if not value.isfinite().all():
        return f"The saved adapter is damaged: {key!r} must have finite numbers, got NaN or infinity."
    return None


def _without_any_wrapper(key: str) -> str:
    """A file's key as the bare model has it, whatever of PEFT's was around the layer."""
    return without_prefix(".".join(part for part in without_wrappers(key).split(".") if part not in _AUXILIARY))


def _names(model: nn.Module) -> list[str]:
    return [without_prefix(name) for name, layer in model.named_modules() if isinstance(layer, SemuLayer)]


def _same(place: Tensor, value: Tensor) -> bool:
    """Whether a file's tensor changes nothing: it has the model's numbers, as far as the coarser dtype shows."""
    if place.is_meta or is_sharded(place):
        return True  # without values, or sharded: not compared, and not loaded either
    if place.shape != value.shape:
        return False
    dtypes = [tensor.dtype for tensor in (place, value) if tensor.is_floating_point()]
    coarser = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=place.dtype)
    return torch.equal(place.detach().to(coarser).cpu(), value.to(coarser).cpu())


def _named_for_a_place(key: str, adapter_name: str) -> str:
    layer = layer_of(key)
    new = layer is not None and key == tensor_key(layer, "semu_offset")
    return tensor_key(layer, "semu_offset", adapter_name) if layer and new else key


def mismatch(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> str | None:
    """Say in a sentence how the adapter's tensors in `state_dict` differ from those in `model`, if they do."""
    found = _saved_shapes(model, adapter_name, state_dict)
    expected: dict[str, tuple[int, ...]] = {}
    for name, layer in _layers(model, adapter_name).items():
        rank = layer.r[adapter_name]
        if not layer.is_initialized(adapter_name):  # then the file says
            saved = found.get(tensor_key(name, "semu_core", adapter_name), ())
            rank = min(saved[-1] if saved else 0, *layer.matrix_shape(adapter_name)[-2:])
        for kind, shape in layer.tensor_shapes(adapter_name, rank).items():
            key = tensor_key(name, kind, adapter_name)
            announced = layer.awaits_file[adapter_name] and adapter_name in layer.semu_offset
            if kind != "semu_offset" or key in found or announced:
                expected[key] = shape
    if missing := sorted(set(expected) - set(found)):
        return f"it has no weights for {missing[0]!r} ({len(missing)} such)."
    if extra := sorted(set(found) - set(expected)):
        return f"the model has no place for {extra[0]!r} ({len(extra)} such)."
    for key, shape in expected.items():
        if found[key] != shape:
            return f"{key!r} has shape {found[key]} in the file and {shape} in the model."
    return None


def make_room(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Give each layer tensors of the shapes that `state_dict` has for it, and record them as initialised.

    The state dict must fit, see [`mismatch`]. An adapter that is not initialised takes its ranks from it, unless there
    is no direction in it either.
    """
    found = _saved_shapes(model, adapter_name, state_dict)
    layers = _layers(model, adapter_name)
    ranks = {name: found[tensor_key(name, "semu_U", adapter_name)][-1] for name in layers}
    for name, layer in layers.items():
        offset = tensor_key(name, "semu_offset", adapter_name) in found
        fits = ranks[name] == layer.r[adapter_name] and offset == (adapter_name in layer.semu_offset)
        if not fits or layer.is_brought(adapter_name):  # what a library brings is not to be written to
            layer.allocate(adapter_name, ranks[name], offset=offset)
        if layer.is_initialized(adapter_name) or any(ranks.values()):
            layer.record(adapter_name)


def check_uncompiled(model: nn.Module, modules_to_save: Collection[str] | None) -> None:
    """Raise where PEFT would not find the place of saved modules, by the names that they have in a compiled model."""
    compiled = [name for name, _ in model.named_modules() if "_orig_mod" in name.split(".")]
    names = {without_compilation(name) for name in compiled}
    within = [saved for saved in modules_to_save or () if any(f".{name}".endswith(f".{saved}") for name in names)]
    if within:
        raise ValueError(
            f"`model` must not be compiled yet where an adapter with `modules_to_save` is loaded: {within[0]!r} is "
            f"compiled or inside of what is, {type(model).__name__}. Load the adapter first and call `torch.compile` "
            "then, or compile in place (`module.compile()`), which changes no names."
        )


def keep_room_to_load(model: nn.Module) -> RemovableHandle | None:
    """Let `model.load_state_dict` fill adapters that are not initialised, of the ranks that the state dict has.

    Returns:
        What to call `remove()` on when the adapters are taken out; None where the model is prepared already.
    """
    hooks = model._load_state_dict_pre_hooks.values()
    if any(getattr(hook, "hook", None) is _make_room_to_load for hook in hooks):
        return None
    return model.register_load_state_dict_pre_hook(_make_room_to_load)


def _make_room_to_load(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    tensors = {key.removeprefix(prefix): t for key, t in state_dict.items() if layer_of(key)}
    layers = [layer for layer in model.modules() if isinstance(layer, SemuLayer)]
    for adapter_name in sorted({name for layer in layers for name in layer.semu_core}):
        own = {key: t for key, t in tensors.items() if key.split(".")[-2:-1] == [adapter_name]}
        if own and mismatch(model, adapter_name, own) is None:  # else torch says what does not fit
            make_room(model, adapter_name, own)


def _layers(model: nn.Module, adapter_name: str) -> dict[str, SemuLayer]:
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, SemuLayer) and adapter_name in layer.semu_core and not isinstance(layer, TiedLayer)
    }


def _saved_shapes(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of SEMU's tensors in a state dict, by the keys that they have in the model."""
    names = set(_layers(model, adapter_name))
    found = {}
    for key, value in state_dict.items():
        if name := layer_of(key):
            # Where the layers were injected into a bare model, keys that match nothing keep PEFT's prefix.
            found[key if name in names else without_prefix(key)] = tuple(value.shape)
    return found


def made_to_load(model: nn.Module, config: SemuConfig, adapter_name: str) -> bool:
    """Whether the adapter was put into the model just now, to be filled from a file."""
    layers = _layers(model, adapter_name).values()
    if any(layer.is_initialized(adapter_name) for layer in layers):
        return any(layer.awaits_file[adapter_name] for layer in layers)
    return config.inference_mode


@contextmanager
def unless_refused(tuner: BaseTuner, adapter_name: str) -> Iterator[None]:
    """Where the block that puts an adapter into a model fails, leave the model as it was, flags and all."""
    flags = [(parameter, parameter.requires_grad) for parameter in tuner.model.parameters()]
    was_there = bool(_layers(tuner, adapter_name))
    try:
        yield
    except Exception:
        if not was_there:
            withdraw(tuner, adapter_name)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def withdraw(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter that could not be loaded out of the model again, leaving no trace of it."""
    restore_layers(model, adapter_name)
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    configs.pop(adapter_name, None)
    for module in list(model.modules()):
        if not configs and isinstance(module, BaseTuner):
            if "peft_config" in vars(module.model):
                del module.model.peft_config
            module._remove_hooks()
            for parameter, flag in vars(module).get("_requires_grad_before", ()):
                parameter.requires_grad_(flag)
