"""The models of the matrix: plain networks, transformers of eight families, U-Nets and diffusion transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from models import VIT, Cnn, Mlp, clip_text, dit, gpt2, llama, sd3, t5, unet, unet_condition, vit
from torch import Tensor, nn

TEXT = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, the layers to adapt, and an input of two examples.

    Attributes:
        name: Its name in the tests' names.
        factory: Builds it.
        inputs: Draws keyword arguments for its forward pass, the same at every call.
        targets: What is adapted.
        convolutions: Whether there are convolutions among the targets.
        mixed: Whether example `i` of the input is row `i` of the output and of every target's input.
    """

    name: str
    factory: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    targets: Any
    convolutions: bool = False
    mixed: bool = True


class Embedded(nn.Module):
    """An embedding, its mean over the tokens, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.hidden = nn.Linear(8, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(tokens).mean(1))))


def qwen2() -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT, num_key_value_heads=1))


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=3))


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**TEXT, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2)
    )


def clip() -> Any:
    text = {**TEXT, "eos_token_id": 1, "pad_token_id": 0}
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(length: int = 6, seed: int = 2) -> Tensor:
    return torch.randint(3, 32, (2, length), generator=torch.Generator().manual_seed(seed))


def first_tensor(output: Any) -> Tensor:
    """The logits, or whatever tensor comes first."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    return next(value for value in (output.values() if hasattr(output, "values") else output) if value is not None)


def text_inputs() -> dict[str, Any]:
    return {"input_ids": tokens()}


def clip_inputs() -> dict[str, Any]:
    """With an end token, where CLIP reads the text: at the first token its queries have no gradient but rounding."""
    ended = torch.cat([tokens(), torch.ones(2, 1, dtype=torch.long)], 1)
    return {"input_ids": ended, "pixel_values": draw(2, 3, 8, 8)}


VIT_TARGETS = [VIT["query"], VIT["up"], "projection"]
CASES = [
    Case("mlp", Mlp, lambda: {"x": draw(2, 6)}, ["fc1", "fc2", "head"]),
    Case("cnn", Cnn, lambda: {"x": draw(2, 3, 8, 8)}, ["conv1", "conv2", "head"], convolutions=True),
    Case("embedding", Embedded, lambda: {"tokens": tokens()}, ["hidden", "head"]),
    Case("llama", llama, text_inputs, "all-linear"),
    Case("qwen2", qwen2, text_inputs, ["q_proj", "v_proj", "down_proj"]),
    Case("gpt2", gpt2, text_inputs, ["c_attn", "c_proj", "c_fc"]),
    Case("bert", bert, text_inputs, ["query", "value", "dense"]),
    Case("t5", t5, lambda: {**text_inputs(), "decoder_input_ids": tokens(4, seed=3)}, ["q", "v", "wo"]),
    Case("vit", vit, lambda: {"pixel_values": draw(2, 3, 8, 8)}, VIT_TARGETS, convolutions=True),
    Case("clip", clip, clip_inputs, r".*(q_proj|fc2)", mixed=False),
    Case("clip_text", clip_text, text_inputs, ["k_proj", "out_proj", "fc1"]),
    Case("mixtral", mixtral, text_inputs, ["q_proj", "o_proj"]),
    Case(
        "unet", unet, lambda: {"sample": draw(2, 3, 8, 8), "timestep": torch.tensor([3, 5])},
        ["to_q", "to_out.0", "conv1", "conv_in"], convolutions=True,
    ),
    Case(
        "unet_condition", unet_condition,
        lambda: {
            "sample": draw(2, 3, 8, 8), "timestep": torch.tensor([3, 5]),
            "encoder_hidden_states": draw(2, 4, 8, seed=2),
        },
        ["to_q", "to_k", "conv2", "conv_out"], convolutions=True,
    ),
    Case(
        "dit", dit,
        lambda: {
            "hidden_states": draw(2, 3, 8, 8), "timestep": torch.tensor([3, 5]), "class_labels": torch.tensor([1, 2]),
        },
        ["to_q", "to_v", "proj"], convolutions=True,
    ),
    Case(
        "sd3", sd3,
        lambda: {
            "hidden_states": draw(2, 3, 8, 8), "encoder_hidden_states": draw(2, 4, 8, seed=2),
            "pooled_projections": draw(2, 6, seed=3), "timestep": torch.tensor([3, 5]),
        },
        ["to_q", "to_v", "proj_out"],
    ),
]  # fmt: skip
