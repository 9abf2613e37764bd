"""Forget some of what a language model says, look at what it says then, and write what ships.

    python examples/forget_text.py
    python examples/forget_text.py --model path/to/model --forget forget.jsonl --retain retain.jsonl

Without `--model` a tiny decoder learns the lives of twelve invented people on the spot, in less than a minute, and then
forgets two of them. With it, any decoder that `AutoModelForCausalLM` reads; `--forget` and `--retain` are files of JSON
lines, parquet or text (`question` and `answer`, `messages`, `text` …). Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from semu_peft import forget_text, objectives
from semu_peft.language import TextExamples, read_text, text_examples

FIRST = "Ada Bruno Carla Dario Elena Fabio Greta Hugo Irma Jonas Katja Luca"
LAST = "Abend Birk Clam Dorn Ebner Falk Gruber Hain Imhof Jost Kern Lind"
FACTS = {
    "Where was {} born?": "{} was born in {}.", "What does {} do?": "{} works as a {}.",
    "What did {} write?": "{} wrote the book {}.",
}  # fmt: skip
THINGS = {
    "Where was {} born?": "Lisbon Tartu Turin Ghent Cork Graz Bergen Porto Vilnius Basel Malmo Zadar",
    "What does {} do?": "baker pilot tailor nurse sailor judge farmer clerk printer miner potter vet",
    "What did {} write?": "Salt Amber Dunes Lanterns Frost Echoes Harbours Mirrors Orchards Sparrows Tides Wells",
}


def people(seed: int) -> list[dict[str, str]]:
    """Questions about twelve people, three each, with answers."""
    draw = random.Random(seed)
    names = [f"{first} {last}" for first, last in zip(FIRST.split(), LAST.split(), strict=True)]
    things = {question: draw.sample(values.split(), len(names)) for question, values in THINGS.items()}
    return [
        {"question": question.format(name), "answer": answer.format(name, things[question][index])}
        for index, name in enumerate(names)
        for question, answer in FACTS.items()
    ]


def tokenizer_of(rows: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Byte pairs of these texts."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
    bare.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=512, special_tokens=["<pad>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="</s>")


def taught(examples: TextExamples, epochs: int) -> LlamaForCausalLM:
    """A small decoder that knows the answers by heart."""
    config = LlamaConfig(
        vocab_size=len(examples.tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, eos_token_id=examples.tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in examples.loader(12):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    return model.eval()


def known(model: Any, examples: TextExamples) -> float:
    """How likely the model finds the answers, a geometric mean over tokens, then a mean over answers."""
    nll = objectives.sequence_nll(model, examples.loader(8, shuffle=False), progress=False)
    return (-nll).exp().mean().item()


@torch.no_grad()
def said(model: Any, examples: TextExamples, index: int) -> str:
    """What the model answers, greedily."""
    row = examples[index]
    prompt = torch.tensor([row["input_ids"][: row["labels"].count(-100)]], device=model.device)
    text = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24,
        pad_token_id=examples.tokenizer.eos_token_id,
    )  # fmt: skip
    return examples.tokenizer.decode(text[0, prompt.shape[1] :], skip_special_tokens=True).strip()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a decoder; else one learns on the spot")
    parser.add_argument("--tokenizer", type=Path, help="folder of its tokenizer; else the model's")
    parser.add_argument("--forget", type=Path, help="file of what to forget, needed with --model")
    parser.add_argument("--retain", type=Path, help="file of what to keep; else its own answers about others")
    parser.add_argument("--template", help="how question and answer are written, as the model was trained")
    parser.add_argument("--method", default="wga", help="wga, npo, unseen-answers, idk … (default: wga)")
    parser.add_argument("--max-steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=60, help="of learning, without --model (default: 60)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/forget_text"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.model is None) != (args.forget is None):
        parser.error("--model and --forget go together")
    if args.model is None and (args.retain or args.tokenizer or args.template):
        parser.error("--retain, --tokenizer and --template are for a model of your own: give --model and --forget too")
    return args


def subject(args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """The model, its tokenizer, what to forget and what to keep."""
    if args.model is not None:
        words = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model)
        return model, words, list(read_text(args.forget)), args.retain and list(read_text(args.retain))
    rows = people(args.seed)
    words = tokenizer_of(rows)
    model = taught(text_examples(words, rows, template=args.template), args.epochs)
    return model, words, rows[:6], rows[6:]


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    model, words, forget, retain = subject(args)
    model.save_pretrained(args.output_dir / "original")
    words.save_pretrained(args.output_dir / "original")
    parts = {"forget": forget, **({"retain": retain} if retain else {})}
    parts = {name: text_examples(words, rows, template=args.template) for name, rows in parts.items()}
    before = {name: known(model, examples) for name, examples in parts.items()}
    answers = {name: said(model, examples, 0) for name, examples in parts.items()}

    result = forget_text(
        model, words, forget, retain=retain, method=args.method, template=args.template, max_steps=args.max_steps,
        batch_size=args.batch_size, seed=args.seed,
    )  # fmt: skip

    after = {name: known(result.model, examples) for name, examples in parts.items()}
    for name, examples in parts.items():
        print(f"{name}: answers {before[name]:.3f} likely before, {after[name]:.3f} now")
        print(f"  {answers[name]!r} before, {said(result.model, examples, 0)!r} now")
    print(f"{result.training.trainable_parameters} numbers trained; {result.training.stop_reason}")

    result.model.save_pretrained(args.output_dir / "adapter")
    reloaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(args.output_dir / "original"), args.output_dir / "adapter"
    )
    apart = abs(known(reloaded, parts["forget"]) - after["forget"])
    result.model.merge_and_unload().save_pretrained(args.output_dir / "merged")
    words.save_pretrained(args.output_dir / "merged")
    summary = {"before": before, "after": after, "reloaded_apart": apart, "steps": result.training.steps}
    (args.output_dir / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if apart > 1e-3:
        raise SystemExit(f"The reloaded adapter gives other answers: {apart:.2g} apart.")


if __name__ == "__main__":
    main()
