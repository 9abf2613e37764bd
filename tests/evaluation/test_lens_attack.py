"""Attacks that read an answer from the layers, on a model whose layers say what is wanted."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from semu_peft.evaluation import lens_attack

TOKENS = 8


class Said(nn.Module):
    """A language model whose layers give fixed logits, `(layers, vocabulary)`, everywhere; its head is the identity."""

    def __init__(self, *layers: list[float]) -> None:
        super().__init__()
        self.layers = nn.Parameter(torch.tensor(layers))
        self.head = nn.Linear(TOKENS, TOKENS, bias=False)
        self.head.weight.data = torch.eye(TOKENS)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        shape = (*input_ids.shape, TOKENS)
        return SimpleNamespace(hidden_states=[layer.expand(shape) for layer in self.layers])


def logits(**chances: float) -> list[float]:
    """The logits of some chances, `t3=0.5`; the other tokens share the rest unevenly, rising with their number."""
    named = {int(name[1:]): chance for name, chance in chances.items()}
    others = [token for token in range(TOKENS) if token not in named]
    shares = torch.tensor([1.0 + 0.1 * place for place in range(len(others))])
    rest = (1 - sum(named.values())) * shares / shares.sum()
    chance = torch.zeros(TOKENS)
    for token, value in [*named.items(), *zip(others, rest.tolist(), strict=True)]:
        chance[token] = value
    return chance.log().tolist()


def batch(token: int = 3) -> dict[str, Tensor]:
    """A prompt of two tokens, and an answer of two; only the first of these is asked for."""
    return {"input_ids": torch.tensor([[1, 2, token, 7]]), "labels": torch.tensor([[-100, -100, token, 7]])}


EVEN = logits(t3=0.12)  # in the middle of the others


def test_the_lens_finds_the_token_at_the_layer_where_it_peaks() -> None:
    """Acceptance: also where the output no longer says it."""
    hidden = Said(EVEN, logits(t3=0.6), EVEN)
    assert lens_attack(hidden, [batch()], budget=1).found["lens"] == 100.0
    assert lens_attack(Said(EVEN, EVEN, EVEN), [batch()], budget=1).found["lens"] == 0.0


def test_a_rise_is_found_where_the_token_is_not_first_anywhere() -> None:
    """Acceptance: another token is always the first, and ours only rises the most."""
    low = logits(t3=0.10, t7=0.5, t0=0.03)
    high = logits(t3=0.20, t7=0.5, t0=0.03)
    found = lens_attack(Said(low, high), [batch()], budget=1).found
    assert found["lens"] == 0.0 and found["rise"] == 100.0 and "turn" not in found


def test_a_turn_is_found_where_the_rise_of_others_is_steeper() -> None:
    """Acceptance: ours rises and falls again, others rise or fall all along by more."""
    steps = [
        logits(t3=0.10, t7=0.30, t6=0.30, t0=0.02),
        logits(t3=0.14, t7=0.36, t6=0.24, t0=0.02),
        logits(t3=0.10, t7=0.42, t6=0.18, t0=0.02),
    ]
    found = lens_attack(Said(*steps), [batch()], budget=1).found
    assert found["lens"] == found["rise"] == 0.0 and found["turn"] == 100.0


def test_ties_are_no_success_and_the_whole_vocabulary_is() -> None:
    """Acceptance: a token that is as likely as all others is not found; a budget of all tokens finds everything."""
    flat = Said([0.0] * TOKENS, [0.0] * TOKENS, [0.0] * TOKENS)
    assert set(lens_attack(flat, [batch()], budget=TOKENS - 1).found.values()) == {0.0}
    assert set(lens_attack(flat, [batch()], budget=TOKENS).found.values()) == {100.0}


def test_a_model_that_has_diverged_gives_nothing_away() -> None:
    """Acceptance: NaN for all that is ranked, and not that every token is the first."""
    for layers in ([[torch.nan] * TOKENS] * 3, [EVEN, EVEN, [*EVEN[:-1], torch.nan]]):
        found = lens_attack(Said(*layers), [batch()], budget=1).found
        assert {*found} == {"lens", "rise", "turn"} and all(map(math.isnan, found.values()))


def test_the_reference_is_attacked_alike() -> None:
    """Acceptance: of the original no less is found than of the edited model."""
    original, edited = Said(EVEN, logits(t3=0.6), logits(t3=0.9)), Said(EVEN, EVEN, EVEN)
    found = lens_attack(edited, [batch(), batch(4)], reference=original, budget=1)
    assert found.reference["lens"] == 50.0 >= found.found["lens"]


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="`budget` must"):
        lens_attack(Said(EVEN), [batch()], budget=0)
    with pytest.raises(ValueError, match="`batches` must hold an answer"):
        lens_attack(Said(EVEN), [])
    with pytest.raises(ValueError, match="`model` must be a language model with a head"):
        lens_attack(nn.Linear(2, 2), [batch()])
