"""Neurons that are moved while the model is called: clamped, or mirrored to where retain data have them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from semu_peft.arguments import check_model, check_share, check_switch
from semu_peft.model_state import aside, eval_mode
from semu_peft.objectives.batches import IGNORED, check_batches

from .hidden import find_layer, for_a_look, inputs_of, real_tokens
from .intervention import Gate, Hooks, Intervention, Weights, always, any_open, first_of, weights_of_rows

Side = Literal["output", "input"]


class Adjustment(Protocol):
    """Moves the activations `(…, D)` of a layer."""

    def __call__(self, activations: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Clamp:
    """Neurons held at a value.

    Source: Decoding specialised feature neurons, arXiv 2501.02688; `localize.decode_neurons` finds them.

    Attributes:
        neurons: Which.
        value: The value.

    Examples:
        >>> Clamp(torch.tensor([1]))(torch.tensor([[3.0, 4.0]]))
        tensor([[3., 0.]])
    """

    neurons: Tensor
    value: float = 0.0

    def __call__(self, activations: Tensor) -> Tensor:
        return activations.index_fill(-1, self.neurons.to(activations.device).flatten(), self.value)


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and standard deviation of a layer's activations over tokens, `(D,)`.

    Examples:
        >>> Moments(torch.zeros(2), torch.ones(2), 5).count
        5
    """

    mean: Tensor
    deviation: Tensor
    count: int

    def __repr__(self) -> str:
        return f"Moments({len(self.mean)} neurons, {self.count} tokens)"


@dataclass(eq=False)
class NeuronAdjust:
    """Neurons whose activation looks like one of the forget data, mirrored to where retain data would have it.

    Where `N_f(a) ≥ N_r(a)` and a draw `u ≥ N_r / (N_r + N_f)`, `a ← 2 μ_r − [(a − μ_f) / σ_f · σ_r + μ_r]`.

    Source: Neuron Adjust, arXiv 2503.21730. Its release computes σ_f from means, stores a variance as the deviation,
    and has one draw for all neurons of a row; here σ are deviations, and each neuron of each token has its own draw.

    Attributes:
        neurons: Which.
        forget: Of the forget data.
        retain: Of the retain data.
        seed: Of the draws; None always moves where `N_f ≥ N_r`.

    Examples:
        >>> moments = [Moments(torch.tensor([mean]), torch.ones(1), 9) for mean in (2.0, 0.0)]
        >>> adjust = NeuronAdjust(torch.tensor([0]), *moments, seed=None)
        >>> adjust(torch.tensor([[1.8], [0.1]]))
        tensor([[0.2000],
                [0.1000]])
    """

    neurons: Tensor
    forget: Moments
    retain: Moments
    seed: int | None = 0
    _draws: torch.Generator = field(default_factory=torch.Generator, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.seed is not None:
            self._draws.manual_seed(self.seed)

    def densities(self, activations: Tensor) -> tuple[Tensor, Tensor]:
        """`N_f(a)` and `N_r(a)` of the neurons' activations `(…, k)`."""
        as_forget, as_retain = self._log_densities(activations)
        return as_forget.exp(), as_retain.exp()

    def __call__(self, activations: Tensor) -> Tensor:
        chosen = self.neurons.to(activations.device).flatten()
        a = activations[..., chosen].float()
        as_forget, as_retain = self._log_densities(a)  # far out both densities are no more than rounding
        moves = as_forget >= as_retain
        if self.seed is not None:
            draw = torch.rand(a.shape, generator=self._draws).to(a.device)
            moves &= draw >= torch.sigmoid(as_retain - as_forget)
        (mean_f, deviation_f), (mean_r, deviation_r) = self._of(self.forget), self._of(self.retain)
        mirrored = mean_r.to(a) - (a - mean_f.to(a)) / deviation_f.to(a) * deviation_r.to(a)
        return activations.index_copy(-1, chosen, torch.where(moves, mirrored, a).to(activations.dtype))

    def _log_densities(self, activations: Tensor) -> tuple[Tensor, Tensor]:
        return _log_normal(activations, *self._of(self.forget)), _log_normal(activations, *self._of(self.retain))

    def _of(self, moments: Moments) -> tuple[Tensor, Tensor]:
        chosen = self.neurons.flatten()
        return moments.mean[chosen], moments.deviation[chosen].clamp_min(1e-6)


class ActivationGate(Intervention):
    """A model in whose layers some neurons are moved, for the examples on which a gate opens.

    Args:
        model: The model.
        adjustments: By the layer's name what is done to its activations: a
            [`Clamp`][semu_peft.gates.activations.Clamp], a
            [`NeuronAdjust`][semu_peft.gates.activations.NeuronAdjust], or any function of a tensor.
        gate: For which examples; by default for all.
        side: What the layers give, or what they take in.

    Raises:
        ValueError: There is no such layer.

    Examples:
        >>> from semu_peft.gates import ActivationGate, Clamp
        >>> model, x = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), torch.ones(1, 2)
        >>> ActivationGate(model, {"0": Clamp(torch.tensor([0, 2]))})(x)[0, [0, 2]]
        tensor([0., 0.], grad_fn=<IndexBackward0>)
    """

    def __init__(
        self,
        model: nn.Module,
        adjustments: Mapping[str, Adjustment],
        gate: Gate | Callable[..., Weights] = always,
        *,
        side: Side = "output",
    ) -> None:
        super().__init__(model, gate)
        _check_side(side)
        for name in adjustments:
            find_layer(model, name)
        self.adjustments, self.side = dict(adjustments), side

    def opened(self, weights: dict[str, Tensor]) -> AbstractContextManager[None]:
        rows = any_open(weights)
        layers = [(find_layer(self.model, name), adjust) for name, adjust in self.adjustments.items()]
        if self.side == "input":
            before = [(layer, partial(_moved_input, rows=rows, adjust=adjust)) for layer, adjust in layers]
            return self.hooked([], before=before)
        return self.hooked([(layer, partial(_moved_output, rows=rows, adjust=adjust)) for layer, adjust in layers])


@torch.no_grad()
def neuron_moments(
    model: nn.Module, batches: Iterable[Any], layers: Iterable[str], *, side: Side = "output", progress: bool = True
) -> dict[str, Moments]:
    """Mean and standard deviation of neurons over the tokens of answers: not of prompts, nor of padding.

    Args:
        model: The model.
        batches: Batches; of those without labels all real tokens count.
        layers: The layers' names.
        side: What the layers give, or what they take in.
        progress: Show a progress bar.

    Raises:
        ValueError: There is no such layer, or no token.

    Examples:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> found = neuron_moments(nn.Sequential(nn.Identity()), [x], ["0"], progress=False)["0"]
        >>> found.mean, found.deviation
        (tensor([2.]), tensor([1.]))
    """
    check_model(model)
    check_batches(batches)
    check_switch("progress", progress)
    _check_side(side)
    names = list(layers)
    sums: dict[str, list[Tensor]] = {}
    seen: dict[str, Tensor] = {}
    hooks = [(find_layer(model, name), partial(_keep, seen=seen, name=name, side=side)) for name in names]
    with eval_mode(model), aside(), Hooks(hooks):
        for batch in tqdm(batches, desc="Activations", disable=not progress, leave=False):
            args, kwargs, labels = inputs_of(batch)
            model(*args, **for_a_look(model, kwargs))
            for name in names:
                _add(sums, name, seen[name], kwargs, labels)
    if not sums or any(float(each[0]) == 0 for each in sums.values()):
        raise ValueError("`batches` must have tokens that count, got none. Check the labels: −100 leaves tokens out.")
    found = {}
    for name, (count, total, squares) in sums.items():
        mean = total / count
        deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
        found[name] = Moments(mean.float().cpu(), deviation.float().cpu(), int(count))
    return found


def adjust_neurons(
    forget: Mapping[str, Moments], retain: Mapping[str, Moments], share: float = 0.005, *, seed: int | None = 0
) -> dict[str, NeuronAdjust]:
    """Choose the neurons of all layers whose mean rises most on forget data, `μ_f − μ_r`.

    Args:
        forget: Moments on forget data.
        retain: On retain data.
        share: Which share of all neurons; there .005 for languages and .03 for code and mathematics.
        seed: Of the draws, which are other ones in each layer; None for none.

    Raises:
        ValueError: The layers are not the same.

    Examples:
        >>> forget = {"up": Moments(torch.tensor([0.0, 2.0]), torch.ones(2), 9)}
        >>> retain = {"up": Moments(torch.zeros(2), torch.ones(2), 9)}
        >>> adjust_neurons(forget, retain, 0.5)["up"].neurons
        tensor([1])
    """
    check_share("share", share)
    if not forget or set(forget) != set(retain):
        raise ValueError(f"`retain` must be of the layers {sorted(forget)}, got {sorted(retain)}. Take the same.")
    rises = {name: forget[name].mean - retain[name].mean for name in forget}
    every = torch.cat(list(rises.values()))
    order = every.argsort(descending=True)[: max(1, round(share * len(every)))]
    chosen = torch.zeros(len(every), dtype=torch.bool).index_fill(0, order, True)
    parts = chosen.split([len(each) for each in rises.values()])
    seeds: list[Any] = [None] * len(rises)
    if seed is not None:
        seeds = torch.randint(2**62, (len(rises),), generator=torch.Generator().manual_seed(seed)).tolist()
    return {
        name: NeuronAdjust(part.nonzero()[:, 0], forget[name], retain[name], own)
        for name, part, own in zip(rises, parts, seeds, strict=True)
        if part.any()
    }


def _log_normal(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    z = (x - mean.to(x)) / deviation.to(x)
    return -0.5 * z.square() - deviation.to(x).log() - 0.5 * math.log(2 * math.pi)


def _check_side(side: Any) -> None:
    if side not in ("output", "input"):
        raise ValueError(f"`side` must be 'output' or 'input', got {side!r}. Use one of these.")


def _moved(activations: Tensor, rows: Tensor, adjust: Adjustment) -> Tensor:
    weights = weights_of_rows(rows, activations).view(-1, *(1 for _ in activations.shape[1:])).to(activations.dtype)
    moved = adjust(activations)
    between = activations + weights * (moved - activations)
    return torch.where(weights == 1, moved, torch.where(weights > 0, between, activations))


def _moved_output(layer: nn.Module, args: Any, output: Any, *, rows: Tensor, adjust: Adjustment) -> Any:
    if isinstance(output, tuple):  # as attention gives its weights as well, and some blocks their cache
        return (_moved(output[0], rows, adjust), *output[1:])
    return _moved(output, rows, adjust)


def _moved_input(layer: nn.Module, args: Any, kwargs: Any, *, rows: Tensor, adjust: Adjustment) -> Any:
    return (_moved(args[0], rows, adjust), *args[1:]), kwargs


def _keep(layer: nn.Module, args: Any, output: Any, *, seen: dict[str, Tensor], name: str, side: Side) -> None:
    seen[name] = first_of(output if side == "output" else args).detach()


def _add(
    sums: dict[str, list[Tensor]], name: str, states: Tensor, kwargs: dict[str, Any], labels: Tensor | None
) -> None:
    rows = states.double()
    if rows.dim() == 3:
        real = real_tokens(states, kwargs)
        if labels is not None and labels.shape == real.shape:
            real = real & (labels.to(real.device) != IGNORED)
        rows = rows[real]
    counted = [torch.tensor(float(len(rows))), rows.sum(0), rows.square().sum(0)]
    sums[name] = [old + new for old, new in zip(sums[name], counted, strict=True)] if name in sums else counted
