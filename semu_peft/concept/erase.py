"""Erase a concept from a loaded pipeline, in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from semu_peft.adapter.whole_model import remove_adapter
from semu_peft.objectives.base import Objective
from semu_peft.objectives.diffusion import (
    ConditionMatching,
    DenoisingAscent,
    DiffusionObjective,
    NegativeGuidance,
    PreservePrediction,
)
from semu_peft.objectives.noise_schedule import NoiseSchedule
from semu_peft.subspace import SubspaceProfile, initialize_semu_weights
from semu_peft.training.callbacks import EarlyStopping
from semu_peft.training.unlearn import UnlearnResult, unlearn
from semu_peft.tuner import SemuConfig

from .dataset import ConceptExamples, as_list, concept_examples
from .families import denoiser_of, family_of
from .targets import denoiser_targets

Preview = Callable[[Any, int], Any]

_METHODS: dict[str, type[DiffusionObjective]] = {
    "condition-matching": ConditionMatching,
    "negative-guidance": NegativeGuidance,
    "gradient-ascent": DenoisingAscent,
}
_PARKED = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder", "safety_checker")


@dataclass(frozen=True, eq=False)
class ConceptResult:
    """What `unlearn_concept` did.

    Attributes:
        pipe: The pipeline that was given, its denoiser now with the adapter, active.
        adapter_name: The adapter's name in it.
        profile: The spectra and ranks of the forget gradients.
        training: History, time and counts of the training.
        examples: What it was trained on; save them to spare the encoding next time.
    """

    pipe: Any
    adapter_name: str
    profile: SubspaceProfile
    training: UnlearnResult
    examples: ConceptExamples


def unlearn_concept(
    pipe: Any,
    forget: str | Sequence[str] | None = None,
    *,
    anchor: str | Sequence[str] = "",
    retain: str | Sequence[str] | None = None,
    images: Any = None,
    objective: str | Objective = "condition-matching",
    preserve: float = 1.0,
    config: SemuConfig | None = None,
    steps: int = 200,
    batch_size: int = 4,
    learning_rate: float = 1e-2,
    samples_per_prompt: int = 16,
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    height: int | None = None,
    width: int | None = None,
    examples: ConceptExamples | None = None,
    cache: str | Path | None = None,
    gradient_checkpointing: bool = False,
    mixed_precision: str | None = None,
    park: bool = True,
    preview: Preview | None = None,
    previews: int = 4,
    adapter_name: str = "default",
    seed: int = 0,
    progress: bool = True,
    **training: Any,
) -> ConceptResult:
    """Teach a pipeline's denoiser to forget a concept: encode, find the subspace, train; no images are needed.

    The text encoders and the VAE are used once, at the beginning. While the denoiser trains they are parked on the CPU,
    and with `examples` or a `cache` file at hand the pipeline may have been loaded without them.

    Args:
        pipe: A loaded pipeline of Stable Diffusion 1, 2, XL or 3, or of Flux, on the device to work on; in bfloat16, if
            memory is short (the adapter stays in float32).
        forget: The prompt or prompts to forget; `None` with `examples`.
        anchor: What to give instead, see [`concept_examples`][semu_peft.concept.dataset.concept_examples]. By default
            what the pipeline gives without a prompt.
        retain: Prompts to hold as they are. By default only the empty one.
        images: Pictures of the concept. Without, latents are sampled from the pipeline itself.
        objective: `"condition-matching"` (answer as for the anchor), `"negative-guidance"` (ESD), `"gradient-ascent"`,
            or an objective of your own.
        preserve: Weight of [`PreservePrediction`][semu_peft.objectives.diffusion.PreservePrediction] under the `retain`
            prompts, at the forget examples' own noisy latents; 0 leaves it out.
        config: The adapter; by default keys and values of cross-attention.
        steps: Optimiser steps.
        batch_size: Examples a step.
        learning_rate: Of AdamW, falling linearly to zero.
        samples_per_prompt: Latents to sample for each forget prompt.
        num_inference_steps: Steps of that sampling.
        guidance_scale: Guidance of that sampling.
        height: Height of images in pixels, by default the pipeline's own.
        width: Width likewise.
        examples: Examples made before; nothing is encoded or sampled then.
        cache: File to keep the examples in: loaded if it exists, written otherwise.
        gradient_checkpointing: Compute activations twice rather than keep them.
        mixed_precision: As [`unlearn`][semu_peft.training.unlearn.unlearn] takes it.
        park: Keep text encoders and VAE on the CPU while training; not done where `preview` needs them.
        preview: `(pipe, step)`, called before, `previews` times during, and after training, for example
            [`SampleGrids`][semu_peft.report.samples.SampleGrids]. The history then has, as `metric`, minus the loss on
            the first examples with fixed noise.
        previews: How often during training.
        adapter_name: The adapter's name.
        seed: Seed of everything drawn.
        progress: Show progress bars.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Returns:
        The pipeline with the adapter, and what was done.

    Raises:
        ValueError: Arguments contradict each other, or the pipeline is of an unknown kind. Whatever fails, the pipeline
            is left without the adapter.
    """
    family = family_of(pipe)
    denoiser: Any = denoiser_of(pipe)
    _check(denoiser, adapter_name, forget, examples, cache, steps)
    own = {"epochs": "steps", "max_steps": "steps"} | ({"callbacks": "preview"} if preview is not None else {})
    if taken := sorted(set(own) & set(training)):
        raise ValueError(f"`{taken[0]}` follows from `{own[taken[0]]}` here: it cannot be given as well.")
    if examples is None and cache is not None and Path(cache).is_file():
        examples = ConceptExamples.load(cache)
        cached = {examples.prompts[int(index)] for index in examples.roles["condition"]}
        if forget is not None and cached != set(as_list(forget, "forget")):
            raise ValueError(
                f"`cache`: {cache} holds examples of {sorted(cached)}, not of {forget!r}: name another file, or remove "
                "this one to make it afresh."
            )
    if examples is None:
        examples = concept_examples(
            pipe, forget or "", anchor=anchor, retain=retain, images=images, samples_per_prompt=samples_per_prompt,
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, height=height, width=width,
            batch_size=batch_size, seed=seed, progress=progress,
        )  # fmt: skip
        if cache is not None:
            examples.save(cache)
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler, family.timestep_scale)
    forgetting = _objective(objective, schedule, seed)
    loss = forgetting
    if preserve:
        loss = forgetting + preserve * PreservePrediction(schedule, under="retain", seed=seed + 1)
    config = config or SemuConfig(target_modules=denoiser_targets(denoiser))
    loader = examples.loader(min(batch_size, len(examples)))
    epochs = math.ceil(steps / len(loader))

    flags = [(parameter, parameter.requires_grad) for parameter in denoiser.parameters()]
    checkpointed = bool(getattr(denoiser, "is_gradient_checkpointing", False))
    try:
        denoiser.add_adapter(config, adapter_name=adapter_name)
        if gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        with _parked(pipe, park and preview is None):
            in_order = examples.loader(loader.batch_size or 1, shuffle=False)
            profile = initialize_semu_weights(
                denoiser, in_order, forgetting, adapter_name=adapter_name, progress=progress
            )
            if preview is not None:
                first = next(iter(in_order))
                watch = _Watch(pipe, preview, previews, forgetting, first, len(loader), epochs)
                training["callbacks"] = EarlyStopping(watch, patience=epochs + 1, restore_best=False)
                preview(pipe, 0)
            result = unlearn(
                denoiser, loader, loss, epochs=epochs, max_steps=steps, learning_rate=learning_rate,
                mixed_precision=mixed_precision, seed=seed, progress=progress, **training,
            )  # fmt: skip
        if preview is not None:
            preview(pipe, result.steps)
    except Exception:
        remove_adapter(denoiser, adapter_name=adapter_name)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    finally:
        if gradient_checkpointing and not checkpointed:
            denoiser.disable_gradient_checkpointing()
    return ConceptResult(pipe, adapter_name, profile, result, examples)


class _Watch:
    """`unlearn`'s metric: minus a loss without noise from step to step; and previews, evenly spread over the epochs."""

    def __init__(
        self, pipe: Any, preview: Preview, count: int, objective: Objective, batch: Any, steps: int, epochs: int
    ) -> None:
        self.pipe, self.preview, self.objective, self.batch, self.steps = pipe, preview, objective, batch, steps
        self.due = {round((number + 1) * epochs / (count + 1)) for number in range(count)}
        self.epoch = 0
        self.state = objective.state_dict()

    def __call__(self, model: nn.Module) -> float:
        self.epoch += 1
        if self.epoch in self.due:
            self.preview(self.pipe, self.epoch * self.steps)
        now = self.objective.state_dict()
        self.objective.load_state_dict(self.state)
        value = float(self.objective(model, _to(self.batch, _device(model))))
        self.objective.load_state_dict(now)
        return -value


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, dict):
        return {name: _to(value, device) for name, value in batch.items()}
    return batch.to(device)


def _check(
    denoiser: Any,
    adapter_name: str,
    forget: Any,
    examples: ConceptExamples | None,
    cache: str | Path | None,
    steps: int,
) -> None:
    cached = cache is not None and Path(cache).is_file()
    if (examples is None) == (forget is None) and not (cached and forget is None):
        raise ValueError("Give either `forget`, the prompts to forget, or `examples` that were made of them before.")
    if adapter_name in getattr(denoiser, "peft_config", {}):
        raise ValueError(f"The denoiser has an adapter {adapter_name!r} already: choose another `adapter_name`.")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"`steps` must be a positive integer, got {steps!r}.")


def _objective(objective: str | Objective, schedule: NoiseSchedule, seed: int) -> Objective:
    if isinstance(objective, Objective):
        return objective
    if objective not in _METHODS:
        raise ValueError(f"`objective` must be one of {', '.join(map(repr, _METHODS))} or an Objective: {objective!r}.")
    return _METHODS[objective](schedule, seed=seed)


@contextmanager
def _parked(pipe: Any, park: bool) -> Iterator[None]:
    """Keep what training does not need on the CPU, and bring everything back to where it was."""
    parts = [part for name in _PARKED if isinstance(part := getattr(pipe, name, None), nn.Module)]
    parts = [part for part in parts if park and _device(part).type not in ("cpu", "meta")]
    denoiser = denoiser_of(pipe)
    devices = [(part, _device(part)) for part in (*parts, denoiser)]
    for part in parts:
        part.to("cpu")
    if parts and torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        for part, device in devices:
            part.to(device)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
