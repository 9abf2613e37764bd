"""The correction of linear layers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .cost import dense_is_cheaper
from .layer import SemuLayer, in_range
from .weight_use import read_weight

NEVER_CALLED = nn.modules.linear.NonDynamicallyQuantizableLinear  # an attention's output projection
UNKNOWN_QUANTIZATION = "it is quantised in a way that SEMU does not know; load it unquantised or with bitsandbytes"


class Linear(SemuLayer):
    """`torch.nn.Linear` or transformers' `Conv1D` (which stores its weight transposed) with SEMU corrections.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> config = SemuConfig(target_modules=["0"], r=2, init_weights=False)
        >>> layer = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), config).base_model.model[0]
        >>> tuple(layer.semu_U["default"].shape), tuple(layer.semu_V["default"].shape)
        ((3, 2), (4, 2))
    """

    @classmethod
    def refusal(cls, base_layer: nn.Module) -> str | None:
        if isinstance(base_layer, NEVER_CALLED):
            return "`nn.MultiheadAttention` reads its weight without calling it; target the attention module itself"
        dtype = getattr(read_weight(base_layer), "dtype", torch.int8)
        scaled = dtype.itemsize < 2 and type(base_layer) is not nn.Linear  # as in transformers' 8-bit float layers
        return UNKNOWN_QUANTIZATION if scaled or not dtype.is_floating_point else super().refusal(base_layer)

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base weight is stored `(in, out)`."""
        return isinstance(self.get_base_layer(), Conv1D)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora`, which knows linear layers only, converts this layer."""
        return True

    @property
    def in_features(self) -> int:
        """The base layer's input features, which SDXL's pipeline asks its time embedding for."""
        base: Any = self.get_base_layer()
        return base.weight.shape[0] if self.fan_in_fan_out else base.in_features

    @property
    def out_features(self) -> int:
        """The base layer's output features."""
        base: Any = self.get_base_layer()
        return base.weight.shape[1] if self.fan_in_fan_out else base.out_features

    def weight_to_matrix(self, weight: Tensor, adapter_name: str) -> Tensor:
        return weight.T if self.fan_in_fan_out else weight

    def matrix_to_weight(self, matrix: Tensor, adapter_name: str) -> Tensor:
        return matrix.T if self.fan_in_fan_out else matrix

    def joins_weight(self, adapter_names: list[str], x: Tensor) -> bool:
        # Compiled or exported, a choice by the batch would be a graph for each side of it, or none for both.
        if torch.compiler.is_compiling() or not self.base_is_bare(nn.Linear) or not x.numel():
            return False
        m, n = self.base_weight.shape
        return dense_is_cheaper(m, n, sum(self.r[name] for name in adapter_names), x.numel() // n)

    def run_base(self, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.base_is_bare(nn.Linear):
            return F.linear(x, weight, cast(nn.Linear, self.base_layer).bias)
        return super().run_base(x, weight, *args, **kwargs)

    def add_correction(self, output: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        """`output + ((x V) Rᵀ) Uᵀ`: three thin products, of which autograd keeps only the `(..., r)` middle ones."""
        right, core = self.semu_V[adapter_name], self.get_core(adapter_name)
        # The small bases follow the activations' dtype; only the thin middle is computed in the core's own.
        x = in_range(x)
        hidden = F.linear(x, right.mT.to(x.dtype))
        hidden = F.linear(hidden.to(core.dtype), core).to(output.dtype)
        return _add_product(output, hidden, self.semu_U[adapter_name].to(output.dtype))


def _add_product(output: Tensor, hidden: Tensor, left: Tensor) -> Tensor:
    """`output + hidden Uᵀ`, in one pass over the output."""
    device = output.device.type
    rounds = device != "meta" and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != output.dtype
    if rounds or output.is_nested:  # autocast would round the output as well; nested tensors have no rows
        return output + F.linear(hidden, left)
    rows = torch.addmm(output.reshape(-1, output.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), left.mT)
    return rows.view(output.shape)
