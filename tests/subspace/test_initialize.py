"""`initialize_semu_weights`: the bases are those of the dense gradient, and nothing else changes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VIT, Cnn, Mlp, Snapshot, gpt2, image_batches, run, sample_input, unet, vector_batches, vit
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft import (
    Retain,
    SemuConfig,
    SubspaceProfile,
    initialize_semu_weights,
    objectives,
)
from semu_peft.gradients.batch_gradient import DenseGradient
from semu_peft.gradients.gather import gather
from semu_peft.gradients.sketch import Sketch
from semu_peft.gradients.statistics import GradientSum, SquaredSum
from semu_peft.tuner.adapted import semu_layers

FORGET = objectives.CrossEntropy()


def same(kind: Callable[[], nn.Module]) -> nn.Module:
    """The model with the same weights at every call."""
    torch.manual_seed(11)
    return kind()


def dense_gradients(base: nn.Module, names: list[str], batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Ordinary gradients of the summed loss at the base model in eval mode."""
    base = copy.deepcopy(base).eval().requires_grad_(True)
    for x, y in batches:
        F.cross_entropy(base(x).float(), y).backward()
    return {name: base.get_submodule(name).weight.grad.float() for name in names}


def matrices(gradient: Tensor, mode: str) -> Tensor:
    """The gradient as one matrix, or as one an input channel, read element by element."""
    if gradient.dim() == 2:
        return gradient
    out, channels, *kernel = gradient.shape
    if mode == "flatten":
        return gradient.reshape(out, -1)
    return torch.stack([gradient[:, channel].reshape(out, -1) for channel in range(channels)])


def assert_leading_vectors(basis: Tensor, vectors: Tensor, values: Tensor) -> None:
    """`basis` holds the leading `vectors` up to sign, wherever the singular value stands apart from the others."""
    rank = basis.shape[-1]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(rank).expand(*basis.shape[:-2], -1, -1), atol=1e-5, rtol=0)
    overlap = (basis * vectors[..., :rank]).sum(-2).abs()
    gaps = (values[..., 1:] - values[..., :-1]).abs()
    before = torch.cat([torch.full_like(values[..., :1], float("inf")), gaps], -1)
    after = torch.cat([gaps, values[..., -1:]], -1)
    apart = (torch.minimum(before, after) / values[..., :1].clamp_min(1e-12) > 1e-2)[..., :rank]
    assert apart.any() and (overlap[apart] > 1 - 1e-3).all()


@pytest.mark.parametrize("orthogonal", [False, True], ids=["plain", "orthogonal"])
@pytest.mark.parametrize(("kind", "mode"), [(Mlp, "flatten"), (Cnn, "flatten"), (Cnn, "per_channel")])
@pytest.mark.parametrize("gamma", [0.6, 0.95, 1.0])
def test_bases_are_those_of_the_dense_gradient(
    kind: Callable[[], nn.Module], mode: str, gamma: float, orthogonal: bool
) -> None:
    """U, V are the leading singular vectors of the gradient, up to sign; the rank is by energy; the core is zero."""
    base = same(kind)
    batches = vector_batches() if kind is Mlp else image_batches()
    names = base.targets
    gradients = dense_gradients(base, names, batches)
    if orthogonal:
        for name in names:
            weight = base.get_submodule(name).weight.detach()
            gradients[name] -= (gradients[name] * weight).sum() / (weight * weight).sum() * weight
    config = SemuConfig(
        target_modules=names, explained_variance=gamma, min_parameters=0, conv_mode=mode,
        orthogonal_to_weight=orthogonal,
    )  # fmt: skip
    model = get_peft_model(base, config)
    profile = initialize_semu_weights(model, batches, FORGET, progress=False)
    assert profile.batches == 3
    for name, layer in semu_layers(model).items():
        matrix = matrices(gradients[name], mode)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        energy = s.double().square().cumsum(-1)
        shares = energy / energy[..., -1:].clamp_min(1e-300)
        rank = layer.r["default"]
        torch.testing.assert_close(profile.layers[name].singular_values, s, atol=1e-5 * float(s.max()), rtol=1e-4)
        assert (shares[..., rank - 1] >= gamma - 1e-6).all()
        if rank > 1:
            assert (shares[..., rank - 2] < gamma + 1e-6).any()
        assert_leading_vectors(layer.semu_U["default"], u, s)
        assert_leading_vectors(layer.semu_V["default"], vh.mT, s)
        core = layer.semu_core["default"]
        assert not core.any() and core.requires_grad and core.shape[-1] == rank
        assert layer.is_initialized("default")
        assert profile.layers[name].shape == tuple(matrix.shape)
        assert profile.layers[name].energy == pytest.approx(float(s.double().square().sum()), rel=1e-4)


def test_conv1d_gradient_is_read_transposed() -> None:
    """For transformers' `Conv1D`, U spans outputs and V inputs."""
    model = get_peft_model(same(gpt2), SemuConfig(target_modules=["c_fc"]))
    tokens = torch.randint(32, (2, 8))
    initialize_semu_weights(model, [tokens], lambda m, b: m(b, labels=b).loss, progress=False)
    for layer in semu_layers(model).values():
        assert layer.semu_U["default"].shape[0] == 64 and layer.semu_V["default"].shape[0] == 16


def test_removed_component_is_orthogonal_to_the_weights() -> None:
    """⟨G − (⟨G,W⟩/‖W‖²) W, W⟩ = 0, what is orthogonal already stays, and a weight of zeros removes nothing."""

    def removed(gradient: Tensor, weight: Tensor) -> Tensor:
        total = GradientSum(tuple(gradient.shape), torch.float32, gradient.device)
        total.add(DenseGradient(gradient))
        total.remove_component(weight)
        return total.total

    gradient, weight = torch.randn(5, 36), torch.randn(5, 36)
    cleaned = removed(gradient, weight)
    assert abs(float((cleaned * weight).sum())) < 1e-4 * float(gradient.norm() * weight.norm())
    torch.testing.assert_close(removed(cleaned, weight), cleaned, atol=1e-6, rtol=1e-5)
    assert torch.equal(removed(gradient, torch.zeros_like(weight)), gradient)
    assert removed(3.0 * weight, weight).norm() < 1e-5 * weight.norm()
    assert removed(gradient, weight.bfloat16()).dtype == torch.float32


def test_the_output_is_bit_identical_and_the_model_untouched() -> None:
    """After the initialisation only the adapter differs: output, weights, modes, flags, gradients, hooks."""
    base = same(Cnn)
    x = sample_input(base)
    expected = run(base, *x)
    model = get_peft_model(base, SemuConfig(target_modules=Cnn.targets))
    model.train()
    model.base_model.model.norm.eval()
    model.base_model.model.norm.weight.grad = torch.ones(8)
    before = Snapshot.of(model)
    initialize_semu_weights(model, image_batches(), FORGET, progress=False)
    now = Snapshot.of(model)
    assert (now.types, now.modes, now.flags, now.hooks) == (before.types, before.modes, before.flags, before.hooks)
    for name, tensor in before.state.items():
        if "semu_" not in name:
            assert torch.equal(now.state[name], tensor), name
    assert {name for name, gradient in now.gradients.items() if gradient is not None} == {
        "base_model.model.norm.weight"
    }
    assert torch.equal(run(model, *x), expected)


@pytest.mark.parametrize(("kind", "mode"), [(Mlp, "flatten"), (Cnn, "flatten"), (Cnn, "per_channel")])
def test_two_runs_are_bit_identical(kind: type[Mlp | Cnn], mode: str) -> None:
    """Same model, same data, same seed: the same bits."""
    states = []
    for _ in range(2):
        model = get_peft_model(same(kind), SemuConfig(target_modules=kind.targets, conv_mode=mode))
        objective = objectives.RandomLabel(seed=3)
        initialize_semu_weights(model, vector_batches() if kind is Mlp else image_batches(), objective, progress=False)
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("way", ["peft", "injected", "add_adapter"])
def test_ranks_are_written(way: str, tmp_path: Path) -> None:
    """The ranks stand in the configuration by full layer name, so that the adapter loads without data."""
    base = same(vit)
    config = SemuConfig(
        target_modules=[VIT["query"], VIT["up"], "projection"], explained_variance=0.8, min_parameters=0
    )
    if way == "peft":
        model: Any = get_peft_model(base, config)
    elif way == "injected":
        model = inject_adapter_in_model(config, base)
    else:
        model = base
        model.add_adapter(config)
    profile = initialize_semu_weights(model, image_batches(), FORGET, progress=False)
    ranks = {name: layer.r["default"] for name, layer in semu_layers(model).items()}
    assert model.peft_config["default"].ranks == profile.ranks == ranks
    endings = tuple(f".{name}" for name in config.target_modules)
    assert set(ranks) == {name for name, _ in same(vit).named_modules() if name.endswith(endings)}
    assert len(set(ranks.values())) > 1
    if way == "injected":
        return
    for layer in semu_layers(model).values():
        nn.init.normal_(layer.semu_core["default"])
    x = sample_input(base)
    expected = run(model, *x)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(same(vit), tmp_path), *x), expected)


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_cap(core: str) -> None:
    """`r` bounds every rank, layers that need less keep less, and the core has that size."""
    model = get_peft_model(same(Cnn), SemuConfig(target_modules=Cnn.targets, r=2, explained_variance=1.0, core=core))
    profile = initialize_semu_weights(model, image_batches(), FORGET, progress=False)
    assert set(profile.ranks.values()) == {2}
    shape = (2, 2) if core == "full" else (2,)
    assert {tuple(layer.semu_core["default"].shape) for layer in semu_layers(model).values()} == {shape}
    assert all(layer.explained_variance < 1 for layer in profile.layers.values())


class Dead(nn.Module):
    """`dead` is used, but its gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.dead, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.live(x) + 0.0 * self.dead(x))


def test_a_layer_without_gradient_gets_rank_0(tmp_path: Path) -> None:
    """It is named in a warning, trains nothing, does not stand in the way of training, and goes to disk and back."""
    model = get_peft_model(same(Dead), SemuConfig(target_modules=["live", "dead"]))
    with pytest.warns(UserWarning, match="zero at 1 target layers.*dead"):
        profile = initialize_semu_weights(model, vector_batches(), FORGET, progress=False)
    assert profile.ranks["dead"] == 0 < profile.ranks["live"]
    FORGET(model, vector_batches()[0]).backward()
    nn.init.normal_(semu_layers(model)["live"].semu_core["default"])
    x = torch.randn(3, 6)
    expected = run(model, x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(same(Dead), tmp_path, is_trainable=True)
    assert torch.equal(run(loaded, x), expected)
    FORGET(loaded, vector_batches()[0]).backward()
    assert torch.isfinite(run(loaded.merge_and_unload(safe_merge=True), x)).all()


def test_bfloat16_model() -> None:
    """In a bfloat16 model the bases are float32 and orthonormal to float32, and the output stays bit-identical."""
    base = same(Cnn).to(torch.bfloat16)
    batches = [(x.bfloat16(), y) for x, y in image_batches()]
    expected = run(base, batches[0][0])
    model = get_peft_model(base, SemuConfig(target_modules=Cnn.targets, conv_mode="per_channel"))
    initialize_semu_weights(model, batches, FORGET, progress=False)
    for layer in semu_layers(model).values():
        for basis in (layer.semu_U["default"], layer.semu_V["default"]):
            assert basis.dtype == torch.float32
            identity = torch.eye(basis.shape[-1]).expand(*basis.shape[:-2], -1, -1)
            torch.testing.assert_close(basis.mT @ basis, identity, atol=1e-5, rtol=0)
    assert torch.equal(run(model, batches[0][0]), expected)


@pytest.mark.parametrize("trained", [False, True])
def test_initialising_again_starts_afresh(trained: bool) -> None:
    """The second initialisation gives what a first one would, whatever the core was trained to."""
    fresh = get_peft_model(same(Mlp), SemuConfig(target_modules="all-linear", explained_variance=0.8))
    again = get_peft_model(same(Mlp), SemuConfig(target_modules="all-linear", explained_variance=0.8))
    initialize_semu_weights(again, vector_batches(seed=5), FORGET, progress=False)
    if trained:
        for layer in semu_layers(again).values():
            nn.init.normal_(layer.semu_core["default"])
    initialize_semu_weights(fresh, vector_batches(), FORGET, progress=False)
    if trained:
        before = Snapshot.of(again)
        with pytest.raises(ValueError, match="has been trained.*overwrite=True"):
            initialize_semu_weights(again, vector_batches(), FORGET, progress=False)
        before.assert_same(again)
    initialize_semu_weights(again, vector_batches(), FORGET, overwrite=trained, progress=False)
    assert again.peft_config["default"].ranks == fresh.peft_config["default"].ranks
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in fresh.state_dict().items())


def test_other_active_adapters_stay_on() -> None:
    """The gradient is taken at the model with the other active adapters: a second request builds on the first."""
    model = get_peft_model(same(Mlp), SemuConfig(target_modules=["fc1", "fc2"], r=3, init_weights=False))
    merged = copy.deepcopy(model).merge_and_unload()
    model.add_adapter("second", SemuConfig(target_modules=["fc2", "head"]))
    model.base_model.set_adapter(["default", "second"])
    initialize_semu_weights(model, vector_batches(), FORGET, adapter_name="second", progress=False)
    assert model.base_model.active_adapters == ["default", "second"]
    alone = get_peft_model(merged, SemuConfig(target_modules=["fc2", "head"]))
    initialize_semu_weights(alone, vector_batches(), FORGET, progress=False)
    for name, layer in semu_layers(alone).items():
        twin = semu_layers(model, "second")[name]
        projector = layer.semu_U["default"] @ layer.semu_U["default"].T
        torch.testing.assert_close(twin.semu_U["second"] @ twin.semu_U["second"].T, projector, atol=1e-3, rtol=0)
    assert all(layer.semu_core["default"].any() for layer in semu_layers(model).values())


def test_two_adapters_of_different_reading() -> None:
    """Each adapter of a convolution keeps its own reading, rank and configuration."""
    model = get_peft_model(same(Cnn), SemuConfig(target_modules=["conv1"]))
    model.add_adapter("channels", SemuConfig(target_modules=["conv1"], conv_mode="per_channel", r=1))
    for name in ("default", "channels"):
        initialize_semu_weights(model, image_batches(), FORGET, adapter_name=name, progress=False)
    layer = semu_layers(model)["conv1"]
    assert layer.semu_U["default"].dim() == 2 and layer.semu_U["channels"].shape == (3, 8, 1)
    assert model.peft_config["channels"].ranks == {"conv1": 1}
    assert model.peft_config["default"].ranks == {"conv1": layer.r["default"]}


def test_objectives_that_switch_the_adapter_off() -> None:
    """Decoupled distillation, whose reference is the model without the adapter, initialises and restores."""
    model = get_peft_model(same(Cnn), SemuConfig(target_modules=Cnn.targets))
    initialize_semu_weights(model, image_batches(), objectives.DecoupledDistillation(), progress=False)
    assert all(layer.r["default"] > 0 and not layer.disable_adapters for layer in semu_layers(model).values())


def test_diffusion_unet() -> None:
    """Any callable serves as objective, here a noise loss of an injected U-Net."""
    model = inject_adapter_in_model(SemuConfig(target_modules=["conv1", "to_q"]), same(unet))
    x = torch.randn(2, 3, 8, 8)
    profile = initialize_semu_weights(model, [x], lambda m, b: m(b, 3).sample.square().mean(), progress=False)
    assert len(profile.ranks) == len(semu_layers(model)) and min(profile.ranks.values()) > 0


def test_progress_bar_is_silent_when_told(capsys: pytest.CaptureFixture[str]) -> None:
    """`progress=False` prints nothing, and nothing warns."""
    model = get_peft_model(same(Mlp), SemuConfig(target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        profile = initialize_semu_weights(model, vector_batches(), FORGET, progress=False)
    assert capsys.readouterr() == ("", "")
    assert isinstance(profile, SubspaceProfile) and list(profile.layers) == ["fc1", "fc2", "head"]


def exhausted() -> Any:
    generator = (batch for batch in vector_batches())
    list(generator)
    return generator


@pytest.mark.parametrize("start", ["empty", "initialised"])
@pytest.mark.parametrize(
    ("batches", "objective", "adapter", "words"),
    [
        (lambda: [], FORGET, "default", ["`forget` must give at least one batch"]),
        (exhausted, FORGET, "default", ["`batches` must give at least one batch", "used up"]),
        (vector_batches, lambda m, b: FORGET(m, b) * float("nan"), "default", ["nan", "batch 0"]),
        (vector_batches, lambda m, b: FORGET(m, b).detach(), "default", ["without a gradient"]),
        (vector_batches, lambda m, b: nn.Parameter(b[0]).mean(), "default", ["'fc1'", "any of the target layers"]),
        (vector_batches, lambda m, b: m(b[0]).mean() * 0.0, "default", ["gradient of zeros"]),
        (vector_batches, FORGET, "defualt", ["'defualt'", "'default'"]),
    ],
    ids=["empty", "exhausted", "nan", "detached", "unused", "zero", "name"],
)
def test_errors_leave_everything_alone(
    start: str, batches: Callable[[], Any], objective: Any, adapter: str, words: list[str]
) -> None:
    """A failed initialisation names the reason and changes neither model nor adapter nor configuration."""
    model = get_peft_model(same(Mlp), SemuConfig(target_modules="all-linear"))
    if start == "initialised":
        initialize_semu_weights(model, vector_batches(seed=9), FORGET, progress=False)
        for layer in semu_layers(model).values():
            nn.init.normal_(layer.semu_core["default"])
    before, config = Snapshot.of(model), model.peft_config["default"].to_dict()
    active = [layer.active_adapters for layer in semu_layers(model).values()]
    with pytest.raises(ValueError) as error:
        initialize_semu_weights(model, batches(), objective, overwrite=True, adapter_name=adapter, progress=False)
    assert all(word in str(error.value) for word in words), error.value
    before.assert_same(model)
    assert model.peft_config["default"].to_dict() == config
    assert [layer.active_adapters for layer in semu_layers(model).values()] == active


def test_a_model_without_semu() -> None:
    """The error says how to add an adapter."""
    with pytest.raises(ValueError, match="Mlp has no SEMU adapter 'default'.*get_peft_model"):
        initialize_semu_weights(Mlp(), vector_batches(), FORGET)


# ---- from what has been gathered before ----


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("statistic", [GradientSum, Sketch.of_size(4)], ids=["sum", "sketch"])
def test_gathered_sums_need_no_pass(statistic: Any, orthogonal: bool) -> None:
    """The bases are those of the batches, to the bit; what was gathered stays as it was and serves again."""
    config = {"target_modules": Mlp.targets, "explained_variance": 0.8, "orthogonal_to_weight": orthogonal}
    gathered = gather(same(Mlp), vector_batches(), FORGET, statistic=statistic, progress=False)
    kept = {name: [tensor.clone() for tensor in total.tensors()] for name, total in gathered.items()}
    expected = get_peft_model(same(Mlp), SemuConfig(**config))
    initialize_semu_weights(expected, vector_batches(), FORGET, statistic=statistic, progress=False)
    for _ in range(2):
        model = get_peft_model(same(Mlp), SemuConfig(**config))
        profile = initialize_semu_weights(model, gathered, progress=False)
        assert profile.batches == 3
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.state_dict().items())
    for name, total in gathered.items():
        assert all(torch.equal(now, then) for now, then in zip(total.tensors(), kept[name], strict=True))


@pytest.mark.parametrize("problem", ["layers", "kind", "shape"])
def test_gathered_statistics_that_do_not_fit(problem: str) -> None:
    """Other layers, another statistic, another reading of the weight: named, and the model stays as it was."""
    model = same(Cnn) if problem == "shape" else same(Mlp)
    batches = image_batches() if problem == "shape" else vector_batches()
    kind = SquaredSum if problem == "kind" else GradientSum
    targets = ["fc1", "fc2"] if problem == "layers" else None
    gathered = gather(model, batches, FORGET, targets=targets, statistic=kind, progress=False)
    adapted = get_peft_model(model, SemuConfig(target_modules=model.targets, conv_mode="per_channel"))
    before = Snapshot.of(adapted)
    name = {"layers": "head", "kind": "SquaredSum", "shape": "conv1"}[problem]
    with pytest.raises(ValueError, match=f"`forget` holds no sum that fits.*{name}.*GradientSum"):
        initialize_semu_weights(adapted, gathered, progress=False)
    before.assert_same(adapted)


def test_a_profile_needs_no_pass() -> None:
    """The ranks are those that the adapter's own configuration asks for."""
    first = get_peft_model(same(Mlp), SemuConfig(target_modules=Mlp.targets, explained_variance=0.99))
    profile = initialize_semu_weights(first, vector_batches(), FORGET, progress=False)
    assert "\n" not in repr(profile) and len(repr(profile)) < 120 and len(repr(profile.layers["fc1"])) < 120
    expected = get_peft_model(same(Mlp), SemuConfig(target_modules=Mlp.targets, explained_variance=0.7))
    from_data = initialize_semu_weights(expected, vector_batches(), FORGET, progress=False)
    model = get_peft_model(same(Mlp), SemuConfig(target_modules=Mlp.targets, explained_variance=0.7))
    assert initialize_semu_weights(model, profile).ranks == from_data.ranks
    with pytest.raises(ValueError, match="`retain` changes directions"):
        initialize_semu_weights(model, profile, retain=Retain(vector_batches(), FORGET))


def test_arguments_that_are_missing_or_odd() -> None:
    """Batches need an objective, and the statistic must be one that has directions."""
    model = get_peft_model(same(Mlp), SemuConfig(target_modules=Mlp.targets))
    with pytest.raises(TypeError, match="`objective` must be given with batches, got None"):
        initialize_semu_weights(model, vector_batches(), progress=False)
    with pytest.raises(ValueError, match="can be factorised, got SquaredSum"):
        initialize_semu_weights(model, vector_batches(), FORGET, statistic=SquaredSum, progress=False)
    with pytest.raises(TypeError, match="`retain` must be"):
        initialize_semu_weights(model, vector_batches(), FORGET, retain=vector_batches(), progress=False)


def test_the_model_may_serve_while_it_is_initialised() -> None:
    """The pass runs on modules of its own: the trained adapter stays on in the model, in its modes."""
    model = get_peft_model(same(Cnn), SemuConfig(target_modules=Cnn.targets, r=2))
    initialize_semu_weights(model, image_batches(), FORGET, progress=False)
    for layer in semu_layers(model).values():
        nn.init.normal_(layer.semu_core["default"])
    x = sample_input(same(Cnn))
    expected, original = run(model, *x), run(same(Cnn), *x)
    model.train()
    model.base_model.model.norm.eval()

    def objective(reference: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            torch.testing.assert_close(model(*x), expected, atol=1e-6, rtol=1e-5)
            assert torch.equal(reference(*x), original)
        assert model.training and not model.base_model.model.norm.training and not reference.training
        return FORGET(reference, batch)

    initialize_semu_weights(model, image_batches(), objective, overwrite=True, progress=False)
    torch.testing.assert_close(run(model, *x), original)
