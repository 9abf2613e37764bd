"""Which layers of a denoiser to correct, by their part in it."""

from __future__ import annotations

import re

from torch import nn

from semu_peft.tuner.adapted import base_model

_ATTENTION = r"(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_PARTS = {
    # What reads the text: keys and values of cross-attention; in an MMDiT those of the text stream.
    "cross-attention": r".*(attn2\.to_[kv]|\.add_[kv]_proj)",
    "attention": rf".*\.{_ATTENTION}",
    "all-linear": r".*",
    "convolutions": r".*",
    "all": r".*",
}


def denoiser_targets(denoiser: nn.Module, part: str = "cross-attention") -> list[str]:
    """The full names of a part of the denoiser's layers, for `SemuConfig(target_modules=...)`.

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
    if part not in _PARTS:
        raise ValueError(f"`part` must be one of {', '.join(map(repr, _PARTS))}, got {part!r}.")
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
    if part != "all":
        kinds = (nn.Conv2d,) if part == "convolutions" else (nn.Linear,)
    names = [
        name
        for name, module in base_model(denoiser).named_modules()
        if isinstance(module, kinds) and re.fullmatch(_PARTS[part], name)
    ]
    if not names:
        raise ValueError(
            f"{type(denoiser).__name__} has no layers of the part {part!r}; name them in `target_modules`."
        )
    return names
