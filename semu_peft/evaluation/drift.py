"""What unlearning did to a language model beyond its purpose: how far it moved on neutral text, and how it writes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from semu_peft.arguments import check_count, check_model
from semu_peft.language.decoding import most_tokens
from semu_peft.model_state import device_of, eval_mode
from semu_peft.objectives.original import original
from semu_peft.objectives.tokens import call_model

from .token_scores import text_batches, text_windows


@dataclass(frozen=True)
class Drift:
    """How far a model's predictions on neutral text are from the original's.

    Attributes:
        kl: Mean over all tokens of `KL(p₀ ‖ p)`, in nats: what a damage budget is stated in.
        largest: Of one token.
        tokens: How many predictions were compared.

    Examples:
        >>> from semu_peft.evaluation import Drift
        >>> Drift(kl=0.0123, largest=1.5, tokens=6001)
        Drift(KL 0.0123 nats per token, largest 1.50, 6001 tokens)
    """

    kl: float
    largest: float
    tokens: int

    def __repr__(self) -> str:
        return f"Drift(KL {self.kl:.4f} nats per token, largest {self.largest:.2f}, {self.tokens} tokens)"


def neutral_kl(
    model: nn.Module,
    tokenizer: Any,
    texts: Any,
    *,
    reference: nn.Module | None = None,
    max_length: int = 512,
    batch_size: int = 16,
    progress: bool = True,
    adapter_name: str | None = None,
) -> Drift:
    """Mean over tokens of `KL(p₀ ‖ p)` on texts that have nothing to do with the forget set.

    `KL(p₀ ‖ p) = Σ_v p₀(v) (log p₀(v) − log p(v))`, summed over the vocabulary in float32. Tokens count alike, whatever
    text they are in and however it is padded.

    Args:
        model: The unlearned model.
        tokenizer: Its tokenizer.
        texts: Neutral texts: strings, mappings with `text`, or a path of these; read in windows of `max_length`.
        reference: The model before; by default the same model without its adapter.
        max_length: Longest window; at most as many tokens as the model has positions.
        batch_size: Texts at a time.
        progress: Show a progress bar.
        adapter_name: The adapter to compare without; by default the trained or active ones.

    Raises:
        ValueError: There is no text, or neither an adapter nor a reference.

    Examples:
        >>> from semu_peft.evaluation import neutral_kl
        >>> neutral_kl(decoder, tokenizer, ["the sky is blue"], reference=decoder, progress=False)
        Drift(KL 0.0000 nats per token, largest 0.00, 4 tokens)
    """
    check_model(model)
    check_count("batch_size", batch_size)
    rows = [row for windows in text_windows(tokenizer, texts, most_tokens(model, max_length)) for row in windows]
    sums: list[tuple[float, float, int]] = []

    def read(places: list[int], batch: dict[str, Tensor]) -> None:
        before, _ = call_model(origin, send_to_device(batch, device_of(origin)))
        after, _ = call_model(model, batch)
        divergence = token_kl(before, after.to(before.device))
        sums.append((float(divergence.double().sum()), float(divergence.max()), len(divergence)))

    chosen = original(model, adapter_name) if reference is None else nullcontext(reference)
    with torch.no_grad(), eval_mode(model), chosen as origin, eval_mode(origin):
        text_batches(tokenizer, rows, batch_size, read, progress=progress, name="neutral text", device=device_of(model))
    tokens = sum(count for _, _, count in sums)
    return Drift(sum(total for total, _, _ in sums) / tokens, max(most for _, most, _ in sums), tokens)


def token_kl(before: Tensor, after: Tensor) -> Tensor:
    """`KL(softmax(before) ‖ softmax(after))` of each row of logits, `(T,)`, in float32 and never below 0.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation.drift import token_kl
        >>> token_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0]]).log_softmax(-1))
        tensor([0.8554])
    """
    log_before, log_after = before.float().log_softmax(-1), after.float().log_softmax(-1)
    return nn.functional.kl_div(log_after, log_before, reduction="none", log_target=True).sum(-1).clamp(min=0)


def ngram_entropy(text: str, n: int) -> float:
    """Entropy in bits of a text's n-grams of words: low where it repeats itself; 0 without any.

    Examples:
        >>> from semu_peft.evaluation import ngram_entropy
        >>> round(ngram_entropy("a b a b a b", 2), 3), ngram_entropy("a b a b a b", 3)
        (0.971, 1.0)
    """
    check_count("n", n)
    words = re.findall(r"\w+|[^\w\s]", text)
    counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values()) + 0.0


def fluency(texts: Sequence[str], weights: Mapping[int, float] | None = None) -> float:
    """Weighted entropy of the n-grams of generated texts, averaged over them (RWKU, arXiv 2406.10890; ROME).

    `Σ_n w_n H_n / Σ_n w_n`, in bits, with weight 1 for pairs and 2 for triples of words. It is low for a model that
    stammers; compare it with the original's on the same questions, for it also grows with a text's length.

    Args:
        texts: What the model wrote.
        weights: By n; `{2: 1, 3: 2}` by default.

    Raises:
        ValueError: There are no texts.

    Examples:
        >>> from semu_peft.evaluation import fluency
        >>> round(fluency(["a b a b a b"]), 3)
        0.99
    """
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"`texts` must be a list of at least one text, got {texts!r}. Give what the model generated.")
    shares = weights or {2: 1.0, 3: 2.0}
    each = [sum(weight * ngram_entropy(text, n) for n, weight in shares.items()) for text in texts]
    return sum(each) / len(each) / sum(shares.values())
