"""Where the changes of an edit are in a model: the numbers there, read, written and digested."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from semu_peft.gradients.sources import carries_gradient
from semu_peft.tuner.adapted import own_modules, own_parameters

from .deltas import Delta, LowRank


class Place(NamedTuple):
    """A parameter, and its change as it is stored."""

    parameter: nn.Parameter
    delta: Delta


def places_of(deltas: Mapping[str, Delta], model: nn.Module) -> dict[str, Place]:
    """The parameters that changes are of, by full name, with the changes as these are stored.

    Args:
        deltas: Changes by the names of parameters, or of layers, whose weight is then meant.
        model: The model; adapters in it are looked past.

    Raises:
        ValueError: A parameter is missing, is of another shape, is named twice, or has no arithmetic (quantised).

    Examples:
        >>> from semu_peft.edits.deltas import Dense
        >>> list(places_of({"0": Dense(torch.ones(2, 3))}, nn.Sequential(nn.Linear(3, 2))))
        ['0.weight']
    """
    parameters, modules = own_parameters(model), own_modules(model)
    places: dict[str, Place] = {}
    for name, delta in deltas.items():
        full = name if name in parameters else f"{name}.weight" if name else "weight"
        if full not in parameters:
            raise ValueError(_missing(name, parameters))
        parameter = parameters[full]
        layer = modules.get(name)
        if full != name and isinstance(layer, Conv1D):
            delta = delta.transposed()
        if any(parameter is other.parameter for other in places.values()):
            raise ValueError(f"`deltas`: {name!r} shares its parameter with another of them. Give it once.")
        if not carries_gradient(parameter):
            raise ValueError(
                f"`model`: the parameter {full!r} is {parameter.dtype} on {parameter.device}, which cannot be "
                "changed number by number. Load the model unquantised, or carry the edit as an adapter."
            )
        places[full] = Place(parameter, _fitted(full, delta, parameter))
    return places


def read_numbers(parameter: nn.Parameter, delta: Delta) -> Tensor:
    """A copy of the numbers that are changed, in the parameter's dtype."""
    values = parameter.detach()
    return values.clone() if delta.places is None else values.reshape(-1)[delta.places.to(values.device)]


def changed(values: Tensor, delta: Delta) -> Tensor:
    """The numbers after the change, in float32 or wider."""
    return delta.applied(values.to(torch.promote_types(values.dtype, torch.float32)))


@torch.no_grad()
def write_numbers(parameter: nn.Parameter, delta: Delta, values: Tensor) -> None:
    """Put numbers where `read_numbers` reads them."""
    if delta.places is None:
        parameter.copy_(values)
    elif parameter.is_contiguous():
        parameter.view(-1)[delta.places.to(parameter.device)] = values
    else:
        flat = parameter.detach().reshape(-1).scatter(0, delta.places.to(parameter.device), values)
        parameter.copy_(flat.reshape(parameter.shape))


def _fitted(name: str, delta: Delta, parameter: nn.Parameter) -> Delta:
    """The change in the shape that the parameter is stored in."""
    shape = tuple(parameter.shape)
    if delta.shape == shape:
        return delta
    flat = tuple(parameter.flatten(1).shape) if parameter.dim() > 2 else None
    if delta.shape != flat:
        raise ValueError(
            f"`model`: the parameter {name!r} has shape {shape}, the edit's change has {delta.shape}. Apply it to the "
            "model that it was made for."
        )
    return delta if isinstance(delta, LowRank) else delta.viewed(shape)


def _missing(name: str, parameters: Iterable[str]) -> str:
    if f"{name}_orig" in parameters or f"{name}.weight_orig" in parameters:
        return (
            f"`model`: the weight of {name!r} is computed for each pass (pruning, weight or spectral norm). Store it "
            "first: `torch.nn.utils.prune.remove(layer, 'weight')` or `parametrize.remove_parametrizations`."
        )
    return (
        f"`model` has no parameter {name!r}, nor a layer of that name with a weight. Apply the edit to its own model."
    )


def digest_of(places: Mapping[str, Place]) -> str:
    """SHA-256 of the names, shapes, dtypes and values of the parameters."""
    digest = hashlib.sha256()
    for name in sorted(places):
        values = places[name].parameter.detach().contiguous().cpu()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
