"""Answers that a model writes, and ROUGE-L."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from answer_models import WORDS, decoder, word_tokenizer
from peft import LoraConfig, get_peft_model
from text_models import tokenizer as tiny_tokenizer
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from semu_peft.evaluation import generate_answers, rouge_l
from semu_peft.evaluation.prompts import encoder_for

QUESTIONS = ["who wrote it", "where lives Ada", "what", "who"]


@pytest.mark.parametrize("adapted", [False, True])
def test_greedy_answers_are_those_of_each_question_alone(adapted: bool) -> None:
    model, tokenizer = decoder(seed=3), word_tokenizer()
    own = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0, no_repeat_ngram_size=1)
    model.generation_config = own  # left aside
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    together = generate_answers(model, tokenizer, QUESTIONS, max_new_tokens=8, batch_size=3, progress=False)
    for question, written in zip(QUESTIONS, together, strict=True):
        ids = encoder_for(model, tokenizer).prompt_tokens(question)
        start = len(ids)
        while len(ids) < start + 8 and ids[-1] != WORDS.index("</s>"):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert written == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    assert model.generation_config is own and own.repetition_penalty == 9.0


def test_an_encoder_of_absolute_positions_reads_each_question_as_if_alone() -> None:
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=len(WORDS), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, init_std=0.3,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=tokenizer.eos_token_id,
            forced_eos_token_id=None,
        )
    ).eval()  # fmt: skip
    options = {"max_new_tokens": 8, "progress": False}
    together = generate_answers(model, tokenizer, QUESTIONS, batch_size=4, **options)
    assert together == [generate_answers(model, tokenizer, [each], **options)[0] for each in QUESTIONS]
    assert len(set(together)) > 1


def test_draws_are_repeatable_and_leave_the_generators_alone() -> None:
    model, tokenizer = decoder(), word_tokenizer()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    options = {"samples": 4, "max_new_tokens": 5, "progress": False}
    first = generate_answers(model, tokenizer, QUESTIONS, seed=1, **options)
    assert torch.equal(torch.rand(3), expected)
    assert first == generate_answers(model, tokenizer, QUESTIONS, seed=1, **options)
    assert first != generate_answers(model, tokenizer, QUESTIONS, seed=2, **options)
    assert [len(group) for group in first] == [4] * 4


def of_words(number: int) -> str:
    """A question that is so many tokens with what is written around it."""
    around = len(encoder_for(decoder(), word_tokenizer()).prompt_tokens(""))
    return " ".join(["what"] * (number - around))


def lengths(model: Any, tokenizer: Any, questions: list[str], **options: Any) -> list[int]:
    """How many tokens a model writes to each question, if nothing says that it has ended."""
    tokenizer.eos_token = model.generation_config.eos_token_id = None
    decode = tokenizer.batch_decode
    tokenizer.batch_decode = lambda rows, **how: [f"{len(row)}" for row in rows]
    try:
        return [int(text) for text in generate_answers(model, tokenizer, questions, progress=False, **options)]
    finally:
        tokenizer.batch_decode = decode


def gpt2() -> GPT2LMHeadModel:
    """A decoder of 64 absolute positions."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": len(WORDS), "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3, bos_token_id=1, eos_token_id=2)).eval()


def test_rotary_positions_have_no_end() -> None:
    """Whatever length the model was made for: an answer is as long near it as far from it."""
    model, tokenizer = decoder(), word_tokenizer()
    questions = [of_words(number) for number in (10, 60, 63, 64, 80)]
    written = lengths(model, tokenizer, questions, max_new_tokens=20)
    assert written == [20] * 5


def test_absolute_positions_end_and_leave_room_for_a_token() -> None:
    """As much of an answer as there is room for, whatever is asked in the same batch; none is refused."""
    model, tokenizer = gpt2(), word_tokenizer()
    questions = [of_words(number) for number in (10, 60, 63)]
    assert lengths(model, tokenizer, questions, max_new_tokens=20) == [20, 4, 1]
    with pytest.raises(
        ValueError, match="`questions` must fit into the model's 64 positions with 1 left to write into"
    ):
        generate_answers(model, tokenizer, [of_words(64)], progress=False)


def test_answers_end_before_a_stop() -> None:
    model, tokenizer = decoder(), word_tokenizer()
    whole = generate_answers(model, tokenizer, ["what"], max_new_tokens=50, progress=False)[0]
    assert 0 < len(whole.split()) <= 50
    last = whole.split()[-1]
    cut = generate_answers(model, tokenizer, ["what"], max_new_tokens=50, stop=[last], progress=False)[0]
    assert last not in cut and whole.startswith(cut)


def test_a_blank_line_before_an_answer_ends_none() -> None:
    tokenizer = tiny_tokenizer()

    class Says(nn.Linear):
        def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            said = torch.tensor(tokenizer("\n\nblue\n\nred", add_special_tokens=False)["input_ids"])
            return torch.cat([input_ids, said.expand(len(input_ids), -1)], 1)

    model, quiet = Says(1, 1), {"progress": False}
    assert generate_answers(model, tokenizer, ["What colour?"], stop=("\n\n",), **quiet) == ["blue"]


def test_rouge_counts_stems_in_order() -> None:
    assert rouge_l(["the cat sat down"], ["cats the sat"]).recall.item() == 0.5
    assert rouge_l(["running dogs"], ["run dog"]).recall.item() == 1.0
    assert rouge_l(["running dogs"], ["run dog"], stem=False).recall.item() == 0.0
    both = rouge_l(["x y"], ["x"])
    assert (both.recall.item(), both.precision.item()) == (0.5, 1.0)
    assert both.f1.item() == pytest.approx(2 / 3)
    assert rouge_l(["x"], [""]).recall.item() == 0.0


@pytest.mark.parametrize(
    ("expected", "written", "recall", "precision"),
    [
        ("Она живёт в Москве", "В Москве, она живёт", 0.5, 0.5),
        ("她2023年住在北京", "她住在上海", 3 / 7, 3 / 5),
        ("größe über", "große über", 2 / 3, 2 / 3),  # Latin letters, as rouge_score has them: gr, e, ber
    ],
)
def test_rouge_reads_other_scripts(expected: str, written: str, recall: float, precision: float) -> None:
    both = rouge_l([expected, expected], [expected, written])
    assert both.recall.tolist() == pytest.approx([1, recall])
    assert both.precision.tolist() == pytest.approx([1, precision])


def test_mistakes_of_generation() -> None:
    with pytest.raises(ValueError, match="`written` must be one text for each"):
        rouge_l(["a"], [])
    with pytest.raises(TypeError, match="must be lists of texts, got one text"):
        rouge_l("ab", "ac")
    with pytest.raises(TypeError, match="`model` must be one that generates, got Linear"):
        generate_answers(nn.Linear(2, 2), word_tokenizer(), ["who"], progress=False)
    with pytest.raises(ValueError, match="`questions` must hold at least one question"):
        generate_answers(decoder(), word_tokenizer(), [], progress=False)
