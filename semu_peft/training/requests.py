"""A request after the other: each an adapter of its own, apart from those of the requests before it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import inject_adapter_in_model
from torch import nn

from semu_peft.adapter.whole_model import taken_back_on_error
from semu_peft.arguments import check_adapter_name, check_kind, check_model
from semu_peft.objectives.adapter_parts import adapter_configs
from semu_peft.objectives.base import LossFunction
from semu_peft.objectives.retain import Retain
from semu_peft.subspace.initialize import initialize_semu_weights
from semu_peft.tuner.config import SemuConfig
from semu_peft.tuner.layer import SemuLayer

from .unlearn import UnlearnResult, unlearn


def add_request(
    model: nn.Module,
    name: str,
    forget: Iterable[Any],
    objective: LossFunction,
    *,
    config: SemuConfig | None = None,
    retain: Retain | Sequence[Retain] | None = None,
    progress: bool = True,
    **training: Any,
) -> UnlearnResult:
    """Forget a request in an adapter of its own, whose directions are orthogonal to those of all earlier requests.

    The other requests' adapters are off while it is trained, so that each undoes nothing but its own data and can be
    taken back alone; a [gate][semu_peft.gates.adapters.gated] then opens for each prompt those that are meant for it.
    Were they all merged instead, two requests would still not write to each other's directions, or read from them.

    Source: O3, arXiv 2407.10223, which trains one LoRA on over the requests and penalises the overlap of one side.

    Args:
        model: A model with a SEMU adapter, from `get_peft_model` or injected; the first request may be that adapter.
        name: The request's name, which is its adapter's.
        forget: The forget batches.
        objective: What to minimise on them.
        config: The adapter's configuration; by default that of another SEMU adapter, without what that has found.
        retain: Terms beside it.
        progress: Show progress bars.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Returns:
        What the run did; the new adapter is the active one.

    Raises:
        ValueError: The name is that of a request that has been trained, or the model has no SEMU adapter and there is
            no `config`. Where training fails, an adapter that was added for it is gone, and one that was there is as it
            was.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, add_request, objectives
        >>> config = SemuConfig(target_modules=["0"], r=2)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), config, adapter_name="first")
        >>> ascent = objectives.GradientAscent()
        >>> for name in ("first", "second"):
        ...     batch = torch.randn(16, 8), torch.randint(6, (16,))
        ...     _ = add_request(model, name, [batch], ascent, max_steps=2, progress=False)
        >>> left = model.base_model.model[0].semu_U
        >>> bool((left["first"].mT @ left["second"]).abs().max() < 1e-6)
        True
    """
    check_model(model)
    check_adapter_name(name)
    configs = {key: each for key, each in adapter_configs(model).items() if isinstance(each, SemuConfig)}
    if config is not None:
        check_kind("config", config, SemuConfig, "a `SemuConfig` or None", "Write `SemuConfig(target_modules=...)`.")
    if name in configs and configs[name].ranks:
        raise ValueError(f"`name` must be new, got {name!r}, which has been forgotten already. Delete it first.")
    earlier = [key for key, each in configs.items() if key != name and each.ranks]
    as_before = taken_back_on_error(model, adapter_name=name) if name not in configs else _fresh_on_error(model, name)
    with as_before:
        if name not in configs:
            _add(model, name, config, configs)
        _activate(model, name)
        said: dict[str, Any] = {"progress": progress, "adapter_name": name}
        initialize_semu_weights(model, forget, objective, orthogonal_to=earlier, **said)
        return unlearn(model, forget, objective, retain=retain, **said, **training)


@contextmanager
def _fresh_on_error(model: nn.Module, name: str) -> Iterator[None]:
    """If the block fails, put an adapter back that had not been initialised, or it would be one that is trained."""
    config = copy.deepcopy(adapter_configs(model)[name])  # what the initialisation finds is written into it
    try:
        yield
    except BaseException:
        _delete(model, name)
        _add(model, name, config, {})
        _activate(model, name)
        raise


def _add(model: nn.Module, name: str, config: SemuConfig | None, configs: dict[str, Any]) -> None:
    if config is None and not configs:
        raise ValueError(
            f"`model` must have a SEMU adapter, got {type(model).__name__} without one. Call "
            "`get_peft_model(model, SemuConfig(...), adapter_name=name)` first, or give `config`."
        )
    wanted = copy.deepcopy(next(iter(configs.values())) if config is None else config)
    if config is None:
        wanted.ranks, wanted.offsets, wanted.forgotten, wanted.parents = {}, [], {}, []
    add: Any = getattr(model, "add_adapter", None)
    if add is not None and hasattr(model, "base_model") and hasattr(model, "peft_config"):
        add(name, wanted)
    else:
        inject_adapter_in_model(wanted, model, adapter_name=name)


def _activate(model: nn.Module, name: str) -> None:
    for layer in model.modules():
        if isinstance(layer, SemuLayer):
            layer.set_adapter([name] if name in layer.semu_core else [])
    own: Any = model
    if hasattr(own, "set_adapter") and name in getattr(own, "peft_config", {}):
        own.set_adapter(name)


def _delete(model: nn.Module, name: str) -> None:
    own: Any = model
    if hasattr(own, "delete_adapter") and name in getattr(own, "peft_config", {}):
        own.delete_adapter(name)
        return
    for layer in model.modules():
        if isinstance(layer, SemuLayer) and name in layer.semu_core:
            layer.delete_adapter(name)
