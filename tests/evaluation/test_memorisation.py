"""Measures of what is known by heart, on cases computed by hand and with the traps of released code."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import ks_2samp

from semu_peft.evaluation import (
    TokenScores,
    exact_memorisation,
    extraction_strength,
    forget_quality,
    model_utility,
    truth_ratio,
)
from semu_peft.evaluation.memorisation import (
    forget_truth_ratio,
    probability_with_options,
    retain_truth_ratio,
)


def right(*tokens: int) -> TokenScores:
    correct = torch.tensor(tokens).bool()
    return TokenScores([torch.zeros(len(tokens))], [correct], [torch.zeros(len(tokens))], has_eos=True)


def test_truth_ratio_by_hand() -> None:
    ratio = truth_ratio([0.5, 2.0], [[1.0, 3.0], [2.0, 2.0]])
    assert ratio.tolist() == pytest.approx([math.exp(0.5 - 2.0), 1.0])
    arithmetic = truth_ratio([0.5], [[1.0, 3.0]], mean="arithmetic")
    assert arithmetic.item() == pytest.approx((math.exp(-1) + math.exp(-3)) / 2 / math.exp(-0.5))


def test_truth_ratio_of_fiubench_is_the_inverse() -> None:
    # Losses of 2.0 on wrong answers and 1.5 on the paraphrase: FIUBench prints exp(0.5).
    assert truth_ratio([1.5], [[2.0]], inverted=True).item() == pytest.approx(1.649, abs=5e-4)
    assert truth_ratio([1.5], [[2.0]]).item() == pytest.approx(1 / 1.6487, abs=1e-4)


def test_truth_ratio_takes_rows_of_different_length_and_does_not_underflow() -> None:
    ratio = truth_ratio([800.0, 1.0], [[800.0], [1.0, 1.0, 1.0]])  # exp(−800) is 0 in float64
    assert ratio.tolist() == pytest.approx([1.0, 1.0])


def test_a_destroyed_model_has_no_forget_quality_with_openunlearnings_epsilon() -> None:
    """Its ratios are those of its formulas; a plain ratio of impossible answers looks like gold's."""
    draw = torch.Generator().manual_seed(0)
    gold = 3.0 + torch.rand(400, generator=draw).double()
    beyond = 0.4 + torch.rand(400, 5, generator=draw).double()
    kept = {epsilon: truth_ratio(gold, gold[:, None] + beyond, epsilon=epsilon) for epsilon in (0.0, 1e-10)}
    for level, is_alike in ((0.0, True), (60.0, False)):
        correct, wrong = gold + level, gold[:, None] + level + beyond
        found = truth_ratio(correct, wrong, epsilon=1e-10)
        released = (-wrong.mean(1)).exp() / ((-correct).exp() + 1e-10)
        torch.testing.assert_close(found, released, rtol=1e-6, atol=0)
        assert (forget_quality(found, kept[1e-10]) > 0.05) == is_alike
        assert forget_quality(truth_ratio(correct, wrong), kept[0.0]) > 0.05
        options = probability_with_options(correct, wrong, epsilon=1e-10)
        by_hand = (-correct).exp() / ((-correct).exp() + (-wrong).exp().sum(1) + 1e-10)
        torch.testing.assert_close(options, by_hand, rtol=1e-6, atol=0)


def test_aggregates_of_the_truth_ratio() -> None:
    assert forget_truth_ratio([0.25, 4.0, 1.0]) == pytest.approx((0.25 + 0.25 + 1) / 3)
    assert retain_truth_ratio([0.25, 4.0, 1.0]) == pytest.approx(0.25)


def test_forget_quality_is_blind_to_inversion_of_both_and_not_of_one() -> None:
    draw = torch.Generator().manual_seed(0)
    model, gold = torch.rand(200, generator=draw) * 0.8, torch.rand(200, generator=draw)
    both = forget_quality(model, gold)
    assert both == pytest.approx(ks_2samp(1 / (model + 1e-10), 1 / (gold + 1e-10)).pvalue)
    assert forget_quality(1 / model, 1 / gold) == pytest.approx(both)
    assert forget_quality(1 / model, gold) < 1e-20 < both
    assert forget_quality(gold, gold) == 1.0


def test_forget_quality_does_not_say_on_which_side() -> None:
    gold = torch.linspace(1.0, 2.0, 100).double()
    assert forget_quality(gold - 0.3, gold) == pytest.approx(forget_quality(gold + 0.3, gold))


def test_model_utility_is_a_harmonic_mean_that_one_zero_ends() -> None:
    assert model_utility([0.5] * 8 + [1.0]) == pytest.approx(9 / (8 * 2 + 1))
    assert model_utility({"a": 0.9, "b": 0.0}) == 0.0
    with pytest.raises(ValueError, match="`parts` must be numbers from 0 to 1"):
        model_utility([1.2])


def test_probability_among_options() -> None:
    value = probability_with_options([math.log(2)], [[math.log(4), math.log(4)]])
    assert value.item() == pytest.approx(0.5 / (0.5 + 0.25 + 0.25))


@pytest.mark.parametrize(
    ("tokens", "strength", "exact"),
    [
        ((1, 1, 1, 1, 0), 1.0, 1.0),  # the end of the sequence does not count
        ((0, 1, 1, 1, 1), 0.75, 0.75),
        ((1, 1, 0, 1, 1), 0.25, 0.75),
        ((1, 1, 1, 0, 1), 0.25, 0.75),  # nothing is extracted: the floor 1/|y|
        ((0, 0, 0, 0, 0), 0.25, 0.0),
    ],
)
def test_extraction_strength_and_exact_memorisation(tokens: tuple[int, ...], strength: float, exact: float) -> None:
    assert extraction_strength(right(*tokens)).tolist() == [strength]
    assert exact_memorisation(right(*tokens)).tolist() == [exact]


def test_what_a_model_that_has_diverged_says_is_no_number() -> None:
    """Nothing is the largest of NaN: no token would be known, as of a model that has forgotten."""
    correct, log_probs = torch.tensor([False, True]), [torch.tensor([torch.nan, -1.0]), torch.tensor([-2.0, -1.0])]
    scores = TokenScores(log_probs, [correct, correct], log_probs)
    for measure in (extraction_strength, exact_memorisation):
        assert measure(scores).isnan().tolist() == [True, False] and measure(scores)[1] == 0.5


def test_an_answer_of_nothing_but_its_end_is_no_number() -> None:
    assert extraction_strength(right(1)).isnan().all() and exact_memorisation(right(1)).isnan().all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: truth_ratio([1.0], [[]]), "`wrong_nll` must have one wrong answer or more"),
        (lambda: truth_ratio([1.0, 2.0], [[1.0]]), "`wrong_nll` must have"),
        (lambda: truth_ratio([1.0], [[1.0]], mean="harmonic"), "`mean` must be 'geometric' or 'arithmetic'"),
        (lambda: forget_quality([float("nan")], [1.0]), "`ratios` must be numbers without NaN"),
        (lambda: forget_quality([1.0], []), "`gold` must be numbers without NaN, got 0"),
    ],
)
def test_mistakes_of_measures(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
