"""Published methods for classifiers by their names: each is one sentence of the rooms below.

All take a model as it is to be trained (see [`minimise`][semu_peft.methods.sentence.minimise]): with a SEMU adapter or
any other of PEFT's, or bare, so that all weights change; and batches `(inputs, labels)`, as a list or a loader.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn

from semu_peft.evaluation.classification import predict
from semu_peft.objectives import (
    AdversarialUnlearning,
    Attacker,
    CrossEntropy,
    DecoupledDistillation,
    KLToOriginal,
    RandomLabel,
    SimulatedRelearning,
    UnseenConfidence,
    adversarial_examples,
)
from semu_peft.objectives.adversarial import is_pair
from semu_peft.training.rules import Mask, gradients_of_parameters, top_fraction
from semu_peft.training.unlearn import UnlearnResult

from .sentence import RetainData, find_bases, keep, minimise


def semu(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    classes: Collection[int] | None = None,
    seed: int = 0,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """SEMU as published: random labels on the forget data, in the leading directions of their gradient.

    `ΔW = U R Vᵀ`, with `U` and `V` of the forget gradient's SVD and `R` trained from zero. With a bare model it is
    the baseline "random labels" (RL). Struck-out distillation in the same subspace keeps more of the other classes:
    see [`delete`][semu_peft.methods.classification.delete].

    Source: SEMU, arXiv 2502.07587, sections 3 and 4.

    Args:
        model: The model, changed in place.
        forget: The forget batches.
        retain: Batches whose cross entropy is added.
        classes: All classes that are to be forgotten, if there are several.
        seed: Of the labels.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), SemuConfig(target_modules=["0"]))
        >>> forget = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))]
        >>> methods.semu(model, forget, max_steps=2, progress=False).steps
        2
    """
    objective = RandomLabel(classes=classes, seed=seed)
    said: dict[str, Any] = {"seed": seed, "progress": progress, "adapter_name": adapter_name, **training}
    return minimise(model, forget, objective, keep(retain, CrossEntropy()), **said)


def delete(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    classes: Collection[int] | None = None,
    reference: nn.Module | None = None,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """DELETE: distil the original's own prediction with the true class struck out, `KL(softmax(z₀ | not y) ‖ p)`.

    It needs no retain data. In a SEMU adapter it is this library's default for a class.

    Source: Zhou et al., CVPR 2025, arXiv 2503.23751.

    Args:
        model: The model, changed in place.
        forget: The forget batches.
        retain: Batches whose cross entropy is added.
        classes: All classes that are to be forgotten, if there are several.
        reference: The original, frozen, where the model is bare; with an adapter it is the model without it.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from semu_peft import methods
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules=["0"]))
        >>> forget = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))]
        >>> methods.delete(model, forget, max_steps=2, progress=False).steps
        2
    """
    objective = DecoupledDistillation(reference, classes=classes)
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    return minimise(model, forget, objective, keep(retain, CrossEntropy()), **said)


def deep_delete(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Any,
    *,
    margin: float = 3.0,
    kl_weight: float = 10.0,
    attackers: Sequence[Attacker] = (Attacker(),),
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """Forget so that it stays forgotten: DELETE also at the weights that attackers would relearn, `L(W) + L(W + Δ)`.

    The KL to the original holds the retain data. For an adapter, whose model without it is the original.

    Source: this library, see *Attacks and deep forgetting* in the documentation; DELETE, arXiv 2503.23751.

    Args:
        model: The model with an adapter, changed in place.
        forget: The forget batches.
        retain: Retain batches: what attackers mix in, and what stays.
        margin: By how much a later change may lift the class before it shows.
        kl_weight: Of the KL on the retain data.
        attackers: Who is simulated.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), SemuConfig(target_modules=["0"]))
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> methods.deep_delete(model, forget, retain, max_steps=1, progress=False).steps
        1
    """
    shallow = DecoupledDistillation(margin=margin)
    deep = SimulatedRelearning(shallow, forget, retain, attackers)
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    find_bases(model, forget, shallow, progress=progress, adapter_name=adapter_name)
    return minimise(model, forget, deep, keep(retain, KLToOriginal(), kl_weight), **said)


def unseen_confidence(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    unseen: Iterable[Any],
    retain_weight: float = 4.0,
    reference: nn.Module | None = None,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """Make the model as sure of the forget examples as it is of data that it has never seen: for random examples.

    Source: this library; [`UnseenConfidence`][semu_peft.objectives.classification.UnseenConfidence] says how.

    Args:
        model: The model, changed in place.
        forget: The forget batches.
        retain: Batches whose cross entropy is added.
        unseen: Labelled batches that the model was not trained on.
        retain_weight: Of the retain data's cross entropy.
        reference: The original, frozen, where the model is bare.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), SemuConfig(target_modules=["0"]))
        >>> forget, unseen = ([(torch.randn(8, 4), torch.randint(3, (8,)))] for _ in range(2))
        >>> methods.unseen_confidence(model, forget, unseen=unseen, max_steps=2, progress=False).steps
        2
    """
    original = model if reference is None else reference
    given = {"unseen": unseen, "forget": forget}
    confidences, of_forget = (predict(original, each, progress=progress, name=name) for name, each in given.items())
    objective = UnseenConfidence(confidences.confidence, reference, forget_log_odds=of_forget.log_odds)
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    return minimise(model, forget, objective, keep(retain, CrossEntropy(), retain_weight), **said)


def salun(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    fraction: float = 0.5,
    classes: Collection[int] | None = None,
    seed: int = 0,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """SalUn: random labels, on the weights with the largest forget gradients alone; all others keep their bits.

    The mask is `|Σ ∇CE(F)|` in the global top fraction, and holds the optimiser's state and weight decay too, which
    the released code left free until 2026. Of a SEMU adapter it chooses among the core's entries.

    Source: Fan et al., ICLR 2024, arXiv 2310.12508; there 10 epochs of SGD at 0.013 on CIFAR-10.

    Args:
        model: The model, changed in place.
        forget: The forget batches.
        retain: Batches whose cross entropy is added.
        fraction: The share of entries that may change.
        classes: All classes that are to be forgotten, if there are several.
        seed: Of the labels.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> before = model[0].weight.clone()
        >>> _ = methods.salun(model, forget, retain, fraction=0.2, max_steps=2, progress=False)
        >>> int((model[0].weight != before).sum()) <= 3
        True
    """
    objective = RandomLabel(classes=classes, seed=seed)
    find_bases(model, forget, objective, progress=progress, adapter_name=adapter_name)
    saliency = gradients_of_parameters(model, forget, CrossEntropy(), progress=progress)
    rule = Mask(top_fraction({name: gradient.abs() for name, gradient in saliency.items()}, fraction))
    said: dict[str, Any] = {"seed": seed, "progress": progress, "adapter_name": adapter_name, **training}
    return minimise(model, forget, objective, keep(retain, CrossEntropy()), rules=rule, **said)


def amun(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    radius: float = 0.1,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """AMUN: learn the forget examples beside their nearest neighbours that the model takes for another class.

    `½ CE(x, y) + ½ CE(x′, y′)`, and cross entropy on retain data. Their confidence falls to that of unseen data. For
    random examples, which stay right; it does not strike out a class.

    Source: Ebrahimpour-Boroojeny et al., ICML 2025.

    Args:
        model: A classifier, changed in place.
        forget: The forget batches; inputs are floating-point numbers. Or pairs of them and their neighbours, as
            [`adversarial_examples`][semu_peft.objectives.adversarial.adversarial_examples] makes them: found once, or
            in larger batches than those that are learned.
        retain: Batches whose cross entropy is added.
        radius: Where the search for neighbours begins.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> methods.amun(model, forget, retain, max_steps=2, progress=False).steps
        2
    """
    batches = list(forget)
    is_found = bool(batches) and all(map(is_pair, batches))
    pairs = batches if is_found else adversarial_examples(model, batches, radius=radius)
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    return minimise(model, pairs, AdversarialUnlearning(), keep(retain, CrossEntropy()), **said)
