"""Published methods for models that read images beside texts, and for recommenders, by their names.

Each is one sentence of the rooms below.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from semu_peft.objectives import BPR, ReverseBPR
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

    Source: Sinha et al. 2024, arXiv 2405.15328.

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
