"""Published methods whose word is what a step may do: each is one sentence of the rooms below.

Made for language models, and for any model that gives logits. Where one takes an `objective`, NPO is its default.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any, Literal

from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.optim import SGD

from semu_peft.gradients.covariance import LayerCovariance
from semu_peft.gradients.gather import gather
from semu_peft.objectives import (
    NPO,
    BreakActivations,
    CrossEntropy,
    GradientAscent,
    PerturbedLatents,
)
from semu_peft.objectives.base import LossFunction
from semu_peft.training.parameters import only_these_train
from semu_peft.training.rules import (
    Mask,
    RemoveDirections,
    RemoveLeading,
    RetainSafe,
    SharpnessAware,
    gradients_of_parameters,
    top_fraction,
    wagle_scores,
)
from semu_peft.training.unlearn import UnlearnResult, unlearn

from .sentence import RetainData, covariance_targets, find_bases, keep, minimise


def repselect(
    model: nn.Module,
    forget: Collection[Any],
    *,
    target_modules: list[str] | str,
    learning_rate: float,
    elicitation_rate: float = 0.05,
    r: int = 8,
    rank: int = 512,
    mode: Literal["soft", "hard", "quadratic"] = "soft",
    progress: bool = True,
) -> UnlearnResult:
    """RepSelect: one step up the forget loss, of the weights themselves, without the directions that all data share.

    A throw-away LoRA first learns the forget data, which brings out what the model only half remembers. With it in
    place, and frozen, the gradient of the weights is taken over the whole forget set; its leading directions are made
    small, the weights take one step, and the LoRA is dropped. Call it again until the damage that you measure on other
    text is what you allow; the authors repeat it until 0.01 nats. No retain data are needed.

    To have the same choice of directions as an adapter, see `skip_leading` of
    [`initialize_semu_weights`][semu_peft.subspace.initialize.initialize_semu_weights].

    Source: RepSelect, arXiv 2606.17168; settings of its code but for `elicitation_rate`, which is searched there.

    Args:
        model: The model, without adapters, whose weights are changed in place.
        forget: The forget set: a list of batches, or a loader that knows its length.
        target_modules: The layers to change; the paper takes all linear layers of the MLPs.
        learning_rate: Of the step.
        elicitation_rate: Of the LoRA's epoch of plain SGD.
        r: The LoRA's rank.
        rank: How many leading directions to make small.
        mode: How, see [`RemoveLeading`][semu_peft.training.rules.leading.RemoveLeading].
        progress: Show progress bars.

    Returns:
        What the step of the weights did.

    Raises:
        ValueError: No layer matches, or a loss is not finite; the LoRA is gone in any case.

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> forget = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
        >>> methods.repselect(model, forget, target_modules=["0"], learning_rate=0.1, rank=2, progress=False).steps
        1
    """
    with only_these_train(model, ()):  # the flags come back as they were
        elicited = get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules=target_modules), "elicitation")
        try:
            slow, fast = (partial(SGD, lr=rate) for rate in (learning_rate, elicitation_rate))
            unlearn(elicited, forget, CrossEntropy(), optimizer=fast, epochs=1, progress=progress)
            layers: list[Any] = [module for module in elicited.modules() if isinstance(module, BaseTunerLayer)]
            with only_these_train(elicited, [layer.get_base_layer().weight for layer in layers]):
                return unlearn(
                    elicited, forget, GradientAscent(), rules=RemoveLeading(rank, mode), optimizer=slow,
                    gradient_accumulation_steps=len(forget), max_steps=1, progress=progress,
                )  # fmt: skip
        finally:
            elicited.unload()


def gu(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Any,
    *,
    objective: LossFunction | None = None,
    memory: int = 8,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """GU: no step raises the retain loss to first order, whatever the optimiser made of the gradient.

    `Δ = argmin ‖Δ − Δ₀‖_M` with `⟨g_r, Δ⟩ ≤ 0`, in the optimiser's metric; the retain data are no term of the loss.

    Source: Zhou et al. 2025, arXiv 2511.17100, one-sided as its code is now.

    Args:
        model: The model, changed in place.
        forget: The forget batches.
        retain: Retain batches, whose cross entropy does not rise.
        objective: What to minimise on the forget data; by default NPO.
        memory: Of how many steps the retain gradients are constraints.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), SemuConfig(target_modules=["0"]))
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> methods.gu(model, forget, retain, max_steps=2, progress=False).steps
        2
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    return minimise(
        model, forget, objective or NPO(), keep(retain, CrossEntropy(), 0.0), rules=RetainSafe(memory), **said
    )


def npo_sam(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    objective: LossFunction | None = None,
    radius: float = 0.01,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """NPO+SAM: gradients at the worst point of a ball, so that what is forgotten lies in a flat place.

    `∇L(θ + ρ ∇L / ‖∇L‖)`.

    Source: Fan et al. 2025, arXiv 2502.05374; ρ 0.01.

    Args:
        model: The model, changed in place.
        forget: The forget batches.
        retain: Batches whose cross entropy is added.
        objective: What to minimise on the forget data; by default NPO.
        radius: `ρ`.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), SemuConfig(target_modules=["0"]))
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> methods.npo_sam(model, forget, retain, max_steps=2, progress=False).steps
        2
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    return minimise(
        model, forget, objective or NPO(), keep(retain, CrossEntropy()), rules=SharpnessAware(radius), **said
    )


def lat(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    layer: int | str,
    objective: LossFunction | None = None,
    radius: float = 0.1,
    steps: int = 4,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """LAT: forget at the worst hidden states nearby, so that no small push inside the model brings it back.

    `min max L(h + δ)` over `‖δ‖ ≤ ρ ‖h‖`, for what one layer gives. Of AGT^AO it is the perturbed part; its other,
    gradients of forget and retain data that do not work against each other, is [`gu`][semu_peft.methods.geometry.gu]'s
    rule.

    Source: Casper et al. 2024, arXiv 2403.05030; AGT^AO, arXiv 2602.01703: layer 10, four steps; the radius is ours.

    Args:
        model: The model, changed in place.
        forget: The forget batches.
        retain: Batches whose cross entropy is added.
        layer: Whose output is perturbed, by its number or name.
        objective: What to minimise on the forget data; by default NPO.
        radius: `ρ`.
        steps: Of the search.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), SemuConfig(target_modules=["0"]))
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> methods.lat(model, forget, retain, layer="0", max_steps=2, progress=False).steps
        2
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    worst = PerturbedLatents(objective or NPO(), layer, radius=radius, steps=steps)
    return minimise(model, forget, worst, keep(retain, CrossEntropy()), **said)


def cir(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    objective: LossFunction | None = None,
    layers: list[int | str] | None = None,
    inputs: int = 23,
    outputs: int = 35,
    targets: list[str] | None = None,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """CIR: change nothing along the directions that all the data share, of inputs and of output gradients.

    The mean and the leading principal components of both are taken out of every step. With `layers` the loss is the
    paper's own, of what these layers give ([`BreakActivations`][semu_peft.objectives.representation.BreakActivations]).
    Its fixed update norm is up to the caller ([`NormCap`][semu_peft.training.rules.size.NormCap]), as is another term
    for the retain data: `Retain(retain, PreserveHiddenStates(12, relative=True))`.

    Source: arXiv 2509.11816; 23 and 35 components, MLPs of layers 6 to 11.

    Args:
        model: The model, changed in place.
        forget: The forget batches.
        retain: Batches whose cross entropy is added.
        objective: What to minimise; by default gradient ascent, or, with `layers`, their broken activations.
        layers: Those whose outputs are broken, such as `["layers.6.mlp"]`.
        inputs: Components of the inputs to take out.
        outputs: Components of the output gradients to take out.
        targets: The layers; by default those of the SEMU adapter, of a bare model all that read inputs (its embedding
            stays out of this). The statistics of a layer are as large as its width squared: of a bare model with a
            large vocabulary, name all but the head.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), SemuConfig(target_modules=["0"]))
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> methods.cir(model, forget, retain, max_steps=2, progress=False, inputs=1, outputs=1).steps
        2
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    loss = objective or (BreakActivations(layers) if layers else GradientAscent())
    find_bases(model, forget, loss, progress=progress, adapter_name=adapter_name)
    where = {"targets": targets, "adapter_name": adapter_name} if targets else covariance_targets(model, adapter_name)
    shared = gather(model, forget, loss, **where, statistic=LayerCovariance, progress=progress)
    rule = RemoveDirections.shared(shared, inputs=inputs, outputs=outputs)
    return minimise(model, forget, loss, keep(retain, CrossEntropy()), rules=rule, **said)


def wagle(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Any,
    *,
    objective: LossFunction | None = None,
    kept: float = 0.95,
    mu: float = 1e-6,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """WAGLE: train the entries alone whose removal would cost the forget data most, retain data made good.

    Scores `|(θ − g_r / μ) · g_f|`, the global top fraction; all other entries keep their bits.

    Source: Jia et al. 2024, arXiv 2410.17509; 0.95 with NPO on TOFU, 0.6 on WMDP.

    Args:
        model: The model, changed in place.
        forget: The forget batches.
        retain: Retain batches: for the scores, and whose cross entropy is added.
        objective: What to minimise on the forget data; by default NPO.
        kept: The share of entries that may change.
        mu: `μ`, for the curvature of the retain loss.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, methods
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), SemuConfig(target_modules=["0"]))
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> methods.wagle(model, forget, retain, max_steps=2, progress=False).steps
        2
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    loss = objective or NPO()
    find_bases(model, forget, loss, progress=progress, adapter_name=adapter_name)
    g_f, g_r = (gradients_of_parameters(model, data, CrossEntropy(), progress=progress) for data in (forget, retain))
    rule = Mask(top_fraction(wagle_scores(dict(model.named_parameters()), g_f, g_r, mu), kept))
    return minimise(model, forget, loss, keep(retain, CrossEntropy()), rules=rule, **said)
