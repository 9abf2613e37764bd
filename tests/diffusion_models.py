"""Tiny denoisers and pipelines of every family, with random weights and the module structure of the real ones."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

CLASSES = 4
WORDS = ["a", "photo", "of", "in", "the", "style", "cat", "dog", "car", "van", "gogh", "monet", "painting"]
BLOCKS: dict[str, Any] = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


# ---- denoisers, and a condition `(count)` for each ----


def class_unet(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        num_class_embeds=CLASSES + 1,
        **BLOCKS,
    ).eval()


def text_unet(seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(
        sample_size=8, out_channels=4, attention_head_dim=2,
        **{"in_channels": 4, "cross_attention_dim": 8, **settings},
        **CROSS, **BLOCKS,
    ).eval()  # fmt: skip


def xl_unet(seed: int = 0) -> Any:
    """SDXL's: linear projections, and the pooled text and sizes added to the time embedding."""
    return text_unet(
        seed,
        cross_attention_dim=16,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
    )


def dit(seed: int = 0) -> Any:
    """DiT, which also predicts variances."""
    torch.manual_seed(seed)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=CLASSES,
    ).eval()  # fmt: skip
    return model


def sd3_transformer(seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=8, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8, **settings,
    ).eval()  # fmt: skip


def flux_transformer(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    ).eval()  # fmt: skip


def condition(kind: str, count: int, seed: int) -> dict[str, Any]:
    """A random condition of the denoiser called `kind` for `count` examples, all alike."""
    draw = torch.Generator().manual_seed(seed)

    def one(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=draw).expand(count, *shape)

    if kind in ("class_unet", "dit"):
        return {"class_labels": torch.full((count,), seed % CLASSES)}
    if kind == "text_unet":
        return {"encoder_hidden_states": one(6, 8)}
    if kind == "xl_unet":
        added = {"text_embeds": one(8), "time_ids": torch.tensor([[8.0, 8, 0, 0, 8, 8]]).expand(count, 6)}
        return {"encoder_hidden_states": one(6, 16), "added_cond_kwargs": added}
    if kind == "sd3_transformer":
        return {"encoder_hidden_states": one(6, 16), "pooled_projections": one(16)}
    if kind == "flux_transformer":
        ids = {"txt_ids": torch.zeros(6, 3), "img_ids": torch.cartesian_prod(*[torch.arange(4.0)] * 2)}
        ids["img_ids"] = torch.cat([torch.zeros(16, 1), ids["img_ids"]], 1)
        return {
            "encoder_hidden_states": one(6, 16), "pooled_projections": one(8), "guidance": torch.ones(count), **ids
        }  # fmt: skip
    raise KeyError(kind)


LATENTS = {
    "class_unet": (3, 8, 8), "text_unet": (4, 8, 8), "xl_unet": (4, 8, 8), "dit": (4, 8, 8),
    "sd3_transformer": (4, 8, 8), "flux_transformer": (16, 16),
}  # fmt: skip
DENOISERS = {
    "class_unet": class_unet, "text_unet": text_unet, "xl_unet": xl_unet, "dit": dit,
    "sd3_transformer": sd3_transformer, "flux_transformer": flux_transformer,
}  # fmt: skip


def randomize(model: nn.Module, seed: int = 0) -> Any:
    """Give layers that start at zero (gates, last projections) weights, or no gradient passes them."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


def diffusion_batch(kind: str, count: int = 4, seed: int = 0) -> dict[str, Any]:
    """Latents with a condition, an anchor, an unconditional and a retain condition."""
    latents = torch.randn(count, *LATENTS[kind], generator=torch.Generator().manual_seed(seed))
    roles = ("condition", "anchor", "unconditional", "retain")
    return {"latents": latents, **{role: condition(kind, count, number) for number, role in enumerate(roles)}}


# ---- pipelines ----


def tokenizer(length: int = 8) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, model_max_length=length, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


def text_encoder(seed: int = 0, projection: bool = False) -> Any:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=8, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def vae(seed: int = 0, channels: int = 4, shift: float | None = None) -> Any:
    torch.manual_seed(seed)
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, sample_size=16, block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
        scaling_factor=0.5, shift_factor=shift, use_quant_conv=shift is None, use_post_quant_conv=shift is None,
    ).eval()  # fmt: skip


def _t5(seed: int) -> Any:
    torch.manual_seed(seed)
    return T5EncoderModel(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


def sd_pipeline(prediction_type: str = "epsilon") -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=text_encoder(), tokenizer=tokenizer(), unet=text_unet(),
        scheduler=diffusers.DDIMScheduler(prediction_type=prediction_type, clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl_pipeline() -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=text_encoder(0), text_encoder_2=text_encoder(1, projection=True),
        tokenizer=tokenizer(), tokenizer_2=tokenizer(), unet=xl_unet(), scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )  # fmt: skip


def sd3_pipeline() -> Any:
    encoders = {"text_encoder": text_encoder(0, True), "text_encoder_2": text_encoder(1, True)}
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(shift=0.1), **encoders, text_encoder_3=_t5(1), tokenizer=tokenizer(), tokenizer_2=tokenizer(),
        tokenizer_3=tokenizer(), transformer=randomize(sd3_transformer()),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def flux_pipeline() -> Any:
    return diffusers.FluxPipeline(
        vae=vae(shift=0.1), text_encoder=text_encoder(0), text_encoder_2=_t5(1), tokenizer=tokenizer(),
        tokenizer_2=tokenizer(), transformer=randomize(flux_transformer()),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )  # fmt: skip


PIPELINES = {"sd": sd_pipeline, "sdxl": sdxl_pipeline, "sd3": sd3_pipeline, "flux": flux_pipeline}


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
