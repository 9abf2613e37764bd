"""Which curvature trains a run by natural gradients, when it is taken, and the control of its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from semu_peft.gradients.core_rows import CaughtRows
from semu_peft.objectives.examples import count_examples

from .curvature import CoreSlot, Curvature, KroneckerFactors, WholeMatrix
from .natural import CurvatureKind, NaturalGradient
from .step_control import LevenbergMarquardt, StepControl, TrustRegion
from .trials import Tried

_REFRESH_WHOLE, _REFRESH_FACTORS, _AGAIN = 2, 4, 2  # steps
_WHOLE_UP_TO = 4096  # numbers; above it the matrix costs more than the model


def slots_of(cores: Mapping[str, nn.Parameter], caught: CaughtRows) -> list[CoreSlot]:
    """The places of cores, by the names of their layers, in the vector of all."""
    slots: list[CoreSlot] = []
    for name, core in cores.items():
        start = slots[-1].place.stop if slots else 0
        slots.append(CoreSlot(name, start, tuple(core.shape), name in caught))
    return slots


def is_whole_matrix(
    kind: CurvatureKind,
    slots: list[CoreSlot],
    start: Tried,
    mean_over_processes: Callable[[dict[str, float]], dict[str, float]],
) -> bool:
    """Whether to take the whole matrix: the cores are few enough, and the batches tell enough of them.

    A few texts do not, by whole text.
    """
    if kind != "auto":
        return kind == "whole"
    if slots[-1].place.stop > _WHOLE_UP_TO:
        return False
    told = [
        (output, term)
        for term, evaluation in start.terms
        if term.is_forget and term.objective.distribution == "categorical"
        for output in evaluation.outputs
    ]
    tokens = any(len(output.values) > (count_examples(term.batch) or 1) for output, term in told)
    return not mean_over_processes({"tokens": float(tokens)})["tokens"]  # of any process


def curvature_and_control(
    natural: NaturalGradient, slots: Iterable[CoreSlot], device: torch.device, *, is_whole: bool, enough: float
) -> tuple[Curvature, StepControl]:
    """Make them, as they are before the first step.

    Args:
        natural: The dials.
        slots: Of the cores.
        device: Where the curvature is computed.
        is_whole: Whether it is the whole matrix.
        enough: How forgotten is enough, in the unit of the loss.
    """
    if is_whole:
        return WholeMatrix(list(slots), natural.decay, device), LevenbergMarquardt(natural.kl, natural.damping)
    return KroneckerFactors(list(slots), natural.decay, device), TrustRegion(natural.kl, natural.damping, enough)


@dataclass(frozen=True)
class Refresh:
    """At which steps the curvature is taken anew.

    Attributes:
        every: Steps between two of them.
        again: One more step, early: the first ones move the most, and by one batch's curvature.
    """

    every: int = 1
    again: int = 0

    @classmethod
    def of(cls, natural: NaturalGradient, epoch: int, *, is_whole: bool) -> Refresh:
        """What the dials say; by default every two steps for the whole matrix, which has two on each batch.

        Factors have one: every four, or the next number that shares no factor with the steps of an `epoch` (0 of a
        stream), so that each of its batches has its turn.

        Examples:
            >>> [Refresh.of(NaturalGradient(), epoch, is_whole=False).every for epoch in (0, 1, 2, 5, 20, 30)]
            [4, 4, 5, 4, 7, 7]
            >>> Refresh.of(NaturalGradient(), 20, is_whole=True)
            Refresh(every=2, again=0)
            >>> Refresh.of(NaturalGradient(refresh=3), 3, is_whole=False)
            Refresh(every=3, again=0)
        """
        if natural.refresh is not None or is_whole:
            return cls(natural.refresh or _REFRESH_WHOLE)
        every = _REFRESH_FACTORS
        while math.gcd(every, epoch or 1) > 1:
            every += 1
        return cls(every, again=_AGAIN)

    def is_due(self, step: int) -> bool:
        """Whether a step, counted from 0, takes it anew.

        Examples:
            >>> [step for step in range(9) if Refresh(4, again=2).is_due(step)]
            [0, 2, 4, 8]
        """
        return step % self.every == 0 or step == self.again
