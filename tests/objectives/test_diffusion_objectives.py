"""Diffusion objectives against their formulas, on every family of denoisers and every kind of schedule."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from diffusion_models import CLASSES, DENOISERS, class_unet, diffusion_batch, dit, randomize, text_encoder
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft import SemuConfig, initialize_semu_weights, objectives, unlearn
from semu_peft.model_state import dtype_of
from semu_peft.objectives import NoiseSchedule
from semu_peft.objectives.denoiser import denoiser_output, repeated
from semu_peft.tuner.adapted import semu_layers

DDPM = diffusers.DDPMScheduler()


class Linear(nn.Module):
    """A denoiser that can be computed by hand: `w · x + t / 1000 + 0.1 class`."""

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.weight * x + (timestep / 1000 + 0.1 * class_labels).view(-1, 1, 1, 1),)


def pair(count: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 1, 4, 4), torch.arange(count) % CLASSES


# ---- schedules ----


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "name",
    ["DDPM", "DDIM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete",
     "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"],
)  # fmt: skip
def test_samplers_of_one_model_share_its_schedule(name: str, prediction: str) -> None:
    betas: dict[str, Any] = {"beta_start": 1e-3, "beta_end": 0.015, "beta_schedule": "scaled_linear"}
    scheduler = getattr(diffusers, f"{name}Scheduler")(prediction_type=prediction, **betas)
    scheduler.set_timesteps(7)  # where sampling stands must not matter
    schedule = NoiseSchedule.from_scheduler(scheduler)
    ddpm = diffusers.DDPMScheduler(prediction_type=prediction, **betas)
    clean, noise, index = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999])
    expected = {"epsilon": noise, "sample": clean, "v_prediction": ddpm.get_velocity(clean, noise, index)}[prediction]
    torch.testing.assert_close(schedule.add_noise(clean, noise, index), ddpm.add_noise(clean, noise, index))
    torch.testing.assert_close(schedule.target(clean, noise, index), expected)
    assert schedule.timesteps_at(index).tolist() == index.tolist()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching(shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    clean, noise, index = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999])
    told = schedule.timesteps_at(index)
    torch.testing.assert_close(schedule.add_noise(clean, noise, index), scheduler.scale_noise(clean, told, noise))
    torch.testing.assert_close(schedule.target(clean, noise, index), noise - clean)
    assert (schedule.noise.diff() > 0).all() and told[-1] == 1000
    scheduler.set_timesteps(5)
    assert torch.equal(NoiseSchedule.from_scheduler(scheduler).noise, schedule.noise)
    solver = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    other = NoiseSchedule.from_scheduler(solver)
    torch.testing.assert_close(other.noise, schedule.noise, atol=2e-3, rtol=0)
    assert other.prediction_type == "flow_prediction"


def test_a_model_that_is_told_the_noise_in_place_of_a_step() -> None:
    """As video models are, by the sampler that they ship with."""
    scheduler = diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
    schedule = NoiseSchedule.from_scheduler(scheduler)
    scheduler.set_timesteps(len(schedule))
    torch.testing.assert_close(schedule.timesteps, scheduler.timesteps.flip(0), atol=1e-4, rtol=0)


def test_a_schedule_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="EDMEulerScheduler.*DDPMScheduler"):
        objectives.DenoisingLoss(diffusers.EDMEulerScheduler())
    with pytest.raises(ValueError, match="timestep_span"):
        objectives.DenoisingLoss(DDPM, timestep_span=(0.5, 0.2))


def test_timesteps_come_in_antithetic_pairs_within_their_span() -> None:
    schedule = NoiseSchedule.from_scheduler(DDPM)
    draw = torch.Generator().manual_seed(0)
    index = schedule.draw(8, draw)
    assert (index[:4] + index[4:] == 999).all()
    assert len(schedule.draw(5, draw)) == 5
    index = schedule.draw(1000, draw, span=(0.5, 1.0))
    assert index.min() >= 500 and index.max() <= 999
    index = schedule.draw(2000, draw, antithetic=False)
    assert index.min() < 20 and index.max() > 980


# ---- the formulas ----


def test_denoising_loss_is_the_training_loss_and_ascent_its_negative() -> None:
    model, batch = Linear(), pair()
    loss = objectives.DenoisingLoss(DDPM, seed=3)(model, batch)
    draw = torch.Generator().manual_seed(3)
    first = torch.randint(0, 1000, (2,), generator=draw)
    index, noise = torch.cat([first, 999 - first]), torch.randn(batch[0].shape, generator=draw)
    noisy = DDPM.add_noise(batch[0], noise, index)
    expected = (model(noisy, index, batch[1])[0] - noise).square().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(objectives.DenoisingAscent(DDPM, seed=3)(model, batch), -expected)


@pytest.mark.parametrize(("towards", "gap"), [("next", 0.1), ("random", None), ("anchor", 0.2)])
def test_condition_matching(towards: str, gap: float | None) -> None:
    images = torch.randn(64, 1, 4, 4)
    batch = {
        "latents": images,
        "condition": {"class_labels": torch.zeros(64, dtype=torch.long)},
        "anchor": {"class_labels": torch.full((64,), 2)},
    }
    objective = objectives.ConditionMatching(DDPM, towards=towards, num_classes=4, reference=Linear())
    loss = objective(Linear(), batch)  # only the class shifts the prediction
    if gap is None:  # shifts of 1, 2 and 3 tenths, equally likely
        assert 0.01 < float(loss) < 0.09 and float(loss) == pytest.approx(14 / 300, abs=0.012)
    else:
        assert float(loss) == pytest.approx(gap**2, rel=1e-4)


def test_the_next_class_wraps_around() -> None:
    labels = torch.full((4,), CLASSES - 1)
    objective = objectives.ConditionMatching(DDPM, towards="next", num_classes=CLASSES, reference=Linear())
    loss = objective(Linear(), (torch.randn(4, 1, 4, 4), labels))
    assert float(loss) == pytest.approx((0.1 * (CLASSES - 1)) ** 2, rel=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0, 3.0])
def test_negative_guidance_goes_beyond_the_unconditional(eta: float) -> None:
    images, labels = pair()
    batch = {
        "latents": images,
        "condition": {"class_labels": torch.full_like(labels, 3)},
        "unconditional": {"class_labels": torch.zeros_like(labels)},
    }
    loss = objectives.NegativeGuidance(DDPM, eta=eta, reference=Linear())(Linear(), batch)
    assert float(loss) == pytest.approx((0.3 * (1 + eta)) ** 2, rel=1e-4)


def test_guidance_scales_the_prediction() -> None:
    images, labels = pair()
    batch = {
        "latents": images,
        "condition": {"class_labels": torch.full_like(labels, 3)},
        "unconditional": {"class_labels": torch.zeros_like(labels)},
        "anchor": {"class_labels": torch.ones_like(labels)},
    }
    objective = objectives.ConditionMatching(DDPM, guidance_scale=7.5, reference=Linear())
    assert float(objective(Linear(), batch)) == pytest.approx((7.5 * 0.2) ** 2, rel=1e-4)


def test_preserving_is_zero_at_the_original_and_counts_what_moved() -> None:
    batch = pair()
    objective = objectives.PreservePrediction(DDPM, reference=Linear(), seed=5)
    assert float(objective(Linear(), batch)) == 0
    draw = torch.Generator().manual_seed(6)
    first = torch.randint(0, 1000, (2,), generator=draw)
    noisy = DDPM.add_noise(batch[0], torch.randn(batch[0].shape, generator=draw), torch.cat([first, 999 - first]))
    other = objectives.PreservePrediction(DDPM, reference=Linear(), seed=6, under="random", num_classes=4)
    torch.testing.assert_close(other(Linear(0.7), batch), (0.2 * noisy).square().mean())


def test_the_target_is_the_original_or_the_model_as_it_stands() -> None:
    model = inject_adapter_in_model(SemuConfig(target_modules=["to_k"], r=2, init_weights=False), class_unet())
    batch = (torch.randn(4, 3, 8, 8), torch.ones(4, dtype=torch.long))
    frozen = class_unet()
    losses = {
        name: objectives.PreservePrediction(DDPM, **settings)(model, batch)
        for name, settings in {
            "adapter off": {}, "copy": {"reference": frozen}, "current": {"target_model": "current"},
        }.items()
    }  # fmt: skip
    assert float(losses["current"]) == 0 < float(losses["copy"])
    torch.testing.assert_close(losses["adapter off"], losses["copy"])
    with pytest.raises(ValueError, match="target_model"):
        objectives.NegativeGuidance(DDPM, target_model="other")


def test_draws_are_a_matter_of_the_seed_alone_and_resume() -> None:
    model, batch = Linear(), pair()
    torch.manual_seed(1)
    first = objectives.DenoisingLoss(DDPM, seed=1)
    losses = [float(first(model, batch)) for _ in range(3)]
    torch.manual_seed(2)
    second = objectives.DenoisingLoss(DDPM, seed=1)
    assert float(second(model, batch)) == losses[0]
    third = objectives.DenoisingLoss(DDPM, seed=9)
    third.load_state_dict(second.state_dict())
    assert [float(third(model, batch)) for _ in range(2)] == losses[1:]
    assert float(objectives.DenoisingLoss(DDPM, seed=2)(model, batch)) != losses[0]


# ---- what is refused ----


def test_what_a_batch_lacks_is_named() -> None:
    batch = pair()
    with pytest.raises(ValueError, match="NegativeGuidance needs the condition 'unconditional'"):
        objectives.NegativeGuidance(DDPM, reference=Linear())(Linear(), batch)
    with pytest.raises(ValueError, match="num_classes"):
        objectives.ConditionMatching(DDPM, towards="next", reference=Linear())(Linear(), batch)
    with pytest.raises(TypeError, match="latents"):
        objectives.DenoisingLoss(DDPM)(Linear(), {"pixel_values": batch[0]})
    with pytest.raises(ValueError, match="must have the shape of the noisy samples"):
        denoiser_output(
            dit(), torch.randn(2, 4, 8, 8)[:, :, :4], torch.tensor([1, 2]), {"class_labels": torch.tensor([0, 1])}
        )


# ---- real architectures ----

TARGETS = {
    "class_unet": ["to_q", "to_v", "time_emb_proj", "conv1"],
    "text_unet": ["attn2.to_k", "attn2.to_v"],
    "xl_unet": ["attn2.to_k", "attn2.to_v", "conv2"],
    "dit": "all-linear",
    "sd3_transformer": ["to_k", "to_v", "add_k_proj"],
    "flux_transformer": ["to_k", "to_v", "ff.net.2"],
}


@pytest.mark.parametrize("kind", DENOISERS)
def test_every_denoiser_unlearns_and_keeps_its_weights(kind: str) -> None:
    model = randomize(DENOISERS[kind]())
    before = copy.deepcopy(model.state_dict())
    config = SemuConfig(target_modules=TARGETS[kind], exclude_modules="pos_embed.*" if kind == "dit" else None)
    if hasattr(model, "add_adapter"):
        model.add_adapter(config)
    else:
        model = get_peft_model(model, config)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler() if kind in ("sd3_transformer", "flux_transformer") else DDPM
    schedule = NoiseSchedule.from_scheduler(scheduler, 1e-3 if kind == "flux_transformer" else 1.0)
    batches = [diffusion_batch(kind, seed=seed) for seed in range(2)]
    objective = objectives.ConditionMatching(schedule)
    profile = initialize_semu_weights(model, batches, objective, progress=False)
    assert all(rank > 0 for rank in profile.ranks.values())

    def measured() -> float:
        with torch.no_grad():
            return float(objectives.ConditionMatching(schedule, seed=7)(model, batches[0]))

    start = measured()
    unlearn(model, batches, objective, epochs=30, learning_rate=0.05, progress=False)
    assert measured() < 0.8 * start
    for name, layer in semu_layers(model).items():
        assert layer.semu_core["default"].any(), name
        assert torch.equal(layer.get_base_layer().weight, before[f"{name}.weight"]), name


def test_flux_is_not_asked_beyond_its_time() -> None:
    """Its scheduler alone says nothing of the thousand between them, and the loss would be one of noise."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"`scheduler`.*from 0 to 1, got .*from_scheduler\(scheduler, 1e-3\)"):
        objectives.DenoisingLoss(scheduler)(DENOISERS["flux_transformer"](), diffusion_batch("flux_transformer"))


def test_learned_variances_are_left_out() -> None:
    model = randomize(dit())
    labels, noisy, timestep = torch.tensor([1, 2]), torch.randn(2, 4, 8, 8), torch.tensor([5, 900])
    full = model(noisy, timestep=timestep, class_labels=labels).sample
    assert full.shape == (2, 8, 8, 8)
    assert torch.equal(denoiser_output(model, noisy, timestep, {"class_labels": labels}), full[:, :4])


def test_a_bfloat16_denoiser_gives_float32_predictions() -> None:
    batch = diffusion_batch("text_unet")
    exact = DENOISERS["text_unet"]()
    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    timestep = torch.tensor([3, 50, 500, 900])
    one, other = (denoiser_output(model, batch["latents"], timestep, batch["condition"]) for model in (exact, rounded))
    assert one.dtype == other.dtype == torch.float32
    assert 0 < (one - other).norm() / one.norm() < 0.05


def _differentiates_float8() -> bool:
    """Whether convolutions whose weights went back to float8 have gradients here: PyTorch's differ by processor."""
    weight = nn.Parameter(torch.ones(8, 8, 3, 3, dtype=torch.bfloat16), requires_grad=False)
    inputs = torch.ones(1, 8, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    output = F.conv2d(inputs, weight)
    weight.data = weight.data.to(torch.float8_e4m3fn)
    try:
        output.sum().backward()
    except RuntimeError:
        return False
    return True


def test_inputs_follow_the_models_dtype() -> None:
    """Not the first parameter's: it may stay in float32 (Wan's), or stored in float8 and computed with in another."""
    kept = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(torch.bfloat16))
    kept.dtype = torch.bfloat16  # type: ignore[assignment]
    assert dtype_of(kept) == dtype_of(nn.DataParallel(kept)) == torch.bfloat16
    batch, timestep = diffusion_batch("text_unet"), torch.tensor([3, 50, 500, 900])
    exact = denoiser_output(DENOISERS["text_unet"](), batch["latents"], timestep, batch["condition"])
    stored = DENOISERS["text_unet"]()
    stored.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert dtype_of(stored) == torch.bfloat16
    stored.add_adapter(SemuConfig(target_modules=["attn2.to_k", "attn2.to_v"]))
    with torch.no_grad():
        rounded = denoiser_output(stored, batch["latents"], timestep, batch["condition"])
    assert 0 < (exact - rounded).norm() / exact.norm() < 0.3
    if not _differentiates_float8():
        return
    initialize_semu_weights(stored, [batch], objectives.ConditionMatching(DDPM), progress=False)
    history = unlearn(stored, [batch] * 10, objectives.ConditionMatching(DDPM), epochs=1, progress=False).history
    assert history[-1]["loss"] < history[0]["loss"]


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    batch = diffusion_batch("text_unet")
    gradients = []
    for checkpointing in (False, True):
        model = DENOISERS["text_unet"]()
        model.add_adapter(SemuConfig(target_modules=["to_k", "conv1"], r=2, init_weights=False))
        for layer in semu_layers(model).values():
            layer.set_basis(
                "default", *(torch.eye(getattr(layer, kind)["default"].shape[0], 2) for kind in ("semu_U", "semu_V"))
            )
        if checkpointing:
            model.enable_gradient_checkpointing()
        objectives.ConditionMatching(DDPM)(model, batch).backward()
        gradients.append([layer.semu_core["default"].grad for layer in semu_layers(model).values()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
        assert plain.any()


def test_a_text_encoder_learns_to_read_one_word_as_another() -> None:
    encoder = text_encoder()
    forget, anchor = torch.tensor([[1, 4, 10, 2]]), torch.tensor([[1, 4, 11, 2]])
    other = torch.tensor([[1, 4, 9, 2]])
    original: dict[str, Any] = {name: encoder(ids).last_hidden_state for name, ids in {"a": anchor, "o": other}.items()}
    before = (encoder(forget).last_hidden_state - original["a"]).norm()
    model = inject_adapter_in_model(SemuConfig(target_modules=["fc1", "fc2", "v_proj"]), encoder)
    batches = [
        {"input_ids": forget, "anchor_input_ids": anchor},
        {"input_ids": other, "anchor_input_ids": other},
    ]
    objective = objectives.EmbeddingMatching()
    initialize_semu_weights(model, batches[:1], objective, progress=False)
    unlearn(model, batches, objective, epochs=120, learning_rate=0.1, progress=False)
    with torch.no_grad():
        assert (model(forget).last_hidden_state - original["a"]).norm() < 0.5 * before
        assert (model(other).last_hidden_state - original["o"]).norm() < 0.5 * before
    with pytest.raises(ValueError, match="anchor_input_ids"):
        objective(model, {"input_ids": forget})


def test_a_text_encoder_is_matched_where_its_pipeline_reads() -> None:
    """SD 1 and 2 read the last layer, XL and 3 and `clip_skip` the last but one; each prompt has a layer's own unit."""
    forget, anchor = torch.tensor([[1, 4, 10, 2], [1, 5, 10, 2]]), torch.tensor([[1, 4, 11, 2], [1, 9, 3, 2]])
    ids = {"input_ids": forget, "anchor_input_ids": anchor}
    encoder, other = text_encoder(), text_encoder(1)
    with torch.no_grad():
        read = encoder(ids["input_ids"], output_hidden_states=True)
        meant = other(ids["anchor_input_ids"], output_hidden_states=True)

    def relative(states: Tensor, target: Tensor) -> Tensor:
        return ((states - target).square().sum((1, 2)) / target.square().sum((1, 2))).mean()

    last = relative(read.last_hidden_state, meant.last_hidden_state)
    before = relative(read.hidden_states[-2], meant.hidden_states[-2])
    for layers, expected in {(-1,): last, (-2,): before, (-1, -2): last + before}.items():
        loss = objectives.EmbeddingMatching(reference=other, hidden_states=layers)(encoder, ids)
        torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(objectives.EmbeddingMatching(reference=other)(encoder, ids), last + before)
    with pytest.raises(ValueError, match="`hidden_states` must be layers of the encoder, got -9 of 3"):
        objectives.EmbeddingMatching(reference=other, hidden_states=(-9,))(encoder, ids)
    for wrong in ((), (2,), -2):
        with pytest.raises(ValueError, match="`hidden_states` must be layers counted from the end"):
            objectives.EmbeddingMatching(hidden_states=wrong)  # type: ignore[arg-type]


def test_repeating_a_condition() -> None:
    got: dict[str, Any] = repeated({"a": torch.ones(1, 2), "b": {"c": torch.zeros(1)}}, 3)
    assert got["a"].shape == (3, 2) and got["b"]["c"].shape == (3,)
