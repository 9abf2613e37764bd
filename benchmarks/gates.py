"""How often gates open: on questions of a forget request, on paraphrases of them, and on questions about others.

One request of 200 questions (TOFU's forget05), thresholds set for 1% false alarms on 800 questions about other authors,
measured on 400 further ones. Both kinds of questions are alike but for whom they are about.

    python benchmarks/gates.py --model MODEL --data TOFU
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from semu_peft.gates import Gate, HiddenStates, Nearest, linear_gate
from semu_peft.language import TextExample, text_examples

FALSE_ALARMS = 0.01


def opened(model: Any, gate: Gate, batches: list[Any]) -> float:
    """The share of the prompts on which a gate opens, as it sees them before anything is generated."""
    weights = []
    for batch in batches:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            prompt = ids[: int((labels != -100).int().argmax())].unsqueeze(0)
            weights.append(float(gate(model, input_ids=prompt)["request"]))
    return sum(weights) / len(weights)


def gates(model: Any, forget: list[Any], retain: list[Any]) -> dict[str, Callable[[], Gate]]:
    """Gates by name, each made when it is called."""

    def nearest(layer: str, metric: Any, pool: Any) -> Gate:
        gate = Nearest(layer, metric, pool=pool).add("request", model, forget)
        gate.calibrate(model, retain, false_alarms=FALSE_ALARMS)
        return gate

    def linear(layer: str, pool: Any) -> Gate:
        return linear_gate(
            model, {"request": forget}, retain, HiddenStates(layer, pool=pool), false_alarms=FALSE_ALARMS
        )

    made: dict[str, Callable[[], Gate]] = {}
    for metric in ("cosine", "mahalanobis", "box"):
        made[f"Nearest {metric}, model.norm, any"] = lambda metric=metric: nearest("model.norm", metric, "any")  # type: ignore[misc]
    for layer, pool in (("model.norm", "last"), ("model.norm", "any"), ("model.embed_tokens", "mean")):
        made[f"linear_gate, {layer}, {pool}"] = lambda layer=layer, pool=pool: linear(layer, pool)  # type: ignore[misc]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a decoder that learnt TOFU's answers")
    parser.add_argument("--data", type=Path, required=True, help="folder with TOFU's files")
    parser.add_argument("--template", default="<s>Question: {question}\nAnswer: {answer}")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = {
        name: [json.loads(line) for line in (args.data / f"{name}.json").read_text(encoding="utf-8").splitlines()]
        for name in ("forget05_perturbed", "retain95")
    }
    order = torch.randperm(len(rows["retain95"]), generator=torch.Generator().manual_seed(args.seed))[:1200].tolist()
    others = [rows["retain95"][place] for place in order]

    def batches(found: list[dict[str, str]], key: str = "question") -> list[Any]:
        examples = [TextExample(row["answer"], row[key]) for row in found]
        return list(text_examples(tokenizer, examples, template=args.template).loader(50, shuffle=False))

    forget, paraphrased = (batches(rows["forget05_perturbed"], key) for key in ("question", "paraphrased_question"))
    retain, held_out = batches(others[:800]), batches(others[800:])
    print("| gate | forget | paraphrased | others | seconds |\n| --- | --- | --- | --- | --- |")
    for name, make in gates(model, forget, retain).items():
        start = time.perf_counter()
        gate = make()
        seconds = time.perf_counter() - start
        shares = " | ".join(f"{100 * opened(model, gate, each):.1f}%" for each in (forget, paraphrased, held_out))
        print(f"| {name} | {shares} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
