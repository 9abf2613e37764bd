"""What is peculiar to corrected parameters: fused experts, several of them in one module, names and places in files."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Snapshot, run
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from semu_peft import SemuConfig, initialize_semu_weights, objectives, rerank, save_as_lora, to_lora, unlearn
from semu_peft.tuner import ParamWrapper
from semu_peft.tuner.adapted import semu_layers

SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
    "num_key_value_heads": 1, "vocab_size": 32, "max_position_embeddings": 16, "num_experts_per_tok": 2,
}  # fmt: skip
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
PARAMETERS = [f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in EXPERTS]


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=5))


def qwen() -> nn.Module:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=5, moe_intermediate_size=12, decoder_sparse_step=1))


def gpt_oss() -> nn.Module:
    """The one whose experts are stored transposed, with biases."""
    return GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=5))


FAMILIES = {"mixtral": mixtral, "qwen": qwen, "gpt_oss": gpt_oss}
every_family = pytest.mark.parametrize("family", FAMILIES)


def fresh(family: str) -> nn.Module:
    torch.manual_seed(3)
    model = FAMILIES[family]()
    if not any("experts.gate_up_proj" in name for name, _ in model.named_parameters()):
        pytest.skip(f"transformers before 5 keeps the experts of {family} in layers of their own")
    for name, parameter in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(32, (2, 4), generator=torch.Generator().manual_seed(seed))


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def adapted(family: str, **options: Any) -> PeftModel:
    settings = {"target_modules": [], "target_parameters": EXPERTS, "r": 3, "init_weights": False, **options}
    model = get_peft_model(fresh(family), SemuConfig(**settings)).eval()
    for layer in semu_layers(model).values():
        layer.semu_core["default"].data.mul_(4)
    return model


@every_family
def test_each_expert_has_the_bases_of_its_own_gradient(family: str) -> None:
    """For every expert U and V span its own ∇W's leading directions; one that saw no token stays as it is."""
    reference, ids = fresh(family), tokens()[:1, :2]  # two tokens, of five experts each meets two
    loss(reference, ids).backward()
    model = get_peft_model(
        fresh(family), SemuConfig(target_modules=[], target_parameters=EXPERTS, explained_variance=0.6)
    )
    expected_output = run(reference, ids)
    assert torch.equal(run(model, ids), expected_output)
    profile = initialize_semu_weights(model, [ids], loss, progress=False)
    assert list(profile.ranks) == list(semu_layers(model)) and set(profile.ranks) == set(PARAMETERS)
    assert torch.equal(run(model, ids), expected_output)
    unseen = 0
    for name, layer in semu_layers(model).items():
        gradient, rank = reference.get_parameter(name).grad, profile.ranks[name]
        left, values, right = torch.linalg.svd(gradient, full_matrices=False)
        assert layer.semu_core["default"].shape == (5, rank, rank)
        for expert in range(5):
            if not gradient[expert].any():
                unseen += 1
                continue
            if values[expert, rank - 1] < 1.01 * values[expert, rank:].max():
                continue  # no gap, no one subspace
            for basis, own in ((layer.semu_U, left), (layer.semu_V, right.mT)):
                mine, theirs = basis["default"][expert], own[expert, :, :rank]
                torch.testing.assert_close(mine @ mine.mT, theirs @ theirs.mT, atol=2e-3, rtol=0)
    assert unseen > 0


@every_family
def test_training_reaches_the_cores_of_the_experts_in_use_alone(family: str) -> None:
    """∂L/∂R of expert e is U_eᵀ G_e V_e with G the gradient at the merged model."""
    model, ids = adapted(family), tokens()
    merged = copy.deepcopy(model).merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    loss(merged, ids).backward()
    loss(model, ids).backward()
    for name, layer in semu_layers(model).items():
        gradient = merged.get_parameter(name).grad
        expected = layer.semu_U["default"].mT @ gradient @ layer.semu_V["default"]
        torch.testing.assert_close(layer.semu_core["default"].grad, expected, atol=1e-5, rtol=1e-3)
        assert layer.base_weight.grad is None and isinstance(layer.base_weight, nn.Parameter)


@every_family
def test_saved_loaded_merged_disabled_exported(family: str, tmp_path: Path) -> None:
    """All ways of shipping compute the same, with and without semu's own loading, and silently."""
    model, ids = adapted(family), tokens()
    plain, expected = run(fresh(family), ids), run(model, ids)
    assert (expected - plain).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.equal(run(model, ids), plain)
    model.save_pretrained(tmp_path / "semu")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        loaded = PeftModel.from_pretrained(fresh(family), tmp_path / "semu")
    assert torch.equal(run(loaded, ids), expected)
    integrated = fresh(family)
    integrated.load_adapter(tmp_path / "semu")
    assert torch.equal(run(integrated, ids), expected)
    save_as_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(fresh(family), tmp_path / "lora")
    torch.testing.assert_close(run(lora, ids), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(run(lora.merge_and_unload(), ids), expected, atol=1e-5, rtol=0)
    model.merge_adapter()
    assert torch.equal(run(model, ids), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(run(model, ids), expected, atol=1e-5, rtol=0)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, ParamWrapper) for module in merged.modules())
    torch.testing.assert_close(run(merged, ids), expected, atol=1e-5, rtol=0)
    assert merged.state_dict().keys() == fresh(family).state_dict().keys()


def test_ranks_that_differ_come_back(tmp_path: Path) -> None:
    """A rank for each parameter, also 0 for one of two in a module, survives saving, loading and the LoRA."""
    model, ids = adapted("mixtral"), tokens()
    layers = semu_layers(model)
    for name, rank in zip(PARAMETERS, (2, 0, 1, 3), strict=True):
        layer = layers[name]
        layer.set_basis(
            "default",
            layer.semu_U["default"][..., :rank],
            layer.semu_V["default"][..., :rank],
            torch.randn(5, rank, rank),
        )
    model.peft_config["default"].init_weights = True
    expected = run(model, ids)
    model.save_pretrained(tmp_path / "semu")
    loaded = PeftModel.from_pretrained(fresh("mixtral"), tmp_path / "semu")
    assert {name: layer.r["default"] for name, layer in semu_layers(loaded).items()} == dict(
        zip(PARAMETERS, (2, 0, 1, 3), strict=True)
    )
    assert torch.equal(run(loaded, ids), expected)
    lora = PeftModel.from_pretrained(fresh("mixtral"), save_as_lora(model, tmp_path / "lora"))
    torch.testing.assert_close(run(lora, ids), expected, atol=1e-5, rtol=0)


def test_rerank_by_expert() -> None:
    """Cutting to rank 1 keeps each expert's leading direction."""
    model = adapted("mixtral")
    before = {name: layer.get_delta_weight("default").detach() for name, layer in semu_layers(model).items()}
    rerank(model, r=1)
    for name, layer in semu_layers(model).items():
        left, values, right = torch.linalg.svd(before[name], full_matrices=False)
        best = left[..., :1] * values[:, None, :1] @ right[:, :1]
        torch.testing.assert_close(layer.get_delta_weight("default").detach(), best, atol=1e-5, rtol=0)


def test_two_adapters_side_by_side_and_stacked() -> None:
    """A second adapter joins the same wrappers; switched and stacked, they compute as their merged weights do."""
    model, ids = adapted("mixtral"), tokens()
    model.add_adapter("other", SemuConfig(target_modules=[], target_parameters=EXPERTS, r=2, init_weights=False))
    assert all(set(layer.semu_core) == {"default", "other"} for layer in semu_layers(model).values())
    assert sum(isinstance(module, ParamWrapper) for module in model.modules()) == 4
    for names in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(run(model, ids), run(merged, ids), atol=1e-5, rtol=0)
    model.delete_adapter("default")
    model.set_adapter("other")
    with pytest.raises(ValueError, match="same `target_parameters`"):
        model.add_adapter(
            "third", SemuConfig(target_modules=[], target_parameters=EXPERTS[:1], r=2, init_weights=False)
        )


def test_layers_and_parameters_in_one_adapter() -> None:
    """`target_modules` and `target_parameters` go together, the router being a parameter of two dimensions."""
    model = adapted("mixtral", target_modules=["q_proj"], target_parameters=["gate.weight", "experts.down_proj"])
    kinds = [type(layer).__name__ for layer in semu_layers(model).values()]
    assert kinds == ["Linear", "ParamWrapper", "ParamWrapper"] * 2
    assert semu_layers(model)["model.layers.0.mlp.gate.weight"].semu_core["default"].shape == (3, 3)
    ids = tokens()
    expected = run(model, ids)
    torch.testing.assert_close(run(model.merge_and_unload(), ids), expected, atol=1e-5, rtol=0)


def test_training_before_initialisation() -> None:
    model = get_peft_model(fresh("mixtral"), SemuConfig(target_modules=[], target_parameters=EXPERTS))
    with pytest.raises(RuntimeError, match="initialize_semu_weights"):
        loss(model, tokens()).backward()


def test_gradient_checkpointing() -> None:
    """Recomputed in the backward pass, the experts are the corrected ones."""
    model, ids = adapted("mixtral"), tokens()
    loss(model, ids).backward()
    expected = {name: layer.semu_core["default"].grad.clone() for name, layer in semu_layers(model).items()}
    model.zero_grad()
    model.base_model.model.gradient_checkpointing_enable()
    loss(model.train(), ids).backward()
    for name, layer in semu_layers(model).items():
        torch.testing.assert_close(layer.semu_core["default"].grad, expected[name])


def test_no_choice_of_adapter_by_example() -> None:
    model = adapted("mixtral")
    experts = model.base_model.model.model.layers[0].mlp.experts
    with pytest.raises(ValueError, match="adapter_names"):
        experts(torch.zeros(1, 16), adapter_names=["default"])


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.conv = nn.Conv2d(4, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2)
        self.top = nn.Parameter(torch.zeros(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) @ self.top


@pytest.mark.parametrize("wrap", [get_peft_model, lambda m, c: inject_adapter_in_model(c, m)])
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target_parameters": ["top"]}, ValueError, "'top'.*top-level"),
        ({"target_parameters": ["fc.bias"]}, TypeError, r"'fc.bias'.*shape \(4,\)"),
        ({"target_parameters": ["conv.weight"]}, TypeError, "'conv.weight'.*target_modules"),
        ({"target_parameters": ["attention.out_proj.weight"]}, TypeError, "MultiheadAttention"),
        ({"target_modules": ["fc"], "target_parameters": ["fc.weight"]}, ValueError, "'fc'.*target_modules=\\[\\]"),
        ({"target_parameters": ["nothing"]}, ValueError, "target_parameters"),
    ],
)
def test_what_cannot_be_corrected(wrap: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    """It is refused by name, and the model is as it was."""
    model = Odd()
    before = Snapshot.of(model)
    with pytest.raises(error, match=words):
        wrap(model, SemuConfig(**{"target_modules": [], **options}))
    before.assert_same(model)


def test_target_parameters_must_be_a_list() -> None:
    with pytest.raises(TypeError, match="`target_parameters`.*list"):
        SemuConfig(target_parameters="experts.down_proj")  # type: ignore[arg-type]


def test_a_file_for_another_architecture_leaves_the_model_whole(tmp_path: Path) -> None:
    """Loading experts of other sizes is refused, and the wrappers are gone again."""
    adapted("mixtral").save_pretrained(tmp_path)
    torch.manual_seed(3)
    other = MixtralForCausalLM(MixtralConfig(**{**SIZES, "intermediate_size": 20}, num_local_experts=5))
    before = Snapshot.of(other)
    with pytest.raises(ValueError, match="does not fit"):
        PeftModel.from_pretrained(other, tmp_path)
    before.assert_same(other)


def test_a_single_transposed_expert_has_no_lora() -> None:
    class Single(nn.Module):
        is_transposed = True

        def __init__(self) -> None:
            super().__init__()
            self.bank = nn.Parameter(torch.randn(1, 4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.bank[0]

    model = get_peft_model(
        nn.Sequential(Single()),
        SemuConfig(target_modules=[], target_parameters=["0.bank"], r=2, init_weights=False),
    )
    with pytest.raises(ValueError, match="'0.bank'.*merge_and_unload"):
        to_lora(model)


class Mixing(nn.Module):
    """Reads its parameters where they lie: in a list, in a dictionary, past a layer, and past a table that it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.entries = nn.Embedding(20, 6), nn.ParameterList([torch.randn(6, 6) for _ in range(2)])
        self.named = nn.ParameterDict({"left": torch.randn(6, 6)})
        self.inner = nn.Linear(6, 6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.items(tokens).mean(1) @ self.entries[0]
        for entry in self.entries:
            hidden = torch.tanh(hidden @ entry)
        hidden = hidden @ self.named["left"] + sum(hidden @ value for value in self.named.values())
        hidden = nn.functional.linear(hidden, self.inner.weight, self.inner.bias)
        return hidden @ self.items.weight.T  # scores of all items, as in matrix factorisation


@pytest.mark.parametrize(
    "targets",
    [["entries.0"], ["entries.0", "entries.1"], ["named.left"], ["inner.weight"], ["items.weight"],
     ["entries.1", "named.left", "inner.weight", "items.weight"]],
)  # fmt: skip
def test_whoever_reads_a_corrected_parameter_gets_the_correction(targets: list[str]) -> None:
    torch.manual_seed(0)
    base, tokens = Mixing().eval(), torch.randint(20, (8, 4))
    batches, before = [(tokens, torch.randint(20, (8,)))], base(tokens).detach()
    objective = objectives.RandomLabel()
    model = get_peft_model(base, SemuConfig(target_modules=[], target_parameters=targets))
    initialize_semu_weights(model, batches, objective, progress=False)
    unlearn(model, batches, objective, epochs=3, learning_rate=3e-2, progress=False)
    cores = [layer.semu_core["default"] for layer in semu_layers(model).values()]
    assert len(cores) == len(targets) and all(core.any() for core in cores)
    trained = model(tokens).detach()
    with model.disable_adapter():
        assert torch.equal(model(tokens), before)
    assert torch.allclose(model.merge_and_unload()(tokens), trained, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_by_their_parameters(kind: Any) -> None:
    torch.manual_seed(0)
    base = nn.Sequential()
    base.recurrent, base.pick = kind(6, 5, batch_first=True), First()
    x = torch.randn(4, 3, 6)
    with pytest.raises(
        TypeError, match=r"'recurrent'.*target_parameters=\['recurrent.weight_ih_l0', 'recurrent.weight_"
    ):
        get_peft_model(base, SemuConfig(target_modules=["recurrent"]))
    names = ["recurrent.weight_ih_l0", "recurrent.weight_hh_l0"]
    model = get_peft_model(base, SemuConfig(target_modules=[], target_parameters=names))
    batches, objective = [(x, torch.arange(4))], objectives.GradientAscent()
    initialize_semu_weights(model, batches, objective, progress=False)
    unlearn(model, batches, objective, progress=False)
    trained = model(x).detach()
    assert all(layer.semu_core["default"].any() for layer in semu_layers(model).values())
    assert torch.allclose(model.merge_and_unload()(x), trained, atol=1e-6)


class First(nn.Module):
    """The last step of what a recurrent layer gives."""

    def forward(self, output: Any) -> torch.Tensor:
        return output[0][:, -1]
