"""One budget for all layers: spent greedily, never exceeded; ranks and γ by pattern."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Mlp, vector_batches
from peft import get_peft_model

from semu_peft import SemuConfig, initialize_semu_weights, objectives
from semu_peft.gradients import GradientSum, Sketch
from semu_peft.subspace import RankBudget
from semu_peft.subspace.ranks import Candidate, spread_budget
from semu_peft.tuner.adapted import semu_layers

FORGET = objectives.CrossEntropy()


def candidate(energies: list[float], **settings: object) -> Candidate:
    return Candidate(torch.tensor(energies, dtype=torch.float64), float(sum(energies)), **settings)


def test_directions_go_where_they_explain_most() -> None:
    """Relative to the model large gradients get all; relative to the layer both get a share."""
    layers = {"loud": candidate([100.0, 50.0, 40.0]), "quiet": candidate([1.0, 0.1, 0.01])}
    assert spread_budget(layers, RankBudget(3, relative_to="model")) == {"loud": 3, "quiet": 0}
    assert spread_budget(layers, RankBudget(3, relative_to="layer")) == {"loud": 2, "quiet": 1}


def test_parameters_are_counted_as_the_core_has_them() -> None:
    """A full core costs r², a diagonal one r, a convolution read by channel as many times."""
    full, diagonal = candidate([4.0, 3.0, 2.0]), candidate([4.0, 3.0, 2.0], diagonal=True)
    channels = candidate([4.0, 3.0, 2.0], matrices=5)
    assert [c.cost(3) for c in (full, diagonal, channels)] == [9, 3, 45]
    assert spread_budget({"a": full}, RankBudget(8, "parameters")) == {"a": 2}
    assert spread_budget({"a": diagonal}, RankBudget(8, "parameters")) == {"a": 3}
    assert spread_budget({"a": channels}, RankBudget(19, "parameters")) == {"a": 1}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.floats(0.01, 100), min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 12),
    st.sampled_from(["directions", "parameters"]),
)
def test_the_budget_is_kept_and_well_spent(values: list[list[float]], total: int, unit: str) -> None:
    """Never more than the budget; for directions no other spending explains more."""
    layers = {str(i): candidate(sorted(energies, reverse=True)) for i, energies in enumerate(values)}
    ranks = spread_budget(layers, RankBudget(total, unit, "model"))

    def spent(choice: dict[str, int]) -> int:
        return sum(layers[n].cost(r) if unit == "parameters" else r for n, r in choice.items())

    def explained(choice: dict[str, int]) -> float:
        return sum(float(layers[n].energies[:r].sum()) for n, r in choice.items())

    assert spent(ranks) <= total
    if unit == "directions":
        options = itertools.product(*(range(len(layer.energies) + 1) for layer in layers.values()))
        best = max(explained(c) for o in options if spent(c := dict(zip(layers, o, strict=True))) <= total)
        assert explained(ranks) == pytest.approx(best)


def test_budget_of_a_model() -> None:
    """The initialised ranks add up to the budget; γ and `r` stay upper bounds; too small a budget is refused."""
    model = get_peft_model(Mlp(), SemuConfig(target_modules=Mlp.targets, explained_variance=1.0, r=3))
    profile = initialize_semu_weights(model, vector_batches(), FORGET, rank_budget=RankBudget(5), progress=False)
    assert sum(profile.ranks.values()) == 5 and max(profile.ranks.values()) <= 3
    for name, layer in semu_layers(model).items():
        assert layer.r["default"] == profile.ranks[name] == model.peft_config["default"].ranks[name]
    profile = initialize_semu_weights(
        model, vector_batches(), FORGET, rank_budget=RankBudget(20, "parameters", "model"), progress=False
    )
    assert 11 <= sum(rank * rank for rank in profile.ranks.values()) <= 20
    assert sum(p.numel() for n, p in model.named_parameters() if "semu_core" in n) <= 20


@pytest.mark.parametrize(
    "settings_", [{"total": 0}, {"total": True}, {"total": 2, "unit": "layers"}, {"total": 2, "relative_to": "x"}]
)
def test_bad_budgets(settings_: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"total|unit|relative_to"):
        RankBudget(**settings_)


def test_explained_variance_by_pattern() -> None:
    """The first pattern that matches a layer's name or its end gives its γ."""
    config = SemuConfig(
        target_modules=Mlp.targets, explained_variance=0.3, explained_variance_pattern={r"fc\d": 1.0, "head": 0.9}
    )
    model = get_peft_model(Mlp(), config)
    profile = initialize_semu_weights(model, vector_batches(), FORGET, progress=False)
    assert profile.layers["fc1"].explained_variance > 0.9999 and profile.layers["fc2"].explained_variance > 0.9999
    assert 0.9 <= profile.layers["head"].explained_variance < 1


@pytest.mark.parametrize("core", ["full", "diagonal"])
@pytest.mark.parametrize("statistic", [GradientSum, Sketch.of_size(6)], ids=["exact", "sketch"])
def test_a_handful_of_numbers_becomes_enough(core: str, statistic: Any) -> None:
    """All layers are raised to the smallest common rank that is enough; the directions are the gradient's next ones."""
    ranks, bases = {}, {}
    for least in (0, 4, 27, 30):
        config = SemuConfig(target_modules=Mlp.targets, explained_variance=0.05, min_parameters=least, core=core)
        torch.manual_seed(0)
        model = get_peft_model(Mlp(), config)
        profile = initialize_semu_weights(model, vector_batches(), FORGET, statistic=statistic, progress=False)
        ranks[least] = list(profile.ranks.values())
        bases[least] = {name: layer.semu_U["default"] for name, layer in semu_layers(model).items()}
    numbers = {least: sum(r if core == "diagonal" else r * r for r in each) for least, each in ranks.items()}
    assert ranks[0] == [1, 1, 1]
    if core == "full":
        assert ranks[4] == [2, 2, 2] and ranks[27] == [3, 3, 3] and ranks[30] == [4, 4, 3]
    else:
        assert ranks[4] == [2, 2, 2] and numbers[27] == sum(ranks[27]) and max(ranks[27]) > 5
    for name, basis in bases[4].items():
        torch.testing.assert_close(bases[27][name][:, :2].abs(), basis.abs(), atol=1e-4, rtol=1e-3)


def test_other_wishes_come_before_the_least_number() -> None:
    """`r` and `rank_pattern` stay, a budget counts from what γ gives, and no direction is made up."""
    config = SemuConfig(
        target_modules=Mlp.targets, explained_variance=0.05, min_parameters=10_000, r=2, rank_pattern={"head": 1}
    )
    assert initialize_semu_weights(get_peft_model(Mlp(), config), vector_batches(), FORGET, progress=False).ranks == {
        "fc1": 2, "fc2": 2, "head": 1,
    }  # fmt: skip
    config = SemuConfig(target_modules=Mlp.targets, explained_variance=0.05, min_parameters=10_000)
    model = get_peft_model(Mlp(), config)
    profile = initialize_semu_weights(model, vector_batches(), FORGET, rank_budget=RankBudget(3), progress=False)
    assert sum(profile.ranks.values()) == 3
    one = [tuple(part[:1] for part in batch) for batch in vector_batches()[:1]]
    profile = initialize_semu_weights(get_peft_model(Mlp(), config), one, FORGET, progress=False)
    assert set(profile.ranks.values()) == {1}  # the gradient of one example


@pytest.mark.parametrize("pattern", [{"fc1": 0.0}, {"fc1": 1.5}, {"fc1": True}, ["fc1"]])
def test_bad_explained_variance_pattern(pattern: object) -> None:
    with pytest.raises(ValueError, match="explained_variance_pattern"):
        SemuConfig(explained_variance_pattern=pattern)


def test_rank_pattern_fixes_ranks_and_stays_as_it_was_written() -> None:
    """By ending or expression; a new initialisation goes by it again."""
    config = SemuConfig(target_modules=Mlp.targets, explained_variance=0.3, min_parameters=0, rank_pattern={r"fc.": 4})
    model = get_peft_model(Mlp(), config)
    assert not any(layer.is_initialized("default") for layer in semu_layers(model).values())
    profile = initialize_semu_weights(model, vector_batches(), FORGET, progress=False)
    assert profile.ranks["fc1"] == profile.ranks["fc2"] == 4 and profile.ranks["head"] == 1
    assert model.peft_config["default"].ranks == profile.ranks
    again = initialize_semu_weights(model, vector_batches(), FORGET, progress=False)
    assert again.ranks == profile.ranks
    assert model.peft_config["default"].rank_pattern == {r"fc.": 4}
