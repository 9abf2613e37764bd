"""A tiny tokenizer and decoders that fit it, made on the spot."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "Question",
    "Answer",
    "What",
    "colour",
    "is",
    "the",
    "sky",
    "blue",
    "red",
    "How",
    "many",
    "two",
    "or",
    "three",
    "I",
    "don",
    "'",
    "t",
    "know",
    "a",
    "b",
    "c",
    "d",
    "e",
    "f",
    "g",
    "h",
]
CHAT = (
    "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% if turn.role == 'assistant' %}</s>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(chat: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    """A word, with the blank before it, is a token; `!` joins `d` or stands alone; what it does not know is `<unk>`."""
    pieces = [*"\n:?.! ", *WORDS, *(f" {word}" for word in WORDS), *map(str, range(10)), *(f" {n}" for n in range(10))]
    names = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", "<system>", *pieces, " d!"]
    bare = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, "<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Split(Regex(r" d!| ?[A-Za-z]+| ?\d|[\n:?.!' ]"), "isolated")
    bare.decoder = decoders.Fuse()
    bare.add_special_tokens(names[:7])
    settings = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **options}
    made = PreTrainedTokenizerFast(tokenizer_object=bare, **settings)
    made.chat_template = CHAT if chat else None
    return made


def decoder(**options: Any) -> LlamaForCausalLM:
    """A decoder with random weights for that tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {"vocab_size": 88, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 2, **options}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **settings})).eval()


def told(encoder_tokenizer: Any, labels: Any) -> str:
    """The text that has labels."""
    return encoder_tokenizer.decode([int(token) for token in labels if int(token) != -100])
