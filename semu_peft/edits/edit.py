"""A change of some weights in closed form: applied, undone bit for bit, saved, and carried as an adapter."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import ShiraConfig
from torch import Tensor, nn

from semu_peft.arguments import check_count, check_kind, check_model, check_path, check_share, check_switch
from semu_peft.files import load_tensors, save_tensors
from semu_peft.tuner.adapted import base_model

from .carriers import Carried, as_semu, as_shira
from .deltas import Delta, read_delta
from .places import Place, changed, digest_of, places_of, read_numbers, write_numbers

_FORMAT = "semu_edit"


@dataclass(frozen=True, eq=False)
class _Kept:
    """An edit that was applied to a model, and what stood there before."""

    edit: Edit
    before: Mapping[str, Tensor]


_APPLIED: WeakKeyDictionary[nn.Module, list[_Kept]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """Changes of parameters, by name, that need no training.

    A name is that of a parameter (`"head.bias"`), or of a layer, whose weight is then meant, read as a matrix
    `(m, n)` as [`gather`][semu_peft.gradients.gather.gather] reads it. Adapters in the model are looked past: the
    names are those of the model without them.

    Attributes:
        deltas: The changes; see [`deltas`][semu_peft.edits.deltas.Delta].
        made_by: What made it.
        settings: With which settings, as a file can hold them.
        base: The digest of the weights that it was made for; `None` where it fits any.

    Examples:
        >>> from semu_peft.edits import Edit
        >>> from semu_peft.edits.deltas import Dense
        >>> model = nn.Linear(2, 1)
        >>> before, edit = model.bias.item(), Edit({"bias": Dense(torch.ones(1))})
        >>> with edit.apply(model):  # `edit.undo(model)` does the same as the end of the block
        ...     round(model.bias.item() - before, 4)
        1.0
        >>> model.bias.item() == before
        True
    """

    deltas: Mapping[str, Delta]
    made_by: str = "hand"
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None

    def __post_init__(self) -> None:
        check_kind(
            "deltas", self.deltas, Mapping, "changes by the name of their parameter", "Write `{'fc.bias': ...}`."
        )
        for name, delta in self.deltas.items():
            mend = "Make one of `semu_peft.edits.deltas`."
            check_kind("deltas", delta, Delta, f"a mapping of names to changes, as for {name!r}", mend)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value:.4g}" for name, value in self.settings.items() if _is_number(value))
        touched = sum(math.prod(d.shape) if d.places is None else len(d.places) for d in self.deltas.values())
        return f"Edit({self.made_by}({settings}): {touched:,} numbers of {len(self.deltas)} parameters)"

    # ---- what it does to a model ----

    def apply(self, model: nn.Module, *, undoable: bool = True, strict: bool = True) -> Applied:
        """Change the model's weights, in place; all of them, or none where one cannot be.

        Args:
            model: The model; the base weights are changed, beneath any adapters.
            undoable: Keep what the weights were. A sparse change keeps only the numbers that it touches, any other
                whole weights.
            strict: Refuse weights other than those that the edit was made for, where it says which.

        Returns:
            What undoes it; as a context manager, at the end of its block.

        Raises:
            ValueError: A parameter is missing, is of another shape, has no arithmetic (quantised), would not be finite,
                or holds other values than the edit was made for.

        Examples:
            >>> from semu_peft.edits import prune_weights
            >>> model = nn.Linear(4, 4)
            >>> applied = prune_weights(model, share=0.5).apply(model)
            >>> int((model.weight == 0).sum())
            8
            >>> applied.undo()
            >>> int((model.weight == 0).sum())
            0
        """
        check_model(model)
        check_switch("undoable", undoable)
        check_switch("strict", strict)
        places = places_of(self.deltas, model)
        if strict and self.base is not None and digest_of(places) != self.base:
            raise ValueError(
                f"`model`: the weights that this edit changes are not those it was made for ({self.made_by}). Load "
                "that model, undo what was applied to it since, or pass `strict=False` to change these all the same."
            )
        before: dict[str, Tensor] = {}
        is_asked = is_moved = False
        try:
            for name, (parameter, delta) in places.items():
                kept = read_numbers(parameter, delta)
                wanted = changed(kept, delta)
                after = wanted.to(parameter.dtype)
                if not bool(torch.isfinite(after).all()):
                    raise ValueError(f"`model`: the parameter {name!r} would not be finite. Make the edit smaller.")
                before[name] = kept
                write_numbers(parameter, delta, after)
                if not is_moved:  # a number that has moved says enough
                    is_moved = not torch.equal(after, kept)
                    is_asked |= not torch.equal(wanted, kept.to(wanted))
        except BaseException:
            for name, kept in before.items():
                write_numbers(places[name].parameter, places[name].delta, kept)
            raise
        if is_asked and not is_moved:
            kinds = ", ".join(sorted({str(place.parameter.dtype) for place in places.values()}))
            warnings.warn(
                f"The edit changed no number: all its changes are lost to the rounding of {kinds}. Load the model in "
                "float32, carry the edit as an adapter (`edit.to_semu`), or make it larger.",
                stacklevel=2,
            )
        if undoable:
            _APPLIED.setdefault(base_model(model), []).append(_Kept(self, before))
        return Applied(self, model)

    def undo(self, model: nn.Module) -> None:
        """Put the weights back as they were before [`apply`][semu_peft.edits.edit.Edit.apply], bit for bit.

        Args:
            model: The model that it was applied to, in this process; it may have adapters by now.

        Raises:
            ValueError: It was not applied to this model, or not so that it can be undone; a later edit of the same
                weights is still there; or the weights have been changed since.

        Examples:
            >>> from semu_peft.edits.deltas import Dense
            >>> model = nn.Linear(1, 1)
            >>> edit = Edit({"weight": Dense(torch.tensor([[1e9]]))})
            >>> before = model.weight.item()
            >>> _ = edit.apply(model)
            >>> edit.undo(model)
            >>> model.weight.item() == before
            True
        """
        check_model(model)
        stack = _APPLIED.get(base_model(model), [])
        index = next((index for index in reversed(range(len(stack))) if stack[index].edit is self), None)
        if index is None:
            raise ValueError(
                "`model`: this edit was not applied to it in this process, or with `undoable=False`. Load the model's "
                "own weights again."
            )
        places = places_of(self.deltas, model)
        later = [kept.edit for kept in stack[index + 1 :] if set(kept.before) & set(places)]
        if later:
            raise ValueError(f"`model`: {later[-1]} was applied to the same weights later. Undo that one first.")
        before = stack[index].before
        for name, (parameter, delta) in places.items():
            kept = before[name].to(parameter.device)
            expected, current = changed(kept, delta).to(parameter.dtype), read_numbers(parameter, delta)
            tolerance = 8 * torch.finfo(parameter.dtype).eps  # products differ in rounding between devices
            scale = kept.abs().max() if kept.numel() else 0.0
            if not torch.allclose(current, expected, rtol=tolerance, atol=float(tolerance * scale)):
                raise ValueError(
                    f"`model`: the parameter {name!r} has been changed since this edit was applied (trained, merged "
                    "into), and undoing would lose that. Undo that change first, or load the model's own weights again."
                )
        for name, (parameter, delta) in places.items():
            write_numbers(parameter, delta, before[name].to(parameter.device))
        del stack[index]

    def bound_to(self, model: nn.Module) -> Edit:
        """The same edit, for the weights that the model has now and no others.

        Args:
            model: The model, before the edit is applied.

        Examples:
            >>> from semu_peft.edits.deltas import Dense
            >>> model = nn.Linear(1, 1)
            >>> edit = Edit({"bias": Dense(torch.ones(1))}).bound_to(model)
            >>> edit.apply(nn.Linear(1, 1))  # doctest: +IGNORE_EXCEPTION_DETAIL
            Traceback (most recent call last):
            ValueError: `model`: the weights that this edit changes are not those it was made for (hand). ...
        """
        check_model(model)
        return replace(self, base=digest_of(places_of(self.deltas, model)))

    def only(self, *names: str) -> Edit:
        """The changes of these parameters alone, named in full or by the ends of their names.

        Args:
            names: Such as `"head"`, `"fc1.weight"` or `"bias"`.

        Raises:
            ValueError: One of them is none of this edit's.

        Examples:
            >>> from semu_peft.edits.deltas import Dense
            >>> edit = Edit({"fc.weight": Dense(torch.ones(1, 1)), "fc.bias": Dense(torch.ones(1))})
            >>> list(edit.only("weight").deltas)
            ['fc.weight']
        """
        found: dict[str, Delta] = {}
        for wanted in names:
            matching = {n: d for n, d in self.deltas.items() if n == wanted or n.endswith(f".{wanted}")}
            if not matching:
                raise ValueError(f"`names`: {wanted!r} is none of this edit's parameters {list(self.deltas)[:5]} ….")
            found |= matching
        return replace(self, deltas=found, base=None)

    # ---- other forms ----

    def to_semu(
        self, model: nn.Module, *, r: int | None = None, explained_variance: float = 1.0, adapter_name: str = "default"
    ) -> Carried:
        """Carry the edit as a SEMU adapter: `U Σ Vᵀ`, the best approximation of each weight's change in its rank.

        The base weights stay, so that "adapters off" is the original. A change of low rank comes over exactly; of any
        other the error is stated. Biases, norms and whatever else no SEMU layer corrects are left out and named. From
        there the adapter is one like any other: dial it, train it on, save it, export it as a LoRA.

        Source: Eckart and Young, *The approximation of one matrix by another of lower rank*, 1936.

        Args:
            model: The model, without the edit. A bare one is wrapped in a `PeftModel`; a denoiser of diffusers, and
                a model that has adapters, gets the adapter in place.
            r: Keep this many directions of each weight at the most.
            explained_variance: Keep the fewest that hold this share of each weight's `‖ΔW‖²`.
            adapter_name: The adapter's name.

        Returns:
            The model with the adapter, active, and by how much it differs from the edit.

        Raises:
            ValueError: The edit is applied to the model, no layer can carry it, or a bound is out of range.

        Examples:
            >>> from semu_peft.edits.deltas import LowRank
            >>> edit = Edit({"0": LowRank(torch.ones(3, 1), torch.ones(4, 1))})
            >>> carried = edit.to_semu(nn.Sequential(nn.Linear(4, 3)))
            >>> carried.ranks, round(carried.error, 6)
            ({'0': 1}, 0.0)
        """
        check_model(model)
        check_count("r", r, optional=True)
        check_share("explained_variance", explained_variance)
        places = self._unapplied(model)
        return as_semu(model, {n: p.delta for n, p in places.items()}, r, explained_variance, adapter_name)

    def to_shira(self, model: nn.Module) -> tuple[ShiraConfig, dict[str, Tensor]]:
        """Write a sparse edit of linear layers as a SHiRA adapter of stock PEFT, exactly.

        SHiRA has `r (m + n)` numbers in every layer; the layers that need fewer are padded with zeros. What is no
        weight of an `nn.Linear` has no place in it: [`save`][semu_peft.edits.edit.Edit.save] the edit as a file, or
        carry a part of it ([`only`][semu_peft.edits.edit.Edit.only]).

            config, state_dict = edit.to_shira(model)
            model = get_peft_model(model, config)
            set_peft_model_state_dict(model, state_dict)

        Source: Bhardwaj et al. 2024, arXiv 2406.13175, as in PEFT.

        Args:
            model: The model, without the edit.

        Returns:
            The configuration and the state dict.

        Raises:
            ValueError: It changes more than weights of linear layers, or more of one than SHiRA can hold.

        Examples:
            >>> from semu_peft.edits.deltas import Sparse
            >>> edit = Edit({"0.weight": Sparse(torch.tensor([5]), torch.tensor([1.0]), (8, 8))})
            >>> config, state_dict = edit.to_shira(nn.Sequential(nn.Linear(8, 8)))
            >>> config.r, {key: tuple(value.shape) for key, value in state_dict.items()}
            (1, {'base_model.model.0.shira_weight': (16,), 'base_model.model.0.shira_indices': (2, 16)})
        """
        check_model(model)
        return as_shira(model, {name: place.delta for name, place in self._unapplied(model).items()})

    def save(self, path: str | Path) -> Path:
        """Write the edit as one safetensors file, whole or not at all, with what made it in its header.

        Args:
            path: The file.

        Examples:
            >>> import tempfile
            >>> from semu_peft.edits.deltas import Dense
            >>> path = Edit({"bias": Dense(torch.ones(1))}).save(f"{tempfile.mkdtemp()}/edit.safetensors")
            >>> Edit.load(path)
            Edit(hand(): 1 numbers of 1 parameters)
        """
        check_path("path", path)
        tensors = {  # each in memory of its own, as the format wants it: layers may share a factor
            f"{name}|{part}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, delta in self.deltas.items()
            for part, tensor in delta.tensors().items()
        }
        header = {
            "made_by": self.made_by,
            "settings": dict(self.settings),
            "base": self.base,
            "deltas": {name: {"kind": d.kind, "shape": list(d.shape)} for name, d in self.deltas.items()},
        }
        return save_tensors(path, tensors, {_FORMAT: json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read an edit from its file.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged, or no edit.
        """
        tensors, metadata = load_tensors(path, "Edit.save")
        try:
            header = json.loads(metadata[_FORMAT])
            parts: dict[str, dict[str, Tensor]] = {name: {} for name in header["deltas"]}
            for key, tensor in tensors.items():
                name, _, part = key.rpartition("|")
                parts[name][part] = tensor
            deltas = {
                name: read_delta(about["kind"], parts[name], tuple(about["shape"]))
                for name, about in header["deltas"].items()
            }
            return cls(deltas, header["made_by"], header["settings"], header["base"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"`path`: {path} holds no edit, or a damaged one ({error}). Give a file that `Edit.save` wrote."
            ) from error

    def _unapplied(self, model: nn.Module) -> dict[str, Place]:
        if any(kept.edit is self for kept in _APPLIED.get(base_model(model), [])):
            raise ValueError(
                "`model`: this edit is applied to its weights already. Undo it first (`edit.undo(model)`)."
            )
        return places_of(self.deltas, model)


@dataclass(frozen=True, eq=False)
class Applied:
    """An edit in a model; as a context manager it is undone at the end of the block.

    Attributes:
        edit: The edit.
        model: The model.

    Examples:
        >>> from semu_peft.edits.deltas import Dense
        >>> model = nn.Linear(1, 1)
        >>> with Edit({"bias": Dense(torch.ones(1))}).apply(model) as applied:
        ...     applied.edit
        Edit(hand(): 1 numbers of 1 parameters)
    """

    edit: Edit
    model: nn.Module = field(repr=False)

    def undo(self) -> None:
        """Put the weights back as they were."""
        self.edit.undo(self.model)

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
