"""What an adapter's state is: the wish and the outcome, one core for good, and the offset that it may start from."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Cnn, Mlp, image_batches, llama, run, sample_input, vector_batches
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from semu_peft import (
    NotInitializedError,
    SemuConfig,
    hotswap_adapter,
    initialize_semu_weights,
    objectives,
    rerank,
    save_as_lora,
    unlearn,
)
from semu_peft.tuner.adapted import semu_layers

LOSS = objectives.CrossEntropy()


def fresh(make: Any = Mlp) -> Any:
    torch.manual_seed(11)
    return make().eval()


def waiting(make: Any = Mlp, **settings: Any) -> PeftModel:
    return get_peft_model(fresh(make), SemuConfig(target_modules=make.targets, **settings)).eval()


def initialized(make: Any = Mlp, **settings: Any) -> PeftModel:
    """An adapter with bases from data, of different ranks, and random cores."""
    model = waiting(make, **settings)
    initialize_semu_weights(model, vector_batches() if make is Mlp else image_batches(), LOSS, progress=False)
    for layer in semu_layers(model).values():
        nn.init.normal_(layer.semu_core["default"])
    return model


# ---- one core for good ----


def test_an_optimiser_made_before_the_initialisation_keeps_working() -> None:
    """The core's parameter has no numbers before it, is the same object after it, and trains by the old optimiser."""
    model, x = waiting(), torch.randn(3, 6)
    cores = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(cores) == len(Mlp.targets) and not any(core.numel() for core in cores)
    optimizer = torch.optim.AdamW(cores, lr=0.1, weight_decay=0.0)
    initialize_semu_weights(model, vector_batches(), LOSS, progress=False)
    assert all(core.numel() and core.requires_grad for core in cores)
    before = run(model, x)
    LOSS(model, vector_batches()[0]).backward()
    optimizer.step()
    assert not torch.equal(run(model, x), before)
    assert all(core.any() for core in cores)


def test_loading_and_reranking_keep_the_core_too() -> None:
    """Whoever gives the adapter other tensors, its parameters are the ones that an optimiser holds."""
    source, model = initialized(), waiting()
    cores = dict(model.named_parameters())
    set_peft_model_state_dict(model, get_peft_model_state_dict(source))
    rerank(model, r=1)
    assert all(parameter is cores[name] for name, parameter in model.named_parameters())
    assert all(layer.semu_core["default"].shape == (1, 1) for layer in semu_layers(model).values())


# ---- the wish and the outcome ----


@pytest.mark.parametrize("init_weights", ["weight", False])
def test_ranks_without_data_are_written_at_once(init_weights: Any) -> None:
    """The outcome is what fits; the wish stays as it was written."""
    pattern = {"head": 2, "fc.": 40}
    model = waiting(r=3, init_weights=init_weights, rank_pattern=pattern)
    config = model.peft_config["default"]
    assert config.rank_pattern == pattern
    layers = semu_layers(model)
    assert config.ranks == {name: layer.r["default"] for name, layer in layers.items()}
    assert config.ranks == {
        name: 2 if name == "head" else min(layer.matrix_shape("default")) for name, layer in layers.items()
    }
    assert all(layer.is_initialized("default") for layer in layers.values())


def test_a_rank_of_0_is_an_outcome(tmp_path: Path) -> None:
    """A layer that was asked to have none is initialised, trains nothing and comes back so."""
    model = initialized(rank_pattern={"head": 0})
    ranks = model.peft_config["default"].ranks
    assert ranks["head"] == 0 and semu_layers(model)["head"].is_initialized("default")
    unlearn(model, vector_batches(), LOSS, epochs=1, progress=False)
    expected = run(model, torch.ones(2, 6))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh(), tmp_path)
    assert loaded.peft_config["default"].ranks == ranks
    assert torch.equal(run(loaded, torch.ones(2, 6)), expected)


def test_gradients_of_single_examples_beside_a_layer_of_rank_0() -> None:
    """`torch.func` goes through the layer, which gives its empty core an empty gradient for each example."""
    model = get_peft_model(
        fresh(), SemuConfig(target_modules=["fc1", "fc2"], r=2, init_weights=False, rank_pattern={"fc1": 0})
    ).eval()
    cores = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    x = torch.randn(5, 6)

    def loss(cores: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, cores, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(cores, x)
    together = torch.autograd.grad(model(x).square().sum(), [dict(model.named_parameters())[name] for name in cores])
    for (name, core), whole in zip(cores.items(), together, strict=True):
        assert each[name].shape == (5, *core.shape)
        torch.testing.assert_close(each[name].sum(0), whole)


def test_loading_over_an_adapter_that_waits(tmp_path: Path) -> None:
    """As when a Trainer resumes: the tensors tell the ranks, which then stand in the configuration."""
    source, x = initialized(), torch.randn(3, 6)
    source.save_pretrained(tmp_path)
    model = waiting()
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(run(model, x), run(source, x))
    assert model.peft_config["default"].ranks == source.peft_config["default"].ranks
    LOSS(model, vector_batches()[0]).backward()
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(run(PeftModel.from_pretrained(fresh(), tmp_path / "again"), x), run(source, x))


def test_a_state_dict_for_an_adapter_that_waits() -> None:
    """`set_peft_model_state_dict` gives it bases; tensors that do not fit leave it waiting."""
    source, model, x = initialized(), waiting(), torch.randn(3, 6)
    state = get_peft_model_state_dict(source)
    key = next(key for key in state if key.endswith("fc1.semu_V.semu_V"))
    with pytest.raises(ValueError, match="fc1"):
        set_peft_model_state_dict(model, state | {key: state[key][:-1]})
    assert model.peft_config["default"].ranks == {} and all(
        layer.r["default"] == 0 for layer in semu_layers(model).values()
    )
    assert torch.equal(run(model, x), run(fresh(), x))
    set_peft_model_state_dict(model, state)
    assert torch.equal(run(model, x), run(source, x))


def test_an_adapter_that_waits_is_still_waiting_once_loaded(tmp_path: Path) -> None:
    """Tensors without any direction initialise nothing, whichever way they come."""
    waiting().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh(), tmp_path, is_trainable=True)
    set_peft_model_state_dict(loaded, get_peft_model_state_dict(waiting()))
    assert not any(layer.is_initialized("default") for layer in semu_layers(loaded).values())
    with pytest.raises(NotInitializedError, match="initialize_semu_weights"):
        LOSS(loaded, vector_batches()[0]).backward()


def test_a_configuration_used_twice_keeps_to_itself() -> None:
    """Two models from one configuration have ranks of their own, and the user's object has none."""
    config = SemuConfig(target_modules=Mlp.targets)
    first, second = get_peft_model(fresh(), config), get_peft_model(fresh(), config)
    initialize_semu_weights(first, vector_batches(), LOSS, progress=False)
    assert first.peft_config["default"].ranks and not second.peft_config["default"].ranks and not config.ranks


@pytest.mark.parametrize(
    "use",
    [
        lambda model: rerank(model, r=1),
        lambda model: save_as_lora(model, "never-written"),
        lambda model: model.add_weighted_adapter(["default"], [1.0], "sum"),
        lambda model: hotswap_adapter(model, "never-read"),
        lambda model: unlearn(model, vector_batches(), LOSS, progress=False),
        lambda model: LOSS(model, vector_batches()[0]).backward(),
    ],
    ids=["rerank", "save_as_lora", "add_weighted_adapter", "hotswap_adapter", "unlearn", "backward"],
)
def test_what_needs_bases_says_so(use: Any) -> None:
    """One error for all, which is both of those that callers may already catch."""
    model = waiting()
    with pytest.raises(NotInitializedError, match="'default'.*initialize_semu_weights") as error:
        use(model)
    assert isinstance(error.value, RuntimeError) and isinstance(error.value, ValueError)
    assert list(model.peft_config) == ["default"] and not Path("never-written").exists()


# ---- the offset ----


def started(make: Any = Mlp, rank: int = 2, **settings: Any) -> PeftModel:
    """As LoKU starts: bases and core are the weight's leading singular triplets, and the core is its own offset."""
    model = waiting(make, **settings)
    for layer in semu_layers(model).values():
        left, values, right = torch.linalg.svd(layer.weight_to_matrix(layer.weight.detach(), "default"), False)
        values = values[..., :rank]
        core = values if settings.get("core") == "diagonal" else torch.diag_embed(values)
        layer.set_basis("default", left[..., :rank], right.mT[..., :rank], core, offset=core)
    return model


def trained(make: Any = Mlp, **settings: Any) -> PeftModel:
    model = started(make, **settings)
    for layer in semu_layers(model).values():
        layer.semu_core["default"].data += 0.3 * torch.randn_like(layer.semu_core["default"])
    return model


every_core = pytest.mark.parametrize("settings", [{}, {"core": "diagonal"}, {"conv_mode": "per_channel"}], ids=str)


@every_core
def test_a_start_that_is_not_zero_changes_nothing(settings: dict[str, Any]) -> None:
    """On, the output is the original's to rounding; off, also after training, to the last bit; the weight stays."""
    x = sample_input(Cnn())
    original = run(fresh(Cnn), *x)
    model = started(Cnn, **settings)
    assert all(layer.semu_core["default"].abs().max() > 0.1 for layer in semu_layers(model).values())
    torch.testing.assert_close(run(model, *x), original, atol=1e-6, rtol=1e-6)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)
    LOSS(model, image_batches()[0]).backward()
    optimizer.step()
    assert (run(model, *x) - original).abs().max() > 1e-4
    with model.disable_adapter():
        assert torch.equal(run(model, *x), original)
    weights = fresh(Cnn).state_dict()
    assert all(torch.equal(layer.base_weight, weights[f"{name}.weight"]) for name, layer in semu_layers(model).items())


@every_core
def test_the_offset_goes_where_the_core_goes(settings: dict[str, Any], tmp_path: Path) -> None:
    """Saved, loaded, merged and exported, the adapter computes what it computes live."""
    model, x = trained(Cnn, **settings), sample_input(Cnn())
    expected = run(model, *x)
    model.save_pretrained(tmp_path / "semu")
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(fresh(Cnn), tmp_path / "semu", low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(run(loaded, *x), expected)
        assert all("default" in layer.semu_offset for layer in semu_layers(loaded).values())
    over = waiting(Cnn, **settings)
    set_peft_model_state_dict(over, get_peft_model_state_dict(model))
    assert torch.equal(run(over, *x), expected)
    assert over.peft_config["default"].offsets == sorted(Cnn.targets)
    lora = PeftModel.from_pretrained(fresh(Cnn), save_as_lora(model, tmp_path / "lora"))
    torch.testing.assert_close(run(lora, *x), expected, atol=1e-5, rtol=1e-5)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    torch.testing.assert_close(run(merged, *x), expected, atol=1e-5, rtol=1e-5)


def test_the_offset_in_a_file_that_is_loaded_over_another(tmp_path: Path) -> None:
    """A buffer comes and goes with the file."""
    plain, offset, x = initialized(r=2, explained_variance=1.0), trained(), torch.randn(3, 6)
    state = {"plain": get_peft_model_state_dict(plain), "offset": get_peft_model_state_dict(offset)}
    expected = {"plain": run(plain, x), "offset": run(offset, x)}
    model = initialized(r=2, explained_variance=1.0)
    for name in ("offset", "plain", "offset"):
        set_peft_model_state_dict(model, state[name])
        assert torch.equal(run(model, x), expected[name])
        assert bool(model.peft_config["default"].offsets) == (name == "offset")


def test_the_offset_through_transformers(tmp_path: Path) -> None:
    """Transformers' own loader reads it into the buffer that the configuration announces."""
    base = fresh(llama)
    model = get_peft_model(base, SemuConfig(target_modules=["q_proj", "down_proj"])).eval()
    for layer in semu_layers(model).values():
        left, values, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        core = torch.diag(values[:2])
        layer.set_basis("default", left[:, :2], right.mT[:, :2], core + 0.3 * torch.randn(2, 2), offset=core)
    x = sample_input(base)
    expected = run(model, *x)
    model.save_pretrained(tmp_path)
    loaded = fresh(llama)
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(run(loaded, *x), expected)


def test_a_file_without_the_offset_of_its_configuration_is_refused(tmp_path: Path) -> None:
    """Half of a start would change the model by the whole of it."""
    model = trained()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    plain = initialized(r=2, explained_variance=1.0)
    plain.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "weights_sha256": None}))
    with pytest.raises(ValueError, match=r"fc1.*offset"):
        PeftModel.from_pretrained(fresh(), tmp_path)


def test_what_is_made_from_an_adapter_with_an_offset(tmp_path: Path) -> None:
    """Sums add what the layers compute with; re-ranking cuts that; both count from zero again."""
    model, x = trained(), torch.randn(3, 6)
    expected = run(model, x)
    model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    torch.testing.assert_close(run(model, x), expected, atol=1e-5, rtol=1e-5)
    assert not model.peft_config["sum"].offsets
    model.set_adapter("default")
    report = rerank(model, explained_variance=1.0)
    torch.testing.assert_close(run(model, x), expected, atol=1e-5, rtol=1e-5)
    assert report.total_relative_error < 1e-6 and not model.peft_config["default"].offsets
    assert not any("default" in layer.semu_offset for layer in semu_layers(model).values())


def test_hotswap_of_adapters_with_an_offset(tmp_path: Path) -> None:
    """Exchanged in place with another one that has it, refused with one that has none."""
    first, second, x = started(), trained(), torch.randn(3, 6)
    second.save_pretrained(tmp_path / "second")
    expected = run(second, x)
    assert not torch.equal(run(first, x), expected)
    hotswap_adapter(first, str(tmp_path / "second"))
    assert torch.equal(run(first, x), expected)
    initialized(r=2, explained_variance=1.0).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="semu_offset"):
        hotswap_adapter(first, str(tmp_path / "plain"))
    assert torch.equal(run(first, x), expected)


def test_an_offset_of_another_shape_is_refused() -> None:
    """Nothing is changed then."""
    model = waiting()
    layer = semu_layers(model)["fc1"]
    m, n = layer.matrix_shape("default")
    with pytest.raises(ValueError, match=r"`offset` must have shape \(2, 2\), got \(2,\)"):
        layer.set_basis("default", torch.eye(m, 2), torch.eye(n, 2), offset=torch.ones(2))
    assert not layer.is_initialized("default") and layer.r["default"] == 0
