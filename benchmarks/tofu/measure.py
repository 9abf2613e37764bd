"""How a model is judged: TOFU's measures, the damage, and what two attacks bring back, all of them beside gold's."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from machine import TOGETHER
from subjects import Subject
from torch import nn

from semu_peft.evaluation import LanguageMetrics, neutral_kl, rounded_weights
from semu_peft.files import written_whole
from semu_peft.objectives import Attacker, CrossEntropy
from semu_peft.objectives.attackers import Relearner
from semu_peft.objectives.examples import Examples

ATTACKER = Attacker("adam", 1e-4, steps=20, forget_examples=20)
ATTACK_SEED = 1_000
METRICS = (
    "probability", "extraction_strength", "exact_memorisation", "paraphrased_probability", "truth_ratio",
    "model_utility", "membership",
)  # fmt: skip


@dataclass(frozen=True)
class Relearnt:
    """Mean probability of the forget answers while an attacker trains on some of them.

    Attributes:
        steps: After how many steps.
        others: Of the answers that the attacker does not have; of all, where it has none.
        everything: Of all answers.
    """

    steps: tuple[int, ...]
    others: tuple[float, ...]
    everything: tuple[float, ...]


def relearnt(
    subject: Subject, model: nn.Module, attacker: Attacker = ATTACKER, at: tuple[int, ...] = (), seed: int = ATTACK_SEED
) -> Relearnt:
    """Let an attacker train on its answers to forget, or without these on retain answers; the model stays as it is."""
    steps = tuple(sorted({*at, attacker.steps}))
    forget, retain = (Examples(one_batch(subject, rows)) for rows in (subject.forget, subject.retain))
    has_forgotten = attacker.forget_examples > 0
    relearner = Relearner(
        model, attacker, forget, None if has_forgotten else retain, CrossEntropy(), torch.Generator().manual_seed(seed)
    )
    others = others_of(relearner, len(subject.forget))
    curve = relearner.curve(steps, lambda changed: subject.nll(changed, subject.told).neg().exp())
    return Relearnt(
        steps,
        tuple(round(float(each[others].mean()), 5) for each in curve),
        tuple(round(float(each.mean()), 5) for each in curve),
    )


def others_of(relearner: Relearner, number: int) -> list[int]:
    """Of so many answers those that an attacker does not have; all, where it has all or none."""
    drawn = {place for _, place in relearner.rows}
    return [place for place in range(number) if place not in drawn] or list(range(number))


def one_batch(subject: Subject, rows: list[Any]) -> list[Any]:
    """Rows as one batch of tokens, which attackers draw from."""
    return list(subject.examples(rows).loader(len(rows), shuffle=False))


def damage(subject: Subject, original: nn.Module, model: nn.Module) -> float:
    """`KL(original ‖ now)` on neutral text, in nats a token."""
    texts: Any = subject.neutral
    return neutral_kl(
        model, subject.tokenizer, texts, reference=original, max_length=64, batch_size=TOGETHER, progress=False
    ).kl  # fmt: skip


def probability(subject: Subject, model: nn.Module) -> float:
    """Mean probability of an answer to forget."""
    return float(subject.nll(model, subject.told).neg().exp().mean())


def rounded_probability(subject: Subject, model: nn.Module) -> float:
    """The same with the weights at 4 bits."""
    with rounded_weights(model, bits=4):
        return probability(subject, model)


@dataclass(frozen=True)
class Judge:
    """Measures models against the original and against gold, whose own measures are taken once and can be kept.

    Attributes:
        subject: Models and texts.
        original: The model before.
        gold: What `reference` gave for the model that never saw the answers; None while that is made.
        attacker: Who relearns.
    """

    subject: Subject
    original: nn.Module
    gold: dict[str, Any] | None = None
    attacker: Attacker = ATTACKER

    def damage(self, model: nn.Module) -> float:
        """`KL(original ‖ now)` on neutral text, in nats a token."""
        return damage(self.subject, self.original, model)

    def reference(self, model: nn.Module) -> dict[str, Any]:
        """The row of gold, with what other rows are held against."""
        metrics = self._metrics(model, None)
        return {**self._row(model, metrics, True), "truth_ratios": [round(ratio, 6) for ratio in metrics.truth_ratios]}

    def row(self, model: nn.Module, *, attacks: bool = True) -> dict[str, Any]:
        """All columns of a model; `attacks=False` leaves out relearning and rounding."""
        assert self.gold is not None, "make gold's row first, by `reference`"
        gold = LanguageMetrics(truth_ratios=tuple(self.gold["truth_ratios"]), membership=self.gold["membership"])
        row = self._row(model, self._metrics(model, gold), attacks)
        if attacks:
            row["relearnt_over_gold"] = round(row["relearnt_others"] / self.gold["relearnt_others"], 3)
        return row

    def _metrics(self, model: nn.Module, gold: LanguageMetrics | None) -> LanguageMetrics:
        return self.subject.metrics(model, gold, metrics=METRICS, holdout=self.subject.holdout)

    def _row(self, model: nn.Module, metrics: LanguageMetrics, attacks: bool) -> dict[str, Any]:
        found = asdict(metrics)
        row: dict[str, Any] = {key: _rounded(value) for key, value in found.items() if isinstance(value, float)}
        for kind in ("utility", "membership"):
            row[kind] = {key: round(value, 4) for key, value in found[kind].items()}
        row["neutral_kl"] = round(self.damage(model), 5)
        if attacks:
            again = relearnt(self.subject, model, self.attacker)
            row["relearnt_others"], row["relearnt_all"] = again.others[-1], again.everything[-1]
            row["probability_4bit"] = round(rounded_probability(self.subject, model), 5)
        return row


def _rounded(value: float) -> float:
    return round(value, 5) if abs(value) > 1e-3 else value


def write(path: Path, table: Any) -> None:
    """Write a file of results whole, or not at all."""
    with written_whole(path) as file:
        file.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
