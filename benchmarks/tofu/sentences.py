"""What is minimised: the objectives for texts, what they may ask for, and what goes with them on what is held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from subjects import Subject
from torch import Tensor, nn

from semu_peft import objectives
from semu_peft.language import TextExamples
from semu_peft.objectives import Objective

LAYER = 2  # of four, whose outputs representation methods lead away


@dataclass(frozen=True)
class Given:
    """What an objective may ask for.

    Attributes:
        subject: Models and texts.
        original: The model before anything is trained.
        reference: A frozen copy of it where all weights are trained; None where it is the model without its adapter.
        wrong: Answers that the model never learnt, one to each question.
        unseen: How unlikely the original finds these, in nats a token, `(N,)`.
    """

    subject: Subject
    original: nn.Module
    reference: nn.Module | None
    wrong: Sequence[Any]
    unseen: Tensor


@dataclass(frozen=True)
class Sentence:
    """An objective, and what is minimised beside it.

    Attributes:
        make: The objective.
        weight: Of what is held.
        keeps: What is minimised on retain answers; on neutral text it is the KL to the original, and so it is here by
            default.
        learning_rate: Of AdamW for all weights, where it is not the carrier's; of those beyond NPO and WGA it is what
            the zoo on texts chose.
        alternates: The second answer to each question: a refusal, or a wrong one.
    """

    make: Callable[[Given], Objective]
    weight: float = 30.0
    keeps: Callable[[Given], Objective] | None = None
    learning_rate: float | None = None
    alternates: Literal["refusals", "wrong"] | None = None

    def examples(self, given: Given) -> TextExamples:
        """The answers to forget, with second ones where they are asked for."""
        subject = given.subject
        if self.alternates is None:
            return subject.examples(subject.forget)
        second = "refusals" if self.alternates == "refusals" else [each.answer for each in given.wrong]
        return subject.examples(subject.forget, alternates=second)


def _entropy(given: Given) -> Objective:
    return objectives.CrossEntropy()


def _bounded(given: Given) -> Objective:
    return objectives.PrimalDual(objectives.CrossEntropy(), given.subject.retain_limit(given.original))


def _hidden(given: Given) -> Objective:
    return objectives.PreserveHiddenStates(LAYER, given.reference)


OBJECTIVES = {
    "NPO 0.03": Sentence(lambda given: objectives.NPO(beta=0.03, reference=given.reference)),
    "NPO 0.1": Sentence(lambda given: objectives.NPO(beta=0.1, reference=given.reference)),
    "SimNPO": Sentence(lambda given: objectives.SimNPO()),
    "WGA": Sentence(lambda given: objectives.WGA(), 1.0, _entropy, 3e-4),
    "unseen answers": Sentence(lambda given: objectives.UnseenAnswer(given.unseen, given.reference)),
    "DELETE": Sentence(lambda given: objectives.DecoupledDistillation(reference=given.reference)),
    "inverted hinge": Sentence(lambda given: objectives.InvertedHinge()),
    "gradient ascent": Sentence(lambda given: objectives.GradientAscent()),
    "uniform": Sentence(lambda given: objectives.UniformDistribution()),
    "UNDIAL": Sentence(lambda given: objectives.UNDIAL(reference=given.reference), 1.0, _entropy, 3e-4),
    "CE-U": Sentence(lambda given: objectives.CEU(), 1.0, _entropy, 3e-4),
    "SatImp": Sentence(lambda given: objectives.SatImp(), 1.0, _entropy, 1e-3),
    "TPO": Sentence(lambda given: objectives.TPO(reference=given.reference), 1.0, _entropy, 3e-4),
    "IdkDPO": Sentence(lambda given: objectives.DPO(reference=given.reference), 1.0, _entropy, 3e-4, "refusals"),
    "AltPO": Sentence(lambda given: objectives.DPO(reference=given.reference), 1.0, _entropy, 3e-4, "wrong"),
    "FLAT": Sentence(lambda given: objectives.FDivergence(), 1.0, _entropy, 1e-3, "refusals"),
    "Adaptive RMU": Sentence(lambda given: objectives.AdaptiveRMU(LAYER), 10.0, _hidden),
    "PDU": Sentence(lambda given: objectives.FlatLogits(), 1.0, _bounded, 3e-4),
}
