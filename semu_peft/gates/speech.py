"""What a model may not say while it decodes, and what it says instead, for the prompts on which a gate opens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from semu_peft.arguments import check_count, check_kind, check_number
from semu_peft.objectives.batches import IGNORED, check_batches, logits_of, split_batch, token_runs
from semu_peft.tuner.adapted import base_model

from .intervention import Gate, Intervention, Weights, any_open, weights_of_rows


class ForbiddenContinuations(LogitsProcessor):
    """Keeps strings of tokens from being completed, while each of their tokens alone may be said.

    The strings are a trie, so that a step costs their greatest length and not their number. What the prompt ends with
    counts as the beginning of a string.

    Source: GUARD, arXiv 2505.13312, its hard mask (β 1).

    Args:
        sequences: Token indices of each string.
        open_rows: For which rows of the batch it holds, `(N,)`, above 0; by default for all. Beams follow their row.

    Raises:
        ValueError: A string is empty, or there is none.

    Examples:
        >>> from semu_peft.gates import ForbiddenContinuations
        >>> forbidden = ForbiddenContinuations([[3, 1]])
        >>> forbidden(torch.tensor([[2, 3], [3, 2]]), torch.zeros(2, 4))
        tensor([[0., -inf, 0., 0.],
                [0., 0., 0., 0.]])
    """

    def __init__(self, sequences: Iterable[Sequence[int]], open_rows: Tensor | None = None) -> None:
        self._trie: dict[int, Any] = {}
        self._depth = 0
        for tokens in _strings(sequences):
            if not tokens:
                raise ValueError("`sequences` must hold strings of at least one token, got an empty one. Leave it out.")
            node = self._trie
            for token in tokens:
                node = node.setdefault(token, {})
            node[_END] = True
            self._depth = max(self._depth, len(tokens))
        if not self._trie:
            raise ValueError("`sequences` must hold at least one string of tokens, got none. Name what is forbidden.")
        self.open_rows = open_rows

    def after(self, tokens: Sequence[int]) -> list[int]:
        """The tokens that would complete a string after these."""
        found = set()
        for start in range(max(0, len(tokens) - self._depth + 1), len(tokens) + 1):
            node = self._trie
            for token in tokens[start:]:
                node = node.get(token, {})
                if not node:
                    break
            found |= {token for token, child in node.items() if token != _END and _END in child}
        return sorted(found)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores `(N, V)` of the next token, −∞ where it would complete a string."""
        rows = torch.ones(len(scores)) if self.open_rows is None else weights_of_rows(self.open_rows, scores)
        masked = scores.clone()
        for row in (rows > 0).nonzero()[:, 0].tolist():
            if tokens := self.after(input_ids[row, max(0, input_ids.shape[1] - self._depth + 1) :].tolist()):
                masked[row, tokens] = -torch.inf
        return masked


def _strings(sequences: Iterable[Sequence[int]]) -> list[tuple[int, ...]]:
    """Strings of tokens, checked."""
    kind, mend = "lists of token indices", "Write `[[1, 2]]`; `tokenizer(text).input_ids` has those of a text."
    check_kind("sequences", sequences, Iterable, kind, mend)
    strings = list(sequences)
    for each in strings:
        if isinstance(each, str) or not isinstance(each, Iterable):
            raise TypeError(f"`sequences` must hold {kind}, got {each!r} among them. {mend}")
    return [tuple(map(int, each)) for each in strings]


def answer_strings(
    forget: Iterable[Any], length: int = 3, *, retain: Iterable[Any] | None = None
) -> list[tuple[int, ...]]:
    """Every run of tokens of a length in the answers of batches, but those that retain answers have as well.

    Answers that are shorter are one run. Labels −100 separate answers.

    Args:
        forget: Batches with labels of tokens.
        length: How many tokens a run has.
        retain: Batches whose runs may be said.

    Raises:
        ValueError: No run is left.

    Examples:
        >>> from semu_peft.gates.speech import answer_strings
        >>> answer_strings([{"input_ids": None, "labels": torch.tensor([[-100, 4, 5, 6], [-100, -100, -100, 7]])}], 2)
        [(4, 5), (5, 6), (7,)]
    """
    every = strings_of_answers(forget, length, retain=retain)
    return list(dict.fromkeys(run for runs in every for run in runs))


def strings_of_answers(
    forget: Iterable[Any], length: int = 3, *, retain: Iterable[Any] | None = None
) -> list[list[tuple[int, ...]]]:
    """For each example its own runs of tokens, see [`answer_strings`][semu_peft.gates.speech.answer_strings].

    Args:
        forget: Batches with labels of tokens.
        length: How many tokens a run has.
        retain: Batches whose runs may be said.

    Returns:
        One list for each row of the batches; it is empty where retain answers have all of a row's runs.

    Raises:
        ValueError: No run is left.

    Examples:
        >>> from semu_peft.gates.speech import strings_of_answers
        >>> batch = {"input_ids": None, "labels": torch.tensor([[-100, 4, 5, 6], [-100, 4, 5, -100]])}
        >>> strings_of_answers([batch], 2)
        [[(4, 5), (5, 6)], [(4, 5)]]
    """
    check_count("length", length)
    check_batches(forget, "forget")
    said = set() if retain is None else {run for runs in _runs(retain, length) for run in runs}
    found = [[run for run in dict.fromkeys(runs) if run not in said] for runs in _runs(forget, length)]
    if not any(found):
        raise ValueError("`forget` must have runs of tokens of its own, got none. Check the labels, or give a length.")
    return found


def _runs(batches: Iterable[Any], length: int) -> Iterator[list[tuple[int, ...]]]:
    for batch in batches:
        for row in split_batch(batch)[2].tolist():
            found = []
            for counts, group in groupby(row, key=lambda token: token != IGNORED):
                if counts:
                    found += token_runs(tuple(group), length)
            yield found


class SimilarTokens(LogitsProcessor):
    """Lowers tokens that are like forbidden ones: `z_v ← z_v − β max_f cos(e_v, e_f)`, where the cosine is above δ.

    Source: GUARD, arXiv 2505.13312, its semantic matching with δ .5, where a sentence encoder compares words. Neither
    code nor equation of it was to be had; this compares tokens, by any vectors of them, such as the model's embeddings.

    Args:
        embeddings: A vector of each token, `(V, D)`.
        tokens: Indices of the forbidden tokens.
        penalty: `β`, in logits.
        threshold: `δ`.

    Raises:
        ValueError: There is no token, or a number is out of range.

    Examples:
        >>> from semu_peft.gates.speech import SimilarTokens
        >>> embeddings = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
        >>> SimilarTokens(embeddings, [0], penalty=10.0)(None, torch.zeros(1, 3))
        tensor([[-10.,  -6.,   0.]])
    """

    def __init__(
        self, embeddings: Tensor, tokens: Iterable[int], penalty: float = 1.0, *, threshold: float = 0.5
    ) -> None:
        check_number("penalty", penalty, low=0.0)
        check_number("threshold", threshold, low=0.0, high=1.0)
        places = torch.tensor(sorted(set(tokens)), device=embeddings.device)
        if not len(places):
            raise ValueError("`tokens` must hold at least one token, got none. Name what is forbidden.")
        rows = nn.functional.normalize(embeddings.detach().float(), dim=-1)
        cosines = (rows @ rows[places].mT).amax(-1)
        cosines[places] = 1.0  # whatever rounding says
        self.lowered = torch.where(cosines > threshold, cosines * penalty, 0.0)

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        """The scores `(…, V)`, lowered; of models whose logits are more than their tokens, the first."""
        lowered = self.lowered.to(scores)[: scores.shape[-1]]
        return scores - nn.functional.pad(lowered, (0, scores.shape[-1] - len(lowered)))


class ForbiddenAnswers(Intervention):
    """A model that cannot complete strings of tokens after the prompts on which a gate opens.

    The strings are the same for all prompts or, given by name, those of the names that the gate opens: with
    [`Retrieval`][semu_peft.gates.retrieval.Retrieval] those of the answers whose prompts are nearest.

    Source: GUARD, arXiv 2505.13312, where the strings are the answers that are to be forgotten.

    Args:
        model: A language model.
        gate: Which prompts.
        sequences: Token indices of each string, or such by the gate's names; names without a string forbid nothing.
        penalty: By how many logits tokens are lowered that are like those which are a string of their own, see
            [`SimilarTokens`][semu_peft.gates.speech.SimilarTokens]; by the model's own embeddings.
        threshold: From which cosine on they are alike.

    Raises:
        ValueError: There is no string, or `penalty` has none of one token; when it is called, the gate gives a name
            that has no list.

    Examples:
        >>> from semu_peft.gates import ForbiddenAnswers
        >>> model = nn.Embedding(4, 4)
        >>> guarded = ForbiddenAnswers(model, lambda model, ids: {"all": torch.ones(len(ids))}, [[3, 1]])
        >>> guarded(torch.tensor([[2, 3]]))[0, 1, 1]
        tensor(-inf, grad_fn=<SelectBackward0>)
    """

    def __init__(
        self,
        model: nn.Module,
        gate: Gate | Callable[..., Weights],
        sequences: Iterable[Sequence[int]] | Mapping[str, Iterable[Sequence[int]]],
        *,
        penalty: float = 0.0,
        threshold: float = 0.5,
    ) -> None:
        super().__init__(model, gate)
        check_number("penalty", penalty, low=0.0)
        named = sequences if isinstance(sequences, Mapping) else {_ALL: sequences}
        self.sequences = {name: _strings(strings) for name, strings in named.items()}
        every = [string for strings in self.sequences.values() for string in strings]
        ForbiddenContinuations(every)  # whose mistakes are told now
        if penalty > 0 and not any(len(string) == 1 for string in every):
            raise ValueError(
                "`penalty` must be 0 where no string is of one token, got strings of more. Give `length=1` to what "
                "makes them."
            )
        self.penalty, self.threshold = penalty, threshold

    def opened(self, weights: dict[str, Tensor]) -> AbstractContextManager[None]:
        processor = self._processor(weights)

        def mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            ids, logits = kwargs.get("input_ids", args[0] if args else None), logits_of(output)
            cache = kwargs.get("past_key_values")
            if ids is None or ids.shape[1] != logits.shape[1]:
                return output
            if cache is not None and int(cache.get_seq_length()) > ids.shape[1]:
                return output  # `generate` has the processor, which sees the whole text
            return with_logits(output, processor.along(ids, logits))

        return self.hooked([(base_model(self.model), mask)], with_kwargs=True)

    def generation_options(self, weights: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
        return with_processor(options, self._processor(weights))

    def _processor(self, weights: dict[str, Tensor]) -> _OfExamples:
        unknown = sorted(set(weights) - set(self.sequences))
        if unknown and _ALL not in self.sequences:
            raise ValueError(
                f"`sequences` must have strings of the names that the gate gives, got none of {unknown[0]!r}. Give it "
                "an empty list where nothing is forbidden."
            )
        made: dict[frozenset[str], list[LogitsProcessor]] = {}
        opened = []
        for example in range(len(next(iter(weights.values())))):
            names = frozenset(name for name, each in weights.items() if float(each[example]) > 0)
            names = frozenset({_ALL}) if names and _ALL in self.sequences else names
            if names not in made:
                made[names] = self._processors([string for name in sorted(names) for string in self.sequences[name]])
            opened.append(made[names])
        return _OfExamples(opened)

    def _processors(self, strings: list[tuple[int, ...]]) -> list[LogitsProcessor]:
        alone = [string[0] for string in strings if len(string) == 1]
        made: list[LogitsProcessor] = [ForbiddenContinuations(strings)] if strings else []
        if self.penalty > 0 and alone:
            model: Any = base_model(self.model)
            embeddings = model.get_input_embeddings().weight
            made.append(SimilarTokens(embeddings, alone, self.penalty, threshold=self.threshold))
        return made


class _OfExamples(LogitsProcessor):
    """For each example of a batch processors of its own; beams follow their example."""

    def __init__(self, processors: Sequence[Sequence[LogitsProcessor]]) -> None:
        self.processors = processors

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        result = scores.clone()
        for row, example in enumerate(weights_of_rows(torch.arange(len(self.processors)), scores).tolist()):
            for processor in self.processors[example]:
                result[row] = processor(input_ids[row : row + 1], result[row : row + 1])[0]
        return result

    def along(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """The logits `(N, L, V)` of whole texts, at each place by what stands up to it."""
        steps = [self(input_ids[:, : place + 1], logits[:, place]) for place in range(logits.shape[1])]
        return torch.stack(steps, 1)


class Abstention(Intervention):
    """A model that gives one answer to all prompts on which a gate opens, and says nothing of what it would have said.

    While it generates, the answer's tokens are forced. The logits of a whole text are all alike there: no token is
    likelier than another.

    Source: KSD, arXiv 2503.21730, where the gate is a box; per prompt, not for a whole batch.

    Args:
        model: A language model.
        gate: Which prompts.
        answer: Token indices of the answer, the end of the text among them.

    Raises:
        ValueError: The answer is empty.

    Examples:
        >>> from semu_peft.gates import Abstention
        >>> model = nn.Embedding(4, 4)
        >>> silent = Abstention(model, lambda model, ids: {"all": (ids[:, 0] == 2).float()}, [1])
        >>> silent(torch.tensor([[2, 3], [0, 3]])).abs().sum((1, 2)) > 0
        tensor([False,  True])
    """

    def __init__(self, model: nn.Module, gate: Gate | Callable[..., Weights], answer: Sequence[int]) -> None:
        super().__init__(model, gate)
        self.answer = [int(token) for token in answer]
        if not self.answer:
            raise ValueError("`answer` must have at least one token, got none. Give a refusal, such as its end token.")

    def opened(self, weights: dict[str, Tensor]) -> AbstractContextManager[None]:
        def silence(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            logits = logits_of(output)
            rows = weights_of_rows(any_open(weights), logits).view(-1, *(1 for _ in logits.shape[1:]))
            return with_logits(output, torch.where(rows > 0, torch.zeros_like(logits), logits))

        return self.hooked([(base_model(self.model), silence)])

    def generation_options(self, weights: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
        return with_processor(options, _Forced(self.answer, any_open(weights)))


class _Forced(LogitsProcessor):
    def __init__(self, answer: list[int], open_rows: Tensor) -> None:
        self.answer, self.open_rows = answer, open_rows
        self.prompt: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.prompt = input_ids.shape[1] if self.prompt is None else self.prompt
        token = self.answer[min(input_ids.shape[1] - self.prompt, len(self.answer) - 1)]
        forced = torch.full_like(scores, -torch.inf)
        forced[:, token] = 0
        return torch.where(weights_of_rows(self.open_rows, scores).view(-1, 1) > 0, forced, scores)


def with_processor(options: dict[str, Any], processor: LogitsProcessor) -> dict[str, Any]:
    """Options of `generate` with one more processor, after those that are there.

    Examples:
        >>> from semu_peft.gates.speech import ForbiddenContinuations, with_processor
        >>> len(with_processor({}, ForbiddenContinuations([[1]]))["logits_processor"])
        1
    """
    given = options.get("logits_processor") or []
    return {**options, "logits_processor": LogitsProcessorList([*given, processor])}


def with_logits(output: Any, logits: Tensor) -> Any:
    """A model's output with other logits.

    Examples:
        >>> from semu_peft.gates.speech import with_logits
        >>> with_logits({"logits": torch.zeros(1)}, torch.ones(1))
        {'logits': tensor([1.])}
    """
    if isinstance(output, Tensor):
        return logits
    if isinstance(output, tuple):
        place = next(index for index, value in enumerate(output) if value is logits_of(output))
        return (*output[:place], logits, *output[place + 1 :])
    output["logits"] = logits
    return output


_END = -1
_ALL = ""  # the name of strings that hold whatever name is open
