"""Layers that share the input embedding's weight: one correction for all of them, or a warning."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Snapshot, gpt2, run
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from semu_peft import (
    SemuConfig,
    initialize_semu_weights,
    rerank,
    save_as_lora,
)
from semu_peft.tuner import Embedding
from semu_peft.tuner.adapted import semu_layers
from semu_peft.tuner.tied import TiedEmbedding, TiedLinear

PADDING = 1
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")


def llama() -> nn.Module:
    torch.manual_seed(4)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32, max_position_embeddings=16, tie_word_embeddings=True, pad_token_id=PADDING,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def t5() -> nn.Module:
    torch.manual_seed(4)
    config = T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=32, tie_word_embeddings=True,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def tied_gpt2() -> nn.Module:
    torch.manual_seed(4)
    return gpt2()


def t5_of_one_module() -> nn.Module:
    """As transformers before 5 make it: one embedding module in three places."""
    model: Any = t5()
    model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
    return model


FAMILIES = {
    "llama": (llama, "embed_tokens"), "gpt2": (tied_gpt2, "wte"), "t5": (t5, "shared"),
    "t5_of_one_module": (t5_of_one_module, "shared"),
}  # fmt: skip


def tokens() -> Tensor:
    return torch.randint(2, 32, (2, 5), generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module) -> Tensor:
    ids = {"input_ids": tokens(), "labels": tokens()} if "T5" in str(model) else {"input_ids": tokens()}
    return run(model, **ids)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def adapted(family: str, target: str | None = None, **options: Any) -> PeftModel:
    make, embedding = FAMILIES[family]
    settings = {"r": 3, "init_weights": False, "ensure_weight_tying": True, **options}
    return get_peft_model(make(), SemuConfig(target_modules=[target or embedding], **settings)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_correction_wherever_the_weight_is_used(family: str) -> None:
    """The model computes as with W + ΔW in the tied weight, merged it does so once, and stays tied."""
    make, _ = FAMILIES[family]
    model = adapted(family)
    layers = semu_layers(model)
    assert [type(layer) for layer in layers.values()] == [Embedding]
    layer = next(iter(layers.values()))
    reference = make()
    reference.get_input_embeddings().weight.data += layer.get_delta_weight("default").detach()
    expected = logits(reference)
    assert (expected - logits(make())).abs().max() > 0.01
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    kinds = {type(module) for module in model.modules()}
    assert TiedLinear in kinds and (TiedEmbedding in kinds) == family.startswith("t5")
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(make()))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    with model.disable_adapter():  # unmerges
        torch.testing.assert_close(logits(model), logits(make()), atol=1e-5, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert not any(isinstance(module, (TiedLinear, TiedEmbedding)) for module in merged.modules())


def test_training_and_initialisation_see_all_uses() -> None:
    """G, and so the bases and ∂L/∂R, are those of the shared weight; the head has no parameters of its own."""
    reference, ids = llama(), tokens()
    loss(reference, ids).backward()
    gradient = reference.model.embed_tokens.weight.grad
    left, _, _ = torch.linalg.svd(gradient, full_matrices=False)
    model = adapted("llama", init_weights=True, r=None, explained_variance=0.7)
    profile = initialize_semu_weights(model, [ids], loss, progress=False)
    (name,) = profile.ranks
    assert name == "model.embed_tokens"
    layer, left = semu_layers(model)[name], left[:, : profile.ranks[name]]
    basis = layer.semu_U["default"]
    torch.testing.assert_close(basis @ basis.mT, left @ left.mT, atol=1e-4, rtol=0)
    assert [key for key, p in model.named_parameters() if "semu" in key and p.requires_grad] == [
        "base_model.model.model.embed_tokens.semu_core.default.semu_core"
    ]
    loss(model, ids).backward()
    gradient[PADDING] = 0  # never corrected
    expected = basis.mT @ gradient @ layer.semu_V["default"]
    torch.testing.assert_close(layer.semu_core["default"].grad, expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_saved_once_and_loaded_by_either_name(target: str, tmp_path: Path) -> None:
    """Naming either layer corrects both; the file holds the correction once, and loads to the same output."""
    model = adapted("llama", target)
    expected = logits(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert len(list(file.keys())) == 3
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(loaded), expected)
    low = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(low), expected)
    assert torch.equal(logits(copy.deepcopy(loaded)), expected)


def test_the_lora_computes_the_same(tmp_path: Path) -> None:
    model = adapted("llama")
    lora = PeftModel.from_pretrained(llama(), save_as_lora(model, tmp_path))
    torch.testing.assert_close(logits(lora), logits(model), atol=1e-5, rtol=0)


def test_switching_scaling_reranking_and_deleting() -> None:
    """A second adapter, its scale and its end reach the head through the embedding."""
    model = adapted("llama")
    settings = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "init_weights": False}
    model.add_adapter("other", SemuConfig(r=2, **settings))
    layer = semu_layers(model)["model.embed_tokens"]

    def reference(*names: str) -> Tensor:
        plain = llama()
        for name in names:
            plain.model.embed_tokens.weight.data += layer.get_delta_weight(name).detach()
        return logits(plain)

    model.set_adapter("other")
    torch.testing.assert_close(logits(model), reference("other"), atol=1e-5, rtol=0)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(logits(model), reference("default", "other"), atol=1e-5, rtol=0)
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)
    assert layer.scaling == {"default": 0.5, "other": 0.5}
    torch.testing.assert_close(logits(model), reference("default", "other"), atol=1e-5, rtol=0)
    rerank(model, r=1)
    torch.testing.assert_close(logits(model), reference("default", "other"), atol=1e-5, rtol=0)
    model.delete_adapter("default")
    torch.testing.assert_close(logits(model), reference("other"), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        model.add_adapter("third", SemuConfig(target_modules=["q_proj"], r=2, init_weights=False))


def test_modules_to_save_are_tied_too() -> None:
    """Naming the head in `modules_to_save` trains the embedding, which the head shares."""
    config = SemuConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True)
    model = get_peft_model(llama(), config).base_model.model
    head, embedding = (part.modules_to_save["default"] for part in (model.lm_head, model.model.embed_tokens))
    assert head.weight is embedding.weight and head.weight.requires_grad


def test_without_tying_peft_warns() -> None:
    """As LoRA: a correction of the embedding alone is the embedding's alone, and PEFT says what merging does."""
    with pytest.warns(UserWarning, match="`ensure_weight_tying` is not set to True"):
        model = adapted("llama", ensure_weight_tying=False)
    reference = llama()
    reference.lm_head.weight = nn.Parameter(reference.lm_head.weight.clone())
    reference.model.embed_tokens.weight.data += semu_layers(model)["model.embed_tokens"].get_delta_weight("default")
    torch.testing.assert_close(logits(model), logits(reference), atol=1e-5, rtol=0)
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        model.merge_adapter()


def test_a_head_that_only_says_that_it_is_tied() -> None:
    model = llama()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    model._tied_weights_keys = ["lm_head.weight"]
    before = Snapshot.of(model)
    config = SemuConfig(target_modules=["embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match="'lm_head'.*does not hold its weight"):
        get_peft_model(model, config)
    before.assert_same(model)
