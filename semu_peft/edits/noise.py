"""Noise in place of what one neuron writes: the oracle that says where a concept was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from semu_peft.arguments import check_count, check_kind, check_model, check_positive
from semu_peft.tuner.adapted import own_modules

from .deltas import Sparse, at_places
from .edit import Edit


def noise_columns(model: nn.Module, columns: Mapping[str, Sequence[int]], *, std: float = 0.1, seed: int = 0) -> Edit:
    """Add Gaussian noise to some columns of linear layers, such as the value vectors of an MLP's neurons.

    Column `j` of a down-projection is what neuron `j` writes into the residual stream. Where it is known which of them
    hold a concept, this ablates just these (*Needle*); to train the columns afterwards, take the rule
    [`Mask`][semu_peft.training.rules.mask.Mask].

    Source: ConceptVectors, Hong et al. 2024, arXiv 2406.11614: one column, noise of 0.1.

    Args:
        model: The model; it is not changed.
        columns: The columns by the name of their layer; [`decode_neurons`][semu_peft.localize.neurons.decode_neurons]
            says what neurons write.
        std: Of the noise.
        seed: Of the draw.

    Raises:
        ValueError: There is no such linear layer, or no such column.

    Examples:
        >>> from semu_peft.edits import noise_columns
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> before = model[0].weight.detach().clone()
        >>> with noise_columns(model, {"0": [2]}).apply(model):
        ...     (model[0].weight != before).any(0).tolist()
        [False, False, True, False]
    """
    check_model(model)
    mend = "Write {'model.layers.3.mlp.down_proj': [17]}."
    check_kind("columns", columns, Mapping, "columns by the name of their layer", mend)
    check_positive("std", std)
    check_count("seed", seed, least=0)
    modules, generator, deltas = own_modules(model), torch.Generator().manual_seed(seed), {}
    for name, given in columns.items():
        chosen = [int(column) for column in given]  # also of a tensor
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(modules.get(name), nn.Linear) or weight is None:
            raise ValueError(f"`columns` must name linear layers of the model, got {name!r}. {mend}")
        if not chosen or not all(0 <= column < weight.shape[1] for column in chosen):
            raise ValueError(f"`columns` of {name!r} must be from 0 to {weight.shape[1] - 1}, got {chosen}. {mend}")
        places, values = torch.zeros(weight.shape, dtype=torch.bool), torch.zeros(weight.shape)
        places[:, chosen] = True
        values[places] = std * torch.randn(int(places.sum()), generator=generator)
        deltas[f"{name}.weight"] = at_places(Sparse, places, values)
    if not deltas:
        raise ValueError(f"`columns` must name a layer at least, got none. {mend}")
    return Edit(deltas, "noise_columns", {"std": std, "seed": seed})
