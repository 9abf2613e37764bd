"""Objectives on what a model computes inside: hidden states of a layer, and the scores of a mixture's router."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft.arguments import check_count, check_kind, check_positive, check_switch

from .adapter_parts import adapter_configs
from .base import Evaluation, Outputs, PreparedObjective
from .batches import IGNORED, as_labels, run_batch, split_batch
from .original import original, reference_model
from .routers import Routing, watched_routers
from .tokens import call_model


@dataclass
class HiddenStateObjective(PreparedObjective):
    """What objectives share that read the hidden states of one layer, at the tokens that count.

    Args:
        layer: The number of a decoder layer, from 0 on, whose output is read; or a module's name, or the end of it,
            such as `"layers.7"` or `"decoder.block.3"`.

    Raises:
        TypeError: `layer` is neither.
        ValueError: The model has no such layer, or several.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.representation import HiddenStateObjective
        >>> class MeanNorm(HiddenStateObjective):
        ...     def state_loss(self, states, prepared):
        ...         return states.norm(dim=-1).mean()
        >>> MeanNorm("0")(torch.nn.Sequential(torch.nn.ReLU()), (torch.tensor([[3.0, 4.0]]), torch.tensor([0])))
        tensor(5.)
    """

    distribution = "gaussian"  # of which the squared distance of hidden states is the divergence
    layer: int | str

    def __post_init__(self) -> None:
        check_kind("layer", self.layer, (int, str), "a layer's number or name", "Write 7, or 'layers.7'.")
        if not isinstance(self.layer, str):
            check_count("layer", self.layer, least=0)

    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        states = read_hidden_states(model, batch, self.layer)
        return Evaluation(self.state_loss(states, prepared), (Outputs(states),))

    def state_loss(self, states: Tensor, prepared: Any) -> Tensor:
        """The loss of hidden states `(T, d)`, and of what `prepare` returned for their batch."""
        raise NotImplementedError


@dataclass
class RMU(HiddenStateObjective):
    """`‖h − c u‖² / d`: lead the hidden states of a layer to one random direction (Li et al. 2024, arXiv 2403.03218).

    The entries of `u` are drawn between 0 and 1 and then divided by its length. Keep the hidden states of retain data
    by [`PreserveHiddenStates`][semu_peft.objectives.representation.PreserveHiddenStates] of the same layer, and train
    the layers up to it; those above have no part in the loss.

    Args:
        layer: See `HiddenStateObjective`.
        coefficient: The length `c` that the hidden states are led to. It should be several times their own.
        seed: Seed of the direction.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import RMU
        >>> model, batch = torch.nn.Sequential(torch.nn.ReLU()), (torch.zeros(1, 8), torch.tensor([0]))
        >>> round(RMU("0", coefficient=4.0)(model, batch).item(), 4)  # 4² / 8
        2.0
    """

    coefficient: float = 6.5
    seed: int = field(default=0, kw_only=True)
    minimum = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("coefficient", self.coefficient)
        check_count("seed", self.seed, least=0)

    def prepare(self, model: nn.Module, batch: Any) -> float:
        return self.coefficient

    def state_loss(self, states: Tensor, prepared: Any) -> Tensor:
        return F.mse_loss(states, (prepared * _direction(states, self.seed)).expand_as(states))


@dataclass
class AdaptiveRMU(HiddenStateObjective):
    """RMU with the length taken from the layer, `c = scale · mean ‖h‖` (Dang et al. 2024, arXiv 2408.06223).

    The mean is over the tokens of the first batch that is seen, in the original model; the length is saved with a run.

    Args:
        layer: See `HiddenStateObjective`.
        scale: How many times longer than they are the hidden states are to become.
        seed: Seed of the direction.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import AdaptiveRMU
        >>> model, batch = torch.nn.Sequential(torch.nn.ReLU()), (torch.tensor([[3.0, 4.0]]), torch.tensor([0]))
        >>> objective = AdaptiveRMU("0", scale=2.0)
        >>> _ = objective(model, batch)
        >>> objective.coefficient
        10.0
    """

    scale: float = 5.0
    seed: int = field(default=0, kw_only=True)
    minimum = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("scale", self.scale)
        check_count("seed", self.seed, least=0)
        self.coefficient: float | None = None

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Any) -> float:
        if self.coefficient is None:
            with original(model) if adapter_configs(model) else nullcontext(model) as reference:
                states = read_hidden_states(reference, batch, self.layer)
            self.coefficient = self.scale * states.norm(dim=-1).mean().item()
        return self.coefficient

    def state_loss(self, states: Tensor, prepared: Any) -> Tensor:
        return F.mse_loss(states, (prepared * _direction(states, self.seed)).expand_as(states))

    def state_dict(self) -> dict[str, Any]:
        return {} if self.coefficient is None else {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coefficient = state.get("coefficient")


@dataclass
class PreserveHiddenStates(HiddenStateObjective):
    """`‖h − h₀‖² / d`: keep the hidden states of a layer at the original's, RMU's term for retain data.

    Args:
        layer: See `HiddenStateObjective`.
        reference: A frozen original model. By default the model itself without its adapter.
        relative: Take the mean of `‖h − h₀‖ / ‖h₀‖` instead, as CIR does, which every token has an equal say in.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import PreserveHiddenStates
        >>> frozen, model = torch.nn.Sequential(torch.nn.Identity()), torch.nn.Sequential(torch.nn.ReLU())
        >>> batch = (torch.tensor([[-2.0, 4.0]]), torch.tensor([0]))
        >>> PreserveHiddenStates("0", reference=frozen)(model, batch)  # (0 − −2)² / 2
        tensor(2.)
    """

    reference: nn.Module | None = field(default=None, repr=False)
    relative: bool = field(default=False, kw_only=True)
    minimum = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_switch("relative", self.relative)

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Any) -> Tensor:
        with reference_model(model, self.reference) as reference:
            return read_hidden_states(reference, batch, self.layer)

    def state_loss(self, states: Tensor, prepared: Any) -> Tensor:
        if self.relative:
            return _ratio((states - prepared).norm(dim=-1), prepared.norm(dim=-1)).mean()
        return F.mse_loss(states, prepared)


@dataclass
class BreakActivations(PreparedObjective):
    """`mean max(0, ⟨o, o₀⟩ / ‖o₀‖²)`: of what a layer gave nothing is left, whatever it gives instead.

    The mean is over the tokens that count, and over the layers. It is 1 at the original and 0 where the outputs are at
    right angles to theirs, so that it ends by itself; made for the outputs of MLPs. Keep the retain data's hidden
    states by `PreserveHiddenStates(layer, relative=True)`.

    Source: CIR, arXiv 2509.11816: MLPs of layers 6 to 11, retain data kept at layer 12. See
    [`methods.cir`][semu_peft.methods.geometry.cir].

    Args:
        layers: Each as in [`HiddenStateObjective`][semu_peft.objectives.representation.HiddenStateObjective], such as
            `["layers.6.mlp", "layers.7.mlp"]`.
        reference: A frozen original model. By default the model itself without its adapter.

    Raises:
        TypeError: `layers` is no list of names or numbers.
        ValueError: There is none, or the model has no such layer.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import BreakActivations
        >>> frozen, model = torch.nn.Sequential(torch.nn.Identity()), torch.nn.Sequential(torch.nn.ReLU())
        >>> batch = (torch.tensor([[-3.0, 4.0]]), torch.tensor([0]))
        >>> round(BreakActivations(["0"], reference=frozen)(model, batch).item(), 2)  # 16 / 25
        0.64
    """

    distribution = "gaussian"
    layers: Sequence[int | str]
    reference: nn.Module | None = field(default=None, repr=False)
    minimum = 0.0

    def __post_init__(self) -> None:
        mend = "Write ['layers.6.mlp']."
        check_kind("layers", self.layers, (list, tuple), "a list of layers' numbers or names", mend)
        if not self.layers:
            raise ValueError(f"`layers` must name at least one layer, got none. {mend}")
        for layer in self.layers:
            check_kind("layers", layer, (int, str), "a list of layers' numbers or names", mend)

    @torch.no_grad()
    def prepare(self, model: nn.Module, batch: Any) -> list[Tensor]:
        with reference_model(model, self.reference) as reference:
            return _read_layers(reference, batch, self.layers)

    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        states = _read_layers(model, batch, self.layers)
        pairs = zip(states, prepared, strict=True)
        left = [_ratio((now * before).sum(-1), before.square().sum(-1)).clamp(min=0).mean() for now, before in pairs]
        weight = 1.0 / len(states)
        return Evaluation(torch.stack(left).mean(), tuple(Outputs(each, weight=weight) for each in states))


@dataclass
class RouterAnchor(PreparedObjective):
    """`Σ ‖g − a‖²`: keep a mixture's router sending the forget data to one expert (SEUF, arXiv 2411.18797).

    `g` are the router's probabilities over all experts, `a` is 1 at the expert that is unlearned and 0 at the others;
    the mean is over the tokens that are no padding, the sum over the mixtures named. Where only that expert is trained,
    the loss could else be lowered by routing around it: `objective + RouterAnchor({"layers.12.mlp.experts": 3})`.

    Args:
        experts: The expert of each mixture that is anchored, by the full name of its experts or the end of that, or by
            the number of the mixture among the model's.

    Raises:
        TypeError: `experts` is no mapping of names or numbers to numbers.
        ValueError: The model has no such mixture or expert.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import RouterAnchor
        >>> class Mixture(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate = torch.nn.Linear(3, 2)
        ...         self.experts = torch.nn.ModuleList([torch.nn.ReLU(), torch.nn.Tanh()])
        ...     def forward(self, x):
        ...         return sum(g * expert(x).sum() for g, expert in zip(self.gate(x).softmax(-1)[0], self.experts))
        >>> batch = (torch.zeros(1, 3), torch.tensor([0]))
        >>> model = Mixture()
        >>> _ = model.gate.bias.data.zero_()
        >>> RouterAnchor({"experts": 1})(model, batch).item()  # (½ − 0)² + (½ − 1)²
        0.5
    """

    distribution = "categorical"
    experts: Mapping[str | int, int]
    minimum = 0.0

    def __post_init__(self) -> None:
        mend = "Write `{name: expert}`, such as {'layers.12.mlp.experts': 3}."
        check_kind("experts", self.experts, Mapping, "an expert for each mixture", mend)
        for mixture, expert in self.experts.items():
            is_number = isinstance(expert, int) and not isinstance(expert, bool)
            if not is_number or not isinstance(mixture, (int, str)):
                raise TypeError(f"`experts` must map mixtures to numbers of experts, got {self.experts!r}. {mend}")
        numbers = [number for pair in self.experts.items() for number in pair if isinstance(number, int)]
        if not self.experts or min(numbers) < 0:
            raise ValueError(f"`experts` must name a mixture and its expert, from 0 on, got {self.experts!r}. {mend}")

    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        with watched_routers(model) as heard:
            _, inputs, _ = run_batch(model, batch)
        losses, outputs = [], []
        for mixture, expert in self.experts.items():
            gates = self._gates(heard, mixture, inputs.get("attention_mask"))
            anchor = F.one_hot(torch.tensor(expert), gates.shape[1]).to(gates)
            losses.append((gates - anchor).square().sum(-1).mean())
            outputs.append(Outputs(gates.clamp(min=1e-30).log()))
        return Evaluation(torch.stack(losses).sum(), tuple(outputs))

    def _gates(self, heard: Mapping[str, list[Routing]], mixture: str | int, mask: Any) -> Tensor:
        """What the router of one mixture says of the tokens that are no padding, `(T, experts)`."""
        if isinstance(mixture, int):
            found = list(heard)[mixture : mixture + 1]
        else:
            found = [name for name in heard if f".{name}".endswith(f".{mixture}")]
        if len(found) != 1 or not heard[found[0]]:
            raise ValueError(
                f"`experts` must name one mixture that the model runs, got {mixture!r}, which fits "
                f"{', '.join(found) or 'none'} of {', '.join(heard)}. Name it by one of these."
            )
        gates = heard[found[0]][0].probabilities  # the first call: recomputed activations call again
        if self.experts[mixture] >= gates.shape[1]:
            raise ValueError(
                f"`experts` must name experts that there are, got {self.experts[mixture]} of {gates.shape[1]} in "
                f"{found[0]!r}. Number them from 0."
            )
        if isinstance(mask, Tensor) and mask.numel() == len(gates):
            gates = gates[mask.flatten().to(gates.device).bool()]
        return gates


def read_hidden_states(model: nn.Module, batch: Any, layer: int | str) -> Tensor:
    """Run the model and return the output of one of its layers at the tokens that count, `(T, d)`, in float32.

    A token counts where its label is not −100 and it is no padding; in an encoder, where it is no padding; of a batch
    with one label an example, everything counts. Where activations are computed again, it must be without reentry
    (`use_reentrant=False`), or what happens inside has no gradient.

    Args:
        model: Any model; the layer's output is a tensor `(N, …, d)` or a tuple that begins with one.
        batch: See [`call_model`][semu_peft.objectives.tokens.call_model].
        layer: See [`HiddenStateObjective`][semu_peft.objectives.representation.HiddenStateObjective].

    Raises:
        ValueError: The model has no such layer or several, or did not run it.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.representation import read_hidden_states
        >>> batch = (torch.zeros(2, 3), torch.tensor([0, 1]))
        >>> read_hidden_states(torch.nn.Sequential(torch.nn.Linear(3, 4)), batch, "0").shape
        torch.Size([2, 4])
    """
    return _read_layers(model, batch, [layer])[0]


def _read_layers(model: nn.Module, batch: Any, layers: Sequence[int | str]) -> list[Tensor]:
    """The hidden states of several layers, in one pass."""
    found = [find_layer(model, layer) for layer in layers]
    with ExitStack() as hooks:
        caught = [hooks.enter_context(outputs_of(module)) for _, module in found]
        call_model(model, batch, shift_labels=False)
    return [_that_count(name, outputs, batch) for (name, _), outputs in zip(found, caught, strict=True)]


def _that_count(name: str, outputs: list[Tensor], batch: Any) -> Tensor:
    """Of what a layer gave, `(T, d)` in float32, the tokens that count."""
    if not outputs:
        raise ValueError(f"`layer` must be a layer that the model runs, got {name!r}, which it did not. Name another.")
    states = outputs[0].to(torch.promote_types(outputs[0].dtype, torch.float32))
    _, inputs, labels = split_batch(batch)
    labels = as_labels(labels).to(states.device)
    mask = inputs.get("attention_mask")
    in_encoder = "encoder" in name.split(".")
    real = None
    if labels.shape == states.shape[:2] and labels.dim() == 2 and not in_encoder:
        real = labels != IGNORED
        mask = inputs.get("decoder_attention_mask" if "decoder" in name.split(".") else "attention_mask")
    if isinstance(mask, Tensor) and mask.shape == states.shape[:2]:
        attended = mask.to(states.device).bool()
        real = attended if real is None else real & attended
    return states.flatten(0, -2) if real is None else states[real]


def find_layer(model: nn.Module, layer: int | str) -> tuple[str, nn.Module]:
    """Find a layer by its number in the model's outermost list of layers (its decoder's), or by its name's end.

    Raises:
        ValueError: There is none, or there are several.

    Examples:
        >>> from torch import nn
        >>> from semu_peft.objectives.representation import find_layer
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.ReLU(), nn.Tanh()])})
        >>> find_layer(model, 1), find_layer(model, "layers.0")
        (('layers.1', Tanh()), ('layers.0', ReLU()))
    """
    modules = dict(model.named_modules())
    if isinstance(layer, str):
        found = [name for name in modules if name == layer or name.endswith(f".{layer}")]
        if layer in modules:
            found = [layer]
    else:
        lists = {name: len(module) for name, module in modules.items() if isinstance(module, nn.ModuleList)}
        depth = min((name.count(".") for name in lists), default=0)
        outermost = [name for name in lists if name.count(".") == depth]
        decoders = [name for name in outermost if "decoder" in name.split(".")]
        found = [f"{name}.{layer}" for name in decoders or outermost if layer < lists[name]]
    if len(found) != 1:
        shown = ", ".join(found[:3]) or "none"
        raise ValueError(
            f"`layer` must be the number of one layer or the end of one module's name, got {layer!r}, which fits "
            f"{shown}. Name it in full, as in `model.named_modules()`."
        )
    return found[0], modules[found[0]]


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a module gives; with activations recomputed it runs again, in the backward pass, unseen.

    Examples:
        >>> import torch
        >>> layer = torch.nn.ReLU()
        >>> with outputs_of(layer) as caught:
        ...     _ = layer(torch.tensor([-1.0, 2.0]))
        >>> caught
        [tensor([0., 2.])]
    """
    caught: list[Tensor] = []
    handle = module.register_forward_hook(
        lambda _, __, output: caught.append(output[0] if isinstance(output, (tuple, list)) else output)
    )
    try:
        yield caught
    finally:
        handle.remove()


def _ratio(values: Tensor, sizes: Tensor) -> Tensor:
    return values / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)


def _direction(states: Tensor, seed: int) -> Tensor:
    """A unit vector `(d,)` with entries of one sign, the same on every device and at every call."""
    drawn = torch.rand(states.shape[-1], generator=torch.Generator().manual_seed(seed))
    return (drawn / drawn.norm()).to(states)
