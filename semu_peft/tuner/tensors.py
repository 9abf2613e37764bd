"""The tensors of a layer's adapters, each in a module of its own, where a framework looks for a LoRA's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

TENSORS = ("semu_U", "semu_V", "semu_offset", "semu_core")
"""The kinds of tensors that an adapter has in a layer."""

_NOT_BY_ADAPTER = ("base_layer", "original_module")  # of what a layer of PEFT's has in it


class AdapterTensor(nn.Module):
    """One tensor of one adapter, which is called to be read.

    Libraries that keep weights elsewhere (Accelerate's and diffusers' offloading) bring a module's weights in while it
    is called; what clones, counts or shards weights goes through the named parameters of modules. The parameter has the
    name of the tensor's kind, and not `weight`, by which PEFT's policy for FSDP would wrap it alone and free it before
    it is used.

    Examples:
        >>> import torch
        >>> from semu_peft.tuner.tensors import AdapterTensor
        >>> held = AdapterTensor("semu_U", torch.eye(2))
        >>> held() is held.semu_U
        True
    """

    def __init__(self, kind: str, tensor: Tensor, requires_grad: bool = False, *, trainable: bool = False) -> None:
        super().__init__()
        self.kind = kind
        self.trainable = trainable
        self.register_parameter(kind, nn.Parameter(tensor, requires_grad=requires_grad))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Take a parameter, frozen unless this one is trainable.

        Transformers puts trainable ones in their place when it loads, and DDP would wait for gradients of them.
        """
        if param is not None and not self.trainable:
            param.requires_grad_(False)
        super().register_parameter(name, param)

    @property
    def stored(self) -> nn.Parameter:
        """The parameter as it lies."""
        parameter: nn.Parameter = getattr(self, self.kind)
        return parameter

    @property
    def is_brought(self) -> bool:
        """Whether a library has put a `forward` around this one, which brings the values when it is called."""
        own = self.__dict__.get("forward")  # after its hooks are gone, Accelerate leaves the class's method there
        return own is not None and getattr(own, "__func__", None) is not AdapterTensor.forward

    def forward(self) -> Tensor:
        """The parameter; where a library takes its values away after the call, a view, which keeps them."""
        return self.stored.view_as(self.stored) if self.is_brought else self.stored


class AdapterTensors(nn.ModuleDict):
    """A mapping from the names of a layer's adapters to one tensor of each.

    `tensors[name]` is the tensor to compute with, wherever it was; `tensors.stored_parameter(name)` the parameter as it
    lies, which may be on the meta device; `items()` and `values()` give modules, as PEFT expects of a `ModuleDict`. A
    module takes no child by the name of one of its attributes: those here are called as no adapter will be.

    Args:
        kind: What the tensors are called, `"semu_core"` for example.
        trainable: Whether the tensors are trained; if not, no gradient ever reaches them.

    Examples:
        >>> import torch
        >>> from semu_peft.tuner.tensors import AdapterTensors
        >>> cores = AdapterTensors("semu_core", trainable=True)
        >>> cores["default"] = torch.zeros(2, 2)
        >>> [name for name, _ in cores.named_parameters()], cores["default"].requires_grad
        (['default.semu_core'], True)
    """

    def __init__(self, kind: str, *, trainable: bool = False) -> None:
        super().__init__()
        self._kind = kind
        self._trainable = trainable

    def __getitem__(self, adapter_name: str) -> Tensor:  # type: ignore[override]
        tensor: Tensor = self._held(adapter_name)()
        return tensor if self._trainable or not tensor.requires_grad else tensor.detach()

    def __setitem__(self, adapter_name: str, tensor: Tensor) -> None:  # type: ignore[override]
        # The parameter stays the same object, so that an optimiser made before goes on with it; but what a library
        # would bring in its place is of another time, so a tensor that is brought makes way for one at hand.
        data = tensor.detach().clone() if self._trainable else tensor.detach()
        held = self._held(adapter_name) if adapter_name in self else None
        if held is None or held.is_brought or held.stored.is_meta != data.is_meta:
            requires_grad = self._trainable if held is None else held.stored.requires_grad
            self.add_module(adapter_name, AdapterTensor(self._kind, data, requires_grad, trainable=self._trainable))
        else:
            held.stored.grad = None
            if held.stored.shape != data.shape:
                # A graph that is still alive, of an output that somebody kept, goes on expecting gradients of the old
                # shape, whoever asks for them; autograd forgets that only where the dtype changes.
                other = torch.float32 if data.dtype == torch.float16 else torch.float16
                held.stored.data = data.new_empty(0, dtype=other)
            held.stored.data = data

    def stored_parameter(self, adapter_name: str) -> nn.Parameter:
        """The parameter as it lies, for what asks for its place, flags or gradient."""
        return self._held(adapter_name).stored

    def is_brought_by_library(self, adapter_name: str) -> bool:
        """Whether a library brings the adapter's tensor when it is read."""
        return self._held(adapter_name).is_brought

    def lacks_values(self, adapter_name: str) -> bool:
        """Whether the adapter's tensor has no values, and nothing that would bring them."""
        held = self._held(adapter_name)
        return held.stored.is_meta and not held.is_brought

    def _held(self, adapter_name: str) -> AdapterTensor:
        return self._modules[adapter_name]  # type: ignore[return-value]


class HoldsTensors:
    """What a SEMU layer knows of the tensors of its adapters, which it has in an `AdapterTensors` of each kind."""

    def is_brought(self, adapter_name: str) -> bool:
        """Whether a library keeps the adapter elsewhere, and brings it when it is read."""
        return any(tensors.is_brought_by_library(adapter_name) for tensors in self.tensors_of(adapter_name))

    def tensors_of(self, adapter_name: str) -> list[AdapterTensors]:
        """Of each kind that the adapter has here, the mapping."""
        every: list[AdapterTensors] = [getattr(self, kind) for kind in TENSORS]
        return [tensors for tensors in every if adapter_name in tensors]


def places_of(model: nn.Module, adapter_names: Collection[str]) -> tuple[str, ...]:
    """What the keys of some adapters' tensors begin with in a model, adapters of any of PEFT's methods.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.tuner.tensors import places_of
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), SemuConfig(target_modules=["0"]))
        >>> places_of(model, ["default"])[0]
        'base_model.model.0.semu_U.default.'
    """
    places: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        kinds = [kind for kind, _ in module.named_children() if kind not in _NOT_BY_ADAPTER]
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            places += [f"{name}.{kind}.{adapter_name}." for kind in kinds for adapter_name in adapter_names]
    return tuple(places)


def left_out(model: nn.Module, state_dict: Mapping[str, Tensor], others: Collection[str]) -> dict[str, Tensor]:
    """What PEFT has left out of a state dict for the name of another adapter in a key, but is no such adapter's.

    That is where a layer, or a kind of tensors, has the name of an adapter: layer 1 of a model with an adapter `"1"`.

    Args:
        model: The model.
        state_dict: What PEFT has left, by the model's keys.
        others: The names of the other adapters.

    Raises:
        ValueError: Tensors left out are sharded, and those in the state dict were gathered.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.tuner.tensors import left_out
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), SemuConfig(target_modules=["0"]))
        >>> list(left_out(model, {}, ["base_layer"]))
        ['base_model.model.0.base_layer.weight', 'base_model.model.0.base_layer.bias']
    """
    named, theirs = [f".{name}." for name in others], places_of(model, others)

    def lacks(key: str) -> bool:
        return any(name in f"{key}." for name in named) and key not in state_dict and not f"{key}.".startswith(theirs)

    if not any(lacks(key) for key, _ in model.named_parameters(remove_duplicate=False)):
        return {}
    found = {key: tensor for key, tensor in model.state_dict().items() if lacks(key)}
    if any(map(is_sharded, found.values())) and not any(map(is_sharded, state_dict.values())):
        raise ValueError(
            f"The name of an adapter must not be in that of a sharded tensor, got {next(iter(found))!r} beside the "
            f"adapters {sorted(others)}: PEFT has left it out of what was gathered to be saved. Save in one process, "
            "or give that adapter another name."
        )
    return found


def is_sharded(tensor: Any) -> bool:
    """Whether each process holds a part of it alone.

    Examples:
        >>> import torch
        >>> from semu_peft.tuner.tensors import is_sharded
        >>> is_sharded(torch.ones(2))
        False
    """
    return hasattr(tensor, "to_local")


def with_values(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model's state dict, with the values of those that are offloaded.

    Args:
        model: The model.
        state_dict: Tensors of it, by its keys.

    Raises:
        ValueError: An adapter's tensor has no values anywhere.

    Examples:
        >>> import torch
        >>> from accelerate import cpu_offload
        >>> from semu_peft.tuner.tensors import AdapterTensors, with_values
        >>> cores = AdapterTensors("semu_core")
        >>> cores["default"] = torch.ones(2)
        >>> state = cpu_offload(cores, "cpu").state_dict()
        >>> state["default.semu_core"].is_meta, with_values(cores, state)["default.semu_core"]
        (True, tensor([1., 1.]))
    """
    values = dict(state_dict)
    for key, tensor in state_dict.items():
        if tensor.is_meta:
            held = model.get_submodule(key.rpartition(".")[0])
            if isinstance(held, AdapterTensor):
                values[key] = held().detach()
                if values[key].is_meta:
                    raise ValueError(
                        f"{key!r} lies on the meta device, without values, so that it cannot be saved. Load the "
                        "adapter's weights first."
                    )
    return values
