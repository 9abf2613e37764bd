"""The correction of convolutions."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cost import dense_is_cheaper
from .layer import SemuLayer, in_range

# By the number of spatial dimensions; not an attribute of the classes, whose call torch 2.7 cannot export.
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvNd(SemuLayer):
    """A convolution with SEMU corrections: any stride, padding, padding mode, dilation and groups.

    With a weight of shape `(out, in / groups, *kernel)`, `flatten` reads it as one `out × (in/groups · kernel)` matrix
    and runs the correction as a convolution to `r` channels, the core, and a pointwise one. `per_channel` reads it as
    `in / groups` matrices `out × kernel`; there the dense correction is cheaper than its factors, so it joins the base
    weight in one convolution.
    """

    @property
    def conv(self) -> nn.Conv2d:
        """The frozen convolution (typed as the best known of its kind)."""
        return cast(nn.Conv2d, self.get_base_layer())

    @property
    def in_features(self) -> int:
        """The base layer's input channels, by the name that PEFT's layers have for them."""
        return self.conv.in_channels

    @property
    def out_features(self) -> int:
        """The base layer's output channels."""
        return self.conv.out_channels

    def _per_channel(self, adapter_name: str) -> bool:
        return self.configs[adapter_name].conv_mode == "per_channel"

    def weight_to_matrix(self, weight: Tensor, adapter_name: str) -> Tensor:
        if self._per_channel(adapter_name):
            return weight.flatten(2).transpose(0, 1)  # (in / groups, out, kernel)
        return weight.flatten(1)

    def matrix_to_weight(self, matrix: Tensor, adapter_name: str) -> Tensor:
        shape = self.base_weight.shape
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
        filters = right.mT.reshape(rank, base.in_channels // groups, *base.kernel_size).to(x.dtype)
        # Every group of input channels meets the same filters, and its outputs their own rows of U R.
        hidden = base._conv_forward(x, filters.repeat(groups, *(1 for _ in filters.shape[1:])), None)
        pointwise = (1,) * len(base.kernel_size)
        mixed = (left @ core).to(hidden.dtype).reshape(-1, rank, *pointwise)
        return output + CONVOLUTIONS[len(pointwise)](hidden, mixed, groups=groups).to(output.dtype)

    def joins_weight(self, adapter_names: list[str], x: Tensor) -> bool:
        base, compiled = self.conv, torch.compiler.is_compiling()
        if not self.base_is_bare(nn.Conv1d, nn.Conv2d, nn.Conv3d) or not (compiled or x.numel()):
            return False
        if any(self._per_channel(name) for name in adapter_names):
            return True
        if compiled:  # as in `Linear`: no choice by the batch
            return False
        m, n = base.out_channels, base.weight[0].numel()
        positions = x.numel() // base.in_channels // math.prod(base.stride)
        return dense_is_cheaper(m, n, sum(self.r[name] for name in adapter_names), positions)

    def run_base(self, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.base_is_bare(nn.Conv1d, nn.Conv2d, nn.Conv3d):
            return self.conv._conv_forward(x, weight, self.conv.bias)
        return super().run_base(x, weight, *args, **kwargs)


class Conv1d(ConvNd):
    """`torch.nn.Conv1d` with SEMU corrections.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> config = SemuConfig(target_modules=["0"], r=2, init_weights=False)
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Conv1d(2, 4, kernel_size=3)), config)
        >>> layer = model.base_model.model[0]
        >>> tuple(layer.semu_U["default"].shape), tuple(layer.semu_V["default"].shape)  # read as 4 × (2 · 3)
        ((4, 2), (6, 2))
    """


class Conv2d(ConvNd):
    """`torch.nn.Conv2d` with SEMU corrections.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> config = SemuConfig(target_modules=["0"], r=2, init_weights=False, conv_mode="per_channel")
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Conv2d(3, 4, kernel_size=3)), config)
        >>> layer = model.base_model.model[0]
        >>> tuple(layer.semu_U["default"].shape), tuple(layer.semu_V["default"].shape)  # read as 3 matrices of 4 × 9
        ((3, 4, 2), (3, 9, 2))
    """


class Conv3d(ConvNd):
    """`torch.nn.Conv3d` with SEMU corrections.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> config = SemuConfig(target_modules=["0"], r=2, init_weights=False)
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Conv3d(1, 4, kernel_size=2)), config)
        >>> layer = model.base_model.model[0]
        >>> tuple(layer.get_delta_weight("default").shape)
        (4, 1, 2, 2, 2)
    """
