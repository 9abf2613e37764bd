"""What a natural-gradient run looks at without a step: the batches it is compared on, and all of the forget data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from semu_peft.objectives.base import Objective

from .accelerate_state import Prepared
from .batches import first_batches
from .held_batches import examples_of, first_pairs, looks_that_cost, rounds_of
from .progress import Progress
from .trials import Term, Trials

Judge = Callable[[dict[str, float]], bool]
"""`(values) -> bool`, of what the model does with one forget batch."""


class Looks:
    """Reads the data of a run from their beginning, without a trace in what the run itself draws.

    Args:
        prepared: The run's loaders.
        progress: Where the run stands in them.
        seeds: Of the first epochs of the loaders, the forget data's first.
        objectives: The run's, the forget objective first.
        trials: Evaluates them.
    """

    def __init__(
        self,
        prepared: Prepared,
        progress: Progress,
        seeds: Sequence[int],
        objectives: Sequence[Objective],
        trials: Trials,
    ) -> None:
        self.prepared, self.progress, self.seeds = prepared, progress, seeds
        self.objectives, self.trials = objectives, trials

    def held(self, first_draws: Sequence[Any], turns: int, also: Sequence[int] = ()) -> list[Term]:
        """The batches on which the cores are compared with the start, prepared where the cores are; none of a stream.

        Args:
            first_draws: The states of the objectives when the run began.
            turns: Of the objectives together.
            also: Further forget batches than the first ones, by their places in the pass.
        """
        loaders = [self.prepared.forget, *self.prepared.retain]
        positions = [self.progress.forget, *self.progress.retain]
        with self._draws(first_draws), ExitStack() as stack:
            forget, *retained = [
                stack.enter_context(first_batches(loader, seed, at.first_generators))
                for loader, seed, at in zip(loaders, self.seeds, positions, strict=True)
            ]
            pairs = first_pairs(forget, retained)
            pairs = [(batch, pairs[0][1]) for batch in self._forget_batches(also)] + pairs
            # What draws at random is looked at more than once where there are few examples.
            draws = any(objective.is_random for objective in self.objectives)
            looks = pairs * (rounds_of(examples_of(pairs)) if draws else 1)
            if any(objective.is_costly for objective in self.objectives):
                looks = looks[: looks_that_cost(turns)]
            return self.trials.terms_that_fit(looks)

    def find_forget_batch(self, judge: Judge) -> int | None:
        """Where in a pass over the forget data the first batch stands that is so; None where none is, as of a stream.

        An objective whose look at a batch takes many passes is not asked.
        """
        if self.objectives[0].is_costly:
            return None
        at = self.progress.forget
        with self._draws(), first_batches(self.prepared.forget, self.seeds[0], at.first_generators) as batches:
            found = (place for place, batch in enumerate(batches) if judge(self.trials.of_forget_batch(batch)))
            return next(found, None)

    def _forget_batches(self, places: Sequence[int]) -> list[Any]:
        if not places:
            return []
        at = self.progress.forget
        with first_batches(self.prepared.forget, self.seeds[0], at.first_generators) as batches:
            return [batch for place, batch in zip(range(max(places) + 1), batches, strict=False) if place in places]

    @contextmanager
    def _draws(self, first: Sequence[Any] = ()) -> Iterator[None]:
        """Let the objectives draw, from where they are or as they were at first, and then go on as if they had not."""
        now = [objective.state_dict() for objective in self.objectives]
        if first:
            _restore(self.objectives, first)
        try:
            yield
        finally:
            _restore(self.objectives, now)


def _restore(objectives: Sequence[Objective], states: Sequence[Any]) -> None:
    for objective, state in zip(objectives, states, strict=True):
        objective.load_state_dict(state)
