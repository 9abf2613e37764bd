"""A concept of a text-to-image pipeline, for `semu unlearn concept`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .bases import pipeline
from .catalogue import Job
from .estimate import Estimate, estimate
from .request import Outcome


@dataclass(frozen=True)
class ConceptRequest:
    """A pipeline, and the prompts that it is to forget and to keep. Fields are named as the flags.

    Examples:
        >>> from semu_cli.forget_concept import ConceptRequest
        >>> ConceptRequest.job
        'concept'
    """

    job: ClassVar[Job] = "concept"
    model: str
    forget: list[str]
    output_dir: Path
    anchor: list[str] | None
    retain: list[str] | None
    method: str
    max_steps: int
    batch_size: int
    samples_per_prompt: int
    num_inference_steps: int
    explained_variance: float
    seed: int
    adapter_name: str
    progress: bool

    def check(self) -> None:
        """Prompts may be anything."""

    def estimate(self, step_seconds: float | None) -> Estimate:
        """Load the pipeline, and say what training would take; sampling comes on top."""
        _, denoiser, targets = self._read()
        examples = self.samples_per_prompt * len(self.forget)
        return estimate(
            denoiser, targets, examples=examples, batches=-(-examples // self.batch_size), steps=self.max_steps,
            step_seconds=step_seconds,
        )  # fmt: skip

    def train(self) -> Outcome:
        """Load the pipeline, sample latents of the prompts, and train on them."""
        from semu_peft import SemuConfig, unlearn_concept
        from semu_peft.concept import concept_examples
        from semu_peft.export.diffusers import save_adapter

        pipe, denoiser, targets = self._read()
        examples = concept_examples(
            pipe, self.forget, anchor=self.anchor or "", retain=self.retain or "",
            samples_per_prompt=self.samples_per_prompt, num_inference_steps=self.num_inference_steps,
            batch_size=self.batch_size, seed=self.seed, progress=self.progress,
        )  # fmt: skip
        done = unlearn_concept(
            pipe, examples, objective=self.method,
            config=SemuConfig(target_modules=targets, explained_variance=self.explained_variance),
            max_steps=self.max_steps, batch_size=self.batch_size, seed=self.seed, progress=self.progress,
            adapter_name=self.adapter_name,
        )  # fmt: skip
        before, after = (done.training.history[at]["loss"] for at in (0, -1))
        found = {"loss": {"before": before, "after": after}, "examples": len(examples)}
        words = [f"{', '.join(map(repr, self.forget))}: the loss went from {before:.4f} to {after:.4f}."]

        def save(folder: Path) -> None:
            save_adapter(denoiser, folder, adapter_name=self.adapter_name)

        return Outcome(done.profile, done.training, found, words, self._then(), save)

    def _read(self) -> tuple[Any, Any, Any]:
        """The pipeline, its denoiser, and the layers of that to correct."""
        from semu_peft.concept.families import denoiser_of
        from semu_peft.concept.targets import denoiser_targets

        pipe = pipeline(self.model)
        denoiser = denoiser_of(pipe)
        return pipe, denoiser, denoiser_targets(denoiser)

    def _then(self) -> list[str]:
        """The command that makes a file for diffusers."""
        adapted = ["--model", self.model, "--adapter", str(self.output_dir)]
        return ["semu", "export", *adapted, "--to", "diffusers", "--output-dir", f"{self.output_dir}-lora"]
