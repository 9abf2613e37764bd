"""Where: layers, neurons and experts that were planted are found, and the numbers are the papers'."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import Mlp, Snapshot, gpt2, vector_batches
from peft import get_peft_model
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from semu_peft import SemuConfig, SquaredSum, gather, initialize_semu_weights, localize, objectives, unlearn
from semu_peft.objectives.routers import find_mixtures, watched_routers
from semu_peft.report import plot_localization
from semu_peft.tuner.adapted import semu_layers

LOSS = objectives.CrossEntropy()
SMALL: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


def seen(model: nn.Module, **options: Any) -> dict[str, Any]:
    parts = {"forget": vector_batches(3, seed=1), "retain": vector_batches(2, seed=2)}
    return {name: gather(model, batches, LOSS, progress=False, **options) for name, batches in parts.items()}


# ---- layers ----


def test_importance_alignment_and_the_front() -> None:
    """SLUG's numbers by plain autograd; of {(1, .9), (2, .5), (3, .6)} the front keeps the last two."""
    assert localize.pareto_front({"a": (1, 0.9), "b": (2, 0.5), "c": (3, 0.6)}) == {"b", "c"}
    assert localize.pareto_front({"a": (1, 0.5), "b": (1, 0.5), "c": (1, 0.6)}) == {"a", "b"}
    model = Mlp().eval()
    gathered = seen(model)
    table = localize.importance(model, **gathered)
    weights = {name: model.get_submodule(name).weight for name in table}
    grads = {
        key: torch.autograd.grad(sum(LOSS(model, batch) for batch in batches), list(weights.values()))
        for key, batches in {"f": vector_batches(3, seed=1), "r": vector_batches(2, seed=2)}.items()
    }
    for (name, weight), g_f, g_r in zip(weights.items(), grads["f"], grads["r"], strict=True):
        row = table.row(name)
        assert row["importance"] == pytest.approx(float(g_f.norm() / weight.norm()), rel=1e-4)
        cosine = torch.nn.functional.cosine_similarity(g_f.flatten(), g_r.flatten(), dim=0).abs()
        assert row["alignment"] == pytest.approx(float(cosine), rel=1e-3)
    assert list(table.columns["importance"]) == sorted(table.columns["importance"], reverse=True)
    front = localize.pareto(model, **gathered)
    assert list(front) == [name for name in table if table.row(name)["front"]] and front[:1] == [table[0]]
    adapted = get_peft_model(model, SemuConfig(target_modules=front[:1], r=1))
    assert set(semu_layers(adapted)) == set(front[:1])
    inside = seen(adapted, adapter_name="default")
    again = localize.importance(adapted, **inside, adapter_name="default")
    assert again.row(front[0])["importance"] == pytest.approx(table.row(front[0])["importance"], rel=1e-5)


def test_fisher_ratio() -> None:
    gathered = seen(Mlp().eval(), statistic=SquaredSum)
    table = localize.fisher_ratio(**gathered, threshold=2.0)
    for name in table:
        ours, theirs = (gathered[key][name].mean for key in ("forget", "retain"))
        assert table.row(name)["ratio"] == pytest.approx(float(ours.sum() / theirs.sum()), rel=1e-5)
        assert table.row(name)["share"] == pytest.approx(float((ours > 2 * theirs).float().mean()))


def test_wagles_attribution() -> None:
    """`|(W − G_r / μ) ∘ G_f|`, the kept share global and exact to one element."""
    model = Mlp().eval()
    gathered = seen(model)
    scores = localize.attribution_scores(model, **gathered, curvature=0.5)
    for name, score in scores.items():
        ours, theirs = (gathered[key][name].total for key in ("forget", "retain"))
        expected = ((model.get_submodule(name).weight.detach() - theirs / 0.5) * ours).abs()
        torch.testing.assert_close(score, expected)
    masks = localize.top_mask(scores, keep=0.3)
    everything = sum(score.numel() for score in scores.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.3 * everything)
    kept, left = (
        torch.cat([s[m if inside else ~m] for s, m in zip(scores.values(), masks.values(), strict=True)])
        for inside in (True, False)
    )
    assert kept.min() >= left.max()
    fisher = gather(model, vector_batches(2, seed=2), LOSS, statistic=SquaredSum, progress=False)
    curved = localize.attribution(model, **gathered, curvature=fisher)
    name = curved[0]
    ours, theirs = (gathered[key][name].total for key in ("forget", "retain"))
    direct = ((model.get_submodule(name).weight - theirs / (fisher[name].mean + 1e-6)) * ours).abs()  # type: ignore[attr-defined]
    assert curved.row(name)["mean"] == pytest.approx(float(direct.mean()), rel=1e-4)


def test_what_does_not_fit_is_said() -> None:
    model = Mlp().eval()
    gathered, squares = seen(model), seen(model, statistic=SquaredSum)
    with pytest.raises(ValueError, match="has SquaredSum, and needs GradientSum"):
        localize.importance(model, gathered["forget"], squares["retain"])
    with pytest.raises(ValueError, match="has GradientSum, and needs SquaredSum"):
        localize.fisher_ratio(**gathered)
    with pytest.raises(ValueError, match="differ at the layers"):
        localize.pareto(
            model, gathered["forget"], gather(model, vector_batches(), LOSS, targets=["fc1"], progress=False)
        )
    with pytest.raises(ValueError, match="`model` has no layer"):
        localize.importance(nn.Sequential(nn.Linear(2, 2)), gathered["forget"])
    with pytest.raises(ValueError, match="`keep` must be a share"):
        localize.top_mask({"a": torch.ones(2)}, keep=0.0)


def test_the_table_reads_and_draws(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    model = Mlp().eval()
    table = localize.importance(model, **seen(model))
    assert str(table).splitlines()[0].split() == ["place", "importance", "alignment", "front"]
    assert len(str(table).splitlines()) == len(table) + 1 and "\n" not in repr(table)
    assert table.sorted_by("alignment", descending=False).columns["alignment"][0] == min(table.columns["alignment"])
    with pytest.raises(KeyError, match="is not in the table"):
        table.row("fc9")
    plot_localization(table, tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 1000
    axes = Figure().subplots()
    bars = localize.Localization.of({f"l{i}": {"ratio": i} for i in range(50)}, by="ratio")
    assert plot_localization(bars, ax=axes) is axes.figure and len(axes.patches) == 40 and "and 10 more" in str(bars)


# ---- causal layers ----


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def test_early_mlps_alone_are_corrected() -> None:
    """SHA256: the MLPs of the first blocks; all other layers stay to the bit."""
    base = llama()
    before = copy.deepcopy(base.state_dict())
    names = localize.causal_layers(base, first=2)
    assert names == [f"model.layers.{i}.mlp.{part}_proj" for i in (0, 1) for part in ("gate", "up", "down")]
    assert localize.causal_layers(gpt2(), first=1) == ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]
    ids = torch.arange(12).reshape(2, 6)
    batches: Any = [{"input_ids": ids, "labels": ids}]
    model = get_peft_model(base, SemuConfig(target_modules=names))
    assert localize.causal_layers(model, first=2) == names
    initialize_semu_weights(model, batches, LOSS, progress=False)
    unlearn(model, batches, objectives.DecoupledDistillation(), max_steps=2, progress=False)
    after = model.merge_and_unload().state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} <= {f"{n}.weight" for n in names}
    with pytest.raises(ValueError, match="must have a list of blocks"):
        localize.causal_layers(Mlp())


class Chain(nn.Module):
    """Blocks on a residual stream, of which one alone carries what the first token says to the answer."""

    def __init__(self, carrier: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.Linear(3, 1, bias=False)}) for _ in range(4)])
        for place, block in enumerate(self.layers):
            block["mlp"].weight.data.fill_(float(place == carrier))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        return sum(block["mlp"](hidden).sum() for block in self.layers)  # type: ignore[operator, misc]


@pytest.mark.parametrize("carrier", [0, 2])
@pytest.mark.parametrize("how", ["noise", "other subject", "one position", "from the end"])
def test_tracing_finds_the_planted_layer(carrier: int, how: str) -> None:
    """Restoring its clean state recovers the answer, and that of no other layer does anything."""
    torch.manual_seed(3)
    model, ids = Chain(carrier).train(), torch.tensor([[1, 2]])
    options: dict[str, Any] = {
        "noise": {}, "other subject": {"corrupted": torch.tensor([[3, 2]])}, "one position": {"positions": [0]},
        "from the end": {"positions": [-2]},
    }[how]  # fmt: skip
    before = Snapshot.of(model)
    table = localize.trace(model, ids, lambda m, batch: float(m(batch)), **options)
    assert table[0] == f"layers.{carrier}.mlp" and table.columns["recovery"][0] == pytest.approx(1.0, abs=1e-5)
    assert all(abs(value) < 1e-5 for value in table.columns["recovery"][1:]) and len(table) == 4
    before.assert_same(model)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="must change `score`"):
        localize.trace(model, ids, lambda m, batch: 1.0)
    with pytest.raises(ValueError, match="shape of `batch`"):
        localize.trace(model, ids, lambda m, b: float(m(b)), corrupted=torch.tensor([[3, 2, 1]]))
    with pytest.raises(ValueError, match="`modules` must name modules"):
        localize.trace(model, ids, lambda m, b: float(m(b)), modules=["layers.9"])
    for odd, message in (
        ({"modules": ["layers"]}, "`modules` must be called by `score`"),
        ({"positions": [2]}, "`positions` must be of the 2 tokens"),
        ({"corrupted": ids}, "Give another subject in `corrupted`"),
    ):
        with pytest.raises(ValueError, match=message):
            localize.trace(model, ids, lambda m, b: float(m(b)), **odd)  # type: ignore[arg-type]
    assert not any(module._forward_hooks for module in model.modules())


# ---- neurons ----


def test_neurons_are_read_by_the_head() -> None:
    """A planted neuron has the label of its token; clamping it lowers that token's probability, another does not."""
    model, token, neuron = llama(), 7, 5
    torch.manual_seed(1)
    model.lm_head.weight.data = torch.nn.functional.normalize(torch.randn(32, 16), dim=1)
    row = model.lm_head.weight.data[token]
    mlp = model.model.layers[2].mlp
    for part in (mlp.gate_proj, mlp.up_proj):
        part.weight.data[neuron] = 4 * row
    mlp.down_proj.weight.data[:, neuron] = 20 * row
    decoded = localize.decode_neurons(model, topk=2)
    assert decoded.labels["model.layers.2.mlp.up_proj"].shape == (24, 2)
    assert {*decoded.labels} == {f"model.layers.{i}.mlp.{part}_proj" for i in range(3) for part in ("gate", "up")}
    found = decoded.of([token])
    assert [neuron] in found["model.layers.2.mlp.up_proj"].tolist()
    assert decoded.labels["model.layers.2.mlp.gate_proj"][neuron, 0] == token
    model.model.embed_tokens.weight.data[:] = 0.5 * row + 0.25 * torch.randn(32, 16)

    def probability(clamped: int | None) -> float:
        held = mlp.up_proj.weight.data.clone()
        if clamped is not None:
            mlp.up_proj.weight.data[clamped] = 0
        with torch.no_grad():
            value = model(torch.tensor([[1, 2, 3]])).logits[0, -1].softmax(-1)[token]
        mlp.up_proj.weight.data = held
        return float(value)

    assert probability(neuron) < 0.8 * probability(None)
    assert probability(11) == pytest.approx(probability(None), rel=1e-2)
    assert "GPT2" in type(gpt2()).__name__ and len(localize.decode_neurons(gpt2()).labels) > 0
    with pytest.raises(ValueError, match="head over tokens"):
        localize.decode_neurons(Mlp())


# ---- experts ----


def mixture(kind: str) -> Any:
    torch.manual_seed(0)
    few = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": kind == "qwen3"}
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)).eval()
    if kind == "qwen2":
        return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SMALL, **few, shared_expert_intermediate_size=8)).eval()
    if kind == "qwen3":
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **few)).eval()
    return GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)).eval()


KINDS = ["mixtral", "qwen2", "qwen3", "gpt_oss"]
IDS = torch.arange(24).reshape(3, 8)


def plant(model: Any, layer: int, expert: int) -> None:
    """Let the router of a layer send what it gets here to one expert."""
    find = list(find_mixtures(model).values())[layer]
    states: list[torch.Tensor] = []
    handle = find.router.register_forward_pre_hook(lambda module, args: states.append(args[0].detach()))
    model(input_ids=IDS)
    handle.remove()
    mean = states[0].flatten(0, -2).mean(0)
    find.router.weight.data.mul_(0.01)
    find.router.weight.data[expert] = 20 * mean / mean.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_affinities_are_the_routers_own(kind: str) -> None:
    """They sum to the mass of the chosen experts, are no matter of padding, and find the planted expert."""
    model = mixture(kind)
    plant(model, layer=1, expert=2)
    table = localize.expert_affinity(model, [{"input_ids": IDS}], progress=False)
    assert len(table) == 12 and table[0] == [*find_mixtures(model)][1] + ".2"
    by_layer: dict[str, float] = {}
    for name in table:
        by_layer[name.rpartition(".")[0]] = by_layer.get(name.rpartition(".")[0], 0) + table.row(name)["affinity"]
    if kind != "qwen2":
        assert all(total == pytest.approx(1, abs=1e-4) for total in by_layer.values())
    else:
        with watched_routers(model) as heard:
            model(input_ids=IDS)
        for name, total in by_layer.items():
            mass = heard[name][0].probabilities.topk(2).values.sum(-1).mean()
            assert total == pytest.approx(float(mass), abs=1e-4) and total < 0.999
    assert not any(module._forward_hooks for module in model.modules())
    padded = torch.cat([IDS, torch.zeros(3, 5, dtype=torch.int64)], 1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros(3, 5, dtype=torch.int64)], 1)
    batches = [
        {"input_ids": padded[:1], "attention_mask": mask[:1]},
        {"input_ids": padded[1:], "attention_mask": mask[1:]},
    ]
    again = localize.expert_affinity(model, batches, progress=False)
    for name in table:
        assert again.row(name)["affinity"] == pytest.approx(table.row(name)["affinity"], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_expert_is_unlearned_and_the_others_stay(kind: str) -> None:
    """SEUF: the expert of the highest affinity alone; the other experts bit-equal, the router's scores unchanged."""
    base = mixture(kind)
    plant(base, layer=1, expert=2)
    for mix in find_mixtures(base).values():
        for parameter in mix.experts.parameters():
            parameter.data.mul_(20)
    before = copy.deepcopy(base.state_dict())
    best = localize.expert_affinity(base, [{"input_ids": IDS}], progress=False)[0]
    owner = best.rpartition(".")[0]
    with watched_routers(base) as heard:
        base(input_ids=IDS)
    scores = heard[owner][0].gates.detach()
    targets = localize.expert_targets(base, best)
    model = get_peft_model(base, SemuConfig(**targets, r=2))
    batches: Any = [{"input_ids": IDS, "labels": IDS}]
    initialize_semu_weights(model, batches, LOSS, progress=False)
    unlearn(model, batches, objectives.DecoupledDistillation(), max_steps=3, progress=False)
    assert localize.expert_affinity(model, batches, progress=False)[0] == best
    with watched_routers(model) as heard:
        model(input_ids=IDS)
    assert torch.equal(heard[owner][0].gates, scores)
    changed = {
        name: value
        for name, value in model.merge_and_unload().state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed
    for name, value in changed.items():
        assert name.startswith(owner)
        if value.dim() == 3:
            assert [i for i in range(4) if not torch.equal(value[i], before[name][i])] == [2]
        else:
            assert name.startswith(f"{owner}.2.")
    with_router = localize.expert_targets(model, best, router=True)
    router = find_mixtures(model)[owner].router_name
    assert f"{router}.weight" in with_router.get("target_parameters", ()) or router in with_router["target_modules"]
    with pytest.raises(ValueError, match="`expert` must be one of the model's"):
        localize.expert_targets(model, f"{owner}.9")


@pytest.mark.parametrize("kind", ["mixtral", "qwen2"])
def test_the_anchor_holds_a_router_that_is_trained_too(kind: str) -> None:
    """SEUF trains the expert and its layer's router: with the anchor the forget data stay with that expert."""
    base = mixture(kind)
    plant(base, layer=1, expert=2)
    before = copy.deepcopy(base.state_dict())
    batches: Any = [{"input_ids": IDS, "labels": IDS}]
    best = localize.expert_affinity(base, batches, progress=False)[0]
    owner = best.rpartition(".")[0]
    anchor = objectives.RouterAnchor({owner: 2})
    model = get_peft_model(base, SemuConfig(**localize.expert_targets(base, best, router=True), r=2))
    initialize_semu_weights(model, batches, LOSS + anchor, progress=False)
    start = float(anchor(model, batches[0]))
    objective = objectives.DecoupledDistillation() + anchor
    options: dict[str, Any] = {"optimizer": lambda cores: torch.optim.AdamW(cores, lr=0.05), "max_steps": 8}
    unlearn(model, batches, objective, progress=False, **options)
    assert float(anchor(model, batches[0])) < start
    assert localize.expert_affinity(model, batches, progress=False)[0] == best
    after, router = model.merge_and_unload().state_dict(), find_mixtures(base)[owner].router_name
    for name, value in after.items():
        if name.startswith(owner) and value.dim() == 3:
            assert torch.equal(value[[0, 1, 3]], before[name][[0, 1, 3]])
        elif not name.startswith((f"{owner}.2.", router)):
            assert torch.equal(value, before[name])
    assert any(not torch.equal(after[name], before[name]) for name in after if name.startswith(router))


def test_listed_experts_are_layers() -> None:
    """As before transformers 5: a list of experts, a linear router, and a block that says how many are chosen."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.top_k, self.norm_topk_prob = 2, False
            self.gate = nn.Linear(6, 3, bias=False)
            self.experts = nn.ModuleList([nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6)) for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights, places = self.gate(x).softmax(-1).topk(2)
            each = torch.stack([expert(x) for expert in self.experts], -2)
            return (each.gather(-2, places[..., None].expand(-1, -1, 6)) * weights[..., None]).sum(-2)

    model, x = nn.Sequential(Block(), nn.Linear(6, 2)), torch.randn(5, 6)
    table = localize.expert_affinity(model, [x], call=lambda m, b: m(b), progress=False)
    values = model[0].gate(x).softmax(-1)  # type: ignore[operator, union-attr]
    kept = torch.where(values >= values.topk(2).values[:, 1:], values, 0).mean(0)
    for expert in range(3):
        assert table.row(f"0.experts.{expert}")["affinity"] == pytest.approx(float(kept[expert]), abs=1e-5)
    targets = localize.expert_targets(model, "0.experts.1", router=True)
    assert targets == {"target_modules": ["0.gate", "0.experts.1.0", "0.experts.1.1"]}
    with pytest.raises(ValueError, match="must have mixtures of experts"):
        localize.expert_affinity(Mlp(), [x], progress=False)


def test_hooks_come_off_after_an_error() -> None:
    model = mixture("mixtral")

    def fails(*_: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        localize.expert_affinity(model, [{"input_ids": IDS}], call=fails, progress=False)
    assert not any(module._forward_hooks for module in model.modules())
