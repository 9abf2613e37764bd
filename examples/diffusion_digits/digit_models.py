"""Small diffusion models and a classifier, built from configurations and trained on real images within minutes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

TEMPLATES = ("a handwritten {}", "a picture of a {}", "{}")
NULL_SHARE = 0.1  # of the training examples without their condition, for classifier-free guidance


class Classifier(nn.Module):
    """A convolutional network, `(N, channels, side, side)` in [0, 1] `-> (N, classes)`; the judge of all samples."""

    def __init__(self, channels: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, 64),
            nn.ReLU(),
        )
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(images)))


def schedule() -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, steps_offset=1, set_alpha_to_one=False)


def class_unet(channels: int, side: int, classes: int) -> UNet2DModel:
    """A class-conditional denoiser of pixels; the class after the last is the unconditional one."""
    return UNet2DModel(
        sample_size=side, in_channels=channels, out_channels=channels, layers_per_block=1, norm_num_groups=8,
        block_out_channels=(32, 64), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=16, num_class_embeds=classes + 1,
    )  # fmt: skip


def text_pipeline(channels: int, side: int, words: list[str]) -> StableDiffusionPipeline:
    """Stable Diffusion in small: a VAE that halves the image, a CLIP text encoder, a U-Net with cross-attention."""
    vocabulary = ["<pad>", "<start>", "<end>", "<unknown>", *sorted({w for t in TEMPLATES for w in t.split()} - {"{}"})]
    vocabulary += [word for name in words for word in name.split() if word not in vocabulary]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unknown>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, model_max_length=8, pad_token="<pad>", bos_token="<start>", eos_token="<end>",
        unk_token="<unknown>",
    )  # fmt: skip
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )  # fmt: skip
    )
    vae = AutoencoderKL(
        in_channels=channels, out_channels=channels, latent_channels=4, sample_size=side, norm_num_groups=8,
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=side // 2, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=8,
        block_out_channels=(32, 64), cross_attention_dim=32, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=schedule(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def fit(
    modules: list[nn.Module], loss: Callable[[], Tensor], steps: int, learning_rate: float, title: str
) -> list[nn.Module]:
    """Train modules with AdamW in one cycle; they end in eval mode, with their weights averaged over the last steps."""
    parameters = [parameter for module in modules for parameter in module.train().parameters()]
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    with tqdm(range(steps), desc=title, mininterval=2) as bar:
        for step in bar:
            value = loss()
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            decay = min(0.995, step / (step + 10))
            torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
            if step % 50 == 0:
                bar.set_postfix(loss=f"{value.item():.3g}")
    for parameter, mean in zip(parameters, average, strict=True):
        parameter.data.copy_(mean)
    return [module.eval() for module in modules]


def drawn(images: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    index = torch.randint(len(images), (count,), generator=generator)
    return images[index], labels[index]


def train_classifier(model: Classifier, images: Tensor, labels: Tensor, steps: int, seed: int) -> Classifier:
    """Train the judge on images in [0, 1], shifted by up to a pixel, with noise."""
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        batch, targets = drawn(images, labels, 128, generator)
        rows, columns = torch.randint(-1, 2, (2,), generator=generator).tolist()
        batch = torch.roll(batch, (rows, columns), (2, 3)) + 0.05 * torch.randn(batch.shape, generator=generator)
        return F.cross_entropy(model(batch), targets)

    fit([model], loss, steps, 3e-3, "The judge")
    return model


def _denoising_loss(
    model: Any, noising: DDIMScheduler, clean: Tensor, generator: torch.Generator, **condition: Any
) -> Tensor:
    noise = torch.randn(clean.shape, generator=generator)
    first = torch.randint(1000, ((len(clean) + 1) // 2,), generator=generator)
    timestep = torch.cat([first, 999 - first])[: len(clean)]
    return F.mse_loss(model(noising.add_noise(clean, noise, timestep), timestep, **condition).sample, noise)


def train_class_unet(
    unet: UNet2DModel, images: Tensor, labels: Tensor, classes: int, steps: int, seed: int
) -> UNet2DModel:
    """Train the class-conditional denoiser on images in [0, 1]."""
    generator, noising = torch.Generator().manual_seed(seed), schedule()

    def loss() -> Tensor:
        batch, targets = drawn(2 * images - 1, labels, 128, generator)
        dropped = torch.rand(len(targets), generator=generator) < NULL_SHARE
        return _denoising_loss(unet, noising, batch, generator, class_labels=targets.masked_fill(dropped, classes))

    fit([unet], loss, steps, 2e-3, "Class-conditional U-Net")
    return unet


def train_pipeline(
    pipe: StableDiffusionPipeline, images: Tensor, labels: Tensor, words: list[str], steps: int, seed: int
) -> StableDiffusionPipeline:
    """Train the VAE, then text encoder and U-Net together, on images in [0, 1]."""
    generator, vae, pixels = torch.Generator().manual_seed(seed), pipe.vae, 2 * images - 1

    def reconstruction() -> Tensor:
        batch, _ = drawn(pixels, labels, 64, generator)
        latent = vae.encode(batch).latent_dist
        sample = latent.mean + latent.std * torch.randn(latent.mean.shape, generator=generator)
        return F.mse_loss(vae.decode(sample).sample, batch) + 1e-4 * latent.kl().mean()

    fit([vae], reconstruction, max(1, steps // 5), 2e-3, "VAE")
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(256)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    latents = latents * vae.config.scaling_factor
    prompts = [template.format(word) for word in words for template in TEMPLATES] + [""]
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=8, truncation=True, return_tensors="pt").input_ids

    def loss() -> Tensor:
        batch, targets = drawn(latents, labels, 128, generator)
        which = targets * len(TEMPLATES) + torch.randint(len(TEMPLATES), targets.shape, generator=generator)
        dropped = torch.rand(len(which), generator=generator) < NULL_SHARE
        which = which.masked_fill(dropped, len(prompts) - 1)
        text = pipe.text_encoder(ids).last_hidden_state[which]
        return _denoising_loss(pipe.unet, pipe.scheduler, batch, generator, encoder_hidden_states=text)

    fit([pipe.unet, pipe.text_encoder], loss, steps, 2e-3, "Text encoder and U-Net")
    return pipe
