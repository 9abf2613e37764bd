"""Objectives on hidden states and on a router's scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from language_batches import padded, texts
from models import gpt2, llama, t5, vit
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from semu_peft import SemuConfig, initialize_semu_weights, unlearn
from semu_peft.objectives import NPO, RMU, AdaptiveRMU, BreakActivations, PreserveHiddenStates, RouterAnchor
from semu_peft.objectives.representation import find_layer, read_hidden_states


def adapted(make: Any = llama) -> Any:
    torch.manual_seed(0)
    return get_peft_model(make().eval(), SemuConfig(target_modules="all-linear", r=2, init_weights=False)).eval()


def direction(size: int, seed: int = 0) -> Tensor:
    drawn = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


# ---- hidden states ----


@pytest.mark.parametrize(("make", "layer"), [(llama, 0), (gpt2, 0), (llama, "layers.0"), (gpt2, "transformer.h.0")])
def test_the_layer_is_that_of_the_models_own_hidden_states(make: Any, layer: int | str) -> None:
    """At the tokens whose label counts, in place, inside PEFT's wrapper as outside."""
    model, batch = adapted(make), padded("left")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    inputs["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)  # as `generate` counts
    states = model(**inputs, output_hidden_states=True).hidden_states[1][batch["labels"] != -100]
    torch.testing.assert_close(read_hidden_states(model, batch, layer), states)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    read_hidden_states(model, batch, layer)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_of_an_encoder_and_a_decoder() -> None:
    """A number means the decoder's layer; the encoder's is read where its own inputs are no padding."""
    model, batch = adapted(t5), padded()
    batch["labels"] = batch["labels"][:, 1:].contiguous()
    assert find_layer(model, 1)[0] == "base_model.model.decoder.block.1"
    assert len(read_hidden_states(model, batch, 1)) == (batch["labels"] != -100).sum()
    assert len(read_hidden_states(model, batch, "encoder.block.1")) == batch["attention_mask"].sum()
    same_length = padded()
    assert len(read_hidden_states(model, same_length, "encoder.block.1")) == batch["attention_mask"].sum()


def test_of_a_classifier_everything_counts() -> None:
    """All patches of all pictures."""
    torch.manual_seed(0)
    states = read_hidden_states(vit(), (torch.randn(2, 3, 8, 8), torch.tensor([0, 1])), 0)
    assert states.shape == (2 * 5, 16)


@pytest.mark.parametrize("layer", [5, "mlp", "layers.9"])
def test_layers_that_cannot_be_told(layer: int | str) -> None:
    """None or several of that name."""
    with pytest.raises(ValueError, match="`layer` must be the number of one layer or the end of one module's name"):
        RMU(layer)(adapted(), padded())


def test_arguments() -> None:
    """Each is named in its error."""
    for make in (RMU, AdaptiveRMU, PreserveHiddenStates):
        with pytest.raises(TypeError, match="`layer` must be a layer's number or name"):
            make(1.5)
        with pytest.raises(ValueError, match="`layer` must be an integer of at least 0, got -1"):
            make(-1)
    with pytest.raises(ValueError, match="`coefficient` must be a finite number above 0"):
        RMU(0, coefficient=0)
    with pytest.raises(ValueError, match="`scale` must be a finite number above 0"):
        AdaptiveRMU(0, scale=-1.0)
    with pytest.raises(TypeError, match="`seed` must be an integer"):
        RMU(0, seed=0.5)  # type: ignore[arg-type]


def test_a_layer_that_is_not_run() -> None:
    """A layer may be there and not be called."""

    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match="`layer` must be a layer that the model runs, got 'spare'"):
        RMU("spare")(Spare(), (torch.zeros(1, 2), torch.tensor([0])))


def test_rmu_leads_to_one_direction() -> None:
    """`‖h − c u‖² / d` over the tokens; `u` has length 1 and no negative entry, and is the seed's alone."""
    model, batch = adapted(), padded()
    states = read_hidden_states(model, batch, 1)
    expected = (states - 4.0 * direction(16, seed=3)).square().sum(-1).mean() / 16
    torch.testing.assert_close(RMU(1, coefficient=4.0, seed=3)(model, batch), expected)
    assert RMU(1, seed=3)(model, batch) == RMU(1, seed=3)(model, batch) != RMU(1, seed=4)(model, batch)


def test_adaptive_rmu_takes_its_length_from_the_first_batch() -> None:
    """Of the original, wherever the adapter is; what comes later does not change it, and it is saved."""
    model, first, second = adapted(), padded(), padded(seed=11)
    with model.disable_adapter():
        length = 5 * read_hidden_states(model, first, 1).norm(dim=-1).mean().item()
    objective = AdaptiveRMU(1)
    assert objective.state_dict() == {}
    torch.testing.assert_close(objective(model, first), RMU(1, coefficient=length)(model, first))
    torch.testing.assert_close(objective(model, second), RMU(1, coefficient=length)(model, second))
    again = AdaptiveRMU(1)
    again.load_state_dict(objective.state_dict())
    torch.testing.assert_close(again(model, second), objective(model, second))
    bare = AdaptiveRMU(1)
    bare(model.get_base_model().eval(), first)  # still has the adapter in it, under no wrapper
    assert bare.coefficient == pytest.approx(length)


def test_hidden_states_are_preserved_as_the_original_has_them() -> None:
    """Nothing to do at the start; from there the mean square of what moved."""
    model, batch = adapted(), padded()
    now = read_hidden_states(model, batch, 1)
    with model.disable_adapter():
        before = read_hidden_states(model, batch, 1)
    torch.testing.assert_close(PreserveHiddenStates(1)(model, batch), F.mse_loss(now, before))
    torch.manual_seed(0)
    frozen = llama().eval()
    torch.testing.assert_close(PreserveHiddenStates(1, reference=frozen)(model, batch), F.mse_loss(now, before))
    assert PreserveHiddenStates(1)(get_peft_model(frozen, SemuConfig(target_modules="all-linear")), batch) == 0


class Shifted(nn.Module):
    """Two layers one after the other, whose outputs are the inputs plus what is trained."""

    def __init__(self, *shifts: list[float]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity() for _ in shifts])
        self.shifts = nn.ParameterList([nn.Parameter(torch.tensor(shift)) for shift in shifts])

    def forward(self, x: Tensor) -> Tensor:
        for layer, shift in zip(self.layers, self.shifts, strict=True):
            x = layer(x + shift)
        return x


def test_broken_activations_by_hand() -> None:
    """`max(0, ⟨o, o₀⟩ / ‖o₀‖²)`, over tokens and layers: 1 at the original, and no gain beyond a right angle."""
    batch = (torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([0, 1]))
    original, model = Shifted([0.0, 0.0], [0.0, 0.0]), Shifted([0.0, 0.0], [1.0, -3.0])
    objective = BreakActivations([0, 1], reference=original)
    assert objective(original, batch).item() == 1.0
    # The first layer is as it was. Of the second: (4·3 + 1·4) / 25, and (0·1 + 2·−1) / 4, which is below zero.
    loss = objective(model, batch)
    assert loss.item() == pytest.approx((1 + (16 / 25 + 0) / 2) / 2)
    loss.backward()
    torch.testing.assert_close(model.shifts[1].grad, torch.tensor([3.0, 4.0]) / 25 / 4)  # of the first token alone


def test_relative_distance_by_hand() -> None:
    """`‖h − h₀‖ / ‖h₀‖`: 5 of 5 and 5 of 2, whatever the size of the states; with a gradient of zero at the start."""
    batch = (torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([0, 1]))
    original, model = Shifted([0.0, 0.0]), Shifted([3.0, 4.0])
    objective = PreserveHiddenStates(0, reference=original, relative=True)
    assert objective(model, batch).item() == pytest.approx((1 + 2.5) / 2)
    objective(original, batch).backward()
    assert not original.shifts[0].grad.any()


def test_activations_of_mlps_are_broken_and_others_kept() -> None:
    """Natural gradients lead the outputs to a right angle of what they were, on the tokens that count."""
    model, forget = adapted(), [padded()]
    model = get_peft_model(model.unload(), SemuConfig(target_modules=["down_proj"]))
    objective = BreakActivations(["layers.0.mlp", "layers.1.mlp"])
    initialize_semu_weights(model, forget, objective, progress=False)
    result = unlearn(model, forget, objective, max_steps=8, progress=False)
    assert result.history[0]["loss"] == pytest.approx(1.0) and result.history[-1]["loss"] < 0.2


@pytest.mark.parametrize(
    ("layers", "error", "told"),
    [("mlp", TypeError, "a list of layers"), ([], ValueError, "at least one layer"), ([1.5], TypeError, "a list of")],
)
def test_layers_to_break_that_are_none(layers: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=f"`layers` must .*{told}"):
        BreakActivations(layers)


def test_rmu_needs_no_layer_above() -> None:
    """Adapters over the layer get no gradient, those up to it do; also where activations are computed again."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False)
    model = get_peft_model(llama(), config)
    model.enable_input_require_grads()
    losses = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        model.zero_grad()
        loss = RMU(0)(model, padded())
        loss.backward()
        losses.append(loss.item())
        reached = {
            name.split(".layers.")[1][0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()
        }
        assert reached == {"0"}
    assert losses[0] == losses[1]


# ---- routers ----


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=16,
        )
    )  # fmt: skip


def qwen_moe() -> Any:
    model = transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
            shared_expert_intermediate_size=8, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
            num_experts_per_tok=2, decoder_sparse_step=1, max_position_embeddings=16,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.normal_(std=0.5)
    return model


def gates(model: Any) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith(".gate.weight")]


@pytest.mark.parametrize("make", [mixtral, qwen_moe])
def test_the_anchor_by_hand(make: Any) -> None:
    """Probabilities over all experts against the one-hot, at all that is no padding, summed over layers."""
    torch.manual_seed(0)
    model = make().eval()
    squares = []
    for row in texts():
        # Of the model without its head: before transformers 5 the head's balancing loss fails on a CPU.
        routers = model.model(input_ids=row[None], output_router_logits=True).router_logits
        pairs = ((routers[0], 2), (routers[1], 3))
        squares.append(sum((r.softmax(-1) - torch.eye(4)[expert]).square().sum(-1) for r, expert in pairs))
    expected = torch.cat(squares).mean()
    for side in ("left", "right"):
        torch.testing.assert_close(RouterAnchor({0: 2, 1: 3})(model, padded(side, more=2)), expected)
    model.requires_grad_(True)
    RouterAnchor({0: 2})(model, padded()).backward()
    first, second = gates(model)
    assert first.grad is not None and first.grad.any() and (second.grad is None or not second.grad.any())


def test_the_anchor_is_nothing_where_the_router_is_sure() -> None:
    """Zero where it gives the one-hot already, and 2 where it is sure of another expert."""

    class Sure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(3, 3), nn.ModuleList([nn.ReLU() for _ in range(3)])
            self.gate.bias.data = torch.tensor([0.0, 99.0, 0.0])

        def forward(self, x: Tensor) -> Any:
            return self.experts[0](self.gate(x))

    batch = (torch.zeros(4, 3), torch.zeros(4))
    assert RouterAnchor({0: 1})(Sure(), batch).item() == 0.0
    assert RouterAnchor({"experts": 0})(Sure(), batch).item() == 2.0


def test_the_anchor_adds_up_and_is_trained_by() -> None:
    """Beside a forget objective natural gradients take it as it is; the router then sends more to the expert."""
    torch.manual_seed(0)
    base = qwen_moe().eval()
    router = {"target_parameters": ["mlp.gate.weight"]}
    if isinstance(base.model.layers[0].mlp.gate, nn.Linear):  # in transformers 4
        router = {"target_modules": ["o_proj", "mlp.gate"]}
    config = SemuConfig(**{"target_modules": ["o_proj"], **router})
    forget, objective = [padded()], NPO() + 10 * RouterAnchor({"layers.0.mlp.experts": 2})
    model = get_peft_model(base, config)
    initialize_semu_weights(model, forget, objective, progress=False)
    result = unlearn(model, forget, objective, max_steps=5, progress=False)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    with torch.no_grad():
        after = RouterAnchor({0: 2})(model, forget[0])
        with model.disable_adapter():
            before = RouterAnchor({0: 2})(model, forget[0])
    assert after < before


@pytest.mark.parametrize("experts", [{}, {0: -1}, {-1: 0}])
def test_experts_that_cannot_be(experts: dict[int, int]) -> None:
    """None, or numbers below zero."""
    with pytest.raises(ValueError, match="`experts` must name a mixture and its expert"):
        RouterAnchor(experts)


def test_experts_that_are_not_there() -> None:
    """By kind, in the model, and in a model without experts."""
    for experts in ([0, 1], {0: "1"}, {0: 1.0}, {None: 0}):
        with pytest.raises(TypeError, match="`experts` must"):
            RouterAnchor(experts)  # type: ignore[arg-type]
    torch.manual_seed(0)
    for experts in ({2: 0}, {0: 4}):
        with pytest.raises(ValueError, match=r"`experts` must name (one mixture|experts that there are)"):
            RouterAnchor(experts)(mixtral(), padded())
    with pytest.raises(ValueError, match="`experts` must name one mixture .*which fits .*0.*1"):
        RouterAnchor({"experts": 0})(mixtral(), padded())
    with pytest.raises(ValueError, match="must have mixtures of experts"):
        RouterAnchor({0: 0})(llama(), padded())
