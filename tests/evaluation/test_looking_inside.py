"""Quantisation, probes, the logit lens, and membership with shadow models: against computations by hand."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from language_batches import packed, padded
from models import CLASSES, Cnn, Mlp, Snapshot, gpt2, image_batches, llama, vector_batches
from peft import HRAConfig, IA3Config, LoraConfig, get_peft_model
from torch import nn
from torch.distributions import Normal

from semu_peft import SemuConfig
from semu_peft.evaluation import (
    lens_attack,
    linear_probes,
    lira_scores,
    logit_lens,
    noisy_inputs,
    predict,
    quantization,
    rmia_scores,
    round_to_nearest,
    rounded_weights,
    score_attack,
    separation,
    stripping,
)
from semu_peft.evaluation.auc import auc
from semu_peft.evaluation.quantization import weights_to_round
from semu_peft.objectives.tokens import call_model
from semu_peft.report.measured import plain

FORGET, RETAIN = vector_batches(2, 12, seed=1), vector_batches(2, 12, seed=2)


# ---- quantisation ----


def test_rounding_is_to_the_nearest_level_of_a_row_or_group() -> None:
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    for bits, group in ((8, None), (4, None), (4, 5)):
        rounded = round_to_nearest(weight, bits, group)
        pieces = weight.split(group or 12, dim=1)
        for piece, after in zip(pieces, rounded.split(group or 12, dim=1), strict=True):
            step = piece.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            assert ((after - piece).abs() <= step / 2 + 1e-6).all()
            assert torch.allclose(after / step, (after / step).round(), atol=1e-4)
    assert torch.equal(round_to_nearest(torch.zeros(2, 3), 4), torch.zeros(2, 3))
    kernel = torch.randn(4, 3, 2, 2)
    assert torch.equal(round_to_nearest(kernel, 4), round_to_nearest(kernel.flatten(1), 4).view_as(kernel))


@pytest.mark.parametrize("kind", [Mlp, Cnn])
def test_it_is_the_merged_model_that_is_rounded(kind: Any) -> None:
    torch.manual_seed(0)
    data = FORGET if kind is Mlp else image_batches(2, 12)
    model = get_peft_model(kind(), SemuConfig(target_modules=kind.targets, r=2, init_weights=False))
    found = quantization(model, data, data, bits=3)
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        for parameter in merged.parameters():
            if parameter.dim() > 1:
                parameter.copy_(round_to_nearest(parameter, 3))
    assert found.forget == (
        predict(model, data, progress=False).accuracy,
        predict(merged, data, progress=False).accuracy,
    )
    assert found.retain == found.forget and {layer.layer for layer in found.layers} == set(kind.targets)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=Mlp.targets, r=2, use_dora=True),
        LoraConfig(target_modules=Mlp.targets, r=2, lora_bias=True),
        IA3Config(target_modules=Mlp.targets, feedforward_modules=[]),
        HRAConfig(target_modules=Mlp.targets, r=2),
    ],
    ids=["DoRA", "LoRA with biases", "IA3", "HRA"],
)
def test_adapters_that_are_no_sums_are_merged_as_peft_does(config: Any) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Mlp(), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter)
    before = Snapshot.of(model)
    merged = copy.deepcopy(model).merge_and_unload()
    said = quantization(model, FORGET, bits=4, measure=lambda model, batches: float(model(batches[0][0]).norm()))
    assert said.forget[1] == pytest.approx(float(quantized(merged)(FORGET[0][0]).norm()), rel=1e-4)
    assert len(said.layers) == len(Mlp.targets)
    before.assert_same(model)


def quantized(model: nn.Module) -> nn.Module:
    for weight in weights_to_round(model).values():
        weight.weight.data = weight.of_rows(round_to_nearest(weight.rows(weight.weight), 4))
    return model


def test_rows_of_conv1d_are_its_outputs() -> None:
    """GPT-2's layers are rounded as the linear layers that they stand for."""
    model = gpt2().eval()
    weight = model.transformer.h[0].mlp.c_fc.weight
    seen = []

    def measure(rounded: nn.Module, batches: Any) -> float:
        seen.append(rounded.transformer.h[0].mlp.c_fc.weight.detach().clone())
        return 0.0

    quantization(model, [1], measure=measure, bits=3, group_size=4)
    assert torch.equal(seen[0], weight) and torch.equal(seen[1], round_to_nearest(weight.T, 3, 4).T)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_rows_of_fused_experts_are_the_outputs_of_each(is_transposed: bool) -> None:
    """Each expert's outputs have levels of their own, as the linear layers had that were fused."""
    torch.manual_seed(0)
    experts = nn.Module()
    experts.weight = nn.Parameter(torch.randn(3, 6, 4) * torch.logspace(-2, 0, 6)[:, None])
    if is_transposed:
        experts.weight, experts.is_transposed = nn.Parameter(experts.weight.detach().mT.contiguous()), True
    weight = experts.weight.detach().clone()
    each = weight.mT if is_transposed else weight
    expected = torch.stack([round_to_nearest(expert, 4) for expert in each])
    seen: list[torch.Tensor] = []

    def measure(rounded: Any, batches: Any) -> float:
        seen.append(rounded[0].weight.detach().clone())
        return 0.0

    model = nn.Sequential(experts)
    quantization(model, [1], bits=4, measure=measure)
    assert torch.equal(seen[0], weight)
    assert torch.equal(seen[1], expected.mT if is_transposed else expected)
    with rounded_weights(model, bits=4):
        assert torch.equal(experts.weight, seen[1])


def test_the_side_of_experts_shows_by_their_hidden_size() -> None:
    """Llama 4's are stored by their inputs and do not say so, Mixtral's by their outputs."""
    for by_input in (False, True):
        experts = nn.Module()
        experts.hidden_size = 4
        shapes = {"gate_up_proj": (2, 4, 6), "down_proj": (2, 3, 4)} if by_input else {
            "gate_up_proj": (2, 6, 4), "down_proj": (2, 4, 3),
        }  # fmt: skip
        for name, shape in shapes.items():
            experts.register_parameter(name, nn.Parameter(torch.randn(shape)))
        found = weights_to_round(nn.Sequential(experts))
        assert [each.by_input for each in found.values()] == [by_input, by_input]
        assert [len(each.rows(each.weight)) for each in found.values()] == [12, 8]


def test_both_ways_to_round_reach_the_same_weights_and_leave_head_and_embeddings() -> None:
    model = get_peft_model(llama(), SemuConfig(target_modules=["q_proj", "lm_head"], r=2, init_weights=False))
    seen: list[dict[str, torch.Tensor]] = []

    def measure(rounded: nn.Module, batches: Any) -> float:
        seen.append({name: each.weight.detach().clone() for name, each in weights_to_round(rounded).items()})
        return 0.0

    head, table = model.get_output_embeddings(), model.get_input_embeddings().weight
    before = table.detach().clone()
    quantization(model, [1], measure=measure, bits=3)
    with rounded_weights(model, bits=3):
        measure(model, [1])
        assert torch.equal(table, before)
        assert len(head.get_base_layer().weight[0].unique()) > 7  # merged, not rounded
    assert seen[1].keys() == seen[2].keys() and not any("lm_head" in name or "embed" in name for name in seen[1])
    for name, weight in seen[1].items():
        torch.testing.assert_close(weight, seen[2][name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_small_correction_vanishes_and_a_large_one_does_not() -> None:
    def after(size: float) -> Any:
        torch.manual_seed(0)
        model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1", "fc2"], r=1, init_weights=False))
        with torch.no_grad():
            for name, core in model.named_parameters():
                if "semu_core" in name:
                    core.fill_(size)
        return quantization(model, FORGET, bits=4)

    small, large = after(1e-6), after(5.0)
    assert small.vanished == ("fc1", "fc2") and small.smallest_surviving_norm is None
    assert all(layer.moved == 0 for layer in small.layers)
    assert large.vanished == () and large.smallest_surviving_norm == pytest.approx(5.0, rel=1e-4)
    assert large.row[1].endswith("0 of 2 corrections vanish, the smallest that survives has the norm 5")
    assert small.row[1].endswith("2 of 2 corrections vanish")
    told = plain(large)  # as a report has it
    assert told["smallest_surviving_norm"] == large.smallest_surviving_norm and told["vanished"] == []
    assert "2 of 2 corrections vanish" in repr(small)
    nothing = after(0.0)
    assert nothing.row[1].endswith(", no correction to round: all are zero")
    assert nothing.vanished == () and nothing.smallest_surviving_norm is None and len(nothing.layers) == 2
    some = replace(large, layers=(*large.layers, *nothing.layers))
    assert some.row[1] == large.row[1], "what is zero is none of those that could survive"


# ---- probes ----


class Hides(nn.Module):
    """Knows the sign of its input in the middle and says nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        nn.init.zeros_(self.blocks[1].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x[:, :CLASSES]


def test_a_probe_finds_what_the_output_does_not_say() -> None:
    forget, retain = ([(torch.randn(40, 6) + at, torch.zeros(40).long())] for at in (3, -3))
    found = linear_probes(Hides(), forget, retain, reference=Hides())
    assert found.layers == ("blocks.0", "blocks.1")
    assert found.found[0] == 100.0 and found.found[1] == pytest.approx(50.0, abs=1)
    assert len(found.reference) == 2 and "best 100.0% at 'blocks.0'" in repr(found)
    with pytest.raises(ValueError, match="layers"):
        linear_probes(Hides(), forget, retain, layers=["nope"])


class Stages(nn.Module):
    """Its stages are lists, as in SegFormer and PVT; it calls one layer twice, and one not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.ModuleList([nn.Linear(6, 6)])
        self.late = nn.ModuleList([nn.Linear(6, CLASSES)])
        self.stages = nn.ModuleList([nn.ModuleList([nn.Linear(6, 6)]), nn.ModuleList([nn.Linear(6, 6)])])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in (self.stages[0], self.stages[1], self.stages[1]):
            x = stage[0](x)
        return self.late[0](x)


def test_probes_read_what_is_called_in_its_order_and_an_example_once() -> None:
    torch.manual_seed(0)
    model = Stages()
    sides = [[(torch.randn(20, 6), torch.zeros(20).long())] for _ in range(2)]
    found = linear_probes(model, *sides)
    assert found.layers == ("stages.0.0", "stages.1.0", "late.0")
    last = nn.Sequential(model.stages[0][0], model.stages[1][0], model.stages[1][0])
    assert found.found[1] == linear_probes(last, *sides).found[-1], "of a layer called twice the last"
    with pytest.raises(ValueError, match=r"`layers` must name layers that give tensors, got \['stages.0'\]"):
        linear_probes(model, *sides, layers=["stages.0", "late.0"])


def test_probes_see_the_correction_of_an_adapter() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Mlp(), SemuConfig(target_modules=Mlp.targets, r=2, init_weights=False))
    forget, retain = ([(torch.randn(30, 6) + at, torch.zeros(30).long())] for at in (0.3, -0.3))
    merged = copy.deepcopy(model).merge_and_unload()
    names = ["fc1", "head"]
    both = (linear_probes(net, forget, retain, layers=names).found for net in (model, merged))
    assert next(both) == pytest.approx(next(both), abs=5)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_the_lens_ends_with_what_the_model_says(build: Any) -> None:
    torch.manual_seed(0)
    model = build()
    ids = torch.randint(3, 32, (4, 7))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    found = logit_lens(model, [batch])
    logits, labels = call_model(model, batch)
    said = 100 * logits.softmax(-1).gather(1, labels[:, None]).mean().item()
    assert found.layers == ("embeddings", "layer 1", "layer 2")
    assert found.found[-1] == pytest.approx(said, rel=1e-5) and found.chance == pytest.approx(100 / 32)
    states = model(**{**batch, "output_hidden_states": True}).hidden_states
    norm = model.model.norm if build is llama else model.transformer.ln_f
    middle = model.lm_head(norm(states[1]))[:, :-1].softmax(-1).gather(2, ids[:, 1:, None]).mean().item()
    assert found.found[1] == pytest.approx(100 * middle, rel=1e-5)
    with pytest.raises(ValueError, match="model"):
        logit_lens(Mlp(), [batch])


@pytest.mark.parametrize("read", [logit_lens, lens_attack])
def test_the_lens_holds_the_logits_of_few_layers_at_a_time(read: Any) -> None:
    """Of all layers, tokens and a vocabulary as language models have it they are tens of gigabytes."""
    model, ids = llama(), torch.randint(3, 32, (4, 7))
    model.config.num_hidden_layers = len(model.model.layers) + 4
    model.model.layers.extend(copy.deepcopy(model.model.layers[-1]) for _ in range(4))
    alive: list[int] = []

    def note(*_: Any) -> None:
        alive.append(sum(type(each) is torch.Tensor and each.shape == (24, 32) for each in gc.get_objects()))

    model.lm_head.register_forward_hook(note)
    read(model, [{"input_ids": ids, "labels": ids}])
    assert len(alive) >= 7 and max(alive) <= 2


@pytest.mark.parametrize("batch", [padded("left", more=2), packed()], ids=["left", "packed"])
def test_the_lens_reads_rows_of_any_form_as_the_model_is_read(batch: Any) -> None:
    """Padding on the left is not counted, and packed sequences do not see each other."""
    torch.manual_seed(0)
    model = gpt2()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    batch.pop("token_mask")
    assert logit_lens(model, [batch]).found == pytest.approx(logit_lens(model, [padded("right")]).found, rel=1e-4)


def test_probes_do_not_count_padding() -> None:
    torch.manual_seed(0)
    model, seen = gpt2(), []
    model.transformer.ln_f.register_forward_hook(lambda module, inputs, output: seen.append(output))

    def states(side: str) -> torch.Tensor:
        batches = [padded(side, more=2, seed=seed, prompt=0) for seed in (3, 4)]
        linear_probes(model, batches, batches, layers=["transformer.h.1"])
        masks = [batch["attention_mask"].bool() for batch in (*batches, *batches)]
        found = torch.cat([each[mask] for each, mask in zip(seen, masks, strict=True)])
        seen.clear()
        return found

    torch.testing.assert_close(states("left"), states("right"), rtol=1e-5, atol=1e-5)


# ---- membership with shadow models ----


def test_the_auc_is_that_of_all_pairs() -> None:
    member, other = torch.randint(6, (20,)).float(), torch.randint(5, (15,)).float()
    pairs = (member[:, None] > other).double() + 0.5 * (member[:, None] == other).double()
    assert auc(member, other) == pytest.approx(pairs.mean().item())
    attack = score_attack(member, other, attack="mine")
    assert attack.auc == pytest.approx(100 * separation(other, member).auc)  # one AUC, whichever side is called first
    assert attack.interval == pytest.approx([100 * bound for bound in separation(other, member).interval])
    assert attack.interval[0] <= attack.auc <= attack.interval[1] and "mine" in repr(attack)


def test_lira_is_a_likelihood_ratio() -> None:
    draw = np.random.default_rng(0)
    outside, inside = torch.tensor(draw.normal(0, 1, (80, 3))), torch.tensor(draw.normal(2, 1.5, (70, 3)))
    x = torch.tensor([0.3, 1.9, -0.5], dtype=torch.float64)
    densities = [Normal(s.mean(0), s.std(0, correction=0)).log_prob(x) for s in (inside, outside)]
    assert torch.allclose(lira_scores(x, outside, inside), densities[0] - densities[1])
    few = lira_scores(x, outside[:4])
    assert torch.allclose(few, (x - outside[:4].mean(0)) / (outside[:4] - outside[:4].mean(0)).pow(2).mean().sqrt())
    left_out = torch.cat([outside, torch.full((1, 3), float("nan"))])
    assert torch.allclose(lira_scores(x, left_out), lira_scores(x, outside))


def test_rmia_counts_whom_an_example_dominates() -> None:
    x, z = torch.tensor([0.9, 0.5, 0.2]).double(), torch.tensor([0.2, 0.4, 0.8, 0.9]).double()
    by_shadow, by_shadow_z = torch.rand(3, 3).double(), torch.rand(3, 4).double() + 0.1
    marginal = 0.5 * (1.3 * by_shadow.mean(0) + 0.7)
    ratios, others = x / marginal, z / by_shadow_z.mean(0)
    expected = (ratios[:, None] / others >= 1.2).double().mean(1)
    assert torch.equal(rmia_scores(x, by_shadow, z, by_shadow_z, gamma=1.2), expected)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("bits", lambda: quantization(Mlp(), FORGET, bits=1)),
        ("forget", lambda: quantization(Mlp(), [])),
        ("group_size", lambda: quantization(Mlp(), FORGET, group_size=0)),
        ("model", lambda: quantization(None, FORGET)),
        ("forget` and `retain` must give a batch", lambda: linear_probes(Mlp(), [], RETAIN)),
        ("retain` must be a loader", lambda: linear_probes(Mlp(), FORGET, RETAIN[0])),
        ("batches` must be a loader", lambda: logit_lens(llama(), {"input_ids": torch.zeros(1, 2).long()})),
        ("forget` must be a loader", lambda: noisy_inputs(Mlp(), FORGET[0])),
        ("forget` must be a loader", lambda: stripping(Mlp(), FORGET[0])),
        ("max_examples", lambda: linear_probes(Mlp(), FORGET, RETAIN, max_examples=1)),
        ("target", lambda: lira_scores([0.5], torch.zeros(2, 1))),
        ("shadow_out", lambda: lira_scores(torch.zeros(2), torch.zeros(2, 3))),
        ("shadow_out", lambda: lira_scores(torch.zeros(1), torch.full((2, 1), float("nan")))),
        ("population", lambda: rmia_scores(torch.zeros(1), torch.zeros(2, 1), torch.zeros(0), torch.zeros(2, 0))),
        ("forget", lambda: score_attack(torch.zeros(0), torch.zeros(2))),
        ("seed", lambda: score_attack(torch.zeros(1), torch.zeros(2), seed=-1)),
    ],
)
def test_mistakes_are_named(argument: str, call: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=argument):
        call()
