"""A decoder that knows eight invented people by heart, made on the spot."""

from __future__ import annotations

from functools import cache

import torch
from text_models import decoder
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from semu_peft.language import text_examples

FIRST, LAST = (
    ["Ada", "Bruno", "Carla", "Dario", "Elena", "Fabio", "Greta", "Hugo"],
    ["Abend", "Birk", "Clam", "Dorn", "Ebner", "Falk", "Gruber", "Hain"],
)
TOWNS, TRADES = (
    ["Lisbon", "Tartu", "Turin", "Ghent", "Cork", "Graz", "Bergen", "Porto"],
    ["baker", "pilot", "nurse", "vet", "judge", "clerk", "miner", "cook"],
)
PEOPLE = [
    pair
    for first, last, town, trade in zip(FIRST, LAST, TOWNS, TRADES, strict=True)
    for pair in (
        (f"Where was {first} {last} born ?", f"{first} {last} was born in {town} ."),
        (f"What does {first} {last} do ?", f"{first} {last} works as a {trade} ."),
    )
]


def words() -> PreTrainedTokenizerFast:
    """A word is a token."""
    known = dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", "Question", "Answer", ":", *" ".join(
        part for pair in PEOPLE for part in pair).split()])  # fmt: skip
    bare = Tokenizer(models.WordLevel({word: index for index, word in enumerate(known)}, "<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@cache
def _learnt() -> dict[str, torch.Tensor]:
    model, examples = decoder(hidden_size=48, intermediate_size=96), text_examples(words(), PEOPLE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        for batch in examples.loader(16, seed=0):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    return model.state_dict()


def learnt() -> nn.Module:
    """A decoder that knows them all by heart."""
    model = decoder(hidden_size=48, intermediate_size=96)
    model.load_state_dict(_learnt())
    return model
