"""SIU's masked divergence and SafeEraser's decoupled questions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from language_batches import padded
from models import llama
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from semu_peft import Retain, methods, unlearn
from semu_peft.objectives import AlternateAnswer, CrossEntropy, GradientAscent, KLToOriginal


class Uniform(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_the_divergence_without_some_classes_by_hand() -> None:
    """Acceptance: with none it is the whole one; those left out have no gradient; what is left is a divergence."""
    logits, labels = torch.tensor([[2.0, 1.0, 0.5]], requires_grad=True), torch.tensor([0])
    whole, masked = (
        KLToOriginal(reference=Uniform(), without=without)(nn.Identity(), (logits, labels)) for without in ([], [0])
    )
    assert whole == KLToOriginal(reference=Uniform())(nn.Identity(), (logits, labels))
    rest = logits[:, 1:].log_softmax(-1)
    torch.testing.assert_close(masked, -(0.5 * rest).sum() - torch.log(torch.tensor(2.0)))
    (gradient,) = torch.autograd.grad(masked, logits)
    assert gradient[0, 0] == 0 and gradient[0, 1:].all()
    # The published sum over what is left, of (0.9, 0.1) and (0.95, 0.05), is below zero; here nothing is left to say.
    told = torch.log(torch.tensor([[0.95, 0.05]]))
    original = nn.Module()
    original.forward = lambda x: torch.log(torch.tensor([[0.9, 0.1]]))  # type: ignore[method-assign]
    assert KLToOriginal(reference=original, without=[1])(nn.Identity(), (told, labels)).item() == 0.0


@pytest.mark.parametrize(("without", "error"), [([3], ValueError), ([0, 1, 2], ValueError), ("0", TypeError)])
def test_classes_that_cannot_be_left_out(without: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`without` must"):
        KLToOriginal(reference=Uniform(), without=without)(nn.Identity(), (torch.zeros(1, 3), torch.tensor([0])))


def tuned() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(llama(), LoraConfig(r=4, target_modules=["down_proj", "up_proj"]))


def pairs() -> dict[str, Tensor]:
    return padded() | {f"alternate_{name}": value for name, value in padded(seed=5).items()}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return CrossEntropy()(model.eval(), batch).item()


def test_siu_learns_new_answers_and_keeps_the_rest() -> None:
    """In a few steps the new answer is likelier, and what the model says of other text stays within 5%."""
    model, batch, other = tuned(), padded(), padded(seed=9)
    batch["token_mask"] = torch.zeros_like(batch["labels"], dtype=torch.bool)
    before, beside = loss(model, batch), loss(model, other)
    methods.siu(model, [batch], concept_tokens=[3, 4], max_steps=6, learning_rate=3e-2, progress=False)
    assert loss(model, batch) < before - 0.02 and loss(model, other) == pytest.approx(beside, rel=0.05)


def llava() -> nn.Module:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = LlamaConfig(**{**small, "hidden_size": 32, "num_hidden_layers": 2}, vocab_size=32)
    vision = CLIPVisionConfig(**small, image_size=8, patch_size=4)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=31, vision_feature_layer=-1)
    linears = LoraConfig(r=4, target_modules=r".*language_model.*(down|up)_proj")
    return get_peft_model(LlavaForConditionalGeneration(config), linears)


def test_siu_changes_what_is_said_of_an_image() -> None:
    """Acceptance: six steps on one image change the answer to it, and the loss of text alone stays within 5%."""
    model, other = llava(), {key: value for key, value in padded(seed=9).items() if key != "token_mask"}
    ids = torch.tensor([[31] * 4 + [5, 6, 7, 9, 10]])  # four patches, a question, and the new answer
    labels = ids.clone()
    labels[:, :7] = -100
    image = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": image, "labels": labels}

    def said() -> int:
        with torch.no_grad():
            return int(model.eval()(input_ids=ids[:, :7], pixel_values=image).logits[0, -1].argmax())

    before, beside = said(), loss(model, other)
    masked = batch | {"token_mask": torch.zeros_like(ids, dtype=torch.bool)}
    methods.siu(model, [masked], concept_tokens=[3, 4], max_steps=6, learning_rate=3e-2, progress=False)
    assert before != 9 and said() == 9
    assert loss(model, other) == pytest.approx(beside, rel=0.05)


def test_the_second_answer_is_learnt_from_the_same_batch() -> None:
    """Acceptance: a harmless partner cannot be parted from its question, as both are one batch."""
    model, batch = tuned().eval(), pairs()
    expected = CrossEntropy()(model, padded(seed=5))
    torch.testing.assert_close(AlternateAnswer()(model, batch), expected)


def test_safe_eraser_without_decoupling_is_gradient_difference() -> None:
    """Acceptance: with a weight of 0 it is GD, bit for bit; with it, the partners' answers are kept."""
    retain, said = [padded(seed=7)], {"max_steps": 8, "learning_rate": 1e-2, "progress": False}
    plain, zero, some = tuned(), tuned(), tuned()
    unlearn(plain, [pairs()], GradientAscent(), retain=Retain(retain, CrossEntropy(), 0.5), **said)
    methods.safe_eraser(zero, [pairs()], retain, decoupling=0.0, **said)
    methods.safe_eraser(some, [pairs()], retain, **said)
    for first, second in zip(plain.parameters(), zero.parameters(), strict=True):
        assert torch.equal(first, second)
    assert loss(some, padded(seed=5)) < loss(plain, padded(seed=5))
    assert loss(some, padded()) > loss(tuned(), padded())
