"""The original model, without a second copy of it: the same model without the adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from semu_peft.model_state import device_of

from .adapter_parts import Part, adapter_parts, modules_of
from .replica import is_compiled, replicate
from .split_weights import AtStart, at_start, keep_start

_MADE_FROM = "_semu_made_from"  # at a replica with other values: the model that it was made from
_LEFT_OUT = "_semu_left_out"  # at a replica: the names of the adapters that it is without


@contextmanager
def original(model: nn.Module, adapter_name: str | None = None) -> Iterator[nn.Module]:
    """Give the model without one adapter, and with every other as it is, to be called in place of the model.

    What it gives is a second tree of modules over the same tensors, so the model itself stays as it is and may serve
    from another thread meanwhile. Compiled models run eagerly in it, and `DistributedDataParallel` is left off. Only
    where the modules cannot be told from their hooks (FSDP, DeepSpeed ZeRO-3, a `forward` replaced by a closure) is the
    adapter switched off in the model itself for the length of the block; such a model should not serve meanwhile.

    PEFT's starts that split the weight (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) and biases trained with an adapter have
    no original in the base weights. There the values of the start are put in their place, as they were when this was
    first called, or [`remember_start`][semu_peft.objectives.original.remember_start] was.

    Args:
        model: A model with an adapter of any PEFT method, bare or in a distributed wrapper. One made by
            [`without_adapter`][semu_peft.objectives.original.without_adapter] is its own original.
        adapter_name: The adapter to leave out; by default all that are trained, or else the active ones.

    Yields:
        The module to call.

    Raises:
        ValueError: There is no such adapter, so that there is no original to go back to; or it is merged.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.objectives.original import original
        >>> base, x = torch.nn.Sequential(torch.nn.Linear(4, 3)), torch.ones(1, 4)
        >>> expected = base(x)
        >>> model = get_peft_model(base, SemuConfig(target_modules=["0"], r=2, init_weights=False))
        >>> with original(model) as reference:
        ...     torch.equal(reference(x), expected), torch.equal(model(x), expected)
        (True, False)
    """
    model = vars(model).get(_MADE_FROM, model)
    if _is_without(model, adapter_name):
        yield model
        return
    replica = None if _is_sharded(model) else _replica(model, adapter_name)
    if replica is not None:
        yield replica
    else:
        with _switched_in_place(model, adapter_name):
            yield model


def without_adapter(model: nn.Module, adapter_name: str | None = None) -> nn.Module:
    """Make the module that [`original`][semu_peft.objectives.original.original] gives, to be kept as long as wanted.

    It shares all tensors with the model, so it follows what happens to them; adapters added later are not in it.

    Raises:
        ValueError: There is no such adapter, or it is merged; or the model is sharded (FSDP, DeepSpeed ZeRO-3), or a
            `forward` in it cannot be turned to other modules: use `original` there.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.objectives.original import original, without_adapter
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> model = get_peft_model(base, SemuConfig(target_modules=["0"], r=2, init_weights=False))
        >>> reference = without_adapter(model)
        >>> with original(reference) as same:
        ...     same is reference
        True
    """
    if _is_without(model, adapter_name):
        return model
    replica = None if _is_sharded(model) else _replica(model, adapter_name)
    if replica is None:
        raise ValueError(
            f"{type(model).__name__} is sharded, or a `forward` in it was replaced by one that calls its own modules, "
            "so it cannot be had a second time. Run it inside `with original(model) as reference:`."
        )
    return replica


def left_out(model: nn.Module) -> frozenset[str]:
    """The names of the adapters that a module is without, where `original` or `without_adapter` gave it.

    Examples:
        >>> from semu_peft.objectives.original import left_out
        >>> left_out(nn.Linear(2, 2))
        frozenset()
    """
    return vars(model).get(_LEFT_OUT, frozenset())


def with_values(model: nn.Module, values: Mapping[int, Tensor]) -> nn.Module:
    """Make a second tree of modules over a model's tensors, in which some parameters have other values.

    The model itself stays as it is. Its [`original`][semu_peft.objectives.original.original] is that of the model.

    Args:
        model: Any model that is not sharded, bare or in a wrapper that is then left off.
        values: What stands in place of parameters, by the parameter's `id`: parameters, or tensors with a graph, as
            they are; other tensors frozen.

    Raises:
        ValueError: The model is sharded (FSDP, DeepSpeed ZeRO-3), or a `forward` in it cannot be turned to other
            modules.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.original import with_values
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> doubled = with_values(layer, {id(layer.weight): 2 * layer.weight.detach()})
        >>> x = torch.ones(1, 2)
        >>> torch.equal(doubled(x), 2 * layer(x))
        True
    """
    bare = None if _is_sharded(model) else _bare(model)
    replicas = None if bare is None else replicate(bare, values)
    if bare is None or replicas is None:
        raise ValueError(
            f"`model`: {type(model).__name__} is sharded, or a `forward` in it was replaced by one that calls its own "
            "modules, so it cannot be had a second time with other weights. Load it unsharded, in one process."
        )
    replica = replicas[id(bare)]
    if replica is not bare:
        # Past `__setattr__`, which would make the model a part of its own replica.
        vars(replica)[_MADE_FROM] = vars(bare).get(_MADE_FROM, bare)
    return replica


def remember_start(model: nn.Module, adapter_name: str | None = None) -> None:
    """Keep the values that an adapter starts from, where the original is not to be had without them.

    `original` does so when it is first called. Call this before values that were trained are loaded over the start, on
    the parameters that will be trained. For adapters that leave the base weight alone it does nothing, nor where values
    are offloaded or sharded by DeepSpeed.

    Args:
        model: A model with a PEFT adapter; without one nothing happens.
        adapter_name: The adapter; by default all that are trained, or else the active ones.

    Raises:
        ValueError: There is no adapter of that name.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from semu_peft.objectives.original import original, remember_start
        >>> base, x = torch.nn.Sequential(torch.nn.Linear(4, 3)), torch.ones(1, 4)
        >>> expected = base(x)
        >>> model = get_peft_model(base, LoraConfig(target_modules=["0"], r=2, init_lora_weights="pissa"))
        >>> remember_start(model)
        >>> model.base_model.model[0].lora_B["default"].weight.data.add_(1.0).shape
        torch.Size([3, 2])
        >>> with original(model) as reference:
        ...     torch.allclose(reference(x), expected, atol=1e-6)
        True
    """
    try:
        parts = adapter_parts(model, adapter_name)
    except ValueError:
        if adapter_name is not None:
            raise
        return
    keep_start(model, parts)


def reference_model(model: nn.Module, reference: nn.Module | None) -> AbstractContextManager[nn.Module]:
    """Give the frozen reference, where an objective has one, or else the original of the model.

    A reference that is still on the CPU, when the model has been moved from there (`unlearn` moves it to Accelerate's
    device), follows it; one that Accelerate's hooks move stays.

    Examples:
        >>> from torch import nn
        >>> from semu_peft.objectives.original import reference_model
        >>> with reference_model(nn.Identity(), nn.ReLU()) as reference:
        ...     reference
        ReLU()
    """
    if reference is None:
        return original(model)
    if isinstance(reference, nn.Module) and not _moves_itself(reference):
        device = device_of(model)
        if device.type != "cpu" and device_of(reference).type == "cpu":
            reference.to(device)
    return nullcontext(reference)


def _moves_itself(model: nn.Module) -> bool:
    return hasattr(model, "hf_device_map") or "_hf_hook" in vars(model)


def _is_without(model: nn.Module, adapter_name: str | None) -> bool:
    left_out = vars(model).get(_LEFT_OUT)
    return left_out is not None and (adapter_name is None or adapter_name in left_out)


def _replica(model: nn.Module, adapter_name: str | None) -> nn.Module | None:
    bare = _bare(model)
    if bare is None:
        return None
    parts = _parts(bare, adapter_name)
    start = at_start(bare, parts)
    replicas = replicate(bare, start.values)
    if replicas is None:
        return None
    _switch(parts, start, replicas)
    replica = replicas[id(bare)]
    names = {part.adapter_name for part in parts} | vars(bare).get(_LEFT_OUT, frozenset())
    vars(replica)[_LEFT_OUT] = frozenset(names)
    return replica


@contextmanager
def _switched_in_place(model: nn.Module, adapter_name: str | None) -> Iterator[None]:
    parts = _parts(model, adapter_name)
    start = at_start(model, parts)
    changed = [parameter for parameter in model.parameters() if id(parameter) in start.values]
    states = [(part.layer, part.layer._active_adapter, part.layer._disable_adapters) for part in parts]
    now: list[Tensor] = [parameter.detach().clone() for parameter in changed]
    try:
        _switch(parts, start, {})
        for parameter in changed:  # by `data`, as a graph that was made before will be differentiated afterwards
            parameter.data.copy_(start.values[id(parameter)])
        yield
    finally:
        for layer, active, disabled in reversed(states):
            layer._active_adapter, layer._disable_adapters = active, disabled
        for parameter, value in zip(changed, now, strict=True):
            parameter.data.copy_(value)


def _parts(model: nn.Module, adapter_name: str | None) -> list[Part]:
    parts = adapter_parts(model, adapter_name)
    if any(part.is_merged for part in parts):
        raise ValueError("An adapter is merged into the weights; call `unmerge_adapter` to have the original back.")
    return parts


def _switch(parts: list[Part], start: AtStart, replicas: dict[int, nn.Module]) -> None:
    """Leave the adapter out, or let it stay at its start, in the replicas of its layers or in the layers themselves."""
    staying = {id(part) for part in start.parts}
    for part in parts:
        place = part._replace(layer=replicas.get(id(part.layer), part.layer))
        if id(part) in staying:
            place.put_in()
        else:
            place.leave_out()


def _bare(model: nn.Module) -> nn.Module | None:
    """The model without its distributed and compiled wrappers; None where a wrapper sets the precision."""
    while is_compiled(model) or isinstance(model, (DistributedDataParallel, DataParallel)):
        forward = vars(model).get("forward")
        if type(getattr(forward, "__wrapped__", None)).__name__ == "ConvertOutputsToFp32":  # put there by Accelerate
            return None
        model = getattr(model, "_orig_mod" if is_compiled(model) else "module")
    return model


def _is_sharded(model: nn.Module) -> bool:
    modules = modules_of(model)
    names = {kind.__name__ for cls in {type(module) for module in modules} for kind in cls.__mro__}
    if names & {"FSDPModule", "FullyShardedDataParallel", "DeepSpeedEngine"}:
        return True
    return any(
        hasattr(parameter, "ds_id") for module in modules for parameter in vars(module).get("_parameters", {}).values()
    )
