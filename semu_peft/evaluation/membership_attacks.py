"""Which membership attacks fit a model and the data there are: each as what runs it, or why it is not run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .attack_report import Compared
from .classification import Predictions, attack_predictions, predict
from .knowledge import Task
from .language_membership import batch_membership
from .shadow_membership import ShadowMembership, lira_scores, rmia_scores, score_attack

Run = Callable[[nn.Module | None], Any]
"""`(reference) -> result`: an attack on the model, and on the reference where there is one."""


@dataclass(frozen=True)
class MembershipAttacks:
    """Do examples of what was forgotten look trained on? Asked of classifiers and of language models.

    Attributes:
        model: The unlearned model.
        task: What it is for.
        forget: Batches of what was forgotten.
        retain: Batches of the rest, or None.
        test: Batches that no model was trained on, or None.
        shadow: Of each shadow model its predictions on `forget` and on `test`.
        tokenizer: Of a language model, or None.
        seed: Of all draws.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation.membership_attacks import MembershipAttacks
        >>> forget = [(torch.randn(4, 2), torch.zeros(4).long())]
        >>> for name, run in MembershipAttacks(torch.nn.Linear(2, 2), "classification", forget).attacks():
        ...     print(f"{name}: {run}")
        membership: confidence and threshold: it needs `retain` and `test`
        membership: log odds: `test` was not given
        membership with shadow models: LiRA and RMIA: `test` was not given
    """

    model: nn.Module
    task: Task
    forget: list[Any]
    retain: list[Any] | None = None
    test: list[Any] | None = None
    shadow: Sequence[tuple[Predictions, Predictions]] = ()
    tokenizer: Any = None
    seed: int = 0

    def attacks(self) -> Iterator[tuple[str, Run | str]]:
        """The name of each, with what runs it or the reason why it is not run."""
        if self.task == "classification":
            yield from self._of_examples()
        else:
            reason = f"these see one answer an example, and this is a {self.task} model"
            yield "membership: confidence, log odds, LiRA and RMIA", reason
        if self.task == "language":
            yield from self._of_texts()

    def _of_examples(self) -> Iterator[tuple[str, Run | str]]:
        missing = [f"`{name}`" for name in ("retain", "test") if getattr(self, name) is None]
        plain = f"it needs {' and '.join(missing)}" if missing else self._confidence
        yield "membership: confidence and threshold", plain
        no_test = "`test` was not given" if self.test is None else None
        yield "membership: log odds", no_test or self._by_score(self._log_odds)
        no_shadow = None if self.shadow else "`shadow` was not given: predictions of models that never knew"
        if no_test or no_shadow:
            yield "membership with shadow models: LiRA and RMIA", no_test or no_shadow or ""
            return
        no_odds = any(each.log_odds is None for pair in self.shadow for each in pair)
        reason = "predictions in `shadow` have no `log_odds`: make them by `predict`"
        yield "membership: LiRA", reason if no_odds else self._by_score(self._lira)
        yield "membership: RMIA", self._by_score(self._rmia)

    def _confidence(self, reference: nn.Module | None) -> Compared:
        def of(model: nn.Module) -> Any:
            member, other = (predict(model, each or [], progress=False) for each in (self.retain, self.test))
            return attack_predictions(member, other, predict(model, self.forget, progress=False), seed=self.seed)

        name = "membership: confidence and threshold, taken for never trained on"
        return Compared(name, of(self.model), None if reference is None else of(reference))

    def _by_score(self, scored: Callable[[Predictions, Predictions], ShadowMembership]) -> Run:
        """Score what a model says of forget and test examples, and the reference alike."""

        def of(model: nn.Module) -> ShadowMembership:
            return scored(*(predict(model, side, progress=False) for side in (self.forget, self.test or [])))

        return lambda beside: replace(of(self.model), reference=None if beside is None else of(beside))

    def _log_odds(self, forget: Predictions, test: Predictions) -> ShadowMembership:
        return score_attack(_odds(forget), _odds(test), attack="log odds, without shadow models", seed=self.seed)

    def _lira(self, forget: Predictions, test: Predictions) -> ShadowMembership:
        outside = [torch.stack([_odds(pair[side]) for pair in self.shadow]) for side in (0, 1)]
        scores = [lira_scores(_odds(side), of_it) for side, of_it in zip((forget, test), outside, strict=True)]
        return score_attack(*scores, attack="LiRA", seed=self.seed)

    def _rmia(self, forget: Predictions, test: Predictions) -> ShadowMembership:
        """Half of the test examples are the population, the others the non-members."""
        forget_out, test_out = (torch.stack([pair[side].confidence for pair in self.shadow]) for side in (0, 1))
        half = (test.confidence[1::2], test_out[:, 1::2])
        member = rmia_scores(forget.confidence, forget_out, *half)
        other = rmia_scores(test.confidence[::2], test_out[:, ::2], *half)
        return score_attack(member, other, attack="RMIA", seed=self.seed)

    def _of_texts(self) -> Iterator[tuple[str, Run | str]]:
        name, test = "membership of texts", self.test
        if test is None:
            yield name, "`test` was not given: batches of texts that no model was trained on"
            return
        yield (
            name,
            lambda beside: batch_membership(
                self.model, self.forget, test, tokenizer=self.tokenizer, reference=beside, seed=self.seed
            ),
        )
        if self.tokenizer is None:
            yield f"{name}: zlib", "`tokenizer` was not given, which makes texts of tokens"


def _odds(said: Predictions) -> Tensor:
    assert said.log_odds is not None  # `predict` tells them
    return said.log_odds
