"""Objectives for diffusion models, `(denoiser, batch) -> loss` at random timesteps and noise.

The model is the denoiser itself: a U-Net or a transformer of diffusers, not the pipeline. A batch is a mapping with

- `latents`: clean samples in the space that the denoiser works in, `(N, ...)`;
- `condition`: what they are samples of, as keyword arguments of the denoiser, see
  [`Condition`][semu_peft.objectives.denoiser.Condition];
- where an objective asks for them, further conditions of the same form: `anchor`, `unconditional`, `retain`.

or, for class-conditional models, a tuple `(images, class_labels)`. Losses are means over all numbers predicted, in
float32 whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Evaluation, Outputs, PreparedObjective, RandomObjective
from .denoiser import Condition, denoiser_output
from .noise_schedule import NoiseSchedule
from .original import reference_model

TargetModel = Literal["original", "current"]


class _Noised(NamedTuple):
    """A batch at random timesteps."""

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    batch: Mapping[str, Any]


@dataclass
class DiffusionObjective(PreparedObjective, RandomObjective):
    """What the objectives below share: the noising, guidance, and the choice of conditions.

    Args:
        scheduler: The pipeline's scheduler, any of diffusers', or a
            [`NoiseSchedule`][semu_peft.objectives.noise_schedule.NoiseSchedule].
        antithetic: Draw timesteps in pairs `t, T − 1 − t`, as SEMU does.
        timestep_span: The part of the schedule to draw from, as shares of T: `(0, 1)` is all, larger is noisier.
        guidance_scale: Predict with classifier-free guidance `u + s (c − u)`; 1 is none, and saves a forward pass.
            SEMU's released code uses 7.5 for the subspace of text-to-image models. Needs `unconditional` in the batch.
        num_classes: Number of classes, where conditions are derived from class labels.
        seed: Seed of timesteps, noise and classes.

    Raises:
        ValueError: The scheduler is of an unknown kind, or the span is not within [0, 1].

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import DenoisingLoss, NoiseSchedule
        >>> schedule = NoiseSchedule(torch.linspace(1, 0, 10), torch.linspace(0, 1, 10), torch.arange(10))
        >>> DenoisingLoss(schedule, timestep_span=(0.5, 1.0), seed=3)  # the noisier half
        DenoisingLoss(seed=3, antithetic=True, timestep_span=(0.5, 1.0), guidance_scale=1.0, num_classes=None)
    """

    distribution = "gaussian"
    scheduler: Any = field(repr=False)
    antithetic: bool = field(default=True, kw_only=True)
    timestep_span: tuple[float, float] = field(default=(0.0, 1.0), kw_only=True)
    guidance_scale: float = field(default=1.0, kw_only=True)
    num_classes: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.timestep_span
        if not 0 <= low < high <= 1:
            raise ValueError(f"`timestep_span` must be shares 0 <= low < high <= 1, got {self.timestep_span}.")
        known = isinstance(self.scheduler, NoiseSchedule)
        self.schedule = self.scheduler if known else NoiseSchedule.from_scheduler(self.scheduler)

    def prepare(self, model: nn.Module, batch: Any) -> tuple[_Noised, Condition, Tensor]:
        at = self._noised(batch)
        return at, *self._matched(model, at)

    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        at, condition, target = prepared
        prediction = self._predict(model, at, condition)
        return Evaluation(F.mse_loss(prediction, target), (Outputs(prediction),))

    def _matched(self, model: nn.Module, at: _Noised) -> tuple[Condition, Tensor]:
        """The condition to predict under, and what the prediction is measured against."""
        return at.batch["condition"], at.target

    def _noised(self, batch: Any) -> _Noised:
        batch = read_batch(batch)
        clean = batch["latents"].float()
        index = self.schedule.draw(len(clean), self.generator, self.antithetic, self.timestep_span).to(clean.device)
        noise = torch.randn(clean.shape, generator=self.generator).to(clean.device)
        return _Noised(
            self.schedule.add_noise(clean, noise, index),
            self.schedule.timesteps_at(index),
            self.schedule.target(clean, noise, index),
            batch,
        )

    def _predict(self, model: nn.Module, at: _Noised, condition: Condition, guided: bool = True) -> Tensor:
        noise_pred = denoiser_output(model, at.noisy, at.timesteps, condition)
        if not guided or self.guidance_scale == 1.0:
            return noise_pred
        noise_pred_uncond = denoiser_output(model, at.noisy, at.timesteps, self._condition(at.batch, "unconditional"))
        return noise_pred_uncond + self.guidance_scale * (noise_pred - noise_pred_uncond)

    def _condition(self, batch: Mapping[str, Any], name: str) -> Condition:
        """A condition of the batch by its key; or `"next"` and `"random"`, another class than the batch's own."""
        if name in batch:
            return batch[name]
        if name not in ("next", "random"):
            raise ValueError(
                f"{type(self).__name__} needs the condition {name!r} in the batch, which has {sorted(batch)}. Add it: "
                f"batch[{name!r}] = the denoiser's keyword arguments for it."
            )
        labels = batch["condition"].get("class_labels")
        if labels is None or self.num_classes is None or self.num_classes < 2:
            raise ValueError(
                f"The condition {name!r} is another class: it needs `num_classes` (2 or more) and batches of images "
                f"and class labels; got num_classes={self.num_classes} and conditions {sorted(batch['condition'])}. "
                "For prompts, put the other prompts into the batch as 'anchor'."
            )
        if name == "next":
            return {**batch["condition"], "class_labels": (labels + 1) % self.num_classes}
        shift = torch.randint(1, self.num_classes, labels.shape, generator=self.generator).to(labels.device)
        return {**batch["condition"], "class_labels": (labels + shift) % self.num_classes}


@dataclass
class DenoisingLoss(DiffusionObjective):
    """The ordinary training loss, `‖f(x_t, c) − target‖²`: for retain data, and SEMU's loss for the subspace.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import DenoisingLoss, NoiseSchedule
        >>> class Denoiser(torch.nn.Embedding):  # stands for a U-Net: predicts one number for each class
        ...     def forward(self, noisy, timestep, class_labels, return_dict):
        ...         return (super().forward(class_labels).view(-1, 1, 1, 1).expand_as(noisy),)
        >>> denoiser = Denoiser.from_pretrained(torch.tensor([[0.0], [1.0], [2.0]]))
        >>> schedule = NoiseSchedule(torch.linspace(1, 0, 10), torch.linspace(0, 1, 10), torch.arange(10), "sample")
        >>> DenoisingLoss(schedule)(denoiser, (torch.zeros(4, 1, 8, 8), torch.full((4,), 2))).item()
        4.0
    """

    minimum = 0.0
    forgets = False


@dataclass
class DenoisingAscent(DiffusionObjective):
    """The training loss with its sign turned (`"ga"` in SEMU's released code).

    Unbounded below: stop early, or the model is destroyed.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import DenoisingAscent, NoiseSchedule
        >>> class Denoiser(torch.nn.Embedding):  # stands for a U-Net: predicts one number for each class
        ...     def forward(self, noisy, timestep, class_labels, return_dict):
        ...         return (super().forward(class_labels).view(-1, 1, 1, 1).expand_as(noisy),)
        >>> denoiser = Denoiser.from_pretrained(torch.tensor([[0.0], [1.0], [2.0]]))
        >>> schedule = NoiseSchedule(torch.linspace(1, 0, 10), torch.linspace(0, 1, 10), torch.arange(10), "sample")
        >>> DenoisingAscent(schedule)(denoiser, (torch.zeros(4, 1, 8, 8), torch.full((4,), 2))).item()
        -4.0
    """

    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        evaluation = super().evaluate(model, batch, prepared)
        return replace(evaluation, loss=-evaluation.loss)


@dataclass
class _Referenced(DiffusionObjective):
    """An objective whose target is itself a prediction.

    Args:
        target_model: Who predicts the target: `"original"`, the model without its adapter, or `"current"`, the model
            as it stands, as in SEMU's released code.
        reference: A frozen original model, in place of the model without its adapter.
    """

    minimum = 0.0
    target_model: TargetModel = field(default="original", kw_only=True)
    reference: nn.Module | None = field(default=None, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_model not in ("original", "current"):
            raise ValueError(f"`target_model` must be 'original' or 'current', got {self.target_model!r}.")

    @torch.no_grad()
    def _targets(self, model: nn.Module, at: _Noised, conditions: list[Condition], guided: bool = True) -> list[Tensor]:
        reference = model if self.target_model == "current" else self.reference
        with reference_model(model, reference) as source:
            return [self._predict(source, at, condition, guided) for condition in conditions]


@dataclass
class ConditionMatching(_Referenced):
    """Answer the forget condition as another one is answered: `‖f(x_t, c) − sg f₀(x_t, c')‖²`.

    Source: SEMU, arXiv 2502.07587 (`"rl"` with the next class, `"rl++"` with a random other), after SalUn; with an
    anchor concept it is concept ablation (Kumari et al. 2023, arXiv 2303.13516).

    Args:
        towards: `c'`: a condition in the batch, by its key, or `"next"` or `"random"`, another class.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import ConditionMatching, NoiseSchedule
        >>> class Denoiser(torch.nn.Embedding):  # stands for a U-Net: predicts one number for each class
        ...     def forward(self, noisy, timestep, class_labels, return_dict):
        ...         return (super().forward(class_labels).view(-1, 1, 1, 1).expand_as(noisy),)
        >>> denoiser = Denoiser.from_pretrained(torch.tensor([[0.0], [1.0], [2.0]]))
        >>> schedule = NoiseSchedule(torch.linspace(1, 0, 10), torch.linspace(0, 1, 10), torch.arange(10))
        >>> objective = ConditionMatching(schedule, towards="next", num_classes=3, reference=denoiser)
        >>> objective(denoiser, (torch.randn(4, 1, 8, 8), torch.zeros(4).long())).item()  # from 0 to the next, 1
        1.0
    """

    towards: str = field(default="anchor", kw_only=True)

    def _matched(self, model: nn.Module, at: _Noised) -> tuple[Condition, Tensor]:
        (target,) = self._targets(model, at, [self._condition(at.batch, self.towards)])
        return at.batch["condition"], target


@dataclass
class NegativeGuidance(_Referenced):
    """Guide the forget condition away from itself: `‖f(x_t, c) − sg[f₀(x_t, ∅) − η (f₀(x_t, c) − f₀(x_t, ∅))]‖²`.

    Source: ESD, Gandikota et al. 2023, arXiv 2303.07345, equation 7. Needs `unconditional` in the batch. Guidance is
    linear, so it holds for ε-, v- and flow-prediction alike.

    Args:
        eta: η, how far beyond the unconditional prediction to go.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import NegativeGuidance, NoiseSchedule
        >>> class Denoiser(torch.nn.Embedding):  # stands for a U-Net: predicts one number for each class
        ...     def forward(self, noisy, timestep, class_labels, return_dict):
        ...         return (super().forward(class_labels).view(-1, 1, 1, 1).expand_as(noisy),)
        >>> denoiser = Denoiser.from_pretrained(torch.tensor([[0.0], [1.0], [2.0]]))
        >>> schedule = NoiseSchedule(torch.linspace(1, 0, 10), torch.linspace(0, 1, 10), torch.arange(10))
        >>> forget, unconditional = ({"class_labels": torch.full((4,), label)} for label in (1, 0))
        >>> batch = {"latents": torch.randn(4, 1, 8, 8), "condition": forget, "unconditional": unconditional}
        >>> NegativeGuidance(schedule, reference=denoiser)(denoiser, batch).item()  # from 1 to 0 − (1 − 0)
        4.0
    """

    eta: float = field(default=1.0, kw_only=True)

    def _matched(self, model: nn.Module, at: _Noised) -> tuple[Condition, Tensor]:
        condition, uncond = at.batch["condition"], self._condition(at.batch, "unconditional")
        noise_pred, noise_pred_uncond = self._targets(model, at, [condition, uncond], guided=False)
        return condition, noise_pred_uncond - self.eta * (noise_pred - noise_pred_uncond)


@dataclass
class PreservePrediction(_Referenced):
    """Answer a condition as the original does: `‖f(x_t, c) − sg f₀(x_t, c)‖²`.

    As a retain objective it needs prompts or classes and no images: samples of the model itself will do. On forget
    batches with `under="random"`, `"retain"` or `"unconditional"`, it holds other conditions at the same `x_t`, so that
    `ConditionMatching(...) + PreservePrediction(..., under="random")` needs no retain data at all.

    Args:
        under: `c`: a condition in the batch, by its key, or `"next"` or `"random"`, another class.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import NoiseSchedule, PreservePrediction
        >>> class Denoiser(torch.nn.Embedding):  # stands for a U-Net: predicts one number for each class
        ...     def forward(self, noisy, timestep, class_labels, return_dict):
        ...         return (super().forward(class_labels).view(-1, 1, 1, 1).expand_as(noisy),)
        >>> original = Denoiser.from_pretrained(torch.tensor([[0.0], [1.0]]))
        >>> changed = Denoiser.from_pretrained(torch.tensor([[0.0], [3.0]]))
        >>> schedule = NoiseSchedule(torch.linspace(1, 0, 10), torch.linspace(0, 1, 10), torch.arange(10))
        >>> objective = PreservePrediction(schedule, reference=original)
        >>> objective(changed, (torch.randn(4, 1, 8, 8), torch.ones(4).long())).item()
        4.0
    """

    under: str = field(default="condition", kw_only=True)

    def _matched(self, model: nn.Module, at: _Noised) -> tuple[Condition, Tensor]:
        condition = self._condition(at.batch, self.under)
        return condition, self._targets(model, at, [condition])[0]

    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        evaluation = super().evaluate(model, batch, prepared)
        is_of_original = self.target_model == "original" and self.reference is None
        return replace(evaluation, damage=evaluation.loss.detach()) if is_of_original else evaluation


@dataclass
class EmbeddingMatching(PreparedObjective):
    """Let a text encoder read the forget prompt as another: `Σ_l ‖e_l(p) − sg e₀_l(p')‖² / ‖e₀_l(p')‖²`.

    For an adapter in the text encoder rather than in the denoiser. A batch is a mapping of token ids `(N, L)`:
    `input_ids` of the forget prompts and `anchor_input_ids` of what they are to be read as; for retain prompts the two
    are the same. The loss is the mean over prompts of the squared error over all token positions, relative to the
    target's own square: layers have units of their own, which the last norm changes most, and each is to count alike.

    Pipelines do not all read the same layer `l` of their encoders. The last one is read by Stable Diffusion 1 and 2,
    by all of CLIP's pooled embeddings and all of T5; the last but one by Stable Diffusion XL and 3, Z-Image, and
    Stable Diffusion 1 and 2 with `clip_skip=1`. Both are matched unless told otherwise.

    Args:
        reference: A frozen original encoder. By default the model itself without its adapter.
        hidden_states: The layers that the pipeline reads, counted from the end; −1 is `last_hidden_state`, after the
            last norm. With `clip_skip=k` it is `−(k + 1)` in Stable Diffusion 1 and 2, `−(k + 2)` in XL and 3.

    Raises:
        ValueError: A layer is not counted from the end, or there is none.

    Examples:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from semu_peft.objectives import EmbeddingMatching
        >>> class Encoder(torch.nn.Embedding):  # stands for a text encoder of one layer
        ...     def forward(self, input_ids, output_hidden_states=False):
        ...         return SimpleNamespace(last_hidden_state=super().forward(input_ids))
        >>> encoder = Encoder.from_pretrained(torch.tensor([[1.0], [3.0]]))
        >>> batch = {"input_ids": torch.tensor([[1]]), "anchor_input_ids": torch.tensor([[0]])}
        >>> EmbeddingMatching(reference=encoder, hidden_states=(-1,))(encoder, batch).item()
        4.0
    """

    distribution = "gaussian"
    minimum = 0.0
    reference: nn.Module | None = field(default=None, repr=False)
    hidden_states: tuple[int, ...] = (-1, -2)

    def __post_init__(self) -> None:
        layers = self.hidden_states
        if not isinstance(layers, Sequence) or not layers or any(not isinstance(at, int) or at > -1 for at in layers):
            raise ValueError(
                f"`hidden_states` must be layers counted from the end, such as (-1, -2), got {layers!r}. Give those "
                "that the pipeline reads."
            )

    def prepare(self, model: nn.Module, batch: Any) -> list[Tensor]:
        missing = {"input_ids", "anchor_input_ids"} - set(batch if isinstance(batch, Mapping) else ())
        if missing:
            raise ValueError(
                f"A batch must have `input_ids` and `anchor_input_ids`, got none of {sorted(missing)}. Tokenise the "
                "prompts that the forgotten ones are to be read as."
            )
        with torch.no_grad(), reference_model(model, self.reference) as original:
            return self._read(original, batch["anchor_input_ids"])

    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        units = [_root_mean_square(target) for target in prepared]
        read = [states / unit for states, unit in zip(self._read(model, batch["input_ids"]), units, strict=True)]
        targets = [target / unit for target, unit in zip(prepared, units, strict=True)]
        losses = [F.mse_loss(*pair) for pair in zip(read, targets, strict=True)]
        return Evaluation(torch.stack(losses).sum(), tuple(Outputs(states) for states in read))

    def _read(self, model: nn.Module, input_ids: Tensor) -> list[Tensor]:
        output = model(input_ids=input_ids, output_hidden_states=True)
        deepest = min(self.hidden_states)
        if deepest < -1 and len(output.hidden_states) < -deepest:
            raise ValueError(
                f"`hidden_states` must be layers of the encoder, got {deepest} of {len(output.hidden_states)}. Give "
                "those that the pipeline reads."
            )
        states = [output.last_hidden_state if at == -1 else output.hidden_states[at] for at in self.hidden_states]
        return [state.float() for state in states]


def _root_mean_square(states: Tensor) -> Tensor:
    """The unit of each example's hidden states, `(N, L, D)` to `(N, 1, 1)`."""
    return states.square().mean((1, 2), keepdim=True).sqrt().clamp_min(torch.finfo(states.dtype).eps)


def read_batch(batch: Any) -> Mapping[str, Any]:
    """Read a batch as a mapping with `latents` and `condition`.

    Raises:
        TypeError: It is neither that nor a tuple `(images, class_labels)`.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.diffusion import read_batch
        >>> batch = read_batch((torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])))
        >>> batch["latents"].shape, batch["condition"]
        (torch.Size([2, 3, 8, 8]), {'class_labels': tensor([0, 1])})
    """
    if isinstance(batch, Mapping) and isinstance(batch.get("latents"), Tensor) and "condition" in batch:
        return batch
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(item, Tensor) for item in batch):
        return {"latents": batch[0], "condition": {"class_labels": batch[1]}}
    found = f"a mapping with {sorted(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
    raise TypeError(
        "A diffusion batch must be a mapping with 'latents' and 'condition', or a tuple `(images, class_labels)`; got "
        f"{found}."
    )
