"""Where forgetting is to stop, known without a model that never saw the answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from semu_peft.arguments import check_count, check_number
from semu_peft.objectives.language import sequence_nll
from semu_peft.training.callbacks import Callback, TrainingContext

from .dataset import TextExamples

_MOST = 256  # answers that are looked at; a mean needs no more


@dataclass
class UntilUnseen(Callback):
    """Stop a run once the answers are, on average, as unlikely as answers that the model has never learnt.

    A model that was trained without the answers finds them as unlikely as others it does not know; past this level
    forgetting only costs. What the original says of unseen answers is known without retraining
    ([`sequence_nll`][semu_peft.objectives.language.sequence_nll] of
    [`unseen_answers`][semu_peft.language.unseen.unseen_answers]).

    An average hides an answer that is still known behind one that never was. With `likeliest` the history tells beside
    `answer_nll` the share of answers that are likelier than any unseen one, `answers_left`, and so does the reason of
    the stop where there are any.

    Args:
        examples: What is being forgotten.
        nll: The mean negative log-likelihood a token, in nats, that is reached then.
        every: Steps between two looks, each a forward pass over up to 256 of the answers.
        batch_size: Answers at a time.
        likeliest: The negative log-likelihood a token of the likeliest unseen answer; None tells no share.

    Raises:
        ValueError: A number is out of its range, or there is no example.

    Examples:
        >>> from semu_peft.language import UntilUnseen, text_examples
        >>> examples = text_examples(tokenizer, [("What colour?", "blue"), ("How many?", "two or three")])
        >>> UntilUnseen(examples, nll=5.5)
        UntilUnseen(nll=5.5, every=5)
    """

    examples: TextExamples = field(repr=False)
    nll: float
    every: int = 5
    batch_size: int = field(default=32, repr=False)
    likeliest: float | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not len(self.examples):
            raise ValueError("`examples` must hold what is being forgotten, got none. Give the run's own.")
        check_number("nll", self.nll, low=0)
        if self.likeliest is not None:
            check_number("likeliest", self.likeliest, low=0)
        check_count("every", self.every)
        check_count("batch_size", self.batch_size)
        stride = -(-len(self.examples) // _MOST)
        self._looked_at = TextExamples(self.examples.rows[::stride], [], self.examples.tokenizer)

    def on_train_begin(self, context: TrainingContext) -> None:
        """Take no step where there is nothing to forget: every answer is as unlikely, as far as can be told."""
        if context.progress.step:
            return  # resumed
        now, left, _ = self._look(context)
        if now >= self.nll and not left:
            context.control.stop("the answers were as unlikely as unseen ones already")

    def on_step_end(self, context: TrainingContext) -> None:
        """Look, and stop where the mean answer is as unlikely."""
        if context.progress.step % self.every and context.progress.step < context.total_steps:
            return
        now, left, number = self._look(context)
        if now >= self.nll:
            but = f", but {left} of {number} are likelier than any of these" if left else ""
            context.control.stop(f"the answers are on average as unlikely as unseen ones{but}")

    def _look(self, context: TrainingContext) -> tuple[float, int, int]:
        """The mean, how many answers are still known where that can be told, and of how many."""
        every = self._nll(context.model)
        now, left = float(every.mean()), 0
        if self.likeliest is None:
            context.log(answer_nll=now)
        else:
            left = int((every < self.likeliest).sum())
            context.log(answer_nll=now, answers_left=left / len(every))
        return now, left, len(every)

    def of(self, model: Any) -> float:
        """The mean answer's negative log-likelihood a token, as a model has it now."""
        return float(self._nll(model).mean())

    def _nll(self, model: Any) -> Tensor:
        return sequence_nll(model, self._looked_at.loader(self.batch_size, shuffle=False), progress=False)
