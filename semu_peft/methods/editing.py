"""Published methods that train nothing, by their names: each is one sentence of the rooms below.

Those that change weights in closed form give an [`Edit`][semu_peft.edits.edit.Edit], to be applied, undone, saved, or
carried as an adapter; the others put an adapter into the model that is given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

from torch import Tensor, nn

from semu_peft.adapter.search_scale import ScaleSearch, search_scale
from semu_peft.adapter.whole_model import add_adapter, taken_back_on_error
from semu_peft.arguments import check_score
from semu_peft.edits import (
    Certificate,
    Edit,
    RidgeHead,
    concept_target,
    dampen,
    influence_step,
    newton_step,
    noise_columns,
    reverse_rows,
    search_dampening,
    search_step,
)
from semu_peft.gradients import CoreCovariance, GradientSum, InputMoment
from semu_peft.gradients.gather import Gathered, gather
from semu_peft.gradients.parameters import AbsoluteSum, gather_parameters
from semu_peft.gradients.targets import layers_with_inputs
from semu_peft.localize import pareto
from semu_peft.objectives import CrossEntropy, SquaredLogits
from semu_peft.objectives.base import LossFunction
from semu_peft.subspace.initialize import initialize_semu_weights
from semu_peft.subspace.profile import SubspaceProfile
from semu_peft.subspace.starts import Ascent, Projection, RankOneWrite, contrast_directions
from semu_peft.tuner.adapted import own_modules, targets_for
from semu_peft.tuner.config import SemuConfig


def slug(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any],
    *,
    score: Callable[[nn.Module], float],
    layer: str | None = None,
    objective: LossFunction | None = None,
    progress: bool = True,
    adapter_name: str = "default",
) -> ScaleSearch:
    """SLUG: one step up the forget gradient of one layer, in rank 1, as far as a score says is best.

    `ΔW = λ s u vᵀ` with the leading singular triplet. By default the layer is the deepest on the front of importance
    and alignment, as the paper prefers; the front's first may be the worst by far, so try others and keep the best.

    Source: Cai et al., ICML 2025, arXiv 2407.11867.

    Args:
        model: The model, which is given the adapter.
        forget: The forget batches.
        retain: Retain batches, for the choice of the layer.
        score: `model -> float`, the more the better, such as retained accuracy less forget accuracy.
        layer: The layer; by default as above.
        objective: What rises as the data are forgotten; by default cross entropy.
        progress: Show progress bars.
        adapter_name: The adapter's name.

    Raises:
        ValueError: No scale scores better than none; the model is without the adapter then.

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> model, loss = nn.Sequential(nn.Linear(4, 3)), CrossEntropy()
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> score = lambda m: loss(m, forget[0]).item() - 0.1 * loss(m, retain[0]).item()
        >>> methods.slug(model, forget, retain, score=score, progress=False).scale > 0
        True
    """
    loss = objective or CrossEntropy()
    seen = [gather(model, data, loss, progress=progress) for data in (forget, retain)]
    chosen = layer or max(pareto(model, *seen), key=list(seen[0]).index)
    with taken_back_on_error(model, adapter_name=adapter_name):
        config = SemuConfig(target_modules=targets_for(model, [chosen]), r=1)
        add_adapter(model, config, adapter_name=adapter_name)
        initialize_semu_weights(model, seen[0], start=Ascent(), progress=progress, adapter_name=adapter_name)
        return search_scale(model, score, adapter_name=adapter_name)


def ssd(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any],
    *,
    threshold: float | None = None,
    share: float | None = None,
    lower: float = 1.0,
    score: Callable[[nn.Module], float] | None = None,
    targets: Sequence[str] | None = None,
    progress: bool = True,
) -> Edit:
    """SSD: `θ ← θ · min(λ I_D / I_F, 1)` wherever `I_F > α I_D`, with the Fisher information example by example.

    Source: Foster et al., AAAI 2024, arXiv 2308.07707. Its α = 10 is for squares of batch means; see
    [`dampen`][semu_peft.edits.dampening.dampen].

    Args:
        model: The model, which stays as it is until the edit is applied.
        forget: The forget batches.
        retain: All others.
        threshold: `α`; 1.5 to 4 for one class of ten.
        share: In its place, the share of weights to dampen.
        lower: `λ`; with 0 the selected weights go.
        score: In the place of both, `(model) -> float`, better where larger, by which a share is searched, see
            [`search_dampening`][semu_peft.edits.dampening.search_dampening].
        targets: The parameters, or modules that hold them, to choose from; by default all, as the paper. A class is
            often forgotten at less cost in the last block and the head alone, with a `lower` of 0.
        progress: Show progress bars.

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> methods.ssd(nn.Linear(4, 3), forget, retain, share=0.2, progress=False)
        Edit(dampen(threshold=..., share=0.2, lower=1): 3 numbers of ... parameters)
    """
    _check_choice(threshold, share, score)
    options: dict[str, Any] = {"targets": targets, "progress": progress}
    seen = [gather_parameters(model, data, CrossEntropy(), **options) for data in _part_and_all(forget, retain)]
    return _dampened(model, seen, score, threshold=threshold, share=share, lower=lower)


def lfssd(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any],
    *,
    threshold: float | None = None,
    share: float | None = None,
    lower: float = 1.0,
    score: Callable[[nn.Module], float] | None = None,
    targets: Sequence[str] | None = None,
    progress: bool = True,
) -> Edit:
    """LFSSD: dampening without labels, by the importance `|∂ ‖logits‖²|`.

    Source: Foster et al. 2024, arXiv 2402.19308.

    Args:
        model: The model, which stays as it is until the edit is applied.
        forget: The forget batches; labels, if there are any, are not read.
        retain: All others.
        threshold: `α`.
        share: In its place, the share of weights to dampen.
        lower: `λ`.
        score: In the place of both, what a share is searched by, as in [`ssd`][semu_peft.methods.editing.ssd].
        targets: The parameters, or modules that hold them, to choose from; by default all.
        progress: Show progress bars.

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> forget, retain = ([torch.randn(8, 4)] for _ in range(2))
        >>> methods.lfssd(nn.Linear(4, 3), forget, retain, share=0.2, progress=False).settings["share"]
        0.2
    """
    _check_choice(threshold, share, score)
    options: dict[str, Any] = {"statistic": AbsoluteSum, "targets": targets, "progress": progress}
    seen = [gather_parameters(model, data, SquaredLogits(), **options) for data in _part_and_all(forget, retain)]
    return _dampened(model, seen, score, threshold=threshold, share=share, lower=lower)


def _part_and_all(forget: Iterable[Any], retain: Iterable[Any]) -> tuple[Iterable[Any], Iterable[Any]]:
    """The data to forget, and all data, these included; what gives its batches once alone is kept for both."""
    forget = list(forget) if isinstance(forget, Iterator) else forget
    return forget, chain(forget, retain)


def _dampened(
    model: nn.Module, seen: list[Gathered], score: Callable[[nn.Module], float] | None, **settings: Any
) -> Edit:
    forget, everything = seen
    if score is None:
        return dampen(forget, everything, **settings)
    return search_dampening(model, forget, everything, score, lower=settings["lower"])


def _check_choice(threshold: float | None, share: float | None, score: object) -> None:
    """Before the passes over the data, which take the time."""
    given = [
        name for name, value in (("threshold", threshold), ("share", share), ("score", score)) if value is not None
    ]
    check_score(score, optional=True)
    if len(given) != 1:
        raise ValueError(
            f"One of `threshold`, `share` and `score` must be given, got {given or 'none'}. Give `share=0.05` to "
            "dampen a twentieth of the weights, or a score to have the share searched."
        )


def iau(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any],
    *,
    step_size: float = 0.1,
    update: Literal["gradient", "sign"] = "gradient",
    score: Callable[[nn.Module], float] | None = None,
    progress: bool = True,
) -> Edit:
    """IAU: one step that learns the negative of the forget data, `Δθ = η (g_F − g_R)`.

    Source: Liu et al. 2025, arXiv 2507.23257; its code takes the sign (`update="sign"`) and η = 1e-3.

    Args:
        model: The model, which stays as it is until the edit is applied.
        forget: The forget batches.
        retain: Retain batches.
        step_size: `η`.
        update: The difference itself, or its sign.
        score: `(model) -> float`, better where larger, by which a step up to `step_size` is searched, see
            [`search_step`][semu_peft.edits.search.search_step].
        progress: Show progress bars.

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> methods.iau(nn.Linear(4, 3), forget, retain, progress=False).made_by
        'influence_step'
    """
    check_score(score, optional=True)
    options: dict[str, Any] = {"statistic": GradientSum, "per": "batch", "progress": progress}
    seen = [gather_parameters(model, data, CrossEntropy(), **options) for data in (forget, retain)]
    step = influence_step(*seen, step_size=step_size, update=update)
    return step if score is None else search_step(model, step, score)


def k_fade(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any],
    *,
    damping: float = 0.01,
    step_size: float = 1.0,
    score: Callable[[nn.Module], float] | None = None,
    progress: bool = True,
) -> Edit:
    """K-FADE: a Newton step uphill on the forget data in the curvature of the retain data, `ΔW = η B⁻¹ G A⁻¹`.

    Layers that have no such curvature stay: embeddings, and heads that share their weight.

    Source: arXiv 2602.10568, from its abstract as there is no code. Steps of a run instead of one: the rule
    [`Precondition`][semu_peft.training.rules.precondition.Precondition].

    Args:
        model: The model, which stays as it is until the edit is applied.
        forget: The forget batches.
        retain: Retain batches.
        damping: Share of the mean curvature that is added.
        step_size: `η`; 1 is exact for a quadratic loss, and too long for a classifier's, which takes 0.03 to 0.3.
        score: `(model) -> float`, better where larger, by which a step up to `step_size` is searched, see
            [`search_step`][semu_peft.edits.search.search_step].
        progress: Show progress bars.

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> methods.k_fade(nn.Linear(4, 3), forget, retain, progress=False).made_by
        'newton_step'
    """
    check_score(score, optional=True)
    where: dict[str, Any] = {"targets": layers_with_inputs(model), "progress": progress}
    gradients = gather(model, forget, CrossEntropy(), **where)
    factors = gather(model, retain, CrossEntropy(), statistic=CoreCovariance.of_weight, **where)
    step = newton_step(gradients, factors, damping=damping, step_size=step_size)
    return step if score is None else search_step(model, step, score)


def acu(head: RidgeHead, forget: tuple[Tensor, Tensor], *, name: str = "head") -> tuple[Edit, Certificate]:
    """ACU: take rows out of a ridge head, `W = (XᵀX + γ I)⁻¹ XᵀY`, as if it had been fitted without them.

    Source: arXiv 2505.12239. Exact: the certificate says how well the new head solves the problem without the rows.

    Args:
        head: The head's moments, kept since it was fitted.
        forget: Features and targets of the rows to forget.
        name: The linear layer in the model that has the head's weight.

    Returns:
        The change of that layer's weight, and the certificate.

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> from semu_peft.edits import RidgeHead
        >>> x, y = torch.randn(50, 4), torch.randint(3, (50,))
        >>> edit, certificate = methods.acu(RidgeHead.empty(4, 3).add(x, y), (x[:2], y[:2]))
        >>> certificate.removed, certificate.residual < 1e-10
        (2, True)
    """
    after, certificate = head.forget(*forget)
    return after.edit(head, name), certificate


def chip(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any],
    *,
    layers: list[str],
    explained_variance: float = 0.95,
    progress: bool = True,
    adapter_name: str = "default",
) -> SubspaceProfile:
    """CHIP: take the direction in which a target's mean output differs from its sibling's out of a layer, `−Q Qᵀ W`.

    Source: MedForget, arXiv 2512.09867; there layers 22 to 27, and the rows of the tenth of neurons that differ most.
    Several targets: [`contrast_directions`][semu_peft.subspace.starts.written.contrast_directions] of all of them.

    Args:
        model: The model, which is given the adapter.
        forget: Batches of the target.
        retain: Batches of what is like it and stays.
        layers: The layers, by their full names.
        explained_variance: Of the directions, how much to keep.
        progress: Show progress bars.
        adapter_name: The adapter's name.

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> model = nn.Sequential(nn.Linear(4, 3, bias=False))
        >>> forget, retain = ([(torch.randn(8, 4), torch.full((8,), label))] for label in (0, 1))
        >>> methods.chip(model, forget, retain, layers=["0"], progress=False).ranks
        {'0': 1}
    """
    options: dict[str, Any] = {"targets": layers, "statistic": InputMoment, "progress": progress}
    target, sibling = (gather(model, data, CrossEntropy(), **options) for data in (forget, retain))
    modules: dict[str, Any] = own_modules(model)
    parts = {name: (modules[name].weight.detach(), getattr(modules[name], "bias", None)) for name in target}
    directions = {
        name: contrast_directions(
            target[name].mean_output(*part)[None], sibling[name].mean_output(*part)[None],  # type: ignore[attr-defined]
            explained_variance=explained_variance,
        )
        for name, part in parts.items()
    }  # fmt: skip
    return _written(model, layers, Projection(directions), adapter_name)


def rocr(
    model: nn.Module,
    keys: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    retain: Iterable[Any] | None = None,
    *,
    rule: Literal["project", "inverse"] = "project",
    damping: float = 1.0,
    progress: bool = True,
    adapter_name: str = "default",
) -> SubspaceProfile:
    """ROCR: write other outputs for the inputs that stand for a subject, off everything that retain data use.

    `ΔW = E (δ I + KᵀMK)⁻¹ KᵀM` with the keys `K` and what is missing to the values, `E`; an adapter of as high a rank
    as there are keys. `rule="inverse"` is ROME's and MEMIT's `M`.

    Source: arXiv 2506.07795; there `down_proj` of layers 4 to 6, the keys at the subject's last token, meaned over
    templates, the values those of a harmless subject.

    Args:
        model: The model, which is given the adapter.
        keys: Inputs by layer name, `(n,)` or `(k, n)`.
        values: The outputs wanted, `(m,)` or `(k, m)`.
        retain: Retain batches, whose inputs are kept as they are.
        rule: What `M` is.
        damping: `δ`.
        progress: Show progress bars.
        adapter_name: The adapter's name.

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> model, key = nn.Sequential(nn.Linear(2, 3, bias=False)), torch.tensor([0.0, 2.0])
        >>> before = model(key).detach()
        >>> _ = methods.rocr(model, {"0": key}, {"0": before + 5}, progress=False)
        >>> torch.round(model(key) - before, decimals=4).tolist()  # 4/5 of the way
        [4.0, 4.0, 4.0]
    """
    options: dict[str, Any] = {"targets": list(keys), "statistic": InputMoment, "progress": progress}
    moments = {} if retain is None else gather(model, retain, CrossEntropy(), **options)
    return _written(model, list(keys), RankOneWrite(keys, values, moments, rule, damping), adapter_name)


def _written(model: nn.Module, layers: list[str], start: Any, adapter_name: str) -> SubspaceProfile:
    """An adapter on these layers that is what a start writes."""
    with taken_back_on_error(model, adapter_name=adapter_name):
        config = SemuConfig(target_modules=targets_for(model, layers), explained_variance=1.0)
        add_adapter(model, config, adapter_name=adapter_name)
        return initialize_semu_weights(model, start=start, progress=False, adapter_name=adapter_name)


def needle(model: nn.Module, columns: Mapping[str, Sequence[int]], *, std: float = 0.1, seed: int = 0) -> Edit:
    """Needle: noise on what the neurons write that are known to hold a concept, and nothing else.

    An oracle to measure others by, with [`vector_change`][semu_peft.evaluation.concept_vectors.vector_change].

    Source: ConceptVectors, Hong et al. 2024, arXiv 2406.11614.

    Args:
        model: The model; it is not changed.
        columns: Columns by the name of their down-projection.
        std: Of the noise.
        seed: Of the draw.

    Examples:
        >>> from semu_peft import methods
        >>> methods.needle(nn.Sequential(nn.Linear(4, 3)), {"0": [2]})
        Edit(noise_columns(std=0.1, seed=0): 3 numbers of 1 parameters)
    """
    return noise_columns(model, columns, std=std, seed=seed)


def tars(
    model: nn.Module,
    layers: Collection[str],
    hidden: Tensor,
    token: int,
    *,
    threshold: float = 0.5,
    std: float = 0.1,
    tries: int = 1000,
    seed: int = 0,
) -> Edit:
    """TARS: the rows that read a concept are turned against it, `w ← −‖w‖ t / ‖t‖` where `cos(w, t) ≥ τ`.

    Source: TARS, 2024, arXiv 2412.10257.

    Args:
        model: A transformers language model; it is not changed.
        layers: Names of linear layers that read the hidden state, such as up- and gate-projections.
        hidden: What the head reads at the end of a detailed prompt for the concept; noise is added until the head reads
            the concept from it.
        token: The index of the concept's first token.
        threshold: `τ`.
        std: Of the noise, in parts of the size of `hidden`.
        tries: So many draws at the most.
        seed: Of the draws.

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
        >>> up = model.model.layers[0].mlp.up_proj.weight
        >>> up.data[2] = model.lm_head.weight.data[5] = torch.full((8,), 2.0)
        >>> methods.tars(model, ["model.layers.0.mlp.up_proj"], up.detach()[2], 5, threshold=0.99)
        Edit(reverse_rows(threshold=0.99): 8 numbers of 1 parameters)
    """
    target = concept_target(model, hidden, token, std=std, tries=tries, seed=seed)
    return reverse_rows(model, layers, target, threshold=threshold)
