"""TARS: rows that read a concept's vector are turned against it, and all others keep their bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import llama
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from semu_peft import methods
from semu_peft.edits import Edit, concept_target, reverse_rows

LAYERS = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"]
PROMPT, CONCEPT, NEURON = torch.tensor([[3, 4, 5]]), 7, 2


def planted() -> LlamaForCausalLM:
    """A decoder in which one neuron reads the concept at the last token of the prompt and writes it."""
    torch.manual_seed(0)
    model, direction = llama(), torch.eye(16)[0]
    mlp = model.model.layers[0].mlp
    model.model.embed_tokens.weight.data[5] = 0.1 * direction + 0.2 * torch.eye(16)[1]
    model.lm_head.weight.data[CONCEPT] = direction
    for layer in (mlp.up_proj, mlp.gate_proj):
        layer.weight.data[NEURON] = 3 * direction
    mlp.down_proj.weight.data[:, NEURON] = 0.2 * direction
    return model


@torch.no_grad()
def last_state(model: LlamaForCausalLM) -> Tensor:
    return model(PROMPT, output_hidden_states=True).hidden_states[-1][0, -1]


@torch.no_grad()
def probability(model: LlamaForCausalLM) -> float:
    return model(PROMPT).logits[0, -1].softmax(-1)[CONCEPT].item()


def test_by_hand() -> None:
    """Acceptance: cos((3, 4), (1, 0)) = 0.6, at the threshold and not above it; exactly such rows change."""
    model, target = nn.Sequential(nn.Linear(2, 4)), torch.tensor([2.0, 0.0])
    model[0].weight.data = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.1], [-3.0, 4.0]])
    before = model[0].weight.detach().clone()
    with reverse_rows(model, ["0"], target, threshold=0.6).apply(model):
        torch.testing.assert_close(model[0].weight[0], torch.tensor([-5.0, 0.0]))
        torch.testing.assert_close(model[0].weight[2], torch.tensor([-(1.01**0.5), 0.0]))
        assert torch.equal(model[0].weight[[1, 3]], before[[1, 3]])
    with reverse_rows(model, ["0"], target, threshold=0.61).apply(model):
        assert torch.equal(model[0].weight[[0, 1, 3]], before[[0, 1, 3]])
    assert torch.equal(model[0].weight, before)


def test_a_planted_concept_is_forgotten_and_comes_back(tmp_path: Path) -> None:
    """Acceptance: only the planted row of each layer changes, the token's probability falls, undoing is bit-exact."""
    model = planted()
    before, likely = {name: value.clone() for name, value in model.state_dict().items()}, probability(model)
    edit = methods.tars(model, LAYERS, last_state(model), CONCEPT, threshold=0.8)
    edit = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    with edit.apply(model):
        changed = {name: value != before[name] for name, value in model.state_dict().items()}
        touched = {name: rows.any(1).nonzero().flatten().tolist() for name, rows in changed.items() if rows.any()}
        assert touched == {f"{name}.weight": [NEURON] for name in LAYERS}
        assert probability(model) < likely / 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_noise_is_added_until_the_head_reads_the_token() -> None:
    model = planted()
    hidden = last_state(model)
    assert torch.equal(concept_target(model, hidden, CONCEPT), hidden)  # it is read from the prompt's own
    found = concept_target(model, hidden, 9, std=2.0, seed=1)
    assert int(model.lm_head(found).argmax()) == 9
    assert torch.equal(found, concept_target(model, hidden, 9, std=2.0, seed=1))
    with pytest.raises(ValueError, match="`tries`: in 3 the head did not read token 9 first"):
        concept_target(model, hidden, 9, std=1e-6, tries=3)


def test_mistakes() -> None:
    model = nn.Sequential(nn.Linear(2, 4))
    for layers in (["1"], [], "0"):
        with pytest.raises(ValueError, match="`layers`"):
            reverse_rows(model, layers, torch.ones(2))
    for target in (torch.zeros(2), torch.ones(1, 2), torch.tensor([float("nan"), 1.0])):
        with pytest.raises(ValueError, match="`target`"):
            reverse_rows(model, ["0"], target)
    model[0].weight.data = -torch.ones(4, 2)
    with pytest.raises(ValueError, match="the highest cosine is -1.000"):
        reverse_rows(model, ["0"], torch.ones(2))
    with pytest.raises(ValueError, match="`model` must be a language model with a head over tokens"):
        concept_target(model, torch.ones(2), 0)
    for hidden, token, wrong in ((torch.ones(3), 0, "hidden"), (torch.ones(16), 32, "token")):
        with pytest.raises(ValueError, match=f"`{wrong}`"):
            concept_target(planted(), hidden, token)
