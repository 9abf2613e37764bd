"""Facts, answers or texts of a language model, for `semu unlearn text`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import typer

from .bases import language_model
from .catalogue import Job
from .estimate import Estimate, estimate_on, target_names
from .request import Outcome, counted, hardly_forgotten, saver
from .text_file import check_texts, read_apart, written_out


@dataclass(frozen=True)
class TextRequest:
    """A language model, and the files that it is to forget and to keep. Fields are named as the flags.

    Examples:
        >>> from semu_cli.forget_text import TextRequest
        >>> TextRequest.job
        'text'
    """

    job: ClassVar[Job] = "text"
    model: str
    forget: str
    output_dir: Path
    retain: str | None
    neutral: str | None
    method: str
    max_steps: int | None
    max_retain_kl: float | None
    batch_size: int
    columns: str | None
    template: str | None
    target_modules: str | None
    explained_variance: float
    seed: int
    adapter_name: str
    progress: bool

    def check(self) -> None:
        """Raise a usage error for a mistake that can be seen while nothing is loaded."""
        check_texts(self.columns, **self._files)
        written_out(self.template)

    def _read(self) -> dict[str, Any]:
        """What is to be forgotten and to be kept, as the method needs it."""
        data = read_apart(self._files, self.columns)
        if self.method == "altpo" and not all(row.perturbed_answers for row in data["forget"]):
            raise typer.BadParameter(
                f"`--method altpo` needs wrong answers, and not every row of {self.forget} has some. Add a column "
                "`perturbed_answer`, or take `--method idk`, which gives refusals."
            )
        return data

    def estimate(self, step_seconds: float | None) -> Estimate:
        """Load model and data, and say what training would take."""
        from semu_peft.language import text_examples

        data = self._read()
        base, tokenizer = language_model(self.model)
        rows = text_examples(
            tokenizer, data["forget"], template=written_out(self.template), seq2seq=_is_seq2seq(base)
        )  # fmt: skip
        loader = rows.loader(min(self.batch_size, len(rows)))
        return estimate_on(base, self._targets(base), loader, len(rows), self.max_steps, step_seconds)

    def train(self) -> Outcome:
        """Load model and data, and train; how probable the answers are is in the history."""
        from semu_peft import SemuConfig, forget_text
        from semu_peft.language.forget import USUAL_DIRECTIONS

        data = self._read()
        base, tokenizer = language_model(self.model)
        given = {"target_modules": self._targets(base), "explained_variance": self.explained_variance}
        task = "SEQ_2_SEQ_LM" if _is_seq2seq(base) else "CAUSAL_LM"
        config = SemuConfig(task_type=task, **{**USUAL_DIRECTIONS, **given})
        done = forget_text(
            base, tokenizer, **data, method=self.method, template=written_out(self.template),
            max_retain_kl=self.max_retain_kl, max_steps=self.max_steps or 80, batch_size=self.batch_size,
            seed=self.seed, config=config, progress=self.progress, adapter_name=self.adapter_name,
        )  # fmt: skip
        first, last = done.training.history[0], done.training.history[-1]
        probability = {"before": first.get("answer_probability"), "after": last.get("answer_probability")}
        found = {"token_probability": probability, "examples": len(done.examples)}
        words = self._words(len(done.examples), probability, done.training)
        save = saver(done.model, self.adapter_name)
        request = f"Forgets {counted(len(done.examples), 'text or answer', 'texts or answers')}."
        return Outcome(done.profile, done.training, request, found, words, self._then(), save)

    @property
    def _files(self) -> dict[str, str | None]:
        return {"forget": self.forget, "retain": self.retain, "neutral": self.neutral}

    def _targets(self, base: Any) -> str:
        if self.target_modules is not None:
            target_names(base, self.target_modules)
        return self.target_modules or "all-linear"

    def _words(self, examples: int, probability: Mapping[str, float | None], training: Any) -> list[str]:
        """What became of the texts."""
        number = counted(examples, "text or answer", "texts or answers")
        before, after = probability["before"], probability["after"]
        if before is None or after is None:
            return [f"{number}."]
        words = [
            f"{number}. The tokens had probability {before:.3f} on average, and have now {after:.3f}, in the batches "
            "that were trained on."
        ]
        if after > 0.9 * before:
            first = "say what must stay, --retain others.jsonl" if self.retain is None else None
            tries = []
            if self.retain is None and self.neutral is None:
                tries.append("hold texts of any kind, --neutral texts.txt")
            if self.template is None:
                tries.append("write --template as the model was trained")
            words.append(hardly_forgotten(tries, training, self.max_retain_kl, self.explained_variance, first))
        return words

    def _then(self) -> list[str]:
        """The command that measures what was done."""
        how = ["--columns", self.columns] if self.columns else []
        how += [] if self.template is None else ["--template", self.template]
        adapted = ["--model", self.model, "--adapter", str(self.output_dir)]
        return ["semu", "evaluate", *adapted, "--forget", self.forget, *how, "--metrics", "probability"]


def _is_seq2seq(model: Any) -> bool:
    return bool(model.config.is_encoder_decoder)
