"""SEMU behaves as a PEFT method: every entry point, every switch, and the way to disk and back."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VIT, Cnn, Mlp, Snapshot, gpt2, llama, run, sample_input, unet, unet_condition, vit
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor, nn

from semu_peft import (
    SemuConfig,
    SemuLayer,
    SemuModel,
    initialize_semu_weights,
    register,
    save_as_lora,
)
from semu_peft.tuner.adapted import semu_layers

Model = tuple[Callable[[], Any], Any]
MODELS: dict[str, Model] = {
    "mlp": (Mlp, ["fc1", "head"]),
    "cnn": (Cnn, ["conv1", "conv2", "head"]),
    "vit": (vit, rf".*({VIT['query']}|{VIT['up']}|projection)"),
    "gpt2": (gpt2, ["c_attn", "c_proj"]),
    "llama": (llama, "all-linear"),
    "unet_condition": (unet_condition, ["to_q", "conv1", "conv2"]),
}
every_model = pytest.mark.parametrize("name", MODELS)


def config_for(name: str, **options: Any) -> SemuConfig:
    """A configuration with random bases and a random core, as PEFT's own tests use."""
    return SemuConfig(**{"target_modules": MODELS[name][1], "r": 3, "init_weights": False, **options})


def adapted(name: str, **options: Any) -> PeftModel:
    return get_peft_model(MODELS[name][0](), config_for(name, **options)).eval()


def same_model(name: str) -> Any:
    """The model with the same weights at every call."""
    torch.manual_seed(11)
    return MODELS[name][0]().eval()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


# ---- registration ----


def test_registration_is_idempotent() -> None:
    """Registering again changes nothing, and the type is a full member of PEFT's enumeration."""
    members, tuners, configs = list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    register()
    register()
    assert list(PeftType) == members and members.count("SEMU") == 1
    assert tuners == PEFT_TYPE_TO_TUNER_MAPPING and configs == PEFT_TYPE_TO_CONFIG_MAPPING
    semu = PeftType("SEMU")
    assert semu is PeftType.SEMU is PeftType["SEMU"] and isinstance(semu, PeftType)
    assert (semu.name, semu.value, semu) == ("SEMU", "SEMU", "SEMU")
    assert pickle.loads(pickle.dumps(semu)) is semu and copy.deepcopy(semu) is semu
    assert PEFT_TYPE_TO_TUNER_MAPPING[semu] is SemuModel and PEFT_TYPE_TO_CONFIG_MAPPING["SEMU"] is SemuConfig


def test_registration_leaves_lora_alone(tmp_path: Path) -> None:
    """LoRA's type, training, saving and loading are as before."""
    assert PeftType("LORA") is PeftType.LORA and list(PeftType).count("LORA") == 1
    model = get_peft_model(same_model("mlp"), LoraConfig(target_modules=["fc1"], init_lora_weights=False))
    x = sample_input(Mlp())
    expected = run(model, *x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(same_model("mlp"), tmp_path)
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    assert torch.equal(run(loaded, *x), expected)


# ---- wrapping ----


@every_model
def test_get_peft_model(name: str) -> None:
    """Wrapping changes the output, freezes all but the cores, and counts them and their bases."""
    model = MODELS[name][0]()
    x = sample_input(model)
    before, total = run(model, *x), sum(p.numel() for p in model.parameters())
    wrapped = get_peft_model(model, config_for(name))
    layers = semu_layers(wrapped)
    assert len(layers) >= 2
    assert not torch.allclose(run(wrapped, *x), before)
    trainable = {key for key, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert trainable == {f"base_model.model.{key}.semu_core.default.semu_core" for key in layers}
    cores = sum(layer.r["default"] ** 2 for layer in layers.values())
    bases = sum(basis["default"].numel() for layer in layers.values() for basis in (layer.semu_U, layer.semu_V))
    assert wrapped.get_nb_trainable_parameters() == (cores, total + bases + cores)


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT's own printout counts the cores of a per-channel convolution and of a diagonal core."""
    model = adapted("cnn", conv_mode="per_channel", core="diagonal")
    model.print_trainable_parameters()
    trained = 3 * 3 + 4 * 3 + 3
    total = sum(p.numel() for p in model.parameters())
    assert f"trainable params: {trained} || all params: {total:,}" in capsys.readouterr().out


@every_model
@pytest.mark.parametrize("init", ["uninitialised", "weight"])
def test_a_fresh_adapter_is_bit_identical(name: str, init: str) -> None:
    """An adapter that waits for data, or starts from the weight's own basis with a zero core, changes no bit."""
    model = MODELS[name][0]()
    x = sample_input(model)
    before = run(model, *x)
    options = {"r": None, "init_weights": True} if init == "uninitialised" else {"init_weights": "weight"}
    wrapped = get_peft_model(model, config_for(name, **options))
    assert torch.equal(run(wrapped, *x), before)
    assert torch.equal(run(wrapped.merge_and_unload(), *x), before)


@pytest.mark.parametrize("mode", ["flatten", "per_channel"])
def test_weight_initialisation_takes_the_leading_singular_vectors(mode: str) -> None:
    """`init_weights="weight"`: U Uᵀ W V Vᵀ is the best approximation of W of that rank."""
    for layer in semu_layers(adapted("cnn", init_weights="weight", r=2, conv_mode=mode)).values():
        matrix = layer.weight_to_matrix(layer.get_base_layer().weight.detach(), "default")
        left, right = layer.semu_U["default"], layer.semu_V["default"]
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        best = u[..., :2] @ torch.diag_embed(s[..., :2]) @ vh[..., :2, :]
        assert_close(left @ (left.mT @ matrix @ right) @ right.mT, best)


def test_ranks_without_data_are_r_for_every_layer() -> None:
    """A layer's rank does not depend on another layer whose name happens to end like its own."""
    model = nn.Sequential(nn.Linear(2, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    layers = semu_layers(get_peft_model(model, SemuConfig(target_modules="all-linear", r=4, init_weights=False)))
    assert {name: layer.r["default"] for name, layer in layers.items()} == {"0": 2, "1.0": 4, "1.1": 4}


def test_rank_pattern_is_by_full_name() -> None:
    """A given rank belongs to the layer of exactly that name."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    config = SemuConfig(target_modules="all-linear", r=4, init_weights=False, rank_pattern={"0": 2})
    layers = semu_layers(get_peft_model(model, config))
    assert {name: layer.r["default"] for name, layer in layers.items()} == {"0": 2, "1.0": 4}


def test_target_selection() -> None:
    """Target, exclude and layer-index selection follow PEFT."""
    names = lambda **kw: sorted(semu_layers(get_peft_model(llama(), SemuConfig(r=2, init_weights=False, **kw))))  # noqa: E731
    assert names(target_modules=["q_proj"], layers_to_transform=[1]) == ["model.layers.1.self_attn.q_proj"]
    assert names(target_modules=["up_proj"], layers_to_transform=0, layers_pattern="layers") == [
        "model.layers.0.mlp.up_proj"
    ]
    assert names(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"]) == [
        f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    ]
    assert names(target_modules=None) == names(target_modules=["q_proj", "v_proj"])  # PEFT's default for llama
    assert len(names(target_modules="all-linear")) == 14


# ---- switching ----


@every_model
def test_disable_adapter(name: str) -> None:
    """Inside `disable_adapter` the model is the base model to the last bit; afterwards the adapter is back."""
    model = MODELS[name][0]()
    x = sample_input(model)
    before = run(model, *x)
    wrapped = get_peft_model(model, config_for(name))
    with_adapter = run(wrapped, *x)
    with wrapped.disable_adapter():
        assert torch.equal(run(wrapped, *x), before)
    assert torch.equal(run(wrapped, *x), with_adapter)
    assert all(layer.semu_core["default"].requires_grad for layer in semu_layers(wrapped).values())


@every_model
def test_merge_unmerge_and_unload(name: str) -> None:
    """Merging keeps the output, unmerging the weights; `merge_and_unload` and `unload` give back stock modules."""
    wrapped = adapted(name)
    types = {key: type(module) for key, module in MODELS[name][0]().named_modules()}
    x = sample_input(wrapped.get_base_model())
    expected = run(wrapped, *x)
    weights = {key: layer.get_base_layer().weight.clone() for key, layer in semu_layers(wrapped).items()}
    wrapped.merge_adapter(safe_merge=True)
    assert_close(run(wrapped, *x), expected)
    wrapped.unmerge_adapter()
    assert_close(run(wrapped, *x), expected)
    for key, layer in semu_layers(wrapped).items():
        torch.testing.assert_close(layer.get_base_layer().weight.data, weights[key], atol=1e-6, rtol=1e-6)
    merged = copy.deepcopy(wrapped).merge_and_unload(safe_merge=True)
    assert {key: type(module) for key, module in merged.named_modules()} == types
    assert_close(run(merged, *x), expected)


@every_model
def test_unload_gives_the_base_model_back(name: str) -> None:
    """After `unload` names, types, weights and outputs are those from before, bit by bit."""
    model = MODELS[name][0]().eval()
    x = sample_input(model)
    before, output = Snapshot.of(model), run(model, *x)
    restored = get_peft_model(model, config_for(name)).unload()
    before.assert_same(restored, flags=False)
    assert torch.equal(run(restored, *x), output)
    assert not hasattr(restored, "peft_config")


def test_several_adapters() -> None:
    """Add, set, delete: each adapter has its own ranks and layers, and the one that is active decides."""
    model = same_model("mlp")
    x = sample_input(model)
    base = run(model, *x)
    wrapped = get_peft_model(model, config_for("mlp"))
    first = run(wrapped, *x)
    wrapped.add_adapter("other", SemuConfig(target_modules=["fc2", "head"], r=2, init_weights=False))
    assert torch.equal(run(wrapped, *x), first), "adding is not activating"
    wrapped.set_adapter("other")
    other = run(wrapped, *x)
    assert not torch.allclose(other, first) and not torch.allclose(other, base)
    trainable = [key for key, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert trainable and all(key.endswith("semu_core.other.semu_core") for key in trainable)
    wrapped.base_model.set_adapter(["default", "other"])
    both = run(wrapped, *x)
    wrapped.merge_adapter()
    assert_close(run(wrapped, *x), both)
    wrapped.unmerge_adapter()
    wrapped.set_adapter("default")
    assert_close(run(wrapped, *x), first)
    wrapped.delete_adapter("default")
    assert list(wrapped.peft_config) == ["other"]
    assert not [key for key in wrapped.state_dict() if ".default" in key]
    wrapped.set_adapter("other")  # what PEFT makes active differs where the adapters have different layers
    assert_close(run(wrapped, *x), other)
    with pytest.raises(ValueError, match="default"):
        semu_layers(wrapped, "default")


def test_model_status() -> None:
    """PEFT's status report reads the layers."""
    wrapped = adapted("cnn")
    status = wrapped.get_model_status()
    assert (status.adapter_model_type, status.enabled, status.merged_adapters) == ("SemuModel", True, [])
    assert status.num_adapter_layers == 3
    assert wrapped.get_layer_status()[0].requires_grad == {"default": True}


def test_modules_to_save(tmp_path: Path) -> None:
    """A module trained beside the adapter is saved and loaded with it, and the original is kept."""
    wrapped = get_peft_model(same_model("mlp"), config_for("mlp", target_modules=["fc1"], modules_to_save=["head"]))
    head = wrapped.base_model.model.head.modules_to_save["default"]
    assert head.weight.requires_grad
    head.weight.data.add_(1.0)
    x = sample_input(Mlp())
    expected = run(wrapped, *x)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(same_model("mlp"), tmp_path)
    assert torch.equal(run(loaded, *x), expected)
    merged = loaded.merge_and_unload()
    assert type(merged.head) is nn.Linear
    assert_close(run(merged, *x), expected)


# ---- other people's entry points ----


@pytest.mark.parametrize("name", ["vit", "gpt2", "llama"])
def test_transformers_add_and_load_adapter(name: str, tmp_path: Path) -> None:
    """`model.add_adapter`, `save_pretrained` and `load_adapter` of transformers, without a `PeftModel`."""
    model = same_model(name)
    x = sample_input(model)
    before = run(model, *x)
    model.add_adapter(config_for(name))
    expected = run(model, *x)
    assert not torch.allclose(expected, before)
    model.disable_adapters()
    assert torch.equal(run(model, *x), before)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json", ".md"}
    assert torch.equal(run(PeftModel.from_pretrained(same_model(name), tmp_path), *x), expected)
    loaded = same_model(name)
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(run(loaded, *x), expected)


@pytest.mark.parametrize("mode", ["flatten", "per_channel"])
def test_diffusers_add_adapter(mode: str) -> None:
    """`unet.add_adapter`, and PEFT's state dict of it loaded into another U-Net."""
    torch.manual_seed(5)
    first = unet_condition()
    x = sample_input(first)
    second = copy.deepcopy(first)
    before = run(first, *x)
    first.add_adapter(config_for("unet_condition", conv_mode=mode), adapter_name="forget")
    expected = run(first, *x)
    assert not torch.allclose(expected, before)
    state = get_peft_model_state_dict(first, adapter_name="forget")
    assert {key.rsplit(".", 1)[-1] for key in state} == {"semu_U", "semu_V", "semu_core"}
    second.add_adapter(config_for("unet_condition", conv_mode=mode), adapter_name="renamed")
    result = set_peft_model_state_dict(second, state, adapter_name="renamed")
    assert not result.unexpected_keys
    assert torch.equal(run(second, *x), expected)
    second.disable_adapters()
    assert torch.equal(run(second, *x), before)
    second.enable_adapters()
    second.set_adapters(["renamed"], [0.0])
    assert torch.equal(run(second, *x), before)
    second.set_adapters(["renamed"], [1.0])
    assert torch.equal(run(second, *x), expected)


def test_inject_adapter_in_model() -> None:
    """Injection into a bare model, its state dict, and the same into a copy."""
    torch.manual_seed(5)
    first = unet()
    second, x = copy.deepcopy(first), sample_input(first)
    config = SemuConfig(target_modules=["to_q", "conv1"], r=3, init_weights=False)
    assert inject_adapter_in_model(config, first) is first
    state = get_peft_model_state_dict(first)
    inject_adapter_in_model(copy.deepcopy(config), second, low_cpu_mem_usage=True)
    set_peft_model_state_dict(second, state, low_cpu_mem_usage=True)
    assert torch.equal(run(second, *x), run(first, *x))


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_inject_adapter_by_the_keys_of_a_state_dict(prefix: str) -> None:
    """The layers are those that the tensors are named by, whatever the configuration names."""
    model = get_peft_model(same_model("mlp"), SemuConfig(target_modules=["fc1", "head"], r=2, init_weights=False))
    state_dict = get_peft_model_state_dict(model)
    named = {prefix + key.removeprefix("base_model.model."): tensor for key, tensor in state_dict.items()}
    config, bare = SemuConfig(target_modules=["fc1", "head"], r=2, init_weights=False), same_model("mlp")
    inject_adapter_in_model(config, bare, state_dict=named)
    assert sorted(name for name, layer in bare.named_modules() if isinstance(layer, SemuLayer)) == ["fc1", "head"]
    set_peft_model_state_dict(bare, state_dict)
    x = torch.randn(3, 6)
    assert torch.equal(bare.eval()(x), model.eval()(x))
    other = same_model("mlp")
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        inject_adapter_in_model(SemuConfig(target_modules=["fc2"], r=2, init_weights=False), other, state_dict=named)
    assert isinstance(other.fc1, SemuLayer) and not isinstance(other.fc2, SemuLayer)


def test_layers_are_found_in_a_model_that_has_a_child_named_module() -> None:
    """`ranks` has full names also where the base model itself has an attribute `module`."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    wrapped = get_peft_model(Wrapper(), SemuConfig(target_modules=["fc1"], r=2, init_weights=False))
    assert list(semu_layers(wrapped)) == list(wrapped.peft_config["default"].ranks) == ["module.fc1"]


def test_layers_are_found_inside_distributed_wrappers() -> None:
    """`DataParallel` around a `PeftModel` hides nothing."""
    wrapped = adapted("mlp")
    assert semu_layers(nn.DataParallel(wrapped)) == semu_layers(wrapped)


# ---- to disk and back ----


@every_model
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_save_and_load(name: str, low_cpu_mem_usage: bool, core: str, tmp_path: Path) -> None:
    """A reloaded adapter computes the same bits; the folder holds safetensors and nothing pickled."""
    wrapped = get_peft_model(same_model(name), config_for(name, core=core))
    x = sample_input(wrapped.get_base_model())
    expected = run(wrapped, *x)
    wrapped.save_pretrained(tmp_path)
    # Beside them the weights' second name, by which they outlive a save that is cut short.
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".adapter_model.")} == {
        "adapter_model.safetensors", "adapter_config.json", "README.md",
    }  # fmt: skip
    loaded = PeftModel.from_pretrained(same_model(name), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(run(loaded, *x), expected)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert loaded.get_nb_trainable_parameters()[0] == 0
    again = PeftModel.from_pretrained(same_model(name), tmp_path, is_trainable=True)
    assert again.get_nb_trainable_parameters() == wrapped.get_nb_trainable_parameters()


def test_load_adapter_beside_another(tmp_path: Path) -> None:
    """`load_adapter` adds without activating, keeps the first adapter's flags, and takes another name."""
    first = get_peft_model(same_model("cnn"), config_for("cnn"))
    x = sample_input(Cnn())
    saved = run(first, *x)
    first.save_pretrained(tmp_path)
    torch.manual_seed(3)
    second = get_peft_model(same_model("cnn"), config_for("cnn", conv_mode="per_channel", r=2))
    own = run(second, *x)
    second.load_adapter(tmp_path, "loaded")
    assert torch.equal(run(second, *x), own)
    flags = {key: p.requires_grad for key, p in second.named_parameters() if "semu_" in key}
    assert flags == {key: key.endswith("semu_core.default.semu_core") for key in flags}
    second.set_adapter("loaded")
    assert torch.equal(run(second, *x), saved)


def test_uninitialised_adapter_goes_to_disk_and_back(tmp_path: Path) -> None:
    """An adapter without a basis can be saved, loaded, moved, cast, merged; it still changes nothing."""
    wrapped = get_peft_model(same_model("cnn"), SemuConfig(target_modules=["conv1", "head"]))
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(same_model("cnn"), tmp_path, is_trainable=True)
    x = sample_input(Cnn())
    assert torch.equal(run(loaded, *x), run(same_model("cnn"), *x))
    assert not any(layer.is_initialized("default") for layer in semu_layers(loaded).values())
    assert torch.equal(run(loaded.to(torch.float64).float().merge_and_unload(), *x), run(same_model("cnn"), *x))


def test_config_round_trip(tmp_path: Path) -> None:
    """Every field survives JSON, through `SemuConfig` and through `PeftConfig`."""
    config = SemuConfig(
        target_modules=["fc1", "head"], exclude_modules=["fc2"], layers_to_transform=[0, 1], layers_pattern="layers",
        modules_to_save=["head"], explained_variance=0.5, r=4, rank_pattern={"a.b": 2, "c": 0},
        orthogonal_to_weight=True, conv_mode="per_channel", core="diagonal", init_weights="weight",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "adapter_config.json").read_text())
    assert text["peft_type"] == "SEMU" and text["rank_pattern"] == {"a.b": 2, "c": 0}
    for loaded in (SemuConfig.from_pretrained(str(tmp_path)), PeftConfig.from_pretrained(str(tmp_path))):
        assert type(loaded) is SemuConfig
        assert loaded.peft_type is PeftType.SEMU
        assert loaded.to_dict() == config.to_dict()


def test_one_config_for_two_models(tmp_path: Path) -> None:
    """A configuration object can be used again: the second model neither inherits the first one's ranks nor changes
    what the first one saves."""
    config = SemuConfig(target_modules=["fc1", "fc2"], r=5, init_weights=False)
    narrow, wide = nn.Module(), nn.Module()
    for model, size in ((narrow, 2), (wide, 8)):
        model.fc1, model.fc2 = nn.Linear(size, size), nn.Linear(size, size)
    first = get_peft_model(narrow, config)
    second = get_peft_model(wide, config)
    assert {layer.r["default"] for layer in semu_layers(first).values()} == {2}
    assert {layer.r["default"] for layer in semu_layers(second).values()} == {5}
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    PeftModel.from_pretrained(first.unload(), tmp_path / "first")
    PeftModel.from_pretrained(second.unload(), tmp_path / "second")


FRESH_PROCESS = """
import sys, torch, semu_peft
from transformers import AutoModelForImageClassification
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftModel
folder = sys.argv[1]
inputs = torch.load(f"{folder}/inputs.pt", weights_only=True)
base = AutoModelForImageClassification.from_pretrained(f"{folder}/vit")
models = {
    "vit": PeftModel.from_pretrained(base, f"{folder}/vit_adapter"),
    "vit_auto": AutoPeftModel.from_pretrained(f"{folder}/vit_adapter"),
    "gpt2": AutoPeftModelForCausalLM.from_pretrained(f"{folder}/gpt2_adapter"),
}
with torch.no_grad():
    outputs = {name: model.eval()(inputs[name.removesuffix("_auto")]).logits for name, model in models.items()}
torch.save(outputs, f"{folder}/outputs.pt")
"""


def test_a_fresh_process_computes_the_same(tmp_path: Path) -> None:
    """Another process, with the base folder and the adapter folder and nothing else, gives the same output."""
    expected, inputs = {}, {}
    for name, options in (("vit", {}), ("gpt2", {"task_type": "CAUSAL_LM"})):
        same_model(name).save_pretrained(tmp_path / name)
        base = type(same_model(name)).from_pretrained(tmp_path / name)
        wrapped = get_peft_model(base, config_for(name, **options))
        inputs[name] = sample_input(base)[0]
        expected[name] = run(wrapped, inputs[name])
        wrapped.save_pretrained(tmp_path / f"{name}_adapter")
    torch.save(inputs, tmp_path / "inputs.pt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, str(tmp_path)], check=True, env=environment, cwd=tmp_path)
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    for name, output in outputs.items():
        torch.testing.assert_close(output, expected[name.removesuffix("_auto")], atol=1e-6, rtol=1e-6)


def test_auto_peft_model(tmp_path: Path) -> None:
    """`AutoPeftModel` and `AutoPeftModelForCausalLM` find base and adapter from the adapter folder."""
    for name, auto, options in (
        ("vit", AutoPeftModel, {}),
        ("llama", AutoPeftModelForCausalLM, {"task_type": "CAUSAL_LM"}),
    ):
        same_model(name).save_pretrained(tmp_path / name)
        base = type(same_model(name)).from_pretrained(tmp_path / name)
        wrapped = get_peft_model(base, config_for(name, **options))
        x = sample_input(base)
        expected = run(wrapped, *x)
        wrapped.save_pretrained(tmp_path / f"{name}_adapter")
        assert torch.equal(run(auto.from_pretrained(tmp_path / f"{name}_adapter"), *x), expected)


# ---- precision ----


@pytest.mark.parametrize("init_weights", [False, "weight"])
def test_adapter_is_float32_in_a_bfloat16_model(init_weights: bool | str, tmp_path: Path) -> None:
    """Bases stay orthonormal to float32 in a bfloat16 model, at creation and after a round trip."""

    def base() -> nn.Module:
        return same_model("vit").to(torch.bfloat16)

    wrapped = get_peft_model(base(), config_for("vit", init_weights=init_weights))
    x = (sample_input(vit())[0].bfloat16(),)
    expected = run(wrapped, *x)
    assert expected.dtype == torch.bfloat16
    wrapped.save_pretrained(tmp_path)
    for model in (wrapped, PeftModel.from_pretrained(base(), tmp_path)):
        assert torch.equal(run(model, *x), expected)
        for layer in semu_layers(model).values():
            assert layer.semu_core["default"].dtype == torch.float32
            for basis in (layer.semu_U["default"], layer.semu_V["default"]):
                torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[-1]), atol=1e-5, rtol=0)


def test_autocast_adapter_dtype_false(tmp_path: Path) -> None:
    """`autocast_adapter_dtype=False` keeps the adapter in the model's dtype, as PEFT defines it."""

    def base() -> nn.Module:
        return same_model("vit").to(torch.bfloat16)

    wrapped = get_peft_model(base(), config_for("vit"), autocast_adapter_dtype=False)
    x = (sample_input(vit())[0].bfloat16(),)
    expected = run(wrapped, *x)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(run(loaded, *x), expected)
    for model in (wrapped, loaded):
        for layer in semu_layers(model).values():
            tensors = (layer.semu_U["default"], layer.semu_V["default"], layer.semu_core["default"])
            assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


def test_autocast_adapter_dtype_false_is_kept() -> None:
    """Also by the bases that the forget data give, and the adapter trains on."""
    base = nn.Sequential(nn.Linear(8, 4)).to(torch.bfloat16)
    model = get_peft_model(base, SemuConfig(target_modules=["0"]), autocast_adapter_dtype=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    batch = torch.randn(4, 8, dtype=torch.bfloat16)
    initialize_semu_weights(model, [batch], lambda m, b: m(b).float().square().mean(), progress=False)
    model(batch).float().square().mean().backward()
    optimizer.step()
    layer = semu_layers(model)["0"]
    tensors = (layer.semu_U["default"], layer.semu_V["default"], layer.semu_core["default"])
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16} and tensors[2].any()


def test_disable_input_dtype_casting() -> None:
    """PEFT's switch for models whose hooks cast: there is nothing to switch off, and the output is the same."""
    model = adapted("cnn").to(torch.float32)
    x = sample_input(Cnn())[0]
    expected = run(model, x)
    with disable_input_dtype_casting(model):
        assert torch.equal(run(model, x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moving_the_whole_model_to_another_dtype(dtype: torch.dtype) -> None:
    """`model.to(dtype)` takes the adapter along, and the model still runs."""
    wrapped = adapted("cnn", conv_mode="per_channel").to(dtype)
    assert run(wrapped, sample_input(Cnn())[0].to(dtype)).dtype == dtype


def test_models_can_be_copied() -> None:
    """A deep copy computes the same and shares nothing."""
    wrapped = adapted("cnn")
    x = sample_input(Cnn())
    twin = copy.deepcopy(wrapped)
    assert torch.equal(run(twin, *x), run(wrapped, *x))
    for layer in semu_layers(twin).values():
        layer.semu_core["default"].data.zero_()
    assert not torch.equal(run(twin, *x), run(wrapped, *x))


# ---- beside other methods ----


def test_on_top_of_lora() -> None:
    """A SEMU adapter injected over a LoRA adapter adds to it, for linear layers and both readings of a convolution."""
    for mode in ("flatten", "per_channel"):
        model = same_model("cnn").double()
        x = (sample_input(model)[0].double(),)
        lora = LoraConfig(target_modules=["conv1", "head"], init_lora_weights=False, r=2)
        model = inject_adapter_in_model(lora, model, "lora")
        before = run(model, *x)
        model = inject_adapter_in_model(config_for("cnn", target_modules=["conv1", "head"], conv_mode=mode), model)
        layers = [module for module in model.modules() if isinstance(module, SemuLayer)]
        assert len(layers) == 2
        assert not torch.allclose(run(model, *x), before)
        for layer in layers:
            layer.semu_core["default"].data.zero_()
        assert torch.equal(run(model, *x), before)


def test_generation() -> None:
    """`generate` runs through the adapter."""
    wrapped = adapted("gpt2", task_type="CAUSAL_LM")
    tokens = wrapped.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens.shape == (1, 6)


def test_trainable_token_indices(tmp_path: Path) -> None:
    """Rows of the embedding, trained beside the cores: saved, loaded by PEFT and transformers, merged, exported."""
    wrapped = get_peft_model(same_model("llama"), config_for("llama", trainable_token_indices=[1, 5]))
    x = sample_input(wrapped.get_base_model())
    x[0][0, :2] = torch.tensor([1, 5])
    rows = [parameter for name, parameter in wrapped.named_parameters() if "trainable_tokens_delta" in name]
    assert [tuple(parameter.shape) for parameter in rows] == [(2, 16)] and rows[0].requires_grad
    before = run(wrapped, *x)
    rows[0].data.add_(1.0)
    expected = run(wrapped, *x)
    assert not torch.allclose(expected, before)
    wrapped.save_pretrained(tmp_path / "semu")
    save_as_lora(wrapped, tmp_path / "lora")
    for folder in ("semu", "lora"):
        assert_close(run(PeftModel.from_pretrained(same_model("llama"), tmp_path / folder), *x), expected)
    loaded = same_model("llama")
    loaded.load_adapter(str(tmp_path / "semu"))
    assert torch.equal(run(loaded, *x), expected)
    merged = wrapped.merge_and_unload()
    assert type(merged.model.embed_tokens) is nn.Embedding
    assert_close(run(merged, *x), expected)
    with pytest.raises(ValueError, match="trainable_token_indices"):
        again = PeftModel.from_pretrained(same_model("llama"), tmp_path / "semu")
        again.add_weighted_adapter(["default"], [1.0], "sum")


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("semu_only", 2), ("all", 3)])
def test_bias(bias: str, count: int, tmp_path: Path) -> None:
    """As in LoRA: which biases are trained, that they are saved and loaded, and that they outlast the adapter."""
    wrapped = get_peft_model(same_model("mlp"), config_for("mlp", bias=bias))
    biases = [p for name, p in wrapped.named_parameters() if name.endswith("bias") and p.requires_grad]
    assert len(biases) == count
    for parameter in biases:
        parameter.data.add_(0.5)
    x = sample_input(Mlp())
    expected = run(wrapped, *x)
    wrapped.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(same_model("mlp"), tmp_path), *x), expected)
    assert torch.equal(run(wrapped.unload(), *x), run(same_model("mlp"), *x)) == (bias == "none")
    if bias != "none":
        twice = get_peft_model(same_model("mlp"), config_for("mlp", bias=bias))
        with pytest.raises(ValueError, match="only 1 adapter with bias"):
            twice.add_adapter("second", config_for("mlp", bias=bias))


def test_layers_by_index() -> None:
    """`layers_to_transform` and `layers_pattern` choose among equal names."""
    for options, index in (
        ({"layers_to_transform": 1}, "1"),
        ({"layers_to_transform": [0], "layers_pattern": "h"}, "0"),
    ):
        wrapped = get_peft_model(gpt2(), SemuConfig(target_modules=["c_attn"], r=2, init_weights=False, **options))
        assert list(semu_layers(wrapped)) == [f"transformer.h.{index}.attn.c_attn"]


def test_default_targets() -> None:
    """Without `target_modules` PEFT's table for the architecture decides, as for LoRA."""
    wrapped = get_peft_model(llama(), SemuConfig(r=2, init_weights=False))
    assert {name.rsplit(".", 1)[-1] for name in semu_layers(wrapped)} == {"q_proj", "v_proj"}
