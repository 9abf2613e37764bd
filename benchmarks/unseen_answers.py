"""How likely a model finds answers that it never learnt: those that `unseen_answers` makes, and TOFU's own wrong ones.

Beside them stands what a model trained without the answers says of them, which is what forgetting should reach.

    python benchmarks/unseen_answers.py --full MODEL --gold MODEL --data forget05_perturbed.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from semu_peft.language import TextExample, read_text, text_examples, unseen_answers
from semu_peft.objectives.tokens import read_tokens

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@torch.no_grad()
def nll(folder: Path, answers: list[TextExample], template: str) -> torch.Tensor:
    """The negative log-likelihood per token of each answer, `(N,)`."""
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    examples = text_examples(AutoTokenizer.from_pretrained(folder), answers, template=template)
    found = [read_tokens(model, batch) for batch in examples.loader(25, shuffle=False)]
    return torch.cat([tokens.means(tokens.nll()) for tokens in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", type=Path, required=True, help="folder of the model that learnt the answers")
    parser.add_argument("--gold", type=Path, required=True, help="folder of one that did not")
    parser.add_argument("--data", type=Path, required=True, help="the answers, with `perturbed_answer`s")
    parser.add_argument("--template", default="<s>Question: {question}\nAnswer: {answer}")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if missing := [path for path in (args.full, args.gold, args.data) if not path.exists()]:
        parser.error(f"there is no {missing[0]}")
    learnt = list(read_text(args.data))
    bare = [TextExample(example.answer, example.prompt) for example in learnt]
    rows = {"gold, the answers": (args.gold, bare), "full, the answers": (args.full, bare)}
    rows["full, wrong answers"] = args.full, unseen_answers(learnt, seed=args.seed)
    for words in (2, 3, 4):
        rows[f"full, phrases of {words}"] = args.full, unseen_answers(bare, words=words, seed=args.seed)
    print("| NLL per token at |", " | ".join(f"{quantile:.0%}" for quantile in QUANTILES), "|")
    print("| --- |", " | ".join(["---"] * len(QUANTILES)), "|")
    for name, (folder, answers) in rows.items():
        values = torch.quantile(nll(folder, answers, args.template), torch.tensor(QUANTILES))
        print(f"| {name} |", " | ".join(f"{value:.2f}" for value in values), "|")


if __name__ == "__main__":
    main()
