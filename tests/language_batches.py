"""One set of texts as batches of every form, for tests of what a form must not change; and answers known exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, PAD, PROMPT = 32, 0, 2
LENGTHS = (5, 3, 6)


def texts(seed: int = 3) -> list[Tensor]:
    """Three texts of 5, 3 and 6 tokens."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (length,), generator=draw) for length in LENGTHS]


def padded(side: str = "right", more: int = 0, seed: int = 3, prompt: int = PROMPT) -> dict[str, Any]:
    """The texts as a batch that is padded on one side, the prompts' labels masked, and even tokens selected."""
    batch: dict[str, list[Tensor]] = {"input_ids": [], "attention_mask": [], "labels": [], "token_mask": []}
    for row in texts(seed):
        labels = row.clone()
        labels[:prompt] = -100
        fill = max(LENGTHS) + more - len(row)
        place = (fill, 0) if side == "left" else (0, fill)
        batch["input_ids"].append(F.pad(row, place, value=PAD))
        batch["attention_mask"].append(F.pad(torch.ones_like(row), place))
        batch["labels"].append(F.pad(labels, place, value=-100))
        batch["token_mask"].append(F.pad(row % 2 == 0, place))
    return {name: torch.stack(items) for name, items in batch.items()}


def packed(seed: int = 3, prompt: int = PROMPT) -> dict[str, Any]:
    """The texts as one row, as transformers' flattening collator makes it."""
    rows = texts(seed)
    labels = [torch.cat([torch.full((prompt,), -100), row[prompt:]]) for row in rows]
    places = [torch.arange(len(row)) for row in rows]
    return {
        "input_ids": torch.cat(rows).unsqueeze(0),
        "labels": torch.cat(labels).unsqueeze(0),
        "position_ids": torch.cat(places).unsqueeze(0),
        "token_mask": torch.cat(rows).unsqueeze(0) % 2 == 0,
    }


def both(make: Any, **options: Any) -> dict[str, Any]:
    """A batch of two answers to each prompt, the second under keys that begin `alternate_`."""
    second = make(**options, seed=8)
    return {**make(**options), **{f"alternate_{name}": value for name, value in second.items()}}


def forms() -> dict[str, dict[str, Any]]:
    """The same texts, two answers each, in every form that must give one loss; the first is the plain one."""
    made = {
        "right": both(padded),
        "right, more": both(padded, more=3),
        "left": both(padded, side="left"),
        "left, more": both(padded, side="left", more=3),
        "packed": both(packed),
    }
    for side in ("left", "right"):
        batch = both(padded, side=side, more=2)
        for labels, mask in (("labels", "attention_mask"), ("alternate_labels", "alternate_attention_mask")):
            batch[labels] = batch[labels].where(batch[mask].bool(), torch.tensor(7))
        made[f"{side}, labels at padding"] = batch
    for prefix in ("", "alternate_"):
        whole = {f"{prefix}attention_mask": torch.ones_like(made["packed"][f"{prefix}labels"])}
        made["packed, with a mask"] = {**made.get("packed, with a mask", made["packed"]), **whole}
    return made


class Rows(nn.Module):
    """Two answers of 2 and 1 tokens over four classes: probabilities ½ and ¼ of the first, ⅛ of the second."""

    def __init__(self) -> None:
        super().__init__()
        told = [[1 / 2, 1 / 6, 1 / 6, 1 / 6], [1 / 4] * 4, [1 / 8, 7 / 24, 7 / 24, 7 / 24], [0.7, 0.1, 0.1, 0.1]]
        self.logits = nn.Parameter(torch.tensor(told).log().view(2, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


ROWS = (torch.zeros(2, 2), torch.tensor([[0, 0], [0, -100]]))


def uniform(x: Tensor) -> Tensor:
    """An original of `Rows` that knows nothing."""
    return torch.zeros(2, 2, 4)
