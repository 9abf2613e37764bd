"""The dials of natural-gradient training, which a user can judge, and whether a run can be trained by it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from semu_peft.objectives.base import Objective, WeightedSum, finite_number
from semu_peft.tuner.layer import SemuLayer

CurvatureKind = Literal["auto", "whole", "kronecker"]
Choose = Callable[[Sequence[Mapping[str, float]]], int]
"""`(history) -> index` of the point of a run to be left at."""


@dataclass(frozen=True)
class NaturalGradient:
    """Train cores by their natural gradient: an optimiser without a learning rate and without a number of epochs.

    A core is so small that its step can be a Gauss–Newton step, `−(F + λ I)⁻¹ ∇R`, with `F` the curvature of what is
    minimised, gathered from the same passes. Up to a few thousand numbers `F` is exact and `λ` follows how well each
    step did what it promised (Levenberg–Marquardt); above, `F` is approximated by two factors a layer, `λ` stays, and
    the step goes as far along this direction as the outputs may move. A step that does not lower the loss, is not
    finite, moves the outputs too far, or spends more than `max_retain_kl`, is taken back. The run stops when the forget
    data are forgotten, when the budget is spent, or when the loss no longer falls, and leaves the best cores that it
    saw, never worse ones than it found.

    It needs an objective that says its `distribution` and its outputs; all classification and diffusion objectives of
    this library do.

    Args:
        kl: How far one step is to move the model's outputs on the forget batch, `KL(before ‖ after)` in nats a row (for
            a denoiser the mean squared change, as a share of the loss at the start where that is above 1); one that
            moves them half as far again is taken back. Smaller steps are safer and take longer. With factors a step is
            also held to a tenth of it on the retain batch.
        max_retain_kl: The damage that may be done: `KL(original ‖ now)` on retain batches or, without any, on the other
            answers to the forget inputs, never exceeded by a step, which where its batch begins above it must come
            down, nor by what is left, on the first 512 examples. The same divergence is added to what is minimised,
            with a weight by which a spent budget costs a tenth of a nat (for a denoiser of the loss at the start): a
            budget is there to be spent. None sets no bound.
        tolerance: How forgotten is enough: the distance of the loss from its minimum, in nats (for a denoiser as a
            share of the loss at the start); where an objective has no minimum, the mean probability of the forgotten
            answers. By default 0.01, or with retain data a fiftieth of the distance at the start where that is less: a
            random part of the training data begins some hundredths of a nat from the end.
        curvature: `"whole"`, one matrix over all cores; `"kronecker"`, two factors a layer (K-FAC); by default the
            whole matrix up to 4,096 trained numbers, but for texts, few of which say too little of so many together.
        damping: `λ`, relative to the mean of the curvature's or a factor's diagonal. That of the whole matrix adapts
            itself.
        proximal: What nothing is known of stays as it is: without retain data, half of this times the curvature of an
            average direction times `‖R − R₀‖²` is added to what is minimised (a proximal term; the curvature is the
            largest seen). Else the last steps buy a little loss along directions that the forget data hardly see and
            all other data may. 0 leaves it out; factors, and runs with retain data, do without it.
        decay: What each new batch leaves of the running curvature's weight.
        refresh: Take the curvature anew every this many steps, at a backward pass each. By default every second one;
            with factors the third and then every fourth, or so many more that each of an epoch's batches has its turn.
        patience: Stop after this many batches in a row in which the running loss has not fallen by half the tolerance;
            with factors, whose steps are shorter, after four times as many. By default 4; with the whole matrix, where
            batches of a classifier are small, as many as bring 64 examples, up to all of the forget set once; times the
            objective's `turns`, which are those of simulated attackers.

    Raises:
        TypeError: A dial is no number.
        ValueError: A dial is out of its range.

    Examples:
        >>> NaturalGradient(kl=0.02)
        NaturalGradient(kl=0.02, max_retain_kl=None, tolerance=None)
        >>> NaturalGradient(kl=0)
        Traceback (most recent call last):
        ValueError: `kl` must be above zero, got 0. Take 0.1, or less for smaller steps.
    """

    kl: float = 0.1
    max_retain_kl: float | None = None
    tolerance: float | None = None
    curvature: CurvatureKind = "auto"
    damping: float = 0.1
    proximal: float | None = None
    decay: float = 0.8
    refresh: int | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        for name, mend in _ABOVE_ZERO.items():
            value = getattr(self, name)
            if value is not None and finite_number(value, name) <= 0:
                raise ValueError(f"`{name}` must be above zero, got {value!r}. {mend}")
        if self.proximal is not None and finite_number(self.proximal, "proximal") < 0:
            raise ValueError(f"`proximal` must be zero or more, got {self.proximal!r}. Take 0.01, or None.")
        if not 0 <= finite_number(self.decay, "decay") < 1:
            raise ValueError(f"`decay` must be from 0 up to below 1, got {self.decay!r}. Take 0.8.")
        for name in ("refresh", "patience"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}. Give at least 1.")
        if self.curvature not in ("auto", "whole", "kronecker"):
            raise ValueError(
                f"`curvature` must be 'auto', 'whole' or 'kronecker', got {self.curvature!r}. Leave it at 'auto'."
            )

    def proximal_under(self, objective: Objective) -> float:
        """`proximal`, and where it is left to the default, what that is under an objective.

        Examples:
            >>> from semu_peft.objectives import CrossEntropy, EmbeddingMatching
            >>> NaturalGradient().proximal_under(CrossEntropy()), NaturalGradient().proximal_under(EmbeddingMatching())
            (0.01, 0.0)
        """
        if self.proximal is not None:
            return self.proximal
        has_target = objective.distribution == "gaussian" and objective.minimum is not None
        return 0.0 if has_target else _PROXIMAL

    def __repr__(self) -> str:
        return f"NaturalGradient(kl={self.kl}, max_retain_kl={self.max_retain_kl}, tolerance={self.tolerance})"


_PROXIMAL = 0.01  # without a target for each number of the output
_ABOVE_ZERO = {
    "kl": "Take 0.1, or less for smaller steps.",
    "max_retain_kl": "Take 0.01, or None for no bound.",
    "tolerance": "Take 0.01, or None to go by the start.",
    "damping": "Take 0.1.",
}


def choose_natural(
    optimizer: Any,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    objectives: Iterable[Objective],
    mixed_precision: str | None,
    max_retain_kl: float | None,
    *,
    is_asked_for_another: bool,
    choose: Choose | None = None,
) -> NaturalGradient | None:
    """Read the arguments of `unlearn`: the natural gradient that is to train, or None for another optimiser.

    Raises:
        ValueError: It is asked for and cannot train what is to be trained, or a bound that only it keeps is given.

    Examples:
        >>> from semu_peft.objectives import CrossEntropy
        >>> layer = nn.Linear(2, 2)
        >>> parameters = dict(layer.named_parameters())
        >>> arguments = layer, parameters, [CrossEntropy()], None, None
        >>> choose_natural(NaturalGradient(), *arguments, is_asked_for_another=False)
        Traceback (most recent call last):
        ValueError: `optimizer`: NaturalGradient cannot train this run, as what is trained is not the cores of...
    """
    asked = NaturalGradient() if optimizer is NaturalGradient else optimizer
    asked_natural = is_natural(optimizer)
    if asked_natural and is_asked_for_another:
        raise ValueError(
            "`learning_rate` and `scheduler` must be left out with NaturalGradient, which has neither. Set `kl` for "
            "the size of its steps, or take another optimiser."
        )
    reason = why_not_natural(model, parameters, objectives, mixed_precision)
    if asked_natural and reason:
        raise ValueError(
            f"`optimizer`: NaturalGradient cannot train this run, as {reason}. Leave `optimizer` out, or take another."
        )
    other = not asked_natural and (asked is not None or is_asked_for_another or reason is not None)
    if choose is not None and not callable(choose):
        raise TypeError(
            f"`choose` must be a function (history) -> index, got {choose!r}. Write one that returns an index of the "
            "history that it is given."
        )
    given = [name for name, value in (("max_retain_kl", max_retain_kl), ("choose", choose)) if value is not None]
    if other and given:
        raise ValueError(
            f"`{given[0]}` must be left out here, as only NaturalGradient keeps to it: "
            + (f"{reason}." if reason else "leave `optimizer`, `learning_rate` and `scheduler` out to train by it.")
        )
    if other:
        if asked is None and not is_asked_for_another and _is_adapted(model):
            mend = "Give a `learning_rate` where AdamW is meant."
            warnings.warn(f"AdamW trains instead of the natural gradient, as {reason}. {mend}", stacklevel=3)
        return None
    natural = asked if asked_natural else NaturalGradient()
    return natural if max_retain_kl is None else replace(natural, max_retain_kl=max_retain_kl)


def is_natural(optimizer: Any) -> bool:
    """Whether an optimiser is the natural gradient, with dials of its own or as the class.

    Examples:
        >>> is_natural(NaturalGradient), is_natural(NaturalGradient(kl=0.02)), is_natural(None)
        (True, True, False)
    """
    return optimizer is NaturalGradient or isinstance(optimizer, NaturalGradient)


def _is_adapted(model: nn.Module) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def trained_cores(
    model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> tuple[str, dict[str, tuple[SemuLayer, nn.Parameter]]] | None:
    """The adapter that is trained, and by parameter name its layers and cores; None where anything else is trained.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.training.parameters import trained_parameters
        >>> config = SemuConfig(target_modules=["0"], r=2, init_weights=False)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> adapter_name, cores = trained_cores(model, trained_parameters(model))
        >>> adapter_name, list(cores)
        ('default', ['base_model.model.0.semu_core.default.semu_core'])
    """
    owners = {
        id(layer.semu_core.stored_parameter(adapter_name)): (adapter_name, layer)
        for layer in model.modules()
        if isinstance(layer, SemuLayer) and "semu_core" in layer._modules  # a tied layer has its source's
        for adapter_name in layer.semu_core
    }
    found = [(name, *owners.get(id(core), (None, None)), core) for name, core in parameters.items()]
    adapters = {adapter_name for _, adapter_name, _, _ in found}
    if len(adapters) != 1 or None in adapters:
        return None
    return adapters.pop() or "", {name: (layer, core) for name, _, layer, core in found if layer is not None}


def why_not_natural(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    objectives: Iterable[Objective],
    mixed_precision: str | None,
) -> str | None:
    """Why a run cannot be trained by natural gradients; None where it can.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import CrossEntropy
        >>> layer = torch.nn.Linear(2, 2)
        >>> why_not_natural(layer, dict(layer.named_parameters()), [CrossEntropy()], None)
        'what is trained is not the cores of one SEMU adapter alone'
    """
    if trained_cores(model, parameters) is None:
        return "what is trained is not the cores of one SEMU adapter alone"
    for objective in objectives:
        if objective.distribution not in (None, "categorical", "gaussian"):
            return f"{objective.distribution!r} is no distribution of outputs: 'categorical' and 'gaussian' are known"
        if not _tells_outputs(objective):
            name = getattr(objective, "function", objective)
            return f"the objective {getattr(name, '__name__', type(name).__name__)} does not tell the model's outputs"
    if mixed_precision == "fp16":
        return "loss scaling in fp16 does not allow several evaluations a step"
    if any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
        return "DeepSpeed shards the cores"
    return None


def _tells_outputs(objective: Objective) -> bool:
    if isinstance(objective, WeightedSum):
        return objective.distribution is not None and all(_tells_outputs(term) for _, term in objective.terms)
    kind = type(objective)
    evaluates = kind.evaluate is not Objective.evaluate or kind.outputs is not Objective.outputs
    return objective.distribution is not None and evaluates
