"""Selective synaptic dampening: the published formula, what it selects per example, and a class of digits forgotten."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import pytest
import torch
from language_batches import padded
from models import Mlp, gpt2, vector_batches
from torch import Tensor, nn

from semu_peft import SquaredSum, gather, methods
from semu_peft.edits import Edit, dampen, search_dampening
from semu_peft.gradients.gather import Gathered
from semu_peft.gradients.parameters import AbsoluteSum, gather_parameters
from semu_peft.objectives import CrossEntropy, SquaredLogits


def importance(values: list[float], examples: int = 100) -> Gathered:
    """The statistic of one weight whose mean is `values`."""
    statistic = SquaredSum((len(values),), torch.float32, torch.device("cpu"))
    statistic.total.copy_(torch.tensor(values) * examples)
    statistic._count.fill_(examples)
    return Gathered({"weight": statistic}, examples, examples)


def factors(edit: Edit) -> list[float]:
    weight = torch.ones(4)
    return [round(value, 6) for value in (weight + edit.deltas["weight"].change(weight)).tolist()]


def test_the_published_factors() -> None:
    forget, everything = importance([1.0, 4.0, 20.0, 100.0]), importance([1.0] * 4, examples=10**6)
    assert factors(dampen(forget, everything, threshold=2.0)) == [1.0, 0.25, 0.05, 0.01]
    assert factors(dampen(forget, everything, threshold=2.0, lower=10.0)) == [1.0, 1.0, 0.5, 0.1]
    assert not dampen(forget, everything, threshold=2.0, lower=1e30).deltas


def test_no_threshold_above_the_ratio_of_examples_selects_anything() -> None:
    model, batches = Mlp(), vector_batches(count=10)
    forget = gather_parameters(model, batches[:1], CrossEntropy(), progress=False)
    everything = gather_parameters(model, batches, CrossEntropy(), progress=False)
    for name, statistic in forget.items():
        assert (statistic.mean <= 10 * everything[name].mean * (1 + 1e-5) + 1e-12).all()  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match=r"`threshold`: 10 selects nothing, .* n_D / n_F = 10"):
        assert not dampen(forget, everything, threshold=10.0).deltas
    assert dampen(forget, everything, threshold=2.0).deltas


def test_a_mean_over_tokens_has_no_such_bound() -> None:
    """A short text counts less beside long ones than by itself, so that ratios above it are there to be selected."""
    model, draw = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 20)), torch.Generator().manual_seed(0)
    tokens = torch.randint(20, (4, 12), generator=draw)
    labels = tokens.clone()
    labels[0, 2:] = -100
    loss = CrossEntropy(shift_labels=False)
    short, mixed = ({"input": tokens[:number], "labels": labels[:number]} for number in (1, 4))
    options: dict[str, Any] = {"targets": ["1"], "statistic": SquaredSum, "progress": False}
    of_it, of_all = (gather(model, [batch], loss, **options) for batch in (short, mixed))
    assert (of_it["1"].mean > 4 * of_all["1"].mean).any()  # type: ignore[attr-defined]
    assert dampen(of_it, of_all, threshold=4.0).deltas


@pytest.mark.parametrize("method", [methods.ssd, methods.lfssd])
def test_data_that_can_be_gone_through_once_count_among_all(method: Any) -> None:
    model, forget, retain = Mlp(), vector_batches(1), vector_batches(3, seed=2)
    expected = method(model, forget, retain, threshold=1.2, progress=False)
    found = method(model, iter(forget), iter(retain), threshold=1.2, progress=False)
    assert expected.deltas and repr(found) == repr(expected)


def test_a_common_factor_changes_nothing_bit_for_bit() -> None:
    forget, everything = [1.3, 4.7, 20.1, 1e-3], [1.1, 0.9, 3.3, 1e-4]
    one = dampen(importance(forget), importance(everything, 10**6), threshold=2.0)
    eight = dampen(importance([8 * x for x in forget]), importance([8 * x for x in everything], 10**6), threshold=2.0)
    for part, tensor in one.deltas["weight"].tensors().items():
        assert torch.equal(tensor, eight.deltas["weight"].tensors()[part])


def test_no_weight_grows_and_the_share_is_met() -> None:
    model, batches = Mlp(), vector_batches(count=10)
    parts = [gather_parameters(model, part, CrossEntropy(), progress=False) for part in (batches[:2], batches)]
    before = copy.deepcopy(model.state_dict())
    total = sum(parameter.numel() for parameter in model.parameters())
    edit = dampen(*parts, share=0.1)
    assert sum(len(delta.places) for delta in edit.deltas.values()) == math.floor(0.1 * total)  # type: ignore[arg-type]
    assert {name.rpartition(".")[2] for name in edit.deltas} == {"weight", "bias"}
    edit.apply(model)
    for name, value in model.state_dict().items():
        assert (value.abs() <= before[name].abs()).all()
    found = edit.settings["threshold"]
    again = dampen(*parts, threshold=found)
    assert [len(d.indices) for d in again.deltas.values()] == [len(d.indices) for d in edit.deltas.values()]  # type: ignore[attr-defined]
    assert len(dampen(*parts, share=1.0).deltas) == len(before)


class Slope(nn.Module):
    """`y = w x`, with the batch's targets in its last column."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


@pytest.mark.parametrize(("per", "expected"), [("example", 1.0), ("batch", 0.0)])
def test_examples_are_squared_by_themselves(per: Any, expected: float) -> None:
    """Targets of ±1 in one batch: their gradients cancel in the batch, and do not where each is squared."""

    def half_square(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return 0.5 * (model(x) - y).square().mean()

    batch = (torch.ones(2, 1), torch.tensor([[1.0], [-1.0]]))
    statistic = SquaredSum if per == "example" else SquaredSum.per_batch
    seen = gather_parameters(Slope(), [batch], half_square, per=per, statistic=statistic, progress=False)
    assert seen["weight"].mean.item() == expected  # type: ignore[attr-defined]


def test_layers_are_dampened_as_parameters_are() -> None:
    model, batches = Mlp(), vector_batches(count=6)
    fast = [
        gather(model, part, CrossEntropy(), statistic=SquaredSum, progress=False) for part in (batches[:2], batches)
    ]
    exact = [gather_parameters(model, part, CrossEntropy(), progress=False) for part in (batches[:2], batches)]
    other = copy.deepcopy(model)
    dampen(*fast, threshold=1.2).apply(model)
    dampen(*exact, threshold=1.2).only("weight").apply(other)
    for name, value in model.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], atol=1e-4), name


def test_a_weight_that_layers_share_is_dampened_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    batches, options = vector_batches(count=2), {"statistic": SquaredSum.per_batch, "progress": False}
    seen = [gather(model, part, CrossEntropy(), **options) for part in (batches[:1], batches)]
    edit = dampen(*seen, share=0.5)
    edit.apply(model)
    assert len(edit.deltas["0"].values) <= 18  # type: ignore[attr-defined]


def test_importances_that_do_not_fit_are_refused() -> None:
    one, other = importance([1.0]), importance([1.0, 2.0])
    by_batch = Gathered({"weight": SquaredSum.per_batch((1,), torch.float32, torch.device("cpu"))}, 1, 1)
    for arguments, message in (
        ({"threshold": 2.0, "share": 0.1}, "and not both"),
        ({}, "`threshold` or `share` must be given"),
        ({"threshold": -1.0}, "`threshold` must be"),
        ({"share": 0.0}, "`share` must be"),
        ({"threshold": 1.0, "lower": "x"}, "`lower` must be"),
        ({"threshold": 1.0, "everything": other}, "of the same parameters"),
        ({"threshold": 1.0, "everything": by_batch}, "of one kind"),
        ({"threshold": 1.0, "everything": 5}, "`everything` must be"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            dampen(**{"forget": one, "everything": one, **arguments})  # type: ignore[arg-type]


class TestParameters:
    """`gather_parameters`: every parameter, example by example."""

    def test_it_is_the_square_of_autograd(self) -> None:
        model, (x, y) = Mlp().eval(), vector_batches(count=1)[0]
        seen = gather_parameters(model, [(x, y)], CrossEntropy(), progress=False)
        for name, parameter in model.named_parameters():
            exact = torch.zeros_like(parameter)
            for row, label in zip(x, y, strict=True):
                loss = nn.functional.cross_entropy(model(row[None]), label[None])
                exact += torch.autograd.grad(loss, parameter)[0].square()
            assert torch.allclose(seen[name].mean, exact / len(x), atol=1e-6)  # type: ignore[attr-defined]
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())

    batch: ClassVar[Any] = {"x": torch.randn(4, 6), "labels": torch.tensor([0, 1, 2, 3]), "names": ["a", "b", "c", "d"]}

    def test_batches_of_all_kinds_are_split(self) -> None:
        seen: list[Any] = []

        def loss(model: nn.Module, batch: Any) -> Tensor:
            seen.append((tuple(batch["x"].shape), batch["labels"].tolist(), batch["names"]))
            return model(batch["x"]).sum()

        gather_parameters(Mlp(), [self.batch], loss, progress=False)
        assert seen == [((1, 6), [label], [name]) for label, name in enumerate("abcd")]

    def test_label_free(self) -> None:
        model, (x, y) = Mlp(), vector_batches(count=1)[0]
        labels = [gather_parameters(model, [batch], SquaredLogits(), statistic=AbsoluteSum, progress=False)
                  for batch in ((x, y), (x, y.flip(0)))]  # fmt: skip
        for name in labels[0]:
            assert torch.equal(labels[0][name].mean, labels[1][name].mean)  # type: ignore[attr-defined]
        assert SquaredLogits()(model.eval(), x) == SquaredLogits()(model, (x, y))
        dampen(*labels, share=0.05).apply(model)

    @pytest.mark.parametrize(("side", "more"), [("right", 9), ("left", 0), ("left", 9)])
    def test_padding_has_no_part_in_what_is_label_free(self, side: str, more: int) -> None:
        torch.manual_seed(0)
        model = gpt2()
        expected, found = (gather_parameters(model, [padded(*form)], SquaredLogits(), progress=False)
                           for form in (("right",), (side, more)))  # fmt: skip
        for name, statistic in expected.items():
            mean, other = statistic.mean, found[name].mean  # type: ignore[attr-defined]
            torch.testing.assert_close(other, mean, rtol=1e-4, atol=1e-5 * float(mean.max()))

    def test_mistakes(self) -> None:
        batch = vector_batches(count=1)
        with pytest.raises(ValueError, match="`targets`"):
            gather_parameters(Mlp(), batch, CrossEntropy(), targets=["nope"], progress=False)
        with pytest.raises(ValueError, match="`per`"):
            gather_parameters(Mlp(), batch, CrossEntropy(), per="x", progress=False)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="`batches`"):
            gather_parameters(Mlp(), [["a text"]], CrossEntropy(), progress=False)
        seen = gather_parameters(Mlp(), batch, CrossEntropy(), targets=["fc1", "head.bias"], progress=False)
        assert list(seen) == ["fc1.weight", "fc1.bias", "head.bias"]


# ---- a digit ----


def test_a_digit_is_forgotten_and_the_others_stay(digits: dict[str, Any]) -> None:
    model, accuracies = digits["model"], digits["accuracies"]
    assert min(accuracies(model)) > 99
    results = {}
    for threshold in (1.5, 2.0, 3.0, 4.0):
        with dampen(*digits["seen"], threshold=threshold).apply(model):
            results[threshold] = accuracies(model)
    good = [threshold for threshold, (fa, ra) in results.items() if fa == 0 and ra >= 99]
    assert good, results


def test_a_share_is_found_by_a_score(digits: dict[str, Any]) -> None:
    """FA 0 and RA 99 up without a threshold; the model keeps its bits, in failure too."""
    model, accuracies = digits["model"], digits["accuracies"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trials = []

    def score(candidate: nn.Module) -> float:
        forgotten, others = accuracies(candidate)
        trials.append(others - forgotten)
        return trials[-1]

    edit = search_dampening(model, *digits["seen"], score)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with edit.apply(model):
        forgotten, others = accuracies(model)
    assert forgotten == 0 and others >= 99 and others - forgotten == max(trials)
    for wrong, message in ((lambda _: 1.0, "nowhere better"), (lambda _: float("nan"), "must be finite")):
        with pytest.raises(ValueError, match=message):
            search_dampening(model, *digits["seen"], wrong)
    for method in (methods.ssd, methods.lfssd):
        for given in ({}, {"share": 0.1, "score": score}, {"share": 0.1, "threshold": 2.0}):
            with pytest.raises(ValueError, match="One of `threshold`, `share` and `score` must be given"):
                method(model, [], [], **given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_edit_ships_in_rank_one(digits: dict[str, Any]) -> None:
    accuracies = digits["accuracies"]
    model = copy.deepcopy(digits["model"])
    carried = dampen(*digits["seen"], threshold=2.0).to_semu(model, r=1)
    forgotten, others = accuracies(carried.model)
    assert set(carried.ranks.values()) == {1} and 0 < carried.error < 1
    assert forgotten == 0 and others >= 99, (forgotten, others)
