"""Training in eval mode, with activations recomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix_models import bert, tokens
from models import VIT, Snapshot, gpt2, llama, sd3, t5, unet_condition, vit
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from semu_peft import SemuConfig, initialize_semu_weights, unlearn
from semu_peft.model_state import eval_mode
from semu_peft.tuner.adapted import semu_layers

TEXT = {"input_ids": tokens(), "labels": tokens()}


def opt() -> Any:
    """A model whose layers draw their dropout themselves, by their own mode."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=32, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, dropout=0.5,
            max_position_embeddings=16, word_embed_proj_dim=16,
        )
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], Any], list[str], dict[str, Tensor]]] = {
    "gpt2": (gpt2, ["c_attn", "c_fc"], TEXT),
    "llama": (llama, ["q_proj", "down_proj"], TEXT),
    "opt": (opt, ["q_proj", "fc1"], TEXT),
    "t5": (t5, ["q", "wo"], TEXT),
    "bert": (bert, ["query", "dense"], {"input_ids": tokens(), "labels": torch.tensor([0, 2])}),
    "vit": (vit, [VIT["query"], VIT["up"]], {"pixel_values": torch.ones(2, 3, 8, 8), "labels": torch.tensor([0, 1])}),
}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def forgotten(name: str, use_reentrant: bool | None) -> tuple[PeftModel, list[float], dict[str, list[float]], int]:
    """The model after three steps, its losses, its spectra, and how often its blocks were computed."""
    make, targets, batch = MODELS[name]
    torch.manual_seed(0)
    base = make().train()
    if use_reentrant is not None:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model = get_peft_model(base, SemuConfig(target_modules=targets, r=3))
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    seen: list[bool] = []
    for block in blocks:
        first = next(module for module in block.modules() if not isinstance(module, (nn.ModuleList, type(block))))
        first.register_forward_hook(lambda module, *_: seen.append(module.training))
    before = Snapshot.of(model)
    profile = initialize_semu_weights(model, [batch], loss_of, progress=False)
    assert {key: module.training for key, module in model.named_modules()} == before.modes
    # With Adam the rounding of gradients that should be zero would decide where their entries go.
    result = unlearn(
        model, [batch] * 3, loss_of, epochs=1, optimizer=lambda cores: torch.optim.SGD(cores, lr=0.01), progress=False
    )
    assert {key: module.training for key, module in model.named_modules()} == before.modes
    assert not any(seen), "dropout and norms are in eval mode, also when they are computed again"
    spectra = {key: layer.singular_values.tolist() for key, layer in profile.layers.items()}
    return model, [entry["loss"] for entry in result.history], spectra, len(seen) // len(blocks)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_recomputing_changes_no_number(name: str, use_reentrant: bool) -> None:
    """Gradients, losses and trained cores are those without recomputation, and each block runs twice a step; without
    `enable_input_require_grads`, which models of images do not have."""
    model, losses, spectra, runs = forgotten(name, use_reentrant)
    plain, plain_losses, plain_spectra, plain_runs = forgotten(name, None)
    assert plain_runs == 4 and runs == 8
    assert losses == pytest.approx(plain_losses, abs=1e-5)
    for key, values in plain_spectra.items():
        torch.testing.assert_close(torch.tensor(spectra[key]), torch.tensor(values), atol=1e-5, rtol=1e-4)
    for key, layer in semu_layers(model).items():
        wanted = semu_layers(plain)[key].get_delta_weight("default")
        assert wanted.any()
        torch.testing.assert_close(layer.get_delta_weight("default"), wanted, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("make", [unet_condition, sd3])
def test_diffusers_recomputes_in_any_mode(make: Callable[[], Any]) -> None:
    """Gradient checkpointing of diffusers' models gives the same gradients."""
    from models import sample_input

    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        base = make()
        if recompute:
            base.enable_gradient_checkpointing()
        config = SemuConfig(target_modules=["to_q", "to_v"], r=2, init_weights=False)
        torch.manual_seed(1)
        model = get_peft_model(base, config)
        with eval_mode(model):
            model(*sample_input(base))[0].square().mean().backward()
        gradients.append([layer.semu_core["default"].grad for layer in semu_layers(model).values()])
    for first, second in zip(*gradients, strict=True):
        assert first.any()
        torch.testing.assert_close(first, second, atol=1e-7, rtol=1e-4)


def test_everything_comes_back_after_an_error() -> None:
    """Modes and checkpointing functions are as before, also when the pass fails."""
    model = llama().train()
    model.gradient_checkpointing_enable()
    layer = model.model.layers[0]
    function = layer._gradient_checkpointing_func
    with pytest.raises(RuntimeError, match="stop"), eval_mode(model):
        assert layer._gradient_checkpointing_func is not function and not model.model.norm.training
        raise RuntimeError("stop")
    assert layer._gradient_checkpointing_func is function
    assert all(module.training for module in model.modules())
