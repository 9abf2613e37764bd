"""Labels and outputs in the forms that people have them in: dtypes, arrays, one logit, pixels, two towers; the rest."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from models import vit
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, ViTForImageClassification

from semu_peft import SemuConfig
from semu_peft.objectives import (
    CrossEntropy,
    DecoupledDistillation,
    GradientAscent,
    InvertedHinge,
    RandomLabel,
    SquaredLogits,
    UniformDistribution,
    UnseenConfidence,
)
from semu_peft.objectives.tokens import call_model

LOGITS = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 5
MODEL = nn.Identity()  # its inputs are the logits


def all_objectives() -> list[Any]:
    return [
        CrossEntropy(), GradientAscent(), RandomLabel(), DecoupledDistillation(reference=MODEL), InvertedHinge(),
        UniformDistribution(), UnseenConfidence(torch.linspace(0, 1, 9), reference=MODEL),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels_of_every_integer_dtype(dtype: torch.dtype) -> None:
    for one, other in zip(all_objectives(), all_objectives(), strict=True):
        assert torch.equal(one(MODEL, (LOGITS, LABELS.to(dtype))), other(MODEL, (LOGITS, LABELS)))


@pytest.mark.parametrize(
    "labels", [LABELS.tolist(), tuple(LABELS.tolist()), LABELS.numpy(), list(LABELS), LABELS[:, None]]
)
def test_labels_that_are_no_vector_of_a_tensor(labels: Any) -> None:
    assert torch.equal(CrossEntropy()(MODEL, (LOGITS, labels)), F.cross_entropy(LOGITS, LABELS))
    assert torch.equal(CrossEntropy()(MODEL, {"input": LOGITS, "labels": labels}), F.cross_entropy(LOGITS, LABELS))


@pytest.mark.parametrize(
    ("labels", "error"),
    [(["cat"] * 12, TypeError), (numpy.array(["cat"] * 12), TypeError), (LABELS.float(), ValueError),
     (LABELS % 2 == 0, ValueError), (LABELS[:5], ValueError)],
)  # fmt: skip
def test_what_is_no_label_is_refused_by_name(labels: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"[Ll]abels"):
        CrossEntropy()(MODEL, (LOGITS, labels))


@pytest.mark.parametrize("shape", [(12, 1), (12,)])
@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.float32, torch.bool])
def test_one_logit_is_the_second_of_two_classes(shape: tuple[int, ...], kind: torch.dtype) -> None:
    logits, labels = LOGITS[:, 0].reshape(shape), (torch.arange(12) % 2)
    expected = F.binary_cross_entropy_with_logits(logits.flatten(), labels.float())
    for given in (labels.to(kind), labels.to(kind).reshape(shape)):
        torch.testing.assert_close(CrossEntropy()(MODEL, (logits, given)), expected)
        torch.testing.assert_close(GradientAscent()(MODEL, (logits, given)), -expected)


def test_pixels_count_like_tokens() -> None:
    logits, labels = torch.randn(2, 5, 4, 3), torch.randint(5, (2, 4, 3))
    labels[0, 1] = -100
    torch.testing.assert_close(CrossEntropy()(MODEL, (logits, labels)), F.cross_entropy(logits, labels))
    assert call_model(MODEL, (logits, labels))[0].shape == (2 * 12 - 3, 5)


def test_the_classes_of_two_towers_are_the_texts() -> None:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
    image = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "image_size": 8, "patch_size": 4}  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=8)).eval()
    batch = {"input_ids": torch.randint(2, 20, (5, 6)), "pixel_values": torch.randn(3, 3, 8, 8)}
    logits = model(**batch).logits_per_image
    loss = CrossEntropy()(model, {**batch, "labels": torch.tensor([4, 0, 2])})
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor([4, 0, 2])))
    with pytest.raises(TypeError, match=r"got BaseModelOutputWithPooling.*def objective\(model, batch\)"):
        CrossEntropy()(model.vision_model, {"pixel_values": batch["pixel_values"], "labels": torch.zeros(3).long()})


@pytest.mark.parametrize(
    ("logits", "labels", "loss"),
    [
        (LOGITS, (LOGITS > 0).float(), "binary_cross_entropy_with_logits"),  # several labels an example
        (LOGITS, (LOGITS > 0).long(), "binary_cross_entropy_with_logits"),
        (LOGITS[:, :1], LOGITS[:, 1:2], "mse_loss"),  # regression
        (LOGITS[:, 0], LOGITS[:, 1], "mse_loss"),
        (LOGITS[:, :1], LOGITS[:, 1], "mse_loss"),
        (LOGITS.reshape(3, 4, 5), LABELS[:3], "cross_entropy"),
    ],
)  # fmt: skip
def test_what_is_no_classification_is_answered_with_a_callable(logits: Tensor, labels: Tensor, loss: str) -> None:
    with pytest.raises(ValueError, match=rf"def objective\(model, batch\): .*{loss}\(") as refused:
        CrossEntropy()(MODEL, (logits, labels))
    shown, names = str(refused.value).split("`def ")[1].split("`")[0], {"nn": torch.nn}
    exec(f"def {shown}", names)  # works as it stands, and is no ascent: it is copied for retain data, too
    if loss != "cross_entropy":
        expected = getattr(F, loss)(logits.flatten(), labels.flatten().float())
        torch.testing.assert_close(names["objective"](MODEL, (logits, labels)), expected)


def test_several_classes_are_struck_out_at_once() -> None:
    logits, labels, gone = LOGITS.requires_grad_(), LABELS % 3, [0, 1, 2]
    kept = logits[:, 3:].detach()
    expected = -(kept.softmax(-1) * (logits.log_softmax(-1)[:, 3:] - kept.log_softmax(-1))).sum(-1).mean()
    for classes in (gone, tuple(gone), torch.tensor(gone), range(3)):
        objective = DecoupledDistillation(reference=MODEL, classes=classes)
        torch.testing.assert_close(objective(MODEL, (logits, labels)), expected)
    probabilities = logits.softmax(-1)
    hinge = (1 + probabilities.gather(1, labels[:, None])[:, 0] - probabilities[:, 3:].amax(-1)).mean()
    torch.testing.assert_close(InvertedHinge(classes=gone)(MODEL, (logits, labels)), hinge)
    sure = 99 * F.one_hot(torch.tensor([3, 4] * 6), 5).float()  # a label among the first three would cost 99
    losses = [RandomLabel(classes=gone, seed=seed)(MODEL, (sure, labels)).item() for seed in range(9)]
    assert all(0 < loss < 99 for loss in losses) and len(set(losses)) > 1
    sure = 99 * F.one_hot(torch.tensor([3]), 5).float()  # an example of another class is not led to its own either
    assert RandomLabel(classes=[4])(MODEL, (sure, torch.tensor([3]))) > 90


def test_whole_classes_that_are_taught_one_another_are_told_of_once() -> None:
    def batch(*labels: int) -> tuple[Tensor, Tensor]:  # images of 0 look like 1, those of 1 like 0, all others like 4
        alike = torch.tensor([[2.0, 1.0, 0, 0, 0], [1.0, 2.0, 0, 0, 0], [0, 0, 2.0, 0, 1.0], [0, 0, 0, 2.0, 1.0]])
        y = torch.tensor(labels)
        return 5 * alike[y], y

    objective = DecoupledDistillation(reference=MODEL)
    quiet = [batch(*[0] * 16), batch(*[0, 1] * 4), batch(*[2, 3] * 8), batch(*[0, 1] * 8, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each in quiet:  # one class, single examples, classes that are not alike, single examples beside classes
            objective(MODEL, each)
        DecoupledDistillation(reference=MODEL, classes=[0, 1])(MODEL, batch(*[0, 1] * 8))
    with pytest.warns(UserWarning, match=r"classes \[0, 1\] .*9\d%.*`classes=\[\.\.\.\]`"):
        objective(MODEL, batch(*[0, 1] * 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective(MODEL, batch(*[0, 1] * 8))


def test_classes_that_no_example_is_of_are_told_of_once() -> None:
    batch = torch.randn(4, 5), torch.tensor([2, 3, 2, 3])
    objective = DecoupledDistillation(reference=MODEL, classes=[4])
    with pytest.warns(UserWarning, match=r"is of classes \[2, 3\], and none of it of `classes` \[4\]. Name all"):
        objective(MODEL, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective(MODEL, batch)
        DecoupledDistillation(reference=MODEL, classes=[3, 4])(MODEL, batch)


@pytest.mark.parametrize(
    ("classes", "words"),
    [([], "at least one"), ([1, 1], "different"), ([-1], "from 0 on"), ([9], "0 to 4"), (range(5), "leave at least"),
     ("13", "class indices"), (3, "class indices"), ([0.5], "class indices"), ([True], "class indices")],
)  # fmt: skip
@pytest.mark.parametrize("kind", [partial(DecoupledDistillation, MODEL), RandomLabel, InvertedHinge])
def test_classes_that_cannot_be(kind: Any, classes: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"`classes`.*{words}"):
        kind(classes=classes)(MODEL, (LOGITS, LABELS))


class Images(ViTForImageClassification):
    """Passes over the names that PEFT's wrapper hands on to every model, as transformers 5 does by itself."""

    def forward(self, pixel_values: Any = None, labels: Any = None, **others: Any) -> Any:
        return super().forward(pixel_values, labels=labels)


def test_images_by_position_in_a_peft_model_of_a_task() -> None:
    """Its `forward` takes what stands first for `input_ids`, which a model of images does not know."""
    config = SemuConfig(target_modules="all-linear", r=2, init_weights=False, task_type="SEQ_CLS")
    model = get_peft_model(Images(vit().config), config)
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2])
    named = {"pixel_values": images, "labels": labels}
    for objective in (CrossEntropy(), DecoupledDistillation(), SquaredLogits()):
        for wrapped in (model.eval(), nn.DataParallel(model)):
            assert torch.equal(objective(wrapped, (images, labels)), objective(model, named))
    assert torch.equal(SquaredLogits()(model, images), SquaredLogits()(model, named))
