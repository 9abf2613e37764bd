"""The parts of a denoiser's layers, whatever adapters are in it."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusion_models import flux_transformer, sd3_transformer, text_unet
from peft import LoraConfig, get_peft_model

from semu_peft import SemuConfig
from semu_peft.concept import denoiser_targets

PARTS = ("cross-attention", "attention", "all-linear", "convolutions", "all")


def test_parts_of_a_denoiser() -> None:
    unet = text_unet()
    cross = denoiser_targets(unet)
    assert cross and all(name.endswith(("attn2.to_k", "attn2.to_v")) for name in cross)
    linear, convolutions = denoiser_targets(unet, "all-linear"), denoiser_targets(unet, "convolutions")
    assert set(cross) < set(denoiser_targets(unet, "attention")) < set(linear)
    assert set(denoiser_targets(unet, "all")) == {*linear, *convolutions} and not set(linear) & set(convolutions)
    with pytest.raises(ValueError, match="`part`"):
        denoiser_targets(unet, "everything")
    with pytest.raises(ValueError, match="no layers"):
        denoiser_targets(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def wan(**settings: Any) -> Any:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8, ffn_dim=8, num_layers=1, rope_max_seq_len=32, **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("denoiser", "expected"),
    [
        # Stable Diffusion 3.5 medium: `attn2` is the picture's attention to itself.
        (lambda: sd3_transformer(dual_attention_layers=(0,)), {"attn.add_k_proj", "attn.add_v_proj"}),
        (flux_transformer, {"attn.add_k_proj", "attn.add_v_proj"}),
        (wan, {"attn2.to_k", "attn2.to_v"}),
        # Image-to-video: what is added to the cross-attention reads a picture.
        (lambda: wan(image_dim=8, added_kv_proj_dim=24), {"attn2.to_k", "attn2.to_v"}),
    ],
)
def test_cross_attention_is_what_reads_the_text(denoiser: Any, expected: set[str]) -> None:
    names = denoiser_targets(denoiser())
    assert {".".join(name.split(".")[-2:]) for name in names} == expected


def test_adapters_hide_no_layer_and_add_none() -> None:
    """The second request finds what the first found, also over a style and in PEFT's wrapper."""
    unet = text_unet()
    before = {part: denoiser_targets(unet, part) for part in PARTS}
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "conv1"]), "style")
    unet.add_adapter(SemuConfig(r=2, init_weights=False, target_modules=["to_k", "to_q"]), "erase")
    assert {part: denoiser_targets(unet, part) for part in PARTS} == before
    wrapped = get_peft_model(text_unet(), LoraConfig(r=2, target_modules=["to_k", "conv1"]))
    assert {part: denoiser_targets(wrapped, part) for part in PARTS} == before
