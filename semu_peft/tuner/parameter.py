"""The correction of a parameter that no layer of its own holds, such as the fused experts of a mixture."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .config import SemuConfig
from .keys import without_wrappers
from .layer import SemuLayer
from .patterns import match_pattern
from .uninitialized import check_values
from .weight_use import WeightUse


class ParamWrapper(SemuLayer):
    """A module with SEMU corrections of one of its parameters, named in `SemuConfig.target_parameters`.

    A parameter `(m, n)` is one matrix; `(experts, m, n)` is a batch of them, each expert with bases and a core of its
    own and one rank for all; with `SemuConfig.target_experts` a batch of those that are named, and the others stay.
    In the forward pass the module runs with `W + U R Vᵀ` in the parameter's place, which is rounded to the parameter's
    dtype as merging rounds it, so that both compute the same; whoever reads the parameter past the module gets the sum
    too. The module itself is not written to. Several parameters of one module are corrected by wrappers around each
    other.

    PEFT finds wrapped parameters by the name of this class.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> class Experts(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up = torch.nn.Parameter(torch.randn(2, 4, 3))
        ...     def forward(self, x):
        ...         return x @ self.up
        >>> config = SemuConfig(target_modules=[], target_parameters=["0.up"], r=2, init_weights=False)
        >>> wrapper = get_peft_model(torch.nn.Sequential(Experts()), config).base_model.model[0]
        >>> tuple(wrapper.get_delta_weight("default").shape)  # a correction for each expert
        (2, 4, 3)
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SemuConfig,
        layer_name: str = "",
        requested: int | None = None,
        *,
        parameter_name: str,
    ) -> None:
        self.parameter_name = parameter_name
        super().__init__(base_layer, adapter_name, config, layer_name, requested)

    def __getattr__(self, name: str) -> Any:
        """Forward missing attributes to the wrapped module, which other modules may ask for them."""
        if name == vars(self).get("parameter_name"):
            return self.corrected()
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name == "base_layer":
                raise
        if name in ("values", "items") and isinstance(self.get_base_layer(), nn.ParameterDict):
            return getattr(self._contents(), name)
        return getattr(self.base_layer, name)

    @property
    def in_features(self) -> int:
        """An attention's dimension, by the name that PEFT's layers have for it; else the module's own."""
        base: Any = self.get_base_layer()
        return int(base.embed_dim if isinstance(base, nn.MultiheadAttention) else base.in_features)

    @property
    def out_features(self) -> int:
        """The size of an attention's projections of query, key and value together; else the module's own."""
        base: Any = self.get_base_layer()
        return int(3 * base.embed_dim if isinstance(base, nn.MultiheadAttention) else base.out_features)

    @property
    def base_weight(self) -> Tensor:
        """The frozen parameter."""
        return cast(nn.Parameter, attrgetter(self.parameter_name)(self.get_base_layer()))

    @property
    def weight(self) -> Tensor:
        """The module's own `weight`, corrected where that is the parameter."""
        return self.corrected() if self.parameter_name == "weight" else cast(Tensor, self.base_layer.weight)

    def find_weight_use(self) -> WeightUse:
        return WeightUse.OWN

    def get_base_weight(self) -> Tensor:
        return self.base_weight.data

    def set_base_weight(self, weight_data: Tensor) -> None:
        self.base_weight.data = weight_data

    def experts(self, adapter_name: str) -> list[int] | None:
        """The experts that the adapter corrects, `None` for all that there are."""
        return match_pattern(self.configs[adapter_name].target_experts, self.layer_name)

    def weight_to_matrix(self, weight: Tensor, adapter_name: str) -> Tensor:
        experts = self.experts(adapter_name)
        return weight if experts is None else weight[experts]

    def matrix_shape(self, adapter_name: str) -> tuple[int, ...]:
        experts, shape = self.experts(adapter_name), tuple(self.base_weight.shape)
        return shape if experts is None else (len(experts), *shape[1:])

    def matrix_to_weight(self, matrix: Tensor, adapter_name: str) -> Tensor:
        experts = self.experts(adapter_name)
        if experts is None:
            return matrix
        places = torch.tensor(experts, device=matrix.device)
        return matrix.new_zeros(self.base_weight.shape).index_copy(0, places, matrix)

    def wrapper_of(self, parameter_name: str) -> ParamWrapper | None:
        """This wrapper or the one inside it that corrects the parameter of that name."""
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            if layer.parameter_name == parameter_name:
                return layer
            layer = layer.base_layer
        return None

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Called by PEFT to take this wrapper, and those inside it, off the module."""
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output at the corrected parameter."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"A module whose parameter ({self.parameter_name!r}) is corrected has one weight for the whole batch, "
                "so `adapter_names` cannot choose adapters by example. Run one batch an adapter instead."
            )
        kwargs.pop("adapter_names", None)
        weight = self.corrected()
        if weight is self.base_weight:
            return self.base_layer(*args, **kwargs)
        inside, path = self.base_layer, self.parameter_name
        while isinstance(inside, ParamWrapper):
            inside, path = inside.base_layer, f"base_layer.{path}"
        return functional_call(self.base_layer, {path: weight}, args, kwargs, tie_weights=False)

    def corrected(self) -> Tensor:
        """The parameter plus the corrections of the active adapters, which the module and whoever else reads it gets.

        A parent may read the parameter past the module, or the module may be a list that computes nothing itself.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        weight = self.base_weight
        names = [] if self.disable_adapters or self.merged else self._live_adapters()
        check_values(self, [name for name in names if self.r[name] > 0])
        for name in names:
            if self.r[name] > 0:
                weight = self._plus_correction(weight, name)
            weight = self._guard(weight, name)
        return weight

    def _plus_correction(self, weight: Tensor, adapter_name: str) -> Tensor:
        delta = self.semu_U[adapter_name] @ self.get_core(adapter_name) @ self.semu_V[adapter_name].mT
        experts = self.experts(adapter_name)
        if experts is None:
            return (weight.to(delta.dtype) + delta).to(weight.dtype)
        corrected = (weight[experts].to(delta.dtype) + delta).to(weight.dtype)
        return weight.index_copy(0, torch.tensor(experts, device=weight.device), corrected)

    # ---- a ParameterList or a ParameterDict, of which the parent reads one entry or the other ----

    def _contents(self) -> Any:
        base: Any = self.get_base_layer()
        if isinstance(base, nn.ParameterDict):
            return {key: getattr(self, key) for key in base}
        if isinstance(base, nn.ParameterList):
            return [getattr(self, str(index)) for index in range(len(base))]
        raise TypeError(f"{type(base).__name__} is neither a ParameterList nor a ParameterDict, and holds no entries.")

    def __getitem__(self, key: Any) -> Any:
        return self._contents()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._contents())

    def __len__(self) -> int:
        return len(self._contents())

    def __contains__(self, key: object) -> bool:
        contents: Any = self.get_base_layer()
        return key in contents

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}"


def parameter_path(module_name: str, wrapper: ParamWrapper) -> str:
    """The full name of a wrapped parameter in the base model, from the wrapper's own in the wrapped one."""
    return f"{without_wrappers(module_name)}.{wrapper.parameter_name}"
