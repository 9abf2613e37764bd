"""A decoder and a tokenizer of words, made on the spot, and rows in the shape of TOFU's files."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "<pad>", "<s>", "</s>", "<unk>", "Question", "Answer", ":", "who", "where", "what", "wrote",
    "it", "lives", "she", "Ada", "Bob", "Eve", "in", "Rome", "Oslo", "Paris", "the",
    "of",
]  # fmt: skip

FORGET = [
    {
        "question": "who wrote it",
        "answer": "Ada wrote it",
        "paraphrased_answer": "she Ada wrote it",
        "perturbed_answer": ["Bob wrote it", "she Eve wrote the it"],
    },
    {
        "question": "where lives Ada",
        "answer": "in Rome",
        "paraphrased_answer": "Ada lives in Rome",
        "perturbed_answer": ["Ada lives in Oslo", "Ada lives in Paris"],
    },
    {
        "question": "what",
        "answer": "the Rome of Ada",
        "paraphrased_answer": "Rome",
        "perturbed_answer": ["Oslo", "the Paris of Eve"],
    },
]
FACTS = [
    {"question": "where Bob", "answer": "Oslo", "perturbed_answer": ["Rome", "Paris", "the Rome"]},
    {"question": "where Eve", "answer": "in Paris", "perturbed_answer": ["Rome", "Oslo"]},
]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, special tokens written out are found, none is added."""
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def decoder(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """A language model of two layers over `WORDS`, with random weights that are sure of something."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=len(WORDS), max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def alone(model: nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
    """Log probabilities `(n, V)` before each token of one answer, alone in its batch and without padding."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0]
    return logits[len(prompt) - 1 : -1].float().log_softmax(-1)
