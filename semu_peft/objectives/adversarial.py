"""Unlearning by adversarial examples: the nearest inputs that a model takes for another class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft.arguments import check_count, check_model, check_number
from semu_peft.model_state import device_of, eval_mode

from .adapter_parts import adapter_configs
from .base import Evaluation, Outputs
from .batches import as_labels, check_batches, split_batch
from .classification import ClassificationObjective
from .examples import select_examples
from .original import original
from .tokens import call_model

_GROWTH = 2.0  # from one radius to the next
_STEP = 0.1  # of the radius


@dataclass
class AdversarialUnlearning(ClassificationObjective):
    """`½ E[−log p(y | x)] + ½ E[−log p(y′ | x′)]`: the forget examples beside their adversarial ones.

    `x′` is the nearest input to `x` that the original model takes for another class `y′`. To learn that bends the model
    just around the forget examples, and its confidence in them falls to that of unseen data, as nothing else has to
    change (AMUN, Ebrahimpour-Boroojeny et al., ICML 2025). Of use where random examples are forgotten; with retain data
    it is the strongest published method of its kind.

    A batch is a pair of batches, the examples' own and the adversarial one, as
    [`adversarial_examples`][semu_peft.objectives.adversarial.adversarial_examples] makes them.

    Raises:
        TypeError: A batch is no such pair.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import AdversarialUnlearning, adversarial_examples
        >>> model = torch.nn.Identity()  # the inputs are the logits
        >>> batches = [(2 * torch.eye(3), torch.arange(3))]
        >>> pairs = adversarial_examples(model, batches)
        >>> round(AdversarialUnlearning()(model, pairs[0]).item(), 2)
        0.5
    """

    minimum = 0.0
    forgets = False

    def evaluate(self, model: nn.Module, batch: Any, prepared: Any) -> Evaluation:
        given, adversarial = _as_pair(batch)
        logits, labels = self._read(model, given)
        moved_logits, moved_labels = self._read(model, adversarial)
        loss = 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(moved_logits, moved_labels))
        # What is to be forgotten at an adversarial example is the class of the example that it was made of.
        return Evaluation(loss, (Outputs(logits, labels, 0.5), Outputs(moved_logits, labels, 0.5)))


def adversarial_examples(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    radius: float = 0.1,
    steps: int = 50,
    max_radii: int = 16,
) -> list[tuple[Any, Any]]:
    """Find for every example the nearest input that the model takes for another class.

    Projected gradient descent in the ball `‖x′ − x‖₂ ≤ radius`, from `x`, towards a lower margin of the true class; the
    radius is doubled for the examples of which none was found. An example that the model is wrong about is its own
    neighbour. There is no random start, so that the same model and batches give the same neighbours.

    The model's parameters, gradients and modes stay as they are, and an adapter is left out, as the original is what
    knows the examples. Call it once; the list is what `initialize_semu_weights` and `unlearn` take for `forget`.

    Args:
        model: A classifier: one label an example, and floating-point inputs.
        batches: The forget batches, `(inputs, labels)` or mappings with one floating-point input.
        radius: The first radius, in the unit of the inputs.
        steps: Gradient steps at each radius, of a tenth of it.
        max_radii: How many radii are tried, each twice the one before.

    Returns:
        A pair `(batch, adversarial batch)` for each batch, of the same form; the second has the model's wrong answers
        as its labels. On the model's device.

    Raises:
        TypeError: The batches have not one floating-point input; tokens have no neighbours.
        ValueError: There is an example that no radius leads to another class, there are several labels an example, or
            no batch.

    Examples:
        >>> import torch
        >>> from semu_peft.objectives import adversarial_examples
        >>> model, batch = torch.nn.Identity(), (torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
        >>> ((given, (neighbour, wrong)),) = adversarial_examples(model, [batch], radius=0.5)
        >>> neighbour, wrong  # the boundary lies at 0.71: half did not do, one did
        (tensor([[0.2929, 0.7071]]), tensor([1]))
    """
    check_model(model)
    check_batches(batches)
    check_number("radius", radius, low=0)
    check_count("steps", steps)
    check_count("max_radii", max_radii)
    if radius == 0:
        raise ValueError("`radius` must be above zero, got 0. Take a hundredth of the inputs' usual size.")
    without = original(model) if adapter_configs(model) else nullcontext(model)
    with eval_mode(model), torch.enable_grad(), without as attacked:
        device = device_of(model)
        pairs = [
            _attack(attacked, send_to_device(batch, device), radius, steps, max_radii, number)
            for number, batch in enumerate(batches)
        ]
    if not pairs:
        raise ValueError("`batches` must give at least one batch, got none. Check that it has not been used up.")
    return pairs


def _attack(model: nn.Module, batch: Any, radius: float, steps: int, max_radii: int, number: int) -> tuple[Any, Any]:
    """The batch and its nearest adversarial one within the radii."""
    place, start = floating_input(batch)
    with torch.no_grad():
        answers, labels = _answers(model, batch)
    inputs, wrong = start.clone(), answers.clone()
    for _ in range(max_radii):
        left = (wrong == labels).nonzero().squeeze(1)  # the search goes on for those alone
        if not len(left):
            return batch, with_input(batch, place, inputs, wrong)
        part = select_examples(batch, left, len(labels))
        tried = _descend(model, part, place, start[left], radius, steps)
        with torch.no_grad():
            answers, _ = _answers(model, with_input(part, place, tried, labels[left]))
        inputs[left], wrong[left] = tried, answers
        radius *= _GROWTH
    missing = int((wrong == labels).sum())
    if missing:
        raise ValueError(
            f"`max_radii` must reach another class for every example, got {max_radii} radii up to {radius / _GROWTH:g} "
            f"without one for {missing} of {len(labels)} in batch {number}. Begin with a larger `radius`, or leave "
            "those examples out."
        )
    return batch, with_input(batch, place, inputs, wrong)


def _descend(model: nn.Module, batch: Any, place: Any, start: Tensor, radius: float, steps: int) -> Tensor:
    """PGD on the true class's margin: its gradient points as cross entropy's and does not vanish at certainty."""
    moved = start
    for _ in range(steps):
        leaf = moved.detach().requires_grad_()
        logits, labels = call_model(model, with_input(batch, place, leaf, split_batch(batch)[2]))
        own = labels.unsqueeze(1)
        others = logits.float().scatter(1, own, float("-inf")).logsumexp(1)
        margin = logits.float().gather(1, own).squeeze(1) - others
        (gradient,) = torch.autograd.grad(margin.sum(), leaf)
        moved = leaf.detach() - _STEP * radius * _unit(gradient)
        step = moved - start
        moved = start + step * (radius / _norm(step)).clamp(max=1.0)
    return moved


def _answers(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    logits, labels = call_model(model, batch)
    return logits.argmax(1), labels


def floating_input(batch: Any) -> tuple[Any, Tensor]:
    """Where the floating-point input of a batch is, and its values.

    Raises:
        TypeError: There is none, or several.
        ValueError: There are several labels an example.

    Examples:
        >>> import torch
        >>> floating_input({"labels": torch.tensor([1]), "pixel_values": torch.zeros(1, 2)})
        ('pixel_values', tensor([[0., 0.]]))
    """
    args, kwargs, labels = split_batch(batch)
    floating = [
        (place, value)
        for place, value in [*enumerate(args), *kwargs.items()]
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    if len(floating) != 1:
        raise TypeError(
            f"`batches` must have one floating-point input, got {[str(place) for place, _ in floating]}. Tokens have "
            "no neighbours; where there are several inputs, give the model in a wrapper that takes one."
        )
    place, inputs = floating[0]
    count = as_labels(labels).numel()
    if count != len(inputs):
        raise ValueError(
            f"`batches` must have one label an example, got {count} for {len(inputs)} inputs. Adversarial neighbours "
            "are of whole inputs; take another objective for tokens or pixels."
        )
    return place, inputs


def with_input(batch: Any, place: Any, inputs: Tensor, labels: Tensor) -> Any:
    """The batch with another input and other labels, in the same form.

    Examples:
        >>> import torch
        >>> with_input((torch.zeros(1), torch.tensor([0])), 0, torch.ones(1), torch.tensor([2]))
        (tensor([1.]), tensor([2]))
    """
    if isinstance(batch, Mapping):
        key = next(key for key in ("labels", "label") if key in batch)
        return {**batch, place: inputs, key: labels}
    args = list(batch)
    args[place], args[-1] = inputs, labels
    return tuple(args)


def is_pair(batch: Any) -> bool:
    """Whether it is a batch beside its adversarial one, and no batch alone.

    Examples:
        >>> batch = torch.zeros(1, 2), torch.tensor([0])
        >>> is_pair(batch), is_pair((batch, batch))
        (False, True)
    """
    return isinstance(batch, (tuple, list)) and len(batch) == 2 and not any(isinstance(each, Tensor) for each in batch)


def _as_pair(batch: Any) -> tuple[Any, Any]:
    if is_pair(batch):
        return batch[0], batch[1]
    raise TypeError(
        f"A batch must be a pair of an ordinary batch and its adversarial one, got {type(batch).__name__}. Make them "
        "by `forget = adversarial_examples(model, forget)`."
    )


def _norm(values: Tensor) -> Tensor:
    return _for_each(values.flatten(1).norm(dim=1).clamp_min(1e-12), values)


def _unit(values: Tensor) -> Tensor:
    return values / _norm(values)


def _for_each(values: Tensor, like: Tensor) -> Tensor:
    """`(N,)` so that it meets `(N, …)`."""
    return values.view(-1, *[1] * (like.dim() - 1))
