"""What a model says of given answers: token by token, whatever they are padded and batched with."""

from __future__ import annotations

import pytest
import torch
from answer_models import FORGET, WORDS, alone, decoder, word_tokenizer
from models import Snapshot
from torch import nn

from semu_peft.evaluation import TokenScores, score_answers, score_texts
from semu_peft.evaluation.prompts import encode_answer, encode_prompt

QUIET = {"progress": False}
PAIRS = [(row["question"], row["answer"]) for row in FORGET]


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def test_an_answer_is_scored_token_by_token_with_its_end() -> None:
    model = decoder()
    scores = score_answers(model, word_tokenizer(), PAIRS, template="<s> {question} : {answer}", **QUIET)
    prompt, answer = ids("<s> where lives Ada :"), ids("in Rome </s>")
    expected = alone(model, prompt, answer)
    told = expected.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
    assert torch.allclose(scores.log_probs[1], told, atol=1e-5)
    assert scores.correct[1].tolist() == (expected.argmax(1) == torch.tensor(answer)).tolist()
    mean = (expected.exp() * expected).sum(1)
    deviation = ((expected.exp() * expected**2).sum(1) - mean**2).sqrt()
    assert torch.allclose(scores.standardized[1], (told - mean) / deviation, atol=1e-4)
    assert scores.probability[1].item() == pytest.approx(told.mean().exp().item(), abs=1e-6)


def test_scores_do_not_depend_on_batches_order_or_padding_side() -> None:
    model, tokenizer = decoder(), word_tokenizer()
    one = score_answers(model, tokenizer, PAIRS, batch_size=1, **QUIET)
    all_at_once = score_answers(model, tokenizer, PAIRS[::-1], batch_size=3, **QUIET)
    tokenizer.padding_side = "left"
    other_side = score_answers(model, tokenizer, PAIRS, batch_size=2, **QUIET)
    assert torch.allclose(one.nll, all_at_once.nll.flip(0), atol=1e-5)
    assert torch.allclose(one.nll, other_side.nll, atol=1e-5)


def test_half_precision_is_summed_in_float32_and_the_model_left_as_it_was() -> None:
    model = decoder().bfloat16().train()
    before = Snapshot.of(model)
    scores = score_answers(model, word_tokenizer(), PAIRS, **QUIET)
    before.assert_same(model)
    assert scores.log_probs[0].dtype == torch.float32
    prompt, length = encode_answer(word_tokenizer(), *PAIRS[0])
    with torch.no_grad():
        logits = model.eval()(torch.tensor([prompt])).logits[0, length - 1 : -1].float()
    expected = -nn.functional.cross_entropy(logits, torch.tensor(prompt[length:]), reduction="none")
    assert torch.allclose(scores.log_probs[0], expected, atol=0.05)


def test_the_prompt_that_is_scored_is_the_one_that_is_generated_from() -> None:
    tokenizer = word_tokenizer()
    row, length = encode_answer(tokenizer, "who wrote it", "Ada wrote it")
    assert row[:length] == encode_prompt(tokenizer, "who wrote it") == ids("Question : who wrote it Answer :")
    assert row[length:] == ids("Ada wrote it </s>")


def test_a_chat_template_ends_the_answer_once() -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'Question : ' if m.role == 'user' else 'Answer : ' }}{{ m.content }}"
        "{{ '</s> ' if m.role == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}Answer : {% endif %}"
    )
    row, length = encode_answer(tokenizer, "who", "Ada")
    assert row[length:] == ids("Ada </s>")
    assert row[:length] == ids("Question : who Answer :")


def test_plain_text_counts_every_token_but_the_first() -> None:
    model = decoder()
    scores = score_texts(model, word_tokenizer(), ["Ada lives in Rome", "the Rome of Ada"], max_length=3, **QUIET)
    assert [len(part) for part in scores.log_probs] == [2, 2]
    expected = alone(model, ids("Ada"), ids("lives in"))
    assert scores.log_probs[0].tolist() == pytest.approx(
        [expected[0, WORDS.index("lives")].item(), expected[1, WORDS.index("in")].item()], abs=1e-5
    )
    assert scores.without_eos() is scores


def test_an_end_of_sequence_that_is_not_there_is_not_taken_off() -> None:
    part = [torch.zeros(3)]
    assert len(TokenScores(part, part, part).without_eos().log_probs[0]) == 3
    assert len(TokenScores(part, part, part, has_eos=True).without_eos().log_probs[0]) == 2


@pytest.mark.parametrize(
    ("pairs", "options", "kind", "words"),
    [
        ([], {}, ValueError, "`pairs` must hold at least one question"),
        ([("who", "")], {}, ValueError, "`pairs` must have an answer to each question"),
        ([{"q": "who"}], {}, TypeError, r"`pairs` must hold pairs of strings.*got \['q'\]"),
        (PAIRS, {"template": "{question}"}, ValueError, "`template` must have"),
        (PAIRS, {"batch_size": 0}, ValueError, "`batch_size` must be an integer of at least 1"),
    ],
)
def test_mistakes(pairs: list, options: dict, kind: type, words: str) -> None:
    with pytest.raises(kind, match=words):
        score_answers(decoder(), word_tokenizer(), pairs, **QUIET, **options)
