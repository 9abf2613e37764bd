"""Gates before adapters on fused experts and their routers: closed is the base bit for bit, open is the adapter."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers
from models import run
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from semu_peft import SemuConfig
from semu_peft.gates import gated

if Version(transformers.__version__) < Version("5"):
    pytest.skip("experts are layers of their own before transformers 5", allow_module_level=True)

SMALL: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, intermediate_size=24, num_local_experts=4)),
    "qwen": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8
        )
    ),
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROUTER = ["mlp.gate.weight"]
CONFIGS: dict[str, Any] = {
    "semu": lambda where: SemuConfig(target_modules=[], target_parameters=where, r=2, init_weights=False),
    "lora": lambda where: LoraConfig(target_modules=[], target_parameters=where, r=2, init_lora_weights=False),
}
IDS = torch.randint(3, 32, (3, 6), generator=torch.Generator().manual_seed(3))


def mixture(name: str, kind: str, where: list[str], adapters: str = "a") -> PeftModel:
    """A model in which a router's choices and the adapters change what comes out."""
    torch.manual_seed(0)
    model = get_peft_model(MODELS[name]().eval(), CONFIGS[kind](where), adapter_name=adapters[0])
    for adapter in adapters[1:]:
        model.add_adapter(adapter, CONFIGS[kind](where))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key or "semu_core" in key:
                nn.init.normal_(parameter, std=0.5)
            elif parameter.dim() > 1:
                parameter.mul_(8)
    return model.eval()


def weighted(**weights: list[float]) -> Any:
    return lambda model, *args, **kwargs: {name: torch.tensor(each) for name, each in weights.items()}


def outputs(model: PeftModel, **kwargs: Any) -> dict[str, Tensor]:
    found = {}
    for name in model.peft_config:
        model.set_adapter(name)
        found[name] = run(model, **kwargs)
    with model.disable_adapter():
        found["base"] = run(model, **kwargs)
    return found


@pytest.mark.parametrize("where", [EXPERTS, ROUTER, EXPERTS + ROUTER], ids=["experts", "router", "both"])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_closed_is_the_base_and_open_the_adapter(name: str, kind: str, where: list[str]) -> None:
    """Bit for bit where all are closed; each example on its own, though the experts see tokens and not examples."""
    model = mixture(name, kind, where, "ab")
    expected = outputs(model, input_ids=IDS)
    assert all(not torch.allclose(expected[a], expected["base"], atol=1e-2) for a in "ab")
    closed = run(gated(model, weighted(a=[0.0] * 3, b=[0.0] * 3)), input_ids=IDS)
    assert torch.equal(closed, expected["base"])
    mixed = run(gated(model, weighted(a=[1.0, 0.0, 0.0], b=[0.0, 0.0, 1.0])), input_ids=IDS)
    for row, which in enumerate(("a", "base", "b")):
        torch.testing.assert_close(mixed[row], expected[which][row], atol=1e-4, rtol=1e-4)
    assert torch.equal(outputs(model, input_ids=IDS)["base"], expected["base"])


@pytest.mark.parametrize("kind", CONFIGS)
def test_experts_are_one_layer(kind: str) -> None:
    """`y₀ + Σ w_a (y_a − y₀)` of the experts as a whole, although each of their parameters has a wrapper of its own."""
    model = mixture("mixtral", kind, EXPERTS, "ab")
    experts = model.base_model.model.model.layers[0].mlp.experts
    x = torch.randn(3, 16)
    asked = (x, torch.tensor([[0, 1], [2, 3], [1, 3]]), torch.full((3, 2), 0.5))
    alone: dict[str, Tensor] = {}
    with torch.no_grad():
        for name in "ab":
            model.set_adapter(name)
            alone[name] = experts(*asked)
        with model.disable_adapter():
            alone["base"] = experts(*asked)
        weights = {"a": [0.25, 1.0, 0.0], "b": [0.5, 1.0, 0.3]}
        served = gated(model, weighted(**weights))
        closed = served.base.base_model.model.model.layers[0].mlp.experts
        with served.opened({name: torch.tensor(each) for name, each in weights.items()}):
            result = closed(*asked)
    for row in range(3):
        changes = sum(weights[name][row] * (alone[name][row] - alone["base"][row]) for name in "ab")
        torch.testing.assert_close(result[row], alone["base"][row] + changes, atol=1e-5, rtol=1e-4)


def test_a_router_is_on_one_side() -> None:
    """Experts cannot be chosen half-way: up to ½ the base's router chooses and weighs, above it the adapter's."""
    model = mixture("mixtral", "semu", ROUTER)
    expected = outputs(model, input_ids=IDS)
    result = run(gated(model, weighted(a=[0.5, 0.51, 1.0])), input_ids=IDS)
    for row, which in enumerate(("base", "a", "a")):
        torch.testing.assert_close(result[row], expected[which][row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generation(options: dict[str, Any]) -> None:
    model = mixture("qwen", "semu", EXPERTS)
    asked = {"input_ids": IDS[:2], "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    asked |= options
    adapted = model.generate(**asked)
    with model.disable_adapter():
        bare = model.generate(**asked)
    assert not torch.equal(adapted[0], bare[0])
    result = gated(model, weighted(a=[1.0, 0.0])).generate(**asked)
    assert torch.equal(result[0], adapted[0]) and torch.equal(result[1], bare[1])


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_closed_call_does_not_see_an_open_one(kind: str) -> None:
    """The values that an open adapter's experts run with for a moment are not those of a call beside it."""
    model = mixture("mixtral", kind, EXPERTS)
    served = gated(model, lambda model, input_ids: {"a": (input_ids[:, 0] == 5).float()})
    ids = {"a": torch.cat([torch.full((3, 1), 5), IDS], 1), "base": torch.cat([torch.full((3, 1), 4), IDS], 1)}
    expected = {which: outputs(model, input_ids=each)[which] for which, each in ids.items()}
    wrong: list[str] = []

    def serve(which: str) -> None:
        wrong.extend(which for _ in range(8) if not torch.allclose(run(served, input_ids=ids[which]), expected[which]))

    threads = [threading.Thread(target=serve, args=(which,)) for which in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
