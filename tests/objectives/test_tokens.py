"""Tokens are examples: one reading of a batch makes every objective of classes one of language models."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import transformers
from models import gpt2, llama, t5
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft import SemuConfig
from semu_peft.evaluation import predict
from semu_peft.objectives import (
    CrossEntropy,
    DecoupledDistillation,
    GradientAscent,
    InvertedHinge,
    Objective,
    RandomLabel,
    UniformDistribution,
    UnseenConfidence,
)
from semu_peft.objectives.original import without_adapter
from semu_peft.objectives.tokens import call_model

VOCABULARY, PAD = 32, 0
OBJECTIVES: dict[str, Objective] = {
    "cross_entropy": CrossEntropy(),
    "gradient_ascent": GradientAscent(),
    "random_label": RandomLabel(seed=1),
    "decoupled_distillation": DecoupledDistillation(),
    "unseen_confidence": UnseenConfidence(torch.tensor([0.1, 0.5])),
    "inverted_hinge": InvertedHinge(),
    "uniform": UniformDistribution(),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def padded(side: str, more: int = 0, prompt: int = 2) -> dict[str, Tensor]:
    """Three texts of 5, 3 and 6 tokens as a batch, padded on one side, the prompts' labels masked."""
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(2, VOCABULARY, (length,), generator=draw) for length in (5, 3, 6)]
    batch: dict[str, list[Tensor]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        labels = row.clone()
        labels[:prompt] = -100
        fill = 6 + more - len(row)
        place = (fill, 0) if side == "left" else (0, fill)
        batch["input_ids"].append(F.pad(row, place, value=PAD))
        batch["attention_mask"].append(F.pad(torch.ones_like(row), place))
        batch["labels"].append(F.pad(labels, place, value=-100))
    return {name: torch.stack(items) for name, items in batch.items()}


def bart() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16, dropout=0.0,
        pad_token_id=PAD, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip


def made(make: Any) -> Any:
    torch.manual_seed(0)
    return make().eval()


# ---- what transformers computes itself ----


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompt", [0, 2])
def test_cross_entropy_of_a_causal_model_is_transformers_own(make: Any, side: str, prompt: int) -> None:
    """To rounding, padded on either side, with −100 labels, bare, in a PEFT model and in its replica.

    But for a first token after padding, which transformers has predicted from the padding, and for absolute positions,
    which it counts from the first token in `generate` alone.
    """
    model, given = made(make), padded(side, prompt=prompt)
    first = given["attention_mask"].cumsum(1).eq(1) & given["attention_mask"].bool()
    batch = {**given, "labels": given["labels"].masked_fill(first, -100)}
    counted = {"position_ids": given["attention_mask"].cumsum(1).sub(1).clamp_min(0)} if make is gpt2 else {}
    expected = model(**batch, **counted).loss
    torch.testing.assert_close(CrossEntropy()(model, given), expected, rtol=1e-6, atol=1e-6)
    adapted = get_peft_model(copy.deepcopy(model), SemuConfig(target_modules="all-linear", r=2, init_weights=False))
    torch.testing.assert_close(CrossEntropy()(model, batch), expected, rtol=1e-6, atol=1e-6)
    own = adapted.eval()(**batch, **counted).loss
    torch.testing.assert_close(CrossEntropy()(adapted, batch), own, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(CrossEntropy()(without_adapter(adapted), batch), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [t5, bart])
@pytest.mark.parametrize("given", [False, True])
def test_cross_entropy_of_an_encoder_decoder_is_transformers_own(make: Any, given: bool) -> None:
    """The model shifts its decoder's inputs, so labels are read in place, whoever makes the decoder's inputs."""
    model, batch = made(make), padded("right")
    batch["labels"] = batch["labels"][:, 1:].contiguous()  # another length than the encoder's inputs
    if given:
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    adapted = get_peft_model(
        copy.deepcopy(model),
        LoraConfig(target_modules=["q", "q_proj"], task_type="SEQ_2_SEQ_LM", init_lora_weights=False),
    ).eval()
    for candidate in (model, adapted):
        expected = candidate(**batch).loss
        torch.testing.assert_close(CrossEntropy()(candidate, batch), expected, rtol=1e-6, atol=1e-6)
    if make is bart:
        return  # which makes no tuples of itself
    model.config.return_dict = False
    torch.testing.assert_close(CrossEntropy()(model, batch), model(**batch)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("head", ["TokenClassification", "MaskedLM"])
def test_cross_entropy_of_a_label_for_each_token_is_transformers_own(head: str) -> None:
    """Token classifiers and masked language models are read in place."""
    model = made(
        lambda: getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**BERT, num_labels=VOCABULARY))
    )
    batch = padded("right", prompt=1)
    torch.testing.assert_close(CrossEntropy()(model, batch), model(**batch).loss, rtol=1e-6, atol=1e-6)


def test_the_task_type_of_peft_tells_too() -> None:
    """A model that is none of transformers' heads is read as its adapter's task says, or as the objective is told."""
    torch.manual_seed(0)
    batch = (torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 3]]))
    base = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 5)).eval()
    losses = {shift: CrossEntropy(shift_labels=shift)(base, batch) for shift in (True, False)}
    logits = base(batch[0])[0]
    torch.testing.assert_close(losses[True], F.cross_entropy(logits[:-1], batch[1][0, 1:]))
    torch.testing.assert_close(losses[False], F.cross_entropy(logits, batch[1][0]))
    for task, shift in {"CAUSAL_LM": True, "TOKEN_CLS": False}.items():
        config = LoraConfig(target_modules=["1"], r=2)
        model: Any = get_peft_model(copy.deepcopy(base), config)
        config.task_type = task
        torch.testing.assert_close(CrossEntropy()(model, batch), losses[shift])
    with pytest.raises(ValueError, match="Sequential.*`shift_labels=True`.*`shift_labels=False`"):
        CrossEntropy()(base, batch)


# ---- every objective ----


class Table(nn.Module):
    """Logits of three classes at three positions, known exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([[[0.0, 0.0, math.log(2)], [math.log(6), 0.0, 0.0], [9.0, 9.0, 9.0]]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


@pytest.mark.parametrize(
    ("objective", "expected"),
    [  # p = (1/4, 1/4, 1/2) for label 2 and (3/4, 1/8, 1/8) for label 1; the reference is uniform
        (CrossEntropy, (math.log(2) + math.log(8)) / 2),
        (GradientAscent, -(math.log(2) + math.log(8)) / 2),
        (InvertedHinge, ((1 + 1 / 2 - 1 / 4) + (1 + 1 / 8 - 3 / 4)) / 2),
        (UniformDistribution, (-math.log(1 / 32) - math.log(3 / 256) - 6 * math.log(3)) / 6),
        (DecoupledDistillation, (math.log(2) + (math.log(2 / 3) + math.log(4)) / 2) / 2),
    ],
)
def test_two_tokens_by_hand(objective: Any, expected: float) -> None:
    """The last position predicts nothing and the first label is nobody's: two predictions are left."""
    batch = (torch.zeros(1, 3), torch.tensor([[0, 2, 1]]))
    settings = {"reference": lambda x: torch.zeros(1, 3, 3)} if objective is DecoupledDistillation else {}
    loss = objective(shift_labels=True, **settings)(Table(), batch)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@every_objective
def test_each_trains_a_causal_model(name: str) -> None:
    """The loss is a finite scalar, and its gradient reaches each adapted layer."""
    model = get_peft_model(made(llama), SemuConfig(target_modules="all-linear", r=2, init_weights=False))
    loss = copy.deepcopy(OBJECTIVES[name])(model.eval(), padded("right"))
    assert loss.shape == () and loss.isfinite()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients) and any(g.abs().max() > 0 for g in gradients)


@every_objective
def test_padding_changes_nothing(name: str) -> None:
    """Neither the side nor the amount of padding, nor labels that stand at it."""
    model = get_peft_model(made(llama), SemuConfig(target_modules="all-linear", r=2, init_weights=False)).eval()
    batches = [padded(side, more) for side in ("left", "right") for more in (0, 3)]
    for batch in (padded("right", 3), padded("left", 3)):
        batch["labels"] = batch["labels"].where(batch["attention_mask"].bool(), torch.tensor(7))
        batches.append(batch)
    losses = [copy.deepcopy(OBJECTIVES[name])(model, batch).item() for batch in batches]
    assert losses == pytest.approx(losses[:1] * len(losses), rel=1e-5)


def test_the_reference_is_read_the_same_way() -> None:
    """A frozen copy and the model without its adapter give one loss."""
    base = made(llama)
    model = get_peft_model(copy.deepcopy(base), SemuConfig(target_modules="all-linear", r=2, init_weights=False)).eval()
    for objective in (DecoupledDistillation, lambda **kwargs: UnseenConfidence(torch.rand(5), **kwargs)):
        torch.manual_seed(1)
        expected = objective(reference=base)(model, padded("left"))
        torch.manual_seed(1)
        torch.testing.assert_close(objective()(model, padded("left")), expected)


# ---- what cannot be read ----


def test_labels_that_leave_nothing() -> None:
    """All −100 is an error that says what was found; and so is a text of one token."""
    model, batch = made(llama), padded("right")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(ValueError, match="No label of the batch counts: of 15 tokens.*-100"):
        CrossEntropy()(model, batch)
    one = torch.tensor([[4]])
    with pytest.raises(ValueError, match="No label of the batch counts: of 0 tokens"):
        CrossEntropy()(model, {"input_ids": one, "labels": one})


@pytest.mark.parametrize("label", [VOCABULARY, -1, -99])
def test_labels_outside_the_vocabulary(label: int) -> None:
    """Only −100 is no label."""
    model, batch = made(llama), padded("right")
    batch["labels"][0, 3] = label
    with pytest.raises(ValueError, match=rf"must be from 0 to {VOCABULARY - 1}, .*got.*{label}"):
        CrossEntropy()(model, batch)


def test_shapes_that_do_not_fit() -> None:
    """Labels of another length than the logits, for each token or not."""
    model, batch = made(llama), padded("right")
    for labels in (batch["labels"][:, 1:], batch["labels"][:, 0], batch["labels"][..., None]):
        with pytest.raises(ValueError, match=r"\(N, L, classes\) and \(N, L\)"):
            call_model(model, {**batch, "labels": labels})


def test_evaluation_counts_tokens() -> None:
    """`predict` gives one entry a real token."""
    model, batch = made(gpt2), padded("right")
    predictions = predict(model, [batch, padded("left")], progress=False)
    logits, labels = call_model(model, batch)
    assert len(predictions) == 2 * len(labels) == 2 * (3 + 1 + 4)
    assert torch.equal(predictions.labels[: len(labels)], labels)
    torch.testing.assert_close(
        predictions.confidence[: len(labels)], logits.softmax(-1).gather(1, labels[:, None])[:, 0].detach()
    )
