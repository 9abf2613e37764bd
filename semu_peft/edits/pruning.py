"""Prune before unlearning: the smallest weights of all layers together, set to zero."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from semu_peft.arguments import check_kind, check_model, check_share
from semu_peft.gradients.gather import of_each_weight
from semu_peft.tuner.adapted import own_modules
from semu_peft.tuner.targets import LAYER_CLASSES

from .deltas import Scaled, at_places
from .edit import Edit


def prune_weights(model: nn.Module, share: float, *, targets: Sequence[str] | None = None) -> Edit:
    """Set the smallest weights to zero, by magnitude and over all layers together (global, unstructured).

    A sparse model forgets more easily. The edit is factors of zero, so that it also fits what the model has become:
    apply it again after an adapter was merged, and the pruned weights are exact zeros in what is shipped.

        pruned = prune_weights(model, 0.9)
        pruned.apply(model)
        ...                                 # fine-tune, or unlearn with an adapter
        merged = model.merge_and_unload()
        pruned.apply(merged)                # measure after this

    Where `torch.nn.utils.prune` has pruned a layer, its weight is computed for each pass: an adapter trains beside it,
    and is merged once `prune.remove(layer, "weight")` has stored the zeros.

    Source: Jia et al. 2023, *Model Sparsity Can Simplify Machine Unlearning*, arXiv 2304.04934, section 3; as
    `torch.nn.utils.prune.global_unstructured` with `L1Unstructured`.

    Args:
        model: The model; it is not changed.
        share: Of the weights, in (0, 1]; rounded down to a whole number of them.
        targets: Names of layers; by default all linear layers and convolutions.

    Raises:
        ValueError: There is no such layer.

    Examples:
        >>> from semu_peft.edits import prune_weights
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> with prune_weights(model, 0.5).apply(model):
        ...     sum(int((layer.weight == 0).sum()) for layer in model)
        12
    """
    check_model(model)
    check_share("share", share)
    if targets is not None:
        check_kind("targets", targets, (list, tuple, set), "a list of names or None", "Put one in a list.")
    kinds = tuple(kind for kind in LAYER_CLASSES if not issubclass(kind, nn.Embedding))
    modules = {name: module for name, module in own_modules(model).items() if isinstance(module, kinds)}
    chosen = list(modules) if targets is None else list(targets)
    missing = [name for name in chosen if not isinstance(getattr(modules.get(name), "weight", None), nn.Parameter)]
    if missing or not chosen:
        raise ValueError(
            f"`targets`: {missing[:3] or 'none'} of {type(model).__name__} are linear layers or convolutions with a "
            "stored weight. Name such layers, or store the weights of parametrised ones first."
        )
    weights: dict[str, torch.Tensor] = of_each_weight(
        {f"{name}.weight" if name else "weight": modules[name].weight for name in chosen}  # type: ignore[misc]
    )
    sizes = torch.cat([weight.detach().abs().reshape(-1).float() for weight in weights.values()])
    order = sizes.argsort(stable=True)[: math.floor(share * len(sizes))]  # ties: the first ones
    smallest = torch.zeros(len(sizes), dtype=torch.bool, device=sizes.device)
    smallest[order] = True
    parts = smallest.split([weight.numel() for weight in weights.values()])
    deltas = {
        name: at_places(Scaled, part.view(weight.shape), torch.zeros_like(weight.detach(), dtype=torch.float32))
        for (name, weight), part in zip(weights.items(), parts, strict=True)
        if bool(part.any())
    }
    return Edit(deltas, "prune_weights", {"share": share})
