"""Take a LoRA for a SEMU adapter: the way back from `to_lora`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from semu_peft.arguments import check_count, check_kind, check_share
from semu_peft.linalg.core import LowRank, diagonal, eckart_young, orthonormal
from semu_peft.linalg.factorize import SingularFactors
from semu_peft.tuner.adapted import exactly
from semu_peft.tuner.config import SemuConfig
from semu_peft.tuner.keys import PREFIX, tensor_key, without_prefix

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
# Each changes what a LoRA computes, or with which weights, into something that is not `W + s B A`.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
)
_SEMU_BIAS = {"none": "none", "all": "all", "lora_only": "semu_only"}


def from_lora(
    config: LoraConfig,
    state_dict: Mapping[str, Tensor],
    *,
    explained_variance: float = 1.0,
    r: int | None = None,
) -> tuple[SemuConfig, dict[str, Tensor]]:
    """Write a LoRA of linear layers and convolutions as a SEMU adapter, with the same `ΔW` unless it is cut down.

    With `B = Q_b T_b` and `Aᵀ = Q_a T_a` an SVD of the small `s T_b T_aᵀ = P Σ Qᵀ` is one of the whole correction,
    `ΔW = s B A = (Q_b P) Σ (Q_a Q)ᵀ`, with orthonormal bases and a core `Σ`. The dense `ΔW` is never formed. So the
    adapter can be trained on inside its own subspace (also where the LoRA was saved for inference), re-ranked, added to
    others, dialled:

        config, state_dict = from_lora(LoraConfig.from_pretrained(path), load_peft_weights(path))
        model = get_peft_model(base, config)
        set_peft_model_state_dict(model, state_dict)

    Args:
        config: The LoRA's configuration.
        state_dict: Its weights, with PEFT's file keys, as `peft.load_peft_weights` and
            [`to_lora`][semu_peft.export.lora.to_lora] give them.
        explained_variance: Keep the fewest directions that hold this share of each layer's `‖ΔW‖²`; 1 keeps all.
        r: Keep this many directions at the most.

    Returns:
        The configuration and the state dict of the SEMU adapter, float32.

    Raises:
        ValueError: The state dict holds no such LoRA, or one that is more than `W + s B A` (DoRA, biases of its own,
            grouped convolutions, embeddings, layers of an unknown kind), or a bound is out of range.

    Examples:
        >>> from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
        >>> from torch import nn
        >>> from semu_peft import from_lora
        >>> lora = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(target_modules=["0"], r=2))
        >>> _ = nn.init.ones_(lora.base_model.model[0].lora_B["default"].weight)
        >>> config, state_dict = from_lora(lora.peft_config["default"], get_peft_model_state_dict(lora))
        >>> config.ranks  # both columns of B are the same
        {'0': 1}
    """
    check_kind("config", config, LoraConfig, "a `LoraConfig`", "Load it with `LoraConfig.from_pretrained(folder)`.")
    check_kind("state_dict", state_dict, Mapping, "a state dict", "Load it with `peft.load_peft_weights(folder)`.")
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(
                f"`state_dict` must map names to tensors, got {key!r}: {type(value).__name__}. Load it with "
                "`peft.load_peft_weights(folder)`."
            )
    check_share("explained_variance", explained_variance)
    variants = [name for name in _UNSUPPORTED if getattr(config, name, None)]
    if variants:
        raise ValueError(f"A LoRA with {', '.join(variants)} is more than `W + s B A`; merge it and start from there.")
    check_count("r", r, optional=True)
    names = [without_prefix(key).removesuffix(_DOWN) for key in state_dict if key.endswith(_DOWN)]
    if not names:
        example = next(iter(state_dict), "nothing")
        raise ValueError(f"`state_dict` holds no LoRA (found {example!r}). Expected keys that end in {_DOWN!r}.")
    others = dict(state_dict)
    converted: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name in names:
        down_key, up_key = f"{PREFIX}{name}{_DOWN}", f"{PREFIX}{name}{_UP}"
        if up_key not in state_dict:
            raise ValueError(f"`state_dict` has {down_key!r} without {up_key!r}.")
        factors = _factors(name, others.pop(down_key), others.pop(up_key), _scaling(config, name))
        kept = factors.reaching(explained_variance, r)
        ranks[name] = kept.rank
        parts = zip(("semu_U", "semu_V", "semu_core"), diagonal(kept), strict=True)
        converted |= {tensor_key(PREFIX + name, kind): part.float().contiguous() for kind, part in parts}
    if unknown := [key for key in others if ".lora_" in key]:
        raise ValueError(f"{unknown[0]!r} ({len(unknown)} such) is of a kind of layer that SEMU cannot take from LoRA.")
    return _semu_config(config, ranks), converted | others


def _semu_config(config: LoraConfig, ranks: dict[str, int]) -> SemuConfig:
    return SemuConfig(
        target_modules="|".join(exactly(name)[1:] for name in ranks),
        ranks=ranks,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        bias=_SEMU_BIAS[config.bias],  # type: ignore[arg-type]
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        task_type=config.task_type,
    )


def _scaling(config: LoraConfig, name: str) -> float:
    """LoRA's factor for one layer, `α / r`, or `α / √r` for rank-stabilised LoRA."""
    patterns, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = patterns.get(get_pattern_key(list(patterns), name), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    return alpha / (rank**0.5 if config.use_rslora else rank)


def _factors(name: str, down: Tensor, up: Tensor, scaling: float) -> SingularFactors:
    """The singular directions of `s B A`, with convolutions read as one matrix."""
    if down.dim() != up.dim() or down.shape[0] != up.shape[1]:
        raise ValueError(
            f"The LoRA of layer {name!r} has A of shape {tuple(down.shape)} and B of shape {tuple(up.shape)}. Expected "
            "(r, n) and (m, r), or the kernels of an ungrouped convolution and a pointwise one: a LoRA of a grouped "
            "convolution mixes its groups, which the grouped weight cannot."
        )
    core = scaling * torch.eye(up.shape[1], dtype=torch.float64, device=up.device)
    return eckart_young(orthonormal(LowRank(up.flatten(1), down.flatten(1).mT, core)))
