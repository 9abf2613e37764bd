"""Starts that split the weight or write to it in closed form, against the papers' formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import Mlp, Snapshot, run, vector_batches
from peft import get_peft_model
from torch import Tensor, nn

from semu_peft import (
    FactoredFisher,
    InputMoment,
    SemuConfig,
    SquaredSum,
    SubspaceProfile,
    gather,
    initialize_semu_weights,
    objectives,
    starts,
)
from semu_peft.gradients import TokenGradient
from semu_peft.tuner.adapted import semu_layers

LOSS = objectives.CrossEntropy()


def linear(m: int, n: int, *, bias: bool = False, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A model of one linear layer with an adapter, its layer, and a copy of its weight."""
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(n, m, bias=bias, dtype=dtype))
    weight = base[0].weight.detach().clone()
    model = get_peft_model(base, SemuConfig(target_modules=["0"], **settings))
    return model, semu_layers(model)["0"], weight


def corrected(layer: Any) -> Tensor:
    return layer.get_base_layer().weight.detach() + layer.get_delta_weight("default").detach()


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_kasa_drops_the_last_part(shape: tuple[int, int], core: Any) -> None:
    """The start differs from the original by exactly `√Σ σ²` of the last `r`, also where outputs are fewer."""
    model, layer, weight = linear(*shape, r=2, core=core)
    initialize_semu_weights(model, start=starts.WeightSplit(basis="last", drop=True))
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(corrected(layer), u[:, :3] * s[:3] @ vh[:3], rtol=0, atol=1e-12)
    assert math.isclose(float((corrected(layer) - weight).norm()), float(s[3:].square().sum().sqrt()), rel_tol=1e-10)
    initialize_semu_weights(model, start=starts.WeightSplit(basis="last"), overwrite=True)
    assert torch.equal(corrected(layer), weight) and layer.r["default"] == 2
    offset = layer.semu_offset["default"]
    torch.testing.assert_close(offset.diagonal() if core == "full" else offset, s[3:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_the_lu_part_has_its_rank(shape: tuple[int, int]) -> None:
    """LoLDU's part `P L_r D_r U_r`: the start computes the original, and a zero pivot divides nothing."""
    model, layer, weight = linear(*shape, r=2)
    layer.get_base_layer().weight.data[:, 0] = 0  # LoLDU's `U / diag(U)` divides by this pivot
    weight[:, 0] = 0
    initialize_semu_weights(model, start=starts.WeightSplit(basis="lu"))
    u, v, offset = (getattr(layer, part)["default"] for part in ("semu_U", "semu_V", "semu_offset"))
    p, lower, upper = torch.linalg.lu(weight)
    torch.testing.assert_close(u @ offset @ v.T, p @ lower[:, :2] @ upper[:2], rtol=0, atol=1e-12)
    assert torch.equal(corrected(layer), weight)
    torch.testing.assert_close(u.T @ u, torch.eye(2, dtype=u.dtype), rtol=0, atol=1e-12)


def test_fila_weights_of_the_papers_case() -> None:
    """`F_f = ((9, 0), (1, 0))`, `F_r` ones: `w = (3, 1)`; VILA's variance is 0 where all batches agree."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    data = [(torch.randn(4, 2), torch.randint(2, (4,)))]
    forget, retain = (gather(model, data, LOSS, statistic=SquaredSum.per_batch, progress=False) for _ in range(2))
    forget["0"].total.copy_(torch.tensor([[9.0, 0.0], [1.0, 0.0]]))  # type: ignore[attr-defined]
    retain["0"].total.fill_(1.0)  # type: ignore[attr-defined]
    weights = starts.fila_row_weights(forget, retain)["0"]
    torch.testing.assert_close(weights, torch.tensor([3.0, 1.0]), rtol=0, atol=2e-5)


def test_vilas_fisher_is_the_variance_of_factor_gradients() -> None:
    model, batches = Mlp().eval(), vector_batches(5)
    seen = gather(model, batches, LOSS, targets=["fc1"], statistic=FactoredFisher.of_rank(3, seed=7), progress=False)
    fisher: Any = seen["fc1"]
    generator = torch.Generator().manual_seed(7)
    m, n = model.fc1.weight.shape
    right, left = (0.05 * torch.randn(size, 3, generator=generator) for size in (n, m))
    gradients = [torch.autograd.grad(LOSS(model, batch), [model.fc1.weight])[0] for batch in batches]
    of_left, of_right = (
        torch.stack([part(g) for g in gradients]).var(0, correction=0)
        for part in (lambda g: g @ right, lambda g: g.T @ left)
    )
    torch.testing.assert_close(fisher.mean, of_left @ of_right.T, rtol=1e-3, atol=1e-12)
    weights = starts.fila_row_weights(seen, seen)["fc1"]
    assert weights.shape == (m,) and bool((weights >= 0).all())


def write(retain: Any = None, **settings: Any) -> tuple[Any, Tensor, Tensor, Tensor]:
    model, layer, weight = linear(4, 6)
    key = torch.zeros(6, dtype=torch.float64)
    key[0] = 2.0
    value = torch.arange(4.0, dtype=torch.float64)
    start = starts.RankOneWrite({"0": key}, {"0": value}, retain={} if retain is None else {"0": retain}, **settings)
    profile = initialize_semu_weights(model, start=start)
    assert profile.ranks == {"0": 1} and model.peft_config["default"].ranks == {"0": 1}
    return layer, weight, key, value


def test_rocr_moves_four_fifths_of_the_way() -> None:
    """`ΔW k = r kᵀPk / (λ + kᵀPk)`: with `‖k‖ = 2` and λ = 1, 4/5 of the residual; λ → 0 all of it."""
    layer, weight, key, value = write()
    residual = value - weight @ key
    torch.testing.assert_close(layer.get_delta_weight("default") @ key, 0.8 * residual, rtol=1e-9, atol=1e-12)
    assert torch.linalg.matrix_rank(layer.get_delta_weight("default")) == 1
    layer, weight, key, value = write(damping=0.0)
    torch.testing.assert_close(corrected(layer) @ key, value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", ["project", "inverse"])
def test_a_write_leaves_retained_inputs(rule: Any) -> None:
    """`ΔW x = 0` in the retained span; both rules against the linear solves that the papers write."""
    torch.manual_seed(1)
    span = torch.randn(6, 2, dtype=torch.float64)
    moment = span @ span.T
    layer, weight, key, value = write(moment, rule=rule, explained_variance=1.0)
    delta, residual = layer.get_delta_weight("default"), value - weight @ key
    if rule == "project":
        basis = torch.linalg.qr(span)[0]
        metric = torch.eye(6, dtype=torch.float64) - basis @ basis.T
        assert (delta @ span).abs().max() < 1e-12
        # The released solve: (P k kᵀ + λ I)⁻¹ from the right.
        solved = torch.linalg.solve(metric @ torch.outer(key, key) + torch.eye(6, dtype=torch.float64), metric @ key)
        torch.testing.assert_close(delta, torch.outer(residual, solved), rtol=1e-9, atol=1e-12)
        gained = key @ metric @ key
        torch.testing.assert_close(delta @ key, residual * gained / (1 + gained), rtol=1e-9, atol=1e-12)
    else:
        assert (delta @ span).norm() < 1e-6 * delta.norm() * span.norm()


def test_several_keys_are_written_at_their_rank() -> None:
    """`ΔW = E (δ + KᵀK)⁻¹ Kᵀ`, as many directions as keys, with a bias, from gathered moments; other layers stay."""
    torch.manual_seed(0)
    base, batches = Mlp(), vector_batches(3)
    retain = gather(base, batches, LOSS, targets=["fc1"], statistic=InputMoment, progress=False)
    keys, values = torch.randn(3, 6), torch.randn(3, base.fc1.out_features)
    outputs = base.fc1(keys).detach()
    model = get_peft_model(base, SemuConfig(target_modules=["fc1", "head"]))
    start = starts.RankOneWrite({"fc1": keys}, {"fc1": values})
    profile = initialize_semu_weights(model, start=start)
    assert profile.ranks == {"fc1": 3, "head": 0}
    delta = semu_layers(model)["fc1"].get_delta_weight("default")
    inner = torch.linalg.inv(torch.eye(3) + keys @ keys.T)
    torch.testing.assert_close(delta, (values - outputs).T @ inner @ keys, rtol=1e-4, atol=1e-5)
    kept = starts.RankOneWrite({"fc1": keys[:1]}, {"fc1": values[:1]}, retain, explained_variance=0.5)
    initialize_semu_weights(model, start=kept, overwrite=True)
    assert semu_layers(model)["fc1"].r == {"default": 1}
    shorter = starts.RankOneWrite({"fc1": keys[:, :2]}, {"fc1": values})
    nameless = starts.RankOneWrite({"fc2": keys}, {"fc2": values})
    before = Snapshot.of(model)
    for bad, message in ((shorter, "must fit its weight"), (nameless, r"does not have: \['fc2'\]")):
        with pytest.raises(ValueError, match=message):
            initialize_semu_weights(model, start=bad, overwrite=True)
    before.assert_same(model)
    with pytest.raises(ValueError, match="must name the same layers"):
        starts.RankOneWrite({"fc1": keys}, {})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_chip_projects_outputs(dtype: torch.dtype, tolerance: float, core: Any) -> None:
    """`QᵀW' = 0`, of the rank of `Q`, doing it twice is doing it once, and `ΔW x = 0` where `x ⟂ WᵀQ`."""
    model, layer, weight = linear(8, 6, dtype=dtype, core=core)
    directions = torch.randn(8, 3, dtype=dtype)
    basis = torch.linalg.qr(directions)[0]
    profile = initialize_semu_weights(model, start=starts.Projection({"0": directions}))
    assert (basis.T @ corrected(layer)).abs().max() < tolerance and profile.ranks == {"0": 3}
    delta = layer.get_delta_weight("default").detach()
    assert torch.linalg.matrix_rank(delta, rtol=1e-5) == 3
    torch.testing.assert_close(delta, -basis @ basis.T @ weight, rtol=0, atol=tolerance)
    x = torch.randn(6, dtype=dtype)
    inside = torch.linalg.qr(weight.T @ basis)[0]
    assert (delta @ (x - inside @ (inside.T @ x))).abs().max() < 10 * tolerance
    again, other, _ = linear(8, 6, dtype=dtype)
    other.get_base_layer().weight.data = corrected(layer)
    initialize_semu_weights(again, start=starts.Projection({"0": directions}))
    assert other.get_delta_weight("default").abs().max() < tolerance
    with model.disable_adapter():
        assert torch.equal(model(x), x @ weight.T)


def test_without_siblings_a_contrast_takes_them_too() -> None:
    """CHIP's contrast `μ − μ_sibling` leaves what siblings share; the bare mean does not. A bias stays, and is said."""
    torch.manual_seed(0)
    shared, own = torch.eye(6, dtype=torch.float64)[:2]
    means = {"target": shared + own, "sibling": shared}
    left = {}
    for name, direction in {"contrast": means["target"] - means["sibling"], "bare": means["target"]}.items():
        model, layer, weight = linear(6, 6)
        initialize_semu_weights(model, start=starts.Projection({"0": direction[:, None]}))
        x = torch.linalg.solve(weight, means["sibling"])  # an input that gives the sibling's mean
        left[name] = float((corrected(layer) @ x).norm())
        y = corrected(layer) @ torch.linalg.solve(weight, means["target"])
        assert abs(float(y @ own)) < (1e-10 if name == "contrast" else 2)
    assert math.isclose(left["contrast"], 1.0, rel_tol=1e-9) and left["bare"] < 0.8
    model, _, _ = linear(6, 6, bias=True)
    with pytest.warns(UserWarning, match="bias of layer '0' has a part"):
        initialize_semu_weights(model, start=starts.Projection({"0": own[:, None]}))
    same = torch.stack([own, own], 1)
    with pytest.raises(ValueError, match="independent columns"):
        initialize_semu_weights(model, start=starts.Projection({"0": same}), overwrite=True)


def test_contrasts_of_the_data_are_taken_out() -> None:
    """The means come from gathered inputs; of three contrasts of two directions two are kept; the target's is gone."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3))
    weight = base[0].weight.detach().double().clone()
    shared, own = torch.randn(2, 4)
    batches = {"target": shared + own + 0.01 * torch.randn(8, 4), "sibling": shared + 0.01 * torch.randn(8, 4)}
    labels, means = torch.arange(8) % 3, {}
    for name, x in batches.items():
        moment: Any = gather(base, [(x, labels)], LOSS, targets=["0"], statistic=InputMoment, progress=False)["0"]
        means[name] = moment.mean_output(base[0].weight)  # type: ignore[arg-type]
        torch.testing.assert_close(means[name], (x.double() @ weight.T).mean(0), rtol=1e-5, atol=1e-6)
    directions = starts.contrast_directions(means["target"][None], means["sibling"][None])
    model = get_peft_model(base, SemuConfig(target_modules=["0"]))
    initialize_semu_weights(model, start=starts.Projection({"0": directions}))
    assert (model.base_model.model[0](own) @ directions.float()).abs() < 0.05 * (weight.float() @ own).norm()  # type: ignore[operator, union-attr]
    several = torch.stack([means["target"], 2 * means["target"] - means["sibling"], means["sibling"].flip(0)])
    assert starts.contrast_directions(several, means["sibling"].expand(3, -1), explained_variance=1.0).shape == (6, 2)
    for bad, message in ((several[:2], "of one shape"), (means["sibling"].expand(3, -1), "a pair that does not")):
        with pytest.raises(ValueError, match=message):
            starts.contrast_directions(bad, means["sibling"].expand(3, -1))


class Padded(nn.Module):
    """A linear layer over tokens, the mean of those that are there, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head((self.fc(x) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def pooled(model: nn.Module, batch: Any) -> Tensor:
    x, mask, labels = batch
    return nn.functional.cross_entropy(model(x, mask), labels)


def planted(axes: slice, pad: int) -> list[Any]:
    """Tokens along some axes alone, and padding that is anything."""
    generator = torch.Generator().manual_seed(axes.start)
    x = torch.zeros(5, 3 + pad, 4)
    x[:, :3, axes] = torch.randn(5, 3, axes.stop - axes.start, generator=generator)
    x[:, 3:] = 100.0
    mask = (torch.arange(3 + pad) < 3).float().expand(5, -1)
    return [(x, mask, torch.arange(5) % 2)]


@pytest.mark.parametrize("per", ["row", "example"])
def test_reglu_spans_what_the_forget_data_use(per: Any) -> None:
    """Two planted orthogonal subspaces: the basis spans the forget one, with no penalty, however much padding."""
    torch.manual_seed(0)
    statistic = InputMoment if per == "row" else InputMoment.per_example
    base = Padded()
    base.fc.weight.data = torch.linalg.qr(torch.randn(6, 4))[0]
    base.fc.bias.data.zero_()
    seen = {
        pad: [
            gather(base, planted(axes, pad), pooled, targets=["fc"], statistic=statistic, progress=False)
            for axes in (slice(0, 2), slice(2, 4))
        ]
        for pad in (0, 4)
    }
    for some, more in zip(*seen.values(), strict=True):
        torch.testing.assert_close(some["fc"].second, more["fc"].second)  # type: ignore[attr-defined]
        assert some["fc"].count == more["fc"].count == (15 if per == "row" else 5)  # type: ignore[attr-defined]
    weight = base.fc.weight.detach().clone()
    x = torch.randn(2, 3, 4)
    expected = base(x, torch.ones(2, 3))
    model = get_peft_model(base, SemuConfig(target_modules=["fc"], r=2, explained_variance=1.0))
    profile = initialize_semu_weights(model, start=starts.FeatureDifference(*seen[4], avoid=2))
    assert isinstance(profile, SubspaceProfile) and profile.ranks == {"fc": 2}
    left = semu_layers(model)["fc"].semu_U["default"]
    assert (left.T @ weight[:, 2:]).abs().max() < 1e-5  # the penalty
    torch.testing.assert_close(left @ left.T @ weight[:, :2], weight[:, :2], rtol=0, atol=1e-5)
    assert torch.equal(model(x, torch.ones(2, 3)), expected)
    with pytest.raises(ValueError, match="`avoid` leaves 1 directions"):
        initialize_semu_weights(model, start=starts.FeatureDifference(*seen[4], avoid=5))
    sums = gather(base, planted(slice(0, 2), 0), pooled, targets=["fc"], progress=False)
    with pytest.raises(ValueError, match="needs InputMoment"):
        starts.FeatureDifference(sums, sums)


def test_output_moments_come_from_those_of_inputs() -> None:
    """`E[y yᵀ] = (W b) E[x̃ x̃ᵀ] (W b)ᵀ`, against the outputs themselves, of a convolution's windows too."""
    torch.manual_seed(2)
    for layer, x in ((nn.Linear(4, 3), torch.randn(7, 4)), (nn.Conv2d(2, 3, 3, padding=1), torch.randn(4, 2, 5, 5))):
        model: nn.Module = nn.Sequential(layer, nn.Flatten())
        loss = lambda m, b: m(b).square().sum()  # noqa: E731
        moment: Any = gather(model, [x], loss, statistic=InputMoment, progress=False)["0"]
        outputs = layer(x).detach().movedim(1, -1).reshape(-1, 3).double()
        assert moment.count == len(outputs)
        weight = layer.weight.flatten(1)
        got = moment.outputs(weight, layer.bias), moment.mean_output(weight, layer.bias)
        torch.testing.assert_close(got[0], outputs.T @ outputs / len(outputs), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1], outputs.mean(0), rtol=1e-4, atol=1e-5)
    x = torch.tensor([[1.0, 2.0], [float("nan"), 4.0]])  # on the second of which nothing depends
    moment = InputMoment((1, 2), torch.float32, torch.device("cpu"))
    moment.add(TokenGradient(torch.tensor([[1.0], [0.0]]), x))
    assert moment.mean.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="differentiated as a parameter"):
        gather(nn.Sequential(nn.Embedding(5, 3)), [torch.arange(4)], loss, statistic=InputMoment, progress=False)


def test_starts_without_data_take_the_weights_energy() -> None:
    """γ is the share of the weight's own energy; the model computes what it did."""
    model, layer, weight = linear(9, 5, explained_variance=0.8)
    profile = initialize_semu_weights(model, start=starts.WeightSplit())
    energy = torch.linalg.svdvals(weight).square().cumsum(0) / weight.square().sum()
    assert layer.r["default"] == profile.ranks["0"] == int((energy < 0.8).sum()) + 1
    x = torch.randn(2, 5, dtype=torch.float64)
    assert torch.equal(run(model, x), x @ weight.T)
    for message, kwargs in {
        "`basis` must be": {"basis": "svd"},
        "are for `basis": {"row_weights": {"0": weight[:, 0]}},
    }.items():
        with pytest.raises(ValueError, match=message):
            starts.WeightSplit(**{"basis": "last", **kwargs})  # type: ignore[arg-type]
