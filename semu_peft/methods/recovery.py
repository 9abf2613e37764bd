"""After forgetting: win back what it took along, without bringing back what is forgotten."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from semu_peft.objectives import CrossEntropy, KLToOriginal
from semu_peft.objectives.base import LossFunction
from semu_peft.objectives.retain import Retain
from semu_peft.training.unlearn import UnlearnResult, unlearn


def repair(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any],
    *,
    objective: LossFunction | None = None,
    hold_weight: float = 1.0,
    others: Sequence[Retain] = (),
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """Train a model that has forgotten on what it is to keep, `CE(R) + w KL(p₁ ‖ p)` on F, and hold F where it is.

    `p₁` is what the model says of the forget data when this begins. Fast forgetting does damage that retain data can
    undo; without the second term they would bring the forgotten back too. A copy of the model stays in memory for it.

    Source: this library; the impair-and-repair order is UNSIR's (Tarun et al. 2023, arXiv 2111.08947), which holds
    nothing.

    Args:
        model: The model as forgetting has left it, changed in place.
        forget: The forget batches, whose outputs stay as they are now.
        retain: Retain batches.
        objective: What to minimise on them; by default cross entropy.
        hold_weight: `w`.
        others: Further terms, such as the KL to the original on neutral text.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> _ = methods.neg_grad_plus(model, forget, max_steps=2, progress=False)
        >>> methods.repair(model, forget, retain, max_steps=2, progress=False).steps
        2
    """
    now = copy.deepcopy(model).requires_grad_(False).eval()
    held = [Retain(forget, KLToOriginal(reference=now), hold_weight), *others]
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    return unlearn(model, retain, objective or CrossEntropy(), retain=held, **said)
