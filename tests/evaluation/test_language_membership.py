"""Membership attacks on text, against their formulas, and MUSE's measures."""

from __future__ import annotations

import math
import zlib
from typing import Any

import pytest
import torch
from answer_models import FACTS, FORGET, WORDS, decoder, word_tokenizer
from models import Snapshot, llama
from peft import LoraConfig, get_peft_model
from sklearn.metrics import roc_auc_score
from torch import nn

from semu_peft import SemuConfig
from semu_peft.evaluation import (
    TokenScores,
    generate_answers,
    knowledge_memorisation,
    min_k,
    privacy_leakage,
    rouge_l,
    score_answers,
    separation,
    text_membership,
    verbatim_memorisation,
    zlib_score,
)
from semu_peft.evaluation.language_membership import batch_membership, gradient_norm
from semu_peft.evaluation.prompting import few_shot

QUIET = {"progress": False}


def scores_of(*log_probs: float, has_eos: bool = False) -> TokenScores:
    part = [torch.tensor(log_probs)]
    return TokenScores(part, [torch.zeros(len(log_probs)).bool()], [2 * part[0]], has_eos)


def test_scores_by_hand() -> None:
    scores = scores_of(-1.0, -5.0, -3.0, -0.5, -0.25, -9.0, has_eos=True)
    assert min_k(scores).item() == 4.0  # 40% of five tokens: the end of the sequence does not count
    assert min_k(scores, standardized=True).item() == 8.0
    assert min_k(scores_of(-2.0)).item() == 2.0  # at least one
    assert zlib_score(scores, ["a text"]).item() == pytest.approx(18.75 / 6 / len(zlib.compress(b"a text")))


def test_the_end_of_each_sequence_is_its_own() -> None:
    """A text that was cut has no end to leave out, and leaves that of the others alone."""
    part = [torch.tensor([-1.0, -5.0, -3.0, -0.5, -0.25, -9.0]), torch.tensor([-1.0, -5.0, -3.0])]
    both = TokenScores(part, part, part, has_eos=[True, False])
    assert min_k(both).tolist() == [4.0, 5.0] and [len(each) for each in both.without_eos().log_probs] == [5, 3]


def test_one_cut_text_leaves_the_others_scores() -> None:
    """Two draws of one kind are told apart by nothing, whether one of them was cut or not."""
    model, draw = llama().eval(), torch.Generator().manual_seed(0)
    end = model.config.eos_token_id
    sides = []
    for _ in range(2):
        tokens = torch.randint(3, 32, (30, 8), generator=draw)
        tokens[:, -1] = end
        sides.append([{"input_ids": tokens, "labels": tokens}])
    whole = batch_membership(model, *sides, resamples=1).found
    cut = sides[1][0]["input_ids"].clone()
    cut[0, -1] = 5
    found = batch_membership(model, sides[0], [{"input_ids": cut, "labels": cut}], resamples=1).found
    for attack in ("min_k", "min_k_plus_plus"):
        assert abs(found[attack].auc - whole[attack].auc) < 0.05


def test_separation_is_the_area_under_the_curve_with_held_out_texts_high() -> None:
    draw = torch.Generator().manual_seed(0)
    low, high = torch.randint(8, (40,), generator=draw).float(), torch.randint(2, 10, (30,), generator=draw).float()
    expected = roc_auc_score([0] * 40 + [1] * 30, torch.cat([low, high]))
    found = separation(low, high)
    assert found.auc == pytest.approx(expected)
    assert found.interval[0] < found.auc < found.interval[1]
    assert separation(high, low, resamples=10).auc == pytest.approx(1 - expected)
    again = separation(low.repeat(9), high.repeat(9))  # more texts, less doubt
    assert again.interval[1] - again.interval[0] < (found.interval[1] - found.interval[0]) / 2
    with pytest.raises(ValueError, match="`holdout` must be scores without NaN"):
        separation(low, torch.tensor([float("nan")]))


def test_privacy_leakage_of_a_member_and_of_gold() -> None:
    assert privacy_leakage(1.0, 0.5) == -100.0
    assert privacy_leakage(0.4, 0.4) == 0.0
    assert privacy_leakage(0.25, 0.5) == 50.0  # too ignorant
    with pytest.raises(ValueError, match="`gold_auc` must be below 1"):
        privacy_leakage(0.5, 1.0)


def test_gradient_norms_are_those_of_each_answer_alone() -> None:
    model = decoder().train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = Snapshot.of(model)
    pairs = [(row["question"], row["answer"]) for row in FORGET]
    found = gradient_norm(model, word_tokenizer(), pairs, **QUIET)
    before.assert_same(model)
    for parameter in model.eval().parameters():
        parameter.requires_grad_(True)
    ids = [
        [WORDS.index(word) for word in text.split()] for text in ("Question : what Answer :", "the Rome of Ada </s>")
    ]
    logits = model(torch.tensor([ids[0] + ids[1]])).logits[0, len(ids[0]) - 1 : -1]
    nn.functional.cross_entropy(logits, torch.tensor(ids[1])).backward()
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    assert found[2].item() == pytest.approx(torch.stack(norms).mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False),
        SemuConfig(target_modules=["q_proj"], r=2, init_weights=False),
    ],
)
def test_gradient_norms_of_an_adapter_are_those_of_the_merged_model(config: Any) -> None:
    model: Any = get_peft_model(decoder(), config)
    apart = gradient_norm(model, word_tokenizer(), FORGET, **QUIET)
    merged = gradient_norm(model.merge_and_unload(), word_tokenizer(), FORGET, **QUIET)
    assert torch.allclose(apart, merged, rtol=1e-4)


def test_text_membership_is_made_of_its_scores() -> None:
    model, tokenizer, other = decoder(), word_tokenizer(), decoder(seed=1)
    found = text_membership(model, tokenizer, FORGET, FACTS, reference=other, gradients=True, **QUIET)
    assert list(found) == ["loss", "zlib", "min_k", "min_k_plus_plus", "reference", "gradient_norm"]
    losses = [score_answers(model, tokenizer, rows, **QUIET).nll for rows in (FORGET, FACTS)]
    assert found["loss"].auc == separation(*losses).auc
    references = [score_answers(other, tokenizer, rows, **QUIET).nll for rows in (FORGET, FACTS)]
    assert found["reference"].auc == separation(losses[0] - references[0], losses[1] - references[1]).auc


def test_a_text_of_one_token_takes_no_score_from_the_others() -> None:
    """It has its end beside it, which Min-K% leaves out, so that nothing is left."""
    model, tokenizer = decoder(), word_tokenizer()
    longer = [" ".join(WORDS[start : start + 5]) for start in (0, 5, 10)]
    options = {"resamples": 2, **QUIET}
    whole = text_membership(model, tokenizer, longer[:2], longer[2:], **options)
    found = text_membership(model, tokenizer, [WORDS[0], *longer[:2]], longer[2:], **options)
    assert {name: found[name] for name in ("min_k", "min_k_plus_plus")} == {
        name: whole[name] for name in ("min_k", "min_k_plus_plus")
    }
    assert found["loss"].auc != whole["loss"].auc
    none = text_membership(model, tokenizer, [WORDS[0]], longer, **options)
    assert math.isnan(none["min_k"].auc) and not math.isnan(none["loss"].auc)


def test_the_area_does_not_depend_on_the_draws_for_its_interval() -> None:
    model, tokenizer = decoder(), word_tokenizer()
    few, many = (text_membership(model, tokenizer, FORGET, FACTS, resamples=draws, **QUIET) for draws in (1, 50))
    assert {name: each.auc for name, each in few.items()} == {name: each.auc for name, each in many.items()}
    with pytest.raises(ValueError, match="`resamples` must be"):
        text_membership(model, tokenizer, FORGET, FACTS, resamples=0, **QUIET)


def test_verbatim_memorisation_continues_the_text() -> None:
    model, tokenizer = decoder(), word_tokenizer()
    found = verbatim_memorisation(
        model, tokenizer, [{"prompt": "Ada lives", "gt": "in Rome"}], max_new_tokens=3, **QUIET
    )
    ids = [WORDS.index("Ada"), WORDS.index("lives")]
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    written = tokenizer.decode(ids[2:], skip_special_tokens=True)
    assert found.f1.item() == rouge_l(["in Rome"], [written]).f1.item()


def test_shots_go_before_each_question() -> None:
    tokenizer, shots = word_tokenizer(), [("who", "Bob"), ("what", "Rome")]
    prompts, form = few_shot(tokenizer, ["where"], shots, "<s>{question} : {answer}")
    assert prompts == ["<s>who : Bob\n\n<s>what : Rome\n\n<s>where : "] and form == "{question}{answer}"
    braces = [("what is {answer}", "it is {question}")]
    prompts, form = few_shot(tokenizer, ["who is {answer}"], braces, "{prompt} : {answer} .")
    assert prompts == ["what is {answer} : it is {question} .\n\nwho is {answer} : "] and form == "{question}{answer} ."
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }} {% endfor %}"
    prompts, form = few_shot(tokenizer, ["where"], shots)
    assert form is None
    assert [turn["content"] for turn in prompts[0]] == ["who", "Bob", "what", "Rome", "where"]
    assert [turn["role"] for turn in prompts[0]] == ["user", "assistant"] * 2 + ["user"]


def test_knowledge_memorisation_answers_after_the_shots() -> None:
    model, tokenizer = decoder(), word_tokenizer()
    shots = [("who", "Bob")]
    found = knowledge_memorisation(model, tokenizer, FORGET, shots, max_new_tokens=4, **QUIET)
    form = "Question: who\nAnswer: Bob\n\nQuestion: {question}\nAnswer: {answer}"
    written = generate_answers(
        model,
        tokenizer,
        [row["question"] for row in FORGET],
        template=form,
        max_new_tokens=4,
        stop=["Question"],
        **QUIET,
    )
    assert torch.allclose(found.f1, rouge_l([row["answer"] for row in FORGET], written).f1)
