"""Attacks on what a language model forgot, and that they leave it as it was."""

from __future__ import annotations

import math

import pytest
import torch
from answer_models import FACTS, FORGET, decoder, word_tokenizer
from models import Snapshot
from peft import LoraConfig, get_peft_model
from torch import nn

from semu_peft import SemuConfig
from semu_peft.evaluation import (
    generate_answers,
    prompt_attacks,
    relearn_text,
    rouge_l,
    rounded_weights,
    score_answers,
)
from semu_peft.objectives import Attacker

QUIET = {"progress": False}
ROWS = [{**row, "paraphrased_question": f"the {row['question']}"} for row in FORGET]


def adapted(kind: str):
    torch.manual_seed(1)
    config = (
        SemuConfig(target_modules=["q_proj", "down_proj"], r=2, init_weights=False)
        if kind == "semu"
        else LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False)
    )
    return get_peft_model(decoder(), config)


def test_a_model_that_has_diverged_has_no_recall() -> None:
    """It is not called forgotten: greedily it writes a token all the same, and sampling from it is torch's error."""
    model = decoder()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    found = prompt_attacks(model, word_tokenizer(), FORGET, gold=decoder(), samples=2, max_new_tokens=3, **QUIET)
    assert all(map(math.isnan, found.found.values())) and not any(map(math.isnan, found.gold.values()))


def test_questions_are_asked_in_five_ways() -> None:
    model, tokenizer, gold = decoder(), word_tokenizer(), decoder(seed=1)
    options = {"max_new_tokens": 5, **QUIET}
    found = prompt_attacks(model, tokenizer, ROWS, gold=gold, shots=FACTS, samples=6, **options)
    assert list(found.found) == list(found.gold) == ["plain", "paraphrased", "prefixed", "few-shot", "leak@6"]
    expected = [row["answer"] for row in ROWS]

    def recall(questions: list[str], attacked: nn.Module = model, **how) -> float:
        return (
            rouge_l(expected, generate_answers(attacked, tokenizer, questions, **how, **options)).recall.mean().item()
        )

    plain, other = [row["question"] for row in ROWS], [row["paraphrased_question"] for row in ROWS]
    assert found.found["plain"] == recall(plain) and found.gold["plain"] == recall(plain, gold)
    assert found.found["paraphrased"] == recall(other)
    assert found.found["prefixed"] == recall(plain, start="Sure, here is the answer:")
    samples = generate_answers(model, tokenizer, plain, samples=6, **options)
    best = [
        max(rouge_l([answer], [text]).recall.item() for text in group)
        for answer, group in zip(expected, samples, strict=True)
    ]
    assert found.found["leak@6"] == pytest.approx(sum(best) / len(best))
    assert "(gold " in repr(found)


def test_a_start_of_the_answer_is_read_and_not_returned() -> None:
    model, tokenizer = decoder(), word_tokenizer()
    question = "who wrote it"
    begun = generate_answers(model, tokenizer, [question], start=" Ada wrote", max_new_tokens=4, **QUIET)
    form = "Question: {question}\nAnswer: Ada wrote {answer}"
    assert begun == generate_answers(model, tokenizer, [question], template=form, max_new_tokens=4, **QUIET)


@pytest.mark.parametrize("kind", ["semu", "lora"])
def test_relearning_brings_answers_back_and_leaves_the_model(kind: str) -> None:
    model, tokenizer, gold = adapted(kind), word_tokenizer(), decoder(seed=1)
    before = [Snapshot.of(model), Snapshot.of(gold)]
    attacker = Attacker("adam", 1e-2, steps=10, forget_examples=2)
    found = relearn_text(model, tokenizer, FORGET, gold=gold, attacker=attacker, steps=[5], **QUIET)
    before[0].assert_same(model)
    before[1].assert_same(gold)
    assert found.steps == (0, 5, 10) and len(found.gold) == 3 and not found.seen
    assert found.ratio == found.probability[-1] / found.gold[-1]
    with_all = Attacker("adam", 1e-2, steps=10, forget_examples=3)
    own = relearn_text(model, tokenizer, FORGET, FORGET, attacker=with_all, **QUIET)
    whole = score_answers(model, tokenizer, FORGET, **QUIET).probability.mean().item()
    assert own.probability[0] == pytest.approx(whole, rel=1e-5) and own.seen
    assert own.probability[-1] > 2 * own.probability[0]


def test_what_the_attacker_has_is_no_probe_wherever_it_stands() -> None:
    """By content: neither a copy among the training rows nor the same row among the probes."""
    model, tokenizer = decoder(), word_tokenizer()
    attacker = Attacker("sgd", 0.1, steps=1, forget_examples=2)
    assert relearn_text(model, tokenizer, [FORGET[0]] * 4, attacker=attacker, **QUIET).seen
    left = relearn_text(model, tokenizer, FORGET, attacker=attacker, **QUIET)
    given = relearn_text(model, tokenizer, FORGET, FORGET, attacker=attacker, **QUIET)
    assert given == left and not given.seen
    pairs = [(row["question"], row["answer"]) for row in FORGET]
    some = relearn_text(model, tokenizer, FORGET[:2], [*pairs[:2], pairs[2]], attacker=attacker, **QUIET)
    alone = score_answers(model, tokenizer, pairs[2:], **QUIET).probability.item()
    assert some.probability[0] == pytest.approx(alone, rel=1e-5) and not some.seen
    assert relearn_text(model, tokenizer, FORGET[:2], pairs[:2], attacker=attacker, **QUIET).seen


def test_relearning_is_plain_training_of_all_weights() -> None:
    model, tokenizer = decoder(), word_tokenizer()
    attacker = Attacker("sgd", 0.1, steps=2, forget_examples=3)
    found = relearn_text(model, tokenizer, FORGET, attacker=attacker, **QUIET)
    trained = decoder()
    optimizer = torch.optim.SGD(trained.parameters(), 0.1, momentum=0.9)
    from semu_peft.language import text_examples
    from semu_peft.objectives import CrossEntropy

    batch = next(iter(text_examples(tokenizer, FORGET).loader(3, shuffle=False)))
    for _ in range(2):
        optimizer.zero_grad()
        CrossEntropy()(trained, batch).backward()
        optimizer.step()
    expected = score_answers(trained, tokenizer, FORGET, **QUIET).probability.mean().item()
    assert found.seen and found.probability[-1] == pytest.approx(expected, rel=1e-3)
    assert "own answers" in found.row[1] and found.row[0] == "relearning: SGD 0.1, 3 examples"


def test_relearning_on_other_answers_is_measured_on_the_probes() -> None:
    attacker = Attacker("adam", 1e-2, steps=2, forget_examples=2)
    found = relearn_text(decoder(), word_tokenizer(), FACTS, FORGET, attacker=attacker, **QUIET)
    whole = score_answers(decoder(), word_tokenizer(), FORGET, **QUIET).probability.mean().item()
    assert found.probability[0] == pytest.approx(whole) and not found.seen and found.ratio is None


@pytest.mark.parametrize("group_size", [None, 4])
def test_merged_weights_are_rounded_to_nearest_and_come_back_bit_for_bit(group_size: int | None) -> None:
    model = adapted("semu")
    before = Snapshot.of(model)
    name = "model.layers.0.self_attn.q_proj"
    layer = model.base_model.model.get_submodule(name)
    merged = layer.get_base_layer().weight + layer.get_delta_weight("default")
    with rounded_weights(model, bits=4, group_size=group_size) as rounded:
        found = rounded.base_model.model.get_submodule(name).get_base_layer().weight.detach().clone()
    before.assert_same(model)
    pieces = merged.detach().reshape(merged.shape[0], -1, group_size or merged.shape[1])
    scale = pieces.abs().amax(-1, keepdim=True) / 7
    expected = ((pieces / scale).round() * scale).reshape(merged.shape)
    assert torch.allclose(found, expected, atol=1e-5)
    assert all(len(row.unique()) <= 15 for row in found.reshape(-1, group_size or merged.shape[1]))


def test_rounding_leaves_the_head_and_embeddings() -> None:
    model = decoder(tie_word_embeddings=True)
    head = model.lm_head.weight.detach().clone()
    with rounded_weights(model, bits=2):
        assert torch.equal(model.lm_head.weight, head)
        assert len(model.model.layers[0].mlp.up_proj.weight[0].unique()) <= 3


def test_what_was_merged_or_switched_off_stays_so() -> None:
    model = adapted("lora")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    model.merge_adapter()
    merged = layer.get_base_layer().weight.detach().clone()
    with rounded_weights(model):
        assert not torch.equal(layer.get_base_layer().weight, merged)
    assert layer.merged and torch.equal(layer.get_base_layer().weight, merged)
    model.unmerge_adapter()
    plain = layer.get_base_layer().weight.detach().clone()
    with model.disable_adapter(), rounded_weights(model, bits=8) as rounded:
        assert torch.allclose(
            rounded.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").weight, plain, atol=0.05
        )
    assert not layer.merged and torch.equal(layer.get_base_layer().weight, plain)


def test_an_error_inside_brings_the_weights_back() -> None:
    model = adapted("lora")
    before = Snapshot.of(model)
    with pytest.raises(RuntimeError), rounded_weights(model):
        raise RuntimeError
    before.assert_same(model)


def test_mistakes_of_attacks() -> None:
    with pytest.raises(ValueError, match="`bits` must be an integer of at least 2"), rounded_weights(decoder(), bits=1):
        pass
    with pytest.raises(ValueError, match="`model` must have linear layers"), rounded_weights(nn.LayerNorm(3)):
        pass
    with pytest.raises(TypeError, match="`attacker` must be an `Attacker`"):
        relearn_text(decoder(), word_tokenizer(), FORGET, attacker="adam", **QUIET)
    with pytest.raises(ValueError, match="`steps` must be an integer of at least 0"):
        relearn_text(decoder(), word_tokenizer(), FORGET, steps=[-1], **QUIET)
    with pytest.raises(ValueError, match="`samples` must be an integer"):
        prompt_attacks(decoder(), word_tokenizer(), FORGET, samples=0, **QUIET)
