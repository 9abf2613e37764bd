"""An edit in the forms of adapters: of low rank as SEMU's own, sparse as PEFT's SHiRA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from semu_peft.adapter.whole_model import add_adapter, taken_back_on_error
from semu_peft.linalg import core
from semu_peft.linalg.factorize import SingularFactors, leading_factors
from semu_peft.objectives.adapter_parts import adapter_configs
from semu_peft.subspace.fill import fill
from semu_peft.subspace.starts import LayerStart
from semu_peft.tuner.adapted import find_embedding, own_modules, own_parameters, semu_layers, targets_for
from semu_peft.tuner.config import SemuConfig
from semu_peft.tuner.keys import PREFIX
from semu_peft.tuner.layer import SemuLayer
from semu_peft.tuner.state_space import read_past_layer
from semu_peft.tuner.targets import layer_class

from .deltas import Delta, LowRank


@dataclass(frozen=True, eq=False)
class Carried:
    """An edit as a SEMU adapter in a model.

    Attributes:
        model: The model with the adapter, active.
        adapter_name: The adapter's name.
        ranks: The rank of each layer.
        errors: `‖ΔW − U Σ Vᵀ‖ / ‖ΔW‖` of each layer.
        left_out: The parameters whose changes no SEMU layer carries: biases, norms, bare parameters, and weights that
            layers share, but for the input embedding's, which is corrected once for all.
        error: The same ratio for the whole edit, with what is left out in it.

    Examples:
        >>> from semu_peft.edits import Edit
        >>> from semu_peft.edits.deltas import Dense
        >>> edit = Edit({"0.weight": Dense(torch.diag(torch.tensor([4.0, 3.0])))})
        >>> carried = edit.to_semu(nn.Sequential(nn.Linear(2, 2)), r=1)
        >>> carried
        Carried(adapter_name='default', ranks={'0': 1}, left_out=(), error=0.6)
    """

    model: Any = field(repr=False)
    adapter_name: str
    ranks: dict[str, int]
    errors: dict[str, float] = field(repr=False)
    left_out: tuple[str, ...]
    error: float


def as_semu(
    model: nn.Module, deltas: Mapping[str, Delta], r: int | None, explained_variance: float, adapter_name: str
) -> Carried:
    """Put the changes of weights into a model as a SEMU adapter.

    Args:
        model: The model.
        deltas: Changes by the full names of parameters, in the shapes that these are stored in.
        r: Keep this many directions of each weight at the most.
        explained_variance: Keep the fewest that hold this share of its change.
        adapter_name: The adapter's name.

    Raises:
        ValueError: No layer can carry any of them.
    """
    parameters = own_parameters(model)
    others = [getattr(config, "ensure_weight_tying", False) for config in adapter_configs(model).values()]
    shared = _shared_names(parameters, model) if all(others) else []  # all adapters of a model have it alike
    layers = _layers_of(deltas, own_modules(model), parameters, shared)
    if not layers:
        raise ValueError(
            f"`model`: SEMU has no layer for any of the edit's parameters {list(deltas)[:3]}. Save the edit as a file."
        )
    changes = {name: delta for name, delta in deltas.items() if name not in layers.values()}
    energies = {name: float(delta.change(parameters[name]).double().square().sum()) for name, delta in changes.items()}
    with taken_back_on_error(model, adapter_name=adapter_name):
        config = SemuConfig(
            target_modules=targets_for(model, list(layers)),
            ensure_weight_tying=any([*others, *(name in shared for name in layers.values())]),
        )
        carrier = _with_adapter(model, config, adapter_name)
        corrected = semu_layers(carrier, adapter_name)
        found = {
            layer: _directions(deltas[name], parameters[name], corrected[layer], r, explained_variance, adapter_name)
            for layer, name in layers.items()
        }
        fill({layer: corrected[layer] for layer in layers}, found, _as_it_is, adapter_name)
    lost = {name: _lost(factors) for name, factors in found.items()}
    kept = sum(float(factors.energy.sum()) for factors in found.values())
    total = kept + sum(energies.values())
    return Carried(
        carrier,
        adapter_name,
        {name: factors.rank for name, factors in found.items()},
        {name: _ratio(lost[name], float(factors.energy.sum())) for name, factors in found.items()},
        tuple(changes),
        round(_ratio(sum(lost.values()) + sum(energies.values()), total), 9),
    )


def as_shira(model: nn.Module, deltas: Mapping[str, Delta]) -> tuple[ShiraConfig, dict[str, Tensor]]:
    """Write sparse changes of linear layers as PEFT's SHiRA.

    Args:
        model: The model.
        deltas: Changes by the full names of parameters.

    Raises:
        ValueError: One is of something else, or of too many numbers.
    """
    modules, parameters = own_modules(model), own_parameters(model)
    odd = [name for name in deltas if type(modules[name.rpartition(".")[0]]) is not nn.Linear or name.endswith("bias")]
    if odd or not deltas:
        raise ValueError(
            f"SHiRA of PEFT changes weights of `nn.Linear` alone, and this edit changes {odd[:3] or 'nothing'}. Save "
            "it as a file (`edit.save`), or carry a part of it (`edit.only(...).to_shira(model)`)."
        )
    changes = {name: delta.change(parameters[name]) for name, delta in deltas.items()}
    r = max(1, *(math.ceil(int((change != 0).sum()) / sum(change.shape)) for change in changes.values()))
    state_dict: dict[str, Tensor] = {}
    for name, change in changes.items():
        m, n = change.shape
        if r * (m + n) > m * n:
            raise ValueError(
                f"SHiRA holds r (m + n) numbers a layer; with r = {r}, which this edit needs, that is more than the "
                f"{m} × {n} of {name!r}. Save the edit as a file (`edit.save`), or leave that layer out (`edit.only`)."
            )
        flat = change.reshape(-1)
        used = (flat != 0).nonzero().squeeze(1)
        spare = (flat == 0).nonzero().squeeze(1)[: r * (m + n) - len(used)]  # padded with zeros, as the count is fixed
        places = torch.cat([used, spare]).sort().values
        layer = PREFIX + name.rpartition(".")[0]
        state_dict[f"{layer}.shira_weight"] = flat[places].contiguous()
        state_dict[f"{layer}.shira_indices"] = torch.stack([places // n, places % n]).to(torch.int32)
    targets = targets_for(model, [name.rpartition(".")[0] for name in changes])
    return ShiraConfig(r=r, target_modules=targets), state_dict


def _shared_names(parameters: Mapping[str, nn.Parameter], model: nn.Module) -> list[str]:
    """The names of the input embedding's weight, where it has several: a correction can be shared by them alone."""
    weight = getattr(find_embedding(model), "weight", None)
    names = [name for name, parameter in parameters.items() if parameter is weight]
    return names if len(names) > 1 else []


def _layers_of(
    deltas: Mapping[str, Delta],
    modules: Mapping[str, nn.Module],
    parameters: Mapping[str, nn.Parameter],
    shared: Sequence[str],
) -> dict[str, str]:
    """The layers that carry changes, each with the name of its change."""
    ids = [id(parameter) for parameter in parameters.values()]
    layers = {}
    for name in deltas:
        alone = ids.count(id(parameters[name])) == 1
        if name.endswith(".weight") and (alone or name in shared):
            own = name if alone else shared[0]
            layer = own.removesuffix(".weight")
            if _has_semu_layer(layer, modules):
                layers[layer] = name
    return layers


def _has_semu_layer(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the weight of a layer can be corrected where it stands; one that others read past its layer cannot."""
    parent, _, child = name.rpartition(".")
    try:
        layer_class(modules[name], name)
    except TypeError:
        return False
    return not read_past_layer(modules[parent], child)


def _with_adapter(model: nn.Module, config: SemuConfig, adapter_name: str) -> nn.Module:
    """A bare model in a `PeftModel`; a denoiser, whose pipeline holds it, or one that has adapters, as it is."""
    of_diffusers = hasattr(model, "_hf_peft_config_loaded") and not isinstance(model, PreTrainedModel)
    if isinstance(model, PeftModel) or of_diffusers or getattr(model, "peft_config", None):
        add_adapter(model, config, adapter_name=adapter_name)
        return model
    return get_peft_model(model, config, adapter_name=adapter_name)


def _directions(
    delta: Delta, weight: Tensor, layer: SemuLayer, r: int | None, explained_variance: float, adapter_name: str
) -> SingularFactors:
    if isinstance(delta, LowRank) and isinstance(layer.get_base_layer(), nn.Linear):
        ones = torch.eye(delta.left.shape[1], dtype=torch.float64, device=delta.left.device)
        product = core.orthonormal(core.LowRank(delta.left, delta.right, ones))
        return core.eckart_young(product).reaching(explained_variance, r)
    return leading_factors(layer.weight_to_matrix(delta.change(weight), adapter_name), explained_variance, r)


def _as_it_is(layer: SemuLayer, directions: SingularFactors, adapter_name: str) -> LayerStart:
    """The start whose correction is the directions' own matrix."""
    left, right, middle = core.diagonal(directions)
    return LayerStart(left, right, core=middle)


def _lost(factors: SingularFactors) -> float:
    kept = factors.singular_values[..., : factors.rank].double().square().sum()
    return max(0.0, float(factors.energy.sum() - kept))


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole > 0 else 0.0
