"""Real architectures with random weights, their inputs, and the layers that are adapted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Subject:
    """One architecture under measurement.

    Attributes:
        build: Makes the model.
        batch: `(seed) -> keyword inputs` of one batch.
        loss: `(model, batch) -> scalar`.
        targets: Which layers are adapted, as PEFT's `target_modules`.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Any]]
    loss: Callable[[nn.Module, dict[str, Any]], Tensor]
    targets: str


def _draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _vit(layers: int) -> Subject:
    from transformers import ViTConfig, ViTForImageClassification

    def batch(seed: int) -> dict[str, Any]:
        images = torch.randn(4, 3, 224, 224, generator=_draw(seed))
        return {"pixel_values": images, "labels": torch.randint(10, (4,), generator=_draw(seed))}

    return Subject(
        lambda: ViTForImageClassification(ViTConfig(num_hidden_layers=layers, num_labels=10)),
        batch,
        lambda model, inputs: model(**inputs).loss,
        r".*layers\.\d+\.(attention\.[qkvo]_proj|mlp\.fc[12])",
    )


def _llama(layers: int, **shape: int) -> Subject:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16,
        "vocab_size": 32_000,
    } | shape  # fmt: skip

    def batch(seed: int) -> dict[str, Any]:
        tokens = torch.randint(32_000, (2, 256), generator=_draw(seed))
        return {"input_ids": tokens, "labels": tokens}

    return Subject(
        lambda: LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, use_cache=False, **sizes)),
        batch,
        lambda model, inputs: model(**inputs).loss,
        r".*layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
    )


def _unet(cross_attention_dim: int = 768, latents: int = 64, **shape: Any) -> Subject:
    from diffusers import UNet2DConditionModel

    images = 2

    def batch(seed: int) -> dict[str, Any]:
        draw = _draw(seed)
        return {
            "sample": torch.randn(images, 4, latents, latents, generator=draw),
            "timestep": torch.randint(1000, (images,), generator=draw),
            "encoder_hidden_states": torch.randn(images, 77, cross_attention_dim, generator=draw),
            "noise": torch.randn(images, 4, latents, latents, generator=draw),
        }

    def loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        dtype = next(model.parameters()).dtype  # which a UNet does not cast its inputs to
        inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        noise = inputs.pop("noise")
        return (model(**inputs).sample - noise).square().mean()

    return Subject(
        lambda: UNet2DConditionModel(cross_attention_dim=cross_attention_dim, sample_size=latents, **shape),
        batch,
        loss,
        r".*(to_[qkv]|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|conv1|conv2)",
    )


def _flux(double: int = 19, single: int = 38, side: int = 32, text: int = 512, **shape: Any) -> Subject:
    """By default all of FLUX.1: 11.9B parameters, of which 8.6B are adapted.

    Reckoned, not measured: 22 GiB of weights in bfloat16, 32 of sums in float32, 39 that the backward pass keeps of a
    batch and 9 of the adapted layers' inputs, 102 GiB at the most. The factorisation begins when the pass is over.
    """
    from diffusers import FluxTransformer2DModel

    sizes: dict[str, Any] = {
        "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "pooled_projection_dim": 768, "axes_dims_rope": (16, 56, 56),
    } | shape  # fmt: skip
    images = 2
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(float(side)), torch.arange(float(side)))

    def batch(seed: int) -> dict[str, Any]:
        draw = _draw(seed)
        return {
            "hidden_states": torch.randn(images, side * side, 64, generator=draw),
            "encoder_hidden_states": torch.randn(images, text, sizes["joint_attention_dim"], generator=draw),
            "pooled_projections": torch.randn(images, sizes["pooled_projection_dim"], generator=draw),
            "timestep": torch.rand(images, generator=draw),
            "guidance": torch.full((images,), 3.5),
            "img_ids": grid,
            "txt_ids": torch.zeros(text, 3),
            "velocity": torch.randn(images, side * side, 64, generator=draw),
        }

    def loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        dtype = next(model.parameters()).dtype
        inputs = {name: value.to(dtype) for name, value in inputs.items()}
        velocity = inputs.pop("velocity")
        return (model(**inputs).sample - velocity).square().mean()

    return Subject(
        lambda: FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True, **sizes),
        batch,
        loss,
        r".*transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)"
        r"|proj_mlp|proj_out)",
    )


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "vit-b16": lambda: _vit(12),
    "llama-0.4b": lambda: _llama(24),
    "sd15-unet": _unet,
    # For a GPU of 80 GB or more.
    "llama-8b": lambda: _llama(
        32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8
    ),
    "sdxl-unet": lambda: _unet(
        cross_attention_dim=2048,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
    ),
    "flux": _flux,  # for one of 140 GB
    # The same kinds of layers, small enough to try the benchmark itself.
    "vit-tiny": lambda: _vit(2),
    "llama-tiny": lambda: _llama(
        2, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4
    ),
    "unet-tiny": lambda: _unet(
        cross_attention_dim=32,
        latents=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
    ),
    "flux-tiny": lambda: _flux(
        1,
        1,
        side=4,
        text=6,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    ),
}
