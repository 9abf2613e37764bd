"""What a pipeline draws, for `semu evaluate`, `attack` and `audit`: how much of it a classifier recognises."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .bases import Beside, denoising_loss, pipeline
from .estimate import Plan, weights_of
from .tables import with_interval

_SHOWN = 4  # pictures of each prompt in a report


@dataclass(frozen=True)
class Drawing(Beside):
    """A pipeline, the prompts that it is judged by, and how many pictures it draws of each.

    Fields are named as the flags.

    Attributes:
        model: The pipeline.
        adapter: The adapter, or None for the bare pipeline.
        forget: Prompts that were to be forgotten.
        retain: Prompts that were to be kept.
        reference: A pipeline that never knew.
        related: Prompts to relearn from instead of those that were to be forgotten.
        forget_examples: How many pictures of what was forgotten an attacker has.
        classifier: Folder or name of an image classifier, or of a CLIP model, which tells the prompts apart.
        forget_class: What the classifier calls what was forgotten; by default the class that the prompt names.
        samples: Pictures of each prompt, each with a seed of its own.
        num_inference_steps: Steps of sampling one.
        batch_size: Pictures at a time.
        seed: Of the first picture of each prompt.
        progress: Show progress bars.

    Examples:
        >>> from semu_cli.pictures import Drawing
        >>> Drawing("my-pipeline", None, ["a cat"], ["a dog"]).seeds[:2]
        [0, 1]
    """

    model: str
    adapter: Path | None
    forget: list[str]
    retain: list[str] = field(default_factory=list)
    reference: str | None = None
    related: list[str] = field(default_factory=list)
    forget_examples: int | None = None
    classifier: str | None = None
    forget_class: str | None = None
    samples: int = 16
    num_inference_steps: int = 25
    batch_size: int = 4
    seed: int = 0
    progress: bool = True

    @property
    def files(self) -> dict[str, Any]:
        """There are no data: prompts are in the report themselves."""
        return {}

    @property
    def counts(self) -> dict[str, int]:
        """How many prompts there are, by what they are for."""
        return {f"{side} prompts": len(each) for side, each in {**self._sides, "related": self.related}.items() if each}

    def check(self) -> None:
        """All that can be seen while nothing is loaded has been."""

    def digests(self) -> dict[str, str | None]:
        """Of the weights of the denoiser that it is compared with and of the classifier that judges, by flag."""
        from semu_peft.concept.families import denoiser_of
        from semu_peft.report.fingerprints import model_fingerprint

        found = {} if self.never_knew is None else {"reference": denoiser_of(self.never_knew)}
        models = found if self._judge is None else {**found, "classifier": self._judge.model}
        return {flag: model_fingerprint(model) for flag, model in models.items()}

    @property
    def seeds(self) -> list[int]:
        """Of the pictures of each prompt."""
        return list(range(self.seed, self.seed + self.samples))

    def measured(self, shows: bool) -> tuple[dict[str, Any], tuple[Any, Any] | None]:
        """Of each pipeline its numbers; and to show, with an adapter, pictures by prompt before and after."""
        from semu_peft.concept.families import denoiser_of
        from semu_peft.evaluation import classify_samples
        from semu_peft.evaluation.knowledge import mean_loss

        judge = self._judge
        rows, shown = {}, []
        for name, pipe in self.each():
            batches = self._batches(lambda pipe=pipe: pipe)  # type: ignore[misc]  # drawn by the first, the original
            loss = denoising_loss(pipe, self.seed)
            shared = {part: each for part, each in batches.items() if part in self._sides}
            rows[name] = {f"{part} loss": mean_loss(denoiser_of(pipe), each, loss) for part, each in shared.items()}
            drawn = self._draw(pipe, name) if self._draws(name, shows) else {}
            for part, prompts in self._sides.items():
                if judge is not None and prompts:
                    said = [
                        classify_samples(drawn[prompt], judge.labels(prompt).expand(self.samples), judge)
                        for prompt in prompts
                    ]
                    mean = sum(each.accuracy for each in said) / len(said)
                    rows[name] |= with_interval(f"{part} accuracy", mean, self.samples * len(said))
            shown.append({prompt: images[:_SHOWN] for prompt, images in drawn.items()})
        return rows, (shown[0], shown[1]) if shows and self.adapter is not None else None

    def _draws(self, name: str, shows: bool) -> bool:
        """Whether pictures of a pipeline are looked at: by the classifier, or by who reads a report."""
        return self._judge is not None or (shows and name != "reference")

    def plan(self, measures: bool, attacks: bool, shows: bool) -> Plan:
        """What would be loaded, and drawn, measured and tried as far as it is to be."""
        from torch import nn

        modules = [part for part in self.judged.components.values() if isinstance(part, nn.Module)]
        sides = {name: prompts for name, prompts in self._sides.items() if prompts}
        prompts, is_judged = sum(map(len, sides.values())), self._judge is not None
        drawn = prompts + len(self.related)  # by the original: losses are of these, and who relearns has them
        names = [f"{name} loss" for name in sides] + [f"{name} accuracy" for name in sides if is_judged]
        if measures:
            drawn += prompts * sum(self._draws(name, shows) for name in self.places())
        if attacks and is_judged:
            drawn += len(self.forget) * (1 if self.reference is None else 2)  # other seeds
        plan = Plan(
            self.places() | ({} if self.classifier is None else {"classifier": self.classifier}),
            self.counts, names if measures else (), pictures=self.samples * drawn, **weights_of(*modules),
        )  # fmt: skip
        return plan.with_attacks(self.attacked(None, dry_run=True)) if attacks else plan

    def attacked(self, time_limit: float | None, *, dry_run: bool = False) -> Any:
        """All attacks that fit a pipeline, as an `AttackReport`; of a dry run those that would be tried."""
        from semu_peft import evaluation
        from semu_peft.concept.families import denoiser_of

        judge = self._judge
        batches = dict[str, Any](self._latents(self.judged, 1, 1) if dry_run else self._batches(self.original))
        pipe, other = self.judged, None if dry_run else self.never_knew
        further = {}
        if judge is not None:
            classes = sorted({int(judge.labels(prompt)) for prompt in self.forget})
            further["other seeds"] = lambda _: evaluation.seed_attack(
                self._generate(pipe), self.forget, judge, classes, seeds=self.seeds, batch_size=self.batch_size,
                reference=None if other is None else self._generate(other), progress=False,
            )  # fmt: skip
        report = evaluation.attack(
            denoiser_of(pipe), batches.pop("forget"), **batches, learn=denoising_loss(pipe, self.seed),
            reference=None if other is None else denoiser_of(other), further=further,
            forget_examples=self.forget_examples, time_limit=time_limit, dry_run=dry_run, seed=self.seed,
            progress=self.progress,
        )  # fmt: skip
        if judge is not None:
            return report
        missing = evaluation.NotRun("other seeds", "`classifier` was not given, which tells what a picture shows")
        others = [each for each in report.not_run if each.attack != missing.attack]
        return dataclasses.replace(report, not_run=(*others, missing))

    def unlearned(self) -> Any:
        """The denoiser with its adapter."""
        from semu_peft.concept.families import denoiser_of

        return denoiser_of(self.judged)

    @cached_property
    def _judge(self) -> Any:
        """The classifier with what it calls each prompt; None where there is none."""
        if self.classifier is None:
            return None
        from .recognition import judge_of

        return judge_of(self.classifier, self.forget, self.retain, self.forget_class)

    def load(self, place: str, adapter: Path | None) -> Any:
        """One of the pipelines."""
        pipe = pipeline(place, adapter)
        if getattr(pipe, "safety_checker", None) is not None:
            pipe.safety_checker = None  # its black pictures say nothing of what the model draws
        return pipe

    @property
    def _sides(self) -> dict[str, list[str]]:
        return {"forget": self.forget, "retain": self.retain}

    @cached_property
    def _drawn(self) -> dict[str, list[Any]]:
        return {}

    def _batches(self, original: Callable[[], Any]) -> dict[str, list[Any]]:
        """Batches of what the original draws of each side's prompts, once for all."""
        if not self._drawn:
            self._drawn.update(self._latents(original(), self.samples, self.num_inference_steps))
        return self._drawn

    def _latents(self, pipe: Any, samples: int, steps: int) -> dict[str, list[Any]]:
        """Batches of so many latents of each prompt with their condition, by side."""
        from semu_peft.concept import concept_examples

        found = {}
        for name, prompts in {**self._sides, "related": self.related}.items():
            if prompts:
                examples = concept_examples(
                    pipe, prompts, samples_per_prompt=samples, num_inference_steps=steps, batch_size=self.batch_size,
                    seed=self.seed, progress=self.progress,
                )  # fmt: skip
                found[name] = list(examples.loader(min(self.batch_size, len(examples)), shuffle=False))
        return found

    def _generate(self, pipe: Any) -> Any:
        from semu_peft.concept.sampling import sample_pipeline

        settings = {"num_inference_steps": self.num_inference_steps, "batch_size": self.batch_size}
        return lambda prompts, seeds: sample_pipeline(pipe, prompts, seeds=seeds, **settings)

    def _draw(self, pipe: Any, name: str) -> dict[str, Any]:
        """Pictures by prompt, `samples` of each."""
        import torch
        from tqdm.auto import tqdm

        draw, drawn = self._generate(pipe), {prompt: [] for prompt in (*self.forget, *self.retain)}  # type: ignore[var-annotated]
        seeds = [self.seeds[start : start + self.batch_size] for start in range(0, self.samples, self.batch_size)]
        parts = [(prompt, part) for prompt in drawn for part in seeds]
        for prompt, part in tqdm(parts, desc=f"{name}: pictures", disable=not self.progress, leave=False):
            drawn[prompt].append(draw([prompt] * len(part), part))
        return {prompt: torch.cat(each) for prompt, each in drawn.items()}
