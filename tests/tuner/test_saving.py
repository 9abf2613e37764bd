"""What is written to disk, and what comes back from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from models import VIT, Cnn, Mlp, clip_text, gpt2, llama, run, sample_input, unet, unet_condition, vit
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn

from semu_peft import SemuConfig, rerank
from semu_peft.tuner.adapted import semu_layers

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"


def seeded(make: Any) -> Any:
    torch.manual_seed(11)
    return make().eval()


def adapted(make: Any = Cnn, targets: Any = None, **options: Any) -> PeftModel:
    settings = {"target_modules": targets or make.targets, "r": 3, "init_weights": False, **options}
    return get_peft_model(seeded(make), SemuConfig(**settings)).eval()


# ---- names of adapters ----

NAMES = [("default", "1"), ("0", "1"), ("self_attn", "model"), ("semu_core", "semu_U"), ("weight", "base_layer")]


@pytest.mark.parametrize("names", NAMES, ids="-".join)
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"save_dtype": "bfloat16"}], ids=str)
def test_an_adapter_may_be_called_as_a_part_of_the_model(
    names: tuple[str, str], options: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT takes out of a file every tensor with the name of another adapter in its own, as in `layers.1`."""
    config = SemuConfig(target_modules=["q_proj"], r=2, init_weights=False, **options)
    model, x = get_peft_model(seeded(llama), config, names[0]), torch.tensor([[3, 4, 5]])
    model.add_adapter(names[1], SemuConfig(target_modules=["q_proj"], r=3, init_weights=False))
    model.save_pretrained(tmp_path)
    beside = PeftModel.from_pretrained(seeded(llama), folder_of(tmp_path, names[0]), names[0])
    beside.load_adapter(folder_of(tmp_path, names[1]), names[1])
    for name in names:
        alone = PeftModel.from_pretrained(seeded(llama), folder_of(tmp_path, name))
        model.set_adapter(name)
        beside.set_adapter(name)
        expected = model(x).logits
        assert torch.equal(beside(x).logits, alone(x).logits)
        torch.testing.assert_close(alone(x).logits, expected, atol=1e-3 if "save_dtype" in options else 0, rtol=0)


def folder_of(folder: Path, name: str) -> Path:
    return folder if name == "default" else folder / name


def test_biases_of_a_layer_with_the_name_of_an_adapter(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    model = get_peft_model(seeded(make), SemuConfig(target_modules=["0"], r=2, init_weights=False, bias="all"))
    model.add_adapter("1", SemuConfig(target_modules=["0"], r=2, init_weights=False))
    model.base_model.model[1].bias.data += 1
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(PeftModel.from_pretrained(seeded(make), tmp_path, "1")(x), model(x))


# ---- the dtype on disk ----


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("conv_mode", ["flatten", "per_channel"])
def test_save_dtype(dtype: Any, low_cpu_mem_usage: bool, conv_mode: str, tmp_path: Path) -> None:
    """Bases are rounded on disk and orthonormal in float32 once loaded; the correction is within the rounding."""
    model = adapted(save_dtype=dtype, conv_mode=conv_mode)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        dtypes = {key.rsplit(".", 1)[-1]: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert dtypes == {
        "semu_U": getattr(torch, dtype), "semu_V": getattr(torch, dtype), "semu_core": torch.float32,
    }  # fmt: skip
    assert all(layer.semu_U["default"].dtype == torch.float32 for layer in semu_layers(model).values())
    loaded = PeftModel.from_pretrained(seeded(Cnn), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert loaded.peft_config["default"].save_dtype == dtype
    bound = {"bfloat16": 1e-2, "float16": 1e-3, "float32": 1e-6}[dtype]
    for name, layer in semu_layers(loaded).items():
        for basis in (layer.semu_U["default"], layer.semu_V["default"]):
            assert basis.dtype == torch.float32
            identity = torch.eye(basis.shape[-1]).expand(*basis.shape[:-2], -1, -1)
            torch.testing.assert_close(basis.mT @ basis, identity, atol=1e-5, rtol=0)
        wanted = semu_layers(model)[name].get_delta_weight("default")
        assert (layer.get_delta_weight("default") - wanted).norm() <= bound * wanted.norm()


def test_save_dtype_of_an_adapter_without_a_basis(tmp_path: Path) -> None:
    """What waits for its data still waits, and does nothing."""
    model = get_peft_model(
        seeded(Mlp), SemuConfig(target_modules=["fc1"], rank_pattern={"fc1": 2}, save_dtype="float16")
    )
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(seeded(Mlp), tmp_path)
    assert not semu_layers(loaded)["fc1"].is_initialized("default")
    assert torch.equal(run(loaded, *sample_input(Mlp())), run(seeded(Mlp), *sample_input(Mlp())))


def test_save_dtype_through_transformers(tmp_path: Path) -> None:
    """Transformers' own loader takes the bases as they are on disk: the output is within the rounding."""
    model = adapted(llama, "all-linear", save_dtype="bfloat16")
    x = sample_input(model.get_base_model())
    expected = run(model, *x)
    model.save_pretrained(tmp_path)
    loaded = seeded(llama)
    loaded.load_adapter(str(tmp_path))
    error = (run(loaded, *x) - expected).norm() / (expected - run(seeded(llama), *x)).norm()
    assert 0 < error < 2e-2


# ---- versions of the configuration ----


def test_an_adapter_from_before_a_field_was_added(tmp_path: Path) -> None:
    """A file without the newer fields loads with their defaults."""
    model = adapted()
    x = sample_input(Cnn())
    expected = run(model, *x)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    for name in ("bias", "trainable_token_indices", "save_dtype", "init_weights", "core", "conv_mode"):
        del values[name]
    (tmp_path / CONFIG).write_text(json.dumps(values))
    loaded = PeftModel.from_pretrained(seeded(Cnn), tmp_path)
    assert torch.equal(run(loaded, *x), expected)
    assert loaded.peft_config["default"].bias == "none"


def test_an_adapter_from_a_later_version(tmp_path: Path) -> None:
    """A field that this version does not know is passed over with a warning that names it."""
    model = adapted()
    x = sample_input(Cnn())
    expected = run(model, *x)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text()) | {"field_of_tomorrow": 1}
    (tmp_path / CONFIG).write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="field_of_tomorrow"):
        loaded = PeftModel.from_pretrained(seeded(Cnn), tmp_path)
    assert torch.equal(run(loaded, *x), expected)


# ---- the files themselves ----

CLEAN = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}  # not what other tests leave in the environment

SAVE = """
import sys, torch, semu_peft
sys.path.insert(0, sys.argv[1])
from models import VIT, Cnn, unet
from peft import get_peft_model
from semu_peft import SemuConfig
torch.manual_seed(0)
config = SemuConfig(target_modules=["head", "conv1", "conv2"], exclude_modules=["x", "y", "z"], r=3, init_weights=False)
get_peft_model(Cnn(), config).save_pretrained(sys.argv[2])
"""


@pytest.mark.slow
def test_files_are_the_same_for_the_same_weights(tmp_path: Path) -> None:
    """Every file is the same byte for byte, from another process with other hash seeds and after loading."""
    tests = str(Path(__file__).parent.parent)
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SAVE, tests, str(tmp_path / seed)], check=True,
            env={**CLEAN, "PYTHONHASHSEED": seed},
        )  # fmt: skip
    PeftModel.from_pretrained(Cnn(), tmp_path / "1", is_trainable=True).save_pretrained(tmp_path / "3")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert (tmp_path / "1" / WEIGHTS).read_bytes() == (tmp_path / "3" / WEIGHTS).read_bytes()


PEAK = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, semu_peft
from torch import nn
from peft import PeftModel, get_peft_model
from semu_peft import SemuConfig
from semu_peft.tuner.adapted import semu_layers
folder, size, rank, count = sys.argv[1], 2048, 1024, 8

def base():
    with torch.device("meta"):  # no memory of its own
        return nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(count)))

def memory(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) / 1024

pattern = {str(index): rank for index in range(count)}
config = SemuConfig(target_modules="all-linear", ranks=pattern)
if len(sys.argv) > 2:
    from safetensors.torch import save_file
    tensors = {}
    for index in range(count):
        for kind, shape in (("U", (size, rank)), ("V", (size, rank)), ("core", (rank, rank))):
            tensors[f"base_model.model.{index}.semu_{kind}.semu_{kind}"] = torch.eye(*shape)
    save_file(tensors, f"{folder}/adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
else:
    PeftModel.from_pretrained(nn.Sequential(nn.Linear(2, 2)), folder + "/warm-up", low_cpu_mem_usage=True)
    model = base()
    before = memory("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    model = PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True)
    for layer in semu_layers(model).values():  # read it all
        assert sum(part["default"].sum() for part in (layer.semu_U, layer.semu_V, layer.semu_core)) > 0
    print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
def test_loading_does_not_double_the_memory(tmp_path: Path) -> None:
    """With `low_cpu_mem_usage` the file is mapped into memory and its tensors are used where they are."""
    warm_up = get_peft_model(nn.Sequential(nn.Linear(2, 2)), SemuConfig(target_modules=["0"], r=1, init_weights=False))
    warm_up.save_pretrained(tmp_path / "warm-up")
    subprocess.run([sys.executable, "-c", PEAK, str(tmp_path), "write"], check=True, env=CLEAN)
    size = (tmp_path / WEIGHTS).stat().st_size / 2**20
    assert size > 150
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    # glibc raises this threshold as it goes, and what is freed below it may or may not go back to the system.
    returns = {**CLEAN, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=returns)
    assert float(done.stdout) < 1.6 * size, done.stdout


def test_model_card(tmp_path: Path) -> None:
    """The card says what the adapter is and how to load it; a card that somebody wrote is kept."""
    seeded(vit).save_pretrained(tmp_path / "vit")
    base = type(seeded(vit)).from_pretrained(tmp_path / "vit")
    model = get_peft_model(base, SemuConfig(target_modules=[VIT["query"], VIT["up"]], r=3, init_weights=False))
    model.save_pretrained(tmp_path / "forget-ships")
    path = tmp_path / "forget-ships" / CARD
    card = ModelCard.load(path)
    assert {"semu", "machine-unlearning"} <= set(card.data["tags"])
    assert card.data["library_name"] == "peft" and "makes `vit` forget" in card.text
    assert str(tmp_path) not in str(card), "a folder here is no model of the Hub"
    assert "of 4 layers" in card.text and "of rank 3 " in card.text and "[More Information Needed]" not in card.text
    assert "- PEFT " in card.text
    path.write_text(path.read_text() + "\nForgot all ships, UA 99.\n")
    model.save_pretrained(tmp_path / "forget-ships")
    assert "Forgot all ships, UA 99." in path.read_text()
    assert {"semu", "machine-unlearning"} <= set(ModelCard.load(path).data["tags"])
    adapted().save_pretrained(tmp_path / "nameless")
    assert "base_model" not in ModelCard.load(tmp_path / "nameless" / CARD).data.to_dict()


def test_model_card_of_a_model_loaded_from_a_path(tmp_path: Path) -> None:
    """Diffusers keeps the `Path` that a model came from; the card has its name, and can be read and saved again."""
    folder = tmp_path / "it's the base"
    unet().save_pretrained(folder)
    model = get_peft_model(
        type(unet()).from_pretrained(folder), SemuConfig(target_modules=["to_q"], r=2, init_weights=False)
    )
    for _ in range(2):
        model.save_pretrained(tmp_path / "adapter")
        card = ModelCard.load(tmp_path / "adapter" / CARD)
        assert "base_model" not in card.data.to_dict() and str(tmp_path) not in str(card)


# ---- where it is loaded ----


def test_subfolders(tmp_path: Path) -> None:
    """Several adapters in the subfolders of one folder, saved by one call and loaded by name."""
    model = adapted()
    model.add_adapter("other", SemuConfig(target_modules=["conv1"], r=2, init_weights=False))
    x = sample_input(Cnn())
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = run(model, *x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(seeded(Cnn), tmp_path, adapter_name="first")
    loaded.load_adapter(tmp_path, "second", subfolder="other")
    again = PeftModel.from_pretrained(seeded(Cnn), tmp_path, subfolder="other")
    assert torch.equal(run(loaded, *x), expected["default"])
    loaded.set_adapter("second")
    assert torch.equal(run(loaded, *x), expected["other"]) and torch.equal(run(again, *x), expected["other"])


@pytest.mark.parametrize("make", [gpt2, clip_text])
def test_saved_by_transformers_loaded_by_peft(make: Any, tmp_path: Path) -> None:
    """A re-ranked adapter goes through `add_adapter`, `save_pretrained` and `PeftModel`."""
    model = seeded(make)
    targets = ["c_attn"] if make is gpt2 else ["q_proj", "fc1"]
    model.add_adapter(SemuConfig(target_modules=targets, r=3, init_weights=False))
    rerank(model, r=2)
    tokens = torch.randint(32, (2, 6))
    expected = run(model, tokens)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(seeded(make), tmp_path)
    assert torch.equal(run(loaded, tokens), expected)


def test_saved_by_diffusers_loaded_by_peft(tmp_path: Path) -> None:
    """`save_lora_adapter` of diffusers writes our tensors and configuration into one file, for its own readers."""
    model = seeded(unet_condition)
    x = sample_input(model)
    model.add_adapter(SemuConfig(target_modules=["to_q", "conv1"], r=2, init_weights=False))
    expected = run(model, *x)
    model.save_lora_adapter(tmp_path)
    (file,) = tmp_path.iterdir()
    with safe_open(file, framework="pt") as opened:
        values = json.loads(opened.metadata()["lora_adapter_metadata"])
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    from peft import set_peft_model_state_dict

    fresh = seeded(unet_condition)
    values.pop("peft_type"), values.pop("auto_mapping"), values.pop("peft_version", None)
    fresh.add_adapter(SemuConfig(**values))
    set_peft_model_state_dict(fresh, state, adapter_name="default")
    assert torch.equal(run(fresh, *x), expected)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    """`safe_serialization=False` writes the same safetensors, with a warning, over an earlier file too."""
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), SemuConfig(target_modules=["0"], r=2, init_weights=False))
    model.save_pretrained(tmp_path / "safe")
    for _ in range(2):
        with pytest.warns(UserWarning, match="`safe_serialization` must be True.*got False"):
            model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
        assert not list((tmp_path / "pickled").glob("*.bin"))
        name = "adapter_model.safetensors"
        assert (tmp_path / "pickled" / name).read_bytes() == (tmp_path / "safe" / name).read_bytes()


def test_a_pickle_of_another_method_stays(tmp_path: Path) -> None:
    torch.save({"lora_A.weight": torch.ones(1)}, tmp_path / "adapter_model.bin")
    SemuConfig(target_modules=["0"]).save_pretrained(str(tmp_path))
    assert (tmp_path / "adapter_model.bin").is_file()
    assert not (tmp_path / "adapter_model.safetensors").exists()
