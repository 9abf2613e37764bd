"""Published methods for models that read images beside texts, and for recommenders, by their names.

Each is one sentence of the rooms below.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from semu_peft.objectives import (
    BPR,
    AlternateAnswer,
    CrossEntropy,
    GradientAscent,
    KLToOriginal,
    ReverseBPR,
    TokenSelective,
)
from semu_peft.objectives.base import LossFunction, as_objective
from semu_peft.training.unlearn import UnlearnResult

from .sentence import RetainData, keep, minimise


def mmrecun(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    weight: float = 1.0,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """MMRecUn: rank marked interactions below others, and go on ranking the rest above theirs.

    `−log σ(s(negative) − s(item))` on what users want forgotten, BPR on the rest; of a user or an item, all its
    interactions. Built from the paper's equations: its code and weights were not to be seen. Embeddings of users and
    items that do not occur keep their bits as long as the optimiser has no weight decay.

    Source: arXiv 2405.15328.

    Args:
        model: A recommender, called as `model(users, items)` for a score a pair; changed in place.
        forget: Batches `(users, items, negatives)`, see
            [`sample_negatives`][semu_peft.objectives.ranking.sample_negatives].
        retain: Such batches of the other interactions.
        weight: Of the retain data.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> class Factors(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.user, self.item = nn.Embedding(3, 2), nn.Embedding(5, 2)
        ...     def forward(self, users, items):
        ...         return (self.user(users) * self.item(items)).sum(-1)
        >>> batch = (torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 4]))
        >>> methods.mmrecun(Factors(), [batch], max_steps=3, progress=False).steps
        3
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    return minimise(model, forget, ReverseBPR(), keep(retain, BPR(), weight), **said)


def safe_eraser(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    objective: LossFunction | None = None,
    weight: float = 0.5,
    decoupling: float = 0.5,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """SafeEraser: forget harmful answers, and go on answering the same questions about harmless images.

    `−CE(F) + ½ CE(R) + ½ CE(second answer)`, GD+PD of the paper; with another `objective` KL+PD, PO+PD or NPO+PD, and
    with `decoupling=0` the method without it. What becomes of the harmless pairs is
    [`count_refusals`][semu_peft.evaluation.refusals.count_refusals]`(...).sarr`.

    Source: ACL Findings 2025, arXiv 2502.12520: LoRA of rank 32 on the language model's linear layers.

    Args:
        model: The model, changed in place.
        forget: The forget batches, each with the harmless partner of its questions under keys `alternate_...`.
        retain: Batches whose cross entropy is added.
        objective: What to minimise on the forget data; by default gradient ascent.
        weight: Of the retain data.
        decoupling: Of the harmless partners.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from semu_peft import methods
        >>> batch = {"input": torch.randn(2, 3, 4), "labels": torch.randint(4, (2, 3))}
        >>> pair = batch | {"alternate_input": torch.randn(2, 3, 4), "alternate_labels": torch.randint(4, (2, 3))}
        >>> objective = methods.multimodal.GradientAscent(shift_labels=False)
        >>> methods.safe_eraser(
        ...     nn.Linear(4, 4), [pair], objective=objective, decoupling=0.0, max_steps=2, progress=False
        ... ).steps
        2
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    loss = as_objective(objective or GradientAscent())
    both = loss + decoupling * AlternateAnswer() if decoupling else loss
    return minimise(model, forget, both, keep(retain, CrossEntropy(), weight), **said)


def siu(
    model: nn.Module,
    forget: Iterable[Any],
    retain: RetainData = None,
    *,
    concept_tokens: Sequence[int],
    weight: float = 0.9,
    kl_weight: float = 0.75,
    progress: bool = True,
    adapter_name: str | None = None,
    **training: Any,
) -> UnlearnResult:
    """SIU: learn new answers about one image, and keep all that the model says beside the concept's name.

    `0.9 CE(new answers) + 0.75 KL(p₀ ‖ p)`, the divergence at the tokens that are not of the substitute's name, and
    without the tokens of the concept's own. What is left after the mask is normalised again: the published sum is no
    divergence. Built from the equations, as there is no code; the data of the paper come from a commercial model.

    Source: NeurIPS 2024, arXiv 2405.12523: LoRA, Adam at 3e-4, six steps.

    Args:
        model: The model, changed in place.
        forget: Batches with the new answers as labels, and `token_mask`, true at the substitute's name.
        retain: Batches whose cross entropy is added.
        concept_tokens: The tokens of the concept's name.
        weight: Of the new answers.
        kl_weight: Of the divergence.
        progress: Show progress bars.
        adapter_name: The adapter that is trained, if there are several.
        training: Further arguments of [`unlearn`][semu_peft.training.unlearn.unlearn].

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from semu_peft import methods
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 16}
        >>> model = get_peft_model(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)), LoraConfig())
        >>> ids = torch.randint(16, (2, 5))
        >>> batch = {"input_ids": ids, "labels": ids, "token_mask": ids == 3}
        >>> methods.siu(model, [batch], concept_tokens=[3], max_steps=2, progress=False).steps
        2
    """
    said: dict[str, Any] = {"progress": progress, "adapter_name": adapter_name, **training}
    kept = TokenSelective(KLToOriginal(without=concept_tokens), selected=False)
    loss = weight * CrossEntropy() + kl_weight * kept
    return minimise(model, forget, loss, keep(retain, CrossEntropy()), **said)
