"""Train the two decoders of the benchmark: `full` on all of TOFU's answers, `retain95` without those to be forgotten.

Both also learn the answers about real authors and the world. Two CPU cores need some hours for each, a GPU a minute.
`run.py` does this by itself where it is given no models; one that is there already is not trained again.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from subjects import TEMPLATE, read_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from semu_peft.language import text_examples

OTHERS = ("real_authors_perturbed", "world_facts_perturbed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of TOFU's JSON lines")
    parser.add_argument("--output", type=Path, required=True, help="folder for full and retain95")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seed", type=int)
    pretrain(**vars(parser.parse_args()))


def pretrain(
    data: Path,
    output: Path,
    *,
    epochs: int = 60,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Path:
    """Train those of the two that are not there yet, and return the folder of both.

    Args:
        data: Folder of TOFU's JSON lines.
        output: Where the folders `full` and `retain95` come.
        epochs: Of each.
        batch_size: Answers a step.
        learning_rate: Of AdamW.
        seed: Of the start and of the order.
    """
    rows = {name: read_rows(data / f"{name}.json") for name in ("full", "retain95", *OTHERS)}
    others = [row for name in OTHERS for row in rows[name]]
    tokenizer = _tokenizer([*rows["full"], *others])
    for name in ("full", "retain95"):
        if (output / name).exists():
            continue
        model = _train(name, [*rows[name], *others], tokenizer, epochs, batch_size, learning_rate, seed)
        state = PartialState()
        if state.is_main_process:  # of several, one renames
            unfinished = output / f"{name}.unfinished"
            model.to(torch.bfloat16).save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            unfinished.rename(output / name)
        state.wait_for_everyone()
    return output


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
    name: str,
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=640, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    examples = text_examples(tokenizer, rows, template=TEMPLATE, max_length=256)
    loader = examples.loader(batch_size, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    steps = epochs * math.ceil(len(examples) / batch_size)
    accelerator = Accelerator(cpu=os.environ.get("ACCELERATE_USE_CPU") == "true")
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    with tqdm(total=steps, desc=name) as bar:
        for _ in range(epochs):
            for batch in loader:
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
