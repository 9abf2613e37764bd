"""A concept of a text-to-image pipeline, for `semu unlearn concept`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .bases import denoising_loss, pipeline
from .catalogue import Job
from .estimate import Estimate, estimate
from .request import Outcome, hardly_forgotten
from .verbs import usage


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
    preserve: float
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
        """Raise a usage error for a mistake that can be seen while nothing is loaded."""
        from semu_peft.concept.dataset import check_prompts

        with usage():
            check_prompts(self.forget, self.anchor or (), self.retain or ())

    def estimate(self, step_seconds: float | None) -> Estimate:
        """Load the pipeline, and say what sampling and training would take: of each one step is tried."""
        pipe, denoiser, targets = self._read()
        count, trial, sampling = self.samples_per_prompt * len(self.forget), None, None
        if step_seconds is None:
            trial, sampling = self._tried(pipe, denoiser, count)
        return estimate(
            denoiser, targets, examples=count, batches=-(-count // self.batch_size), steps=self.max_steps,
            step_seconds=step_seconds, trial=trial, sampling_seconds=sampling,
        )  # fmt: skip

    def _tried(self, pipe: Any, denoiser: Any, count: int) -> tuple[Callable[[], None], float]:
        """A pass forward and backward on a batch of latents; and seconds of sampling `count`, by one step."""
        from accelerate.utils import send_to_device

        from semu_peft.concept import concept_examples

        drawn, started = min(self.batch_size, count), time.perf_counter()
        examples = concept_examples(
            pipe, self.forget[:1], samples_per_prompt=drawn, num_inference_steps=1, batch_size=drawn, progress=False
        )
        seconds = (time.perf_counter() - started) * self.num_inference_steps * -(-count // drawn)
        batch = send_to_device(next(iter(examples.loader(drawn))), denoiser.device)
        loss = denoising_loss(pipe, self.seed)
        return lambda: loss(denoiser, batch).backward(), seconds

    def train(self) -> Outcome:
        """Load the pipeline, sample latents of the prompts, and train on them."""
        from semu_peft import SemuConfig, unlearn_concept
        from semu_peft.concept import concept_examples
        from semu_peft.concept.erase import USUAL_DIRECTIONS
        from semu_peft.export.diffusers import save_adapter

        pipe, denoiser, targets = self._read()
        examples = concept_examples(
            pipe, self.forget, anchor=self.anchor or "", retain=self._held,
            samples_per_prompt=self.samples_per_prompt, num_inference_steps=self.num_inference_steps,
            batch_size=self.batch_size, seed=self.seed, progress=self.progress,
        )  # fmt: skip
        done = unlearn_concept(
            pipe, examples, objective=self.method, preserve=self.preserve,
            config=SemuConfig(
                **{**USUAL_DIRECTIONS, "target_modules": targets, "explained_variance": self.explained_variance}
            ),
            max_steps=self.max_steps, batch_size=self.batch_size, seed=self.seed, progress=self.progress,
            adapter_name=self.adapter_name,
        )  # fmt: skip
        before, after = (done.training.history[at]["loss"] for at in (0, -1))
        found = {"loss": {"before": before, "after": after}, "examples": len(examples)}
        words = [f"{', '.join(map(repr, self.forget))}: the loss went from {before:.3g} to {after:.3g}."]
        if not _fell([step["loss"] for step in done.training.history]):
            tries = [] if self.anchor else ["say what to draw instead, --anchor"]
            words.append(hardly_forgotten(tries, done.training, None, self.explained_variance))

        def save(folder: Path) -> None:
            save_adapter(denoiser, folder, adapter_name=self.adapter_name)

        return Outcome(done.profile, done.training, self._request, found, words, self._then(), save)

    @property
    def _request(self) -> str:
        """What was to be forgotten; other methods than this one give nothing certain instead, and hold the anchor."""
        if self.method != "condition-matching":
            return f"Forgets {_quoted(self.forget)}."
        return f"Forgets {_quoted(self.forget)}, and gives {_quoted(self.anchor or [''])} instead."

    @property
    def _held(self) -> list[str]:
        """The prompts to hold, and the empty one: guidance leads every picture away from what that gives."""
        return list(dict.fromkeys([*(self.retain or ()), ""]))

    def _read(self) -> tuple[Any, Any, Any]:
        """The pipeline, its denoiser, and the layers of that to correct."""
        from semu_peft.concept.families import denoiser_of
        from semu_peft.concept.targets import denoiser_targets

        pipe = pipeline(self.model)
        denoiser = denoiser_of(pipe)
        return pipe, denoiser, denoiser_targets(denoiser)

    def _then(self) -> list[str]:
        """The command that measures what was done."""
        kept = [part for prompt in (*(self.anchor or ()), *(self.retain or ())) for part in ("--retain", prompt)]
        forgotten = [part for prompt in self.forget for part in ("--forget", prompt)]
        return ["semu", "evaluate", "--model", self.model, "--adapter", str(self.output_dir), *forgotten, *kept]


def _quoted(prompts: list[str]) -> str:
    return ", ".join(f"`{prompt}`" if prompt else "what the empty prompt gives" for prompt in prompts)


def _fell(losses: list[float]) -> bool:
    """Whether a loss is a tenth lower at the end: over a twentieth of the steps, as those of single batches differ."""
    count = max(1, len(losses) // 20)
    return sum(losses[-count:]) <= 0.9 * sum(losses[:count])
