"""The correction of linear layers."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .layer import SemuLayer, in_range


class Linear(SemuLayer):
    """`torch.nn.Linear` or transformers' `Conv1D` (which stores its weight transposed) with SEMU corrections."""

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base weight is stored `(in, out)`."""
        return isinstance(self.get_base_layer(), Conv1D)

    @property
    def in_features(self) -> int:
        """As of the base layer: SDXL's pipeline asks its time embedding for it."""
        return self.weight.shape[0 if self.fan_in_fan_out else 1]

    @property
    def out_features(self) -> int:
        """As of the base layer."""
        return self.weight.shape[1 if self.fan_in_fan_out else 0]

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
