"""Relearning: the curve against torch alone, the same attack on the reference, and what counts as back."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from models import Mlp, Snapshot, vector_batches
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft import SemuConfig
from semu_peft.evaluation import RelearningCurve, predict, relearning, usual_attackers
from semu_peft.objectives import Attacker, CrossEntropy
from semu_peft.objectives.attackers import weights_of
from semu_peft.report import audit
from semu_peft.report.measured import plain

FORGET, RETAIN = vector_batches(3, 10, seed=1), vector_batches(3, 10, seed=2)
ATTACKER = Attacker("sgd", 0.1, steps=6, forget_examples=8, retain_examples=5)


def by_torch(model: nn.Module, seed: int) -> tuple[list[float], list[float]]:
    """Accuracies at steps 0, 2 and 6 on the forget examples that are left, and on the retained ones."""
    net = copy.deepcopy(model).eval().requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    data = [tuple(map(torch.cat, zip(*side, strict=True))) for side in (FORGET, RETAIN)]
    orders = [torch.randperm(30, generator=generator)[:count] for count in (8, 5)]
    x, y = (torch.cat([side[part][order] for side, order in zip(data, orders, strict=True)]) for part in (0, 1))
    left = torch.ones(30, dtype=torch.bool)
    left[orders[0]] = False
    held = (data[0][0][left], data[0][1][left])
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    seen: tuple[list[float], list[float]] = ([], [])
    for step in range(7):
        if step:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        if step in (0, 2, 6):
            for found, (inputs, labels) in zip(seen, (held, data[1]), strict=True):
                found.append(100 * (net(inputs).argmax(1) == labels).double().mean().item())
    return seen


@pytest.mark.parametrize("kind", ["plain", "semu", "lora"])
def test_the_curve_is_that_of_fine_tuning_by_torch(kind: str) -> None:
    torch.manual_seed(1)
    net: Any = Mlp()
    merged = net
    if kind != "plain":
        config = (
            SemuConfig(target_modules=Mlp.targets, r=2, init_weights=False)
            if kind == "semu"
            else LoraConfig(target_modules=Mlp.targets, r=2, init_lora_weights=False)
        )
        net = get_peft_model(net, config)
        merged = copy.deepcopy(net).merge_and_unload()
    before = Snapshot.of(net)
    curve = relearning(net, FORGET, RETAIN, attacker=ATTACKER, steps=[0, 2, 6], seed=3, progress=False)
    before.assert_same(net)
    forget, retain = by_torch(merged, seed=3)
    assert curve.steps == (0, 2, 6)
    assert curve.forget == pytest.approx(forget) and curve.retain == pytest.approx(retain)


def test_the_reference_stands_the_same_attack() -> None:
    torch.manual_seed(1)
    net, gold = Mlp(), Mlp()
    both = relearning(net, FORGET, RETAIN, attacker=ATTACKER, reference=gold, progress=False)
    alone = relearning(gold, FORGET, RETAIN, attacker=ATTACKER, progress=False)
    assert both.reference is not None and both.reference.forget == alone.forget
    assert both.row[2] == alone.row[1].partition("; retained")[0]


def test_related_data_is_learnt_and_the_forgotten_measured() -> None:
    net = Mlp()
    curve = relearning(net, RETAIN, attacker=ATTACKER, forget_test=FORGET, progress=False)
    assert curve.forget[0] == predict(net, FORGET, progress=False).accuracy and curve.retain == ()


def test_an_attacker_is_said_to_have_what_there_is_and_to_be_measured_on_it() -> None:
    all_of_it = relearning(Mlp(), FORGET[:1], attacker=Attacker("sgd", 0.1, steps=1), progress=False)
    assert all_of_it.row[0] == "relearning: SGD 0.1, 10 examples" and all_of_it.seen
    assert all_of_it.row[1].endswith("; measured on the attacker's own examples, as there are no others")
    some = relearning(Mlp(), FORGET, attacker=Attacker("sgd", 0.1, steps=1), progress=False)
    assert some.row[0] == "relearning: SGD 0.1, 20 examples" and not some.seen and "own examples" not in some.row[1]
    apart = relearning(Mlp(), RETAIN[:1], attacker=ATTACKER, forget_test=FORGET, progress=False)
    assert not apart.seen


def test_one_example_is_one() -> None:
    one = relearning(Mlp(), FORGET, attacker=Attacker("sgd", 0.1, steps=1, forget_examples=1), progress=False)
    assert one.attacker == "SGD 0.1, 1 example"


def test_what_is_to_vary_the_examples_is_a_function() -> None:
    with pytest.raises(TypeError, match="`augment` must be a function"):
        Attacker(augment=3)  # type: ignore[arg-type]


def test_an_attack_that_fails_leaves_the_loss_as_it_was() -> None:
    class Drawn(CrossEntropy):
        drawn = 0

        def __call__(self, model: nn.Module, batch: Any) -> Tensor:
            self.drawn += 1
            if self.drawn == 3:
                raise RuntimeError("out of memory")
            return super().__call__(model, batch)

        def state_dict(self) -> dict[str, Any]:
            return {"drawn": self.drawn}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.drawn = state["drawn"]

    loss = Drawn()
    with pytest.raises(RuntimeError, match="out of memory"):
        relearning(Mlp(), FORGET, attacker=Attacker("sgd", 0.1, steps=9), learn=loss, progress=False)
    assert loss.drawn == 0


def test_area_and_steps_to_half() -> None:
    curve = RelearningCurve("x", (0, 10, 30), (0.0, 40.0, 80.0), (90.0, 90.0, 90.0))
    assert curve.area == pytest.approx((10 * 20 + 20 * 60) / 30)
    assert curve.steps_to_half == 30
    destroyed = RelearningCurve("x", (0, 10, 30), (0.0, 100.0, 100.0), (90.0, 10.0, 10.0))
    assert destroyed.steps_to_half is None, "every model answers the class for everything when nothing else is left"
    assert ", half back never while 80% of the rest is kept, area" in destroyed.row[1]
    assert "the rest" not in curve.row[1], "no step was passed over"


def test_a_step_that_is_passed_over_is_said_with_what_it_lacks() -> None:
    """A curve that ends at 83% and is never back is read as a mistake, if nothing says what was asked of it."""
    later = RelearningCurve("x", (0, 10, 30), (0.0, 60.0, 83.3), (90.0, 50.0, 80.0), hold=0.6)
    assert later.steps_to_half == 30 and "half back after 30 while 60% of the rest is kept, area" in later.row[1]
    low = RelearningCurve("x", (0, 10), (0.0, 40.0), (90.0, 10.0))
    assert "half back never, area" in low.row[1], "half was not there at all"
    both = dataclasses.replace(low, reference=dataclasses.replace(later, hold=0.9))
    assert "half back never while 90% of the rest is kept" in both.row[2]
    assert "; reference never while 90% of the rest is kept, area" in repr(both)
    assert "while 60% of the rest is kept" in audit(attacks=later).to_markdown()


def test_a_report_has_what_a_curve_sums_up_to() -> None:
    curve = RelearningCurve("x", (0, 10), (0.0, 80.0), reference=RelearningCurve("x", (0, 10), (0.0, 40.0)))
    told = plain(curve)
    assert (told["area"], told["steps_to_half"]) == (40.0, 10)
    assert (told["reference"]["area"], told["reference"]["steps_to_half"]) == (20.0, None)
    later = dataclasses.replace(curve, forget=(0.0, 20.0))
    assert (later.area, later.steps_to_half) == (10.0, None)


def test_half_may_be_midway_from_where_each_model_starts() -> None:
    """Of a share of what the original does no model starts at 0, so that a half of it is there to begin with."""
    model, gold = Mlp(), Mlp()
    asked = {60.0: 0, 20.0: 0}

    def measure(changed: nn.Module, batches: Any) -> float:
        """Rises by 7 with each step, from 60 for the model and from 20 for gold, told by a layer that stays."""
        start = 60.0 if torch.equal(changed.fc2.weight, model.fc2.weight) else 20.0
        asked[start] += 1
        return start + 7.0 * (asked[start] - 1)

    options = {"reference": gold, "measure": measure, "forget_test": FORGET, "steps": range(9), "progress": False}
    head = Attacker("sgd", 1e-3, steps=8, layers="head")
    curve = relearning(model, FORGET, attacker=head, half=None, **options)
    assert curve.half == 80.0 and curve.steps_to_half == 3
    assert curve.reference is not None and curve.reference.half == 60.0 and curve.reference.steps_to_half == 6
    assert "half back (at 80.0, midway from the start to 100) after 3" in curve.row[1]
    asked.update(dict.fromkeys(asked, 0))
    fixed = relearning(model, FORGET, attacker=head, **options)
    assert fixed.half == 50.0 and fixed.steps_to_half == 0 and "half back after 0" in fixed.row[1]


@pytest.mark.parametrize("config", [SemuConfig(r=2, init_weights=False), LoraConfig(r=2, init_lora_weights=False)])
def test_an_attacker_trains_the_weights_and_nothing_of_an_adapter(config: Any) -> None:
    """Frozen bases are an adapter's own as well: the merged model has none."""
    names = list(weights_of(Mlp()))
    config.target_modules = {"fc1", "head"}
    adapted = get_peft_model(Mlp(), config)
    assert [name.removeprefix("base_model.model.") for name in weights_of(adapted)] == names
    twice = get_peft_model(adapted, SemuConfig(target_modules=["fc1"], r=2, init_weights=False), adapter_name="second")
    assert [name.replace("base_model.model.", "") for name in weights_of(twice)] == names


def test_an_attack_that_diverges_has_destroyed_the_model_and_ends_no_report() -> None:
    wild = Attacker(lambda parameters: torch.optim.SGD(parameters, torch.inf), steps=10)  # no weight stays a number
    curve = relearning(Mlp(), FORGET, RETAIN, attacker=wild, progress=False)
    assert curve.forget[-1] == curve.retain[-1] == 0 and curve.steps_to_half is None
    half = [(inputs.half(), labels) for inputs, labels in FORGET]
    curve = relearning(Mlp().half(), half, half, attacker=Attacker("adam", 1e4, steps=1), progress=False)
    assert curve.forget[1] == curve.retain[1] == 0, "the weights are finite, and what they give is not"
    with pytest.raises(ValueError, match="logits on `loader` must be finite"):
        relearning(Mlp().half(), [(half[0][0] * torch.inf, half[0][1])], progress=False)


def test_one_layer_alone_and_batches_and_draws() -> None:
    torch.manual_seed(2)
    net = Mlp()
    assert list(weights_of(net, "head")) == ["head.weight", "head.bias"]
    head = Attacker("adam", 0.01, steps=3, layers="head", batch_size=4)
    first, second = (relearning(net, FORGET, RETAIN, attacker=head, seed=seed, progress=False) for seed in (0, 0))
    assert first.forget == second.forget
    factory = Attacker(lambda parameters: torch.optim.AdamW(parameters, 0.05), steps=3)
    assert relearning(net, FORGET, attacker=factory, progress=False).steps == (0, 3)
    labels = [attacker.label for attacker in usual_attackers("head")]
    assert len(labels) == 5 and any("head" in label for label in labels) and any("flip" in label for label in labels)


def test_what_shares_no_weights_is_refused() -> None:
    class Frozen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match="layers"):
        relearning(Frozen(), FORGET, attacker=ATTACKER, progress=False)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("model", 5), ("forget", []), ("forget_test", []), ("attacker", "sgd"), ("reference", "x"), ("seed", -1),
     ("half", "x"), ("progress", "no"), ("learn", CrossEntropy), ("steps", [-1]), ("steps", [0.5])],
)  # fmt: skip
def test_mistakes_are_named(argument: str, value: Any) -> None:
    arguments = {"model": Mlp(), "forget": FORGET, "progress": False, argument: value}
    with pytest.raises((ValueError, TypeError), match="objective" if argument == "learn" else argument):
        relearning(**arguments)
