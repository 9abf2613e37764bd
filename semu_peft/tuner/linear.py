"""The correction of linear layers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .layer import SemuLayer, in_range


class Linear(SemuLayer):
    """`torch.nn.Linear` or transformers' `Conv1D` (which stores its weight transposed) with SEMU corrections."""

    @classmethod
    def refusal(cls, base_layer: nn.Module) -> str | None:
        if isinstance(base_layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "`nn.MultiheadAttention` reads its weight without calling it; target the attention module itself"
        return None

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base weight is stored `(in, out)`."""
        return isinstance(self.get_base_layer(), Conv1D)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora`, which knows linear layers only, converts this layer."""
        return True

    def weight_to_matrix(self, weight: Tensor, adapter_name: str) -> Tensor:
        return weight.T if self.fan_in_fan_out else weight

    def matrix_to_weight(self, matrix: Tensor, adapter_name: str) -> Tensor:
        return matrix.T if self.fan_in_fan_out else matrix

    def add_correction(self, output: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        """`output + ((x V) Rᵀ) Uᵀ`: three thin products, of which autograd keeps only the `(..., r)` middle ones."""
        left, right = self.semu_U[adapter_name], self.semu_V[adapter_name]
        core = self.get_core(adapter_name)
        # The small bases follow the activations' dtype; only the thin middle is computed in the core's own.
        x = in_range(x)
        hidden = F.linear(x, right.mT.to(x.dtype))
        hidden = F.linear(hidden.to(core.dtype), core)
        return output + F.linear(hidden.to(output.dtype), left.to(output.dtype))
