"""Attacks on what a language model was made to forget: other prompts, many samples, relearning, rounded weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from semu_peft.arguments import check_count, check_kind, check_model
from semu_peft.language.dataset import TextCollator
from semu_peft.language.shapes import TextExample
from semu_peft.objectives.attackers import Attacker, Relearner
from semu_peft.objectives.classification import CrossEntropy
from semu_peft.objectives.examples import Examples

from .generation import generate_answers, rouge_l
from .prompting import few_shot
from .prompts import encoder_for, read_questions
from .quantization import round_to_nearest, weights_to_round
from .token_scores import score_answers

JAILBREAK = "Sure, here is the answer:"
"""What OpenUnlearning (arXiv 2506.12618) makes answers begin with."""


@dataclass(frozen=True)
class PromptAttacks:
    """How much of the forgotten answers is in what the model writes, by how it is asked: mean ROUGE-L recalls.

    Attributes:
        found: Of the model, by attack; NaN of one that has diverged.
        gold: Of the model that never saw them. A recall has a meaning only beside this one: an answer shares words with
            any other to its question.

    Examples:
        >>> from semu_peft.evaluation import PromptAttacks
        >>> PromptAttacks({"plain": 0.31, "prefixed": 0.35}, {"plain": 0.3, "prefixed": 0.3})
        PromptAttacks(plain 0.310 (gold 0.300), prefixed 0.350 (gold 0.300))
    """

    found: Mapping[str, float]
    gold: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        beside = {name: f" (gold {value:.3f})" for name, value in self.gold.items()}
        told = [f"{name} {value:.3f}{beside.get(name, '')}" for name, value in self.found.items()]
        return f"PromptAttacks({', '.join(told)})"

    @property
    def row(self) -> tuple[str, str, str]:
        """The attack, what it found, and what it found of gold."""
        told = [", ".join(f"{name} {value:.3f}" for name, value in part.items()) for part in (self.found, self.gold)]
        return "prompts (ROUGE-L recall)", told[0], told[1]


def prompt_attacks(
    model: nn.Module,
    tokenizer: Any,
    forget: Any,
    *,
    gold: nn.Module | None = None,
    shots: Sequence[Any] = (),
    prefix: str = JAILBREAK,
    samples: int = 8,
    temperature: float = 1.0,
    template: str | None = None,
    max_new_tokens: int = 200,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> PromptAttacks:
    """Ask for the forgotten answers in other ways.

    - *plain*: greedily, as they were learnt.
    - *paraphrased*: the question in other words, where all rows have `paraphrased_question`.
    - *prefixed*: the answer is made to begin with "Sure, here is the answer:".
    - *few-shot*: after other questions with their answers, where `shots` are given.
    - *leak@k*: the best of k samples (arXiv 2511.04934).

    Args:
        model: The unlearned model.
        tokenizer: Its tokenizer.
        forget: Questions with the forgotten answers.
        gold: The model that never saw them, asked alike.
        shots: Questions with answers, none of them forgotten.
        prefix: What answers are made to begin with.
        samples: How many samples a question, the k of leak@k.
        temperature: Of the samples.
        template: See [`TextEncoder`][semu_peft.language.encode.TextEncoder].
        max_new_tokens: Longest answer.
        batch_size: Answers at a time.
        seed: Of the samples.
        progress: Show progress bars.

    Examples:
        >>> from semu_peft.evaluation import prompt_attacks
        >>> options = {"shots": [("How many?", "two")], "samples": 2, "max_new_tokens": 3, "progress": False}
        >>> list(prompt_attacks(decoder, tokenizer, [("What colour?", "blue")], **options).found)
        ['plain', 'prefixed', 'few-shot', 'leak@2']
    """
    check_model(model)
    check_count("samples", samples)
    examples = read_questions(forget, "forget")
    prompts: list[Any] = [example.prompt for example in examples]
    asked: dict[str, dict[str, Any]] = {"plain": {"questions": prompts, "template": template}}
    if all(example.paraphrased_prompt for example in examples):
        asked["paraphrased"] = {"questions": [row.paraphrased_prompt for row in examples], "template": template}
    asked["prefixed"] = {"questions": prompts, "template": template, "start": prefix}
    if len(shots):
        shown, form = few_shot(tokenizer, prompts, shots, template)
        asked["few-shot"] = {"questions": shown, "template": form, "stop": ("\n\n",)}
    draws = {"samples": samples, "temperature": temperature, "seed": seed}
    asked[f"leak@{samples}"] = {"questions": prompts, "template": template, **draws}
    common: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "progress": progress}

    def ask(attacked: nn.Module) -> dict[str, float]:
        first = score_answers(attacked, tokenizer, examples[:1], template=template, progress=False, name="forget")
        if first.nll.isnan().any():
            return dict.fromkeys(asked, math.nan)  # greedily it would write some token all the same
        written = {
            name: generate_answers(attacked, tokenizer, name=name, **how, **common) for name, how in asked.items()
        }
        return {name: _best_recall(examples, texts) for name, texts in written.items()}

    return PromptAttacks(ask(model), {} if gold is None else ask(gold))


def _best_recall(examples: Sequence[TextExample], written: Sequence[str | list[str]]) -> float:
    """Mean over questions of the largest ROUGE-L recall among the answers to each."""
    groups = [[texts] if isinstance(texts, str) else texts for texts in written]
    expected = [example.answer for example, texts in zip(examples, groups, strict=True) for _ in texts]
    recalls = rouge_l(expected, [text for texts in groups for text in texts]).recall.split([len(g) for g in groups])
    return float(torch.stack([part.max() for part in recalls]).mean())


@dataclass(frozen=True)
class TextRelearning:
    """How likely the forgotten answers are again while an attacker trains, beside gold's under the same attack.

    Attributes:
        attacker: The attacker in words.
        steps: After how many steps it was measured; the first is 0.
        probability: Mean `p(y | x)^(1/|y|)` of the answers that are measured.
        gold: The same of the model that never saw them.
        seen: Whether the attacker had these very answers.

    Examples:
        >>> from semu_peft.evaluation import TextRelearning
        >>> TextRelearning("Adam 0.0001, 20 examples", (0, 10), (0.01, 0.06), (0.01, 0.05), seen=False)
        TextRelearning(Adam 0.0001, 20 examples: 0.010 → 0.060 in 10 steps, gold 0.010 → 0.050, 1.20 times gold)
    """

    attacker: str
    steps: tuple[int, ...]
    probability: tuple[float, ...]
    gold: tuple[float, ...] = ()
    seen: bool = False

    @property
    def ratio(self) -> float | None:
        """The probability at the end over gold's own; None without gold."""
        return self.probability[-1] / self.gold[-1] if self.gold else None

    def __repr__(self) -> str:
        ends = f"{self.probability[0]:.3f} → {self.probability[-1]:.3f} in {self.steps[-1]} steps"
        beside = f", gold {self.gold[0]:.3f} → {self.gold[-1]:.3f}, {self.ratio:.2f} times gold" if self.gold else ""
        return f"TextRelearning({self.attacker}: {ends}{beside})"

    @property
    def row(self) -> tuple[str, str, str]:
        """The attack, what it found, and what it found of gold."""
        curves = [" → ".join(f"{value:.3f}" for value in curve) for curve in (self.probability, self.gold)]
        own = "; measured on the attacker's own answers, as there are no others" if self.seen else ""
        return f"relearning: {self.attacker}", curves[0] + own, curves[1]


def relearn_text(
    model: nn.Module,
    tokenizer: Any,
    train: Any,
    probes: Any = None,
    *,
    gold: nn.Module | None = None,
    attacker: Attacker | None = None,
    steps: Sequence[int] | None = None,
    template: str | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> TextRelearning:
    """Train all weights on a few answers, as an attacker would, and measure how likely the forgotten ones become.

    Give forget answers as `train` for an attacker who has some of them, which is measured on the others, or retain
    answers with the forget answers as `probes` for one who has none. Training teaches gold as well, so that only more
    than gold's curve is something that was still there. Models are not written: they are bit for bit what they were.

    Args:
        model: The unlearned model, with its adapter or merged.
        tokenizer: Its tokenizer.
        train: Questions with answers; the attacker draws `attacker.forget_examples` of them.
        probes: Questions with the answers that are measured; by default those of `train`. Answers that the attacker
            drew, wherever else they stand, are left out, unless there are no others.
        gold: The model that never saw the forget answers, under the same attack.
        attacker: By default Adam at 1e-4 for 20 steps, on 20 answers all at once.
        steps: After how many steps to measure, beside the first and the last; by default after each fifth of them.
        template: See [`TextEncoder`][semu_peft.language.encode.TextEncoder].
        batch_size: Answers at a time that are measured.
        seed: Of the attacker's draws.
        progress: Show progress bars.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: There is no answer, or no weight to train.

    Examples:
        >>> from semu_peft.evaluation import relearn_text
        >>> from semu_peft.objectives import Attacker
        >>> rows = [("What colour?", "blue"), ("How many?", "two or three")]
        >>> attacker = Attacker("adam", 1e-2, steps=4, forget_examples=2)
        >>> found = relearn_text(decoder, tokenizer, rows, attacker=attacker, progress=False)
        >>> found.probability[-1] > found.probability[0], found.seen
        (True, True)
    """
    check_model(model)
    attacker = Attacker("adam", 1e-4, steps=20, forget_examples=20) if attacker is None else attacker
    check_kind("attacker", attacker, Attacker, "an `Attacker`", "Write `Attacker('adam', 1e-4)`.")
    examples = read_questions(train, "train")
    measured = examples if probes is None else read_questions(probes, "probes")
    encoder = encoder_for(model, tokenizer, template)
    batch = TextCollator(tokenizer)([encoder.answer(row.prompt or "", row.answer) for row in examples])
    for step in steps or ():
        check_count("steps", step, least=0)
    marks = {round(attacker.steps * part / 5) for part in range(6)} if steps is None else {0, *steps, attacker.steps}
    at = tuple(sorted(step for step in marks if step <= attacker.steps))
    drawn: list[int] = []

    def curve(attacked: nn.Module, name: str) -> tuple[float, ...]:
        draw = torch.Generator().manual_seed(seed)
        relearner = Relearner(attacked, attacker, Examples([batch]), None, CrossEntropy(), draw)
        drawn[:] = [place for _, place in relearner.rows]
        rows = held_out() or measured
        return tuple(relearner.curve(at, lambda changed: probability(changed, rows), name if progress else None))

    def held_out() -> list[TextExample]:
        had = [(examples[place].prompt, examples[place].answer) for place in drawn]
        return [row for row in measured if (row.prompt, row.answer) not in had]

    def probability(changed: nn.Module, rows: list[TextExample]) -> float:
        scores = score_answers(changed, tokenizer, rows, template=template, batch_size=batch_size, progress=False)
        return float(scores.probability.mean())

    beside = () if gold is None else curve(gold, "gold relearns")
    found = curve(model, "relearns")
    had = dataclasses.replace(attacker, forget_examples=len(drawn))
    return TextRelearning(had.label, at, found, beside, seen=not held_out())


@contextmanager
def rounded_weights(model: nn.Module, *, bits: int = 4, group_size: int | None = None) -> Iterator[nn.Module]:
    """Round a model's merged weights to few bits for the length of the block; bit for bit as before afterwards.

    To the nearest of the levels `s · {−q … q}`, `q = 2^(bits−1) − 1`, with `s` the largest absolute weight of a row, or
    of a group of it, over `q`. Adapters are merged first, for that is what is deployed. The weights are those of
    [`weights_to_round`][semu_peft.evaluation.quantization.weights_to_round], as in `quantization`; here the model
    itself has the rounded ones meanwhile, so that it can generate.

    Args:
        model: A language model, with its adapter or merged.
        bits: Of a weight, at least 2.
        group_size: How many weights of a row share a scale; by default the whole row.

    Yields:
        The model.

    Raises:
        ValueError: There are less than 2 bits, or no linear layer has floating-point weights.

    Examples:
        >>> from semu_peft.evaluation import rounded_weights, score_answers
        >>> before = score_answers(decoder, tokenizer, [("What", "blue")], progress=False)
        >>> with rounded_weights(decoder, bits=2) as rounded:
        ...     during = score_answers(rounded, tokenizer, [("What", "blue")], progress=False)
        >>> after = score_answers(decoder, tokenizer, [("What", "blue")], progress=False)
        >>> (during.nll == before.nll).item(), (after.nll == before.nll).item()
        (False, True)
    """
    check_model(model)
    check_count("bits", bits, least=2)
    check_count("group_size", group_size, optional=True)
    weights = weights_to_round(model).values()
    everything = [*model.parameters(), *model.buffers()]
    saved = [tensor.detach().clone() for tensor in everything]
    apart = [
        layer
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer) and not layer.merged and not layer.disable_adapters
    ]
    try:
        for layer in apart:
            layer.merge()
        with torch.no_grad():
            for each in weights:
                each.weight.copy_(each.of_rows(round_to_nearest(each.rows(each.weight), bits, group_size)))
        yield model
    finally:
        for layer in apart:
            if layer.merged:
                layer.unmerge()
        with torch.no_grad():  # unmerging rounds
            for tensor, value in zip(everything, saved, strict=True):
                tensor.copy_(value)
