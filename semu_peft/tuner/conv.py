"""The correction of convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layer import SemuLayer, in_range


class ConvNd(SemuLayer):
    """A convolution with SEMU corrections: any stride, padding, padding mode, dilation and groups.

    With a weight of shape `(out, in / groups, *kernel)`, `flatten` reads it as one `out × (in/groups · kernel)` matrix
    and runs the correction as a convolution to `r` channels, the core, and a pointwise one. `per_channel` reads it as
    `in / groups` matrices `out × kernel`; there the dense correction is cheaper than its factors, so it joins the base
    weight in one convolution.
    """

    convolution: ClassVar[Callable[..., Tensor]]
    """The convolution function of as many dimensions."""

    @property
    def conv(self) -> nn.Conv2d:
        """The frozen convolution (typed as the best known of its kind)."""
        return cast(nn.Conv2d, self.get_base_layer())

    def _per_channel(self, adapter_name: str) -> bool:
        return self.configs[adapter_name].conv_mode == "per_channel"

    def weight_to_matrix(self, weight: Tensor, adapter_name: str) -> Tensor:
        if self._per_channel(adapter_name):
            return weight.flatten(2).transpose(0, 1)  # (in / groups, out, kernel)
        return weight.flatten(1)

    def matrix_to_weight(self, matrix: Tensor, adapter_name: str) -> Tensor:
        shape = self.conv.weight.shape
        if self._per_channel(adapter_name):
            return matrix.transpose(0, 1).reshape(shape)
        return matrix.reshape(shape)

    def add_correction(self, output: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        """`output` plus the correction's convolution, with `(N, out, *positions)` the shape of `output`."""
        base = self.conv
        if self._per_channel(adapter_name):
            return output + base._conv_forward(x, self.get_delta_weight(adapter_name).to(x.dtype), None)
        left, right = self.semu_U[adapter_name], self.semu_V[adapter_name]
        core = self.get_core(adapter_name)
        groups, rank = base.groups, self.r[adapter_name]
        x = in_range(x)
        filters = right.mT.reshape(rank, *base.weight.shape[1:]).to(x.dtype)
        # Every group of input channels meets the same filters, and its outputs their own rows of U R.
        hidden = base._conv_forward(x, filters.repeat(groups, *(1 for _ in filters.shape[1:])), None)
        pointwise = (1,) * (base.weight.dim() - 2)
        mixed = (left @ core).to(hidden.dtype).reshape(-1, rank, *pointwise)
        return output + self.convolution(hidden, mixed, groups=groups).to(output.dtype)

    def _is_plain(self) -> bool:
        return type(self.base_layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("adapter_names") is not None:
            return super().forward(x, *args, **kwargs)
        names = self._live_adapters()
        dense = [name for name in names if self._per_channel(name) and self.r[name] > 0]
        if self.disable_adapters or self.merged or dense != names or not self._is_plain():
            return super().forward(x, *args, **kwargs)
        if not dense:
            return self.base_layer(x, *args, **kwargs)
        weight = self._base_weight_plus(torch.stack([self.get_delta_weight(name) for name in dense]).sum(0))
        output = self.conv._conv_forward(x, weight, self.conv.bias)
        for name in dense:
            output = self._guard(output, name)
        return output


class Conv1d(ConvNd):
    """`torch.nn.Conv1d` with SEMU corrections."""

    convolution = staticmethod(F.conv1d)


class Conv2d(ConvNd):
    """`torch.nn.Conv2d` with SEMU corrections."""

    convolution = staticmethod(F.conv2d)


class Conv3d(ConvNd):
    """`torch.nn.Conv3d` with SEMU corrections."""

    convolution = staticmethod(F.conv3d)
