"""What a language model says of each token of given answers: its log probability, whether it would have said it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from semu_peft.arguments import check_count, check_model
from semu_peft.model_state import device_of, eval_mode
from semu_peft.objectives.batches import IGNORED, call_model

from .prompts import as_pairs, encode_answer

_LEAST_VARIANCE = 1e-6  # of Min-K++, as OpenUnlearning has it


@dataclass(frozen=True, eq=False, repr=False)
class TokenScores:
    """What a model says of N answers, each of `n_i` supervised tokens, on the CPU and in the order given.

    Attributes:
        log_probs: `log p(y_t | x, y_<t)` of each answer's tokens, N vectors `(n_i,)`, float32.
        correct: Whether the true token has the largest logit, N vectors `(n_i,)`, bool.
        standardized: `(log p(y_t) − μ_t) / σ_t`, with mean and deviation of log p over the vocabulary, for Min-K++.
        has_eos: Whether the last token of each is the end of the sequence.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import TokenScores
        >>> log_probs = [torch.tensor([0.5, 0.25]).log(), torch.tensor([0.5]).log()]
        >>> scores = TokenScores(log_probs, [torch.tensor([True, False]), torch.tensor([True])], log_probs)
        >>> scores
        TokenScores(2 answers, 3 tokens, mean probability 0.427)
        >>> [round(value, 3) for value in scores.probability.tolist()]
        [0.354, 0.5]
    """

    log_probs: Sequence[Tensor]
    correct: Sequence[Tensor]
    standardized: Sequence[Tensor]
    has_eos: bool = False

    def __len__(self) -> int:
        return len(self.log_probs)

    def __repr__(self) -> str:
        tokens, mean = sum(map(len, self.log_probs)), float(self.probability.mean()) if len(self) else float("nan")
        return f"TokenScores({len(self)} answers, {tokens} tokens, mean probability {mean:.3f})"

    @property
    def nll(self) -> Tensor:
        """`n(y) = −1/|y| Σ_t log p(y_t)` over an answer's tokens, end of sequence counted; `(N,)`, float64."""
        return torch.stack([-part.double().mean() for part in self.log_probs])

    @property
    def probability(self) -> Tensor:
        """`exp(−n(y)) = p(y | x)^(1/|y|)`, `(N,)`, float64."""
        return self.nll.neg().exp()

    def without_eos(self) -> TokenScores:
        """The same without each answer's last token where that is the end of the sequence."""
        if not self.has_eos:
            return self
        log_probs, correct, standardized = (
            [part[:-1] for part in kind] for kind in (self.log_probs, self.correct, self.standardized)
        )
        return TokenScores(log_probs, correct, standardized)


def score_answers(
    model: nn.Module,
    tokenizer: Any,
    pairs: Iterable[Any],
    *,
    template: str | None = None,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    progress: bool = True,
    name: str = "pairs",
) -> TokenScores:
    """Let a language model read given answers to questions (teacher forcing), in eval mode and without gradients.

    Probabilities are taken in float32 whatever the model's dtype. Answers of like length go in one batch; neither the
    padding nor the size of a batch matters, up to how the model rounds.

    Args:
        model: A causal or an encoder-decoder language model of transformers, with any adapter or none.
        tokenizer: Its tokenizer.
        pairs: `(question, answer)`, or mappings with these keys.
        template: See [`encode_answer`][semu_peft.evaluation.prompts.encode_answer].
        batch_size: Answers at a time.
        device: Where batches are sent; by default the device of the model's first parameter.
        progress: Show a progress bar.
        name: What to call the pairs in the progress bar and in errors.

    Raises:
        TypeError: The pairs have an unknown form.
        ValueError: There are none, or the template lacks a place.

    Examples:
        >>> from semu_peft.evaluation import score_answers
        >>> score_answers(model, tokenizer, [("Who?", "Ada."), ("Where?", "Here.")], progress=False)  # doctest: +SKIP
        TokenScores(2 answers, 5 tokens, mean probability 0.912)
    """
    check_model(model)
    check_count("batch_size", batch_size)
    encoded = [encode_answer(tokenizer, *pair, template) for pair in as_pairs(pairs, name)]
    rows = [supervised(ids, max(length, 1)) for ids, length in encoded]
    scores = _score(model, tokenizer, rows, batch_size=batch_size, device=device, progress=progress, name=name)
    return replace(scores, has_eos=tokenizer.eos_token_id is not None)


def score_texts(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    max_length: int = 512,
    batch_size: int = 16,
    device: torch.device | str | None = None,
    progress: bool = True,
    name: str = "texts",
) -> TokenScores:
    """Let a language model read plain texts: every token but the first counts, of the first `max_length`.

    Special tokens are those that the tokenizer adds itself. The other arguments are those of
    [`score_answers`][semu_peft.evaluation.token_scores.score_answers].

    Examples:
        >>> from semu_peft.evaluation import score_texts
        >>> score_texts(model, tokenizer, ["Ada wrote the first program."], progress=False)  # doctest: +SKIP
        TokenScores(1 answers, 5 tokens, mean probability 0.240)
    """
    check_model(model)
    check_count("batch_size", batch_size)
    rows = [supervised(ids, 1) for ids in encode_texts(tokenizer, texts, max_length, name)]
    return _score(model, tokenizer, rows, batch_size=batch_size, device=device, progress=progress, name=name)


def encode_texts(tokenizer: Any, texts: Iterable[str], max_length: int, name: str = "texts") -> list[list[int]]:
    """Token ids of plain texts, cut to a length; each must have two, as the first one is not predicted.

    Examples:
        >>> from semu_peft.evaluation.token_scores import encode_texts
        >>> encode_texts(lambda text: {"input_ids": [ord(letter) for letter in text]}, ["ABC"], max_length=2)
        [[65, 66]]
    """
    check_count("max_length", max_length, least=2)
    texts = [texts] if isinstance(texts, str) else list(texts)
    rows = [list(tokenizer(text)["input_ids"])[:max_length] for text in texts]
    short = [number for number, ids in enumerate(rows) if len(ids) < 2]
    if not rows or short:
        got = f"fewer in text {short[0]}" if short else "no text"
        raise ValueError(f"`{name}` must be texts of at least two tokens, got {got}. Leave it out, or join short ones.")
    return rows


Row = dict[str, list[int]]


def supervised(ids: list[int], prompt_length: int) -> Row:
    """A row of a text batch, in which the tokens of the prompt do not count.

    Examples:
        >>> from semu_peft.evaluation.token_scores import supervised
        >>> supervised([7, 8, 9], prompt_length=1)
        {'input_ids': [7, 8, 9], 'labels': [-100, 8, 9]}
    """
    return {"input_ids": ids, "labels": [IGNORED] * prompt_length + ids[prompt_length:]}


def text_batches(
    tokenizer: Any,
    rows: Sequence[Row],
    batch_size: int,
    read: Callable[[list[int], dict[str, Tensor]], None],
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    name: str | None = None,
) -> None:
    """Give `read` the places and the padded batch of rows of like length at a time, with a progress bar.

    Args:
        tokenizer: Says what to pad with.
        rows: `input_ids` and `labels` each.
        batch_size: Rows at a time.
        read: Takes the places of the rows in the list and their batch.
        device: Where batches are sent.
        progress: Show a progress bar.
        name: What to call the rows in it.

    Examples:
        >>> from types import SimpleNamespace
        >>> from semu_peft.evaluation.token_scores import text_batches
        >>> rows = [{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}]
        >>> pad = SimpleNamespace(pad_token_id=0, eos_token_id=1)
        >>> text_batches(pad, rows, 2, lambda places, batch: print(places, batch["input_ids"].tolist()), progress=False)
        [1, 0] [[7, 8, 9], [5, 6, 0]]
    """
    order = sorted(range(len(rows)), key=lambda place: (-len(rows[place]["input_ids"]), place))  # longest first
    starts: Iterable[int] = range(0, len(order), batch_size)
    if progress:
        from tqdm.auto import tqdm

        starts = tqdm(starts, desc=name, unit="batch", leave=False)
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    for start in starts:
        places = order[start : start + batch_size]
        batch = _padded([rows[place] for place in places], pad)
        read(places, {key: tensor.to(device) for key, tensor in batch.items()})


def _padded(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """Rows filled up on the right; padding is told by the mask, as its token may be one that counts elsewhere."""
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": pad, "labels": IGNORED, "attention_mask": 0}
    full = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        key: torch.tensor([row[key] + [value] * (length - len(row[key])) for row in full])
        for key, value in fill.items()
    }


def _score(
    model: nn.Module, tokenizer: Any, rows: Sequence[Row], *, batch_size: int, device: Any, progress: bool, name: str
) -> TokenScores:
    found: list[list[Any]] = [[None] * len(rows) for _ in range(3)]

    def read(places: list[int], batch: dict[str, Tensor]) -> None:
        counts = (batch["labels"] != IGNORED).sum(1).tolist()
        logits, labels = call_model(model, batch)
        for kind, values in zip(found, _read_logits(logits, labels), strict=True):
            for place, part in zip(places, values.cpu().split(counts), strict=True):
                kind[place] = part

    with torch.no_grad(), eval_mode(model):
        text_batches(tokenizer, rows, batch_size, read, progress=progress, name=name, device=device or device_of(model))
    log_probs, correct, standardized = found
    return TokenScores(log_probs, correct, standardized)


def _read_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token the log probability, whether it is the likeliest, and its standardised log probability."""
    log_probs = logits.float().log_softmax(-1)
    told = log_probs.gather(1, labels.unsqueeze(1)).squeeze(1)
    probabilities = log_probs.exp()
    finite = torch.where(probabilities > 0, log_probs, 0)  # a token that cannot be has no part in the mean
    mean = (probabilities * finite).sum(-1)
    variance = (probabilities * (finite - mean.unsqueeze(1)).square()).sum(-1).clamp(min=_LEAST_VARIANCE)
    return told, logits.argmax(-1) == labels, (told - mean) / variance.sqrt()
