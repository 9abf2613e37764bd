"""Each corrected weight as LoRA's pair `A`, `B`, in the shapes and the order that PEFT's LoRA layers hold them in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from semu_peft.linalg.core import exact_svd
from semu_peft.tuner.adapted import base_model, initialized_layers
from semu_peft.tuner.embedding import Embedding
from semu_peft.tuner.layer import SemuLayer
from semu_peft.tuner.parameter import ParamWrapper
from semu_peft.tuner.tied import TiedLayer
from semu_peft.tuner.weight_use import WeightUse, no_place_for


@dataclass(frozen=True)
class LoraPair:
    """LoRA's two factors of one weight, `ΔW = B A`, scaled by 1.

    Attributes:
        down: `A`, `(blocks · r, n)`, or the kernels `(blocks · r, in, *kernel)` of a convolution.
        up: `B`, `(m, r)`; `(m, r, 1, …)` for a convolution, `(m, r · experts)` for a parameter with experts.
        groups: Groups of a convolution, each with `r` rows of `down` for itself, and 1 elsewhere.
        experts: Experts of a parameter, each with `r` rows of `down` and `r` columns of `up`, and 1 elsewhere.
    """

    down: Tensor
    up: Tensor
    groups: int = 1
    experts: int = 1

    @property
    def rank(self) -> int:
        """The rank as PEFT counts it: over the groups of a convolution, and for each expert."""
        return self.down.shape[0] // self.experts

    def padded(self, rank: int) -> LoraPair:
        """The same `ΔW` at a larger rank, filled with zeros."""
        blocks, size = self.groups * self.experts, rank // self.groups
        down = _filled(self.down.unflatten(0, (blocks, -1)), size).flatten(0, 1)
        if self.experts == 1:
            return LoraPair(down, _filled(self.up, size), self.groups)
        up = _filled(self.up.unflatten(1, (-1, self.experts)), size).flatten(1)
        return LoraPair(down, up, experts=self.experts)


def layers_to_export(model: nn.Module, adapter_name: str) -> dict[str, SemuLayer]:
    """All that the adapter corrects, by full name: layers and parameters of rank 1 or more, and what is tied to them.

    Raises:
        ValueError: There is no such adapter, or nothing of it.
        NotInitializedError: It has no bases yet.
    """
    layers = initialized_layers(model, adapter_name)
    tied = {name: layer for name, layer in base_model(model).named_modules() if isinstance(layer, TiedLayer)}
    found = {name: layer for name, layer in {**layers, **tied}.items() if layer.r.get(adapter_name, 0) > 0}
    if not found:
        raise ValueError(f"The adapter {adapter_name!r} has rank 0 everywhere, so there is nothing to export.")
    return found


def lora_pair(layer: SemuLayer, name: str, adapter_name: str) -> LoraPair:
    """The pair of one layer, `A = Vᵀ` and `B = U R`, times the adapter's scale.

    Args:
        layer: A layer, or the wrapper of a parameter, with an adapter of rank 1 or more.
        name: Its name, for errors.
        adapter_name: The adapter.

    Raises:
        ValueError: PEFT's LoRA cannot compute this correction.
    """
    if isinstance(layer, ParamWrapper):
        return _of_parameter(layer, name, adapter_name)
    if layer.weight_use is WeightUse.OWN:
        raise ValueError(
            f"Layer {name!r}, a {type(layer.get_base_layer()).__name__}, does something of its own with its weight "
            "(it pads, standardises, masks …) where a LoRA would add to its output, so no LoRA equals this adapter: "
            "merge it instead (`merge_and_unload`), or leave such layers out of `target_modules`."
        )
    if reason := no_place_for(layer.find_weight_use(), name, "exported as a LoRA that readers may merge"):
        raise ValueError(reason)
    base = layer.get_base_layer()
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return _of_convolution(layer, base, name, adapter_name)
    core = layer.get_core(adapter_name).detach()
    if isinstance(layer, Embedding):  # LoRA's embedding weight is (B A)ᵀ
        left = layer.token_basis(adapter_name)
        return LoraPair(left.mT.contiguous(), layer.semu_V[adapter_name] @ core.mT)
    return LoraPair(layer.semu_V[adapter_name].mT.contiguous(), layer.semu_U[adapter_name] @ core)


def one_rank(pairs: Mapping[str, LoraPair]) -> dict[str, LoraPair]:
    """All pairs at one rank, the largest, or the next above it that the groups of every convolution divide."""
    step = math.lcm(*(pair.groups for pair in pairs.values()))
    rank = math.ceil(max(pair.rank for pair in pairs.values()) / step) * step
    return {name: pair if pair.rank == rank else pair.padded(rank) for name, pair in pairs.items()}


def _of_convolution(
    layer: SemuLayer, base: nn.Conv1d | nn.Conv2d | nn.Conv3d, name: str, adapter_name: str
) -> LoraPair:
    if any(step != 1 for step in base.dilation) or base.padding_mode != "zeros":
        raise ValueError(
            f"Layer {name!r} has dilation {base.dilation} and padding_mode {base.padding_mode!r}. PEFT's LoRA runs its "
            "convolutions undilated and padded with zeros, so no LoRA equals this adapter: merge it instead "
            "(`merge_and_unload`), or leave such layers out of `target_modules`."
        )
    if layer.configs[adapter_name].conv_mode == "per_channel":
        delta = layer.get_delta_weight(adapter_name).detach().flatten(1)
        factors = exact_svd(delta)
        factors = factors.leading(max(factors.reaching(1.0).rank, 1))
        up = (factors.left * factors.singular_values[: factors.rank]).to(delta)
        down = factors.right.mT.to(delta)
    else:
        up, down = layer.semu_U[adapter_name] @ layer.get_core(adapter_name).detach(), layer.semu_V[adapter_name].mT
    rank, groups = down.shape[0], base.groups
    channels = base.in_channels // groups
    filters = down.reshape(rank, channels, *base.kernel_size)
    # LoRA's first convolution sees all input channels, so that each group gets a copy that looks at its own only.
    blocks = filters.new_zeros(groups * rank, base.in_channels, *base.kernel_size)
    for group in range(groups):
        blocks[group * rank : (group + 1) * rank, group * channels : (group + 1) * channels] = filters
    return LoraPair(blocks, up.reshape(*up.shape, *(1 for _ in base.kernel_size)), groups=groups)


def _of_parameter(layer: ParamWrapper, name: str, adapter_name: str) -> LoraPair:
    up, down = layer.semu_U[adapter_name] @ layer.get_core(adapter_name).detach(), layer.semu_V[adapter_name]
    if up.dim() == 2:
        return LoraPair(down.mT.contiguous(), up)
    if (experts := layer.experts(adapter_name)) is not None:  # a LoRA has a pair for each
        places = torch.tensor(experts, device=up.device)
        up, down = (
            part.new_zeros(len(layer.base_weight), *part.shape[1:]).index_copy(0, places, part) for part in (up, down)
        )
    if getattr(layer.get_base_layer(), "is_transposed", False):  # stored (experts, in, out)
        if len(up) == 1:
            raise ValueError(
                f"Parameter {name!r} is a single transposed expert, which PEFT's LoRA does not add up: merge the "
                "adapter instead (`merge_and_unload`)."
            )
        up, down = down, up
    # PEFT's order: experts before ranks in A, ranks before experts in B.
    return LoraPair(down.mT.flatten(0, 1), up.permute(1, 2, 0).flatten(1), experts=len(up))


def _filled(tensor: Tensor, size: int) -> Tensor:
    """`tensor` with zeros up to `size` in its second dimension."""
    missing = list(tensor.shape)
    missing[1] = size - tensor.shape[1]
    return torch.cat([tensor, tensor.new_zeros(missing)], 1)
