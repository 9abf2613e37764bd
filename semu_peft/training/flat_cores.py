"""The cores of an adapter as one vector, which a step moves as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from semu_peft.gradients.processes import sum_over_processes, whole
from semu_peft.tuner.tensors import is_sharded

from .parameters import leave_shards_alone, put_into


class FlatCores:
    """Cores, flattened and laid end to end: a place `(P,)`, float32, and whole on every process where they are sharded.

    Args:
        model: What the cores are in.
        cores: Their parameters by the names of their layers, in the order of the vector.
        processes: Over how many gradients are averaged.

    Examples:
        >>> by_layer = {"a": nn.Parameter(torch.zeros(2, 2)), "b": nn.Parameter(torch.ones(1))}
        >>> cores = FlatCores(nn.Linear(1, 1), by_layer, processes=1)
        >>> with cores.at(torch.arange(5.0)):
        ...     cores.place(), cores.split(cores.place())["a"][1]
        (tensor([0., 1., 2., 3., 4.]), tensor([2., 3.]))
        >>> cores.place()
        tensor([0., 0., 0., 0., 1.])
    """

    def __init__(self, model: nn.Module, cores: Mapping[str, nn.Parameter], processes: int) -> None:
        self.model, self.by_layer, self.processes = model, cores, processes
        self.is_sharded = any(map(is_sharded, cores.values()))

    @property
    def device(self) -> torch.device:
        """Where the vector is."""
        return next(iter(self.by_layer.values())).device

    @torch.no_grad()
    def place(self) -> Tensor:
        """Where the cores are."""
        return self.join({name: core.detach() for name, core in self.by_layer.items()})

    @torch.no_grad()
    def move_to(self, place: Tensor) -> None:
        """Put the cores there."""
        for name, value in self.split(place).items():
            put_into(self.by_layer[name], value)
        if self.is_sharded:
            leave_shards_alone(self.model)  # or the next forward pass may be by what was gathered before

    @contextmanager
    def at(self, place: Tensor) -> Iterator[None]:
        """Be there for a while."""
        here = self.place()
        self.move_to(place)
        try:
            yield
        finally:
            self.move_to(here)

    @contextmanager
    def back_if_interrupted(self, place: Tensor) -> Iterator[None]:
        """Go back to a place where what is tried from there does not come to its end."""
        try:
            yield
        except BaseException:
            if not self.is_sharded:  # the other processes would have to come along
                self.move_to(place)
            raise

    def gradient_of(self, loss: Tensor, *, retain_graph: bool) -> Tensor:
        """The gradient of a loss of this process, `(P,)`; nothing is left in `.grad`."""
        self._clear()
        loss.backward(retain_graph=retain_graph)
        return self.take_gradient()

    def mean_over_processes(self, gradient: Tensor) -> Tensor:
        """The mean of a gradient over all processes, which FSDP takes by itself."""
        return gradient if self.is_sharded else sum_over_processes(gradient) / self.processes

    def write_gradient(self, gradient: Tensor) -> None:
        """Leave a gradient in `.grad`, for rules to edit."""
        for name, value in self.split(gradient).items():
            core = self.by_layer[name]
            core.grad = torch.zeros_like(core)
            put_into(core.grad, value)

    def take_gradient(self) -> Tensor:
        """What is in `.grad`, `(P,)`, and 0 where there is none; nothing is left there."""
        found = {
            name: torch.zeros_like(core) if core.grad is None else core.grad for name, core in self.by_layer.items()
        }
        self._clear()
        return self.join(found)

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """One vector of what each layer has, on the first one's device."""
        flat = [whole(parts[name]).flatten() for name in self.by_layer]
        return torch.cat([part.to(flat[0].device, torch.float32) for part in flat])

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """What each layer has of a vector."""
        sizes = [math.prod(core.shape) for core in self.by_layer.values()]
        parts = zip(self.by_layer.items(), flat.split(sizes), strict=True)
        return {name: part.view(core.shape) for (name, core), part in parts}

    def _clear(self) -> None:
        for core in self.by_layer.values():
            core.grad = None
