"""The language models and the texts: decoders that recite TOFU's answers, with and without those to be forgotten."""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from machine import DEVICE, TOGETHER
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from semu_peft.evaluation import LanguageMetrics, evaluate_language, score_answers
from semu_peft.language import TextExamples, text_examples

TEMPLATE = "<s>Question: {question}\nAnswer: {answer}"
SETS = {"retain": "retain_perturbed", "real_authors": "real_authors_perturbed", "world_facts": "world_facts_perturbed"}
MEASURED_TEXTS = 100  # neutral texts on which damage is measured; the others may be trained on


@dataclass(frozen=True)
class Subject:
    """All that a run needs: the folders of the two models, and what is asked of them.

    Attributes:
        original: Folder of the model that knows all answers.
        gold: Folder of the model that never saw those to be forgotten.
        forget: Rows to forget, with paraphrased and wrong answers.
        retain: Rows to keep.
        utility: The sets of model utility by name.
        neutral: Texts that no model was trained on, for measuring.
        more_neutral: Others of them, which retain-free runs may hold on to.
        own_answers: How many answers of the model itself these may make.
    """

    original: Path
    gold: Path
    forget: list[dict[str, Any]] = field(repr=False)
    retain: list[dict[str, Any]] = field(repr=False)
    utility: dict[str, list[dict[str, Any]]] = field(repr=False)
    neutral: list[str] = field(repr=False)
    more_neutral: list[str] = field(repr=False)
    own_answers: int = 4_000

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.original)

    def examples(self, rows: list[Any], alternates: Any = None) -> TextExamples:
        """Rows or texts as tokens, with labels on the answers; with second answers where they are asked for."""
        return text_examples(self.tokenizer, rows, template=TEMPLATE, max_length=256, alternates=alternates)

    @property
    def told(self) -> list[tuple[str, str]]:
        """The questions to forget, with their answers."""
        return [(row["question"], row["answer"]) for row in self.forget]

    @property
    def holdout(self) -> list[tuple[str, str]]:
        """The same questions with answers that no model was trained on, for membership: the first wrong one of each."""
        return [(row["question"], row["perturbed_answer"][0]) for row in self.forget]

    def nll(self, model: nn.Module, pairs: list[tuple[Any, str]]) -> torch.Tensor:
        """Mean negative log-likelihood a token of each answer, `(N,)`."""
        return score_answers(model, self.tokenizer, pairs, template=TEMPLATE, batch_size=TOGETHER, progress=False).nll

    def retain_limit(self, original: nn.Module) -> float:
        """What the loss of a retain answer may be where it is bounded, in nats a token: a little more than it is."""
        told = [(row["question"], row["answer"]) for row in self.retain[:50]]
        return float(self.nll(original, told).mean()) + 0.1

    def metrics(self, model: nn.Module, gold: LanguageMetrics | None = None, **asked: Any) -> LanguageMetrics:
        """TOFU's measures of a model, against gold's where these are given."""
        return evaluate_language(
            model, self.tokenizer, self.forget, utility=self.utility, gold=gold, template=TEMPLATE,
            max_new_tokens=60, batch_size=2 * TOGETHER, progress=False, **asked,
        )  # fmt: skip


def ask_for_folders(parser: argparse.ArgumentParser) -> None:
    """Let a command ask for what `read_subject` reads."""
    parser.add_argument("--models", type=Path, required=True, help="folder with the decoders full and retain95")
    parser.add_argument("--data", type=Path, required=True, help="folder of TOFU's JSON lines")
    parser.add_argument("--neutral", type=Path, required=True, help="JSON lines with neutral text")


def read_subject(models: Path, data: Path, neutral: Path, seed: int = 0, utility_rows: int | None = None) -> Subject:
    """Read the files; the retain rows are in the order of `seed`.

    Args:
        models: Folder of the two models.
        data: Folder of TOFU's JSON lines.
        neutral: File of neutral texts.
        seed: Of what is drawn.
        utility_rows: How many rows of each set model utility is measured on, evenly taken; by default all.
    """
    if not (models / "full").is_dir() or not (models / "retain95").is_dir():
        raise SystemExit(f"--models must hold the folders full and retain95, got {models}. See pretrain.py.")
    rows = {name: read_rows(data / f"{name}.json") for name in ("forget05_perturbed", "retain95", *SETS.values())}
    retain = list(rows["retain95"])
    random.Random(seed).shuffle(retain)
    texts = [row["text"] for row in read_rows(neutral)]
    return Subject(
        models / "full", models / "retain95", rows["forget05_perturbed"], retain,
        {name: evenly(rows[file], utility_rows) for name, file in SETS.items()},
        texts[:MEASURED_TEXTS], texts[MEASURED_TEXTS:500],
    )  # fmt: skip


def evenly(rows: list[Any], number: int | None) -> list[Any]:
    """So many of the rows, from the first to the last at one distance."""
    if number is None or number >= len(rows):
        return rows
    return [rows[place * len(rows) // number] for place in range(number)]


def load(folder: Path) -> nn.Module:
    """A model in float32, in eval mode, on the device."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(DEVICE).eval()


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise SystemExit(f"--data and --neutral: there is no file {path}. See benchmarks/README.md.")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
