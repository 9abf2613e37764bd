"""What a model says of given answers: token by token, whatever they are padded and batched with."""

from __future__ import annotations

import pytest
import torch
from answer_models import FORGET, WORDS, alone, decoder, word_tokenizer
from models import Snapshot, t5
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from semu_peft.evaluation import TokenScores, generate_answers, neutral_kl, score_answers, score_texts
from semu_peft.evaluation.prompts import encoder_for

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
    row = encoder_for(model, word_tokenizer()).answer(*PAIRS[0])
    prompt, length = row["input_ids"], row["labels"].count(-100)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([prompt])).logits[0, length - 1 : -1].float()
    expected = -nn.functional.cross_entropy(logits, torch.tensor(prompt[length:]), reduction="none")
    assert torch.allclose(scores.log_probs[0], expected, atol=0.05)


def test_the_prompt_that_is_scored_is_the_one_that_is_generated_from() -> None:
    encoder = encoder_for(decoder(), word_tokenizer())
    row = encoder.answer("who wrote it", "Ada wrote it")
    length = row["labels"].count(-100)
    assert row["input_ids"][:length] == encoder.prompt_tokens("who wrote it") == ids("Question : who wrote it Answer :")
    assert row["input_ids"][length:] == row["labels"][length:] == ids("Ada wrote it </s>")


def test_an_end_that_the_tokenizer_appends_is_not_generated_after() -> None:
    """As that of a Llama with `add_eos_token`; one that the template itself writes stays, and an encoder reads its."""
    tokenizer = word_tokenizer()
    both = TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = both
    encoder = encoder_for(decoder(), tokenizer)
    row = encoder.answer("who wrote it", "Ada wrote it")
    length = row["labels"].count(-100)
    assert row["input_ids"][:length] == encoder.prompt_tokens("who wrote it")
    assert encoder.prompt_tokens("who wrote it") == ids("<s> Question : who wrote it Answer :")
    assert encoder.prompt_tokens("who", " Ada") == ids("<s> Question : who Answer : Ada")
    ended = encoder_for(decoder(), tokenizer, "{question} </s>{answer}")
    assert ended.prompt_tokens("who") == ids("<s> who </s>")
    assert encoder_for(t5(), tokenizer).prompt_tokens("who") == ids("<s> who </s>")
    plain, options = word_tokenizer(), {"max_new_tokens": 6, "progress": False}
    questions = ["who wrote it", "what"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    written = generate_answers(decoder(), tokenizer, questions, **options)
    assert written == generate_answers(decoder(), plain, questions, **options)


def test_a_chat_template_ends_the_answer_once() -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'Question : ' if m.role == 'user' else 'Answer : ' }}{{ m.content }}"
        "{{ '</s> ' if m.role == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}Answer : {% endif %}"
    )
    encoder = encoder_for(decoder(), tokenizer)
    row = encoder.answer("who", "Ada")
    length = row["labels"].count(-100)
    assert row["input_ids"][length:] == ids("Ada </s>")
    assert row["input_ids"][:length] == encoder.prompt_tokens("who") == ids("Question : who Answer :")
    scores = score_answers(decoder(), tokenizer, [("who", "Ada")], **QUIET)
    assert [len(part) for part in scores.without_eos().log_probs] == [1]


def test_plain_text_counts_every_token_but_the_first() -> None:
    model = decoder()
    scores = score_texts(model, word_tokenizer(), ["Ada lives in Rome", "the Rome"], **QUIET)
    assert [len(part) for part in scores.log_probs] == [4, 2]
    following = ids("lives in Rome </s>")
    expected = alone(model, ids("Ada"), following).gather(1, torch.tensor(following).unsqueeze(1)).squeeze(1)
    assert torch.allclose(scores.log_probs[0], expected, atol=1e-5)
    windows = score_texts(model, word_tokenizer(), ["Ada lives in Rome", "the Rome"], max_length=3, **QUIET)
    assert [len(part) for part in windows.log_probs] == [4, 2]
    assert torch.allclose(windows.log_probs[0][:2], expected[:2], atol=1e-5)
    second = alone(model, ids("in"), ids("Rome </s>"))[0, WORDS.index("Rome")]
    assert windows.log_probs[0][2].item() == pytest.approx(second.item(), abs=1e-5)


def test_an_encoder_decoder_reads_the_prompt_and_is_scored_on_the_answer() -> None:
    model, tokenizer = t5(), word_tokenizer()
    scores = score_answers(model, tokenizer, PAIRS, batch_size=2, **QUIET)
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([ids("where lives Ada")]), labels=torch.tensor([ids("in Rome </s>")])
        ).logits[0]
    told = logits.log_softmax(-1).gather(1, torch.tensor(ids("in Rome </s>")).unsqueeze(1)).squeeze(1)
    assert torch.allclose(scores.log_probs[1], told, atol=1e-4)
    assert len(generate_answers(model, tokenizer, ["where lives Ada"], max_new_tokens=3, **QUIET)) == 1


def test_texts_longer_than_the_models_positions() -> None:
    """Plain text is read in windows of what there is; answers are not cut and questions not asked."""
    sizes = {"vocab_size": len(WORDS), "n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model, long = GPT2LMHeadModel(GPT2Config(**sizes)), "who wrote it " * 8
    scores = score_texts(model, word_tokenizer(), [long], **QUIET)
    assert [len(part) for part in scores.log_probs] == [24]
    twelve = score_texts(model, word_tokenizer(), [long], max_length=12, **QUIET)
    assert torch.equal(scores.log_probs[0], twelve.log_probs[0])
    assert neutral_kl(model, word_tokenizer(), [long], reference=model, **QUIET).tokens == 24
    with pytest.raises(ValueError, match="`pairs` must fit into the model's 12 positions, got 53 tokens in row 1"):
        score_answers(model, word_tokenizer(), [PAIRS[1], (long, long)], **QUIET)
    with pytest.raises(
        ValueError, match="`questions` must fit into the model's 12 positions with 1 left .*, got 28 tokens in row 0"
    ):
        generate_answers(model, word_tokenizer(), [long], **QUIET)


def test_an_end_of_sequence_that_is_not_there_is_not_taken_off() -> None:
    part = [torch.zeros(3)]
    assert len(TokenScores(part, part, part).without_eos().log_probs[0]) == 3
    assert len(TokenScores(part, part, part, has_eos=True).without_eos().log_probs[0]) == 2


@pytest.mark.parametrize(
    ("pairs", "options", "kind", "words"),
    [
        ([], {}, ValueError, "`pairs` must hold at least one question"),
        ([("who", "")], {}, ValueError, "An answer must have at least one token"),
        ([{"q": "who"}], {}, ValueError, r"`pairs\[0\]` must have the columns"),
        (["Ada"], {}, ValueError, "`pairs` must have a question to each answer, got plain text in row 0"),
        (PAIRS, {"template": "{question}"}, ValueError, "`template` must have"),
        (PAIRS, {"batch_size": 0}, ValueError, "`batch_size` must be an integer of at least 1"),
    ],
)
def test_mistakes(pairs: list, options: dict, kind: type, words: str) -> None:
    with pytest.raises(kind, match=words):
        score_answers(decoder(), word_tokenizer(), pairs, **QUIET, **options)
