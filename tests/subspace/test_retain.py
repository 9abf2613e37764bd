"""Retain-aware subspaces: first-order silence on the retained data, and directions by their ratio."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import CLASSES, Cnn, Mlp, image_batches, vector_batches
from peft import get_peft_model
from torch import Tensor, nn

from semu_peft import Retain, SemuConfig, initialize_semu_weights, objectives
from semu_peft.gradients import GradientSum, Sketch
from semu_peft.linalg.factorize import SingularFactors, leading_factors
from semu_peft.subspace import Overlap, RetainRule
from semu_peft.subspace.retain import apart_from
from semu_peft.tuner.adapted import semu_layers

FORGET, RETAIN = objectives.GradientAscent(), objectives.CrossEntropy()


def factors_of(matrix: Tensor, gamma: float = 1.0) -> SingularFactors:
    return leading_factors(matrix, gamma)


def product(factors: SingularFactors) -> Tensor:
    return factors.left * factors.singular_values[..., None, : factors.rank] @ factors.right.mT


@pytest.mark.parametrize("side", ["input", "output", "both"])
@pytest.mark.parametrize("shape", [(12, 9), (3, 8, 6)])
def test_projection_leaves_what_lies_outside(side: str, shape: tuple[int, ...]) -> None:
    """`G (1 − V V')`, `(1 − U U') G` or both, with bases that no core can turn back."""
    forget, retain = torch.randn(shape), torch.randn(*shape[:-1], 3) @ torch.randn(*shape[:-2], 3, shape[-1])
    kept = factors_of(retain, 0.9)
    result = RetainRule(side=side).apply(factors_of(forget), kept, 0.9)
    expected = forget.double()
    if side in ("output", "both"):
        expected = expected - kept.left.double() @ (kept.left.double().mT @ expected)
    if side in ("input", "both"):
        expected = expected - (expected @ kept.right.double()) @ kept.right.double().mT
    torch.testing.assert_close(product(result).double(), expected, atol=1e-4, rtol=1e-4)
    energy = expected.square().sum((-2, -1))
    torch.testing.assert_close(result.energy, energy, atol=1e-3, rtol=1e-4)
    result = result.reaching(0.95)
    for basis, other, touched in (
        (result.left, kept.left, side in ("output", "both")),
        (result.right, kept.right, side in ("input", "both")),
    ):
        identity = torch.eye(result.rank).expand(*basis.shape[:-2], -1, -1)
        torch.testing.assert_close(basis.mT @ basis, identity, atol=1e-5, rtol=0)
        if touched:
            assert (basis.mT @ other).abs().max() < 1e-4


def test_projection_of_what_lies_inside_leaves_nothing() -> None:
    """A forget gradient within the retain subspace has no direction left, and no invented one."""
    retain = torch.randn(10, 2) @ torch.randn(2, 8)
    result = RetainRule().apply(factors_of(3 * retain), factors_of(retain, 1.0), 0.9)
    assert result.reaching(1.0).rank == 0


def test_ratio_prefers_directions_that_the_retain_data_leave_alone() -> None:
    """Of two forget directions the one without retain energy comes first, though it is the weaker one."""
    left, right = torch.linalg.qr(torch.randn(20, 3))[0], torch.linalg.qr(torch.randn(15, 3))[0]
    forget = left[:, :2] * torch.tensor([2.0, 1.9]) @ right[:, :2].T
    retain = 5.0 * left[:, :1] @ right[:, :1].T + 0.1 * left[:, 2:] @ right[:, 2:].T
    one = RetainRule("ratio", explained_variance=1.0).apply(factors_of(forget), factors_of(retain), 0.4)
    assert one.rank == 1
    assert (one.right[:, 0] @ right[:, 1]).abs() > 0.99 and (one.left[:, 0] @ left[:, 1]).abs() > 0.99
    both = RetainRule("ratio", explained_variance=1.0).apply(factors_of(forget), factors_of(retain), 1.0)
    torch.testing.assert_close(product(both), forget, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(12, 9), (3, 8, 6)])
def test_ratio_is_the_generalised_singular_value_problem(shape: tuple[int, ...]) -> None:
    """The first direction maximises ‖G v‖² / (‖G_retain v‖² + λ) among all."""
    forget, retain = torch.randn(shape), torch.randn(shape)
    result = RetainRule("ratio", explained_variance=1.0).apply(factors_of(forget), factors_of(retain), 1e-9)
    assert result.rank == 1

    def ratio(v: Tensor) -> Tensor:
        floor = retain.square().sum((-2, -1)) / shape[-1]
        return (forget @ v).square().sum((-2, -1)) / ((retain @ v).square().sum((-2, -1)) + floor)

    best = ratio(result.right)
    for _ in range(200):
        v = torch.nn.functional.normalize(torch.randn(*shape[:-2], shape[-1], 1), dim=-2)
        assert (ratio(v) <= best * (1 + 1e-4)).all()
    nearby = torch.nn.functional.normalize(result.right + 0.01 * torch.randn_like(result.right), dim=-2)
    assert (ratio(nearby) <= best * (1 + 1e-4)).all()


@pytest.mark.parametrize("shape", [(12, 9), (3, 8, 6)])
def test_ratio_explains_gamma_of_the_whole_forget_gradient(shape: tuple[int, ...]) -> None:
    """As few directions as that takes: what was not chosen is a part of the gradient that is not explained."""
    forget, retain = torch.randn(shape), torch.randn(shape)
    result = RetainRule("ratio", explained_variance=1.0).apply(factors_of(forget), factors_of(retain), 0.7)
    energy = forget.square().sum((-2, -1))
    torch.testing.assert_close(result.energy.float(), energy)
    held = (forget @ result.right).square().sum((-2, -1)) / energy
    assert 1 < result.rank < min(shape[-2:]) and 0.7 <= held.min() == pytest.approx(result.explained_variance, rel=1e-5)
    assert result.reaching(0.7).rank == result.rank


def test_overlap_is_the_principal_angles() -> None:
    """1 for a shared direction, 0 for an orthogonal one, cos φ in between."""
    e = torch.eye(4)
    mixed = torch.stack([e[0], (0.6 * e[1] + 0.8 * e[2])], 1)
    one = SingularFactors(mixed, mixed, torch.ones(2), torch.tensor(2.0))
    other = SingularFactors(e[:, :2].clone(), e[:, 2:].clone(), torch.ones(2), torch.tensor(2.0))
    overlap = Overlap.between(one, other)
    torch.testing.assert_close(overlap.outputs, torch.tensor([1.0, 0.6]))
    torch.testing.assert_close(overlap.inputs, torch.tensor([0.8, 0.0]))


@pytest.mark.parametrize("at_once", [2**26, 400])
@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (3, 8, 6)])
@pytest.mark.parametrize("kind", ["project", "ratio"])
def test_layers_side_by_side_are_as_one_by_one(
    kind: Any, shape: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all ranks, and with nothing to forget or to keep, in one portion or several."""
    monkeypatch.setattr("semu_peft.subspace.retain._NUMBERS_AT_ONCE", at_once)
    gammas = [(1.0, 0.5), (0.4, 1.0), (0.9, 0.9), (0.7, 0.2)]
    forget, retain = ([factors_of(torch.randn(shape), pair[side]) for pair in gammas] for side in (0, 1))
    forget.insert(1, forget[0].leading(0))
    retain.insert(1, retain[0])
    forget.append(forget[0])
    retain.append(retain[0].leading(0))
    assert len({factors.rank for factors in forget}) > 3
    rule = RetainRule(kind)
    each = rule.apply_each(forget, retain, 0.8)
    overlaps = Overlap.between_each(forget, retain)
    for own, avoided, found, overlap in zip(forget, retain, each, overlaps, strict=True):
        alone, alone_overlap = rule.apply(own, avoided, 0.8), Overlap.between(own, avoided)
        assert found.rank == alone.rank
        torch.testing.assert_close(found.singular_values, alone.singular_values, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found.energy, alone.energy)
        torch.testing.assert_close(product(found), product(alone), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(overlap.inputs, alone_overlap.inputs, atol=1e-6, rtol=0)
        torch.testing.assert_close(overlap.outputs, alone_overlap.outputs, atol=1e-6, rtol=0)
        assert overlap.inputs.shape[-1] == min(own.rank, avoided.rank)


def test_staying_apart_side_by_side_is_as_one_by_one() -> None:
    gradients = [factors_of(torch.randn(12, 9), gamma) for gamma in (1.0, 0.3, 0.6)]
    subspaces = [
        (torch.linalg.qr(torch.randn(12, size))[0], torch.linalg.qr(torch.randn(9, size))[0]) for size in (1, 4, 2)
    ]
    for own, (left, right), found in zip(gradients, subspaces, apart_from(gradients, subspaces), strict=True):
        expected = product(own) - left @ (left.mT @ product(own))
        torch.testing.assert_close(product(found), expected - (expected @ right) @ right.mT, atol=1e-5, rtol=1e-4)


class Wide(nn.Module):
    """Layers large enough for a sketch to pay."""

    targets = ["fc1", "fc2"]

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Linear(6, 96)
        self.fc1, self.fc2 = nn.Linear(96, 80), nn.Linear(80, 64)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc2(torch.tanh(self.fc1(torch.tanh(self.expand(x)))))))


@pytest.mark.parametrize(
    ("name", "statistic"),
    [("mlp", GradientSum), ("cnn", GradientSum), ("cnn_per_channel", GradientSum), ("wide", Sketch.of_size(4))],
    ids=["mlp", "cnn", "cnn_per_channel", "wide_sketch"],
)
def test_any_step_is_silent_on_the_retained_data(name: str, statistic: Any) -> None:
    """With the whole retain gradient projected out, the retain loss's gradient in the core is zero; not without."""
    model = {"mlp": Mlp, "wide": Wide}.get(name, Cnn)()
    batches = image_batches if isinstance(model, Cnn) else vector_batches
    mode = "per_channel" if name.endswith("per_channel") else "flatten"
    targets = [target for target in model.targets if target not in ("head",)]
    config = SemuConfig(target_modules=targets, explained_variance=0.99, conv_mode=mode)
    wrapped = get_peft_model(model.eval(), config)
    slopes = {}
    for aware in (False, True):
        retain = Retain(batches(2, 1, seed=5), RETAIN) if aware else None
        profile = initialize_semu_weights(
            wrapped,
            batches(3),
            FORGET,
            retain=retain,
            retain_rule=RetainRule(explained_variance=1.0),
            statistic=statistic,
            progress=False,
        )
        wrapped.zero_grad()
        for batch in batches(2, 1, seed=5):
            RETAIN(wrapped, batch).backward()
        slopes[aware] = {n: layer.semu_core["default"].grad for n, layer in semu_layers(wrapped).items()}
        assert all((layer.overlap is not None) == aware for layer in profile.layers.values())
        assert {layer.estimated for layer in profile.layers.values()} == {name == "wide"}
    silent = sum(float(slope.square().sum()) for slope in slopes[True].values())
    loud = sum(float(slope.square().sum()) for slope in slopes[False].values())
    assert loud > 0 and silent < 1e-6 * loud
    assert sum(profile.ranks.values()) > 0


def test_gradients_of_several_retain_sets_add_up() -> None:
    """Weighted, as those of one set whose objective is the weighted sum."""
    one, two = vector_batches(2, seed=5), vector_batches(2, seed=6)
    subspaces = {}
    for name, retain in {
        "list": [Retain(one, RETAIN, weight=0.5), Retain(two, objectives.UniformDistribution(), weight=2.0)],
        "sum": Retain(
            list(zip(one, two, strict=True)),
            lambda m, b: 0.5 * RETAIN(m, b[0]) + 2.0 * objectives.UniformDistribution()(m, b[1]),
        ),
        "unweighted": [Retain(one, RETAIN), Retain(two, objectives.UniformDistribution())],
    }.items():
        torch.manual_seed(3)
        model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"], explained_variance=0.9))
        initialize_semu_weights(model, vector_batches(), FORGET, retain=retain, progress=False)
        basis = semu_layers(model)["fc1"].semu_V["default"]
        subspaces[name] = basis @ basis.mT
    torch.testing.assert_close(subspaces["list"], subspaces["sum"], atol=1e-4, rtol=0)
    assert not torch.allclose(subspaces["list"], subspaces["unweighted"], atol=1e-2)


def test_a_retain_set_without_batches_is_named() -> None:
    """Also beside one that has some, and the adapter stays as it was."""
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"]))
    retain = [Retain(vector_batches(), RETAIN), Retain([], RETAIN, weight=3.0)]
    with pytest.raises(ValueError, match=r"`retain` must give at least one batch.*Retain\(list of 0, .*weight=3.0\)"):
        initialize_semu_weights(model, vector_batches(), FORGET, retain=retain, progress=False)
    assert not model.peft_config["default"].ranks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "keep"}, "`kind` of a RetainRule must be one of"),
        ({"side": "left"}, "`side` of a RetainRule must be one of"),
        ({"explained_variance": 0.0}, "`explained_variance` must be a share"),
        ({"explained_variance": "x"}, "`explained_variance` must be a share"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        RetainRule(**settings)
