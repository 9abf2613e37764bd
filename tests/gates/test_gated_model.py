"""Adapters behind a gate: closed is the base bit for bit, open is the adapter, each example on its own."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CLASSES, VIT, Cnn, Mlp, gpt2, llama, run, t5, vit
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from semu_peft import SemuConfig
from semu_peft.gates import GATE_FILE, GatedModel, HiddenStates, Intervention, Nearest, gated
from semu_peft.objectives.original import original

CONFIGS: dict[str, Any] = {
    "semu": lambda targets: SemuConfig(target_modules=targets, r=2, init_weights=False),
    "lora": lambda targets: LoraConfig(target_modules=targets, r=2, init_lora_weights=False),
    "dora": lambda targets: LoraConfig(target_modules=targets, r=2, init_lora_weights=False, use_dora=True),
    "ia3": lambda targets: IA3Config(target_modules=targets, feedforward_modules=[], init_ia3_weights=False),
}
MODELS: dict[str, tuple[Any, list[str], tuple[int, ...]]] = {
    "mlp": (Mlp, ["fc1", "head"], (6,)),
    "cnn": (Cnn, ["conv1", "head"], (3, 8, 8)),
    "vit": (vit, [VIT["query"], VIT["down"]], (3, 8, 8)),
}


class Fixed:
    """A gate that gives the weights that it was told."""

    def __init__(self, **weights: list[float]) -> None:
        self.weights = {name: torch.tensor(each) for name, each in weights.items()}
        self.calls = 0

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        self.calls += 1
        return self.weights


def with_adapters(base: nn.Module, targets: list[str], *kinds: str) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(base, CONFIGS[kinds[0]](targets), adapter_name="a")
    for name in ["b", "c"][: len(kinds) - 1]:
        model.add_adapter(name, CONFIGS[kinds[0]](targets))
    return model.eval()


def outputs(model: PeftModel, *inputs: Any, **kwargs: Any) -> dict[str, Tensor]:
    """By adapter the output of the whole batch, and that of the base model."""
    found = {}
    for name in model.peft_config:
        model.set_adapter(name)
        found[name] = run(model, *inputs, **kwargs)
    with model.disable_adapter():
        found["base"] = run(model, *inputs, **kwargs)
    return found


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_each_example_is_what_is_open_for_it(name: str, kind: str) -> None:
    """Closed rows equal the base's bit for bit, whatever the others are; open rows equal the adapter's."""
    if kind == "ia3" and name == "cnn":
        pytest.skip("PEFT has no (IA)³ for grouped convolutions beside linear layers")
    base, targets, shape = MODELS[name]
    torch.manual_seed(3)
    model, x = with_adapters(base(), targets, kind, kind), torch.randn(5, *shape)
    expected = outputs(model, x)
    assert not torch.allclose(expected["a"], expected["b"]) and not torch.allclose(expected["a"], expected["base"])
    gate = Fixed(a=[0, 1, 0, 0, 1], b=[0, 0, 1, 0, 0])
    result = run(gated(model, gate), x)
    for row, which in enumerate(["base", "a", "b", "base", "a"]):
        if which == "base":
            assert torch.equal(result[row], expected["base"][row])
        torch.testing.assert_close(result[row], expected[which][row], atol=1e-5, rtol=1e-5)
    closed = gated(model, Fixed(a=[0.0] * 5, b=[0.0] * 5))
    assert torch.equal(run(closed, x), expected["base"])
    assert torch.equal(run(model, x), expected["b"]), "outside, the model is what it was"


def test_weights_between_and_several_at_once() -> None:
    """In one layer: `W x + Σ w_a ΔW_a x`, with any weights."""
    torch.manual_seed(0)
    model, x = with_adapters(nn.Sequential(nn.Linear(6, 5)), ["0"], "lora", "lora"), torch.randn(3, 6)
    layer = model.base_model.model[0]
    a, b = (layer.get_delta_weight(name).detach() for name in ("a", "b"))
    weights = {"a": [0.25, 1.0, 0.0], "b": [0.5, 1.0, 0.3]}
    result = run(gated(model, Fixed(**weights)), x)
    for row in range(3):
        dense = layer.base_layer.weight + weights["a"][row] * a + weights["b"][row] * b
        torch.testing.assert_close(result[row], x[row] @ dense.mT + layer.base_layer.bias)


def test_other_adapters_stay_on_and_injected_ones_work() -> None:
    """An adapter that is not behind the gate is part of the base; a model without PEFT's wrapper will do."""
    torch.manual_seed(0)
    bare, x = Mlp().eval(), torch.randn(2, 6)
    inject_adapter_in_model(CONFIGS["lora"](["fc1"]), bare, adapter_name="style")
    styled = run(bare, x)
    inject_adapter_in_model(CONFIGS["semu"](["fc2"]), bare, adapter_name="request")
    for module in bare.modules():
        if hasattr(module, "set_adapter"):
            module.set_adapter([name for name in ("style", "request") if name in module._get_available_adapters()])
    both = run(bare, x)
    assert not torch.allclose(both, styled)
    result = run(gated(bare, Fixed(request=[1, 0])), x)
    torch.testing.assert_close(result[0], both[0])
    assert torch.equal(result[1], styled[1])


def test_a_start_that_splits_the_weight_has_the_original_when_closed() -> None:
    """PiSSA takes its start out of the base weight; closed is the model before it was put in all the same."""
    torch.manual_seed(0)
    bare, x = Mlp().eval(), torch.randn(2, 6)
    before = run(bare, x)
    model = get_peft_model(bare, LoraConfig(target_modules=["fc1"], r=2, init_lora_weights="pissa"), adapter_name="a")
    closed = GatedModel(model, Fixed(a=[0, 1]))
    torch.testing.assert_close(run(closed, x), before)
    with torch.no_grad():
        model.base_model.model.fc1.lora_B["a"].weight.add_(0.3)
    trained, result = run(model, x), run(closed, x)
    torch.testing.assert_close(result[0], before[0])
    torch.testing.assert_close(result[1], trained[1])


@pytest.mark.parametrize("kind", ["semu", "lora"])
def test_modules_to_save_are_gated_too(kind: str) -> None:
    config = CONFIGS[kind](["fc1"])
    config.modules_to_save = ["head"]
    model, x = get_peft_model(Mlp(), config, adapter_name="a").eval(), torch.randn(2, 6)
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["a"].weight.mul_(3)
    expected = outputs(model, x)
    result = run(gated(model, Fixed(a=[1, 0])), x)
    torch.testing.assert_close(result[0], expected["a"][0])
    assert torch.equal(result[1], expected["base"][1])


GENERATE: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}


def strong(base: nn.Module, targets: list[str], kind: str) -> PeftModel:
    """A model whose adapter changes what it says."""
    torch.manual_seed(1)
    model = get_peft_model(base, CONFIGS[kind](targets), adapter_name="a").eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "semu_core" in name:
            nn.init.normal_(parameter, std=20.0)
    return model


@pytest.mark.parametrize("kind", ["semu", "lora"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generation_takes_one_decision_for_each_prompt(name: str, kind: str, options: dict[str, Any]) -> None:
    """Each row is generated as by the adapter or the base, with and without a cache and with beams; asked once."""
    makes = {"gpt2": (gpt2, ["c_attn"]), "llama": (llama, ["q_proj", "up_proj"]), "t5": (t5, ["q", "v", "wo"])}
    base, targets = makes[name]
    torch.manual_seed(1)
    model, tokens = strong(base(), targets, kind), torch.randint(3, 32, (2, 5))
    options = GENERATE | options
    adapted = model.generate(input_ids=tokens, **options)
    with model.disable_adapter():
        bare = model.generate(input_ids=tokens, **options)
    assert not torch.equal(adapted[0], bare[0])
    gate = Fixed(a=[1, 0])
    result = gated(model, gate).generate(input_ids=tokens, **options)
    assert torch.equal(result[0], adapted[0]) and torch.equal(result[1], bare[1])
    assert gate.calls == 1


def test_a_decision_goes_with_its_cache() -> None:
    """Calls that hand on a cache keep its prompt's decision, two conversations side by side."""
    torch.manual_seed(0)
    model, tokens = strong(llama(), ["q_proj", "up_proj"], "semu"), torch.randint(3, 32, (2, 6))
    gate = Fixed(a=[1, 0])
    wrapped = gated(model, gate)
    whole = run(wrapped, tokens)
    first = wrapped(tokens[:, :4], use_cache=True)
    gate.weights = {"a": torch.tensor([0.0, 0.0])}
    other = wrapped(tokens[:, :4], use_cache=True)
    after = wrapped(tokens[:, 4:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(after, whole[:, 4:], atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        bare = run(model, tokens)
    continued = wrapped(tokens[:, 4:], past_key_values=other.past_key_values).logits
    torch.testing.assert_close(continued, bare[:, 4:], atol=1e-4, rtol=1e-4)
    foreign = model(tokens[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`past_key_values` must be a cache that a call of this GatedModel"):
        wrapped(tokens[:, 4:], past_key_values=foreign)


def test_two_threads_have_decisions_of_their_own() -> None:
    torch.manual_seed(0)
    model = with_adapters(Mlp(), ["fc1", "head"], "semu")
    x = torch.randn(2, 6)
    x[:, 0] = x[:, 0].abs()
    inputs = {"a": x, "base": -x}
    expected = {name: outputs(model, each)[name] for name, each in inputs.items()}
    wrapped = gated(model, lambda base, x: {"a": (x[:, 0] > 0).float()})
    wrong: list[str] = []

    def serve(which: str) -> None:
        wrong.extend(which for _ in range(30) if not torch.equal(wrapped(inputs[which]), expected[which]))

    threads = [threading.Thread(target=serve, args=(which,)) for which in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_original_of_a_gated_model_has_the_adapter_gone() -> None:
    model, x = with_adapters(Mlp(), ["fc1"], "semu"), torch.randn(2, 6)
    expected = outputs(model, x)
    wrapped = gated(model, Fixed(a=[1, 1]))
    with original(wrapped, "a") as reference:
        assert torch.equal(run(reference, x), expected["base"])
    torch.testing.assert_close(run(wrapped, x), expected["a"])


def test_new_values_modes_and_requests_are_seen() -> None:
    """Training goes on in the model, it is moved, and a request joins: the gated model follows."""
    model, x = with_adapters(Mlp(), ["fc1", "head"], "semu", "semu"), torch.randn(2, 6)
    gate = Fixed(a=[1, 0])
    wrapped = gated(model, gate)
    run(wrapped, x)
    with torch.no_grad():
        model.base_model.model.fc1.semu_core.stored_parameter("a").mul_(3)
    gate.weights["b"] = torch.tensor([0.0, 1.0])
    wrapped.double()
    expected = outputs(model, x.double())
    result = run(wrapped, x.double())
    torch.testing.assert_close(result[0], expected["a"][0])
    torch.testing.assert_close(result[1], expected["b"][1])
    assert {parameter.dtype for parameter in wrapped.parameters()} <= {torch.float64, torch.float32}


def test_saved_beside_the_adapters(tmp_path: Path) -> None:
    model, x = with_adapters(Mlp(), ["fc1"], "semu"), torch.randn(4, 6)
    gate = Nearest("fc2").add("a", model, [x[:2]])
    wrapped = gated(model, gate)
    expected = run(wrapped, x)
    wrapped.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = with_adapters(Mlp(), ["fc1"], "semu")
    again.load_state_dict(model.state_dict())
    assert torch.equal(run(gated(again, Nearest.load(tmp_path / GATE_FILE)), x), expected)
    with pytest.raises(TypeError, match="`gate` must be one that can be saved"):
        gated(model, lambda base, x: {}).save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_mistakes_are_told() -> None:
    model, x = with_adapters(Mlp(), ["fc1"], "semu"), torch.randn(2, 6)
    with pytest.raises(ValueError, match=r"`adapter_names` must be adapters of the model, got \['z'\]"):
        gated(model, Fixed(z=[1, 1]))
    with pytest.raises(TypeError, match="`gate` must be a gate"):
        gated(model, 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`adapter_names` must be a list of names"):
        gated(model, Fixed(a=[1, 1]), "a")
    for weights, message in (
        ({"a": torch.tensor([0.5, float("nan")])}, r"`gate` must give weights in \[0, 1\]"),
        ({"a": torch.ones(2, 1)}, r"`gate` must give one weight for each example"),
        ({"a": 1.0}, "`gate` must give tensors"),
        ({"a": torch.ones(2), "y": torch.ones(2)}, "`gate` must give weights of the adapters"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            gated(model, lambda base, x, given=weights: given, ["a"])(x)


def test_layers_that_put_the_batch_elsewhere_are_refused() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    model = with_adapters(Turned(), ["inner"], "semu")
    with pytest.raises(ValueError, match="Put the batch first"):
        gated(model, Fixed(a=[1, 0]))(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="Put the batch first"):
        gated(model, Fixed(a=[1, 0]))(torch.randn(2, 4, 4))


def test_what_the_gate_sees_is_the_original() -> None:
    """States are those without the gated adapters, padding on either side changes nothing, and no cache is touched."""
    torch.manual_seed(0)
    model, tokens = strong(gpt2(), ["c_attn"], "semu"), torch.randint(3, 32, (1, 5))
    look = HiddenStates("transformer.ln_f", pool="last")
    seen: list[Tensor] = []

    def gate(base: nn.Module, **inputs: Any) -> dict[str, Tensor]:
        seen.append(look(base, **inputs)[0][:, 0])
        return {"a": torch.ones(len(inputs["input_ids"]))}

    wrapped = gated(model, gate)
    pad = torch.zeros(1, 2, dtype=torch.long)
    rows = {"left": torch.cat([pad, tokens], 1), "right": torch.cat([tokens, pad], 1), "none": tokens}
    for ids in rows.values():
        wrapped(input_ids=ids, attention_mask=(ids != 0).long(), use_cache=True)
    with model.disable_adapter():
        expected = model(tokens, output_hidden_states=True).hidden_states[-1][:, -1]
    for state in seen:
        torch.testing.assert_close(state, expected, atol=1e-5, rtol=1e-5)
    assert isinstance(wrapped, Intervention) and wrapped.config is model.config
