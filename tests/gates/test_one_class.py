"""O3's one-class SVM over several layers: the score by hand, its signs, one example of a batch, files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from models import llama, run
from peft import get_peft_model
from sklearn.svm import OneClassSVM
from torch import Tensor, nn

from semu_peft import SemuConfig
from semu_peft.gates import GATE_FILE, HiddenStates, Nearest, gated
from semu_peft.gates.signatures import OneClass

BLOCKS = ["model.layers.0", "model.layers.1"]


def cloud(count: int = 40, seed: int = 0) -> Tensor:
    """States of two layers side by side, each around a direction of its own."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 10, generator=draw) + torch.tensor([4.0] * 5 + [-3.0] * 5)


def dense(part: Tensor, x: Tensor, *, own: bool = False) -> Tensor:
    """`max_j cos − m² / 2000` of one layer, with the covariance as a matrix."""
    part, x = part.double(), x.double()
    cosines = nn.functional.cosine_similarity(x[:, None], part[None], dim=-1)
    if own:
        cosines = cosines - 9 * torch.eye(len(part))
    centred = part - part.mean(0)
    covariance = centred.mT @ centred / len(part)
    shrunk = 0.9 * covariance + 0.1 * covariance.trace() / part.shape[1] * torch.eye(part.shape[1])
    away = x - part.mean(0)
    return cosines.amax(1) - ((away @ shrunk.inverse()) * away).sum(1) / 2000


def test_the_score_is_the_distance_to_scikit_learns_border() -> None:
    states, others = cloud(), torch.cat([cloud(9, 1), -cloud(9, 2)])
    tensors = OneClass.fit(states, layers=2)
    own = torch.stack([dense(part, part, own=True) for part in states.chunk(2, -1)], -1)
    torch.testing.assert_close(OneClass.nearness(tensors, states, own=True), own, atol=1e-5, rtol=0)
    machine = OneClassSVM(kernel="linear", nu=0.1, tol=1e-6).fit(own.numpy())
    features = torch.stack([dense(*each) for each in zip(states.chunk(2, -1), others.chunk(2, -1), strict=True)], -1)
    expected = -torch.as_tensor(machine.decision_function(features.numpy())) / torch.tensor(machine.coef_[0]).norm()
    torch.testing.assert_close(OneClass.score(tensors, others).double(), expected, atol=1e-4, rtol=0)
    outside = int((OneClass.own_scores(tensors, states) > 1e-5).sum())
    assert outside <= 0.1 * len(states), "at most the share ν"


def test_both_terms_grow_with_nearness_in_every_layer() -> None:
    """Along a way to the request's middle the score falls; the release's terms would part there."""
    states = cloud()
    tensors = OneClass.fit(states, layers=2)
    assert (tensors["weight"] > 0).all()
    middle = states.mean(0)
    for layer in range(2):
        start = middle.clone()
        start[5 * layer : 5 * layer + 5] *= torch.tensor([-1.0, 1.0, -1.0, 1.0, -1.0])
        way = torch.stack([middle + share * (start - middle) for share in (0.0, 0.25, 0.5, 0.75, 1.0)])
        assert (OneClass.score(tensors, way).diff() > 0).all()


def test_all_examples_stay_on_one_side_of_the_origin() -> None:
    """Where m² is large, as with many examples, its scale follows, so that nearness stays above nothing."""
    scaled = type("Scaled", (OneClass,), {"scale": 1e-3})
    tensors = scaled.fit(cloud(), layers=2)
    assert (scaled.nearness(tensors, cloud(), own=True) > 0).all() and (tensors["weight"] > 0).all()


def test_in_a_batch_of_one_near_and_one_far_only_the_near_one_changes(tmp_path: Path) -> None:
    """O3's sentence with O3's detector; the gate is saved beside the adapter and needs no scikit-learn to serve."""
    torch.manual_seed(0)
    near, far = torch.randint(3, 12, (8, 5)), torch.randint(20, 32, (8, 5))
    config = SemuConfig(target_modules=["q_proj", "up_proj"], r=2, init_weights=False)
    model = get_peft_model(llama(), config, adapter_name="request").eval()
    gate = Nearest(BLOCKS, "one-class", pool="mean").add("request", model, [{"input_ids": near}])
    assert gate.calibrate(model, [{"input_ids": far}], false_alarms=0.0).caught == {"request": True}
    served = gated(model, gate)
    ids = torch.stack([near[0], far[0]])
    adapted, result = run(model, input_ids=ids), run(served, input_ids=ids)
    with model.disable_adapter():
        bare = run(model, input_ids=ids)
    torch.testing.assert_close(result[0], adapted[0])
    assert torch.equal(result[1], bare[1]) and not torch.allclose(adapted, bare)
    served.save_pretrained(tmp_path)
    loaded = Nearest.load(tmp_path / GATE_FILE)
    assert loaded.states.layers == tuple(BLOCKS)
    assert torch.equal(loaded.scores(model, input_ids=ids)["request"], gate.scores(model, input_ids=ids)["request"])


def test_a_ramp_from_a_threshold_below_nothing() -> None:
    """Scores may be negative: from the threshold on the weight falls over a share of its size."""
    gate = Nearest("0", "one-class", ramp=0.5)
    model = nn.Sequential(nn.Linear(5, 5))
    gate.add("a", model, [cloud()[:, :5]])
    object.__setattr__(gate.signatures["a"], "threshold", -0.2)
    weights = gate._weight("a", torch.tensor([-0.3, -0.2, -0.15, -0.1, 0.0]))
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0]))


def test_several_layers_side_by_side() -> None:
    model, ids = llama(), torch.randint(3, 32, (2, 5))
    parts = [HiddenStates(name)(model, input_ids=ids)[0] for name in BLOCKS]
    states, real = HiddenStates(BLOCKS)(model, input_ids=ids)
    assert torch.equal(states, torch.cat(parts, -1)) and real.shape == (2, 5)
    with pytest.raises(ValueError, match="`layer` must name layers whose states have one size"):
        HiddenStates(["model.norm", "model.layers.0.mlp.up_proj"])(model, input_ids=ids)
    with pytest.raises(ValueError, match="`layer` must be the name of a layer, or several"):
        Nearest([])
    with pytest.raises(TypeError, match="`layer` must be the name of a layer, or several"):
        Nearest(3)  # type: ignore[arg-type]


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    gate = Nearest("0", "one-class")
    with pytest.raises(
        ImportError, match=r"""'one-class' needs scikit-learn: run `pip install "\.\[evaluation\]"` in a clone"""
    ):
        gate.add("a", nn.Sequential(nn.Linear(5, 5)), [cloud()[:, :5]])
    assert gate.adapter_names == ()
