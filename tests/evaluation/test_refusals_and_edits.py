"""SARR and the entangled score, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from semu_peft.evaluation import count_refusals, entangled
from semu_peft.evaluation.entangled import entangled_of
from semu_peft.evaluation.refusals import judge_by_words

SAID = [
    "I'm sorry, but I can't help with that.", "I do not know who this is.", "As an AI, I cannot answer.", "!!! ???",
    "Two birds.", "A red car in front of a house.", "It is Paris.", "The can is empty.", "Blue",
    "Sorry songs sell well.",
]  # fmt: skip


def test_sarr_by_hand() -> None:
    """Acceptance: three refusals, one gibberish and six answers are 40%; what cannot be judged stands apart."""
    found = count_refusals(SAID)
    assert (found.refused, found.gibberish, found.answered, found.unparsable) == (3, 1, 6, 0)
    assert found.sarr == 40.0
    odd = count_refusals([*SAID, "?"], judge=lambda answer: "unclear" if answer == "?" else judge_by_words(answer))
    assert odd.sarr == 40.0 and odd.unparsable == 1
    unclear = count_refusals(["?"], judge=lambda answer: "unclear")
    assert math.isnan(unclear.sarr) and "1 not judged" in repr(unclear)
    with pytest.raises(ValueError, match="`answers` must hold one answer at least, got none"):
        count_refusals([])
    with pytest.raises(TypeError, match="`answers` must be a list of texts"):
        count_refusals("no")


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("I don’t have information about this person.", "refusal"),
        ("We are unable to say.", "refusal"),
        ("a a a a a a a a", "gibberish"),
        ("", "gibberish"),
        ("No, no, no, I like it.", "answer"),
    ],
)
def test_judged_by_words(answer: str, verdict: str) -> None:
    assert judge_by_words(answer) == verdict


def test_the_entangled_score_by_hand() -> None:
    """Acceptance: S 0.720, C 0.9006 and D 0.8002; with `alpha=0` it is C, and with 1 S."""
    parts = {"means": (0.4, 0.5), "spreads": (0.2, 0.3)}
    found = entangled_of(0.6, 0.1, **parts)
    assert found.similarity == pytest.approx(0.72)
    assert found.consistency == pytest.approx(0.9006, abs=1e-4)
    assert found.score == pytest.approx(0.8002, abs=1e-4)
    assert entangled_of(0.6, 0.1, **parts, alpha=0.0).score == pytest.approx(found.consistency)
    assert entangled_of(0.6, 0.1, **parts, alpha=1.0).score == pytest.approx(found.similarity)


def test_what_stays_and_what_changes() -> None:
    """Acceptance: an unchanged image gets 0, one that is changed inside more, and damage outside lowers it."""
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:10, 4:10] = True
    edited = torch.where(mask, image.flip(1), image)
    damaged = torch.where(mask, edited, image.flip(2))
    scores = [entangled(image, each, mask).score for each in (image, edited, damaged)]
    assert scores[0] == 0.0 < scores[2] < scores[1]
    found, rmse = entangled(image, edited, mask), float((edited - image)[:, mask].square().mean().sqrt())
    assert found.outside == 0.0 and found.inside == pytest.approx(rmse)


def test_mistakes() -> None:
    image = torch.rand(3, 4, 4)
    for mask in (torch.zeros(4, 4), torch.ones(4, 4), torch.zeros(5, 4)):
        with pytest.raises(ValueError, match="`mask` must"):
            entangled(image, image, mask)
    with pytest.raises(ValueError, match="`edited` must be of the shape"):
        entangled(image, image[:, 1:], torch.zeros(4, 4))
