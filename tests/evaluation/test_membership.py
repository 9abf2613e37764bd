"""The confidence attack, against scikit-learn used directly and against cases whose answer is known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.svm import SVC
from torch import Tensor

from semu_peft.evaluation import ForgettingComparison, ForgettingMetrics, attack_membership, membership_inference
from semu_peft.evaluation.membership import threshold_attack


def confidences(count: int, power: float, seed: int) -> Tensor:
    """Values in [0, 1] that crowd towards 1 as `power` falls."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) ** power


def test_equals_an_independent_computation() -> None:
    member, non_member, forget = confidences(80, 0.2, 1), confidences(80, 0.6, 2), confidences(50, 0.4, 3)
    features = np.concatenate([member.numpy(), non_member.numpy()]).astype(np.float64).reshape(-1, 1)
    attack = SVC(C=3, gamma="auto", kernel="rbf").fit(features, np.array([1] * 80 + [0] * 80))
    called_member = attack.predict(forget.numpy().astype(np.float64).reshape(-1, 1))
    expected = 100 * (1 - called_member.mean())
    assert 0 < expected < 100
    # Equal sizes: every example is drawn and their order does not matter to the optimum.
    assert membership_inference(member, non_member, forget) == pytest.approx(expected, abs=1e-9)


def test_repeated_confidences_count_as_often_as_they_occur() -> None:
    member, non_member = confidences(30, 0.01, 1), confidences(30, 9.0, 2)
    forget = torch.tensor([1.0] * 3 + [0.0] * 7)
    assert membership_inference(member, non_member, forget) == 70


def test_separable_sets() -> None:
    member, non_member = 0.9 + 0.1 * confidences(50, 1, 1), 0.1 * confidences(70, 1, 2)
    assert membership_inference(member, non_member, non_member) == 100
    assert membership_inference(member, non_member, member) == 0
    assert membership_inference(non_member, member, member) == 100


def test_sets_that_cannot_be_told_apart_give_one_answer_for_all() -> None:
    same = torch.full((20,), 0.5)
    assert membership_inference(same, same, same[:5]) in (0, 100)


def test_larger_set_is_drawn_down_to_the_smaller() -> None:
    # Unbalanced, 400 members would outvote 20 non-members everywhere; balanced, the middle belongs to neither.
    member, non_member = 0.8 + 0.2 * confidences(400, 1, 1), 0.7 + 0.2 * confidences(20, 1, 2)
    low = torch.full((10,), 0.72)
    assert membership_inference(member, non_member, low) == 100
    unbalanced = SVC(C=3, gamma="auto").fit(torch.cat([member, non_member])[:, None].numpy(), [1] * 400 + [0] * 20)
    assert unbalanced.predict(low[:, None].numpy()).all(), "without the draw the answer would be 0"


def test_the_draw_follows_the_seed_and_nothing_else() -> None:
    member, non_member, forget = confidences(300, 0.4, 1), confidences(60, 0.5, 2), confidences(200, 0.45, 3)
    by_seed = [membership_inference(member, non_member, forget, seed=seed) for seed in range(6)]
    torch.manual_seed(99)
    np.random.seed(99)
    assert [membership_inference(member, non_member, forget, seed=seed) for seed in range(6)] == by_seed
    assert len(set(by_seed)) > 1
    before, legacy = torch.random.get_rng_state(), str(np.random.get_state())
    membership_inference(member, non_member, forget)
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator must not be used"
    assert str(np.random.get_state()) == legacy


def test_max_examples_bounds_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[tuple[int, int]] = []
    original = SVC.fit

    def fit(self: SVC, features: np.ndarray, targets: np.ndarray) -> SVC:
        fitted.append((int((targets == 1).sum()), int((targets == 0).sum())))
        return original(self, features[::50], targets[::50])  # what is fitted is not the point here

    monkeypatch.setattr(SVC, "fit", fit)
    member, non_member = confidences(2500, 0.4, 1), confidences(2100, 0.5, 2)
    for most in (1000, 2200, None):
        membership_inference(member, non_member, member, max_examples=most)
    membership_inference(member, non_member, member)
    assert fitted == [(1000, 1000), (2100, 2100), (2100, 2100), (2000, 2000)]


@pytest.mark.parametrize("name", ["member", "non_member", "forget"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(0), "non-empty vector"),
        (torch.zeros(3, 2), r"got shape \(3, 2\)"),
        (torch.tensor([0.5, float("nan")]), r"1 of 2 values outside \[0, 1\] or NaN"),
        (torch.tensor([0.5, 87.0, -1.0]), r"2 of 3 values outside \[0, 1\]"),
    ],
)
def test_bad_confidences_are_named(name: str, bad: Tensor, message: str) -> None:
    sets = {key: torch.tensor([0.1, 0.9]) for key in ("member", "non_member", "forget")} | {name: bad}
    with pytest.raises(ValueError, match=f"^`{name}` .*{message}"):
        membership_inference(**sets)


def test_max_examples_must_be_positive() -> None:
    with pytest.raises(ValueError, match="`max_examples` must be an integer of at least 1 or None, got 0"):
        membership_inference(*[torch.tensor([0.5])] * 3, max_examples=0)


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[evaluation\]"'):
        membership_inference(*[torch.tensor([0.5])] * 3)


def well_generalised(seed: int) -> tuple[Tensor, Tensor]:
    """Members and non-members that a model without overfitting confides in alike."""
    generator = torch.Generator().manual_seed(seed)
    return 1 - 0.40 * torch.rand(500, generator=generator) ** 6, 1 - 0.42 * torch.rand(200, generator=generator) ** 6


@pytest.mark.parametrize("seed", range(5))
def test_a_class_that_is_gone_for_good_is_no_member_whatever_was_drawn(seed: int) -> None:
    gone = 1e-4 * confidences(50, 1, seed)
    attack = attack_membership(*well_generalised(seed), gone, refits=5)
    assert attack.share == attack.threshold_share == 100 and attack.interval == (100, 100) and attack.can_tell


def test_an_attack_that_guesses_says_so() -> None:
    """Confidences that crowd together fall on one side of a border drawn by chance, or on the other."""
    crowded = torch.full((60,), 0.97)
    attack = attack_membership(*well_generalised(0), crowded)
    assert attack.share in (0, 100) and not attack.can_tell and "cannot tell" in repr(attack)
    assert attack.interval[1] - attack.interval[0] > 50
    assert attack == attack_membership(*well_generalised(0), crowded), "the same seed, the same answer"


@pytest.mark.parametrize("seed", range(4))
def test_few_examples_that_say_nothing_have_a_wide_interval(seed: int) -> None:
    """Ten examples are drawn again ten times: 400 draws of them would all lead to one border."""
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.rand(count, generator=generator) for count in (10, 12, 200)]
    assert not attack_membership(*sides, seed=seed).can_tell


def test_an_attack_that_works_has_a_narrow_interval() -> None:
    member, non_member = 0.9 + 0.1 * confidences(300, 1, 1), 0.1 * confidences(300, 1, 2)
    attack = attack_membership(member, non_member, torch.cat([member[:30], non_member[:70]]))
    assert attack.share == attack.threshold_share == 70 and attack.can_tell
    assert attack.interval[0] < 70 < attack.interval[1] < attack.interval[0] + 25


def test_the_threshold_sees_an_order_alone() -> None:
    member, non_member = torch.tensor([2.0, 5.0, 7.0, 9.0]), torch.tensor([1.0, 2.0, 3.0, 8.0])
    forget = torch.tensor([0.0, 4.0, 5.0, 6.0])  # the best border is at 5: three of four right on either side
    assert threshold_attack(member, non_member, forget) == 50
    assert threshold_attack(member.exp(), non_member.exp(), forget.exp()) == 50
    saturated = [torch.sigmoid(40 * side).float() for side in (member, non_member, forget)]
    assert threshold_attack(*saturated) != 50, "confidences of 1 are all alike, where log-odds are not"


def test_a_mean_over_metrics_says_when_one_of_them_cannot_tell() -> None:
    def row(mia: float, low: float, high: float) -> ForgettingMetrics:
        return ForgettingMetrics(
            90.0, 95.0, 94.0, mia, 4, 100, membership_interval=(low, high), membership_threshold=88.0
        )

    sure, unsure = row(80.0, 75.0, 85.0), row(100.0, 0.0, 100.0)
    assert sure.cannot_tell == () and unsure.cannot_tell == ("membership_inference",)
    told = str(ForgettingComparison({"SEMU": sure, "gold": row(70.0, 66.0, 74.0)}, reference="gold"))
    assert "75.0–85.0" in told and "88.00" in told and "(?)" not in told
    doubted = ForgettingComparison({"SEMU": unsure, "gold": sure}, reference="gold")
    assert "5.00 (?)" in str(doubted) and "(?) The membership attack on SEMU cannot tell" in str(doubted)
    assert "5.00 (?)" in doubted.to_markdown()


@pytest.mark.parametrize("name", ["membership_interval", "retain_accuracy_interval"])
@pytest.mark.parametrize("interval", [(50.0, 40.0), (-1.0, 5.0), (0.0, 101.0)])
def test_an_interval_that_is_none(name: str, interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be two percentages in order"):
        ForgettingMetrics(90.0, 95.0, 94.0, 50.0, 4, 100, **{name: interval})


def test_the_interval_outlives_a_file(tmp_path: Path) -> None:
    intervals = {"membership_interval": (40.0, 60.0), "test_accuracy_interval": (93.0, 95.0)}
    rows = {"gold": ForgettingMetrics(90.0, 95.0, 94.0, 50.0, 4, 100, **intervals)}
    comparison = ForgettingComparison(rows, reference="gold")
    loaded = ForgettingComparison.load(comparison.save(tmp_path / "rows.json"))
    assert loaded == comparison and loaded.rows["gold"].test_accuracy_interval == (93.0, 95.0)
