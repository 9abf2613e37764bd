"""Bad input raises an error that names the thing and the mend, and leaves model and files as they were."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VIT, Cnn, Mlp, Snapshot, image_batches, run, sample_input, vector_batches, vit
from peft import (
    AutoPeftModel,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from torch import Tensor, nn

from semu_peft import (
    SemuConfig,
    SemuLayer,
    initialize_semu_weights,
    objectives,
    save_as_diffusers_lora,
    save_as_lora,
    to_lora,
    unlearn,
)
from semu_peft.export.diffusers import save_adapter
from semu_peft.tuner.adapted import semu_layers

WEIGHTS = "adapter_model.safetensors"

# ---- the configuration ----


@pytest.mark.parametrize("value", [0, -1, 1.1, float("nan"), float("inf"), True, "0.9", None])
def test_explained_variance_outside_its_range(value: Any) -> None:
    """γ is a number in (0, 1]; the error names it, the value and a value that works."""
    with pytest.raises(ValueError, match=r"`explained_variance`.*\(0, 1\].*0\.9"):
        SemuConfig(explained_variance=value)


@pytest.mark.parametrize("value", [1e-9, 0.5, 1, 1.0])
def test_explained_variance_inside_its_range(value: float) -> None:
    """The whole half-open interval is allowed."""
    assert SemuConfig(explained_variance=value).explained_variance == value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"conv_mode": "channel"}, ["`conv_mode`", "'flatten'", "'per_channel'", "'channel'"]),
        ({"conv_mode": None}, ["`conv_mode`", "None"]),
        ({"core": "dense"}, ["`core`", "'full'", "'diagonal'", "'dense'"]),
        ({"init_weights": "gradient"}, ["`init_weights`", "'weight'", "'gradient'"]),
        ({"init_weights": 1, "r": 2}, ["`init_weights`", "1"]),
        ({"init_weights": None, "r": 2}, ["`init_weights`", "None"]),
        ({"r": 0}, ["`r`", "positive", "0"]),
        ({"r": -3}, ["`r`", "-3"]),
        ({"r": 2.0}, ["`r`", "2.0"]),
        ({"r": True}, ["`r`", "True"]),
        ({"r": "4"}, ["`r`", "'4'"]),
        ({"min_parameters": -1}, ["`min_parameters`", "-1"]),
        ({"min_parameters": 2.5}, ["`min_parameters`", "2.5"]),
        ({"rank_pattern": {"fc": -1}}, ["`rank_pattern`", "fc"]),
        ({"rank_pattern": {"fc": 1.5}}, ["`rank_pattern`", "1.5"]),
        ({"rank_pattern": ["fc"]}, ["`rank_pattern`"]),
        ({"rank_pattern": None}, ["`rank_pattern`"]),
        ({"init_weights": "weight"}, ["`init_weights='weight'`", "`r`"]),
        ({"init_weights": False}, ["`init_weights=False`", "`r`", "initialize_semu_weights"]),
        ({"target_modules": "fc.*", "layers_to_transform": [0]}, ["`layers_to_transform`", "fc.*"]),
        ({"target_modules": "fc.*", "layers_pattern": "h"}, ["`layers_pattern`", "fc.*"]),
        ({"target_modules": ["fc"], "layers_pattern": "h"}, ["`layers_pattern`", "`layers_to_transform`"]),
    ],
)
def test_values_that_cannot_be(options: dict[str, Any], words: list[str]) -> None:
    """Unknown, out-of-range and contradictory values are refused at construction, by name."""
    with pytest.raises(ValueError) as error:
        SemuConfig(**options)
    assert all(word in str(error.value) for word in words), error.value


def test_unknown_field() -> None:
    """A misspelt field is refused, not ignored."""
    with pytest.raises(TypeError, match="explained_varience"):
        SemuConfig(explained_varience=0.9)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("keyword", "mend"),
    [("rank", "`r`"), ("gamma", "`explained_variance`"), ("lora_alpha", "set_scale"), ("alpha", "set_scale"),
     ("init_lora_weights", "`init_weights`"), ("lora_dropout", "eval mode")],
)  # fmt: skip
def test_words_of_other_methods(keyword: str, mend: str) -> None:
    """The error names the keyword and what SEMU has in its place; the signature stays the dataclass's."""
    with pytest.raises(TypeError, match=f"'{keyword}'.*{mend}"):
        SemuConfig(target_modules=["fc1"], **{keyword: 4})
    assert keyword not in inspect.signature(SemuConfig).parameters and "r" in inspect.signature(SemuConfig).parameters


@pytest.mark.parametrize(
    "export",
    [save_as_lora, save_adapter, save_as_diffusers_lora, lambda path, _: to_lora(path)],
    ids=["save_as_lora", "save_adapter", "save_as_diffusers_lora", "to_lora"],
)
def test_arguments_in_pefts_order(export: Callable[[Any, Any], Any], tmp_path: Path) -> None:
    """PEFT's `save_as_lora` takes the path first; ours says that it takes the model, and writes nothing."""
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"], r=2, init_weights=False))
    for path in (tmp_path / "lora", str(tmp_path / "lora")):
        with pytest.raises(TypeError, match=r"got the path .*lora'\. The order here is `\w+\((model|pipe)"):
            export(path, model)
    assert not any(tmp_path.iterdir())


# ---- the target modules ----


class Mixed(nn.Module):
    """Layers that SEMU supports and layers that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.embed = nn.Embedding(5, 6)
        self.recurrent = nn.GRU(6, 6)
        self.up = nn.ConvTranspose2d(6, 6, 1)
        self.attention = nn.MultiheadAttention(6, 2)
        self.norm = nn.LayerNorm(6)
        self.last = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return self.last(x + self.attention(x, x, x, need_weights=False)[0])


WAYS_IN: list[Callable[[nn.Module, SemuConfig], Any]] = [get_peft_model, lambda m, c: inject_adapter_in_model(c, m)]
every_way = pytest.mark.parametrize("wrap", WAYS_IN, ids=["get_peft_model", "inject_adapter_in_model"])


@every_way
@pytest.mark.parametrize("bad", ["recurrent", "up", "norm"])
def test_unsupported_layer(wrap: Callable[[nn.Module, SemuConfig], Any], bad: str) -> None:
    """The layer, its type and the supported types are named, and no layer has been replaced, not even earlier ones."""
    model = Mixed()
    before = Snapshot.of(model)
    with pytest.raises((TypeError, ValueError)) as error:
        wrap(model, SemuConfig(target_modules=["fc", bad, "last"]))
    for word in (bad, type(getattr(model, bad)).__name__, "Linear", "Conv2d", "exclude_modules"):
        assert word in str(error.value)
    before.assert_same(model)
    assert not hasattr(model, "peft_config")


@every_way
@pytest.mark.parametrize("targets", [["fc", "out_proj"], "all-linear"], ids=["named", "all-linear"])
def test_a_linear_layer_whose_forward_is_never_called(
    wrap: Callable[[nn.Module, SemuConfig], Any], targets: list[str] | str
) -> None:
    """`nn.MultiheadAttention` reads its `out_proj.weight` and bypasses its forward: an adapter there would be silently
    without effect, so it is refused, or left out where it was not named."""
    model = Mixed()
    before = Snapshot.of(model)
    try:
        wrap(model, SemuConfig(target_modules=targets))
    except (TypeError, ValueError) as error:
        assert "out_proj" in str(error)
        before.assert_same(model)
    else:
        assert targets == "all-linear" and not isinstance(model.attention.out_proj, SemuLayer)


class Standardised(nn.Conv2d):
    """A convolution that standardises its weight at each forward pass, as in BiT."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) * 3
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.parametrize("mode", ["flatten", "per_channel"])
def test_a_subclass_that_computes_something_else(mode: str) -> None:
    """A layer whose own forward is not `x W`: refused by name, or at the least left alone by a core of zeros."""
    model = nn.Sequential(Standardised(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    x = torch.randn(2, 3, 3, 3)
    expected = run(model, x)
    config = SemuConfig(target_modules=["0", "2"], conv_mode=mode, r=2, init_weights="weight")
    before = Snapshot.of(model)
    try:
        wrapped = get_peft_model(model, config)
    except TypeError as error:
        assert "'0'" in str(error) and "Standardised" in str(error)
        before.assert_same(model)
    else:
        assert torch.equal(run(wrapped, x), expected)


@every_way
def test_no_target_matched(wrap: Callable[[nn.Module, SemuConfig], Any]) -> None:
    """The unmatched name is in the error, and the model is as it was."""
    model = Mlp()
    before = Snapshot.of(model)
    with pytest.raises(ValueError, match="nothing_like_it"):
        wrap(model, SemuConfig(target_modules=["nothing_like_it"]))
    before.assert_same(model)


@every_way
def test_no_target_given(wrap: Callable[[nn.Module, SemuConfig], Any]) -> None:
    """An architecture without a default asks for `target_modules`."""
    model = Mlp()
    before = Snapshot.of(model)
    with pytest.raises(ValueError, match="target_modules"):
        wrap(model, SemuConfig())
    before.assert_same(model)


def test_unsupported_layer_in_a_second_adapter() -> None:
    """A second adapter that cannot be added leaves the first one, and what it does, alone."""
    model = Mixed()
    wrapped = get_peft_model(model, SemuConfig(target_modules=["fc"], r=2, init_weights=False))
    x = torch.randn(3, 6)
    before, expected = Snapshot.of(wrapped), run(wrapped, x)
    with pytest.raises(TypeError, match="recurrent"):
        wrapped.add_adapter("second", SemuConfig(target_modules=["fc", "recurrent"]))
    wrapped.train()
    before.assert_same(wrapped)
    assert list(wrapped.peft_config) == ["default"]
    assert torch.equal(run(wrapped, x), expected)


# ---- training before initialisation ----


@pytest.mark.parametrize("base", [Mlp, Cnn])
def test_training_before_initialisation(base: type[Mlp | Cnn]) -> None:
    """A backward pass and `unlearn` both say that `initialize_semu_weights` is missing, and change nothing."""
    model = get_peft_model(base(), SemuConfig(target_modules=base.targets)).eval()
    batches = vector_batches() if base is Mlp else image_batches()
    before = Snapshot.of(model)
    with pytest.raises(RuntimeError, match="'default'.*initialize_semu_weights"):
        objectives.CrossEntropy()(model, batches[0]).backward()
    with pytest.raises(RuntimeError, match="'default'.*initialize_semu_weights"):
        unlearn(model, batches, objectives.CrossEntropy(), progress=False)
    before.assert_same(model)


def test_training_with_the_ranks_but_not_the_bases() -> None:
    """Ranks from an earlier configuration are no initialisation: training is refused all the same."""
    config = SemuConfig(target_modules=["fc1"], rank_pattern={"fc1": 2})
    model = get_peft_model(Mlp(), config)
    with pytest.raises(RuntimeError, match="initialize_semu_weights"):
        objectives.CrossEntropy()(model, vector_batches()[0]).backward()
    with pytest.raises(RuntimeError, match="initialize_semu_weights"):
        unlearn(model, vector_batches(), objectives.CrossEntropy(), progress=False)


def test_an_inactive_empty_adapter_does_not_stand_in_the_way() -> None:
    """Only the adapter that is being trained must have a basis."""
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"], r=2, init_weights=False))
    model.add_adapter("empty", SemuConfig(target_modules=["fc1", "head"]))
    objectives.CrossEntropy()(model, vector_batches()[0]).backward()
    unlearn(model, vector_batches(), objectives.CrossEntropy(), epochs=1, progress=False)


# ---- loading ----


def base_model(kind: str = "vit") -> Any:
    torch.manual_seed(11)
    return {"vit": vit, "mlp": Mlp, "cnn": Cnn}[kind]().eval()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder with a sound adapter for `vit`, whose base lies beside it."""
    base_model().save_pretrained(tmp_path / "base")
    base = type(base_model()).from_pretrained(tmp_path / "base")
    model = trained(base, [VIT["query"], VIT["up"]], 3)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def trained(base: nn.Module, targets: list[str], rank: int) -> PeftModel:
    """The base with an adapter whose bases come from data and whose core is not zero."""
    model = get_peft_model(base, SemuConfig(target_modules=targets, r=rank, explained_variance=1.0))
    initialize_semu_weights(model, image_batches(), objectives.CrossEntropy(), progress=False)
    for layer in semu_layers(model).values():
        nn.init.normal_(layer.semu_core["default"])
    assert set(model.peft_config["default"].ranks.values()) == {rank}
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(load: Callable[[], Any], model: nn.Module, folder: Path, *words: str) -> None:
    """`load` raises an error with these words, and neither the model nor the folder is changed."""
    before, files = Snapshot.of(model), contents(folder)
    with pytest.raises((ValueError, TypeError)) as error:
        load()
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"
    before.assert_same(model)
    assert not getattr(model, "peft_config", None) or "default" in model.peft_config
    assert contents(folder) == files


LOADERS: dict[str, Callable[[Any, Path], Any]] = {
    "from_pretrained": lambda model, folder: PeftModel.from_pretrained(model, folder),
    "low_cpu_mem_usage": lambda model, folder: PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True),
    "given_config": lambda model, folder: PeftModel.from_pretrained(
        model, folder, config=SemuConfig.from_pretrained(str(folder))
    ),
}
every_loader = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS.keys())


@every_loader
@pytest.mark.parametrize("keep", [0.0, 5, 0.02, 0.5, 0.98, -1])
def test_truncated_file(load: Callable[[Any, Path], Any], keep: float, adapter: Path) -> None:
    """A file that was cut, anywhere, is refused by its path, with what to do about it."""
    path = adapter / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    model = base_model()
    refused(lambda: load(model, adapter), model, adapter, str(path), "safetensors", "save_pretrained")


def test_truncated_file_through_auto_class(adapter: Path) -> None:
    """`AutoPeftModel`, which takes another way in, refuses it too."""
    path = adapter / WEIGHTS
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="adapter_model.safetensors.*save_pretrained"):
        AutoPeftModel.from_pretrained(adapter)


@every_loader
def test_foreign_file(load: Callable[[Any, Path], Any], adapter: Path, tmp_path: Path) -> None:
    """LoRA weights under a SEMU configuration are refused as what they are."""
    get_peft_model(base_model(), LoraConfig(target_modules=[VIT["query"]])).save_pretrained(tmp_path / "lora")
    shutil.copy(tmp_path / "lora" / WEIGHTS, adapter / WEIGHTS)
    model = base_model()
    refused(
        lambda: load(model, adapter), model, adapter, str(adapter / WEIGHTS), "no SEMU weights", "lora_A", "semu_core"
    )


@every_loader
def test_file_of_another_rank(load: Callable[[Any, Path], Any], adapter: Path, tmp_path: Path) -> None:
    """Weights of other ranks than the configuration's are refused, with layer and both ranks."""
    trained(base_model(), [VIT["query"], VIT["up"]], 2).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, adapter / WEIGHTS)
    model = base_model()
    refused(lambda: load(model, adapter), model, adapter, "rank 2", "3", VIT["query"], "`ranks`")


@every_loader
def test_file_that_lacks_a_layer(load: Callable[[Any, Path], Any], adapter: Path, tmp_path: Path) -> None:
    """Weights for fewer layers than the configuration names are refused, not loaded in part."""
    trained(base_model(), [VIT["query"]], 3).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, adapter / WEIGHTS)
    model = base_model()
    refused(lambda: load(model, adapter), model, adapter, VIT["up"])


@every_loader
def test_another_architecture(load: Callable[[Any, Path], Any], adapter: Path) -> None:
    """A model with other layer names is refused by name."""
    config = base_model().config
    config.num_hidden_layers = 1
    model = vit_of(config)
    refused(lambda: load(model, adapter), model, adapter, "`ranks`", "ViTForImageClassification", f"{VIT['layers']}.1")


@every_loader
def test_another_width(load: Callable[[Any, Path], Any], adapter: Path) -> None:
    """The same architecture in another width has the right names and the wrong shapes: refused, with both shapes."""
    config = base_model().config
    config.hidden_size = 32
    model = vit_of(config)
    refused(
        lambda: load(model, adapter), model, adapter, "ViTForImageClassification", f"{VIT['layers']}.0", "(16, 3)", "32"
    )


def vit_of(config: Any) -> Any:
    return type(base_model())(config).eval()


@pytest.mark.parametrize("damage", ["truncated", "another rank", "another width"])
def test_transformers_load_adapter(damage: str, adapter: Path, tmp_path: Path) -> None:
    """Transformers reads the file itself, after the layers are in place. Then at least nothing is silent: loading it
    or, for weights that it left out with no more than a log entry, the first forward pass raises, and the weights of
    the model are untouched."""
    if damage == "truncated":
        (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-7])
    elif damage == "another rank":
        trained(base_model(), [VIT["query"], VIT["up"]], 2).save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / WEIGHTS, adapter / WEIGHTS)
    config = base_model().config
    config.hidden_size = 32 if damage == "another width" else config.hidden_size
    model = vit_of(config)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises((ValueError, RuntimeError, OSError, SafetensorError)):
        model.load_adapter(str(adapter))
        run(model, *sample_input(model))
    now = {name.replace("base_layer.", ""): parameter for name, parameter in model.named_parameters()}
    assert all(torch.equal(now[name], weight) for name, weight in weights.items())


def test_another_width_with_a_saved_module(tmp_path: Path) -> None:
    """A refused adapter takes its `modules_to_save` wrappers out again."""
    config = SemuConfig(target_modules=[VIT["query"]], modules_to_save=["classifier"], r=3, init_weights=False)
    get_peft_model(base_model(), config).save_pretrained(tmp_path)
    wide = base_model().config
    wide.hidden_size = 32
    model = vit_of(wide)
    refused(lambda: PeftModel.from_pretrained(model, tmp_path), model, tmp_path, VIT["query"])


def test_a_refused_second_adapter_leaves_the_first(adapter: Path, tmp_path: Path) -> None:
    """`load_adapter` of an adapter that does not fit: the model keeps its own adapter, active and unchanged."""
    narrow = base_model().config
    narrow.hidden_size = 8
    trained(vit_of(narrow), [VIT["query"]], 3).save_pretrained(tmp_path / "narrow")
    model = PeftModel.from_pretrained(base_model(), adapter, is_trainable=True)
    x = sample_input(base_model())
    expected = run(model, *x)
    refused(lambda: model.load_adapter(tmp_path / "narrow", "second"), model, tmp_path / "narrow", VIT["query"])
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert torch.equal(run(model, *x), expected)


def test_a_refused_state_dict_leaves_the_adapter_it_was_meant_for() -> None:
    """`set_peft_model_state_dict` with other ranks: the adapter that is there stays, with its weights."""
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1", "head"], r=3, init_weights=False))
    other = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1", "head"], r=2, init_weights=False))
    x = sample_input(Mlp())
    before, expected = Snapshot.of(model), run(model.eval(), *x)
    model.train()
    with pytest.raises(ValueError, match="fc1"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    before.assert_same(model)
    assert torch.equal(run(model, *x), expected)


def test_loading_over_an_existing_adapter_of_another_rank(adapter: Path) -> None:
    """`load_adapter` under a name that is taken, with weights that do not fit: the adapter of that name stays."""
    config = SemuConfig(target_modules=[VIT["query"], VIT["up"]], r=2, init_weights=False)
    model = get_peft_model(base_model(), config).eval()
    x = sample_input(base_model())
    expected = run(model, *x)
    refused(lambda: model.load_adapter(adapter, "default"), model, adapter, VIT["query"])
    assert torch.equal(run(model, *x), expected)


def test_folder_without_weights(adapter: Path) -> None:
    """A folder without the weights file is not loaded as an empty adapter."""
    (adapter / WEIGHTS).unlink()
    model = base_model()
    with pytest.raises((ValueError, OSError), match="adapter"):
        PeftModel.from_pretrained(model, adapter)


@pytest.mark.parametrize("field", ["ranks", "conv_mode"])
def test_damaged_configuration(field: str, adapter: Path) -> None:
    """A configuration file with an impossible value is refused when it is read."""
    path = adapter / "adapter_config.json"
    values = json.loads(path.read_text())
    values[field] = {"ranks": dict.fromkeys(values["ranks"], -3), "conv_mode": "flat"}[field]
    path.write_text(json.dumps(values))
    model = base_model()
    refused(lambda: PeftModel.from_pretrained(model, adapter), model, adapter, f"`{field}`")


def test_merged_adapter_is_not_initialised_again() -> None:
    """Initialising a merged adapter names the mend."""
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"], r=2, init_weights=False))
    model.merge_adapter()
    before = Snapshot.of(model)
    with pytest.raises(ValueError, match="merged.*unmerge_adapter"):
        initialize_semu_weights(model, vector_batches(), objectives.CrossEntropy(), progress=False)
    before.assert_same(model)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_name_that_no_adapter_has_is_not_merged(merge: str) -> None:
    """The model that came out would be taken for one that has forgotten."""
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"], r=2, init_weights=False))
    before = Snapshot.of(model)
    with pytest.raises(ValueError, match=r"`adapter_names` must be.*got \['no-cats'\].*There are \['default'\]"):
        getattr(model, merge)(adapter_names=["default", "no-cats"])
    before.assert_same(model)


def merged_mlp(folder: Path) -> Any:
    model = get_peft_model(Mlp().eval(), SemuConfig(target_modules=["fc1"], r=2, init_weights=False))
    model.save_pretrained(folder)
    model.merge_adapter()
    return model


def test_loading_over_a_merged_adapter(tmp_path: Path) -> None:
    """Unmerging would take the new correction out of a weight that has the old one in it."""
    model = merged_mlp(tmp_path)
    before = Snapshot.of(model)
    for load in (
        lambda: model.load_adapter(tmp_path, "default"),
        lambda: set_peft_model_state_dict(model, get_peft_model_state_dict(model)),
        lambda: semu_layers(model)["fc1"].set_scale("default", 0.5),
    ):
        with pytest.raises(ValueError, match="merged.*unmerge_adapter"):
            load()
        before.assert_same(model)
    model.load_adapter(tmp_path, "second")  # beside it


@pytest.mark.parametrize("unscale", [True, False])
def test_scaling_a_merged_adapter_leaves_the_base_alone(unscale: bool, tmp_path: Path) -> None:
    """Diffusers scales the layers of a fused pipeline around each pass; what is taken out is what was merged."""
    model, x = merged_mlp(tmp_path), torch.randn(3, 6)
    layer, merged = semu_layers(model)["fc1"], model(x)
    weight = layer.base_layer.weight - layer.get_delta_weight("default")
    layer.scale_layer(3.0)
    assert torch.equal(model(x), merged)
    if unscale:
        layer.unscale_layer(3.0)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), merged)
    else:
        model.unmerge_adapter()
        assert layer.scaling["default"] == 3.0
    torch.testing.assert_close(layer.base_layer.weight, weight)
