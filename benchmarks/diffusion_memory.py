"""Count the memory that erasing a concept from real Stable Diffusion needs, on no hardware at all.

    python benchmarks/diffusion_memory.py

The U-Nets of Stable Diffusion 1.5 and XL are built on the meta device, where nothing is computed but shapes are known,
and what autograd keeps for one backward pass, without gradient checkpointing, is counted tensor by tensor. Attention is
counted as the fused kernels keep it: queries, keys, values and output, not the matrix of weights.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from semu_peft import SemuConfig
from semu_peft.concept import denoiser_targets
from semu_peft.tuner.adapted import semu_layers

RANK = 16
GIB = 2**30
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "SD 1.5, 512 px": (64, {"cross_attention_dim": 768, "attention_head_dim": 8}),
    "SDXL, 1024 px": (
        128,
        {
            "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
            "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
}  # fmt: skip


class FusedAttention(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class Processor:
    """diffusers' attention, with the kernel above."""

    def __call__(self, attn: Any, hidden: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        context = hidden if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden), attn.to_k(context), attn.to_v(context)
        return attn.to_out[1](attn.to_out[0](FusedAttention.apply(query, key, value)))


def kept_for_backward(unet: nn.Module, side: int) -> int:
    """Bytes of activations that autograd keeps for one example."""
    weights = {tensor.untyped_storage()._cdata for tensor in (*unet.parameters(), *unet.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    config: Any = unet.config
    added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)} if config.addition_embed_type else None
    text = torch.empty(1, 77, config.cross_attention_dim)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unet(torch.empty(1, 4, side, side), torch.empty(1), text, added_cond_kwargs=added).sample.sum()
    return sum(size for size, _ in kept.values())


def main() -> None:
    print("| | weights | gradient sums | trained numbers | kept for backward, batch 1 |")
    print("| --- | --- | --- | --- | --- |")
    torch.set_default_dtype(torch.bfloat16)
    for name, (side, settings) in MODELS.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**settings).eval()
            count = sum(parameter.numel() for parameter in unet.parameters())
            unet.set_attn_processor(Processor())
            targets = denoiser_targets(unet)
            unet.add_adapter(SemuConfig(target_modules=targets, ranks=dict.fromkeys(targets, RANK)))
            layers = semu_layers(unet).values()
            kept = kept_for_backward(unet, side)
        sums = sum(4 * layer.weight.numel() for layer in layers)
        trained = sum(layer.semu_core["default"].numel() for layer in layers)
        print(f"| {name} | {2 * count / GIB:.2f} GiB | {sums / GIB:.2f} GiB | {trained:,} | {kept / GIB:.2f} GiB |")


if __name__ == "__main__":
    main()
