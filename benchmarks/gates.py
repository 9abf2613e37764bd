"""How often gates open: on questions of a forget request, on paraphrases of them, and on questions about others.

One request of 200 questions (TOFU's forget05), thresholds set for 1% false alarms on 800 questions about other authors,
measured on 400 further ones. Both kinds of questions are alike but for whom they are about. And how often the answer to
a question, or to its paraphrase, is among those that `Retrieval` finds. Seconds are the processor's. Results go to
`benchmarks/results/gates.json`.

    python benchmarks/gates.py --model MODEL --data TOFU
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from semu_peft.files import written_whole
from semu_peft.gates import Gate, HiddenStates, Nearest, Retrieval, linear_gate
from semu_peft.gates.intervention import always
from semu_peft.language import TextExample, text_examples

RESULT = Path(__file__).parent / "results" / "gates.json"
FALSE_ALARMS = 0.01
COUNTS = (1, 3, 10)


def prompts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch as a gate sees it before anything is generated: what follows the prompts is padding."""
    answers = batch["labels"].ne(-100).int().argmax(-1, keepdim=True)
    asked = (torch.arange(batch["labels"].shape[1]) < answers) & batch["attention_mask"].bool()
    length = int(asked.any(0).nonzero().max()) + 1
    return {"input_ids": batch["input_ids"][:, :length], "attention_mask": asked[:, :length].long()}


def opened(model: Any, gate: Gate, batches: list[Any]) -> float:
    """The share of the prompts on which a gate opens."""
    return float(torch.cat([gate(model, **prompts(batch))["request"] for batch in batches]).mean())


def found(model: Any, retrieval: Retrieval, batches: list[Any]) -> dict[str, float]:
    """By how many names are opened, the share of the prompts whose own answer is among them."""
    similarities = torch.cat([retrieval.similarities(model, **prompts(batch)) for batch in batches])
    own = similarities.diagonal().unsqueeze(1)
    nearer = (similarities > own).sum(1)
    return {str(count): round(float((nearer < count).float().mean()), 4) for count in COUNTS}


def gates(model: Any, forget: list[Any], retain: list[Any]) -> dict[str, Callable[[], Gate]]:
    """Gates by name, each made when it is called."""

    def nearest(layer: str | list[str], metric: Any, pool: Any) -> Gate:
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
    blocks = [f"model.layers.{number}" for number in range(model.config.num_hidden_layers)]
    made["Nearest one-class, all blocks, any"] = lambda: nearest(blocks, "one-class", "any")
    for layer, pool in (("model.norm", "last"), ("model.norm", "any"), ("model.embed_tokens", "mean")):
        made[f"linear_gate, {layer}, {pool}"] = lambda layer=layer, pool=pool: linear(layer, pool)  # type: ignore[misc]
    return made


def data(tokenizer: Any, folder: Path, template: str, seed: int) -> dict[str, list[Any]]:
    """Batches of the request, its paraphrases, others to set thresholds by, and others to measure on."""
    rows = {
        name: [json.loads(line) for line in (folder / f"{name}.json").read_text(encoding="utf-8").splitlines()]
        for name in ("forget05_perturbed", "retain95")
    }
    order = torch.randperm(len(rows["retain95"]), generator=torch.Generator().manual_seed(seed))[:1200].tolist()
    others = [rows["retain95"][place] for place in order]

    def batches(found: list[dict[str, str]], key: str = "question") -> list[Any]:
        examples = [TextExample(row["answer"], row[key]) for row in found]
        return list(text_examples(tokenizer, examples, template=template).loader(50, shuffle=False))

    forget = rows["forget05_perturbed"]
    return {
        "forget": batches(forget), "paraphrased": batches(forget, "paraphrased_question"),
        "retain": batches(others[:800]), "others": batches(others[800:]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a decoder that learnt TOFU's answers")
    parser.add_argument("--data", type=Path, required=True, help="folder with TOFU's files")
    parser.add_argument("--template", default="<s>Question: {question}\nAnswer: {answer}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    if missing := [path for path in (args.model, args.data) if not path.is_dir()]:
        parser.error(f"there is no folder {missing[0]}")
    model = AutoModelForCausalLM.from_pretrained(args.model).float().eval()
    read = data(AutoTokenizer.from_pretrained(args.model), args.data, args.template, args.seed)
    measured = ("forget", "paraphrased", "others")
    rows: dict[str, dict[str, float]] = {}
    print("| gate | forget | paraphrased | others | seconds |\n| --- | --- | --- | --- | --- |")
    for name, make in gates(model, read["forget"], read["retain"]).items():
        start = time.process_time()
        gate = make()
        seconds = round(time.process_time() - start, 1)
        rows[name] = {each: round(opened(model, gate, read[each]), 4) for each in measured} | {"seconds": seconds}
        shares = " | ".join(f"{100 * rows[name][each]:.1f}%" for each in measured)
        print(f"| {name} | {shares} | {seconds:.0f} |", flush=True)
    retrieval = Retrieval.of(model, read["forget"], always, HiddenStates("model.norm"))
    result = {
        "rows": rows, "retrieval": {each: found(model, retrieval, read[each]) for each in measured[:2]},
        "false_alarms": FALSE_ALARMS, "seed": args.seed,
        "command": "python benchmarks/gates.py --model MODEL --data TOFU",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} CPU cores, no GPU",
        "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps(result["retrieval"]))
    with written_whole(args.output) as file:
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
