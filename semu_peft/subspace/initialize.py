"""Give a SEMU adapter its bases: the leading singular directions of the forget gradients."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from semu_peft.arguments import check_adapter_name, check_count, check_kind, check_model, check_share, check_switch
from semu_peft.gradients.gather import Gathered, gather
from semu_peft.gradients.processes import sum_over_processes
from semu_peft.gradients.statistics import GradientSum, MatrixSum, StatisticFactory
from semu_peft.linalg.factorize import SingularFactors
from semu_peft.model_state import device_of
from semu_peft.objectives.base import LossFunction, as_objective
from semu_peft.objectives.batches import check_batches
from semu_peft.objectives.original import original
from semu_peft.objectives.retain import Retain, as_retain
from semu_peft.tuner.adapted import semu_layers
from semu_peft.tuner.config import SemuConfig
from semu_peft.tuner.layer import SemuLayer
from semu_peft.tuner.parameter import ParamWrapper

from .directions import find_directions, own_directions, taken_directions
from .fill import check_plan, fill, layers_to_fill
from .profile import LayerSpectrum, SubspaceProfile
from .ranks import RankBudget, plan_ranks
from .reads import watched
from .retain import Overlap, RetainRule, as_rule
from .starts import Start


def initialize_semu_weights(
    model: nn.Module,
    forget: Iterable[Any] | Gathered | SubspaceProfile | None = None,
    objective: LossFunction | None = None,
    *,
    retain: Retain | Sequence[Retain] | None = None,
    retain_rule: RetainRule | Literal["project", "ratio"] = "project",
    statistic: StatisticFactory = GradientSum,
    start: Start | None = None,
    skip_leading: int = 0,
    orthogonal_to: Sequence[str] = (),
    rank_budget: RankBudget | None = None,
    keep_explained_variance: float | None = None,
    overwrite: bool = False,
    progress: bool = True,
    adapter_name: str = "default",
) -> SubspaceProfile:
    """Initialise a SEMU adapter from forget data, in one pass of forward and backward.

    For each target weight `W` the gradient `G` of the objective, at the model without this adapter (other active
    adapters stay on) and in eval mode, is summed over the batches, optionally made orthogonal to `W`, and factorised,
    `G = U S Vᵀ`. The leading columns that explain the configured share of its energy become the adapter's frozen
    bases; the core starts at zero, so the model's output does not change. Ranks are written into the configuration's
    `ranks`. A layer that the loss does not depend on, or whose gradient is zero, gets rank 0, with a warning; where all
    layers do, it is an error.

    Linear layers and ungrouped convolutions are differentiated between their inputs and output gradients, so that their
    weights may be quantised, offloaded or sharded; weights that several layers share, once, as parameters. On an
    accelerator autograd's own gradients of stored weights are taken where that is quicker: they are the same. In a
    distributed run every process brings its own batches (prepare the loader with Accelerate to share the work), the
    sums of all are factorised, and every process gets the main process's bases.

    Source: SEMU, arXiv 2502.07587, section 3. The projection there divides by `‖W‖²`, as it must to be one.

    Args:
        model: A model with a SEMU adapter (`get_peft_model`, `add_adapter` or `inject_adapter_in_model`).
        forget: The forget set in batches, a DataLoader or any iterable; or sums of its gradients that
            [`gather`][semu_peft.gradients.gather.gather] took; or the profile of an earlier initialisation. The last
            two need no pass over the data. None only with a `start` that brings its own bases, such as
            [`WeightSplit`][semu_peft.subspace.starts.weight.WeightSplit]: γ is the share of the weight's energy then.
        objective: `(model, batch) -> scalar loss`, for example one of [`semu_peft.objectives`]. Needed with batches.
        retain: Keep away from what these data would change; the gradients of several add up, weighted.
        retain_rule: How: `"project"`, `"ratio"` or a [`RetainRule`][semu_peft.subspace.retain.RetainRule].
        statistic: What is kept of each layer's gradients in the passes: exact sums, or
            [`Sketch.of_size(192)`][semu_peft.gradients.sketch.Sketch.of_size], which is far smaller and cheaper to
            fill. `GradientSum.on("cpu")` takes exact sums off the accelerator.
        start: What the training starts from, see [`starts`][semu_peft.subspace.starts.base]; by default the directions
            found and a core of zeros.
        skip_leading: Leave out so many of each layer's first directions, and take those that follow: γ is then the
            share of the energy that they leave. The first ones are what the forget data share with all other data,
            which is what relearning brings back first (RepSelect, arXiv 2606.17168); a rule does the same to steps,
            see [`RemoveLeading`][semu_peft.training.rules.leading.RemoveLeading].
        orthogonal_to: Names of other SEMU adapters, active or not, whose directions this one is to stay out of on both
            sides: `U_otherᵀ U = 0` and `V_otherᵀ V = 0`, by construction and however it is trained (O3, arXiv
            2407.10223, which penalises one side).
        rank_budget: One budget of directions or parameters for all layers, instead of γ for each; γ and `r` stay upper
            bounds.
        keep_explained_variance: Keep directions up to this larger γ in the profile, so that it can initialise the
            adapter again at a larger γ. By default the profile keeps those of the adapter.
        overwrite: Start an adapter afresh that has been trained.
        progress: Show progress bars.
        adapter_name: The adapter to initialise.

    Returns:
        The spectra, directions and ranks of all layers.

    Raises:
        ValueError: The model has no such adapter, an argument is out of range, the data cannot give a gradient (see
            [`gather`][semu_peft.gradients.gather.gather]), or the adapter has been trained. It is unchanged then.
        TypeError: `forget` or `retain` is of another kind. The adapter is unchanged then.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, initialize_semu_weights, objectives
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> model = get_peft_model(model, SemuConfig(target_modules=["0", "2"], explained_variance=0.8))
        >>> forget = [(torch.randn(16, 4), torch.zeros(16, dtype=torch.int64))]
        >>> initialize_semu_weights(model, forget, objectives.CrossEntropy(), progress=False)
        SubspaceProfile(2 layers, ...)
    """
    check_model(model)
    check_adapter_name(adapter_name)
    check_share("keep_explained_variance", keep_explained_variance, optional=True)
    check_count("skip_leading", skip_leading, least=0)
    check_switch("overwrite", overwrite)
    check_switch("progress", progress)
    check_plan(rank_budget, start)
    _check_orthogonal_to(model, orthogonal_to, adapter_name)
    layers = layers_to_fill(model, adapter_name, overwrite, orthogonal_to)
    rule, terms = as_rule(retain_rule), as_retain(retain)
    if skip_leading and (forget is None or isinstance(forget, SubspaceProfile)):
        raise ValueError(
            f"`skip_leading` must be 0 without gradients, got {skip_leading}: it changes directions as they are found. "
            "Initialise from batches or a `Gathered`."
        )
    if orthogonal_to and (forget is None or isinstance(forget, SubspaceProfile)):
        raise ValueError(
            "`orthogonal_to` must be empty without gradients: it changes directions as they are found. Initialise from "
            "batches or a `Gathered`."
        )
    if forget is None:
        return _without_data(layers, start, terms, rank_budget, adapter_name)
    if isinstance(forget, SubspaceProfile):
        if terms:
            raise ValueError("`retain` changes directions as they are found: initialise from batches or a `Gathered`.")
        return forget.initialize(
            model, start=start, rank_budget=rank_budget, overwrite=overwrite, adapter_name=adapter_name
        )
    sums, batches, left_out = _forget_sums(model, layers, forget, objective, statistic, progress, adapter_name)
    retained = _retain_sums(model, terms, statistic, progress, adapter_name) if terms else None
    found, overlaps = find_directions(
        layers, sums, retained, rule,
        keep_explained_variance=keep_explained_variance, progress=progress, adapter_name=adapter_name,
        prepare=getattr(start, "prepare", None), skip=skip_leading, taken=taken_directions(layers, orthogonal_to),
    )  # fmt: skip
    if skip_leading and not any(factors.rank for factors in found.values()):
        raise ValueError(f"`skip_leading` must leave a direction somewhere, got {skip_leading}. Skip fewer.")
    corrected = {name: factors.leading(0) if name in left_out.read_past else factors for name, factors in found.items()}
    ranks = plan_ranks(corrected, layers, budget=rank_budget, adapter_name=adapter_name)
    _check_ranks(ranks, corrected, left_out, rank_budget)
    chosen = {name: found[name].leading(ranks[name]) for name in layers}
    others = fill(layers, chosen, start, adapter_name, orthogonal_to)
    _warn_of_ddp(model)
    known = (chosen if keep_explained_variance is None else found) | others
    return SubspaceProfile(_spectra(layers, known, overlaps, adapter_name), batches)


def check_config(config: Any) -> None:
    """Check a configuration where the directions are found by the caller, and not by who gives it.

    Raises:
        TypeError: It is none of this method.
        ValueError: It asks for another start than from forget data.

    Examples:
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.subspace.initialize import check_config
        >>> check_config(SemuConfig(r=4))  # says nothing of another start
    """
    check_kind("config", config, SemuConfig, "a `SemuConfig`", "Write `SemuConfig(r=16)`, or leave it out.")
    if config.init_weights is not True:
        raise ValueError(
            f"`config` must leave `init_weights` at True, as directions are found from `forget`, got "
            f"{config.init_weights!r}. For another start, add the adapter yourself, and call `unlearn`."
        )


def _spectra(
    layers: Mapping[str, SemuLayer],
    known: Mapping[str, SingularFactors],
    overlaps: Mapping[str, Overlap | None],
    adapter_name: str,
) -> dict[str, LayerSpectrum]:
    return {
        name: LayerSpectrum(known[name], layer.r[adapter_name], layer.matrix_shape(adapter_name), overlaps.get(name))
        for name, layer in layers.items()
    }


def _without_data(
    layers: Mapping[str, SemuLayer],
    start: Start | None,
    terms: Sequence[Retain],
    rank_budget: RankBudget | None,
    adapter_name: str,
) -> SubspaceProfile:
    """Fill the layers with what a start brings, the weight's own directions being the gradient's."""
    if start is None or getattr(start, "needs_gradient", True):
        raise TypeError(
            "`forget` must be batches, a `Gathered` or a `SubspaceProfile`, got None. Only a start that brings its own "
            "bases, such as `starts.WeightSplit()`, works without forget data."
        )
    if terms:
        raise ValueError("`retain` changes directions of the forget gradient, got it without `forget`. Leave it out.")
    found = {name: own_directions(layer, adapter_name) for name, layer in layers.items()}
    ranks = plan_ranks(found, layers, budget=rank_budget, adapter_name=adapter_name)
    chosen = {name: found[name].leading(ranks[name]) for name in layers}
    others = fill(layers, chosen, start, adapter_name)
    return SubspaceProfile(_spectra(layers, chosen | others, {}, adapter_name), 0)


def _check_orthogonal_to(model: nn.Module, names: Any, adapter_name: str) -> None:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"`orthogonal_to` must be a list of adapters' names, got {names!r}. Write ['default'].")
    if adapter_name in names:
        raise ValueError(f"`orthogonal_to` must name other adapters, got {adapter_name!r} itself. Leave it out.")
    for name in names:
        semu_layers(model, name)  # which says it where there is none


def _check_forget(forget: Any) -> None:
    """Say by the argument's own name what is wrong with the data; a list is all that can be looked at beforehand."""
    check_batches(forget, "forget")
    if isinstance(forget, (list, tuple)) and not forget:
        raise ValueError("`forget` must give at least one batch, got none. Check what was put into the list.")
    if isinstance(forget, (list, tuple)) and any(batch is None for batch in forget):
        raise TypeError("`forget` must give batches, got None among them. Leave those out that a `collate_fn` dropped.")


@dataclass(frozen=True)
class _LeftOut:
    """The layers that stay as they are, by the reason that has been warned of."""

    unused: tuple[str, ...] = ()
    read_past: tuple[str, ...] = ()

    def __contains__(self, name: str) -> bool:
        return name in self.unused or name in self.read_past


def _forget_sums(
    model: nn.Module,
    layers: Mapping[str, SemuLayer],
    forget: Any,
    objective: LossFunction | None,
    statistic: StatisticFactory,
    progress: bool,
    adapter_name: str,
) -> tuple[dict[str, MatrixSum], int, _LeftOut]:
    """The sum of each layer's forget gradient, over how many batches it is, and the layers that stay as they are."""
    if isinstance(forget, Gathered):
        sums = {name: forget.statistics.get(name) for name in layers}
        odd = [name for name, total in sums.items() if not _fits(total, layers[name], adapter_name)]
        if odd:
            raise ValueError(
                f"`forget` holds no sum that fits the layers {odd[:3]} ({len(odd)} in all) of adapter "
                f"{adapter_name!r}: for the first it has {sums[odd[0]]!r}, and needs the gradient's sum or sketch, of "
                f"shape {layers[odd[0]].matrix_shape(adapter_name)}. Gather with `statistic=GradientSum` or "
                "`Sketch.of_size(...)`, and with this `adapter_name` where the layers are not plain ones."
            )
        checked = {name: total for name, total in sums.items() if isinstance(total, MatrixSum)}
        return checked, forget.batches, _LeftOut(forget.unused)
    if objective is None:
        raise TypeError("`objective` must be given with batches, got None. Give `(model, batch) -> scalar loss`.")
    as_objective(objective)
    _check_forget(forget)
    with original(model, adapter_name) as reference, watched(_called(reference, adapter_name)) as read:
        gathered = gather(
            reference, forget, objective, statistic=statistic, description="Forget gradients", progress=progress,
            adapter_name=adapter_name,
        )  # fmt: skip
    # A layer that is not called at all is among the unused ones; gather has warned of those.
    past = tuple(name for name in layers if name in read and name not in gathered.unused)
    if past:
        _warn_of_reads(past)
    return _matrix_sums(gathered), gathered.batches, _LeftOut(gathered.unused, past)


def _called(model: nn.Module, adapter_name: str) -> dict[str, SemuLayer]:
    """The layers to watch: a wrapped parameter is corrected wherever it is read."""
    layers = semu_layers(model, adapter_name)
    return {name: layer for name, layer in layers.items() if not isinstance(layer, ParamWrapper)}


def _warn_of_reads(names: tuple[str, ...]) -> None:
    warnings.warn(
        f"The weights of {len(names)} target layers ({', '.join(names[:3])}{' …' if len(names) > 3 else ''}) are also "
        "read past the layer, where a correction of the layer does not reach: they get rank 0 and stay as they are. To "
        f"correct such a weight wherever it is read, name it in `target_parameters` ({names[0] + '.weight'!r}) and "
        "leave the layer out of `target_modules`.",
        stacklevel=4,
    )


def _retain_sums(
    model: nn.Module,
    terms: Sequence[Retain],
    statistic: StatisticFactory,
    progress: bool,
    adapter_name: str,
) -> dict[str, MatrixSum]:
    """The weighted sum of all retain gradients of each layer."""
    seen = torch.zeros(len(terms), dtype=torch.int64, device=device_of(model))

    def weighted(model: nn.Module, batch: tuple[int, Any]) -> Any:
        index, inputs = batch
        seen[index] += 1
        return terms[index].weight * terms[index].objective(model, inputs)

    numbered = ((index, batch) for index, term in enumerate(terms) for batch in term.batches)
    with original(model, adapter_name) as reference:
        gathered = gather(
            reference, numbered, weighted, statistic=statistic, description="Retain gradients", progress=progress,
            adapter_name=adapter_name,
        )  # fmt: skip
    empty = [terms[index] for index, count in enumerate(sum_over_processes(seen).tolist()) if count == 0]
    if empty:
        raise ValueError(
            f"`retain` must give at least one batch each, got none from {empty[0]}. A generator or an iterator may "
            "have been used up by an earlier pass: give a DataLoader or a list."
        )
    return _matrix_sums(gathered)


def _matrix_sums(gathered: Gathered) -> dict[str, MatrixSum]:
    sums = {name: total for name, total in gathered.items() if isinstance(total, MatrixSum)}
    if len(sums) < len(gathered):
        kind = type(next(total for total in gathered.values() if not isinstance(total, MatrixSum)))
        raise ValueError(
            f"`statistic` must be a sum that can be factorised, got {kind.__name__}. Use `GradientSum` or "
            "`Sketch.of_size(...)`."
        )
    return sums


def _fits(total: Any, layer: SemuLayer, adapter_name: str) -> bool:
    return isinstance(total, MatrixSum) and total.shape == layer.matrix_shape(adapter_name)


def _check_ranks(
    ranks: Mapping[str, int],
    found: Mapping[str, SingularFactors],
    left_out: _LeftOut,
    rank_budget: RankBudget | None,
) -> None:
    empty = [name for name, factors in found.items() if factors.rank == 0]
    if len(empty) == len(found) and left_out.read_past:
        raise ValueError(
            f"No target layer is left: the weights of {left_out.read_past[:3]} are also read past the layer. Name them "
            "in `target_parameters` instead."
        )
    if len(empty) == len(found):
        raise ValueError(
            "All target layers have a gradient of zeros: the objective is already at a stationary point on this forget "
            "data, so it names no direction to forget along. Use another objective for the initialisation."
        )
    if zero := [name for name in empty if name not in left_out]:  # of those has been warned
        warnings.warn(
            f"The forget gradient is zero at {len(zero)} target layers ({zero[:3]} …): they get rank 0 and stay as "
            "they are.",
            stacklevel=3,
        )
    if not any(ranks.values()) and rank_budget is None:
        raise ValueError(
            "No direction of the forget gradient is left at any target layer: all are those of the adapters in "
            "`orthogonal_to` (a request that has been forgotten already), of the retain data, or ruled out by "
            "`rank_pattern`. Ask for less of these, or target more layers."
        )
    if not any(ranks.values()):
        raise ValueError("`rank_budget` pays for no direction at all: raise its `total`.")


def _warn_of_ddp(model: nn.Module) -> None:
    if isinstance(model, DistributedDataParallel):
        warnings.warn(
            "`model` is in DistributedDataParallel, which has bound itself to the cores as they were before they got "
            "their bases. Drop the wrapper (`model = model.module`) and wrap the model anew before you train it; or "
            "initialise before wrapping.",
            stacklevel=3,
        )
