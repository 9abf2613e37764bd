"""Predictions and the four forgetting metrics, against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers.modeling_outputs import SequenceClassifierOutput

from semu_peft.evaluation import (
    Predictions,
    auc,
    evaluate_forgetting,
    membership_inference,
    predict,
)
from semu_peft.evaluation.auc import mean_interval
from semu_peft.report.measured import read_metrics


class Passthrough(nn.Module):
    """A classifier whose inputs are its logits; dropout and batch norm show whether it is in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.9)
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(x)) * self.scale + self.shift


class KeywordModel(nn.Module):
    """A transformers-style model: keyword inputs, an output object, and a loss if it is given labels."""

    def __init__(self, form: str = "object") -> None:
        super().__init__()
        self.form = form

    def forward(self, pixels: Tensor, scale: Tensor, labels: Tensor | None = None) -> Any:
        assert labels is None, "labels must not reach the model"
        logits = pixels * scale[:, None]
        return {"object": SequenceClassifierOutput(logits=logits), "tuple": (logits, "hidden")}[self.form]


def one_hot_logits(classes: list[int], size: float = 4.0) -> Tensor:
    return size * nn.functional.one_hot(torch.tensor(classes), 3).float()


def loader(predicted: list[int], labels: list[int], batch_size: int = 2) -> DataLoader[Any]:
    return DataLoader(TensorDataset(one_hot_logits(predicted), torch.tensor(labels)), batch_size=batch_size)


def test_predictions_are_those_of_the_eval_mode_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 3, generator=generator)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    model = Passthrough()
    model.norm.running_mean = torch.tensor([0.5, -1.0, 2.0])
    predictions = predict(model, DataLoader(TensorDataset(logits, labels), batch_size=3))

    normalised = (logits - model.norm.running_mean) / (1 + model.norm.eps) ** 0.5
    expected = (normalised.exp() / normalised.exp().sum(1, keepdim=True))[torch.arange(7), labels]
    torch.testing.assert_close(predictions.confidence, expected)
    assert predictions.predicted.tolist() == normalised.argmax(1).tolist()
    assert predictions.labels.tolist() == labels.tolist()
    assert predictions.num_classes == 3
    assert predictions.confidence.dtype == torch.float32
    assert not predictions.confidence.requires_grad
    assert torch.equal(model.norm.running_mean, torch.tensor([0.5, -1.0, 2.0])), "statistics must not be updated"


def test_softmax_is_taken_in_float32_for_a_bfloat16_model() -> None:
    logits = torch.tensor([[4.0, 0.0, 0.0]], dtype=torch.bfloat16)
    confidence = predict(nn.Identity(), [(logits, torch.tensor([0]))]).confidence
    torch.testing.assert_close(confidence, logits.float().softmax(1)[:, 0], rtol=0, atol=0)
    assert confidence.item() != logits.softmax(1)[0, 0].item(), "the test must be able to tell the two apart"


@pytest.mark.parametrize("form", ["object", "tuple"])
def test_dictionary_batches_and_model_outputs(form: str) -> None:
    batch = {"pixels": one_hot_logits([0, 2]), "scale": torch.tensor([1.0, -1.0]), "labels": torch.tensor([0, 2])}
    predictions = predict(KeywordModel(form), [batch])
    assert (predictions.predicted == predictions.labels).tolist() == [True, False]
    assert predictions.accuracy == 50
    assert "labels" in batch, "the caller's batch must stay whole"


def test_every_module_gets_its_own_mode_back_even_after_an_error() -> None:
    model = Passthrough().train()
    model.norm.eval()
    predict(model, loader([0], [0]))
    assert (model.training, model.dropout.training, model.norm.training) == (True, True, False)
    with pytest.raises(ValueError, match="NaN"):
        predict(model, [(torch.full((1, 3), torch.nan), torch.tensor([0]))])
    assert (model.training, model.dropout.training, model.norm.training) == (True, True, False)
    assert torch.is_grad_enabled()


def test_progress_bar_names_the_loader(capsys: pytest.CaptureFixture[str]) -> None:
    predict(Passthrough(), loader([0], [0]), name="retain")
    assert "retain" in capsys.readouterr().err
    predict(Passthrough(), loader([0], [0]), progress=False, name="retain")
    assert capsys.readouterr().err == ""


def test_confusion_counts_true_classes_in_rows() -> None:
    labels, predicted = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 0])
    predictions = Predictions(labels, predicted, torch.zeros(4))
    assert predictions.confusion().tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert predictions.confusion(4).shape == (4, 4)
    with pytest.raises(ValueError, match="must be at least 3, as class 2 occurs, got 2"):
        predictions.confusion(2)


def test_metrics_by_hand() -> None:
    metrics = evaluate_forgetting(
        Passthrough(),
        forget=loader([0, 1, 1, 2], [0, 0, 0, 0]),  # one of four right
        retain=loader([0, 1, 2, 1, 1], [0, 1, 2, 1, 0]),  # four of five
        test=loader([1, 1, 2, 0, 2, 2, 2, 2], [1, 1, 2, 2, 1, 0, 2, 2]),  # five of eight
        forgotten_test=loader([0, 1], [0, 0]),
        seconds=1.5,
        adapter_bytes=100,
    )
    assert metrics.unlearning_accuracy == 75
    assert metrics.retain_accuracy == 80
    assert metrics.test_accuracy == 62.5
    assert metrics.forgotten_test_accuracy == 50
    assert (metrics.trainable_parameters, metrics.total_parameters) == (1, 4)
    assert metrics.trainable_share == 25
    assert (metrics.seconds, metrics.adapter_bytes) == (1.5, 100)


def test_accuracies_have_the_intervals_of_as_many_examples() -> None:
    model, right = nn.Identity(), 9 * torch.eye(2)
    sides = [
        [(right.repeat(200, 1), torch.tensor([0, 1] * (200 - wrong) + [1, 0] * wrong))] for wrong in (150, 20, 40, 0)
    ]
    found = evaluate_forgetting(model, *sides[:3], forgotten_test=sides[3], progress=False)
    for name, share in (("unlearning_accuracy", 0.75), ("retain_accuracy", 0.9), ("test_accuracy", 0.8)):
        # Wilson's bounds are where the share lies 1.96 standard deviations from the bound.
        for bound in getattr(found, f"{name}_interval"):
            deviation = (bound / 100 * (1 - bound / 100) / 400) ** 0.5
            assert abs(share - bound / 100) == pytest.approx(1.96 * deviation, rel=1e-6), name
    squared = 1.96**2
    assert found.forgotten_test_accuracy_interval == pytest.approx((100 * 400 / (400 + squared), 100.0))  # all right
    shown = read_metrics(found)["rows"][0]["values"]
    assert shown["retain accuracy"]["interval"] == list(found.retain_accuracy_interval)
    assert shown["membership inference"]["interval"] == list(found.membership_interval)
    again = evaluate_forgetting(model, *sides[:3], forgotten_test=sides[3], progress=False)
    assert again.test_accuracy_interval == found.test_accuracy_interval


def test_a_mean_of_many_is_drawn_piece_by_piece_as_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    at_once = mean_interval(values)
    monkeypatch.setattr(auc, "_DRAWN_AT_ONCE", 120)
    assert mean_interval(values) == pytest.approx(at_once, abs=0.02)
    with pytest.raises(ValueError, match="`values` must hold a number for each example, got 2 with 1 NaN"):
        mean_interval(torch.tensor([1.0, torch.nan]))


def test_membership_takes_retain_for_members_and_test_for_non_members() -> None:
    def with_confidence(value: float, count: int) -> Predictions:
        return Predictions(
            labels=torch.zeros(count, dtype=torch.int64),
            predicted=torch.zeros(count, dtype=torch.int64),
            confidence=value + 0.01 * torch.rand(count, generator=torch.Generator().manual_seed(count)),
        )

    seen, unseen = with_confidence(0.95, 20), with_confidence(0.2, 30)
    as_if_unseen = evaluate_forgetting(nn.Identity(), with_confidence(0.2, 10), seen, unseen)
    assert as_if_unseen.membership_inference == 100
    as_if_seen = evaluate_forgetting(nn.Identity(), with_confidence(0.95, 10), seen, unseen)
    assert as_if_seen.membership_inference == 0


def test_attack_options_are_passed_on() -> None:
    generator = torch.Generator().manual_seed(1)
    sets = [torch.randn(n, 3, generator=generator) for n in (40, 60, 50)]
    loaders = [[(logits, torch.randint(3, (len(logits),), generator=generator))] for logits in sets]
    forget, retain, test = (predict(nn.Identity(), batches).confidence for batches in loaders)
    for seed, most in ((0, None), (3, 10)):
        metrics = evaluate_forgetting(nn.Identity(), *loaders, seed=seed, max_attack_examples=most)
        assert metrics.membership_inference == membership_inference(retain, test, forget, seed=seed, max_examples=most)


def test_parameters_of_a_peft_model_and_an_explicit_count() -> None:
    base = nn.Sequential(nn.Linear(3, 3))
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=2))
    batches = loader([0, 1, 2], [0, 1, 2])
    metrics = evaluate_forgetting(model, batches, batches, batches)
    assert (metrics.trainable_parameters, metrics.total_parameters) == (12, 24)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert evaluate_forgetting(model, batches, batches, batches).trainable_parameters == 0
    told = evaluate_forgetting(model, batches, batches, batches, trainable_parameters=12)
    assert told.trainable_share == 50


@pytest.mark.parametrize("name", ["forget", "retain", "test", "forgotten_test"])
def test_an_empty_loader_is_named(name: str) -> None:
    loaders: dict[str, Any] = {key: loader([0, 1], [0, 1]) for key in ("forget", "retain", "test", "forgotten_test")}
    loaders[name] = iter([])
    with pytest.raises(ValueError, match=f"^`{name}` must give at least one example, got none"):
        evaluate_forgetting(Passthrough(), **loaders)


def test_nan_logits_are_counted_and_the_loader_named() -> None:
    logits = one_hot_logits([0, 1, 2])
    logits[1, 2] = torch.nan
    good = loader([0, 1], [0, 1])
    with pytest.raises(ValueError, match=r"^The model's logits on `retain` must be .* NaN or \+inf for 1 of 3"):
        evaluate_forgetting(Passthrough(), good, [(logits, torch.tensor([0, 1, 2]))], good)


def test_a_class_struck_out_with_minus_infinity_is_fine() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, 0.0]])
    predictions = predict(nn.Identity(), [(logits, torch.tensor([0]))])
    assert (predictions.confidence.item(), predictions.predicted.item()) == (0, 1)


@pytest.mark.parametrize("label", [-100, 3])
def test_labels_outside_the_classes(label: int) -> None:
    with pytest.raises(ValueError, match="0 to 2, as the model has 3 classes"):
        predict(Passthrough(), loader([0, 1], [0, label]))


def test_shapes_that_are_no_classification() -> None:
    with pytest.raises(ValueError, match=r"logits \(N, classes\).*or give the objective as a callable|0 to 0"):
        predict(nn.Identity(), [(torch.zeros(2, 1), torch.tensor([0, 2]))])
    with pytest.raises(ValueError, match="got 3 classes at first and 4 later"):
        predict(nn.Identity(), [(torch.zeros(1, n), torch.zeros(1, dtype=torch.int64)) for n in (3, 4)])
    with pytest.raises(ValueError, match="three vectors of one length"):
        Predictions(torch.zeros(2), torch.zeros(3), torch.zeros(2))
    empty = Predictions(torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0))
    batches = loader([0, 1], [0, 1])
    with pytest.raises(ValueError, match="^`test` must hold at least one prediction"):
        evaluate_forgetting(Passthrough(), batches, batches, empty)


def test_one_logit_is_read_as_two_classes() -> None:
    predictions = predict(
        nn.Identity(), [(torch.tensor([[2.0], [-1.0], [0.5]]), torch.tensor([1, 1, 0]))], progress=False
    )
    assert predictions.predicted.tolist() == [1, 0, 1] and predictions.num_classes == 2
    torch.testing.assert_close(predictions.confidence, torch.tensor([2.0, -1.0, -0.5]).sigmoid())
