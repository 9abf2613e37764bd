"""Relearning: how fast does it come back when somebody trains the model on a few examples?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from semu_peft.arguments import check_count, check_kind, check_model, check_number, check_switch
from semu_peft.objectives.attackers import Attacker, Relearner, flip
from semu_peft.objectives.base import LossFunction, as_objective
from semu_peft.objectives.classification import CrossEntropy
from semu_peft.objectives.examples import Examples

from .classification import DivergedError
from .knowledge import Measure, accuracy

STEPS = (0, 5, 10, 20, 50)


@dataclass(frozen=True)
class RelearningCurve:
    """What one attacker brought back, step by step, beside the retrained model under the same attack.

    Attributes:
        attacker: The attacker in words.
        steps: After how many steps it was measured; the first is 0.
        forget: How much of what was forgotten is known then, in percent, on examples that the attacker did not have,
            unless he had all there are.
        retain: How much of the rest; empty where there is none.
        reference: The curve of the retrained model, or of another that never knew.
        half: What counts as back, in percent; where it is not 50, the curve's text says so.
        hold: An attack counts only while this share of the retained knowledge of its start is left: training on forget
            examples alone makes any model answer the one class for everything. Where steps are passed over for that,
            the curve's text says so.
        seen: Whether the attacker had the very examples that were measured.
        area: The mean of the forget curve over its steps, in percent (the trapezoid rule): 0 is a model that stays.
        steps_to_half: After how many steps it was back for the first time, the rest being held; None where it was not.

    Examples:
        >>> gold = RelearningCurve("SGD 0.01", (0, 5, 10, 50), (0.0, 0.0, 0.0, 60.0), (97.0, 97.0, 96.0, 95.0))
        >>> RelearningCurve("SGD 0.01", (0, 5, 10, 50), (0.0, 80.0, 90.0, 95.0), (97.0, 96.0, 96.0, 95.0), gold)
        RelearningCurve(SGD 0.01: 0.0 → 95.0 in 50 steps, half back after 5, area 86.5; reference after 50, area 24.0;
        retained 97.0 → 95.0)
    """

    attacker: str
    steps: tuple[int, ...]
    forget: tuple[float, ...]
    retain: tuple[float, ...] = ()
    reference: RelearningCurve | None = field(default=None, repr=False)
    half: float = 50.0
    hold: float = 0.8
    seen: bool = False
    area: float = field(init=False, repr=False, compare=False)
    steps_to_half: int | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Fields and no properties, so that a report has them too."""
        object.__setattr__(self, "area", self._area())
        object.__setattr__(self, "steps_to_half", self._steps_to_half())

    def _area(self) -> float:
        if len(self.steps) < 2:
            return self.forget[0]
        pairs = zip(self.steps, self.steps[1:], self.forget, self.forget[1:], strict=False)
        return sum((end - start) * (low + high) / 2 for start, end, low, high in pairs) / self.steps[-1]

    def _steps_to_half(self) -> int | None:
        kept = self.retain or (math.inf,) * len(self.steps)
        least = self.hold * kept[0] if self.retain else -math.inf
        found = zip(self.steps, self.forget, kept, strict=True)
        return next((step for step, known, held in found if known >= self.half and held >= least), None)

    def _back(self) -> str:
        """When half was back, and what was asked for that, where a step with half of it was passed over."""
        first = next((step for step, known in zip(self.steps, self.forget, strict=True) if known >= self.half), None)
        back = "never" if self.steps_to_half is None else f"after {self.steps_to_half}"
        return back if first == self.steps_to_half else f"{back} while {self.hold:.0%} of the rest is kept"

    @property
    def row(self) -> tuple[str, str, str]:
        """The attack, what it found, and what it found of the reference."""
        kept = f"; retained {self.retain[0]:.1f} → {self.retain[-1]:.1f}" if self.retain else ""
        reference = "" if self.reference is None else self.reference._found()
        own = "; measured on the attacker's own examples, as there are no others" if self.seen else ""
        return f"relearning: {self.attacker}", self._found() + kept + own, reference

    def _found(self) -> str:
        ends = f"{self.forget[0]:.1f} → {self.forget[-1]:.1f} in {self.steps[-1]} steps"
        midway = ", midway from the start to 100" if self.half == _midway(self.forget) else ""
        at = "" if self.half == 50 else f" (at {self.half:.1f}{midway})"
        return f"{ends}, half back{at} {self._back()}, area {self.area:.1f}"

    def __repr__(self) -> str:
        other = self.reference
        beside = "" if other is None else f"; reference {other._back()}, area {other.area:.1f}"
        kept = f"; retained {self.retain[0]:.1f} → {self.retain[-1]:.1f}" if self.retain else ""
        return f"RelearningCurve({self.attacker}: {self._found()}{beside}{kept})"


def usual_attackers(head: str | None = None, *, images: bool = True) -> list[Attacker]:
    """The attackers that a claim of deep forgetting should stand: SGD at two rates, Adam, the head alone, with flips.

    Args:
        head: The name of the last layer; without one that attacker is left out.
        images: Whether there are images to be flipped.

    Examples:
        >>> from semu_peft.evaluation import usual_attackers
        >>> [attacker.label for attacker in usual_attackers("classifier")][:2]
        ['SGD 0.01, 20 examples', 'SGD 0.001, 20 examples']
    """
    attackers = [Attacker("sgd", 1e-2, steps=50), Attacker("sgd", 1e-3, steps=200), Attacker("adam", 1e-3, steps=50)]
    if head is not None:
        attackers.append(Attacker("adam", 1e-3, steps=50, layers=head))
    if images:
        attackers.append(Attacker("sgd", 1e-2, steps=50, augment=flip))
    return attackers


def relearning(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any] | None = None,
    *,
    attacker: Attacker | None = None,
    reference: nn.Module | None = None,
    learn: LossFunction | None = None,
    measure: Measure = accuracy,
    forget_test: Iterable[Any] | None = None,
    retain_test: Iterable[Any] | None = None,
    steps: Sequence[int] | None = None,
    half: float | None = 50.0,
    seed: int = 0,
    progress: bool = True,
) -> RelearningCurve:
    """Train a copy of the weights on a few examples, as an attacker would, and measure what comes back.

    A model whose forgetting is a silenced output gives it back in five or ten steps; one that was retrained has to
    learn it. So the curve means something only beside the `reference` under the same attack, with the same examples.
    The model itself is not written: it is bit for bit what it was.

    Args:
        model: The unlearned model, with its adapter or merged.
        forget: Batches of which the attacker has some examples: what was forgotten, or *related* data, with
            `forget_test` the forgotten.
        retain: Batches of other data.
        attacker: Who attacks; by default SGD at 1e-2 for 50 steps on 20 forgotten and 60 other examples.
        reference: The model retrained without the forget set, or another that never knew it.
        learn: What the attacker minimises; by default cross entropy. For denoisers, `DenoisingLoss(scheduler)`.
        measure: `(model, batches) -> percent`; by default the accuracy.
        forget_test: What is measured; by default the forget examples that the attacker does not have.
        retain_test: What is measured of the rest; by default `retain`.
        steps: When it is measured, beside the first and the last step of the attacker; later ones are passed over. By
            default at 0, 5, 10, 20, 50, …
        half: What counts as back, in percent; None is midway from where the model starts to 100, and for the reference
            from where that one starts. So it is for a share of what the original does
            ([`LossOfOriginal`][semu_peft.evaluation.knowledge.LossOfOriginal]), which no model begins at 0.
        seed: Seed of the attacker's draws.
        progress: Show a progress bar.

    Returns:
        The curve.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: There is no example or no weight to train, or the model is sharded.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import relearning
        >>> from semu_peft.objectives import Attacker
        >>> model = torch.nn.Linear(2, 2)
        >>> forget = [(torch.tensor([[4.0, 0.0]] * 30), torch.zeros(30).long())]
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))  # takes the class for the other one
        >>> relearning(model, forget, attacker=Attacker("sgd", 0.1, steps=5), progress=False).steps_to_half
        5
    """
    check_model(model)
    attacker = Attacker(steps=STEPS[-1]) if attacker is None else attacker
    check_kind("attacker", attacker, Attacker, "an `Attacker`", "Write `Attacker('sgd', 1e-2)`.")
    if reference is not None:
        check_model(reference, "reference")
    check_count("seed", seed, least=0)
    if half is not None:
        check_number("half", half, low=0)
    check_switch("progress", progress)
    pools = Examples(forget, "forget"), None if retain is None else Examples(retain, "retain")
    tests = [None if each is None else list(each) for each in (forget_test, retain_test)]
    if tests[0] == []:
        raise ValueError("`forget_test` must give at least one batch, got none. Check that it has not been used up.")
    for step in steps or ():
        check_count("steps", step, least=0)
    at = _when(attacker.steps, steps)
    loss = CrossEntropy() if learn is None else as_objective(learn)

    def curve(attacked: nn.Module, name: str, beside: RelearningCurve | None) -> RelearningCurve:
        generator = torch.Generator().manual_seed(seed)
        relearner = Relearner(attacked, attacker, *pools, loss, generator)
        left = pools[0].without(relearner.rows)
        seen = not left and tests[0] is None
        on_forget = pools[0].batches_of(left or pools[0].rows, size=256) if tests[0] is None else tests[0]
        on_retain = (pools[1].batches if pools[1] else []) if tests[1] is None else tests[1]
        sides = [side for side in (on_forget, on_retain) if side]

        begun: list[bool] = []

        def known(changed: nn.Module) -> list[float]:
            finite = [value.isfinite().all().to(relearner.device) for value in relearner.values]
            destroyed = [0.0] * len(sides)  # the attack has diverged: nothing is known, of the rest neither
            if not torch.stack(finite).all():  # looked at together: a GPU is waited for once
                return destroyed
            try:
                return [measure(changed, side) for side in sides]
            except DivergedError:  # weights that are finite may overflow, in half precision first
                if not begun:
                    raise
                return destroyed
            finally:
                begun.append(True)

        loss_state = loss.state_dict()
        try:
            found = relearner.curve(at, known, name if progress else None)
        finally:  # a loss may draw, and is the caller's
            loss.load_state_dict(loss_state)
        of_forget, *of_retain = zip(*found, strict=True)
        had = dataclasses.replace(attacker, forget_examples=len(relearner.rows))
        kept = of_retain[0] if of_retain else ()
        back = _midway(of_forget) if half is None else half
        return RelearningCurve(had.label, at, of_forget, kept, beside, back, seen=seen)

    gold = None if reference is None else curve(reference, "reference relearns", None)
    return curve(model, "relearns", gold)


def _midway(forget: Sequence[float]) -> float:
    return (forget[0] + 100) / 2


def _when(last: int, steps: Sequence[int] | None) -> tuple[int, ...]:
    usual = [*STEPS, *(100 * 2**k for k in range(10))]
    return tuple(sorted({0, last, *(step for step in (usual if steps is None else steps) if step <= last)}))
