"""Published methods for language models by their names: each is one sentence of the rooms below."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any, Literal

from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.optim import SGD

from semu_peft.objectives import CrossEntropy, GradientAscent
from semu_peft.training.parameters import only_these_train
from semu_peft.training.rules import RemoveLeading
from semu_peft.training.unlearn import UnlearnResult, unlearn


def repselect(
    model: nn.Module,
    forget: Collection[Any],
    *,
    target_modules: list[str] | str,
    learning_rate: float,
    elicitation_rate: float = 0.05,
    r: int = 8,
    rank: int = 512,
    mode: Literal["soft", "hard", "quadratic"] = "soft",
    progress: bool = True,
) -> UnlearnResult:
    """RepSelect: one step up the forget loss, of the weights themselves, without the directions that all data share.

    A throw-away LoRA first learns the forget data, which brings out what the model only half remembers. With it in
    place, and frozen, the gradient of the weights is taken over the whole forget set; its leading directions are made
    small, the weights take one step, and the LoRA is dropped. Call it again until the damage that you measure on other
    text is what you allow; the authors repeat it until 0.01 nats. No retain data are needed.

    To have the same choice of directions as an adapter, see `skip_leading` of
    [`initialize_semu_weights`][semu_peft.subspace.initialize.initialize_semu_weights].

    Source: RepSelect, arXiv 2606.17168; settings of its code but for `elicitation_rate`, which is searched there.

    Args:
        model: The model, without adapters, whose weights are changed in place.
        forget: The forget set: a list of batches, or a loader that knows its length.
        target_modules: The layers to change; the paper takes all linear layers of the MLPs.
        learning_rate: Of the step.
        elicitation_rate: Of the LoRA's epoch of plain SGD.
        r: The LoRA's rank.
        rank: How many leading directions to make small.
        mode: How, see [`RemoveLeading`][semu_peft.training.rules.leading.RemoveLeading].
        progress: Show progress bars.

    Returns:
        What the step of the weights did.

    Raises:
        ValueError: No layer matches, or a loss is not finite; the LoRA is gone in any case.

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> forget = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
        >>> methods.repselect(model, forget, target_modules=["0"], learning_rate=0.1, rank=2, progress=False).steps
        1
    """
    with only_these_train(model, ()):  # the flags come back as they were
        elicited = get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules=target_modules), "elicitation")
        try:
            slow, fast = (partial(SGD, lr=rate) for rate in (learning_rate, elicitation_rate))
            unlearn(elicited, forget, CrossEntropy(), optimizer=fast, epochs=1, progress=progress)
            layers: list[Any] = [module for module in elicited.modules() if isinstance(module, BaseTunerLayer)]
            with only_these_train(elicited, [layer.get_base_layer().weight for layer in layers]):
                return unlearn(
                    elicited, forget, GradientAscent(), rules=RemoveLeading(rank, mode), optimizer=slow,
                    gradient_accumulation_steps=len(forget), max_steps=1, progress=progress,
                )  # fmt: skip
        finally:
            elicited.unload()
