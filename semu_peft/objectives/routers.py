"""What the routers of a mixture of experts say in a pass: found by where they stand, heard by hooks that come off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft.tuner.adapted import base_model
from semu_peft.tuner.keys import without_wrappers

_ROUTERS = ("gate", "router")


@dataclass(frozen=True, eq=False)
class Routing:
    """One call of one router, for each token that it saw.

    Attributes:
        probabilities: The distribution over all experts, `(tokens, experts)`.
        gates: What the experts' outputs are weighted by: 0 for those that are not chosen, `(tokens, experts)`.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives.routers import Routing
        >>> probabilities = torch.tensor([[0.5, 0.3, 0.2]])
        >>> Routing(probabilities, gates=torch.tensor([[1.0, 0.0, 0.0]])).gates.sum().item()
        1.0
    """

    probabilities: Tensor
    gates: Tensor


@dataclass(frozen=True, eq=False)
class Mixture:
    """A layer's experts and their router.

    Attributes:
        block: The module that holds both.
        experts: All experts: one module, or a list of them.
        router: The module that chooses; a linear layer, or one that gives choices and weights.
        router_name: Its name in the model without adapters.

    Examples:
        >>> from torch import nn
        >>> block = nn.ModuleDict({"gate": nn.Linear(4, 2), "experts": nn.ModuleList([nn.Linear(4, 4) for _ in "ab"])})
        >>> find_mixtures(nn.ModuleDict({"mlp": block}))["mlp.experts"].count
        2
    """

    block: nn.Module
    experts: Any
    router: Any
    router_name: str

    @property
    def count(self) -> int:
        """The number of experts."""
        if isinstance(self.experts, nn.ModuleList):
            return len(self.experts)
        told = next((getattr(each, "num_experts", None) for each in (self.router, self.experts, self.block)), None)
        return int(told or self.router.out_features)

    def routing(self, output: Any) -> Routing:
        """Read what the router returned: logits alone, or with weights and indices in any order.

        Raises:
            TypeError: It returned something else.
        """
        outputs = [output] if isinstance(output, Tensor) else [part for part in output if isinstance(part, Tensor)]
        floats = [part.flatten(0, -2) for part in outputs if part.is_floating_point()]
        chosen = next((part.flatten(0, -2) for part in outputs if not part.is_floating_point()), None)
        wide = [part for part in floats if part.shape[-1] == self.count]
        if not floats or (chosen is None and not wide):
            raise TypeError(
                f"the router {self.router_name!r} must return logits, or weights and indices, got "
                f"{[tuple(part.shape) for part in outputs]}. Mixtures of another kind are not known."
            )
        if chosen is None:
            return self._from_logits(wide[0])
        narrow = [part for part in floats if part.shape == chosen.shape]
        if narrow and not (wide and narrow[-1] is wide[0]):
            gates = narrow[-1].new_zeros(len(chosen), self.count).scatter(1, chosen, narrow[-1])
            return Routing(wide[0].float().softmax(-1) if wide else gates, gates)
        return Routing(wide[0], wide[0])  # weights of all experts, zeros for those that are not chosen

    def _from_logits(self, logits: Tensor) -> Routing:
        probabilities = F.softmax(logits.float(), -1)
        owner = next((each for each in (self.router, self.block) if hasattr(each, "top_k")), None)
        chosen = min(int(getattr(owner, "top_k", 1)), self.count)
        values, places = probabilities.topk(chosen, -1)
        if getattr(owner, "norm_topk_prob", True):  # Mixtral always does
            values = values / values.sum(-1, keepdim=True)
        return Routing(probabilities, torch.zeros_like(probabilities).scatter(1, places, values))


def find_mixtures(model: nn.Module) -> dict[str, Mixture]:
    """The mixtures of a model, fused or listed, by the full name of their experts.

    They are told by where they stand: a module with a child `experts`, and beside it a child `gate` or `router`.

    Args:
        model: Any model, with or without adapters.

    Examples:
        >>> from torch import nn
        >>> find_mixtures(nn.Sequential(nn.Linear(2, 2)))
        {}
    """
    found: dict[str, Mixture] = {}
    for name, block in base_model(model).named_modules():
        children = dict(block.named_children())
        router = next((key for key in _ROUTERS if key in children), None)
        if router is None or "experts" not in children:
            continue
        prefix = f"{name}." if name else ""
        experts = children["experts"]
        experts = experts.get_base_layer() if hasattr(experts, "get_base_layer") else experts
        mixture = Mixture(block, experts, children[router], without_wrappers(f"{prefix}{router}"))
        found[without_wrappers(f"{prefix}experts")] = mixture
    return found


@contextmanager
def watched_routers(model: nn.Module) -> Iterator[dict[str, list[Routing]]]:
    """Note what each router says while the context lasts, with the graph where there is one.

    Args:
        model: A model with mixtures of experts.

    Yields:
        The calls of each router, by the full name of its experts; clear the lists between passes.

    Raises:
        ValueError: The model has no mixture.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.top_k, self.gate = 1, nn.Linear(3, 2)
        ...         self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        ...     def forward(self, x):
        ...         best = self.gate(x).argmax(-1)
        ...         return torch.stack([self.experts[int(i)](row) for i, row in zip(best, x)])
        >>> model = nn.Sequential(Block())
        >>> with watched_routers(model) as heard:
        ...     _ = model(torch.randn(5, 3))
        >>> heard["0.experts"][0].gates.sum(1).tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    mixtures = find_mixtures(model)
    if not mixtures:
        raise ValueError(
            f"`model` must have mixtures of experts, got {type(model).__name__} without a module that has `experts` "
            "and a `gate` or `router`. Use a model of experts."
        )
    heard: dict[str, list[Routing]] = {name: [] for name in mixtures}

    def hear(name: str) -> Any:
        return lambda module, args, output: heard[name].append(mixtures[name].routing(output))

    handles: list[Any] = []
    try:
        for name, mixture in mixtures.items():
            handles.append(mixture.router.register_forward_hook(hear(name)))
        yield heard
    finally:
        for handle in handles:
            handle.remove()
