"""The proximal term of natural gradients: what nothing is known of stays where it was."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Proximal:
    """`½ π ‖R − R₀‖²`: what it costs to be away from the start where no data say what a direction costs.

    Attributes:
        start: `R₀`, all cores in one.
        pull: `π`, in nats a squared number; it only grows.

    Examples:
        >>> import torch
        >>> from semu_peft.training.proximal import Proximal
        >>> term = Proximal(torch.zeros(2))
        >>> term.strengthen(0.5)
        >>> term.strengthen(0.1)
        >>> term.at(torch.tensor([2.0, 0.0])), term.gradient(torch.tensor([2.0, 0.0])).tolist()
        (1.0, [1.0, 0.0])
    """

    start: Tensor
    pull: float = 0.0

    def strengthen(self, pull: float) -> None:
        """Pull at least so much."""
        self.pull = max(self.pull, pull)

    def at(self, place: Tensor) -> float:
        """The term at a place."""
        if not self.pull:  # nothing to wait for a device for
            return 0.0
        return 0.5 * self.pull * (place - self.start).square().sum().item()

    def gradient(self, place: Tensor) -> Tensor:
        """Its gradient there."""
        return self.pull * (place - self.start)
