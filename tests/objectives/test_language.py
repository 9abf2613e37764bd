"""What every objective of language models must have in common, and each one's own equation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from language_batches import LENGTHS, PROMPT, both, forms, packed, padded
from models import llama, t5
from peft import get_peft_model

from semu_peft import SemuConfig, initialize_semu_weights, unlearn
from semu_peft.objectives import NPO, CrossEntropy, KLToOriginal, Objective, SimNPO
from semu_peft.objectives.batches import read_tokens

OBJECTIVES: dict[str, Objective] = {
    "npo": NPO(),
    "simnpo": SimNPO(),
    "kl": KLToOriginal(),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def adapted(make: Any = llama, **options: Any) -> Any:
    """A tiny model with an adapter that is not at its start."""
    torch.manual_seed(0)
    base = make().eval()
    return get_peft_model(base, SemuConfig(target_modules="all-linear", r=2, init_weights=False, **options)).eval()


# ---- the reading of tokens ----


def test_sequences_are_rows_or_packed() -> None:
    """Every form counts the same tokens, each in its own sequence, and nothing is predicted across a border."""
    model = adapted()
    expected = read_tokens(model, padded("right"))
    counts = [length - PROMPT for length in LENGTHS]
    assert expected.sequences.bincount().tolist() == counts
    for batch in forms().values():
        tokens = read_tokens(model, batch)
        assert torch.equal(tokens.labels, expected.labels) and torch.equal(tokens.sequences, expected.sequences)
        torch.testing.assert_close(tokens.logits, expected.logits, rtol=1e-5, atol=1e-6)
    everything = [read_tokens(model, form) for form in (padded("left", prompt=0), packed(prompt=0))]
    assert all(tokens.sequences.bincount().tolist() == [length - 1 for length in LENGTHS] for tokens in everything)
    torch.testing.assert_close(everything[0].logits, everything[1].logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fill", [0, 1])
def test_position_ids_of_padded_rows(fill: int) -> None:
    """Positions that a generation loop makes of the mask split no sequence, whatever they say at the padding."""
    model, batch = adapted(), padded("left", more=2)
    places = (batch["attention_mask"].cumsum(1) - 1).masked_fill(batch["attention_mask"] == 0, fill)
    tokens = read_tokens(model, {**batch, "position_ids": places})
    expected = read_tokens(model, padded("right"))
    assert torch.equal(tokens.sequences, expected.sequences) and torch.equal(tokens.labels, expected.labels)


def test_a_row_without_an_answer_is_no_sequence() -> None:
    """Its number goes to the next, so that means are over what there is."""
    batch = padded("right")
    batch["labels"][1] = -100
    tokens = read_tokens(adapted(), batch)
    assert tokens.sequences.bincount().tolist() == [3, 4]
    assert tokens.means(torch.ones(7)).tolist() == [1.0, 1.0]


# ---- every objective ----


@every_objective
def test_padding_and_packing_change_nothing(name: str) -> None:
    """Neither the side nor the amount of padding, nor labels that stand at it, nor rows packed into one."""
    model, objective = adapted(), OBJECTIVES[name]
    losses = {form: copy.deepcopy(objective)(model, batch).item() for form, batch in forms().items()}
    assert losses == pytest.approx(dict.fromkeys(losses, losses["right"]), rel=2e-5, abs=1e-7)


@every_objective
def test_each_reaches_the_adapter_alone(name: str) -> None:
    """A finite float32 scalar whose gradient goes to the cores, also in bfloat16 and in an encoder-decoder."""
    for model in (adapted(), adapted().to(torch.bfloat16), adapted(t5)):
        loss = copy.deepcopy(OBJECTIVES[name])(model, both(padded))
        assert loss.shape == () and loss.isfinite() and loss.dtype == torch.float32
        loss.backward()
        reached = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters() if p.requires_grad]
        assert any(reached) and all(p.grad is None for p in model.parameters() if not p.requires_grad)


@every_objective
def test_evaluate_is_the_call_and_tells_what_it_read(name: str) -> None:
    """What natural gradients need: a value that stays, for what was prepared, and outputs with their graph."""
    model, batch, objective = adapted(), both(padded), copy.deepcopy(OBJECTIVES[name])
    prepared = objective.prepare(model, batch)
    first, second = (objective.evaluate(model, batch, prepared) for _ in range(2))
    assert first.loss.item() == second.loss.item() == pytest.approx(objective(model, batch).item(), rel=1e-6)
    assert objective.distribution is not None and first.outputs
    assert all(output.values.requires_grad and output.values.dtype == torch.float32 for output in first.outputs)
    if objective.minimum is not None:
        assert first.loss >= objective.minimum


@every_objective
def test_the_original_is_the_model_without_its_adapter(name: str) -> None:
    """Or the frozen model that is given; both say the same."""
    objective = copy.deepcopy(OBJECTIVES[name])
    if not hasattr(objective, "reference"):
        return
    model = adapted()
    expected = objective(model, both(padded))
    torch.manual_seed(0)
    objective.reference = llama().eval()
    torch.testing.assert_close(objective(model, both(padded)), expected)


@pytest.mark.parametrize("name", ["npo"])
def test_natural_gradients_train_by_it(name: str) -> None:
    """The loss falls over a few steps, with a retain term of the same kind."""
    torch.manual_seed(0)
    model = get_peft_model(llama().eval(), SemuConfig(target_modules="all-linear"))
    forget, objective = [both(padded)], copy.deepcopy(OBJECTIVES[name])
    initialize_semu_weights(model, forget, objective, progress=False)
    result = unlearn(model, forget, objective, max_steps=6, progress=False)
    assert result.history[-1]["loss"] < result.history[0]["loss"]


# ---- one equation after the other ----


def test_kl_to_the_original() -> None:
    """Zero at the original, whatever the labels are; elsewhere the divergence of every token that counts."""
    model, batch = adapted(), padded("right")
    with model.disable_adapter():
        before = read_tokens(model, batch).logits.log_softmax(-1)
    after = read_tokens(model, batch).logits.log_softmax(-1)
    expected = (before.exp() * (before - after)).sum(-1).mean()
    torch.testing.assert_close(KLToOriginal()(model, batch), expected)
    torch.manual_seed(0)
    start = get_peft_model(llama().eval(), SemuConfig(target_modules="all-linear"))
    assert KLToOriginal()(start, batch).item() == pytest.approx(0, abs=1e-6)


def test_second_answers_are_no_business_of_the_model() -> None:
    """Keys of other objectives do not reach a model that does not know them."""
    batch = {**both(padded), "token_mask": padded()["labels"] > 5}
    torch.testing.assert_close(CrossEntropy()(adapted(), batch), CrossEntropy()(adapted(), padded()))
