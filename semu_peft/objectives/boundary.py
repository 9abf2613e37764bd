"""Forgetting through the decision boundary: the nearest other class, and noise that a class cannot be learnt from."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft.arguments import check_count, check_model, check_number, check_positive
from semu_peft.model_state import device_of, eval_mode

from .adapter_parts import adapter_configs
from .adversarial import floating_input, with_input
from .base import Evaluation, Outputs
from .batches import check_batches, split_batch
from .classification import ForgettingClasses
from .original import original, reference_model


@dataclass
class BoundaryShrink(ForgettingClasses):
    """`−log p(ŷ | x)` with `ŷ` the wrong class nearest to `x`: the class to forget is shared out among its neighbours.

    `ŷ` is the original model's best class other than the true one at `x + bound · sign ∇_x CE` (Boundary Unlearning,
    Chen et al., CVPR 2023, arXiv 2303.11570). It needs forget data alone. The released code takes the best class of
    all, which teaches the true one wherever the step does not cross the boundary; here it is always a wrong one.

    Args:
        bound: How far each number of the input is moved, in the unit of the inputs.
        classes: All classes that are to be forgotten, where there are several: `ŷ` is none of them.
        reference: A frozen original model. By default the model itself without its adapter.

    Raises:
        TypeError: A batch has not one floating-point input.
        ValueError: `bound` is negative or not finite.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import BoundaryShrink
        >>> model = torch.nn.Identity()  # the inputs are the logits
        >>> loss = BoundaryShrink(reference=model)(model, (torch.tensor([[9.0, 1.0, 0.0]]), torch.tensor([0])))
        >>> round(loss.item(), 1)  # −log p of class 1
        8.0
    """

    bound: float = 0.1
    reference: nn.Module | None = field(default=None, repr=False)
    minimum = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("bound", self.bound, low=0)
        if self.reference is not None:
            check_model(self.reference, "reference")

    def prepare(self, model: nn.Module, batch: Any) -> Tensor:
        place, inputs = floating_input(batch)
        given = split_batch(batch)[2]
        with reference_model(model, self.reference) as teacher:
            leaf = inputs.detach().clone().requires_grad_()
            with torch.enable_grad():
                logits, labels = self._read(teacher, with_input(batch, place, leaf, given))
                (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), leaf)
            moved = inputs.detach() + self.bound * gradient.sign()
            with torch.no_grad():
                logits, labels = self._read(teacher, with_input(batch, place, moved, given))
        return logits.masked_fill(self.forgotten(labels, logits.shape[1]), float("-inf")).argmax(1)

    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        logits, labels = self._read(model, batch)
        return Evaluation(F.cross_entropy(logits, prepared), (Outputs(logits, labels),))


def error_maximizing_noise(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    weight: float = 0.1,
    learning_rate: float = 0.1,
    steps: int = 40,
    seed: int = 0,
) -> list[Any]:
    """Make inputs from which a class cannot be learnt: noise with the labels of the forget batches.

    `argmin_N −CE(f(N), y) + weight · mean ‖N‖²`, from a normal start, by Adam (UNSIR, Tarun et al. 2023, arXiv
    2111.08947). To train on the noise beside retain data undoes the class (*impair*), and to train on retain data alone
    mends the rest (*repair*): see [`methods.unsir`][semu_peft.methods.baselines.unsir].

    The model's parameters, gradients and modes stay as they are, and an adapter is left out.

    Args:
        model: A classifier: one label an example, and floating-point inputs.
        batches: The forget batches. Only their labels, shapes and device are read.
        weight: How much the noise's size counts.
        learning_rate: Of Adam.
        steps: How many; the authors take 5 times 8.
        seed: Seed of the start.

    Returns:
        A batch of noise for each batch, of the same form and labels, on the model's device.

    Raises:
        TypeError: The batches have not one floating-point input.
        ValueError: A number is out of range, or there is no batch.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import CrossEntropy, error_maximizing_noise
        >>> model, batch = torch.nn.Identity(), (9 * torch.eye(3), torch.arange(3))  # the inputs are the logits
        >>> (noise,) = error_maximizing_noise(model, [batch])
        >>> bool(CrossEntropy()(model, noise) > 2), noise[1]  # worse than chance, log 3 = 1.1
        (True, tensor([0, 1, 2]))
    """
    check_model(model)
    check_batches(batches)
    check_number("weight", weight, low=0)
    check_positive("learning_rate", learning_rate)
    check_count("steps", steps)
    check_count("seed", seed, least=0)
    generator = torch.Generator().manual_seed(seed)
    device, without = device_of(model), original(model) if adapter_configs(model) else nullcontext(model)
    with eval_mode(model), torch.enable_grad(), without as attacked:
        found = [
            _noise(attacked, send_to_device(batch, device), weight, learning_rate, steps, generator)
            for batch in batches
        ]
    if not found:
        raise ValueError("`batches` must give at least one batch, got none. Check that it has not been used up.")
    return found


def _noise(
    model: nn.Module, batch: Any, weight: float, learning_rate: float, steps: int, generator: torch.Generator
) -> Any:
    place, inputs = floating_input(batch)
    labels = split_batch(batch)[2]
    noise = torch.randn(inputs.shape, generator=generator).to(inputs).requires_grad_()
    optimizer = torch.optim.Adam([noise], lr=learning_rate)
    objective = ForgettingClasses()
    for _ in range(steps):
        logits, wanted = objective._read(model, with_input(batch, place, noise, labels))
        loss = weight * noise.float().square().flatten(1).sum(1).mean() - F.cross_entropy(logits, wanted)
        (noise.grad,) = torch.autograd.grad(loss, [noise])
        optimizer.step()
    return with_input(batch, place, noise.detach(), labels)
