"""Attacks that change no weight: other inputs, and the adapter switched off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from semu_peft.arguments import check_model, check_number
from semu_peft.gates import GatedModel, Intervention
from semu_peft.objectives.adapter_parts import all_parts
from semu_peft.objectives.batches import check_batches
from semu_peft.objectives.original import original
from semu_peft.tuner.layer import SemuLayer

from .knowledge import Measure, accuracy

_LABELS = ("labels", "label", "attention_mask")


@dataclass(frozen=True)
class InputAttack:
    """What a change of the inputs brings back.

    Attributes:
        change: What was done to the inputs.
        forget: How much of what was forgotten is known, without and with the change, in percent; the most over the
            seeds.
        reference: The same of the retrained model.

    Examples:
        >>> InputAttack("noise of 0.1", (0.0, 2.5))
        InputAttack(noise of 0.1: forgotten 0.0 → 2.5)
    """

    change: str
    forget: tuple[float, float]
    reference: tuple[float, float] | None = None

    @property
    def row(self) -> tuple[str, str, str]:
        """The attack, what it found, and what it found of the reference."""
        other = "" if self.reference is None else f"forgotten {self.reference[0]:.1f} → {self.reference[1]:.1f}"
        return f"inputs: {self.change}", f"forgotten {self.forget[0]:.1f} → {self.forget[1]:.1f}", other

    def __repr__(self) -> str:
        other = "" if self.reference is None else f"; reference {self.reference[0]:.1f} → {self.reference[1]:.1f}"
        return f"InputAttack({self.change}: forgotten {self.forget[0]:.1f} → {self.forget[1]:.1f}{other})"


@dataclass(frozen=True)
class Stripping:
    """What somebody gets who switches the adapter off.

    Attributes:
        adapters: The adapters that can be switched off, of several those without which most is known; none where they
            are merged.
        forget: How much of what was forgotten is known, with them and without, in percent.
        gate: What opens and closes them, or changes the model while it is called, if anything does.

    Examples:
        >>> Stripping((), (0.0, 0.0)).is_removal
        True
        >>> Stripping(("default",), (0.0, 98.0))
        Stripping(forgotten 0.0 → 98.0 without 'default': an adapter that can be switched off is not removal; merge it,
        `model = model.merge_and_unload()`, and give away that)
    """

    adapters: tuple[str, ...]
    forget: tuple[float, float]
    gate: str | None = None

    @property
    def is_removal(self) -> bool:
        """Whether there is nothing to switch off."""
        return not self.adapters and self.gate is None

    @property
    def row(self) -> tuple[str, str, str]:
        """The attack, what it found, and nothing of a reference, which has no adapter."""
        return "stripping: the adapter switched off", self._found(), ""

    def _found(self) -> str:
        if self.is_removal:
            return "no adapter to switch off: what is forgotten is out of the weights that are given away"
        names = ", ".join(repr(name) for name in self.adapters)
        if self.gate is not None:
            return (
                f"forgotten {self.forget[0]:.1f} → {self.forget[1]:.1f} without the {self.gate}"
                f"{' of ' + names if names else ''}: a gate hides and does not remove; whoever holds the weights takes "
                "it off"
            )
        return (
            f"forgotten {self.forget[0]:.1f} → {self.forget[1]:.1f} without {names}: an adapter that can be switched "
            "off is not removal; merge it, `model = model.merge_and_unload()`, and give away that"
        )

    def __repr__(self) -> str:
        return f"Stripping({self._found()})"


def stripping(model: nn.Module, forget: Iterable[Any], *, measure: Measure = accuracy) -> Stripping:
    """Switch the adapters off, as anyone can who has the model with its adapter beside the weights.

    Of several that is tried with all, with SEMU's alone, as another may be what the model knows by, and with each.
    A model behind a [gate][semu_peft.gates.intervention.Intervention] is taken from behind it.

    Args:
        model: The unlearned model as it is to be given away.
        forget: Batches of what was forgotten.
        measure: `(model, batches) -> percent`; by default the accuracy.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import stripping
        >>> stripping(torch.nn.Linear(2, 2), [(torch.eye(2), torch.tensor([0, 1]))]).adapters
        ()
    """
    check_model(model)
    check_batches(forget, "forget")
    batches = list(forget)
    now = measure(model, batches)
    if isinstance(model, Intervention):
        gated = tuple(sorted(model.adapter_names)) if isinstance(model, GatedModel) else ()
        return Stripping(gated, (now, measure(model.base, batches)), gate=type(model).__name__)
    parts = [part for part in all_parts(model) if not part.is_merged]
    every, ours = (
        tuple(sorted({part.adapter_name for part in some}))
        for some in (parts, [part for part in parts if isinstance(part.layer, SemuLayer)])
    )
    if not every:
        return Stripping((), (now, now))
    sets = dict.fromkeys(names for names in (every, ours, *zip(every, strict=True)) if names)  # of one adapter, one
    tried = {names: _without(model, names, batches, measure) for names in sets}
    best = max(tried, key=lambda names: tried[names])
    return Stripping(best, (now, tried[best]))


def _without(model: nn.Module, names: Sequence[str], batches: list[Any], measure: Measure) -> float:
    with ExitStack() as stack:
        for name in names:
            model = stack.enter_context(original(model, name))
        return measure(model, batches)


def noisy_inputs(
    model: nn.Module,
    forget: Iterable[Any],
    *,
    scale: float = 0.1,
    seeds: Iterable[int] = (0, 1, 2),
    reference: nn.Module | None = None,
    measure: Measure = accuracy,
) -> InputAttack:
    """Add Gaussian noise to the inputs, `scale` times their own standard deviation, and take the best of some seeds.

    Args:
        model: The unlearned model.
        forget: Batches of what was forgotten, with floating-point inputs.
        scale: Of the noise.
        seeds: Of the draws.
        reference: The retrained model.
        measure: `(model, batches) -> percent`; by default the accuracy.

    Raises:
        ValueError: There is nothing in the batches that noise could be added to.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import noisy_inputs
        >>> noisy_inputs(torch.nn.Identity(), [(torch.eye(2), torch.tensor([0, 0]))], scale=0.01)
        InputAttack(noise of 0.01: forgotten 50.0 → 50.0)
    """
    check_number("scale", scale, low=0)
    check_batches(forget, "forget")
    batches = list(forget)
    variants = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        variants.append([_changed(batch, lambda x, draw=generator: _noisy(x, scale, draw)) for batch in batches])
    if not variants:
        raise ValueError("`seeds` must hold at least one, got none. Write `[0]`.")
    return _input_attack(f"noise of {scale:g}", model, batches, variants, reference, measure)


def flipped_inputs(
    model: nn.Module, forget: Iterable[Any], *, reference: nn.Module | None = None, measure: Measure = accuracy
) -> InputAttack:
    """Turn the images left to right.

    Args:
        model: The unlearned model.
        forget: Batches of what was forgotten, images `(N, C, H, W)`.
        reference: The retrained model.
        measure: `(model, batches) -> percent`; by default the accuracy.

    Raises:
        ValueError: There are no images in the batches.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import flipped_inputs
        >>> flipped_inputs(torch.nn.Flatten(), [(torch.eye(2).view(2, 1, 1, 2), torch.tensor([0, 0]))])
        InputAttack(flipped: forgotten 50.0 → 50.0)
    """
    check_batches(forget, "forget")
    batches = list(forget)
    variants = [[_changed(batch, lambda x: x.flip(3) if x.dim() == 4 else None) for batch in batches]]
    return _input_attack("flipped", model, batches, variants, reference, measure)


def _input_attack(
    change: str, model: nn.Module, batches: list[Any], variants: list[list[Any]], reference: nn.Module | None,
    measure: Measure,
) -> InputAttack:  # fmt: skip
    check_model(model)
    if reference is not None:
        check_model(reference, "reference")

    def worst(attacked: nn.Module) -> tuple[float, float]:
        return measure(attacked, batches), max(measure(attacked, variant) for variant in variants)

    return InputAttack(change, worst(model), None if reference is None else worst(reference))


def _noisy(x: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(x.shape, generator=generator).to(x)
    return x + scale * x.std() * noise


def _changed(batch: Any, change: Any) -> Any:
    """The batch with its floating-point inputs changed; labels stay.

    Raises:
        ValueError: Nothing in it changes.
    """
    if isinstance(batch, Mapping):
        changed = {
            key: new
            for key, value in batch.items()
            if key not in _LABELS and _is_input(value) and (new := change(value)) is not None
        }
        if changed:
            return {**batch, **changed}
    elif isinstance(batch, (tuple, list)):
        inputs = [change(value) if _is_input(value) else None for value in batch[:-1]]
        if any(value is not None for value in inputs):
            kept = [old if new is None else new for old, new in zip(batch[:-1], inputs, strict=True)]
            return (*kept, batch[-1])
    raise ValueError(
        f"`forget` must give batches with floating-point inputs that can be changed so, got {type(batch).__name__}. "
        "Leave this attack out for inputs of another kind."
    )


def _is_input(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
