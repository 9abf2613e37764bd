"""Adapters behind a gate: each example of a batch goes through those that are open for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from semu_peft.arguments import check_path
from semu_peft.objectives.adapter_parts import Part, adapter_configs, adapter_parts
from semu_peft.objectives.original import left_out
from semu_peft.objectives.replica import replicate

from .closed import has_adapter, without_adapters
from .intervention import Gate, Intervention, Weights, first_of, weights_of_rows

GATE_FILE = "gate.safetensors"
"""Where `save_pretrained` puts the gate, beside the adapters."""


def gated(
    model: nn.Module, gate: Gate | Callable[..., Weights], adapter_names: Sequence[str] | None = None
) -> GatedModel:
    """Put a model's adapters behind a gate, see [`GatedModel`][semu_peft.gates.adapters.GatedModel].

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.gates import gated
        >>> base, x = nn.Sequential(nn.Linear(4, 3)), torch.tensor([[1.0, 0, 0, 0], [0.0, 1, 0, 0]])
        >>> original = base(x)
        >>> model = get_peft_model(base, SemuConfig(target_modules=["0"], r=2, init_weights=False))
        >>> model = gated(model, lambda model, x: {"default": x[:, 0]})
        >>> (model(x) == original).all(-1)
        tensor([False,  True])
    """
    return GatedModel(model, gate, adapter_names)


class GatedModel(Intervention):
    """A model whose adapters are active for those examples of a batch on which the gate opens them.

    `y = y₀ + Σ_a w_a (y_a − y₀)` in every layer, with `y₀` what it gives without the gated adapters and `y_a` with one
    of them. Where all weights of an example are 0 that is `y₀` itself, bit for bit the base model; where one is 1 and
    the others 0 it is `y_a` itself. Adapters of any PEFT method, several at once; those that are not gated stay as they
    are. The layers of an open adapter are computed twice for the examples that it is open for, and the gate of a prompt
    costs what it costs to look (one more pass for [`Nearest`][semu_peft.gates.nearest.Nearest]); tokens that follow a
    prompt cost nothing while everything is closed.

    Fused experts of a mixture, whose parameters are corrected one inside the other, are one layer. A router cannot be
    half-way between two choices of experts: for an example it is that of an adapter with a weight above ½. While an
    adapter on parameters is open, its layers have other values for a moment: serve it from one thread at a time.

    A gate hides: whoever holds the weights takes it off, `model.model` is the model without it.

    Args:
        model: A model with adapters (`PeftModel`, or with adapters injected). It stays as it is.
        gate: See [`Gate`][semu_peft.gates.intervention.Gate].
        adapter_names: The adapters that are behind the gate; by default those that it names (`gate.adapter_names`), or
            else all.

    Raises:
        ValueError: The model has no adapter of one of the names.

    Examples:
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.gates import GatedModel
        >>> base = nn.Sequential(nn.Linear(4, 3))
        >>> model = get_peft_model(base, SemuConfig(target_modules=["0"], r=2, init_weights=False))
        >>> GatedModel(model, lambda model, x: {"default": torch.zeros(len(x))}).adapter_names
        ('default',)
    """

    def __init__(
        self, model: nn.Module, gate: Gate | Callable[..., Weights], adapter_names: Sequence[str] | None = None
    ) -> None:
        super().__init__(model, gate)
        if isinstance(adapter_names, str):
            raise TypeError(
                f"`adapter_names` must be a list of names, got {adapter_names!r}. Write [{adapter_names!r}]."
            )
        self._names = None if adapter_names is None else tuple(adapter_names)
        self._tree: _Tree | None = None
        missing = [name for name in self.adapter_names if not has_adapter(model, name)]
        if missing or not self.adapter_names:
            raise ValueError(
                f"`adapter_names` must be adapters of the model, got {list(self.adapter_names)}; it has "
                f"{sorted(adapter_configs(model))}. Add the adapters first, by the names that the gate gives them."
            )

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The adapters that are behind the gate."""
        names = self._names or getattr(self.gate, "adapter_names", None) or adapter_configs(self.model)
        return tuple(names)

    @property
    def base(self) -> nn.Module:
        """The model without the gated adapters, over the same tensors."""
        tree = self._tree
        if tree is None or tree.model is not self.model or tree.names != self.adapter_names:
            # Where this gated model itself was taken to its original, the adapter is not to come back.
            tree = self._tree = _Tree.of(self.model, self.adapter_names, left_out(self) | left_out(self.model))
        return tree.closed

    def decide(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        token = _OPEN.set(None)
        try:
            weights = super().decide(*args, **kwargs)
        finally:
            _OPEN.reset(token)
        unknown = sorted(set(weights) - set(self.adapter_names))
        if unknown:
            raise ValueError(
                f"`gate` must give weights of the adapters {list(self.adapter_names)}, got one of {unknown[0]!r}. Name "
                "it in `adapter_names`, or rename the request."
            )
        return weights

    @contextmanager
    def opened(self, weights: dict[str, Tensor]) -> Iterator[None]:
        token = _OPEN.set(weights)
        try:
            yield
        finally:
            _OPEN.reset(token)

    def train(self, mode: bool = True) -> GatedModel:
        if any(module.training != mode for module in self.modules()):
            self._tree = None  # its modules have modes of their own
        super().train(mode)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._tree = None
        return super()._apply(*args, **kwargs)

    def refresh(self) -> None:
        """See adapters that were added, deleted or switched since; new values of their tensors are seen anyway."""
        self._tree = None

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save the adapters as PEFT does, and the gate beside them as `gate.safetensors`.

        Raises:
            TypeError: The gate is a function, or cannot be saved. Nothing is written then.
        """
        check_path("save_directory", save_directory)
        save = getattr(self.gate, "save", None)
        if save is None:
            raise TypeError(
                f"`gate` must be one that can be saved, got {type(self.gate).__name__}. Save `model.model`."
            )
        saver: Any = self.model
        save(Path(save_directory) / GATE_FILE)
        saver.save_pretrained(save_directory, **kwargs)


_OPEN: ContextVar[dict[str, Tensor] | None] = ContextVar("semu_open", default=None)


@dataclass(eq=False)
class _Tree:
    """The model without the gated adapters, in whose layers hooks put those in that are open."""

    model: nn.Module
    names: tuple[str, ...]
    closed: nn.Module

    @classmethod
    def of(cls, model: nn.Module, names: tuple[str, ...], gone: frozenset[str]) -> _Tree:
        live = [name for name in names if name not in gone]
        closed = without_adapters(model, live)
        layers: dict[int, tuple[nn.Module, dict[str, nn.Module]]] = {}
        for name in live:
            others = [each for each in names if each != name]
            pairs = list(zip(adapter_parts(model, name), adapter_parts(closed, name), strict=True))
            opened: dict[int, nn.Module] = {}
            for with_it, without_it in reversed(pairs):  # what is inside first
                opened[id(without_it.layer)] = _with_adapter(with_it, without_it.layer, others, opened)
            inside = {id(vars(part.layer)["_modules"].get("base_layer")) for _, part in pairs}
            for _, part in pairs:
                if id(part.layer) not in inside:  # of layers inside each other, the outermost
                    layers.setdefault(id(part.layer), (part.layer, {}))[1][name] = opened[id(part.layer)]
        for layer, opened_ones in layers.values():
            layer.register_forward_hook(partial(_put_in, opened=opened_ones), with_kwargs=True)
        return cls(model, names, closed)


def _with_adapter(part: Part, closed: Any, others: list[str], inside: dict[int, nn.Module]) -> nn.Module:
    """A layer as it is with one gated adapter, over the closed one's base layer, or over what is opened inside."""
    opened = object.__new__(type(part.layer))
    vars(opened).update(vars(part.layer))  # past `__setattr__`, as a module and not a part of one
    inner = vars(closed)["_modules"]
    replaced = {key: inner[key] for key in ("base_layer", "original_module") if key in inner}
    base: Any = replaced.get("base_layer")
    if id(base) in inside:
        replaced["base_layer"] = inside[id(base)]
    elif hasattr(part.layer, "parameter_name") and not isinstance(base, BaseTunerLayer):
        # It runs with another parameter for a moment, of which whoever calls the closed one is to see nothing.
        replaced["base_layer"] = (replicate(base) or {}).get(id(base), base)
    vars(opened)["_modules"] = {**vars(opened)["_modules"], **replaced}
    staying = [] if closed._disable_adapters else list(closed.active_adapters)
    staying = [name for name in staying if name not in (part.adapter_name, *others)]
    opened._active_adapter = [part.adapter_name] if part.beside else [*staying, part.adapter_name]
    opened._disable_adapters = False
    return opened


def _put_in(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, opened: dict[str, nn.Module]
) -> Any:
    weights = _OPEN.get()
    if weights is None:
        return None
    here = {name: weights[name] for name in opened if name in weights and bool((weights[name] > 0).any())}
    if not here:
        return None
    stacked = torch.stack(list(here.values()))
    alone = (stacked > 0).sum(0) == 1  # where nothing has to be added up
    result = output
    for name, each in here.items():
        rows = weights_of_rows(each, first_of(output))
        chosen = (rows > 0).nonzero()[:, 0]
        added = _run(opened[name], chosen, args, kwargs, len(rows))
        exactly = weights_of_rows(alone & (each == 1), first_of(output))
        result = _mixed(output, result, added, chosen, rows, exactly)
    return result


def _run(layer: nn.Module, chosen: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Any:
    """What the layer gives for some rows; of layers that take more than one tensor, all rows are computed."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if len(tensors) == 1 and args and args[0] is tensors[0] and len(tensors[0]) == rows:
        return layer.forward(tensors[0][chosen], *args[1:], **kwargs)
    return _rows_of(layer.forward(*args, **kwargs), chosen)


def _mixed(base: Any, result: Any, added: Any, chosen: Tensor, weights: Tensor, exactly: Tensor) -> Any:
    if isinstance(base, (tuple, list)):
        if any(_is_choice(part, len(weights)) for part in base):
            exactly, weights = weights > 0.5, (weights > 0.5).to(weights)
        parts = zip(base, result, added, strict=True)
        return type(base)(_mixed(*part, chosen, weights, exactly) for part in parts)
    if not isinstance(base, Tensor) or len(base) != len(weights):
        return base
    shape = (-1, *(1 for _ in base.shape[1:]))
    weight, full = weights[chosen].view(shape).to(base.dtype), exactly[chosen].view(shape)
    changed = torch.where(full, added, result[chosen] + weight * (added - base[chosen]))
    return result.index_copy(0, chosen, changed.to(base.dtype))


def _is_choice(part: Any, rows: int) -> bool:
    """Whether a layer gives indices for each row, as a router does of the experts that it chooses."""
    return (
        isinstance(part, Tensor) and part.dim() > 0 and len(part) == rows and part.dtype in (torch.int32, torch.int64)
    )


def _rows_of(output: Any, chosen: Tensor) -> Any:
    if isinstance(output, (tuple, list)):
        return type(output)(_rows_of(part, chosen) for part in output)
    return output[chosen] if isinstance(output, Tensor) else output
