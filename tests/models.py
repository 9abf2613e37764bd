"""Tiny models, built from configurations without a download, and what tests ask about models before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

CLASSES = 4


class Mlp(nn.Module):
    """Three linear layers with dropout, `(N, 6) -> (N, CLASSES)`."""

    targets = ["fc1", "fc2", "head"]

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 10)
        self.fc2 = nn.Linear(10, 8)
        self.head = nn.Linear(8, CLASSES)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(torch.tanh(self.fc1(x)))
        return self.head(self.dropout(torch.tanh(self.fc2(x))))


class Cnn(nn.Module):
    """Plain, grouped and strided convolutions with batch norm, `(N, 3, 8, 8) -> (N, CLASSES)`."""

    targets = ["conv1", "conv2", "head"]

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        return self.head(torch.relu(self.conv2(x)).mean((2, 3)))


def vit() -> ViTForImageClassification:
    """A vision transformer of two layers for 8×8 images."""
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            num_labels=CLASSES,
        )
    ).eval()


def _vit_names() -> dict[str, str]:
    """Names of the vision transformer's linear layers; transformers 5 has renamed them."""
    with torch.device("meta"):
        names = [name for name, _ in vit().named_modules()]
    if any(name.endswith("q_proj") for name in names):
        return {"query": "q_proj", "up": "fc1", "down": "fc2", "layers": "vit.layers"}
    return {"query": "query", "up": "intermediate.dense", "down": "output.dense", "layers": "vit.encoder.layer"}


VIT = _vit_names()


def gpt2() -> GPT2LMHeadModel:
    """A language model of transformers' `Conv1D` layers, with dropout and tied embeddings."""
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)).eval()


def llama() -> LlamaForCausalLM:
    """A language model of linear layers."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=32,
            max_position_embeddings=16,
        )
    ).eval()


def t5() -> Any:
    """An encoder-decoder language model."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def unet_condition() -> Any:
    """Diffusers' text-conditioned U-Net, which has `add_adapter`."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        in_channels=3,
        out_channels=3,
    ).eval()


def unet() -> Any:
    """Diffusers' unconditional U-Net, which has no `add_adapter`; adapters are injected."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        in_channels=3,
        out_channels=3,
    ).eval()


def dit() -> Any:
    """Diffusers' diffusion transformer, conditioned on a class."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1,
    ).eval()  # fmt: skip


def sd3() -> Any:
    """The diffusion transformer of Stable Diffusion 3, which has `load_lora_adapter`."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=3, out_channels=3, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=6,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip


def clip_text() -> Any:
    """The text encoder of Stable Diffusion."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32,
        max_position_embeddings=16, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


def vector_batches(count: int = 3, size: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Labelled batches for `Mlp`."""
    draw = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 6, generator=draw), torch.randint(CLASSES, (size,), generator=draw)) for _ in range(count)
    ]


def image_batches(count: int = 3, size: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Labelled batches for `Cnn` and `vit`."""
    draw = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 8, 8, generator=draw), torch.randint(CLASSES, (size,), generator=draw))
        for _ in range(count)
    ]


def run(model: nn.Module, *inputs: Any, **kwargs: Any) -> Tensor:
    """The model's output as one tensor, in eval mode and without a graph."""
    with torch.no_grad():
        output = model.eval()(*inputs, **kwargs)
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def sample_input(model: nn.Module) -> tuple[Any, ...]:
    """An input that the tiny model takes."""
    draw = torch.Generator().manual_seed(7)
    if isinstance(model, Mlp):
        return (torch.randn(5, 6, generator=draw),)
    if isinstance(model, PreTrainedModel) and "vocab_size" in model.config.to_dict():
        return (torch.randint(32, (2, 6), generator=draw),)
    image = torch.randn(2, 3, 8, 8, generator=draw)
    if type(model).__name__ == "UNet2DModel":
        return image, 3
    if type(model).__name__ == "UNet2DConditionModel":
        return image, 3, torch.randn(2, 4, 8, generator=draw)
    if type(model).__name__ == "SD3Transformer2DModel":
        return image, torch.randn(2, 4, 8, generator=draw), torch.randn(2, 6, generator=draw), torch.tensor([3, 5])
    if type(model).__name__ == "DiTTransformer2DModel":
        return image, torch.tensor([3, 5]), torch.tensor([1, 2])
    return (image,)


@dataclass(frozen=True)
class Snapshot:
    """Everything about a model that an operation which fails, or only looks, must leave alone."""

    state: dict[str, Tensor]
    types: dict[str, type]
    modes: dict[str, bool]
    flags: dict[str, bool]
    gradients: dict[str, Tensor | None]
    hooks: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        return cls(
            {name: tensor.clone() for name, tensor in model.state_dict().items()},
            {name: type(module) for name, module in model.named_modules()},
            {name: module.training for name, module in model.named_modules()},
            {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            {name: parameter.grad for name, parameter in model.named_parameters()},
            {name: _hooks(parameter) for name, parameter in model.named_parameters()},
        )

    def assert_same(self, model: nn.Module, *, flags: bool = True) -> None:
        """The model is as it was: bit by bit, module by module, flag by flag, gradient object by gradient object."""
        now = Snapshot.of(model)
        assert now.types == self.types
        assert now.state.keys() == self.state.keys()
        for name, tensor in self.state.items():
            assert now.state[name].dtype == tensor.dtype, name
            assert torch.equal(now.state[name].nan_to_num(), tensor.nan_to_num()), name
        assert now.modes == self.modes
        assert now.hooks == self.hooks
        for name, gradient in self.gradients.items():
            assert now.gradients[name] is gradient, name
        if flags:
            assert now.flags == self.flags


def _hooks(parameter: nn.Parameter) -> int:
    return len(parameter._backward_hooks or {}) + len(parameter._post_accumulate_grad_hooks or {})
