"""Ship a trained adapter: as an exact LoRA that stock PEFT loads, or re-ranked to fewer directions."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from semu_peft.files import written_whole
from semu_peft.linalg.core import exact_svd
from semu_peft.tuner.adapted import (
    base_model,
    exactly,
    initialized_layers,
    targets_for,
)
from semu_peft.tuner.embedding import Embedding
from semu_peft.tuner.keys import PREFIX, without_wrappers
from semu_peft.tuner.layer import SemuLayer
from semu_peft.tuner.parameter import ParamWrapper
from semu_peft.tuner.tied import TiedLayer

_LORA_BIAS = {"none": "none", "all": "all", "semu_only": "lora_only"}


def to_lora(
    model: nn.Module, adapter_name: str = "default", *, uniform_rank: bool = False
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Write a SEMU adapter as a LoRA with the same `ΔW`: `B = U R` (times the adapter's scale) and `A = Vᵀ`.

    No decomposition and no approximation is needed, except that a convolution read channel by channel, which has no
    common basis, is factorised numerically. A grouped convolution of rank `r` becomes a LoRA of rank `groups · r`.
    Layers of rank 0 are left out. A layer tied to the embedding gets a pair of its own; PEFT warns that it cannot merge
    both into one weight. Corrected parameters become LoRA's `target_parameters`; `modules_to_save`, trained biases and
    token rows go along.

    Args:
        model: A model with a SEMU adapter.
        adapter_name: The adapter to convert.
        uniform_rank: Pad every layer to the largest rank with zeros. The file grows and `ΔW` stays as it is; programs
            that read one rank for all layers (vLLM) need it.

    Returns:
        The LoRA's configuration and its state dict with PEFT's file keys, float32. They load with stock PEFT.

    Raises:
        ValueError: There is no such adapter, it has no direction at all, or PEFT's LoRA cannot carry it: it ignores a
            convolution's dilation and padding modes other than zeros, adds up the weights of an
            `nn.MultiheadAttention` wrongly, and cannot name every parameter.
        NotInitializedError: The adapter has no bases yet.
    """
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    layers = initialized_layers(model, adapter_name)
    parameters = {
        name: layer for name, layer in layers.items() if isinstance(layer, ParamWrapper) and layer.r[adapter_name] > 0
    }
    tied = {name: layer for name, layer in base_model(model).named_modules() if isinstance(layer, TiedLayer)}
    for name, layer in {**layers, **tied}.items():
        if layer.r.get(adapter_name, 0) == 0 or isinstance(layer, ParamWrapper):
            continue
        down, up = _lora_pair(layer, adapter_name, name)
        pairs[name] = down.contiguous(), up.contiguous()
    if not pairs and not parameters:
        raise ValueError(f"The adapter {adapter_name!r} has rank 0 everywhere, so there is nothing to export.")
    if uniform_rank and parameters:
        raise ValueError(
            f"`uniform_rank` pads layers, and the adapter also corrects the parameter {next(iter(parameters))!r}: "
            "export it without, or merge the adapter (`merge_and_unload`)."
        )
    if uniform_rank:
        pairs = _padded(pairs)
    ranks = {name: down.shape[0] for name, (down, _) in pairs.items()}
    state_dict: dict[str, Tensor] = {}
    for name, (down, up) in pairs.items():
        key = "lora_embedding_{}" if isinstance({**layers, **tied}[name], Embedding) else "lora_{}.weight"
        # A layer tied to another has the same bases, and a file may not hold one tensor twice.
        state_dict[f"{PREFIX}{name}.{key.format('A')}"] = down.clone() if name in tied else down
        state_dict[f"{PREFIX}{name}.{key.format('B')}"] = up.clone() if name in tied else up
    for name, place in _lora_places(model, parameters).items():
        down, up = _lora_pair_of_parameter(parameters[name], adapter_name, name)
        ranks[name] = parameters[name].r[adapter_name]
        state_dict[f"{PREFIX}{place}.lora_A.weight"] = down.contiguous()
        state_dict[f"{PREFIX}{place}.lora_B.weight"] = up.contiguous()
    source = next(iter(layers.values())).configs[adapter_name]
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {exactly(name): rank for name, rank in ranks.items() if rank != common}
    config = LoraConfig(
        r=common,
        lora_alpha=common,  # with the patterns below, every layer's scaling α / r is 1
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=targets_for(model, list(pairs)),
        target_parameters=list(parameters) or None,
        modules_to_save=source.modules_to_save,
        bias=_LORA_BIAS[source.bias],  # type: ignore[arg-type]
        trainable_token_indices=source.trainable_token_indices,
        fan_in_fan_out=any(isinstance(layers[name].get_base_layer(), Conv1D) for name in pairs if name in layers),
        base_model_name_or_path=source.base_model_name_or_path,
        revision=source.revision,
        task_type=source.task_type,
        inference_mode=True,
    )
    if source.modules_to_save or source.trainable_token_indices or source.bias != "none":
        saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        bare = {f"{PREFIX}{name}.base_layer.": f"{PREFIX}{name}." for name in layers if name not in ranks}
        for key, value in saved.items():
            if ".semu_" not in key:
                layer, _, parameter = key.rpartition(".")
                state_dict[bare.get(f"{layer}.", f"{layer}.") + parameter] = value
    return config, state_dict


def save_as_lora(
    model: nn.Module, path: str | Path, adapter_name: str = "default", *, uniform_rank: bool = False
) -> Path:
    """Save a SEMU adapter as a LoRA folder that stock PEFT loads, without `semu_peft` being installed there.

    Args:
        model: A model with a SEMU adapter.
        path: The folder to write `adapter_config.json` and `adapter_model.safetensors` to.
        adapter_name: The adapter to export.
        uniform_rank: Pad every layer to the largest rank with zeros, as vLLM needs it.

    Returns:
        The folder.

    Raises:
        ValueError: See [`to_lora`][semu_peft.export.lora.to_lora]; nothing is written then.
    """
    config, state_dict = to_lora(model, adapter_name, uniform_rank=uniform_rank)
    folder = Path(path)
    with written_whole(folder / SAFETENSORS_WEIGHTS_NAME) as file:
        save_file({key: value.cpu() for key, value in state_dict.items()}, file, metadata={"format": "pt"})
    with written_whole(folder / CONFIG_NAME) as file, TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        file.write_bytes((Path(scratch) / CONFIG_NAME).read_bytes())
    return folder


def _lora_pair(layer: SemuLayer, adapter_name: str, name: str) -> tuple[Tensor, Tensor]:
    """LoRA's `A` `(r, n)` and `B` `(m, r)`, for a convolution as the kernels of two convolutions."""
    base = layer.get_base_layer()
    if isinstance(layer, Embedding):  # LoRA's embedding weight is (B A)ᵀ
        left = layer.token_basis(adapter_name)
        return left.mT, layer.semu_V[adapter_name] @ layer.get_core(adapter_name).detach().mT
    if not isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return layer.semu_V[adapter_name].mT, layer.semu_U[adapter_name] @ layer.get_core(adapter_name).detach()
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
    return blocks, up.reshape(*up.shape, *(1 for _ in base.kernel_size))


def _lora_places(model: nn.Module, parameters: dict[str, ParamWrapper]) -> dict[str, str]:
    """Where PEFT's LoRA puts the correction of each parameter: wrappers around each other, the first one inmost."""
    every = [without_wrappers(name) for name, _ in base_model(model).named_parameters()]
    places = {}
    for name, layer in parameters.items():
        if isinstance(layer.get_base_layer(), nn.MultiheadAttention):
            raise ValueError(
                f"{name!r} belongs to an `nn.MultiheadAttention`. PEFT's LoRA of it adds the correction of `out_proj` "
                "twice (peft 0.21, github.com/huggingface/peft/pull/3774), so no file is right wherever it is loaded: "
                "merge the adapter instead (`merge_and_unload`), or leave attentions out of `target_modules`."
            )
        also = [other for other in every if other.endswith(f".{name}") and other not in parameters]
        if also:
            raise ValueError(
                f"LoRA's `target_parameters` cannot name {name!r} without {also[0]!r}, which ends alike and is not "
                "corrected: merge the adapter instead (`merge_and_unload`)."
            )
        owner = name.removesuffix(f".{layer.parameter_name}")
        mates = [own for own, _ in layer.get_base_layer().named_parameters(recurse=False)]
        mates = [own for own in mates if f"{owner}.{own}" in parameters]
        places[name] = owner + ".base_layer" * (len(mates) - 1 - mates.index(layer.parameter_name))
    return places


def _lora_pair_of_parameter(layer: ParamWrapper, adapter_name: str, name: str) -> tuple[Tensor, Tensor]:
    """LoRA's `A` `(experts · r, n)` and `B` `(m, r · experts)`, in PEFT's order of experts and ranks."""
    up, down = layer.semu_U[adapter_name] @ layer.get_core(adapter_name).detach(), layer.semu_V[adapter_name]
    if up.dim() == 2:
        return down.mT, up
    if getattr(layer.get_base_layer(), "is_transposed", False):  # stored (experts, in, out)
        if len(up) == 1:
            raise ValueError(
                f"Parameter {name!r} is a single transposed expert, which PEFT's LoRA does not add up: merge the "
                "adapter instead (`merge_and_unload`)."
            )
        up, down = down, up
    return down.mT.flatten(0, 1), up.permute(1, 2, 0).flatten(1)


def _padded(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """All pairs at the largest rank, filled with zeros; in a grouped convolution each group's share of the rank."""
    groups = {name: down.shape[0] // up.shape[1] for name, (down, up) in pairs.items()}
    step = math.lcm(*groups.values())
    rank = math.ceil(max(down.shape[0] for down, _ in pairs.values()) / step) * step
    padded = {}
    for name, (down, up) in pairs.items():
        count, share = groups[name], up.shape[1]
        wide_down = down.new_zeros(count, rank // count, *down.shape[1:])
        wide_up = up.new_zeros(up.shape[0], rank // count, *up.shape[2:])
        wide_down[:, :share] = down.unflatten(0, (count, share))
        wide_up[:, :share] = up
        padded[name] = wide_down.flatten(0, 1), wide_up
    return padded
