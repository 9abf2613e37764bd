"""The search for a scale: a step is found, the best trial is left and saved, and failures leave nothing behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Mlp, Snapshot, run, vector_batches
from peft import PeftModel, get_peft_model
from torch import nn

from semu_peft import SemuConfig, gather, initialize_semu_weights, localize, objectives, search_scale, set_scale, starts
from semu_peft.tuner.adapted import semu_layers

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def adapted(core: Any = "full", offset: bool = False) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(Mlp(), SemuConfig(target_modules=Mlp.targets, r=2, core=core))
    initialize_semu_weights(model, vector_batches(), objectives.CrossEntropy(), start=starts.Ascent(), progress=False)
    if offset:
        for layer in semu_layers(model).values():
            u, v, old = (getattr(layer, part)["default"] for part in ("semu_U", "semu_V", "semu_core"))
            layer.set_basis("default", u, v, 2 * old.detach(), offset=old.detach().clone())
    return model.eval()


def scale_of(model: Any) -> float:
    return float(semu_layers(model)["fc1"].scaling["default"])


@pytest.mark.parametrize("step", [0.1, 0.77, 1.0, 3.3, 7.9])
def test_a_step_is_found_from_above(step: float) -> None:
    """Behind the step, within 2⁻¹⁰ of the bracket; what is left computes what that trial did, scale 1."""
    model, outputs = adapted(), {}

    def score(m: Any) -> float:
        outputs[scale_of(m)] = run(m, X)
        return float(scale_of(m) >= step)

    found = search_scale(model, score)
    assert step <= found.scale <= step + 8 * 2**-10 and found.score == 1.0
    assert scale_of(model) == 1.0 and torch.equal(run(model, X), outputs[found.scale])
    assert dict(found.trials).keys() == outputs.keys() and len(found.trials) <= 28


@pytest.mark.parametrize("core", ["full", "diagonal"])
@pytest.mark.parametrize("offset", [False, True])
def test_the_best_is_written_and_saved(core: Any, offset: bool, tmp_path: Path) -> None:
    """A fresh evaluation gives the result's score, also after loading; a peak between grid points is found."""
    model = adapted(core, offset)
    with torch.no_grad():
        set_scale(model, 2.6)
        target = run(model, X)
        set_scale(model, 0.5)

    def score(m: Any) -> float:
        return -float((run(m, X) - target).square().sum())

    found = search_scale(model, score)
    assert abs(found.scale - 2.6) < 0.02 and found.score == score(model) == max(s for _, s in found.trials)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Mlp(), tmp_path).eval()
    assert score(loaded) == found.score
    with model.disable_adapter():
        torch.manual_seed(0)
        assert torch.equal(run(model, X), run(Mlp().eval(), X))


def test_the_best_trial_is_left_and_not_the_last() -> None:
    model = adapted()

    def spike(m: Any) -> float:  # nowhere near where the halving ends
        return {0.25: 5.0}.get(scale_of(m), float(scale_of(m) == 0.26))

    assert search_scale(model, spike).scale == 0.25


def test_a_failed_search_leaves_the_model() -> None:
    model = adapted()
    set_scale(model, 0.7)
    before, expected = Snapshot.of(model), run(model, X)

    def fails(m: Any) -> float:
        if scale_of(m) > 1:
            raise RuntimeError("stop")
        return 0.0

    cases: list[tuple[Any, Any, str]] = [
        (fails, RuntimeError, "stop"),
        (lambda m: float("nan"), ValueError, "`score` must be finite"),
        (lambda m: 1.0, ValueError, "nowhere from 0 to 8 better than at 0"),
        (lambda m: -scale_of(m), ValueError, "nowhere from 0 to 8 better"),
        (None, TypeError, "`score` must be a function"),
    ]
    for score, error, message in cases:
        with pytest.raises(error, match=message):
            search_scale(model, score)
        before.assert_same(model)
        assert scale_of(model) == 0.7 and torch.equal(run(model, X), expected)


def digits() -> tuple[nn.Module, Any, Any]:
    """A network that knows the digits, and the threes and the others in batches."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    forget, retain = ([(x[which], y[which])] for which in (y == 3, y != 3))
    return model, forget, retain


def accuracy(model: nn.Module, batches: Any) -> float:
    ((x, y),) = batches
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).float().mean())


def slug(base: nn.Module, gathered: Any, layer: str, **settings: Any) -> Any:
    model = get_peft_model(copy.deepcopy(base), SemuConfig(target_modules=[layer], **settings))
    initialize_semu_weights(model, gathered, start=starts.Ascent())
    return model


def test_slug_forgets_digits_with_one_direction() -> None:
    """FA 0 at a λ near its start with RA ≥ 99.5, rank 1 like the whole gradient; the other sign forgets nothing.

    The front is a shortlist: it may lead with the first layer, which is the worst to touch.
    """
    base, forget, retain = digits()
    assert accuracy(base, forget) == 100 and accuracy(base, retain) == 100
    loss = objectives.CrossEntropy()
    seen: Any = {
        name: gather(base, data, loss, progress=False) for name, data in {"forget": forget, "retain": retain}.items()
    }
    assert set(localize.pareto(base, **seen)) <= {"0", "2", "4"}

    def score(model: Any) -> float:
        return accuracy(model, retain) - accuracy(model, forget)

    one, whole, first = (
        slug(base, seen["forget"], layer, **settings)
        for layer, settings in (("4", {"r": 1}), ("4", {"explained_variance": 1.0}), ("0", {"r": 1}))
    )
    found = {name: search_scale(m, score) for name, m in (("one", one), ("whole", whole), ("first", first))}
    assert 0.9 <= found["one"].scale <= 2.0
    assert accuracy(one, forget) == 0.0 and accuracy(one, retain) >= 99.5
    assert abs(accuracy(one, retain) - accuracy(whole, retain)) <= 0.5 and accuracy(whole, forget) == 0.0
    assert found["first"].score < found["one"].score - 5
    set_scale(one, -1.0)
    assert accuracy(one, forget) >= 99.0 and accuracy(one, retain) < 95.0
