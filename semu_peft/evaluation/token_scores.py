"""What a language model says of each token of given answers: its log probability, whether it would have said it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from semu_peft.arguments import check_count, check_model
from semu_peft.language.decoding import check_fits, most_tokens
from semu_peft.language.encode import Row, TextEncoder
from semu_peft.model_state import device_of, eval_mode
from semu_peft.objectives.batches import IGNORED
from semu_peft.objectives.tokens import call_model, read_tokens

from .prompts import encoder_for, read_plain, read_questions

_LEAST_VARIANCE = 1e-6  # of Min-K++, as OpenUnlearning has it
_IMPOSSIBLE = -200.0  # a log probability whose exponential is 0 in float32, and 0 times it is 0


@dataclass(frozen=True, eq=False, repr=False)
class TokenScores:
    """What a model says of N answers, each of `n_i` supervised tokens, on the CPU and in the order given.

    Attributes:
        log_probs: `log p(y_t | x, y_<t)` of each answer's tokens, N vectors `(n_i,)`, float32.
        correct: Whether the true token has the largest logit, N vectors `(n_i,)`, bool.
        standardized: `(log p(y_t) − μ_t) / σ_t`, with mean and deviation of log p over the vocabulary, for Min-K++.
        has_eos: Whether the last token is the end of the sequence: of all, or of each.

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
    has_eos: bool | Sequence[bool] = False

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
        ends = [self.has_eos] * len(self) if isinstance(self.has_eos, bool) else self.has_eos
        log_probs, correct, standardized = (
            [part[: len(part) - end] for part, end in zip(kind, ends, strict=True)]
            for kind in (self.log_probs, self.correct, self.standardized)
        )
        return TokenScores(log_probs, correct, standardized)


def score_answers(
    model: nn.Module,
    tokenizer: Any,
    pairs: Any,
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
        pairs: `(question, answer)`, mappings with these keys, or what else
            [`read_text`][semu_peft.language.shapes.read_text] takes.
        template: See [`TextEncoder`][semu_peft.language.encode.TextEncoder].
        batch_size: Answers at a time.
        device: Where batches are sent; by default the device of the model's first parameter.
        progress: Show a progress bar.
        name: What to call the pairs in the progress bar and in errors.

    Raises:
        TypeError: The pairs have an unknown form.
        ValueError: There are none, one is longer than the model has positions, or the template lacks a place.

    Examples:
        >>> from semu_peft.evaluation import score_answers
        >>> score_answers(decoder, tokenizer, [("What colour?", "blue"), ("How many?", "two or three")], progress=False)
        TokenScores(2 answers, 6 tokens, mean probability 0.0...)
    """
    check_model(model)
    check_count("batch_size", batch_size)
    encoder = encoder_for(model, tokenizer, template)
    rows = [encoder.answer(example.prompt or "", example.answer) for example in read_questions(pairs, name)]
    check_fits(model, rows, name)  # nothing is cut
    scores = _score(model, tokenizer, rows, batch_size=batch_size, device=device, progress=progress, name=name)
    return replace(scores, has_eos=encoder.uses_chat or tokenizer.eos_token_id is not None)


def score_texts(
    model: nn.Module,
    tokenizer: Any,
    texts: Any,
    *,
    max_length: int = 512,
    batch_size: int = 16,
    device: torch.device | str | None = None,
    progress: bool = True,
    name: str = "texts",
) -> TokenScores:
    """Let a language model read plain texts: every token but the first counts, and the end of the sequence.

    Texts are strings, mappings with `text`, or a path of these. Long ones are read in windows of `max_length`, or of as
    many as the model has positions, each with the token before it. Special tokens are those that the tokenizer adds
    itself. The other arguments are those of [`score_answers`][semu_peft.evaluation.token_scores.score_answers].

    Raises:
        ValueError: There are no texts, or one has less than two tokens.

    Examples:
        >>> from semu_peft.evaluation import score_texts
        >>> score_texts(decoder, tokenizer, ["the sky is blue", "a b c"], progress=False)
        TokenScores(2 answers, 7 tokens, mean probability 0.0...)
    """
    check_model(model)
    check_count("batch_size", batch_size)
    windows = text_windows(tokenizer, texts, most_tokens(model, max_length), name)
    rows = [row for group in windows for row in group]
    scores = _score(model, tokenizer, rows, batch_size=batch_size, device=device, progress=progress, name=name)
    edges = [0, *accumulate(map(len, windows))]
    log_probs, correct, standardized = (
        [torch.cat(list(kind[start:end])) for start, end in pairwise(edges)]
        for kind in (scores.log_probs, scores.correct, scores.standardized)
    )
    return TokenScores(log_probs, correct, standardized, has_eos=tokenizer.eos_token_id is not None)


def score_batches(model: nn.Module, batches: Iterable[Any]) -> tuple[TokenScores, list[Tensor]]:
    """Let a language model read batches as they are, one entry a sequence, of the tokens whose labels count.

    Args:
        model: A causal or an encoder-decoder language model.
        batches: Mappings with `input_ids` and `labels`; packed sequences are told apart.

    Returns:
        What the model says, and these tokens, N vectors `(n_i,)`. Whether the last is the end of the sequence is not
        known here: `has_eos` is False.

    Raises:
        ValueError: There is no sequence.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation.token_scores import score_batches
        >>> ids = torch.tensor([[3, 4, 5, 6]])
        >>> scores, tokens = score_batches(decoder, [{"input_ids": ids, "labels": ids}])
        >>> tokens  # nothing predicts the first
        [tensor([4, 5, 6])]
    """
    found: list[list[Tensor]] = [[], [], []]
    read: list[Tensor] = []
    device = device_of(model)
    with torch.no_grad(), eval_mode(model):
        for batch in batches:
            tokens = read_tokens(model, send_to_device(batch, device))
            counts = tokens.sequences.bincount().tolist()
            for kind, values in zip(found, _read_logits(tokens.logits, tokens.labels), strict=True):
                kind += values.cpu().split(counts)
            read += tokens.labels.cpu().split(counts)
    if not read:
        raise ValueError("`batches` must hold at least one sequence, got none. Check that they have not been used up.")
    log_probs, correct, standardized = found
    return TokenScores(log_probs, correct, standardized), read


def text_windows(tokenizer: Any, texts: Any, max_length: int, name: str = "texts") -> list[list[Row]]:
    """Plain texts as rows of tokens, one list a text.

    Examples:
        >>> from semu_peft.evaluation.token_scores import text_windows
        >>> [len(group) for group in text_windows(tokenizer, ["a b c d", "a"], max_length=3)]
        [2, 1]
    """
    encoder = TextEncoder(tokenizer, max_length=max_length)
    return [encoder.windows(text) for text in read_plain(texts, name)]


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
    """Rows filled up on the right, where positions are the same with padding and without.

    Padding is told by the mask, as its token may be one that counts elsewhere.
    """
    parts = {
        "input_ids": ([row["input_ids"] for row in rows], pad),
        "attention_mask": ([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": ([row["labels"] for row in rows], IGNORED),
    }
    return {
        name: pad_sequence([torch.tensor(row) for row in values], batch_first=True, padding_value=value)
        for name, (values, value) in parts.items()
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
    correct = logits.argmax(-1) == labels
    log_probs = logits.float().log_softmax(-1)
    told = log_probs.gather(1, labels.unsqueeze(1)).squeeze(1)
    finite = log_probs.clamp_(min=_IMPOSSIBLE)  # in place from here on: this is most of what scoring costs on a CPU
    probabilities = finite.exp()
    mean = (probabilities * finite).sum(-1)
    squares = finite.sub_(mean.unsqueeze(1)).square_()
    variance = squares.mul_(probabilities).sum(-1).clamp(min=_LEAST_VARIANCE)
    return told, correct, (told - mean) / variance.sqrt()
