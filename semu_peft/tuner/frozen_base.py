"""The frozen layer under an adapter: its weight, what it does with that, and how it runs with another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .weight_use import WeightUse, no_place_for, read_weight, weight_use


class FrozenBase:
    """What a SEMU layer knows of the layer that it corrects, `base_layer`."""

    base_layer: nn.Module
    layer_name: str
    watch: Callable[[Tensor], Tensor] | None = None
    """What whoever reads `weight` past the layer is given, while that is observed."""
    _weight_use: WeightUse | None

    @property
    def weight(self) -> Any:
        """The base layer's weight, for whoever reads it past the layer and so past its correction."""
        base: Any = bare(self.base_layer)
        weight = base.qweight if hasattr(base, "qweight") else base.weight
        return weight if self.watch is None else self.watch(weight)

    @property
    def base_weight(self) -> Tensor:
        """The frozen weight of the base layer, as it is stored or computed now."""
        base: Any = bare(self.base_layer)
        return cast(Tensor, base.qweight if hasattr(base, "qweight") else read_weight(base))

    def find_weight_use(self) -> WeightUse | None:
        """What the base layer does with its weight, which decides where the correction goes and if it can be merged."""
        return weight_use(bare(self.base_layer))

    @property
    def weight_use(self) -> WeightUse:
        """What the base layer was found to do with its weight.

        Raises:
            ValueError: It is not known, as the weight has never been in memory.
        """
        if self._weight_use is None:
            self._weight_use = self.find_weight_use()
        if self._weight_use is None or (self._weight_use is WeightUse.OWN and self.base_weight.is_meta):
            raise ValueError(
                f"Layer {self.layer_name!r}, a {type(bare(self.base_layer)).__name__}, has a `forward` of its own and "
                "an offloaded weight, so that the correction cannot be added to it. Load this layer into memory, or "
                "put it into `exclude_modules`."
            )
        return self._weight_use

    @property
    def execution_device(self) -> torch.device | None:
        """Where Accelerate runs the base layer while its weights are offloaded; `None` where they are not."""
        hook: Any = getattr(bare(self.base_layer), "_hf_hook", None)
        device = hook.execution_device if getattr(hook, "offload", False) else None
        return None if device is None else torch.device(device)

    @property
    def is_only_planned(self) -> bool:
        """Whether the base layer lies on the meta device, without values and nothing that would bring them."""
        return self.base_weight.is_meta and self.execution_device is None

    def base_is_bare(self, *kinds: type[nn.Module]) -> bool:
        """Whether the base layer is just its arithmetic: one of these very types, unquantised and without hooks."""
        base: Any = self.base_layer
        hooked = base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__
        return type(base) in kinds and not hooked and base.weight.dtype.itemsize >= 2

    def run_base(self, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output with another weight in its parameter's place, whatever its `forward` does with it."""
        inside: Any = self.base_layer
        path = "weight"
        while hasattr(inside, "base_layer"):
            inside, path = inside.base_layer, f"base_layer.{path}"
        return functional_call(self.base_layer, {path: weight}, (x, *args), kwargs, tie_weights=False)

    def no_place_for_merge(self) -> str | None:
        """Why no correction of this layer can be merged, and the mend; `None` where it can."""
        return no_place_for(self.find_weight_use(), self.layer_name, "merged")


def bare(layer: nn.Module) -> Any:
    """The layer itself, out of the adapters of any method that are around it."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer  # type: ignore[assignment]
    return layer


def sum_in_dtype_of(weight: Tensor, delta: Tensor) -> Tensor:
    """The sum, added in the adapter's precision and rounded to the model's once."""
    return (weight.to(delta.dtype) + delta).to(weight.dtype)


def adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of an adapter on a weight of this one: float32 or better."""
    return torch.float64 if dtype == torch.float64 else torch.float32
