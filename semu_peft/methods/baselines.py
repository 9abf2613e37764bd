"""Baselines and rivals for classifiers by their names: gradients of two signs, teachers, noise, penalties.

All take a model as it is to be trained (see [`minimise`][semu_peft.methods.sentence.minimise]).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor, nn

from semu_peft.objectives import (
    BoundaryShrink,
    CrossEntropy,
    EmbeddingReconstruction,
    GradientAscent,
    InTurns,
    KeepEmbeddings,
    KLToOriginal,
    OracleMatching,
    RepelEmbeddings,
    Retain,
    embedding_code,
    error_maximizing_noise,
    pair_with_logits,
    untrained,
)
from semu_peft.training.rules import Ramp, SoftThreshold
from semu_peft.training.unlearn import UnlearnResult, unlearn

from .sentence import RetainData, find_bases, keep, minimise


def neg_grad_plus(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    beta: float = 0.99,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """NegGrad+: descend on the retain data and ascend on the forget data, `β CE(R) − (1 − β) CE(F)`.

    Without retain data it is gradient ascent (NegGrad, GA), which is unbounded: stop it by `max_steps`. With
    `beta=0.5` it is, but for the learning rate, the gradient difference (GradDiff) of language models.

    Source: Kurmanji et al., NeurIPS 2023, arXiv 2302.09880, section 5; GA: Thudi et al. 2022, arXiv 2109.13398.

    Args:
        model: The model, changed in place.
        forget: The forget batches.
        retain: Retain batches.
        beta: `β`, the retain data's share.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> methods.neg_grad_plus(model, forget, retain, max_steps=2, progress=False).trainable_parameters
        15
    """
    objective = GradientAscent() if retain is None else (1 - beta) * GradientAscent()
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    return minimise(model, forget, objective, keep(retain, CrossEntropy(), beta), **said)


def fine_tune(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any],
    *,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """FT: go on training on the retain data alone, and trust that the rest is forgotten.

    Source: Warnecke et al., NDSS 2023, arXiv 2108.11577, as SalUn's baseline.

    Args:
        model: The model, changed in place.
        forget: The forget batches: where a SEMU adapter finds its bases, and of no use else.
        retain: Retain batches.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> methods.fine_tune(model, forget, retain, max_steps=2, progress=False).steps
        2
    """
    find_bases(model, forget, CrossEntropy(), progress=progress, adapter_name=adapter_name)
    return unlearn(model, retain, CrossEntropy(), progress=progress, adapter_name=adapter_name, **training)


def l1_sparse(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any],
    *,
    alpha: float = 5e-4,
    max_steps: int = 200,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """l1-sparse: train on the retain data with `γ ‖θ‖₁`, where γ falls from α to 0, and small weights become zero.

    The penalty is its proximal step after each of the optimiser's, at the learning rate of that step. It hardly forgets
    a class (see *The zoo*): it is made for random examples.

    Source: Jia et al., NeurIPS 2023, arXiv 2304.04934; there 10 epochs of SGD at 0.01.

    Args:
        model: The model, changed in place; bare, as an adapter's entries are not the weights.
        forget: Not used; that is the method.
        retain: Retain batches.
        alpha: `α`.
        max_steps: Steps, over which γ falls.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> methods.l1_sparse(model, forget, retain, max_steps=2, progress=False).steps
        2
    """
    rule = SoftThreshold(Ramp(alpha, 0.0, begin=0, end=max_steps), times_learning_rate=True)
    said: dict[str, Any] = {"epochs": max_steps, "progress": progress, "adapter_name": adapter_name, **training}
    return unlearn(model, retain, CrossEntropy(), rules=rule, max_steps=max_steps, **said)


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
    adapter_name: str | None = None,
    **training: Any,
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
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

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
    find_bases(model, forget, CrossEntropy(), progress=progress, adapter_name=adapter_name)
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    return unlearn(
        model, forget, InTurns(-original, away, period, until=max_epochs * period),
        retain=Retain(retain, InTurns(alpha * original + gamma * CrossEntropy(), towards, period, first=away)),
        max_steps=min_epochs * period, epochs=min_epochs * period, learning_rate=learning_rate, **said,
    )  # fmt: skip


def bad_teacher(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    reference: nn.Module | None = None,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """Bad teaching: as an untrained model on forget data, as the original on retain data, both by `KL(teacher ‖ p)`.

    Source: Chundawat et al., AAAI 2023, arXiv 2205.08096, eq. 3.

    Args:
        model: The model.
        forget: The forget batches.
        retain: The retain batches; the authors take 30% of them.
        teacher: The incompetent teacher; by default [`untrained`][semu_peft.objectives.teachers.untrained].
        reference: A frozen original; needed where plain weights are trained.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import copy, torch
        >>> from semu_peft import methods
        >>> model = nn.Linear(4, 3)
        >>> batches, kept = [(torch.randn(8, 4), torch.randint(3, (8,)))], copy.deepcopy(model)
        >>> methods.bad_teacher(model, batches, batches, reference=kept, max_steps=5, progress=False).steps
        5
    """
    incompetent = KLToOriginal(reference=untrained(model) if teacher is None else teacher)
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    return minimise(model, forget, incompetent, keep(retain, KLToOriginal(reference=reference)), **said)


def boundary_shrink(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    bound: float = 0.1,
    reference: nn.Module | None = None,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """Boundary shrink: every forget example becomes the wrong class nearest to it; no retain data.

    Source: Chen et al., CVPR 2023, arXiv 2303.11570, see
    [`BoundaryShrink`][semu_peft.objectives.boundary.BoundaryShrink].

    Args:
        model: The model.
        forget: The forget batches.
        retain: Batches whose cross entropy is added; the paper has none.
        bound: How far an input is moved to find the class.
        reference: A frozen original; needed where plain weights are trained.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import copy, torch
        >>> from semu_peft import methods
        >>> model, batches = nn.Linear(4, 3), [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> methods.boundary_shrink(model, batches, reference=copy.deepcopy(model), max_steps=5, progress=False).steps
        5
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    objective = BoundaryShrink(bound=bound, reference=reference)
    return minimise(model, forget, objective, keep(retain, CrossEntropy()), **said)


def unsir(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Collection[Any],
    *,
    impair_rate: float = 0.02,
    repair_rate: float = 0.01,
    seed: int = 0,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
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
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Returns:
        What the second epoch did.

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> model, batches = nn.Linear(4, 3), [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> methods.unsir(model, batches, batches, progress=False).steps
        1
    """
    find_bases(model, forget, CrossEntropy(), progress=progress, adapter_name=adapter_name)
    said: dict[str, Any] = {"epochs": 1, "progress": progress, "adapter_name": adapter_name, **training}
    noise = error_maximizing_noise(model, forget, seed=seed)
    kept = Retain(retain, CrossEntropy())
    unlearn(model, noise, CrossEntropy(), retain=kept, learning_rate=impair_rate, **said)
    return unlearn(model, retain, CrossEntropy(), learning_rate=repair_rate, **said)


def laf(
    model: nn.Module,
    forget: Collection[Any],
    retain: Collection[Any],
    *,
    layer: int | str,
    rank: int = 16,
    temperature: float = 20.0,
    reference: nn.Module | None = None,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """LAF: forget without labels, by what a feature extractor makes of the two kinds of data.

    In turns: the extractor's embeddings become such that a code of the retain data still fits theirs and one of the
    forget data no longer does; and those of the retain data are led back to the original's, away from which those of
    the forget data are led. Built from the equations, with linear codes instead of two variational autoencoders, turns
    of one step, and one optimiser. The head that is left on top has not seen any of this: LAF+R trains it anew on a few
    labels ([`fine_tune`][semu_peft.methods.baselines.fine_tune]). Take a LoRA or all weights: the leading directions of
    the forget embeddings' error are few, and a SEMU adapter in them alone may leave the class as it is.

    Source: Shen et al., ICLR 2024, arXiv 2404.00506; τ 5 or 20.

    Args:
        model: The model, changed in place.
        forget: The forget batches, with or without labels.
        retain: The retain batches.
        layer: The extractor's last layer, by its name or number.
        rank: Components of each code.
        temperature: `τ`.
        reference: A frozen original model, where the model is bare.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), SemuConfig(target_modules=["0"]))
        >>> forget, retain = [torch.randn(8, 4) + 3], [torch.randn(8, 4) - 3]  # no labels
        >>> methods.laf(model, forget, retain, layer="0", rank=2, max_steps=4, progress=False).steps
        4
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    own, kept = (EmbeddingReconstruction(layer, embedding_code(model, b, layer, rank=rank)) for b in (forget, retain))
    find_bases(model, forget, -own, progress=progress, adapter_name=adapter_name)
    keep_them = KeepEmbeddings(layer, reference)
    repel = RepelEmbeddings(layer, reference, temperature=temperature)
    terms = [Retain(retain, InTurns(kept)), Retain(retain, InTurns(keep_them, first=1))]
    return unlearn(model, forget, InTurns(-own) + InTurns(repel, first=1), retain=terms, **said)


def dmm(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    targets: Tensor,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """DMM, oracle matching: lead the logits to those of models that were retrained, or to a guess at them.

    `mean (z − t)²`; [`without_influence`][semu_peft.objectives.matching.without_influence] guesses by data attribution.

    Source: Georgiev et al., ICLR 2025, arXiv 2410.23232; Adam at 5e-4, five epochs.

    Args:
        model: The model, changed in place.
        forget: The forget batches, in the order of the targets; the authors put three times as many others to them.
        retain: Batches whose cross entropy is added.
        targets: `t`, a row an example, `(N, classes)`.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> model, oracle = nn.Sequential(nn.Linear(4, 3)), nn.Linear(4, 3)
        >>> forget = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))]
        >>> methods.dmm(model, forget, targets=oracle(forget[0][0]).detach(), max_steps=2, progress=False).steps
        2
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    pairs = pair_with_logits(forget, targets)
    return minimise(model, pairs, OracleMatching(), keep(retain, CrossEntropy()), **said)
