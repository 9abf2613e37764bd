"""Published methods for classifiers by their names: each is one sentence of the rooms below.

They train what is trainable in the model: an adapter of any PEFT method, or plain weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from semu_peft.objectives import (
    BoundaryShrink,
    CrossEntropy,
    GradientAscent,
    InTurns,
    KLToOriginal,
    Retain,
    error_maximizing_noise,
    untrained,
)
from semu_peft.training.unlearn import UnlearnResult, unlearn


def scrub(
    model: nn.Module,
    forget: Collection[Any],
    retain: Collection[Any],
    *,
    reference: nn.Module | None = None,
    max_epochs: int = 2,
    min_epochs: int = 3,
    alpha: float = 0.001,
    gamma: float = 0.99,
    learning_rate: float = 5e-4,
    progress: bool = True,
) -> UnlearnResult:
    """SCRUB: away from the original on forget data, then towards it and the labels on retain data, in turns.

    Passes over the forget batches that raise `KL(p₀ ‖ p)` alternate with passes over the retain batches that lower
    `α KL(p₀ ‖ p) + γ CE`; the last passes only lower.

    Source: Kurmanji et al., NeurIPS 2023, arXiv 2302.09880, eq. 3 and algorithm 1, without the rewinding.

    Args:
        model: The model.
        forget: The forget batches; a loader that knows its length.
        retain: The retain batches, likewise.
        reference: A frozen original; needed where plain weights are trained.
        max_epochs: In how many epochs the forget batches are gone through.
        min_epochs: How many epochs there are.
        alpha: α.
        gamma: γ.
        learning_rate: Of AdamW.
        progress: Show a progress bar.

    Examples:
        >>> import copy, torch
        >>> from semu_peft import methods
        >>> model = nn.Linear(4, 3)
        >>> forget, retain = ([(torch.randn(8, 4), torch.randint(3, (8,)))] * n for n in (1, 2))
        >>> methods.scrub(model, forget, retain, reference=copy.deepcopy(model), progress=False).steps  # 3 times 1 + 2
        9
    """
    away, towards, period = len(forget), len(retain), len(forget) + len(retain)
    original = KLToOriginal(reference=reference)
    return unlearn(
        model, forget, InTurns(-original, away, period, until=max_epochs * period),
        retain=Retain(retain, InTurns(alpha * original + gamma * CrossEntropy(), towards, period, first=away)),
        max_steps=min_epochs * period, epochs=min_epochs * period, learning_rate=learning_rate, progress=progress,
    )  # fmt: skip


def bad_teacher(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    reference: nn.Module | None = None,
    **options: Any,
) -> UnlearnResult:
    """Bad teaching: as an untrained model on forget data, as the original on retain data, both by `KL(teacher ‖ p)`.

    Source: Chundawat et al., AAAI 2023, arXiv 2205.08096, eq. 3.

    Args:
        model: The model.
        forget: The forget batches.
        retain: The retain batches; the authors take 30% of them.
        teacher: The incompetent teacher; by default [`untrained`][semu_peft.objectives.teachers.untrained].
        reference: A frozen original; needed where plain weights are trained.
        options: What else [`unlearn`][semu_peft.training.unlearn.unlearn] is to be told.

    Examples:
        >>> import copy, torch
        >>> from semu_peft import methods
        >>> model = nn.Linear(4, 3)
        >>> batches, kept = [(torch.randn(8, 4), torch.randint(3, (8,)))], copy.deepcopy(model)
        >>> methods.bad_teacher(model, batches, batches, reference=kept, max_steps=5, progress=False).steps
        5
    """
    incompetent = KLToOriginal(reference=untrained(model) if teacher is None else teacher)
    return unlearn(model, forget, incompetent, retain=Retain(retain, KLToOriginal(reference=reference)), **options)


def boundary_shrink(
    model: nn.Module, forget: Iterable[Any], *, bound: float = 0.1, reference: nn.Module | None = None, **options: Any
) -> UnlearnResult:
    """Boundary shrink: every forget example becomes the wrong class nearest to it; no retain data.

    Source: Chen et al., CVPR 2023, arXiv 2303.11570, see
    [`BoundaryShrink`][semu_peft.objectives.boundary.BoundaryShrink].

    Args:
        model: The model.
        forget: The forget batches.
        bound: How far an input is moved to find the class.
        reference: A frozen original; needed where plain weights are trained.
        options: What else [`unlearn`][semu_peft.training.unlearn.unlearn] is to be told.

    Examples:
        >>> import copy, torch
        >>> from semu_peft import methods
        >>> model, batches = nn.Linear(4, 3), [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> methods.boundary_shrink(model, batches, reference=copy.deepcopy(model), max_steps=5, progress=False).steps
        5
    """
    return unlearn(model, forget, BoundaryShrink(bound=bound, reference=reference), **options)


def neg_grad_plus(
    model: nn.Module, forget: Iterable[Any], retain: Iterable[Any], *, beta: float = 0.99, **options: Any
) -> UnlearnResult:
    """NegGrad+: `β CE(retain) − (1 − β) CE(forget)`.

    Unbounded below: say how many steps.

    Source: Kurmanji et al., NeurIPS 2023, arXiv 2302.09880, section 5.

    Args:
        model: The model.
        forget: The forget batches.
        retain: The retain batches.
        beta: β.
        options: What else [`unlearn`][semu_peft.training.unlearn.unlearn] is to be told.

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> model, batches = nn.Linear(4, 3), [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> methods.neg_grad_plus(model, batches, batches, max_steps=5, progress=False).steps
        5
    """
    kept = Retain(retain, CrossEntropy(), weight=beta)
    return unlearn(model, forget, (1 - beta) * GradientAscent(), retain=kept, **options)


def unsir(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Collection[Any],
    *,
    impair_rate: float = 0.02,
    repair_rate: float = 0.01,
    seed: int = 0,
    progress: bool = True,
) -> UnlearnResult:
    """UNSIR: impair by one epoch on error-maximising noise beside retain data, repair by one on retain data alone.

    Source: Tarun et al. 2023, arXiv 2111.08947; rates of its code.

    Args:
        model: The model.
        forget: The forget batches, of whole classes; only their labels and shapes are read.
        retain: The retain batches.
        impair_rate: Learning rate of the first epoch.
        repair_rate: Learning rate of the second.
        seed: Seed of the noise.
        progress: Show progress bars.

    Returns:
        What the second epoch did.

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> model, batches = nn.Linear(4, 3), [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> methods.unsir(model, batches, batches, progress=False).steps
        1
    """
    noise = error_maximizing_noise(model, forget, seed=seed)
    kept = Retain(retain, CrossEntropy())
    unlearn(model, noise, CrossEntropy(), retain=kept, epochs=1, learning_rate=impair_rate, progress=progress)
    return unlearn(model, retain, CrossEntropy(), epochs=1, learning_rate=repair_rate, progress=progress)
