"""Models × configurations × behaviours: what every PEFT method has to do, asserted in numbers for each of them.

The models are tiny and have random weights; one of each is built, and every test works on a copy.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matrix_models as zoo
import pytest
import torch
from matrix_models import Case
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

from semu_peft import (
    SemuConfig,
    SemuLayer,
    initialize_semu_weights,
    rerank,
    set_scale,
    to_lora,
    unlearn,
)
from semu_peft.tuner.adapted import semu_layers

CONFIGS: dict[str, dict[str, Any]] = {
    "full": {},
    "diagonal": {"core": "diagonal"},
    "weight": {"init_weights": "weight", "r": 2},
    "per_channel": {"conv_mode": "per_channel"},
    "biases": {"bias": "semu_only"},
}


@dataclass(frozen=True)
class Cell:
    """One model with one configuration."""

    case: Case
    options: dict[str, Any]

    def base(self) -> Any:
        return copy.deepcopy(_built(self.case.factory))

    def config(self, **options: Any) -> SemuConfig:
        settings = {"target_modules": self.case.targets, "r": 3, "init_weights": False, **self.options, **options}
        return SemuConfig(**settings)

    def adapted(self, **options: Any) -> PeftModel:
        """An adapter that changes the output, whatever it started from."""
        torch.manual_seed(7)
        model = get_peft_model(self.base(), self.config(**options)).eval()
        stir(model)
        return model

    def output(self, model: nn.Module, **options: Any) -> Tensor:
        with torch.no_grad():
            return zoo.first_tensor(model.eval()(**self.case.inputs(), **options))


def stir(model: nn.Module, adapter: str = "default") -> None:
    """Random cores, large enough to show in every output."""
    for layer in model.modules():
        if isinstance(layer, SemuLayer) and adapter in layer.semu_core:
            nn.init.normal_(layer.semu_core[adapter], std=0.3)


@functools.cache
def _built(factory: Callable[[], Any]) -> Any:
    torch.manual_seed(11)
    return factory().eval().requires_grad_(False)  # torch rounds differently where weights may want a gradient


def cells() -> Iterator[Any]:
    for case in zoo.CASES:
        for name, options in CONFIGS.items():
            if name == "per_channel" and not case.convolutions:
                continue
            yield pytest.param(Cell(case, options), id=f"{case.name}-{name}")


def one_a_model() -> Iterator[Any]:
    for case in zoo.CASES:
        yield pytest.param(Cell(case, {}), id=case.name)


every_cell = pytest.mark.parametrize("cell", list(cells()))
every_model = pytest.mark.parametrize("cell", list(one_a_model()))


def assert_close(actual: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5 * scale, rtol=2e-4)


def differ(first: Tensor, second: Tensor) -> bool:
    return not torch.allclose(first, second, atol=1e-4, rtol=1e-3)


# ---- switching ----


@every_cell
def test_on_and_off(cell: Cell) -> None:
    """Adapted, the output is another; switched off, it is the base model's to the last bit, and on it is back."""
    base = cell.output(cell.base())
    model = cell.adapted()
    on = cell.output(model)
    assert differ(on, base)
    with model.disable_adapter():
        assert torch.equal(cell.output(model), base)
    assert torch.equal(cell.output(model), on)
    set_scale(model, 0.0)
    assert torch.equal(cell.output(model), base)
    assert torch.equal(cell.output(model.unload()), base)


@every_cell
def test_merging(cell: Cell) -> None:
    """Merged, unmerged and merged for good: the same output; the modules that come out are stock ones."""
    model = cell.adapted()
    types = {name: type(module) for name, module in cell.base().named_modules()}
    on = cell.output(model)
    model.merge_adapter(safe_merge=True)
    assert_close(cell.output(model), on)
    model.unmerge_adapter()
    assert_close(cell.output(model), on)
    merged = model.merge_and_unload(safe_merge=True)
    assert_close(cell.output(merged), on)
    assert {name: type(module) for name, module in merged.named_modules()} == types


# ---- training ----


@every_cell
def test_what_is_trained(cell: Cell) -> None:
    """A step of an optimiser moves every core (and bias that was asked for), and nothing else."""
    model = cell.adapted()
    layers = semu_layers(model)
    biases = cell.options.get("bias") == "semu_only"
    wanted = {f"base_model.model.{name}.semu_core.default.semu_core" for name in layers}
    if biases:
        parameters = dict(model.named_parameters())
        names = (f"base_model.model.{name}.base_layer.bias" for name in layers)
        wanted |= {name for name in names if name in parameters}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == wanted
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    zoo.first_tensor(model(**cell.case.inputs())).square().mean().backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved <= wanted
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == wanted
    assert len(moved) >= 0.8 * len(wanted), wanted - moved  # softmax is blind to some shifts


@every_model
def test_from_gradients_to_a_changed_model(cell: Cell) -> None:
    """Initialised from data the model is the same, bit by bit; unlearning lowers the objective and changes it."""
    base = cell.output(cell.base())
    model = get_peft_model(cell.base(), SemuConfig(target_modules=cell.case.targets, r=4))
    assert torch.equal(cell.output(model), base)

    def objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return zoo.first_tensor(model(**batch)).square().mean()

    batches = [cell.case.inputs()] * 4
    profile = initialize_semu_weights(model, batches, objective, progress=False)
    assert all(1 <= rank <= 4 for rank in profile.ranks.values())
    assert torch.equal(cell.output(model), base)
    result = unlearn(model, batches, objective, epochs=2, learning_rate=1e-2, progress=False)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert not torch.equal(cell.output(model), base)


# ---- to disk and over to others ----


@every_cell
def test_saving_and_loading(cell: Cell, tmp_path: Path) -> None:
    """From disk, with and without the meta device, and through a state dict: the same bits."""
    model = cell.adapted()
    if cell.options.get("bias"):
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") and parameter.requires_grad:
                parameter.data.add_(0.1)
    on = cell.output(model)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        assert torch.equal(cell.output(PeftModel.from_pretrained(cell.base(), tmp_path, low_cpu_mem_usage=low)), on)
    state = get_peft_model_state_dict(model)
    bare = inject_adapter_in_model(cell.config(), cell.base())
    set_peft_model_state_dict(bare, state)
    assert torch.equal(cell.output(bare), on)
    assert torch.equal(cell.output(copy.deepcopy(model)), on)


@every_cell
def test_as_lora(cell: Cell) -> None:
    """Stock LoRA computes the same from the exported tensors."""
    model = cell.adapted()
    config, state = to_lora(model)
    lora = get_peft_model(cell.base(), config)
    assert isinstance(config, LoraConfig)
    assert not set_peft_model_state_dict(lora, state).unexpected_keys
    assert_close(cell.output(lora), cell.output(model))


@every_model
def test_reranking_to_nothing_lost(cell: Cell) -> None:
    """Re-ranked by all of its energy, an adapter computes the same; to one direction, something else."""
    model = cell.adapted()
    on = cell.output(model)
    rerank(model, explained_variance=1.0)
    assert_close(cell.output(model), on)
    rerank(model, r=1)
    assert {layer.r["default"] for layer in semu_layers(model).values()} == {1}


# ---- several adapters ----


@every_cell
def test_two_adapters(cell: Cell) -> None:
    """Added, chosen, active together, summed up, deleted: each on its own, both, the sum, and one again."""
    model = cell.adapted()
    first = cell.output(model)
    with model.disable_adapter():
        base = cell.output(model)
    model.add_adapter("second", cell.config(r=2, bias="none"))
    stir(model, "second")
    assert torch.equal(cell.output(model), first)
    model.set_adapter("second")
    second = cell.output(model)
    assert differ(second, first) and differ(second, base)
    model.base_model.set_adapter(["default", "second"])
    both = cell.output(model)
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    assert_close(cell.output(model), both)
    model.merge_adapter(["default", "second"])
    assert_close(cell.output(model), both)
    model.unmerge_adapter()
    model.set_adapter("default")
    model.delete_adapter("sum")
    model.delete_adapter("second")
    assert_close(cell.output(model), first)
    assert not any(name.endswith((".second", ".sum")) for name in model.state_dict())


@pytest.mark.parametrize("cell", [Cell(case, {}) for case in zoo.CASES if case.mixed], ids=lambda cell: cell.case.name)
def test_a_batch_of_several_adapters(cell: Cell) -> None:
    """Each example through the adapter that it names: its row of the whole batch through that adapter."""
    model = cell.adapted()
    model.add_adapter("second", cell.config(r=2))
    stir(model, "second")
    wanted = {"default": cell.output(model)}
    with model.disable_adapter():
        wanted["__base__"] = cell.output(model)
    model.set_adapter("second")
    wanted["second"] = cell.output(model)
    for names in (["default", "second"], ["__base__", "default"], ["second", "__base__"]):
        mixed = cell.output(model, adapter_names=names)
        for row, name in enumerate(names):
            assert_close(mixed[row], wanted[name][row])


# ---- precision and modes ----


@every_model
def test_half_precision(cell: Cell, tmp_path: Path) -> None:
    """In a bfloat16 model the adapter is float32, the output bfloat16 and near that of the float32 model."""
    whole = cell.adapted()
    whole.save_pretrained(tmp_path)
    wanted = cell.output(whole)
    model = PeftModel.from_pretrained(cell.base().to(torch.bfloat16), tmp_path)
    assert {tensor.dtype for name, tensor in model.state_dict().items() if ".semu_" in name} == {torch.float32}
    inputs = {
        name: value.bfloat16() if value.is_floating_point() else value for name, value in cell.case.inputs().items()
    }
    with torch.no_grad():
        half = zoo.first_tensor(model.eval()(**inputs))
    assert half.dtype == torch.bfloat16
    assert (half.float() - wanted).norm() < 0.15 * wanted.norm()


@every_model
def test_exclusion(cell: Cell) -> None:
    """A layer that is excluded by its full name is left alone; an adapter without any layer is refused."""
    names = list(semu_layers(cell.adapted()))
    pattern = "|".join(name.replace(".", r"\.") for name in names[1:])
    model = get_peft_model(cell.base(), cell.config(exclude_modules=pattern))
    assert list(semu_layers(model)) == names[:1]
    with pytest.raises(ValueError, match="exclude"):
        get_peft_model(cell.base(), cell.config(exclude_modules=".*"))


# ---- what must fail, as LoRA does ----


def break_it(model: PeftModel) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data[0] = float("nan")


ATTACKS: dict[str, Callable[[PeftModel], Any]] = {
    "NaN in safe_merge": lambda model: (break_it(model), model.merge_adapter(safe_merge=True)),
    "NaN in merge_and_unload": lambda model: (break_it(model), model.merge_and_unload(safe_merge=True)),
    "an adapter that does not exist": lambda model: model.set_adapter("none"),
    "deleting what does not exist": lambda model: model.delete_adapter("none"),
    "deleting what is merged": lambda model: (model.merge_adapter(), model.delete_adapter("default")),
    "unknown names in a batch": lambda model: model(torch.zeros(1, 6), adapter_names=["none"]),
    "weights of an unknown adapter": lambda model: model.add_weighted_adapter(["none"], [1.0], "sum"),
    "a target that does not exist": lambda model: model.add_adapter(
        "second", type(model.peft_config["default"])(target_modules=["none"])
    ),
    "a folder that does not exist": lambda model: model.load_adapter("/nowhere/at/all", "second"),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_fails_as_lora_does(attack: Callable[[PeftModel], Any]) -> None:
    """The same kind of error that LoRA raises."""
    lora = get_peft_model(zoo.Mlp(), LoraConfig(target_modules=["fc1", "head"], init_lora_weights=False)).eval()
    with pytest.raises(Exception) as expected:
        attack(lora)
    semu = get_peft_model(zoo.Mlp(), SemuConfig(target_modules=["fc1", "head"], r=2, init_weights=False)).eval()
    with pytest.raises(type(expected.value)):
        attack(semu)


def test_deleting_the_active_adapter() -> None:
    """As in LoRA: another adapter becomes active, with a warning."""
    for config in (LoraConfig(target_modules=["fc1"]), SemuConfig(target_modules=["fc1"], r=2, init_weights=False)):
        model = get_peft_model(zoo.Mlp(), config)
        model.add_adapter("second", config)
        with pytest.warns(UserWarning, match="default was active which is now deleted"):
            model.delete_adapter("default")
        assert list(model.peft_config) == ["second"]
        assert model.base_model.model.fc1.active_adapters == ["second"]


def test_another_methods_folder(tmp_path: Path) -> None:
    """A LoRA folder loads as what it says it is; its configuration beside our weights, and ours beside its, do not."""
    lora = get_peft_model(zoo.Mlp(), LoraConfig(target_modules=["fc1"], init_lora_weights=False))
    semu = get_peft_model(zoo.Mlp(), SemuConfig(target_modules=["fc1"], r=2, init_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    semu.save_pretrained(tmp_path / "semu")
    assert isinstance(PeftModel.from_pretrained(zoo.Mlp(), tmp_path / "lora").peft_config["default"], LoraConfig)
    with pytest.raises(ValueError, match="LORA|LoRA|lora"):
        semu.load_adapter(tmp_path / "lora", "second")
    weights = [tmp_path / name / "adapter_model.safetensors" for name in ("lora", "semu")]
    contents = [path.read_bytes() for path in weights]
    weights[1].write_bytes(contents[0])
    with pytest.raises(ValueError, match="another PEFT method"):
        PeftModel.from_pretrained(zoo.Mlp(), tmp_path / "semu")


def test_layer_replication_is_not_a_field() -> None:
    """Replicated layers share one weight, so that a merged correction would be in all of them: not offered."""
    with pytest.raises(TypeError, match="layer_replication"):
        SemuConfig(target_modules=["fc1"], layer_replication=[[0, 2]])  # type: ignore[call-arg]


def test_mixed_models_are_pefts_own() -> None:
    """`PeftMixedModel` takes a fixed list of methods; SEMU is injected over LoRA instead (`test_over_lora.py`)."""
    with pytest.raises(ValueError, match="PeftMixedModel"):
        get_peft_model(zoo.Mlp(), SemuConfig(target_modules=["fc1"]), mixed=True)
