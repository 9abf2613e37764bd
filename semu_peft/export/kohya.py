"""A LoRA of Stable Diffusion 1, 2 or XL in kohya's layout, which ComfyUI, WebUI, Forge and sd-scripts read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from semu_peft.tuner.adapted import base_model

from .lora_pairs import LoraPair

# The layers of these text encoders that the readers know by name.
_TEXT_LAYER = re.compile(r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")


def kohya_tensors(pipe: Any, pairs: Mapping[str, LoraPair]) -> dict[str, Tensor]:
    """The file's tensors: `lora_down` and `lora_up` of each layer, and its `alpha`, which is its rank.

    U-Net layers are `lora_unet_` and diffusers' name with underscores, also in SDXL: ComfyUI, WebUI and Forge know
    these names beside those of the original implementation. Text layers are `lora_te_text_model_…`, in SDXL
    `lora_te1_` and `lora_te2_`.

    Args:
        pipe: The pipeline.
        pairs: LoRA's pairs by component and layer, `"unet.mid_block.…"`.

    Raises:
        ValueError: The pipeline is of another family, or a layer has no name in this layout.
    """
    unet = getattr(pipe, "unet", None)
    root: Any = base_model(unet) if isinstance(unet, nn.Module) else None
    added = root.config.get("addition_embed_type") if type(root).__name__ == "UNet2DConditionModel" else "none such"
    if added not in (None, "text_time"):
        raise ValueError(
            f"`format='kohya'` names the layers of Stable Diffusion 1, 2 and XL, got a {type(pipe).__name__}. Use "
            "the format 'diffusers', which ComfyUI reads for Flux and Stable Diffusion 3 as well."
        )
    encoders = [name for name in ("text_encoder", "text_encoder_2") if getattr(pipe, name, None) is not None]
    tensors: dict[str, Tensor] = {}
    for key, pair in pairs.items():
        component, _, name = key.partition(".")
        layer = _name(component, name, numbered=len(encoders) > 1)
        tensors[f"{layer}.lora_down.weight"] = pair.down
        tensors[f"{layer}.lora_up.weight"] = pair.up
        tensors[f"{layer}.alpha"] = torch.tensor(float(pair.rank))
    return tensors


def _name(component: str, name: str, numbered: bool) -> str:
    if component == "unet":
        return "lora_unet_" + name.replace(".", "_")
    inside = name.removeprefix("text_model.")
    number = {"text_encoder": "1", "text_encoder_2": "2"}.get(component)
    if number is None or not _TEXT_LAYER.fullmatch(inside):
        raise ValueError(
            f"Layer {name!r} of {component!r} has no name in kohya's layout, which knows the U-Net and the attention "
            "and MLP layers of its text encoders: leave it out of `target_modules`, use the format 'diffusers', or "
            "merge the adapter (`merge_pipeline`)."
        )
    return f"lora_te{number if numbered else ''}_text_model_{inside.replace('.', '_')}"
