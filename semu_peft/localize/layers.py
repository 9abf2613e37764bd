"""Which layers are worth touching, from gathered gradients: SLUG's front, Fisher ratios, WAGLE's attribution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from semu_peft.arguments import check_adapter_name, check_kind, check_model, check_number, check_share
from semu_peft.gradients.gather import Gathered
from semu_peft.gradients.statistics import GradientSum, SquaredSum
from semu_peft.tuner.adapted import base_model, semu_layers
from semu_peft.tuner.keys import without_wrappers
from semu_peft.tuner.layer import SemuLayer
from semu_peft.tuner.weight_use import read_weight

from .table import Localization


def importance(
    model: nn.Module, forget: Gathered, retain: Gathered | None = None, *, adapter_name: str | None = None
) -> Localization:
    """How much each layer matters to the forget data, and how much that pulls against the retain data.

    `importance = ‖G_f‖ / ‖W‖`, `alignment = |cos(G_f, G_r)|`, and `front`, 1 for the layers that no other beats in
    both.

    Source: SLUG, Cai et al., ICML 2025, arXiv 2407.11867, section 3.2.

    Args:
        model: The model that the gradients were gathered in.
        forget: Gathered on the forget data (`GradientSum`).
        retain: The same on the retain data; without it there is only the importance.
        adapter_name: The adapter by whose layers they were gathered, if one was named.

    Raises:
        ValueError: The two are not of the same layers, or of another statistic.

    Examples:
        >>> from semu_peft import gather, localize, objectives
        >>> model, loss = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), objectives.CrossEntropy()
        >>> data = [[(torch.randn(8, 3), torch.randint(2, (8,)))] for _ in range(2)]
        >>> forget, retain = (gather(model, part, loss, progress=False) for part in data)
        >>> localize.importance(model, forget, retain).columns.keys()
        dict_keys(['importance', 'alignment', 'front'])
    """
    rows: dict[str, dict[str, float]] = {}
    for name, weight in _weights(model, forget, retain, GradientSum, adapter_name):
        gradient = _total(forget, name)
        size = float(torch.linalg.vector_norm(gradient))
        norm = float(torch.linalg.vector_norm(weight, dtype=gradient.dtype))
        rows[name] = {"importance": size / norm if norm > 0 else 0.0}
        if retain is not None:
            other = _total(retain, name)
            product = size * float(torch.linalg.vector_norm(other))
            rows[name]["alignment"] = abs(float((gradient * other).sum())) / product if product > 0 else 0.0
    if retain is not None:
        front = pareto_front({name: (row["importance"], row["alignment"]) for name, row in rows.items()})
        for name, row in rows.items():
            row["front"] = float(name in front)
    return Localization.of(rows, by="importance")


def pareto(model: nn.Module, forget: Gathered, retain: Gathered, *, adapter_name: str | None = None) -> Localization:
    """The layers that no other beats in importance and alignment both, the most important first: SLUG's shortlist.

    It is no more than a shortlist: where first layers have the largest gradients they lead it, and can be the worst to
    touch. Try the few that are on it, and choose by what is retained.

    Args:
        model: The model that the gradients were gathered in.
        forget: Gathered on the forget data (`GradientSum`).
        retain: The same on the retain data.
        adapter_name: The adapter by whose layers they were gathered, if one was named.

    Examples:
        >>> from semu_peft import gather, localize, objectives
        >>> model, loss = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), objectives.CrossEntropy()
        >>> data = [[(torch.randn(8, 3), torch.randint(2, (8,)))] for _ in range(2)]
        >>> forget, retain = (gather(model, part, loss, progress=False) for part in data)
        >>> 1 <= len(localize.pareto(model, forget, retain)) <= 2
        True
    """
    table = importance(model, forget, retain, adapter_name=adapter_name)
    return table.only([name for name, front in zip(table.names, table.columns["front"], strict=True) if front])


def pareto_front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """The names of which no other has at least the first number and at most the second, and is better in one.

    Examples:
        >>> sorted(pareto_front({"a": (1, 0.9), "b": (2, 0.5), "c": (3, 0.6)}))
        ['b', 'c']
    """

    def beaten(one: tuple[float, float]) -> bool:
        return any(more >= one[0] and less <= one[1] and (more, less) != one for more, less in points.values())

    return {name for name, point in points.items() if not beaten(point)}


def fisher_ratio(forget: Gathered, retain: Gathered, *, threshold: float = 1.0) -> Localization:
    """How much more each layer's weights matter to the forget data than to the retain data.

    `ratio = Σ F_f / Σ F_r` of the diagonal Fisher informations, and `share`, how many of its weights have
    `F_f > threshold · F_r`, which is what SSD would dampen.

    Source: SSD, Foster et al., AAAI 2024, arXiv 2308.07707.

    Args:
        forget: Gathered on the forget data with `statistic=SquaredSum`.
        retain: The same on the retain data, or on all.
        threshold: SSD's `α`.

    Raises:
        ValueError: The two are not of the same layers, or of another statistic.

    Examples:
        >>> from semu_peft import SquaredSum, gather, localize, objectives
        >>> model, loss = nn.Sequential(nn.Linear(3, 2)), objectives.CrossEntropy()
        >>> data = [(torch.randn(8, 3), torch.randint(2, (8,)))]
        >>> fisher = gather(model, data, loss, statistic=SquaredSum, progress=False)
        >>> localize.fisher_ratio(fisher, fisher).row("0")
        {'ratio': 1.0, 'share': 0.0}
    """
    check_number("threshold", threshold, low=0.0)
    _check(forget, retain, SquaredSum)
    rows = {}
    for name in forget:
        ours, theirs = (each[name].mean.double() for each in (forget, retain))  # type: ignore[attr-defined]
        both, total = float(ours.sum()), float(theirs.sum())
        share = float((ours > threshold * theirs).double().mean())
        rows[name] = {"ratio": both / total if total > 0 else float("inf") if both > 0 else 0.0, "share": share}
    return Localization.of(rows, by="ratio")


def attribution_scores(
    model: nn.Module,
    forget: Gathered,
    retain: Gathered,
    *,
    curvature: float | Gathered = 1e-6,
    adapter_name: str | None = None,
) -> dict[str, Tensor]:
    """What taking a weight away would do to the forget loss once the retain loss has been made good: WAGLE's score.

    `S = |(W − G_r / μ) ∘ G_f|`, with `μ` for the retain loss's curvature.

    Source: WAGLE, Jia et al., NeurIPS 2024, arXiv 2410.17509, equation 8.

    Args:
        model: The model that the gradients were gathered in.
        forget: Gathered on the forget data (`GradientSum`).
        retain: The same on the retain data.
        curvature: `μ`, one number as in the paper, or the diagonal Fisher information of the retain data (gathered with
            `statistic=SquaredSum`), 1e-6 being added.
        adapter_name: The adapter by whose layers they were gathered, if one was named.

    Returns:
        The scores by layer, shaped as the gathered matrices.

    Raises:
        ValueError: The gatherings are not of the same layers, or of another statistic.

    Examples:
        >>> from semu_peft import gather, localize, objectives
        >>> model, loss = nn.Sequential(nn.Linear(3, 2)), objectives.CrossEntropy()
        >>> seen = gather(model, [(torch.randn(8, 3), torch.randint(2, (8,)))], loss, progress=False)
        >>> localize.attribution_scores(model, seen, seen)["0"].shape
        torch.Size([2, 3])
    """
    if isinstance(curvature, Gathered):
        _check(forget, curvature, SquaredSum, of_first=GradientSum)
    else:
        check_number("curvature", curvature, low=1e-30)
    scores = {}
    for name, weight in _weights(model, forget, retain, GradientSum, adapter_name):
        ours, theirs = _total(forget, name), _total(retain, name)
        flat: Any = curvature[name].mean.to(theirs) + 1e-6 if isinstance(curvature, Gathered) else curvature  # type: ignore[attr-defined]
        scores[name] = ((weight.to(theirs).reshape(theirs.shape) - theirs / flat) * ours).abs()
    return scores


def attribution(
    model: nn.Module,
    forget: Gathered,
    retain: Gathered,
    *,
    curvature: float | Gathered = 1e-6,
    adapter_name: str | None = None,
) -> Localization:
    """The layers by their mean score of [`attribution_scores`][semu_peft.localize.layers.attribution_scores].

    Args:
        model: The model that the gradients were gathered in.
        forget: Gathered on the forget data (`GradientSum`).
        retain: The same on the retain data.
        curvature: `μ`, or the diagonal Fisher information of the retain data.
        adapter_name: The adapter by whose layers they were gathered, if one was named.

    Examples:
        >>> from semu_peft import gather, localize, objectives
        >>> model, loss = nn.Sequential(nn.Linear(3, 2)), objectives.CrossEntropy()
        >>> seen = gather(model, [(torch.randn(8, 3), torch.randint(2, (8,)))], loss, progress=False)
        >>> localize.attribution(model, seen, seen).columns.keys()
        dict_keys(['mean', 'total'])
    """
    scores = attribution_scores(model, forget, retain, curvature=curvature, adapter_name=adapter_name)
    rows = {name: {"mean": float(each.mean()), "total": float(each.sum())} for name, each in scores.items()}
    return Localization.of(rows, by="mean")


def top_mask(scores: Mapping[str, Tensor], keep: float) -> dict[str, Tensor]:
    """The largest scores of all layers together: true for just `round(keep · all)` of them, ties by position.

    Args:
        scores: By layer, as [`attribution_scores`][semu_peft.localize.layers.attribution_scores] gives them.
        keep: The share of all elements to keep, in (0, 1].

    Raises:
        ValueError: `keep` is out of range, there are no scores, or one is NaN.

    Examples:
        >>> top_mask({"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([3.0, 2.0])}, keep=0.5)
        {'a': tensor([False,  True]), 'b': tensor([ True, False])}
    """
    check_share("keep", keep)
    check_kind("scores", scores, Mapping, "a mapping from names to scores", "See `attribution_scores`.")
    if not scores:
        raise ValueError("`scores` must be of one layer at least, got none. Gather some first.")
    flat = torch.cat([score.detach().flatten().cpu() for score in scores.values()])
    if flat.isnan().any():
        raise ValueError("`scores` must be numbers, got NaN among them. Check the gradients that they were made of.")
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.sort(descending=True, stable=True).indices[: round(keep * len(flat))]] = True
    parts = chosen.split([score.numel() for score in scores.values()])
    return {
        name: part.view(score.shape).to(score.device) for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def _total(gathered: Gathered, name: str) -> Tensor:
    return gathered[name].total  # type: ignore[attr-defined]


def _check(forget: Gathered, retain: Gathered, kind: type, of_first: type | None = None) -> None:
    if forget.keys() != retain.keys():
        odd = sorted(forget.keys() ^ retain.keys())
        raise ValueError(f"`forget` and `retain` differ at the layers {odd[:3]}. Gather both with the same `targets`.")
    for gathered, wanted in ((forget, of_first or kind), (retain, kind)):
        odd = [name for name, statistic in gathered.items() if not isinstance(statistic, wanted)]
        if odd:
            raise ValueError(
                f"Layer {odd[0]!r} has {type(gathered[odd[0]]).__name__}, and needs {wanted.__name__}. Gather with "
                f"`statistic={wanted.__name__}`."
            )


def _weights(
    model: nn.Module, forget: Gathered, retain: Gathered | None, kind: type, adapter_name: str | None
) -> Iterator[tuple[str, Tensor]]:
    """Each gathered layer's weight, read as the matrix that its gradient was read as."""
    check_model(model)
    check_adapter_name(adapter_name, optional=True)
    _check(forget, forget if retain is None else retain, kind)
    adapted = {} if adapter_name is None else semu_layers(model, adapter_name)
    modules = {without_wrappers(name): module for name, module in base_model(model).named_modules()}
    for name in forget:
        layer: Any = adapted.get(name, modules.get(name))
        if layer is None:
            raise ValueError(f"`model` has no layer {name!r}, of which `forget` was gathered. Give the same model.")
        if isinstance(layer, SemuLayer) and adapter_name is not None:
            yield name, layer.weight_to_matrix(layer.get_base_weight().detach(), adapter_name)
            continue
        while isinstance(layer, BaseTunerLayer):
            layer = layer.base_layer  # type: ignore[attr-defined]
        weight = read_weight(layer).detach()
        yield name, weight.mT if isinstance(layer, Conv1D) else weight.flatten(1)
