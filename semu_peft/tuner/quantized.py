"""The correction of quantised linear layers."""

from __future__ import annotations

import warnings
from typing import Any

from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .config import SemuConfig
from .linear import Linear
from .weight_use import WeightUse


class QuantizedLinear(Linear):
    """A linear layer quantised by bitsandbytes (8 or 4 bits), torchao or HQQ, with SEMU corrections.

    The correction is computed beside the quantised layer and leaves it alone. Merging dequantises the weight, adds the
    correction and quantises again, as PEFT's LoRA does, so that it rounds the correction too; unmerging rounds once
    more.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SemuConfig,
        layer_name: str = "",
        requested: int | None = None,
        **quantization: Any,
    ) -> None:
        self.quantization_backend = quantization_backend(base_layer, **quantization)
        super().__init__(base_layer, adapter_name, config, layer_name, requested)

    @property
    def base_weight(self) -> Tensor:
        """The frozen weight as it is stored, not in the shape that it stands for."""
        base: Any = self.get_base_layer()
        return base.weight if hasattr(base, "weight") else base.W_q

    @property
    def weight(self) -> Tensor:
        return self.base_weight

    def find_weight_use(self) -> WeightUse:
        return WeightUse.PLAIN  # what stands in the place of the weight is the quantisation's own affair

    def matrix_shape(self, adapter_name: str) -> tuple[int, ...]:
        base: Any = self.get_base_layer()
        return (base.out_features, base.in_features)

    def get_base_weight(self) -> Tensor:
        base = self.get_base_layer()
        if getattr(getattr(self.base_weight, "quant_state", None), "packing_format_for_cpu", False):
            # For its CPU kernel bitsandbytes packs 4-bit weights anew at the first forward pass, in an order that its
            # dequantisation misreads. Saving unpacks them in place; the next forward pass packs them again.
            base.state_dict()
        weight: Tensor = super().get_base_weight()
        return weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        warnings.warn("Merging into a quantised weight rounds the correction to its few bits.", stacklevel=2)
        super().merge(safe_merge, adapter_names)


def quantization_backend(base_layer: nn.Module, **quantization: Any) -> QuantizationBackend | None:
    """PEFT's handler of a quantised layer; `None` where the layer is not quantised, as far as PEFT knows."""
    if is_parametrized(base_layer, "weight") or type(getattr(base_layer, "weight", None)) is nn.Parameter:
        return None  # without importing every quantisation library to find out
    return resolve_quantization_backend(base_layer, **{"get_apply_tensor_subclass": _no_config, **quantization})


def _no_config() -> None:
    raise TypeError(
        "torchao can merge into a quantised weight only where the model carries its quantisation configuration: load "
        "it with `from_pretrained(..., quantization_config=TorchAoConfig(...))`, or keep the adapter apart."
    )
