"""An adapter's tensors are where frameworks look for a LoRA's: clones, whole state dicts, offloading, replicas, DDP."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from models import Cnn, Mlp, gpt2, image_batches, llama, run, sample_input, unet_condition, vector_batches
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from semu_peft import SemuConfig, hotswap_adapter, initialize_semu_weights, objectives, rerank, save_as_lora, unlearn
from semu_peft.subspace.starts import WeightSplit
from semu_peft.tuner.adapted import semu_layers

FORGET = objectives.CrossEntropy()
MAP = {"embed_tokens": "cpu", "layers.0": "disk", "layers.1": "cpu", "norm": "cpu", "rotary_emb": "cpu"}
MAP = {f"base_model.model.model.{name}": place for name, place in MAP.items()} | {"base_model.model.lm_head": "disk"}
AFTERWARDS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device="cpu", offload_buffers=True),
    "disk": lambda model, folder: disk_offload(model, str(folder), execution_device="cpu"),
    "hook": lambda model, folder: cpu_offload_with_hook(model, execution_device="cpu")[0],
    "some": lambda model, folder: dispatch_model(model, MAP, main_device="cpu", offload_dir=str(folder)),
}


def seeded(make: Callable[[], Any] = llama) -> Any:
    torch.manual_seed(0)
    return make()


def adapted(model: Any, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    config = SemuConfig(**{"target_modules": "all-linear", "r": 3, "init_weights": False, **options})
    return get_peft_model(model, config).eval()


def waiting(**options: Any) -> PeftModel:
    return get_peft_model(seeded(Cnn), SemuConfig(target_modules=Cnn.targets, **options)).eval()


def trained(start: Any = None, **options: Any) -> PeftModel:
    model = waiting(**options)
    initialize_semu_weights(model, image_batches(), FORGET, start=start, progress=False)
    unlearn(model, image_batches(), FORGET, epochs=1, progress=False)
    return model


# ---- by their names ----


@pytest.mark.parametrize("start", [None, WeightSplit()])
def test_a_clone_by_parameter_names(start: Any) -> None:
    """A second adapter with the first one's configuration computes as it once the parameters are copied by name."""
    model, x = trained(start), sample_input(Cnn())
    expected = run(model, *x)
    model.add_adapter("reference", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".reference.")).data.copy_(parameter.data)
    model.set_adapter("reference")
    assert torch.equal(run(model, *x), expected)
    model.delete_adapter("default")
    assert torch.equal(run(model, *x), expected)


# ---- the state dict of a whole model ----


@pytest.mark.parametrize("options", [{}, {"assign": True}, {"strict": False}], ids=["", "assign", "not strict"])
@pytest.mark.parametrize("injected", [False, True])
def test_the_state_dict_of_a_whole_model(injected: bool, options: dict[str, Any]) -> None:
    """It goes into a fresh model whose adapter has no bases yet, offset and layers of rank 0 included."""
    model, fresh, x = (
        trained(WeightSplit(), rank_pattern={"head": 0}),
        waiting(rank_pattern={"head": 0}),
        sample_input(Cnn()),
    )
    cores = [parameter for parameter in fresh.parameters() if parameter.requires_grad]
    source, target = (model.get_base_model(), fresh.get_base_model()) if injected else (model, fresh)
    state = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    loaded = target.load_state_dict(state, **options)
    assert not loaded.missing_keys and not loaded.unexpected_keys
    assert torch.equal(run(fresh, *x), run(model, *x))
    for field in ("ranks", "offsets"):
        assert getattr(fresh.peft_config["default"], field) == getattr(model.peft_config["default"], field)
    if "assign" not in options:  # an optimiser made before goes on with them
        assert [id(p) for p in cores] == [id(p) for p in fresh.parameters() if p.requires_grad]
    unlearn(fresh, image_batches(), FORGET, epochs=1, progress=False)
    assert not torch.equal(run(fresh, *x), run(model, *x))


def test_the_state_dict_of_a_whole_model_without_bases() -> None:
    """An adapter that is not initialised stays so, and one of other ranks is refused as in any module."""
    model, fresh = trained(), waiting()
    fresh.load_state_dict(waiting().state_dict())
    assert not any(layer.is_initialized("default") for layer in semu_layers(fresh).values())
    other = trained(r=1)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*semu_U"):
        other.load_state_dict(model.state_dict())
    assert other.peft_config["default"].ranks == dict.fromkeys(Cnn.targets, 1)


def test_loading_leaves_no_hook_behind() -> None:
    """What prepares a model for whole state dicts goes with the adapters."""
    model = trained()
    base = model.get_base_model()
    model.add_adapter("second", SemuConfig(target_modules=["head"]))
    assert len(base._load_state_dict_pre_hooks) == 1
    assert not model.unload()._load_state_dict_pre_hooks


# ---- offloaded after the adapter was put in ----


@pytest.mark.parametrize("way", AFTERWARDS)
def test_offloading_after_the_adapter(way: str, tmp_path: Path) -> None:
    """Running, switching, saving, exporting and merging see the adapter's values, wherever they lie."""
    reference, model = adapted(seeded()), adapted(seeded())
    x = sample_input(seeded())
    expected = run(reference, *x)
    model = AFTERWARDS[way](model, tmp_path / "weights")
    assert torch.equal(run(model, *x), expected)
    with model.disable_adapter(), reference.disable_adapter():
        assert torch.equal(run(model, *x), run(reference, *x))
    assert all(map(torch.equal, *(get_peft_model_state_dict(m).values() for m in (model, reference))))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(run(PeftModel.from_pretrained(seeded(), tmp_path / "adapter"), *x), expected)
    lora = PeftModel.from_pretrained(seeded(), save_as_lora(model, tmp_path / "lora"))
    torch.testing.assert_close(run(lora, *x), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(run(model.merge_and_unload(), *x), expected, atol=1e-5, rtol=1e-4)


def test_training_an_offloaded_adapter_is_refused(tmp_path: Path) -> None:
    """The gradient would be of a copy. With the hooks taken off, or the base offloaded first, it trains."""
    model, x = adapted(seeded()), sample_input(seeded())
    cpu_offload(model, execution_device="cpu")
    loss = model(*x).logits.square().mean()
    with pytest.raises(RuntimeError, match=r"'default' is offloaded.*remove_hook_from_submodules"):
        loss.backward()
    remove_hook_from_submodules(model)
    base_first = adapted(cpu_offload(seeded(), execution_device="cpu"))
    for each in (model, base_first):
        each(*x).logits.square().mean().backward()
        assert all(layer.semu_core["default"].grad.any() for layer in semu_layers(each).values())


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_new_values_for_an_offloaded_adapter(way: str, tmp_path: Path) -> None:
    """What is loaded or cut down afterwards is what runs: not what a hook would bring back. Hotswap is refused."""
    reference, model = adapted(seeded()), adapted(seeded(), target_modules=["q_proj", "down_proj"])
    other, x = adapted(seeded(), target_modules=["q_proj", "down_proj"], r=2), sample_input(seeded())
    del reference
    other.save_pretrained(tmp_path / "other")
    AFTERWARDS[way](model, tmp_path / "weights")
    with pytest.raises(ValueError, match="offloaded"):
        hotswap_adapter(model, str(tmp_path / "other"))
    before = run(model, *x)
    assert torch.equal(run(model, *x), before)
    rerank(model, r=1)
    cut = adapted(seeded(), target_modules=["q_proj", "down_proj"])
    rerank(cut, r=1)
    torch.testing.assert_close(run(model, *x), run(cut, *x), atol=1e-6, rtol=1e-5)
    model.load_adapter(tmp_path / "other", "other")
    model.set_adapter("other")
    torch.testing.assert_close(run(model, *x), run(other, *x), atol=1e-6, rtol=1e-5)


def test_a_partly_offloaded_base_is_dispatched_again(tmp_path: Path) -> None:
    """`from_pretrained` of an adapter onto a base with a device map moves the adapter as well, by itself."""
    x = sample_input(seeded())
    reference = adapted(seeded())
    expected = run(reference, *x)
    reference.save_pretrained(tmp_path)
    names = {name.removeprefix("base_model.model."): "cpu" for name in MAP}
    base = dispatch_model(seeded(), names, main_device="cpu", force_hooks=True)
    base.hf_device_map = names
    loaded = PeftModel.from_pretrained(base, tmp_path, max_memory={"cpu": "1GB"}, device_map="auto")
    torch.testing.assert_close(run(loaded, *x), expected, atol=1e-6, rtol=1e-5)


def test_sequential_offloading_of_a_pipeline_part() -> None:
    """Convolutions and attention of a denoiser with an injected adapter."""
    model = unet_condition()
    torch.manual_seed(1)
    model.add_adapter(SemuConfig(target_modules=["to_q", "conv1"], r=3, init_weights=False))
    x = sample_input(model)
    expected = run(model, *x)
    cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(run(model, *x), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading_of_a_pipeline_part(offload_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers' group offloading takes a module's data away after its call; what was read of it stays."""
    hooks = pytest.importorskip("diffusers.hooks.group_offloading")
    model = unet_condition()
    torch.manual_seed(1)
    model.add_adapter(SemuConfig(target_modules=["to_q", "conv1"], r=3, init_weights=False))
    x = sample_input(model)
    expected = run(model, *x)
    hooks.apply_group_offloading(
        model, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=offload_type,
        num_blocks_per_group=1,
    )  # fmt: skip
    onload, offload = hooks.ModuleGroup.onload_, hooks.ModuleGroup.offload_
    kept: dict[int, torch.Tensor] = {}

    def take_away(group: Any) -> None:
        offload(group)
        for parameter in _parameters(group):
            kept[id(parameter)] = parameter.data
            parameter.data = torch.full_like(parameter, float("nan"))

    def bring(group: Any) -> None:
        for parameter in _parameters(group):
            parameter.data = kept.pop(id(parameter), parameter.data)
        onload(group)

    monkeypatch.setattr(hooks.ModuleGroup, "offload_", take_away)
    monkeypatch.setattr(hooks.ModuleGroup, "onload_", bring)
    torch.testing.assert_close(run(model, *x), expected, atol=1e-6, rtol=1e-6)


def _parameters(group: Any) -> Iterator[nn.Parameter]:
    for module in group.modules:
        yield from module.parameters()
    yield from group.parameters


@pytest.mark.parametrize(
    "targets", [{"target_modules": ["fc1"]}, {"target_modules": [], "target_parameters": ["fc1.weight"]}]
)
def test_values_that_are_nowhere(targets: dict[str, Any], tmp_path: Path) -> None:
    """An adapter on the meta device is neither run with data nor saved; a model without any values may be planned."""
    model = get_peft_model(seeded(Mlp), SemuConfig(**targets, r=2, init_weights=False), low_cpu_mem_usage=True)
    (x,) = sample_input(Mlp())
    with pytest.raises(RuntimeError, match=r"fc1.*meta device.*load_adapter"):
        model(x)
    with model.disable_adapter():
        model(x)
    with pytest.raises(ValueError, match=r"meta device.*cannot be saved"):
        model.save_pretrained(tmp_path)
    assert model.to("meta")(x.to("meta")).is_meta


# ---- replicas and processes ----


@pytest.mark.parametrize("kind", ["cnn", "tied"])
def test_replicas_of_data_parallel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas compute as the model does, and their gradients reach its cores."""
    if kind == "cnn":
        model = adapted(Cnn(), target_modules=Cnn.targets)
    else:
        model = adapted(gpt2(), target_modules=["wte", "c_fc"], ensure_weight_tying=True)
    x = sample_input(model.get_base_model())
    # Torch copies tensors to the replicas on GPUs alone.
    parallel = import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(
        parallel,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach: [[t * 1 for t in tensors]] * len(devices),
    )
    monkeypatch.setattr(parallel, "_get_device_index", lambda device, optional: device)
    replicas = parallel.replicate(model, [0, 1])
    assert all(torch.equal(run(replica, *x), run(model, *x)) for replica in replicas)
    sum(_score(replica, x) for replica in replicas).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    (2 * _score(model, x)).backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=1e-4, rtol=1e-4)


def _score(model: nn.Module, x: tuple[torch.Tensor, ...]) -> torch.Tensor:
    output = model(*x)
    return getattr(output, "logits", output).square().sum()


@pytest.mark.parametrize("name", ["kind", "trainable", "stored", "lacks", "is_brought"])
def test_an_adapter_may_be_called_as_we_call_things(name: str, tmp_path: Path) -> None:
    """A `ModuleDict` takes no child by the name of an attribute of its own."""
    model = get_peft_model(seeded(Mlp), SemuConfig(target_modules=["fc1"], r=2, init_weights=False), name)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 6)
    loaded = PeftModel.from_pretrained(seeded(Mlp), tmp_path / name, name)
    assert torch.equal(loaded.eval()(x), model.eval()(x))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_layer_of_rank_zero_in_ddp() -> None:
    """DDP waits for a gradient of its core as well, and gets one, every step."""
    model = get_peft_model(Mlp(), SemuConfig(target_modules="all-linear", rank_pattern={"fc2": 0}))
    initialize_semu_weights(model, vector_batches(), FORGET, progress=False)
    assert model.peft_config["default"].ranks["fc2"] == 0
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in vector_batches():
        optimizer.zero_grad()
        FORGET(wrapped, batch).backward()
        optimizer.step()
    assert all(layer.semu_core["default"].grad is not None for layer in semu_layers(model).values())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    unlearn(wrapped, vector_batches(), FORGET, epochs=1, progress=False)
    assert dist.is_initialized() and flags == [parameter.requires_grad for parameter in model.parameters()]


@pytest.mark.usefixtures("one_process")
def test_an_adapter_that_transformers_has_loaded_in_ddp(tmp_path: Path) -> None:
    """Transformers makes every tensor that it loads trainable, of which the bases never get a gradient."""
    model = adapted(seeded())
    model.save_pretrained(tmp_path)
    loaded = seeded()
    loaded.load_adapter(tmp_path, is_trainable=True)
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained and all(name.endswith("semu_core") for name in trained)
    wrapped, ids = DistributedDataParallel(loaded), torch.tensor([[3, 4, 5]])
    for _ in range(2):
        wrapped(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.usefixtures("one_process")
def test_initialising_inside_ddp() -> None:
    """DDP keeps to the shapes that it has seen, and the initialisation gives cores theirs; wrapped anew, they train."""
    model = get_peft_model(Mlp(), SemuConfig(target_modules="all-linear"))
    wrapped = DistributedDataParallel(model)
    with pytest.warns(UserWarning, match=r"Drop the wrapper.*initialise before wrapping"):
        initialize_semu_weights(wrapped, vector_batches(), FORGET, progress=False)
    del wrapped
    gc.collect()
    FORGET(DistributedDataParallel(model), vector_batches()[0]).backward()
    assert all(layer.semu_core["default"].grad.any() for layer in semu_layers(model).values())


def test_an_output_that_was_kept_from_before_the_bases() -> None:
    """Its graph knows the empty core; to train the filled one failed at the shape of its gradient."""
    batches = vector_batches(1)
    model = get_peft_model(Mlp(), SemuConfig(target_modules="all-linear"))
    kept = model(batches[0][0])
    core = next(iter(semu_layers(model).values())).semu_core.stored_parameter("default")
    initialize_semu_weights(model, batches, FORGET, progress=False)
    assert next(iter(semu_layers(model).values())).semu_core.stored_parameter("default") is core
    FORGET(model, batches[0]).backward()
    assert core.grad is not None and core.grad.shape == core.shape and kept.requires_grad
