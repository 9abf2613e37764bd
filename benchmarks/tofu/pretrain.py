"""Train the two decoders of the benchmark: `full` on all of TOFU's answers, `retain95` without those to be forgotten.

Both also learn the answers about real authors and the world. Two CPU cores need some hours for each, a GPU a minute.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from subjects import TEMPLATE, read_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from semu_peft.language import text_examples

OTHERS = ("real_authors_perturbed", "world_facts_perturbed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of TOFU's JSON lines")
    parser.add_argument("--output", type=Path, required=True, help="folder for full and retain95")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = {name: read_rows(args.data / f"{name}.json") for name in ("full", "retain95", *OTHERS)}
    others = [row for name in OTHERS for row in rows[name]]
    tokenizer = _tokenizer([*rows["full"], *others])
    for name in ("full", "retain95"):
        _train([*rows[name], *others], tokenizer, args.output / name, args)


def _tokenizer(rows: list[dict[str, Any]]) -> PreTrainedTokenizerFast:
    """Byte-level pairs, learnt on the texts themselves."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=special, show_progress=False)
    raw.train_from_iterator((f"{row['question']} {row['answer']}" for row in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _train(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, folder: Path, args: argparse.Namespace
) -> None:
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=640, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    examples = text_examples(tokenizer, rows, template=TEMPLATE, max_length=256)
    loader = examples.loader(args.batch_size, seed=args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    steps = args.epochs * math.ceil(len(examples) / args.batch_size)
    accelerator = Accelerator(cpu=os.environ.get("ACCELERATE_USE_CPU") == "true")
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    with tqdm(total=steps, desc=folder.name) as bar:
        for _ in range(args.epochs):
            for batch in loader:
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
    accelerator.unwrap_model(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
