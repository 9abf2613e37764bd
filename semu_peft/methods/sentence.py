"""What most methods come down to: the subspace of an objective, where there is one to be found, and training in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from semu_peft.gradients.targets import layers_with_inputs
from semu_peft.objectives.adapter_parts import all_parts
from semu_peft.objectives.base import LossFunction
from semu_peft.objectives.retain import Retain
from semu_peft.subspace.initialize import initialize_semu_weights
from semu_peft.subspace.starts.base import Start
from semu_peft.training.unlearn import UnlearnResult, unlearn
from semu_peft.tuner.layer import SemuLayer

RetainData = Retain | Iterable[Any] | None
"""Batches, for the term that a method says; or a `Retain` or several, each with its own."""


def minimise(
    model: nn.Module,
    forget: Iterable[Any],
    objective: LossFunction,
    retain: Retain | Sequence[Retain] | None = None,
    *,
    start: Start | None = None,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """Give a SEMU adapter the bases of the objective's forget gradient, if it has none yet, and train.

    What is trained is up to the model: a SEMU adapter, an adapter of any other PEFT method, or, of a bare model, all
    weights that require gradients. By default cores train by natural gradients and everything else by AdamW.

    Args:
        model: The model, changed in place.
        forget: The forget batches.
        objective: What to minimise on them.
        retain: Terms beside it.
        start: What a SEMU adapter starts from.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Raises:
        ValueError: There is a `start` and no SEMU adapter without bases.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, objectives
        >>> from semu_peft.methods.sentence import minimise
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), SemuConfig(target_modules=["0"]))
        >>> forget = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))]
        >>> minimise(model, forget, objectives.DecoupledDistillation(), max_steps=2, progress=False).steps
        2
    """
    found_bases = find_bases(model, forget, objective, start=start, progress=progress, adapter_name=adapter_name)
    if start is not None and not found_bases:
        raise ValueError(
            "`model` must have a SEMU adapter that is not initialised, as this method is where it starts. Call "
            "`get_peft_model(model, SemuConfig(...))` first, and the method after that."
        )
    return unlearn(model, forget, objective, retain=retain, progress=progress, adapter_name=adapter_name, **training)


def find_bases(
    model: nn.Module,
    forget: Iterable[Any],
    objective: LossFunction,
    *,
    start: Start | None = None,
    progress: bool = True,
    adapter_name: str | None = None,
) -> bool:
    """Initialise a SEMU adapter that has no bases yet, and say whether there was one.

    Args:
        model: The model, with or without adapters.
        forget: The forget batches.
        objective: Whose forget gradient.
        start: What the adapter starts from.
        progress: Show progress bars.
        adapter_name: Its name; by default `"default"`.

    Examples:
        >>> from semu_peft import objectives
        >>> from semu_peft.methods.sentence import find_bases
        >>> find_bases(nn.Linear(4, 3), [], objectives.CrossEntropy())  # no adapter
        False
    """
    name = adapter_name or "default"
    layers = [each for each in model.modules() if isinstance(each, SemuLayer) and name in each.semu_core]
    if not layers or any(layer.is_initialized(name) for layer in layers):
        return False
    initialize_semu_weights(model, forget, objective, start=start, progress=progress, adapter_name=name)
    return True


def covariance_targets(model: nn.Module, adapter_name: str | None = None) -> dict[str, Any]:
    """Where `gather` takes second moments of inputs and output gradients: its `targets` and `adapter_name`.

    Args:
        model: The model, with a SEMU adapter, whose layers are then meant, or without, where all are.
        adapter_name: The adapter's name; by default that of the one that is trained.

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.methods.sentence import covariance_targets
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.Linear(3, 2))
        >>> covariance_targets(model)
        {'targets': '1|2', 'adapter_name': None}
        >>> covariance_targets(get_peft_model(model, SemuConfig(target_modules=["2"])))
        {'targets': '2', 'adapter_name': 'default'}
    """
    parts = [part for part in all_parts(model) if isinstance(part.layer, SemuLayer) and not part.beside]
    trained = [part.adapter_name for part in parts if part.is_trained]
    name = adapter_name or next(iter(trained or [part.adapter_name for part in parts]), None)
    return {"targets": layers_with_inputs(model, name), "adapter_name": name}


def keep(retain: Any, objective: LossFunction, weight: float = 1.0) -> Any:
    """Retain batches as a term of a method; what is a term already stays, and None.

    Examples:
        >>> import torch
        >>> from semu_peft import objectives
        >>> from semu_peft.methods.sentence import keep
        >>> keep([(torch.randn(2, 3), torch.tensor([0, 1]))], objectives.CrossEntropy(), 0.5)
        Retain(list of 1, CrossEntropy(), weight=0.5)
    """
    several = isinstance(retain, (list, tuple)) and len(retain) > 0 and isinstance(retain[0], Retain)
    return retain if retain is None or several or isinstance(retain, Retain) else Retain(retain, objective, weight)
