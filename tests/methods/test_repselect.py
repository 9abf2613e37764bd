"""RepSelect's sentence is the paper's procedure, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Mlp, vector_batches
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from semu_peft import methods
from semu_peft.objectives import CrossEntropy
from semu_peft.training.rules.leading import without_leading

TARGETS = ["fc1", "fc2"]


def model() -> nn.Module:
    torch.manual_seed(3)
    return Mlp()


def elicited_gradients(rate: float) -> tuple[nn.Module, dict[str, Tensor]]:
    """By hand: one epoch of SGD on a LoRA, whose rate falls linearly, then the mean gradient with the LoRA in place."""
    base = model()
    peft = get_peft_model(base, LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS)).eval()
    batches = vector_batches(3)
    trained = [p for p in peft.parameters() if p.requires_grad]
    for number, batch in enumerate(batches):
        gradients = torch.autograd.grad(CrossEntropy()(peft, batch), trained)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.sub_(gradient, alpha=rate * (1 - number / len(batches)))
    weights = {name: peft.base_model.model.get_submodule(name).get_base_layer().weight for name in TARGETS}
    for weight in weights.values():
        weight.requires_grad_(True)
    loss = sum(CrossEntropy()(peft, batch) for batch in batches) / len(batches)
    found = torch.autograd.grad(loss, list(weights.values()))
    return peft.unload(), dict(zip(weights, found, strict=True))


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_the_weights_take_the_papers_step_and_the_lora_is_gone(mode: Any) -> None:
    expected, gradients = elicited_gradients(0.5)
    changed = model()
    changed.fc1.bias.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in changed.parameters()]
    model()  # so that the LoRA is drawn at the same place of the generator
    result = methods.repselect(
        changed, vector_batches(3), target_modules=TARGETS, learning_rate=0.3, elicitation_rate=0.5, rank=2, mode=mode,
        progress=False,
    )  # fmt: skip
    assert result.steps == 1 and changed.state_dict().keys() == expected.state_dict().keys()
    assert [parameter.requires_grad for parameter in changed.parameters()] == flags
    for name, weight in expected.named_parameters():
        layer = name.removesuffix(".weight")
        moved = dict(changed.named_parameters())[name] - weight
        if layer in gradients:
            torch.testing.assert_close(moved, 0.3 * without_leading(gradients[layer], 2, mode), atol=1e-6, rtol=1e-3)
        else:
            assert not moved.any()


def test_a_failure_leaves_no_lora_behind() -> None:
    failing = model()
    bad = [(torch.full((4, 6), float("nan")), torch.zeros(4, dtype=torch.int64))]
    before = {name: value.clone() for name, value in failing.state_dict().items()}
    with pytest.raises(ValueError, match="loss"):
        methods.repselect(failing, bad, target_modules=TARGETS, learning_rate=0.1, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in failing.state_dict().items())
