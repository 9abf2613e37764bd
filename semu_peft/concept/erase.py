"""Erase a concept from a loaded pipeline, in one call."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from semu_peft.adapter.whole_model import add_adapter, taken_back_on_error
from semu_peft.arguments import check_adapter_name, check_count, check_number
from semu_peft.model_state import device_of, is_offloaded
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
from semu_peft.subspace.initialize import check_config
from semu_peft.training.callbacks import as_callbacks
from semu_peft.training.natural import NaturalGradient
from semu_peft.training.unlearn import UnlearnResult, unlearn
from semu_peft.tuner import SemuConfig

from .dataset import ConceptExamples, as_list, check_prompts, concept_examples
from .earlier import earlier_erasures, warn_of_the_unheld
from .families import denoiser_of, family_of
from .preview import Preview
from .targets import denoiser_targets

_METHODS: dict[str, type[DiffusionObjective]] = {
    "condition-matching": ConditionMatching,
    "negative-guidance": NegativeGuidance,
    "gradient-ascent": DenoisingAscent,
}
_STEPS, _LEARNING_RATE = 200, 1e-2  # of AdamW
# A share of the energy leaves a prompt one direction a layer, in which there is no way from many concepts to another.
USUAL_DIRECTIONS: dict[str, Any] = {"explained_variance": 1.0, "r": 16}
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

    Examples:
        >>> from semu_peft import unlearn_concept
        >>> from semu_peft.concept import concept_examples
        >>> # `pipe` is a loaded pipeline, of Stable Diffusion here; few and short samples, for speed
        >>> few = {"samples_per_prompt": 2, "num_inference_steps": 1, "progress": False}
        >>> examples = concept_examples(pipe, "a photo of a cat", **few)
        >>> result = unlearn_concept(pipe, examples, max_steps=1, batch_size=2, progress=False)
        >>> result.pipe is pipe, len(result.profile.layers), len(result.examples)
        (True, 8, 2)
    """

    pipe: Any = field(repr=False)
    adapter_name: str
    profile: SubspaceProfile = field(repr=False)
    training: UnlearnResult
    examples: ConceptExamples


def unlearn_concept(
    pipe: Any,
    forget: str | Sequence[str] | ConceptExamples,
    *,
    anchor: str | Sequence[str] | None = None,
    retain: str | Sequence[str] | None = None,
    images: Any = None,
    objective: str | Objective = "condition-matching",
    preserve: float = 1.0,
    config: SemuConfig | None = None,
    max_steps: int | None = None,
    batch_size: int = 4,
    learning_rate: float | None = None,
    gradient_checkpointing: bool = False,
    park: bool = True,
    callbacks: Any = (),
    record: bool = True,
    seed: int = 0,
    progress: bool = True,
    adapter_name: str = "default",
    **training: Any,
) -> ConceptResult:
    """Teach a pipeline's denoiser to forget a concept: encode, find the subspace, train; no images are needed.

    Adapters that are active stay so, an earlier erasure or a style, and only the new one trains. What earlier erasures
    made of their prompts is held: each adapter's configuration says what it was made to forget.

    The text encoders and the VAE are used once, at the beginning. While the denoiser trains they are parked on the CPU,
    and with ready examples the pipeline may have been loaded without them.

    Args:
        pipe: A loaded pipeline of Stable Diffusion 1, 2, XL or 3, or of Flux, on the device to work on; in bfloat16, if
            memory is short (the adapter stays in float32).
        forget: The prompt or prompts to forget; or ready examples, which
            [`concept_examples`][semu_peft.concept.dataset.concept_examples] makes with settings of all kinds.
        anchor: With prompts, what to give instead. By default what the pipeline gives without a prompt. As many anchors
            as prompts are taken in pairs; of other numbers, several for one prompt among them, each example draws one.
        retain: With prompts, others to hold as they are, beside the anchors. By default only the empty one.
        images: With prompts, pictures of the concept: a tensor `(N, 3, height, width)` in [0, 1], or a list of PIL
            images. Without, latents are sampled from the pipeline itself.
        objective: `"condition-matching"` (answer as for the anchor), `"negative-guidance"` (ESD), `"gradient-ascent"`,
            or an objective of your own.
        preserve: Weight of [`PreservePrediction`][semu_peft.objectives.diffusion.PreservePrediction] under the `retain`
            prompts and the anchors, at the forget examples' own noisy latents; and, for each prompt that an earlier
            erasure was made to forget, and its anchors, of holding that. 0 leaves both out.
        config: The adapter, by default of up to 16 directions a layer; where it names no `target_modules`, keys and
            values of cross-attention.
        max_steps: Optimiser steps. By default 200, and with natural gradients as many as it takes.
        batch_size: Examples a step.
        learning_rate: Of AdamW, falling linearly to zero. By default 1e-2, and none with natural gradients. These end
            lower where there is memory for large batches: `optimizer=NaturalGradient(), batch_size=48`.
        gradient_checkpointing: Compute activations twice rather than keep them.
        park: Keep text encoders and VAE on the CPU while training; not done where a
            [`Preview`][semu_peft.concept.preview.Preview] needs them.
        callbacks: As [`unlearn`][semu_peft.training.unlearn.unlearn] takes them.
        record: Write the forgotten prompts and their anchors into the adapter's configuration, in clear, so that
            further erasures hold them. Without it the adapter does not say what it is for, and their `retain` must.
        seed: Seed of everything drawn.
        progress: Show progress bars.
        adapter_name: The adapter's name.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn], such as `mixed_precision`.

    Returns:
        The pipeline with the adapter, and what was done.

    Raises:
        ValueError: Arguments contradict each other or are out of range, a prompt to forget is empty, its own anchor or
            to be retained, or the pipeline or its scheduler is of an unknown kind. Whatever fails, the pipeline is left
            without the adapter.
        TypeError: An argument is of another kind, or neither of this function nor of `unlearn`, or `images` are no
            pictures.

    Examples:
        >>> from semu_peft import unlearn_concept
        >>> from semu_peft.concept import concept_examples
        >>> settings = {"samples_per_prompt": 2, "num_inference_steps": 1, "height": 16, "width": 16}
        >>> examples = concept_examples(pipe, "a cat", anchor="a dog", progress=False, **settings)
        >>> result = unlearn_concept(pipe, examples, max_steps=2, progress=False)
        >>> result.training.steps, pipe.unet.active_adapters()
        (2, ['default'])
    """
    family_of(pipe).check(pipe)
    denoiser: Any = denoiser_of(pipe)
    _check(denoiser, adapter_name, config, max_steps, training)
    check_number("preserve", preserve, low=0)
    check_count("batch_size", batch_size)
    if learning_rate is not None:
        check_number("learning_rate", learning_rate, low=0)
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler, family_of(pipe).timestep_scale)
    forgetting = _objective(objective, schedule, seed)
    callbacks = as_callbacks(callbacks)
    prompts = {name: value for name, value in (("anchor", anchor), ("retain", retain)) if value is not None}
    making = {"images": images, "batch_size": batch_size, "seed": seed, "progress": progress}
    ready = _ready(forget, prompts, images)
    asked: dict[str, Any] = {"forget": forget, **prompts} if ready is None else ready.request
    check_prompts(*(as_list(asked[name], name) if name in asked else [] for name in ("forget", "anchor", "retain")))
    examples = ready or concept_examples(pipe, forget, **prompts, **making)  # type: ignore[arg-type]
    if preserve:
        names_prompts = examples is forget or retain is not None
        warn_of_the_unheld(earlier_erasures(denoiser), examples.prompts, names_prompts=names_prompts)
    loss = _with_preservation(forgetting, schedule, preserve, examples, seed)
    config = SemuConfig(**USUAL_DIRECTIONS) if config is None else copy.deepcopy(config)
    if config.target_modules is None and not config.target_parameters:
        config.target_modules = set(denoiser_targets(denoiser))  # type: ignore[assignment]  # as PEFT keeps them
    if config.base_model_name_or_path is None and (name := getattr(pipe, "name_or_path", None)):
        config.base_model_name_or_path = str(name)  # the pipeline's, which a denoiser does not know
    loader = examples.loader(min(batch_size, len(examples)))
    length: Any = _length(max_steps, learning_rate, training.get("optimizer"))
    in_order = examples.loader(min(batch_size, len(examples)), shuffle=False)
    needs_all = not park or any(isinstance(callback, Preview) for callback in callbacks)
    held = getattr(pipe, family_of(pipe).denoiser)
    with (
        _parked(pipe, not needs_all),
        _recomputing(denoiser, gradient_checkpointing),
        taken_back_on_error(held, adapter_name=adapter_name),
    ):
        add_adapter(held, config, adapter_name=adapter_name)
        denoiser.peft_config[adapter_name].forgotten = examples.forgotten if record else {}
        profile = initialize_semu_weights(denoiser, in_order, forgetting, adapter_name=adapter_name, progress=progress)
        result = unlearn(
            denoiser, loader, loss, **length, seed=seed, callbacks=callbacks, progress=progress,
            adapter_name=adapter_name, **training,
        )  # fmt: skip
    return ConceptResult(pipe, adapter_name, profile, result, examples)


def _length(max_steps: int | None, learning_rate: float | None, optimizer: Any) -> dict[str, int | float | None]:
    """How long to train: so many steps at a rate, or until it is done by natural gradients.

    These are not the default: in batches as small as a large pipeline has memory for, with a timestep and noise each,
    AdamW reaches a lower loss (`benchmarks/concept_training.py`).
    """
    if isinstance(optimizer, NaturalGradient) or optimizer is NaturalGradient:
        return {"max_steps": max_steps, "learning_rate": learning_rate}
    steps = _STEPS if max_steps is None else max_steps
    rate = _LEARNING_RATE if learning_rate is None else learning_rate
    return {"epochs": steps, "max_steps": steps, "learning_rate": rate}  # an epoch has a step at least


def _check(denoiser: Any, adapter_name: str, config: Any, max_steps: int | None, training: dict[str, Any]) -> None:
    check_adapter_name(adapter_name)
    if config is not None:
        check_config(config)
    if adapter_name in getattr(denoiser, "peft_config", {}):
        raise ValueError(f"The denoiser has an adapter {adapter_name!r} already: choose another `adapter_name`.")
    check_count("max_steps", max_steps, optional=True)
    if "epochs" in training:
        raise ValueError("`epochs` follows from `max_steps` here: it cannot be given as well.")
    of_making = sorted(set(training) & set(inspect.signature(concept_examples).parameters))
    if of_making:
        raise TypeError(
            f"`{of_making[0]}` belongs to the making of examples: make them with `concept_examples(pipe, prompts, "
            f"{of_making[0]}=...)` and give them as `forget`."
        )
    if unknown := sorted(set(training) - set(inspect.signature(unlearn).parameters)):
        raise TypeError(f"`{unknown[0]}` is an argument of neither `unlearn_concept` nor `unlearn`. Check its name.")


def _ready(forget: Any, prompts: dict[str, Any], images: Any) -> ConceptExamples | None:
    """The examples, where these were given and not prompts to make them of."""
    if not isinstance(forget, ConceptExamples):
        return None
    given = [*prompts, *(["images"] if images is not None else [])]
    if given:
        raise ValueError(
            f"`{given[0]}` cannot be given with ready examples, which have theirs. Give it to `concept_examples`, or "
            "give prompts as `forget`."
        )
    return forget


def _with_preservation(
    forgetting: Objective, schedule: NoiseSchedule, preserve: float, examples: ConceptExamples, seed: int
) -> Objective:
    """What is trained: what forgetting is, which chooses the subspace by itself, and what is to be held."""
    if not preserve:
        return forgetting
    loss = forgetting + preserve * PreservePrediction(schedule, under="retain", seed=seed + 1)
    if "earlier" in examples.roles:  # an example has one of them, and each is to count like what is forgotten now
        count = len(examples.roles["earlier"].unique())
        loss = loss + preserve * count * PreservePrediction(schedule, under="earlier", seed=seed + 2)
    return loss


def _objective(objective: str | Objective, schedule: NoiseSchedule, seed: int) -> Objective:
    if isinstance(objective, Objective):
        return objective
    if objective not in _METHODS:
        raise ValueError(
            f"`objective` must be one of {', '.join(map(repr, _METHODS))} or an Objective, got {objective!r}."
        )
    return _METHODS[objective](schedule, seed=seed)


@contextmanager
def _recomputing(denoiser: Any, gradient_checkpointing: bool) -> Iterator[None]:
    """Gradient checkpointing for the block, where it is asked for and not on already."""
    switched = gradient_checkpointing and not getattr(denoiser, "is_gradient_checkpointing", False)
    try:
        if switched:
            denoiser.enable_gradient_checkpointing()
        yield
    finally:
        if switched:
            denoiser.disable_gradient_checkpointing()


@contextmanager
def _parked(pipe: Any, park: bool) -> Iterator[None]:
    """Keep what training does not need on the CPU, and bring everything back to where it was."""
    parts = [part for name in _PARKED if isinstance(part := getattr(pipe, name, None), nn.Module)]
    parts = [part for part in parts if park and device_of(part).type != "cpu"]
    devices = [(part, device_of(part)) for part in (*parts, denoiser_of(pipe)) if not is_offloaded(part)]
    for part in parts:
        part.to("cpu")
    if parts and torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        for part, device in devices:
            part.to(device)
