"""What is peculiar to embeddings: tokens in, sparse gradients, padding, scaled subclasses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Snapshot, run
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from semu_peft import SemuConfig, initialize_semu_weights, save_as_lora
from semu_peft.tuner import Embedding
from semu_peft.tuner.adapted import semu_layers

VOCABULARY, DIMENSION = 20, 6


class Tagger(nn.Module):
    """An embedding and a linear head, `(N, T)` tokens to `(N, T, 3)`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, DIMENSION, **options)
        self.head = nn.Linear(DIMENSION, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(ids)))


def tagger(**options: Any) -> Tagger:
    torch.manual_seed(1)
    return Tagger(**options)


def batches() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(2)
    return [
        (torch.randint(12, (4, 5), generator=draw), torch.randint(3, (4, 5), generator=draw)) for _ in range(3)
    ]  # tokens 12 and more are never seen


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def random_adapter(**options: Any) -> PeftModel:
    return get_peft_model(tagger(**options), SemuConfig(target_modules=["tokens"], r=3, init_weights=False))


@pytest.mark.parametrize("sparse", [False, True])
def test_initialisation_factorises_the_sum_of_gradients(sparse: bool) -> None:
    """U and V span the leading directions of Σ ∇W, sparse or not, and unseen tokens have no part in U."""
    reference = tagger().eval()
    for batch in batches():
        loss(reference, batch).backward()
    left, _, right = torch.linalg.svd(reference.tokens.weight.grad, full_matrices=False)
    model = get_peft_model(
        tagger(sparse=sparse), SemuConfig(target_modules=["tokens"], explained_variance=0.8, min_parameters=0)
    )
    profile = initialize_semu_weights(model, batches(), loss, progress=False)
    layer, rank = semu_layers(model)["tokens"], profile.ranks["tokens"]
    assert 0 < rank < DIMENSION
    for basis, expected in ((layer.semu_U["default"], left), (layer.semu_V["default"], right.mT)):
        expected = expected[:, :rank]
        torch.testing.assert_close(basis @ basis.mT, expected @ expected.mT, atol=1e-5, rtol=0)
    assert layer.semu_U["default"][12:].abs().max() < 1e-6


class Sizes(TorchDispatchMode):
    """The number of elements of every tensor that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen += [out.numel()] if isinstance(out, Tensor) and "aten::t" not in str(func.name()) else []
        return out


def test_no_correction_for_the_whole_vocabulary() -> None:
    """Forward and backward compute nothing of the size of the weight."""
    base = nn.Embedding(5000, 40).requires_grad_(False)
    layer = Embedding(base, "default", SemuConfig(r=2, init_weights=False))
    with Sizes() as sizes:
        layer(torch.arange(7)).sum().backward()
    assert layer.semu_core["default"].grad is not None
    assert 0 < max(sizes.seen) <= 7 * 40


def test_the_padding_row_stays() -> None:
    """Whatever the bases, the vector at `padding_idx` is the base model's; R's gradient ignores it."""
    model = random_adapter(padding_idx=2)
    layer = semu_layers(model)["tokens"]
    assert layer.semu_U["default"][2].abs().max() > 0.01
    ids = torch.tensor([[2, 3, 2, 4]])
    base = layer.base_layer(ids)
    assert torch.equal(layer(ids)[0, [0, 2]], base[0, [0, 2]])
    assert not torch.equal(layer(ids)[0, 1], base[0, 1])
    upstream = torch.randn(1, 4, DIMENSION)
    layer(ids).backward(upstream)
    dense = torch.zeros(VOCABULARY, DIMENSION)
    dense[3], dense[4] = upstream[0, 1], upstream[0, 3]
    expected = layer.semu_U["default"].mT @ dense @ layer.semu_V["default"]
    torch.testing.assert_close(layer.semu_core["default"].grad, expected)
    before, row = run(model, ids), layer.base_layer.weight[2].clone()
    merged = model.merge_and_unload()
    assert torch.equal(merged.tokens.weight[2], row)
    torch.testing.assert_close(run(merged, ids), before)


def test_an_embedding_that_rewrites_its_weight_is_refused() -> None:
    model = tagger()
    model.tokens = nn.Embedding(VOCABULARY, DIMENSION, max_norm=1.0)
    before = Snapshot.of(model)
    with pytest.raises(TypeError, match="'tokens'.*`max_norm`"):
        get_peft_model(model, SemuConfig(target_modules=["head", "tokens"]))
    before.assert_same(model)


def test_saved_loaded_exported(tmp_path: Path) -> None:
    """From disk, as an adapter and as a stock LoRA, the model computes the same."""
    model = random_adapter(padding_idx=0)
    ids = batches()[0][0]
    expected = run(model, ids)
    model.save_pretrained(tmp_path / "semu")
    assert torch.equal(run(PeftModel.from_pretrained(tagger(padding_idx=0), tmp_path / "semu"), ids), expected)
    save_as_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(tagger(padding_idx=0), tmp_path / "lora")
    torch.testing.assert_close(run(lora, ids), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(run(lora.merge_and_unload(), ids), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemma_scales_its_embeddings(dtype: torch.dtype, tmp_path: Path) -> None:
    """Gemma multiplies embeddings by √d: the correction too, merged and exported alike."""
    config = Gemma3TextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=VOCABULARY, max_position_embeddings=16, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    base = Gemma3ForCausalLM(config).to(dtype).eval()
    ids = torch.randint(1, VOCABULARY, (2, 5))
    plain = run(base, ids)
    model = get_peft_model(copy.deepcopy(base), SemuConfig(target_modules=["embed_tokens"], r=2, init_weights=False))
    layer = semu_layers(model)["model.embed_tokens"]
    layer.semu_core["default"].data.mul_(20)
    delta = layer.get_delta_weight("default")
    # From the difference of two roundings of W + ΔW times √16, the correction itself.
    correction = (layer(ids).float() - layer.base_layer(ids).float()) / 4
    torch.testing.assert_close(correction, delta[ids], atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=0.02)
    expected = run(model, ids)
    assert (expected - plain).abs().max() > 0.05
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    save_as_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(run(lora, ids), expected, atol=tolerance, rtol=0.05)
    torch.testing.assert_close(run(model.merge_and_unload(), ids), expected, atol=tolerance, rtol=0.05)
