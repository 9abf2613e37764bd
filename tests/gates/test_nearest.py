"""What a gate remembers of a request, and when it opens: metrics by hand, thresholds, padding, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from language_batches import packed, padded
from models import Mlp, Snapshot, llama, run
from peft import get_peft_model
from torch import Tensor, nn

from semu_peft import SemuConfig
from semu_peft.gates import Classifier, HiddenStates, LinearScorer, Nearest, gated, linear_gate
from semu_peft.gates.signatures import Box, Cosine, Mahalanobis

BOX = torch.tensor([[1.0, 2.0], [3.0, 2.0], [2.0, 6.0]])


def test_the_box_by_hand() -> None:
    """KSD: μ (2, 3.333), σ (.8165, 1.8856), k = √2 is the exact maximum; at .999 k the third example is outside."""
    tensors = Box.fit(BOX)
    torch.testing.assert_close(tensors["mean"], torch.tensor([2.0, 10 / 3]))
    torch.testing.assert_close(tensors["deviation"], torch.tensor([0.8165, 1.8856]), atol=1e-4, rtol=0)
    scores = Box.score(tensors, BOX)
    assert float(scores.max()) == pytest.approx(2**0.5, abs=1e-6)
    assert (scores <= scores.max()).all() and (scores <= 0.999 * scores.max()).tolist() == [True, True, False]


def test_a_box_opens_for_each_example_on_its_own() -> None:
    """The flag of the release is one for all; here one example far away closes for itself alone."""
    gate = Nearest("0", metric="box", side="input").add("skill", nn.Sequential(nn.Linear(2, 2)), [BOX])
    model = nn.Sequential(nn.Linear(2, 2))
    assert gate(model, torch.cat([BOX, torch.tensor([[9.0, 9.0]])]))["skill"].tolist() == [1, 1, 1, 0]


def test_mahalanobis_equals_the_dense_formula() -> None:
    """With fewer examples than dimensions: `Σ = .9 S + .1 (tr S / D) I`, by a matrix that the metric never forms."""
    states = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).double()
    centred = states - states.mean(0)
    covariance = centred.mT @ centred / 5
    shrunk = 0.9 * covariance + 0.1 * covariance.trace() / 12 * torch.eye(12).double()
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(1)).double()
    away = x - states.mean(0)
    dense = (away @ torch.linalg.inv(shrunk) * away).sum(-1).sqrt()
    torch.testing.assert_close(
        Mahalanobis.score(Mahalanobis.fit(states.float()), x.float()).double(), dense, rtol=1e-4, atol=0
    )


def test_cosine_is_to_the_nearest_and_leaves_an_example_out_for_itself() -> None:
    states = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    tensors = Cosine.fit(states)
    half = 1 - 2**-0.5
    torch.testing.assert_close(Cosine.own_scores(tensors, states), torch.tensor([half, half, half]))
    torch.testing.assert_close(
        Cosine.score(tensors, torch.tensor([[0.0, 5.0], [-1.0, -1.0]])), torch.tensor([0.0, 1 + 2**-0.5])
    )


@pytest.mark.parametrize("pool", ["any", "last", "mean"])
def test_padding_changes_nothing(pool: Any) -> None:
    """States of prompts and scores of texts are the same with padding on either side, and more of it."""
    model = llama()
    look = HiddenStates("model.norm", pool=pool)
    plain = padded()
    expected = look.of_prompts(model, plain)
    gate = Nearest("model.norm", pool=pool).add("request", model, [plain])
    scores = gate.scores(model, **{key: plain[key] for key in ("input_ids", "attention_mask")})["request"]
    for options in ({"side": "left"}, {"more": 3}, {"side": "left", "more": 2}):
        batch = padded(**options)
        torch.testing.assert_close(look.of_prompts(model, batch), expected, atol=1e-5, rtol=1e-5)
        other = gate.scores(model, **{key: batch[key] for key in ("input_ids", "attention_mask")})["request"]
        torch.testing.assert_close(other, scores, atol=1e-5, rtol=1e-5)


def test_the_prompt_is_what_is_remembered_and_what_follows_cannot_close() -> None:
    """Answers are left out of a signature; with `any`, a text that goes on is only found nearer."""
    model, batch = llama(), padded()
    longer = {**batch, "input_ids": torch.where(batch["labels"] == -100, batch["input_ids"], 5)}
    look = HiddenStates("model.norm")
    torch.testing.assert_close(look.of_prompts(model, longer), look.of_prompts(model, batch))
    gate = Nearest("model.norm").add("request", model, [batch])
    ids = torch.randint(3, 32, (4, 9), generator=torch.Generator().manual_seed(0))
    scores = [gate.scores(model, input_ids=ids[:, :length])["request"] for length in (3, 6, 9)]
    assert (scores[1] <= scores[0] + 1e-6).all() and (scores[2] <= scores[1] + 1e-6).all()
    asked = {"input_ids": torch.cat([batch["input_ids"][:, :2], ids[:3]], 1)}
    assert gate(model, **asked)["request"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("metric", ["cosine", "mahalanobis", "box", "one-class"])
def test_false_alarms_are_bounded_by_the_calibration(metric: Any) -> None:
    """With two requests the gate opens on at most the share asked for, and on all that it knows where that is apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6))
    near = [torch.randn(20, 6) * 0.3 + 4 * torch.eye(6)[place] for place in (0, 1)]
    retain = torch.randn(400, 6)
    gate = Nearest("0", metric=metric, side="input")
    for name, forget in zip(("a", "b"), near, strict=True):
        gate.add(name, model, [forget])
    for share in (0.0, 0.02, 0.1, 1.0):
        found = gate.calibrate(model, retain.split(100), false_alarms=share)
        weights = torch.stack(list(gate(model, retain).values())).amax(0)
        assert float((weights > 0).float().mean()) == pytest.approx(found.false_alarms) and found.false_alarms <= share
    far = gate.calibrate(model, [10 * torch.randn(50, 6).abs() * torch.tensor([0, 0, 1.0, 1, 1, 1])], false_alarms=0)
    assert far.caught == {"a": True, "b": True} and far.false_alarms == 0
    assert gate(model, near[0])["a"].min() == 1 and gate(model, near[1])["a"].max() == 0


def test_a_ramp_between_open_and_closed() -> None:
    gate = Nearest("0", metric="box", side="input", ramp=0.5).add(
        "a", nn.Sequential(nn.Linear(1, 1)), [torch.tensor([[-1.0], [1.0]])]
    )
    gate.signatures["a"] = type(gate.signatures["a"])(gate.signatures["a"].tensors, 1.0, 1.0)
    weights = gate(nn.Sequential(nn.Linear(1, 1)), torch.tensor([[0.5], [1.0], [1.25], [1.5], [9.0]]))["a"]
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0]))


def test_requests_are_seen_with_the_adapters_off_and_the_model_is_left_alone() -> None:
    torch.manual_seed(0)
    model, x = (
        get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"], r=2, init_weights=False), adapter_name="a").train(),
        torch.randn(4, 6),
    )
    with model.disable_adapter():
        states = torch.tanh(model.base_model.model.fc1(x)).detach()
    before = Snapshot.of(model)
    gate = Nearest("fc2", metric="cosine", side="input").add("a", model, [x])
    gate.calibrate(model, [x])
    before.assert_same(model)
    torch.testing.assert_close(gate.signatures["a"].tensors["directions"], nn.functional.normalize(states))
    wrapped = gated(model.eval(), gate)
    gate.add("a", wrapped, [x])
    assert run(wrapped, x).shape == (4, 4)


def test_files(tmp_path: Path) -> None:
    """A file gives the same weights again; other files are refused, and nothing is unpickled."""
    model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(8, 6)
    for metric in ("cosine", "mahalanobis", "box"):
        gate = Nearest("0", metric=metric, ramp=0.5, pool="last").add("a", model, [x[:4]]).add("b", model, [x[4:]])  # type: ignore[arg-type]
        again = Nearest.load(gate.save(tmp_path / "gate.safetensors"))
        assert repr(again) == repr(gate) and again.adapter_names == ("a", "b")
        for name, weight in gate(model, x).items():
            assert torch.equal(again(model, x)[name], weight)
    classifier = linear_gate(model, {"a": [x[:4]]}, [x[4:]], HiddenStates("0"))
    loaded = Classifier.load(classifier.save(tmp_path / "other.safetensors"))
    assert (
        torch.equal(loaded.probabilities(model, x), classifier.probabilities(model, x))
        and loaded.threshold == classifier.threshold
    )
    with pytest.raises(ValueError, match="`path` must be a file that `Nearest.save` wrote"):
        Nearest.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError):
        Nearest.load(tmp_path / "none.safetensors")


def test_mistakes_are_told() -> None:
    model, x = nn.Sequential(nn.Linear(2, 2)), torch.randn(3, 2)
    for arguments, message in (
        ({"layer": "0", "metric": "l2"}, "`metric` must be one of"),
        ({"layer": "0", "pool": "first"}, "`pool` must be one of"),
        ({"layer": "0", "ramp": -1.0}, "`ramp` must be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            Nearest(**arguments)  # type: ignore[arg-type]
    gate = Nearest("0", metric="box")
    with pytest.raises(ValueError, match="`gate` must know a request"):
        gate(model, x)
    with pytest.raises(ValueError, match="`forget` must have at least 2 examples for 'box', got 1"):
        gate.add("a", model, [x[:1]])
    with pytest.raises(ValueError, match=r"`layer` must be the name of a module of the model, got 'norm'"):
        Nearest("norm").add("a", model, [x])
    assert not gate.signatures
    with pytest.raises(ValueError, match="`name` must be one of"):
        gate.remove("a")


# ---- classifiers ----


class Estimator:
    """As scikit-learn's: class 0 for what is nobody's."""

    def predict_proba(self, rows: Any) -> Any:
        score = torch.as_tensor(rows)[:, :1].sigmoid()
        return torch.cat([1 - score, score], 1).numpy()


class Network(nn.Module):
    """As transformers' classifiers: an output with logits, asked by name."""

    def forward(self, input_ids: Tensor) -> Any:
        return {"logits": torch.nn.functional.one_hot(input_ids[:, -1] % 3, 3) * 10.0}


def test_any_classifier_will_do() -> None:
    x = torch.tensor([[4.0, 0.0], [-4.0, 0.0]])
    assert Classifier(Estimator(), ["a"])(nn.Identity(), x)["a"].tolist() == [1, 0]
    weights = Classifier(Network(), ["a", "b"], threshold=0.99)(nn.Identity(), input_ids=torch.tensor([[0], [1], [2]]))
    assert {name: each.tolist() for name, each in weights.items()} == {"a": [0, 1, 0], "b": [0, 0, 1]}
    reencoded = Classifier(Network(), ["a", "b"], inputs=lambda model, text: {"input_ids": text})
    assert reencoded(nn.Identity(), torch.tensor([[4], [8]]))["a"].tolist() == [1, 0]
    with pytest.raises(ValueError, match="`scorer` must give a probability for each of"):
        Classifier(Estimator(), ["a", "b"])(nn.Identity(), x)
    with pytest.raises(TypeError, match="`scorer` must be a module"):
        Classifier(3)
    with pytest.raises(TypeError, match="LinearScorer on HiddenStates to be saved"):
        Classifier(Estimator()).save("x")


def test_a_linear_scorer_is_at_the_minimum_of_its_loss() -> None:
    """The gradient of the convex loss vanishes, sides counted equally however many examples they have."""
    torch.manual_seed(0)
    near, far = torch.randn(5, 3) + 1, torch.randn(50, 3) - 1
    scorer = LinearScorer.fit([near], far, penalty=0.1)
    every = torch.cat([near, far])
    scaled = (every - every.mean(0)) / every.std(0, correction=0)
    weight, bias = scorer.weight[0].clone().requires_grad_(), scorer.bias[0].clone().requires_grad_()
    z = scaled @ weight + bias
    loss = nn.functional.softplus(-z[:5]).mean() + nn.functional.softplus(z[5:]).mean() + 0.1 * weight.square().sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert float(gradient.abs().max()) < 1e-4


def test_a_linear_gates_false_alarms_are_bounded() -> None:
    """Of the examples that its threshold is set by; where the sides are apart it lies between them."""
    torch.manual_seed(0)
    model, near, retain = nn.Sequential(nn.Linear(4, 4)), torch.randn(30, 4) + 1, torch.randn(400, 4)
    for share in (0.0, 0.05, 1.0):
        gate = linear_gate(model, {"a": [near]}, retain.split(100), HiddenStates("0", side="input"), false_alarms=share)
        assert int(gate(model, retain[1::2])["a"].sum()) <= share * 200
    apart = linear_gate(model, {"a": [near + 20]}, [retain], HiddenStates("0", side="input"), false_alarms=0)
    assert apart(model, near + 20)["a"].min() == 1 and apart(model, retain)["a"].max() == 0


def test_packed_rows_are_one_example() -> None:
    """Rows of several sequences have one decision: pack nothing where each is to have its own."""
    batch = packed()
    states = HiddenStates("model.norm").of_prompts(llama(), batch)
    assert states.shape == (1, 16)
