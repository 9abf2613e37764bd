"""Quantisation: does the correction outlive the rounding of the merged weights?"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from semu_peft.arguments import check_count, check_model
from semu_peft.objectives.adapter_parts import all_parts
from semu_peft.objectives.attackers import weights_of
from semu_peft.objectives.batches import check_batches
from semu_peft.objectives.original import with_values, without_adapter
from semu_peft.tuner.adapted import find_token_head
from semu_peft.tuner.keys import without_wrappers
from semu_peft.tuner.layer import SemuLayer

from .knowledge import Measure, accuracy

_SURVIVES = 0.5
_MATRICES = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention, Conv1D)


@dataclass(frozen=True)
class LayerRounding:
    """What rounding leaves of one layer's correction.

    Attributes:
        layer: The layer's name.
        norm: `‖ΔW‖`, of all its entries.
        survived: `⟨Q(W + ΔW) − Q(W), ΔW⟩ / ‖ΔW‖²`: 1 where it is all there, 0 where it vanishes.
        moved: The share of the entries that are rounded to another level for it.

    Examples:
        >>> LayerRounding("fc1", norm=0.5, survived=0.9, moved=0.2)
        LayerRounding(layer='fc1', norm=0.5, survived=0.9, moved=0.2)
    """

    layer: str
    norm: float
    survived: float
    moved: float


@dataclass(frozen=True)
class QuantizationAttack:
    """A model before and after its merged weights are rounded to few bits.

    Attributes:
        bits: Bits a weight.
        group_size: How many weights of a row share a scale; None for the whole row.
        forget: How much of what was forgotten is known, before and after, in percent.
        retain: The same of the rest, where there is any.
        reference: Of the retrained model, on the forget data.
        layers: What became of each layer's correction, where the model has an adapter.
        vanished: The layers of whose correction less than half is left.
        smallest_surviving_norm: The smallest norm of a layer's correction of which at least half is left; None where
            all vanish or are zero.

    Examples:
        >>> QuantizationAttack(4, None, (0.0, 83.0), (95.0, 94.0), layers=(LayerRounding("fc1", 0.1, 0.0, 0.0),))
        QuantizationAttack(4 bits a row: forgotten 0.0 → 83.0, retained 95.0 → 94.0, 1 of 1 corrections vanish)
    """

    bits: int
    group_size: int | None
    forget: tuple[float, float]
    retain: tuple[float, float] | None = None
    reference: tuple[float, float] | None = None
    layers: tuple[LayerRounding, ...] = field(default=(), repr=False)
    vanished: tuple[str, ...] = field(init=False, repr=False, compare=False)
    smallest_surviving_norm: float | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Fields and no properties, so that a report has them too."""
        left = [layer.norm for layer in self._corrected() if layer.survived >= _SURVIVES]
        gone = tuple(layer.layer for layer in self._corrected() if layer.survived < _SURVIVES)
        object.__setattr__(self, "vanished", gone)
        object.__setattr__(self, "smallest_surviving_norm", min(left, default=None))

    def _corrected(self) -> list[LayerRounding]:
        """The layers that have something to round: a correction of zeros neither survives nor vanishes."""
        return [layer for layer in self.layers if layer.norm > 0]

    @property
    def row(self) -> tuple[str, str, str]:
        """The attack, what it found, and what it found of the reference."""
        other = "" if self.reference is None else f"forgotten {self.reference[0]:.1f} → {self.reference[1]:.1f}"
        return f"quantisation: {self._how()}", self._found(), other

    def _how(self) -> str:
        return f"{self.bits} bits a {'row' if self.group_size is None else f'group of {self.group_size}'}"

    def _found(self) -> str:
        kept = "" if self.retain is None else f", retained {self.retain[0]:.1f} → {self.retain[1]:.1f}"
        return f"forgotten {self.forget[0]:.1f} → {self.forget[1]:.1f}{kept}{self._left()}"

    def _left(self) -> str:
        corrected, smallest = self._corrected(), self.smallest_surviving_norm
        if not corrected:
            return ", no correction to round: all are zero" if self.layers else ""
        survives = "" if smallest is None else f", the smallest that survives has the norm {smallest:.3g}"
        return f", {len(self.vanished)} of {len(corrected)} corrections vanish{survives}"

    def __repr__(self) -> str:
        return f"QuantizationAttack({self._how()}: {self._found()})"


def round_to_nearest(weight: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """Symmetric round-to-nearest, `s · round(W / s)` with `s = max|W| / (2^(bits − 1) − 1)` of each row or group.

    Args:
        weight: Any weight; a row is what leads to one output.
        bits: At least 2.
        group_size: Weights of a row that share a scale; the last group of a row may be smaller.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import round_to_nearest
        >>> round_to_nearest(torch.tensor([[0.2, -1.4, 7.0]]), bits=4)
        tensor([[ 0., -1.,  7.]])
    """
    rows = _as_rows(weight)
    step = _steps(rows, bits, group_size)
    levels = 2 ** (bits - 1) - 1
    return ((rows / step).round().clamp(-levels, levels) * step).view(weight.shape).to(weight.dtype)


@dataclass(frozen=True)
class RoundedWeight:
    """A weight that rounding reaches, and what its rows are, of which each leads to one output.

    Attributes:
        weight: `(m, n)`, a convolution's `(m, n, …)`, or fused experts, `(experts, m, n)`.
        by_input: Whether its matrices are stored as `(n, m)`, as `Conv1D` and some experts are.
        is_stack: Whether it holds one matrix after the other.

    Examples:
        >>> experts = RoundedWeight(nn.Parameter(torch.zeros(4, 3, 2)), by_input=True, is_stack=True)
        >>> experts.rows(experts.weight).shape, experts.of_rows(torch.zeros(8, 3)).shape
        (torch.Size([8, 3]), torch.Size([4, 3, 2]))
    """

    weight: nn.Parameter
    by_input: bool = False
    is_stack: bool = False

    def rows(self, values: Tensor) -> Tensor:
        """Values of the weight's shape, a row for each output."""
        values = values.mT if self.by_input else values
        return values.flatten(0, 1) if self.is_stack else values.flatten(1)

    def of_rows(self, rows: Tensor) -> Tensor:
        """Rows in the weight's shape."""
        values = self.weight.mT if self.by_input else self.weight
        rows = rows.reshape(values.shape)
        return rows.mT.contiguous() if self.by_input else rows


def _as_rows(weight: Tensor) -> Tensor:
    weight = weight.detach().float()
    return weight.flatten(1) if weight.dim() > 1 else weight.view(1, -1)


def _steps(rows: Tensor, bits: int, group_size: int | None) -> Tensor:
    """The distance of two levels, for each entry."""
    pieces = [rows] if group_size is None else rows.split(group_size, dim=1)
    steps = [piece.abs().amax(1, keepdim=True).expand_as(piece) / (2 ** (bits - 1) - 1) for piece in pieces]
    step = torch.cat(steps, 1)
    return torch.where(step > 0, step, torch.ones_like(step))


def quantization(
    model: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any] | None = None,
    *,
    bits: int = 4,
    group_size: int | None = None,
    reference: nn.Module | None = None,
    measure: Measure = accuracy,
) -> QuantizationAttack:
    """Round all matrices of the merged model to nearest, and see if what was forgotten comes back.

    Corrections that are small beside a weight's step are rounded away (Zhang et al. 2024, arXiv 2410.16454): models
    that had forgotten with a utility constraint gave back most of it at four bits. What is rounded is what
    [`weights_to_round`][semu_peft.evaluation.quantization.weights_to_round] names. The model itself is not written.

    Args:
        model: The unlearned model, with its adapter or merged.
        forget: Batches of what was forgotten.
        retain: Batches of the rest.
        bits: Bits a weight, at least 2.
        group_size: Weights of a row that share a scale; by default the whole row.
        reference: The retrained model, rounded alike.
        measure: `(model, batches) -> percent`; by default the accuracy.

    Returns:
        Before and after, and what is left of each correction.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: `bits` is below 2, there is no batch, or an adapter's correction cannot be told.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import quantization
        >>> model, data = torch.nn.Linear(2, 2), [(torch.eye(2), torch.tensor([1, 0]))]
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[0.0, 9.5], [0.4, 9.0]])), model.bias.zero_()
        >>> quantization(model, data, bits=4).forget  # 0.4 is lost beside 9, and with it what tells the first
        (100.0, 50.0)
    """
    check_model(model)
    check_count("bits", bits, least=2)
    check_count("group_size", group_size, optional=True)
    check_batches(forget, "forget")
    data = [list(forget), [] if retain is None else list(retain)]
    if not data[0]:
        raise ValueError("`forget` must give at least one batch, got none. Check that it has not been used up.")
    rounded, layers = _rounded(model, bits, group_size)
    pairs = [(measure(model, each), measure(rounded, each)) if each else None for each in data]
    assert pairs[0] is not None
    beside = None
    if reference is not None:
        check_model(reference, "reference")
        beside = measure(reference, data[0]), measure(_rounded(reference, bits, group_size)[0], data[0])
    return QuantizationAttack(bits, group_size, pairs[0], pairs[1], beside, tuple(layers))


def weights_to_round(model: nn.Module) -> dict[str, RoundedWeight]:
    """The weights that rounding for deployment reaches: linear layers, convolutions and fused experts, by name.

    As bitsandbytes, GPTQ and AWQ do, it leaves embeddings and a language model's head as they are, and vectors. The
    head of a classifier is a linear layer like any other.

    Args:
        model: A model, with its adapter or without; an adapter's own weights are not among them.

    Raises:
        ValueError: There is none of floating-point numbers.

    Examples:
        >>> from semu_peft.evaluation.quantization import weights_to_round
        >>> list(weights_to_round(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))))
        ['1.weight']
    """
    head = getattr(find_token_head(model), "weight", None)
    owners = {id(weight): (module, own) for module in model.modules() for own, weight in module._parameters.items()}
    found = {}
    for name, weight in weights_of(model).items():
        module, own = owners[id(weight)]
        is_matrix = isinstance(module, _MATRICES) and own in ("weight", "in_proj_weight")
        is_experts = not is_matrix and weight.dim() == 3 and weight.shape[0] > 1  # in a bare parameter
        if weight is not head and weight.dim() > 1 and (is_matrix or is_experts):
            by_input = _stored_by_input(module, own, weight) if is_experts else isinstance(module, Conv1D)
            found[name] = RoundedWeight(weight, by_input, is_experts)
    if not found:
        raise ValueError("`model` must have linear layers with floating-point weights, got none. Load it unquantised.")
    return found


def _stored_by_input(experts: nn.Module, name: str, weight: Tensor) -> bool:
    """Whether fused experts are stored as Conv1D is: they say so (GPT-OSS), or their hidden size shows it (Llama 4)."""
    told, hidden = getattr(experts, "is_transposed", None), getattr(experts, "hidden_size", None)
    if told is not None or hidden is None or weight.shape[1] == weight.shape[2]:
        return bool(told)
    return bool(weight.shape[2 if name.startswith("down") else 1] == hidden)


@torch.no_grad()
def _rounded(model: nn.Module, bits: int, group_size: int | None) -> tuple[nn.Module, list[LayerRounding]]:
    """The merged model with rounded matrices, and what that left of the corrections."""
    corrections = _corrections(model)
    has_adapter = bool(corrections)
    if corrections and any(part.beside for part in all_parts(model)):
        raise ValueError(
            "`model` has modules or tokens that are trained in full beside its adapter, so the correction is not "
            "all of it. Merge the adapter first: `model.merge_and_unload()`."
        )
    values, layers, to_round = {}, [], weights_to_round(model)
    for name, weight in weights_of(model).items():
        delta = corrections.pop(id(weight), None)
        merged = weight.detach() if delta is None else (weight.float() + delta.float()).to(weight.dtype)
        if name not in to_round:
            if delta is not None:
                values[id(weight)] = merged
            continue
        each = to_round[name]
        merged = each.rows(merged)
        rounded = round_to_nearest(merged, bits, group_size)
        values[id(weight)] = each.of_rows(rounded)
        if delta is not None:
            layer = without_wrappers(name).removesuffix(".weight").removeprefix("base_model.model.")
            before = round_to_nearest(each.rows(weight.detach()), bits, group_size)
            step = _steps(_as_rows(merged), bits, group_size)
            layers.append(_left(layer, before, rounded, each.rows(delta), step))
    if corrections:
        raise ValueError(
            f"`model`: the corrections of {len(corrections)} layers are not those of floating-point weights in memory, "
            "so they cannot be merged and rounded. Merge the adapter first: `model.merge_and_unload()`."
        )
    for name in {part.adapter_name for part in all_parts(model)} if has_adapter else ():
        model = without_adapter(model, name)
    return with_values(model, values), layers


def _corrections(model: nn.Module) -> dict[int, Tensor]:
    """By the `id` of a parameter, the sum of what merging active adapters would add to it."""
    found: dict[int, Tensor] = {}
    layers = {id(part.layer): part.layer for part in all_parts(model) if not part.beside}
    for layer in layers.values():
        if isinstance(layer, BaseTunerLayer) and not layer.merged and not layer.disable_adapters:
            for key, change in _changes(layer):
                found[key] = found.get(key, 0) + change
    return found


def _changes(layer: Any) -> Iterator[tuple[int, Tensor]]:
    """What merging a layer's active adapters would do to its parameters, of one at a time."""
    base = layer.get_base_layer()
    if isinstance(layer, SemuLayer):
        for name in layer.active_adapters:
            if name in layer.semu_core:
                delta = layer.get_delta_weight(name)
                weight: Any = getattr(base, "weight", None)
                yield id(weight), delta.view(getattr(weight, "shape", delta.shape))
        return
    merged = copy.deepcopy(layer)  # many methods are no sums: they rescale, rotate, or train a bias as well
    merged.merge()
    after = dict(merged.get_base_layer().named_parameters())
    for name, parameter in base.named_parameters():
        yield id(parameter), after[name].float() - parameter.float()


def _left(layer: str, before: Tensor, after: Tensor, delta: Tensor, step: Tensor) -> LayerRounding:
    change, delta = (after - before).double(), delta.double()
    energy = float((delta**2).sum())
    survived = float((change * delta).sum()) / energy if energy else 1.0
    # A row's largest entry moves its levels a little; another level is half a step away at least.
    return LayerRounding(layer, energy**0.5, survived, float((change.abs() > step / 2).double().mean()))
