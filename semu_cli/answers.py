"""What a language model says, for `semu evaluate`, `attack` and `audit`."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import typer

from .bases import Beside, language_model
from .estimate import Plan, weights_of
from .text_file import check_plain, read_texts, written_out
from .verbs import usage

_LONGEST = 50  # tokens of an answer in a report


@dataclass(frozen=True)
class Answers(Beside):
    """A language model, and the files that it is judged by. Fields are named as the flags.

    Attributes:
        model: The model.
        adapter: The adapter, or None for the bare model.
        forget: What was to be forgotten.
        retain: What was to be kept.
        test: Questions with answers that no model was trained on.
        neutral: Texts of any kind.
        reference: A model that never knew.
        related: What to relearn from instead of what was forgotten.
        forget_examples: How many of the forgotten texts an attacker has.
        columns: As `--columns` has them.
        template: How question and answer are written.
        metrics: Only these.
        show_answers: How many questions to show with what is answered before and after.
        batch_size: Answers at a time.
        seed: Of everything drawn.
        progress: Show progress bars.

    Examples:
        >>> from semu_cli.answers import Answers
        >>> Answers("my-llm", None, "facts.jsonl", retain="others.jsonl").files
        {'forget': 'facts.jsonl', 'retain': 'others.jsonl'}
    """

    model: str
    adapter: Path | None
    forget: str
    retain: str | None = None
    test: str | None = None
    neutral: str | None = None
    reference: str | None = None
    related: str | None = None
    forget_examples: int | None = None
    columns: str | None = None
    template: str | None = None
    metrics: list[str] | None = None
    show_answers: int = 0
    batch_size: int = 32
    seed: int = 0
    progress: bool = True

    @property
    def files(self) -> dict[str, Any]:
        """Where the data lie, by flag."""
        paths = {flag: getattr(self, flag) for flag in ("forget", "retain", "test", "neutral", "related")}
        return {flag: path for flag, path in paths.items() if path is not None}

    @property
    def counts(self) -> dict[str, int]:
        """How many texts and answers there are, by flag."""
        return {flag: len(rows) for flag, rows in self._rows.items()}

    def check(self) -> None:
        """Raise a usage error for a template or a file with a mistake, or texts that nothing is to be compared on."""
        written_out(self.template)
        forget = self._rows["forget"]  # all files are read
        if self.show_answers and all(row.is_plain for row in forget):
            raise typer.BadParameter(
                f"`--show-answers` needs questions, and {self.forget} has texts that answer none. Leave it out."
            )
        if self.neutral is not None and self.adapter is None:
            raise typer.BadParameter(
                "`--neutral` texts are read with and without the adapter: give --adapter, or leave them out."
            )

    def digests(self) -> dict[str, str | None]:
        """Of the weights of the model that it is compared with, by flag."""
        from semu_peft.report.fingerprints import model_fingerprint

        return {} if self.never_knew is None else {"reference": model_fingerprint(self.never_knew[0])}

    def measured(self, shows: bool) -> tuple[dict[str, Any], tuple[Any, Any] | None]:
        """`LanguageMetrics` of each model; and, where they are to be shown, answers by question before and after."""
        from semu_peft.evaluation import evaluate_language

        template, data = written_out(self.template), self._rows
        self._to_measure()
        kept = None if "retain" not in data else {"retain": data["retain"]}
        options: dict[str, Any] = {
            "utility": kept, "neutral": data.get("neutral"), "holdout": data.get("test"), "metrics": self.metrics,
            "template": template, "batch_size": self.batch_size, "progress": self.progress,
        }  # fmt: skip
        rows, shown = {}, []
        for name, (measured, tokenizer) in self.each():
            with self._before(name, measured) as before:
                rows[name] = evaluate_language(measured, tokenizer, data["forget"], reference=before, **options)
            if shows and self.show_answers and name != "reference":
                shown.append(self._answered(measured, tokenizer, data["forget"], template))
        return rows, (shown[0], shown[1]) if shown else None

    def _to_measure(self) -> list[str]:
        """The metrics that are asked for, or else that the data allow."""
        from semu_peft.evaluation.measurable import BESIDE_GOLD, metrics_to_measure

        data = self._rows
        sets: dict[str, Any] = {flag: data[flag] for flag in ("forget", "retain") if flag in data}
        with usage():
            for name in self.metrics or ():
                if name in BESIDE_GOLD:
                    raise ValueError(
                        f"`metrics` has {name!r}, which compares with a model that was trained without the data, as "
                        f"`evaluate_language(gold=...)` of Python does. Ask for {BESIDE_GOLD[name][0]!r}."
                    )
            return metrics_to_measure(self.metrics, sets, data.get("neutral"), data.get("test"))

    def plan(self, measures: bool, attacks: bool, shows: bool) -> Plan:
        """What would be loaded, and measured and tried as far as it is to be."""
        models = {name: place for name, place in self.places().items() if measures or name != "original"}
        names = self._to_measure() if measures else []
        plan = Plan(models, self.counts, [name.replace("_", " ") for name in names], **weights_of(self.judged[0]))
        return plan.with_attacks(self.attacked(None, dry_run=True)) if attacks else plan

    def attacked(self, time_limit: float | None, *, dry_run: bool = False) -> Any:
        """All attacks that the data allow, as an `AttackReport`; of a dry run those that would be tried."""
        from semu_peft import evaluation
        from semu_peft.language import text_examples

        template, data = written_out(self.template), self._rows
        batches: dict[str, Any] = {}
        base, tokenizer = self.judged
        other = None if dry_run or self.never_knew is None else self.never_knew[0]
        for name in ("forget", "retain", "test", "related"):
            if name in data:
                rows = text_examples(tokenizer, data[name], template=template, name=name)
                batches[name] = list(rows.loader(min(self.batch_size, len(rows)), shuffle=False))
        asking: dict[str, Any] = {"gold": other, "template": template, "batch_size": self.batch_size, "seed": self.seed}
        further = {}
        if not any(row.is_plain for row in data["forget"]):  # answers to questions, which can be asked otherwise
            further["prompts"] = lambda attacked: evaluation.prompt_attacks(
                attacked, tokenizer, data["forget"], progress=False, **asking
            )
        return evaluation.attack(
            base, batches.pop("forget"), **batches, tokenizer=tokenizer, reference=other, further=further,
            forget_examples=self.forget_examples, time_limit=time_limit, dry_run=dry_run, seed=self.seed,
            progress=self.progress,
        )  # fmt: skip

    def unlearned(self) -> Any:
        """The model with its adapter."""
        return self.judged[0]

    def load(self, place: str, adapter: Path | None) -> Any:
        """One of the models, and its tokenizer."""
        return language_model(place, adapter)

    def _answered(self, model: Any, tokenizer: Any, rows: list[Any], template: str | None) -> dict[str, str]:
        """What a model says, greedily, to the first of the questions."""
        from semu_peft.evaluation import generate_answers

        questions = {_written(row.prompt): row.prompt for row in rows if not row.is_plain}
        asked = dict(itertools.islice(questions.items(), self.show_answers))
        said = generate_answers(
            model, tokenizer, asked.values(), template=template, max_new_tokens=_LONGEST, batch_size=self.batch_size,
            progress=False,
        )  # fmt: skip
        return dict(zip(asked, said, strict=True))

    def _before(self, name: str, measured: Any) -> AbstractContextManager[Any]:
        """The original, from which the KL on neutral texts is; None where it is the model without its adapter."""
        from semu_peft.objectives.original import original

        if self.neutral is None or name == "unlearned":
            return nullcontext()
        return original(self.judged[0]) if name == "reference" else nullcontext(measured)

    @cached_property
    def _rows(self) -> dict[str, list[Any]]:
        """What is in the files, by flag."""
        data = {flag: read_texts(path, flag, self.columns) for flag, path in self.files.items()}
        check_plain(self.neutral, data.get("neutral"))
        return data


def _written(prompt: Any) -> str:
    """A question as a report has it; of a chat all turns."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
