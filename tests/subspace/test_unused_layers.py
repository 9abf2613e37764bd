"""Layers that a loss does not depend on: rank 0 and a warning, in transformers and in models of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from semu_peft import Retain, SemuConfig, SubspaceProfile, gather, initialize_semu_weights, unlearn
from semu_peft.gradients import CoreCovariance, Sketch, SquaredSum
from semu_peft.tuner.adapted import semu_layers

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
PATCHES = {**SMALL, "image_size": 8, "patch_size": 4}
TEXT = {**SMALL, "vocab_size": 32}


def images(seed: int = 0) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))}


def tokens(seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(4, 30, (1, 3), generator=torch.Generator().manual_seed(seed))}


def hidden(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A loss of the last hidden states, mean-pooled as sentence embeddings are."""
    return model(**batch).last_hidden_state.mean(1).square().sum()


def language(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, labels=batch["input_ids"]).loss


def text_tower(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model.base_model.model.text_model(**batch).last_hidden_state.square().mean()


def llava() -> PreTrainedModel:
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=CLIPConfig(vision_config=PATCHES).vision_config, text_config=LlamaConfig(**TEXT))
    )


def switch() -> PreTrainedModel:
    return SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            vocab_size=32,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_sparse_encoder_layers=1,
            num_heads=2,
            num_decoder_layers=2,
            num_sparse_decoder_layers=1,
            num_experts=4,
            expert_capacity=8,
            decoder_start_token_id=0,
        )  # fmt: skip
    )


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], Any, str]] = {
    "bert's pooler": (lambda: BertModel(BertConfig(**TEXT)), tokens, hidden, "pooler"),
    "vit's pooler": (lambda: ViTModel(ViTConfig(**PATCHES)), images, hidden, "pooler"),
    "siglip's pooling head": (lambda: SiglipVisionModel(SiglipVisionConfig(**PATCHES)), images, hidden, "head"),
    "a vision tower without images": (llava, tokens, language, "vision_tower|multi_modal_projector"),
    "clip's other tower": (
        lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=PATCHES)), tokens, text_tower, "vision|projection"
    ),
    "experts that no token reaches": (switch, tokens, language, "experts"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_layers_that_are_not_used(name: str, tmp_path: Path) -> None:
    """They get rank 0 and are named in a warning; all others get directions, train, and load again."""
    make, inputs, loss, unused = CASES[name]
    torch.manual_seed(0)
    base = make()
    fresh = {key: value.clone() for key, value in base.state_dict().items()}
    model = get_peft_model(base, SemuConfig(target_modules="all-linear"))
    with pytest.warns(UserWarning, match=f"no gradient for .*{unused}.*rank 0") as caught:
        profile = initialize_semu_weights(model, [inputs()], loss, progress=False)
    assert sum("rank 0" in str(warning.message) for warning in caught) == 1
    empty = {key for key, rank in profile.ranks.items() if rank == 0}
    assert empty and empty < set(profile.ranks)
    assert unlearn(model, [inputs()], loss, epochs=2, progress=False).steps == 2
    trained = {key for key, layer in semu_layers(model).items() if layer.semu_core["default"].any()}
    assert trained == set(profile.ranks) - empty
    path = profile.save(tmp_path / "profile.safetensors")
    assert SubspaceProfile.load(path).ranks == profile.ranks
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(1)
    again = make()
    again.load_state_dict(fresh)
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.equal(loss(loaded, inputs()), loss(model.eval(), inputs()))


class Auxiliary(nn.Module):
    """A second head that eval mode leaves out, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.body(x))
        return (self.head(h), self.aux(h)) if self.training else self.head(h)


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def test_retain_data_and_sketches() -> None:
    """An unused layer is unused in the retain pass and in sketches as well; the used ones are as without it."""
    batches = [torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    for options in ({}, {"retain": Retain(batches[1:], squared)}, {"statistic": Sketch.of_size(4)}):
        ranks = []
        for targets in (["body", "head", "aux"], ["body", "head"]):
            torch.manual_seed(0)
            model = get_peft_model(Auxiliary(), SemuConfig(target_modules=targets, min_parameters=0))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if "aux" in targets else "error")
                ranks.append(initialize_semu_weights(model, batches[:1], squared, progress=False, **options).ranks)
        assert ranks[0] == {**ranks[1], "aux": 0}


def test_statistics_of_unused_layers_are_empty() -> None:
    batches = [torch.randn(4, 6)]
    model = Auxiliary()
    bases = {"body": (8, 6), "head": (3, 8), "aux": (3, 8)}
    within = {name: CoreCovariance.within(torch.eye(m)[:, :2], torch.eye(n)[:, :2]) for name, (m, n) in bases.items()}
    for statistic in (SquaredSum, SquaredSum.per_batch, within):
        with pytest.warns(UserWarning, match="aux"):
            found = gather(model, batches, squared, statistic=statistic, progress=False)
        assert not any(tensor.any() for tensor in found["aux"].tensors() if tensor.dim())
        assert all(tensor.any() for tensor in found["head"].tensors())


def test_nothing_left_is_an_error() -> None:
    model = get_peft_model(Auxiliary(), SemuConfig(target_modules=["aux"]))
    with pytest.raises(ValueError, match="any of the target layers.*'aux'") as error:
        initialize_semu_weights(model, [torch.randn(4, 6)], lambda m, b: squared(m, nn.Parameter(b)), progress=False)
    assert "Choose layers" in str(error.value)
    assert model.peft_config["default"].ranks == {}
