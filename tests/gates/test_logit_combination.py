"""Two models with one voice: by hand, with and without a cache, with beams, and an assistant that costs no memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import gpt2, llama, run, t5
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from semu_peft import objectives, unlearn
from semu_peft.gates import LogitCombination, truncated
from semu_peft.objectives.original import without_adapter

GENERATE: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}


def pair(make: Any = llama) -> tuple[nn.Module, nn.Module]:
    """Two models that differ, sharp enough to have something to say."""
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(make())
        with torch.no_grad():
            made[-1].get_output_embeddings().weight.mul_(20)
    return made[0], made[1]


def test_the_equations() -> None:
    """`z − w a`; w 0 is the model bit for bit; a constant assistant changes no probability; ReLU lowers what grew."""
    torch.manual_seed(0)
    model, other, x = nn.Linear(4, 6), nn.Linear(4, 6), torch.randn(3, 4)
    z, a = run(model, x), run(other, x)
    torch.testing.assert_close(run(LogitCombination(model, other, 0.75), x), z - 0.75 * a)
    assert torch.equal(run(LogitCombination(model, other, 0.0), x), z)
    assert torch.equal(run(LogitCombination(model, other, 0.0, relu=True, filter=0.1), x), z)
    constant = nn.Linear(4, 6).double()
    nn.init.zeros_(constant.weight)
    nn.init.constant_(constant.bias, 7.0)
    combined = LogitCombination(model.double(), constant, 0.75)
    before = run(model, x.double()).softmax(-1)
    torch.testing.assert_close(run(combined, x.double()).softmax(-1), before, atol=1e-6, rtol=0)
    reinforced = run(LogitCombination(model.float(), other, 2.0, relu=True), x)
    grew = a > z
    torch.testing.assert_close(reinforced, torch.where(grew, z - 2 * (a - z), z))
    assert torch.equal(reinforced[~grew], z[~grew]) and (reinforced[grew] < z[grew]).all()
    assert torch.equal(run(LogitCombination(model, model, 2.0, relu=True), x), z), "reinforced = base"


def test_the_filter_leaves_unlikely_tokens_alone() -> None:
    """With p ≥ filter · max p: of probabilities .6, .3, .1 and a filter of .4 the first two count."""
    z = torch.tensor([[0.6, 0.3, 0.1]]).log()
    combined = LogitCombination(nn.Identity(), nn.Identity(), 0.5, filter=0.4)
    other = torch.tensor([[2.0, 4.0, 6.0]])
    torch.testing.assert_close(combined.combine(z, other, torch.ones(1)), z - torch.tensor([[1.0, 2.0, 0.0]]))


def test_only_rows_on_which_the_gate_opens() -> None:
    torch.manual_seed(0)
    model, other, x = nn.Linear(4, 6), nn.Linear(4, 6), torch.randn(3, 4)
    gate = lambda base, x: {"a": torch.tensor([0.0, 1.0, 0.5])}  # noqa: E731
    result, z, a = run(LogitCombination(model, other, 1.0, gate=gate), x), run(model, x), run(other, x)
    assert torch.equal(result[0], z[0])
    torch.testing.assert_close(result[1:], torch.stack([z[1] - a[1], z[2] - 0.5 * a[2]]))


def greedy(combined: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Tokens written without a cache, one whole pass a token."""
    for _ in range(GENERATE["max_new_tokens"]):
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        logits = run(combined, input_ids=ids, attention_mask=mask, position_ids=places)[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_generation_with_a_cache_is_generation_without(make: Any, relu: bool) -> None:
    """Also from prompts padded on the left; and it is not what the model says alone."""
    model, other = pair(make)
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(5 if relu else 1)
    combined = LogitCombination(model, other, 1.5, relu=relu, filter=None if relu else 0.01)
    ids, mask = torch.randint(3, 32, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    mask[1, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = greedy(combined, ids, mask)
    model.generation_config.eos_token_id = None
    with_cache = combined.generate(**inputs, **GENERATE)
    assert torch.equal(with_cache, combined.generate(**inputs, **GENERATE, use_cache=False))
    assert torch.equal(with_cache, expected)
    assert not torch.equal(with_cache, model.generate(**inputs, **GENERATE))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_take_both_caches_along(options: dict[str, Any]) -> None:
    model, other = pair()
    model.generation_config.eos_token_id = None
    combined, ids = LogitCombination(model, other, 1.5), torch.randint(3, 32, (2, 5))
    asked = {"input_ids": ids, **GENERATE, **options}
    assert torch.equal(combined.generate(**asked), combined.generate(**asked, use_cache=False))


def test_calls_that_hand_on_a_cache() -> None:
    model, other = pair()
    combined, ids = LogitCombination(model, other, 1.5), torch.randint(3, 32, (2, 6))
    whole = run(combined, ids)
    first = combined(ids[:, :4], use_cache=True)
    after = combined(ids[:, 4:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(after, whole[:, 4:], atol=1e-3, rtol=1e-4)


def test_the_loss_is_that_of_both() -> None:
    model, other = pair()
    ids = torch.randint(3, 32, (2, 6))
    output = LogitCombination(model, other, 1.5)(input_ids=ids, labels=ids)
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


def test_an_encoder_decoder_goes_without_a_cache() -> None:
    model, other = pair(t5)
    combined, ids = LogitCombination(model, other, 1.5), torch.randint(3, 32, (2, 5))
    with pytest.raises(ValueError, match="`use_cache` must be False"):
        combined.generate(input_ids=ids, **GENERATE)
    assert combined.generate(input_ids=ids, use_cache=False, **GENERATE).shape == (2, 7)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_an_assistant_of_the_first_layers_shares_them(make: Any) -> None:
    """It computes what a model of so many layers computes; a LoRA in it is not in the model; ULD trains it."""
    torch.manual_seed(0)
    model = make()
    ids = torch.randint(3, 32, (2, 6))
    before, states = run(model, ids), model(ids, output_hidden_states=True).hidden_states
    short = truncated(model, layers=1)
    count = {id(parameter) for parameter in short.parameters()} - {id(parameter) for parameter in model.parameters()}
    assert not count
    norm = model.model.norm if make is llama else model.transformer.ln_f
    torch.testing.assert_close(run(short, ids), model.get_output_embeddings()(norm(states[1])).detach())
    targets = ["q_proj", "down_proj"] if make is llama else ["c_attn"]
    assistant = get_peft_model(short, LoraConfig(target_modules=targets, r=4, task_type="CAUSAL_LM"))
    forget = {"input_ids": ids, "labels": ids}
    result = unlearn(assistant, [forget], objectives.CrossEntropy(), learning_rate=0.1, max_steps=10, progress=False)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert torch.equal(run(model, ids), before)
    combined = LogitCombination(model, assistant.eval(), 0.75)
    logits = [run(each, ids)[:, :-1].flatten(0, 1) for each in (model, combined)]
    nll = [nn.functional.cross_entropy(each, ids[:, 1:].flatten()) for each in logits]
    assert nll[1] > nll[0]
    model.generation_config.eos_token_id = None
    asked = {"input_ids": ids, **GENERATE}
    assert torch.equal(combined.generate(**asked), combined.generate(**asked, use_cache=False))


def test_the_reinforced_model_may_be_an_adapter_of_the_same_one() -> None:
    """Who's Harry Potter in one model: the adapter off is the base, on the reinforced one."""
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    ids = torch.randint(3, 32, (2, 5))
    z = run(without_adapter(model), ids)
    combined = LogitCombination(without_adapter(model), model, 2.0, relu=True)
    torch.testing.assert_close(run(combined, ids), z - 2 * (run(model, ids) - z).relu())


def test_mistakes_are_told() -> None:
    with pytest.raises(TypeError, match="`assistant` must be a model"):
        LogitCombination(nn.Linear(2, 2), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`layers` must be at most the model's 2, got 5"):
        truncated(llama(), layers=5)
    model, other = pair()
    combined, ids = LogitCombination(model, other), torch.randint(3, 32, (1, 4))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`past_key_values` must be a cache"):
        combined(ids, past_key_values=cache)
    with pytest.raises(TypeError, match="`model` must be the model itself"):
        LogitCombination(combined, other)
