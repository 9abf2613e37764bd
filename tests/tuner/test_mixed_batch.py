"""Each example of a batch through an adapter of its own, as `adapter_names` of PEFT's models says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import VIT, Cnn, Mlp, gpt2, llama, run, sample_input, t5, vit
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from semu_peft import SemuConfig

MODELS: dict[str, tuple[Any, list[str], list[str]]] = {
    "mlp": (Mlp, ["fc1", "head"], ["fc2"]),
    "cnn": (Cnn, ["conv1", "head"], ["conv1", "conv2"]),
    "vit": (vit, [VIT["query"], VIT["up"]], ["projection", VIT["down"]]),
    "gpt2": (gpt2, ["c_attn"], ["c_attn", "c_proj"]),
    "llama": (llama, ["q_proj", "up_proj"], ["up_proj"]),
}


def with_two(name: str, **options: Any) -> PeftModel:
    base, first, second = MODELS[name]
    model = get_peft_model(base(), SemuConfig(target_modules=first, r=2, init_weights=False), adapter_name="a")
    model.add_adapter("b", SemuConfig(target_modules=second, r=3, init_weights=False, **options))
    return model.eval()


def batch_of(model: PeftModel, size: int) -> Tensor:
    x = sample_input(model.get_base_model())[0]
    return x.repeat(size, *(1 for _ in x.shape[1:]))[:size]


@pytest.mark.parametrize("name", MODELS)
def test_each_row_is_the_one_of_its_adapter(name: str) -> None:
    """Rows equal those of a whole batch through that adapter, or through the bare model."""
    model = with_two(name, **({"conv_mode": "per_channel"} if name == "cnn" else {}))
    x = batch_of(model, 6)
    expected = {}
    for adapter in ("a", "b"):
        model.set_adapter(adapter)
        expected[adapter] = run(model, x)
    with model.disable_adapter():
        expected["__base__"] = run(model, x)
    assert not torch.allclose(expected["a"], expected["b"])
    names = ["b", "__base__", "a", "a", "b", "__base__"]
    mixed = run(model, x, adapter_names=names)
    for row, adapter in enumerate(names):
        torch.testing.assert_close(mixed[row], expected[adapter][row], atol=1e-5, rtol=1e-5)
    assert torch.equal(run(model, x), expected["b"]), "the hooks are gone"


def test_generate_with_beams() -> None:
    """`generate` repeats the names with the beams, in the decoder alone."""
    for base, targets in ((gpt2, ["c_attn"]), (t5, ["q", "v", "wo"])):
        torch.manual_seed(1)
        model = get_peft_model(base(), SemuConfig(target_modules=targets, r=4, init_weights=False), adapter_name="a")
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=20.0)
        tokens = torch.randint(3, 32, (2, 5))
        options = {"num_beams": 2, "do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
        model.eval()
        adapted = model.generate(input_ids=tokens, **options)
        with model.disable_adapter():
            bare = model.generate(input_ids=tokens, **options)
        mixed = model.generate(input_ids=tokens, adapter_names=["a", "__base__"], **options)
        assert not torch.equal(adapted[0], bare[0])
        assert torch.equal(mixed[0], adapted[0]) and torch.equal(mixed[1], bare[1])


def test_a_saved_module_takes_part() -> None:
    """`modules_to_save` of each adapter is used for its rows."""
    torch.manual_seed(0)
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"], r=2, init_weights=False), adapter_name="a")
    config = SemuConfig(target_modules=["fc1"], r=2, init_weights=False, modules_to_save=["head"])
    model.add_adapter("b", config)
    model.base_model.model.head.modules_to_save["b"].weight.data.mul_(3)
    x = batch_of(model, 2)
    model.set_adapter("b")
    expected = run(model, x)
    torch.testing.assert_close(run(model, x, adapter_names=["__base__", "b"])[1], expected[1])


def test_refused() -> None:
    """What LoRA refuses is refused: unknown names, train mode, a wrong count, merged adapters."""
    model = with_two("mlp")
    x = batch_of(model, 2)
    with pytest.raises(ValueError, match="non-existing adapter.*c"):
        model(x, adapter_names=["a", "c"])
    with pytest.raises(ValueError, match="same as the number of inputs.*3 and 2"):
        model(x, adapter_names=["a", "a", "b"])
    with pytest.raises(TypeError, match="adapter_names"):
        model(x, adapter_names="a")
    with pytest.raises(ValueError, match="training mode"):
        model.train()(x, adapter_names=["a", "b"])
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(x, adapter_names=["a", "b"])
    assert not any(module._forward_pre_hooks for module in model.modules())
