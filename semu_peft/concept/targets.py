"""Which layers of a denoiser to correct, by their part in it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from semu_peft.tuner.adapted import base_model, own_modules

_ATTENTION = r"(?:.*\.)?(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "cross-attention": (nn.Linear,),
    "attention": (nn.Linear,),
    "all-linear": (nn.Linear,),
    "convolutions": (nn.Conv2d, nn.Conv3d),
    "all": (nn.Linear, nn.Conv2d, nn.Conv3d),
}


def denoiser_targets(denoiser: nn.Module, part: str = "cross-attention") -> list[str]:
    """The full names of a part of the denoiser's layers, for `SemuConfig(target_modules=...)`.

    The layers are those of the denoiser itself, whatever adapters are in it.

    Args:
        denoiser: A U-Net or transformer of diffusers.
        part: `"cross-attention"` (keys and values that read the text), `"attention"` (all projections of all
            attention), `"all-linear"`, `"convolutions"`, or `"all"` for the last two together.

    Raises:
        ValueError: There is no such part, or this denoiser has no layer of it.

    Examples:
        >>> block = nn.ModuleDict({"attn2": nn.ModuleDict({"to_k": nn.Linear(4, 2), "to_out": nn.Linear(2, 4)})})
        >>> denoiser_targets(block)
        ['attn2.to_k']
    """
    if part not in _KINDS:
        raise ValueError(f"`part` must be one of {', '.join(map(repr, _KINDS))}, got {part!r}.")
    modules = own_modules(denoiser)
    names = [name for name, module in modules.items() if isinstance(module, _KINDS[part])]
    if part == "cross-attention":
        names = _reading_text(modules, names)
    elif part == "attention":
        names = [name for name in names if re.fullmatch(_ATTENTION, name)]
    if not names:
        raise ValueError(
            f"{type(base_model(denoiser)).__name__} has no layers of the part {part!r}; name them in `target_modules`."
        )
    return names


def _reading_text(modules: Mapping[str, nn.Module], names: list[str]) -> list[str]:
    """Keys and values of cross-attention, by what the attention says it is; in an MMDiT those of the text stream.

    A second attention, `attn2`, may be the picture's to itself (Stable Diffusion 3.5), and what a cross-attention has
    added to it reads pictures (Wan's image-to-video). Where none says that it crosses, `attn2` is meant.
    """
    parts = {name: name.rpartition(".")[::2] for name in names}
    crosses = {
        name: bool(getattr(modules[attention], "is_cross_attention", False)) for name, (attention, _) in parts.items()
    }
    found = [
        name
        for name, (attention, projection) in parts.items()
        if (projection in ("to_k", "to_v") and crosses[name])
        or (projection in ("add_k_proj", "add_v_proj") and not crosses[name] and not attention.endswith("attn2"))
    ]
    return found or [name for name in names if re.fullmatch(r"(?:.*\.)?attn2\.to_[kv]", name)]
