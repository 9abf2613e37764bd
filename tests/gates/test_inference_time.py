"""Corrupted embeddings, forbidden strings, abstention and neurons: for the prompts on which a gate opens, no other."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
import torch
from models import gpt2, llama, run
from text_models import tokenizer
from torch import Tensor, nn

from semu_peft.gates import (
    Abstention,
    ActivationGate,
    Clamp,
    EmbeddingCorruption,
    EntityTokens,
    ForbiddenAnswers,
    ForbiddenContinuations,
    HiddenStates,
    Moments,
    NeuronAdjust,
    Retrieval,
    SimilarTokens,
    adjust_neurons,
    neuron_moments,
    secant,
    zeroth_order,
)
from semu_peft.localize import decode_neurons

GENERATE: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}


def sevens(model: nn.Module, input_ids: Tensor, **others: Any) -> dict[str, Tensor]:
    """Opens for prompts that begin with a 7."""
    return {"request": (input_ids[:, 0] == 7).float()}


def prompts() -> Tensor:
    ids = torch.randint(8, 32, (2, 5), generator=torch.Generator().manual_seed(1))
    ids[0, 0] = 7
    return ids


def sharp() -> Any:
    torch.manual_seed(0)
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():  # what is said depends on all that was read
            parameter.mul_(10 if parameter.dim() == 2 else 1)
    model.generation_config.eos_token_id = None
    return model


# ---- ECO ----


def test_unflagged_prompts_are_left_alone_and_other_hooks_survive() -> None:
    """Bit-equal rows; positions that were not selected keep their embeddings; a hook of somebody else stays."""
    model, ids, calls = sharp(), prompts(), []
    seen: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    before = run(model, ids)
    corrupted = EmbeddingCorruption(model, sevens, strength=5.0, dimensions=3)
    after = run(corrupted, input_ids=ids)
    assert torch.equal(after[1], before[1]) and not torch.allclose(after[0], before[0])
    plain, changed = seen[0], seen[-1]
    assert torch.equal(changed[:, -1], plain[:, -1]), "the last token"
    assert torch.equal(changed[..., 3:], plain[..., 3:]) and not torch.allclose(changed[0, :4, :3], plain[0, :4, :3])
    assert torch.equal(run(model, ids), before) and len(calls) == 3
    assert not model.model.embed_tokens._forward_hooks


@pytest.mark.parametrize("place", [(4, 0), (0, 4), (3, 1)])
def test_padding_does_not_change_how_a_prompt_is_corrupted(place: tuple[int, int]) -> None:
    model, ids = sharp(), prompts()
    mask = torch.ones_like(ids)
    gate = lambda model, input_ids, **others: {"request": (input_ids == 7).any(1).float()}  # noqa: E731
    corrupted = EmbeddingCorruption(model, gate, strength=5.0, positions=lambda ids, real: real)
    plain = run(corrupted, input_ids=ids, attention_mask=mask)
    padded, real = nn.functional.pad(ids, place), nn.functional.pad(mask, place)
    found = run(corrupted, input_ids=padded, attention_mask=real)
    torch.testing.assert_close(found[real.bool()].view_as(plain), plain, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain[0], run(model, ids)[0], atol=0.1)


def test_zeros_go_to_the_largest_entries() -> None:
    model, ids = sharp(), prompts()
    seen: list[Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    run(model, ids)
    run(EmbeddingCorruption(model, sevens, 1.0, kind="zero", dimensions=4), input_ids=ids)
    plain, changed = seen
    for place in range(4):
        largest = plain[0, place].abs().topk(4).indices
        assert changed[0, place, largest].abs().max() == 0
    assert int((changed[0, :4] == 0).sum()) == 16


def colours(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer("blue|red|the sky", text)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_names_are_tokens_and_where_none_is_all_but_the_last_are(side: str) -> None:
    """ECO's choice by any function that finds names; blanks, special tokens and padding belong to none."""
    words = tokenizer(padding_side=side)
    texts = ["<s>the sky is blue", "<s>is a b", "<s>What colour is the red sky?"]
    batch = words(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    real = batch["attention_mask"].bool()
    chosen = EntityTokens(words, colours)(batch["input_ids"], real)
    found = [[words.decode(token) for token in row[held]] for row, held in zip(batch["input_ids"], chosen, strict=True)]
    assert found == [["the", " sky", " blue"], ["<s>", "is", " a"], [" red"]]
    assert not (chosen & ~real).any()


def test_all_bytes_of_a_character_are_meant() -> None:
    class Bytes:
        all_special_ids: list[int] = []

        def decode(self, tokens: list[int], **options: Any) -> str:
            return bytes(tokens).decode(errors="replace")

    ids = torch.tensor([list("a é b".encode())])  # é is two tokens
    find = lambda text: [(text.index("é"), text.index("é") + 1)]  # noqa: E731
    assert EntityTokens(Bytes(), find)(ids, torch.ones_like(ids)).int().tolist() == [[0, 0, 1, 1, 0, 0]]


def test_only_the_positions_that_were_chosen_are_corrupted() -> None:
    """While generating too; a mask of another shape is refused."""
    model, ids = sharp(), prompts()
    seen: list[Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    second = lambda input_ids, real: torch.arange(input_ids.shape[1]).expand_as(input_ids) == 1  # noqa: E731
    corrupted = EmbeddingCorruption(model, sevens, strength=5.0, positions=second)
    plain = (run(model, ids), seen[-1])[1]
    changed = (run(corrupted, input_ids=ids), seen[-1])[1]
    assert ((changed != plain).any(-1)).nonzero().tolist() == [[0, 1]]
    asked = {"input_ids": ids, **GENERATE}
    result, bare = corrupted.generate(**asked), model.generate(**asked)
    assert torch.equal(result[1], bare[1]) and not torch.equal(result[0], bare[0])
    wrong = EmbeddingCorruption(model, sevens, positions=lambda input_ids, real: real[0])
    with pytest.raises(ValueError, match=r"`positions` must say of each token .* got a mask of shape \(5,\)"):
        run(wrong, input_ids=ids)
    with pytest.raises(TypeError, match="`positions` must be a function"):
        EmbeddingCorruption(model, sevens, positions=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`tokenizer` must be the model's"):
        EntityTokens(None, colours)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}])
def test_only_the_prompt_is_corrupted_while_generating(options: dict[str, Any]) -> None:
    """With and without a cache the same is written, the other prompt's as by the model."""
    model, ids = sharp(), prompts()
    corrupted = EmbeddingCorruption(model, sevens, strength=5.0)
    asked = {"input_ids": ids, **GENERATE, **options}
    result, bare = corrupted.generate(**asked), model.generate(**asked)
    assert torch.equal(result[1], bare[1]) and not torch.equal(result[0], bare[0])
    assert torch.equal(result, corrupted.generate(**{**asked, "use_cache": True}))


def test_slopes_and_searches() -> None:
    """−.8 is the derivative of 3x² − 5x + 1 at .7; with the lower point clipped the true secant is −.5."""
    quadratic = lambda x: 3 * x**2 - 5 * x + 1  # noqa: E731
    assert secant(quadratic, 0.7, 0.3) == pytest.approx(-0.8)
    assert secant(quadratic, 0.7, 0.3, low=0.5) == pytest.approx(-0.5)
    found = zeroth_order(quadratic, 0.1, learning_rate=0.1, steps=20)
    assert found.strength == pytest.approx(5 / 6, abs=1e-3) and found.loss == min(loss for _, loss in found.tried)
    assert len(zeroth_order(quadratic, 0.1, learning_rate=0.1, steps=20, goal=-0.5).tried) < 10
    away = zeroth_order(lambda x: -abs(x - 0.1), 0.1, learning_rate=100, steps=2)
    assert min(strength for strength, _ in away.tried) >= 1e-3


# ---- GUARD and KSD ----


def test_a_banned_string_cannot_be_said_although_each_token_can() -> None:
    """What the model would say is forbidden as a string of three tokens; each of them is still said elsewhere."""
    model, ids = sharp(), prompts()
    bare = model.generate(input_ids=ids, **GENERATE)
    string = bare[0, 5:8].tolist()
    guarded = ForbiddenAnswers(model, sevens, [string])
    for options in ({}, {"num_beams": 3}, {"use_cache": False}):
        asked = {"input_ids": ids, **GENERATE, **options}
        result, plain = guarded.generate(**asked), model.generate(**asked)
        said = result[0].tolist()
        assert string not in [said[start : start + 3] for start in range(len(said))]
        assert torch.equal(result[1], plain[1])
    assert guarded.generate(input_ids=ids, **GENERATE)[0, 5:7].tolist() == string[:2]


def test_a_trie_by_hand() -> None:
    """Strings that share a beginning, one inside another, and overlaps with what stands before."""
    forbidden = ForbiddenContinuations([[1, 2, 3], [1, 2, 4], [2, 5], [6]])
    assert forbidden.after([]) == [6]
    assert forbidden.after([1]) == [6]
    assert forbidden.after([9, 1, 2]) == [3, 4, 5, 6]
    assert forbidden.after([1, 2, 9]) == [6]
    assert forbidden.after([1, 1, 2]) == [3, 4, 5, 6]
    with pytest.raises(ValueError, match="`sequences` must hold at least one"):
        ForbiddenContinuations([])
    with pytest.raises(ValueError, match="got an empty one"):
        ForbiddenContinuations([[1], []])
    for flat in ([1, 2], ["a text"]):
        for make in (ForbiddenContinuations, lambda strings: ForbiddenAnswers(llama(), sevens, strings)):
            with pytest.raises(TypeError, match="`sequences` must hold lists of token indices, got"):
                make(flat)  # type: ignore[operator]


def test_whole_texts_have_no_probability_for_a_banned_string() -> None:
    """Teacher-forced numbers say what decoding does."""
    model, ids = sharp(), prompts()
    result = run(ForbiddenAnswers(model, sevens, [ids[0, 2:5].tolist(), ids[1, 2:5].tolist()]), input_ids=ids)
    logits = run(model, ids)
    assert result[0, 3, ids[0, 4]] == -torch.inf and torch.equal(result[1], logits[1])
    assert int(result.isinf().sum()) == 1


def test_each_prompt_is_kept_from_the_answer_that_is_found_for_it() -> None:
    """Two prompts in one batch, each with the strings of its nearest name, and one that is about neither."""
    model = sharp()
    ids = torch.randint(8, 32, (3, 5), generator=torch.Generator().manual_seed(1))
    ids[:2, 0] = 7
    bare = model.generate(input_ids=ids, **GENERATE)
    strings = [row[5:8].tolist() for row in bare]
    assert strings[0] != strings[1]
    gate = Retrieval.of(model, [{"input_ids": ids[:2]}], sevens, HiddenStates("model.norm"))
    for found, kept in (({"0": strings[:1], "1": strings[1:2]}, False), ({"0": strings[1:2], "1": strings[:1]}, True)):
        guarded = ForbiddenAnswers(model, gate, found)
        for options in ({}, {"use_cache": False}, {"num_beams": 2}):
            asked = {"input_ids": ids, **GENERATE, **options}
            result, plain = guarded.generate(**asked), model.generate(**asked)
            assert torch.equal(result[2], plain[2])
            if not options:
                assert [torch.equal(*each) for each in zip(result[:2], plain[:2], strict=True)] == [kept, kept]
        logits = run(guarded, input_ids=bare)
        masked = logits.isinf().any(-1).nonzero().tolist()
        assert masked == ([] if kept else [[0, 6], [1, 6]])
    with pytest.raises(ValueError, match="`sequences` must have strings of the names that the gate gives, got none of"):
        run(ForbiddenAnswers(model, gate, {"0": strings[:1]}), input_ids=ids)


def test_retrieval_by_hand() -> None:
    """The nearest names, a name by the nearest of its prompts, as many as asked for, closed where the gate is."""
    keys = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    gate = Retrieval(lambda model, x: {"all": x[:, 2]}, keys, ["a", "b", "a"], lambda model, x: x[:, :2])
    x = torch.tensor([[9.0, 1.0, 1.0], [-9.0, 1.0, 0.5], [1.0, 9.0, 1.0], [0.0, 1.0, 0.0]])
    half = torch.tensor(82.0).rsqrt()
    expected = torch.stack([torch.tensor([9.0, 9.0, 1.0]) * half, torch.tensor([1.0, 1.0, 9.0]) * half], 1)
    torch.testing.assert_close(gate.similarities(None, x)[:3], expected)  # type: ignore[arg-type]
    assert {key: each.tolist() for key, each in gate(None, x).items()} == {  # type: ignore[arg-type]
        "a": [1, 0.5, 0, 0], "b": [0, 0, 1, 0]
    }  # fmt: skip
    gate.count = 5
    assert {key: each.tolist() for key, each in gate(None, x).items()} == {  # type: ignore[arg-type]
        "a": [1, 0.5, 1, 0], "b": [1, 0.5, 1, 0]
    }  # fmt: skip
    assert {key: each.tolist() for key, each in gate(None, x[3:]).items()} == {"a": [0]}  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`names` must be one for each of the states `keys`, \(n, D\), got 1 for"):
        Retrieval(sevens, keys, ["a"], lambda model, x: x)


def test_tokens_that_are_like_forbidden_ones_are_lowered() -> None:
    """`z − β cos` above δ, by hand and in a model; a penalty without a string of one token is refused."""
    embeddings = torch.tensor([[2.0, 0.0], [3.0, 4.0], [4.0, 3.0], [-1.0, 0.0]])
    soft = SimilarTokens(embeddings, [0], 10.0, threshold=0.7)
    assert soft(None, torch.zeros(1, 5)).tolist() == [[-10, 0, pytest.approx(-8), 0, 0]]
    model, ids = sharp(), prompts()
    logits = run(model, ids)
    guarded = ForbiddenAnswers(model, sevens, [[9], [10, 11]], penalty=3.0, threshold=0.1)
    result = run(guarded, input_ids=ids)
    rows = nn.functional.normalize(model.get_input_embeddings().weight.detach(), dim=-1)
    cosines = rows @ rows[9]
    expected = logits[0] - 3 * cosines.where(cosines > 0.1, 0.0)
    others = [token for token in range(32) if token not in (9, 11)]
    torch.testing.assert_close(result[0, :, others], expected[:, others])
    assert (result[0, :, 9] == -torch.inf).all() and torch.equal(result[1], logits[1])
    with pytest.raises(ValueError, match="`penalty` must be 0 where no string is of one token"):
        ForbiddenAnswers(model, sevens, [[10, 11]], penalty=3.0)
    with pytest.raises(ValueError, match="`tokens` must hold at least one token"):
        SimilarTokens(embeddings, [])


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}])
def test_abstention_has_one_answer_for_all(options: dict[str, Any]) -> None:
    model, ids = sharp(), prompts()
    silent = Abstention(model, sevens, [9, 10, 11])
    asked = {"input_ids": ids, **GENERATE, **options}
    result = silent.generate(**asked)
    assert result[0, 5:].tolist() == [9, 10, 11, 11, 11] and torch.equal(result[1], model.generate(**asked)[1])
    logits = run(silent, input_ids=ids)
    assert logits[0].abs().max() == 0 and torch.equal(logits[1], run(model, ids)[1])
    with pytest.raises(ValueError, match="`answer` must have at least one token"):
        Abstention(model, sevens, [])


# ---- neurons ----


def test_neuron_adjust_by_hand() -> None:
    """μ_f 2, μ_r 0, σ 1, a 1.8: moved to +.2, densities in the ratio .980 to .198; σ are deviations."""
    forget, retain = Moments(torch.tensor([2.0]), torch.ones(1), 9), Moments(torch.zeros(1), torch.ones(1), 9)
    adjust = NeuronAdjust(torch.tensor([0]), forget, retain, seed=None)
    a = torch.tensor([[1.8]])
    torch.testing.assert_close(adjust(a), torch.tensor([[0.2]]))
    as_forget, as_retain = (float(each) * (2 * torch.pi) ** 0.5 for each in adjust.densities(a))
    assert (as_forget, as_retain) == (pytest.approx(0.980, abs=1e-3), pytest.approx(0.198, abs=1e-3))
    wide = NeuronAdjust(torch.tensor([0]), Moments(torch.tensor([2.0]), torch.tensor([2.0]), 9), retain, seed=None)
    torch.testing.assert_close(wide(torch.tensor([[4.0]])), torch.tensor([[-1.0]]))


@pytest.mark.parametrize("seed", [None, 0])
def test_an_activation_far_from_both_is_compared_as_well(seed: int | None) -> None:
    """Neurons of language models have outliers: their densities were zero both, and all were mirrored."""
    moments = [Moments(torch.tensor([mean]), torch.ones(1), 9) for mean in (2.0, 0.0)]
    adjust = NeuronAdjust(torch.tensor([0]), *moments, seed=seed)
    assert adjust(torch.tensor([[-20.0], [24.0]])).tolist() == [[-20.0], [-22.0]]


def test_each_neuron_of_each_token_has_its_own_draw() -> None:
    """At equal densities half of them move; in the release a whole row does or does not."""
    count = 400
    forget, retain = Moments(torch.ones(count), torch.ones(count), 9), Moments(-torch.ones(count), torch.ones(count), 9)
    adjust = NeuronAdjust(torch.arange(count), forget, retain)
    moved = adjust(torch.full((2, count), 0.5)) != 0.5
    expected = 1 / (1 + torch.exp(torch.tensor(-1.0)))  # 1 − N_r / (N_r + N_f)
    assert abs(float(moved.float().mean()) - float(expected)) < 0.05
    assert not torch.equal(moved[0], moved[1]) and 0 < int(moved[0].sum()) < count


def test_layers_of_one_width_draw_apart() -> None:
    """Acceptance: at equal densities they agree where two coins do, and the same seed draws the same again."""
    ones = torch.ones(2000)
    forget, retain = ({name: Moments(mean * ones, ones, 9) for name in ("a", "b")} for mean in (2.0, 1.0))
    x = torch.full((1, 2000), 1.6)
    (first, second), (again, _) = (
        [adjust(x) != x for adjust in adjust_neurons(forget, retain, 1.0, seed=3).values()] for _ in range(2)
    )
    assert abs(float((first == second).float().mean()) - 0.5) < 0.05
    assert torch.equal(first, again)
    assert all(adjust.seed is None for adjust in adjust_neurons(forget, retain, 1.0, seed=None).values())


def test_moments_are_of_answers_alone() -> None:
    """Neither prompts nor padding count, however the data are split into batches."""
    model = llama()
    ids = torch.randint(3, 32, (4, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :2] = -100
    labels[0, 4:] = -100
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    name = "model.layers.1.mlp.gate_proj"
    values: list[Tensor] = []
    handle = model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda m, i, o: values.append(o.detach()))
    run(model, input_ids=ids, attention_mask=mask)
    handle.remove()
    counted = values[0][(labels != -100) & mask.bool()]
    for batches in ([batch], [{key: each[rows] for key, each in batch.items()} for rows in (slice(0, 1), slice(1, 4))]):
        found = neuron_moments(model, batches, [name], progress=False)[name]
        torch.testing.assert_close(found.mean, counted.mean(0), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found.deviation, counted.std(0, correction=0), atol=1e-6, rtol=1e-4)
        assert found.count == len(counted) == 14


def test_layers_that_give_more_than_their_states() -> None:
    """Attention gives its weights beside them."""
    model, ids, name = llama(), torch.tensor([[3, 4, 5]]), "model.layers.1.self_attn"
    assert (
        len(neuron_moments(model, [{"input_ids": ids}], [name], progress=False)[name].mean) == model.config.hidden_size
    )
    moved = [
        run(ActivationGate(model, {place: Clamp(torch.arange(model.config.hidden_size))}), ids)
        for place in (name, f"{name}.o_proj")
    ]
    assert torch.equal(*moved) and not torch.equal(moved[0], run(model, ids))


def test_the_neurons_that_rise_most_are_chosen_over_all_layers() -> None:
    ones, zeros = torch.ones(3), torch.zeros(3)
    means = {"a": torch.tensor([0.0, 3.0, 1.0]), "b": torch.tensor([2.0, 0.0, 0.0])}
    forget = {name: Moments(mean, ones, 9) for name, mean in means.items()}
    retain = {"a": Moments(zeros, ones, 9), "b": Moments(zeros, ones, 9)}
    chosen = adjust_neurons(forget, retain, 1 / 3)
    assert {name: each.neurons.tolist() for name, each in chosen.items()} == {"a": [1], "b": [0]}
    assert set(adjust_neurons(forget, retain, 1 / 6)) == {"a"}
    with pytest.raises(ValueError, match="`retain` must be of the layers"):
        adjust_neurons(forget, {"a": retain["a"]})


def test_a_clamped_neuron_lowers_its_token_and_another_does_not() -> None:
    """A neuron whose weights are a token's row in the head is decoded as that token, and makes it likely."""
    torch.manual_seed(0)
    model = gpt2()
    block, head = model.transformer.h[1].mlp, model.lm_head.weight
    with torch.no_grad():
        head.mul_(50)
        block.c_fc.weight[:, 3] = head[5]
        block.c_proj.weight[3] = 20 * head[5]
    assert decode_neurons(model).labels["transformer.h.1.mlp.c_fc"][3].item() == 5
    ids = torch.randint(6, 32, (8, 6))
    before = run(model, ids).softmax(-1)[..., 5]
    name = "transformer.h.1.mlp.c_proj"
    clamped, other = (
        run(ActivationGate(model, {name: Clamp(torch.tensor([place]))}, side="input"), ids).softmax(-1)[..., 5]
        for place in (3, 7)
    )
    fires = before > 0.2
    assert fires.any() and (clamped[fires] < before[fires] - 0.1).all()
    assert float((other - before).abs().max()) < 0.05


def test_neurons_are_moved_for_open_rows_alone_and_in_the_calling_thread_alone() -> None:
    model, ids = sharp(), prompts()
    before = run(model, ids)
    name = "model.layers.0.mlp.up_proj"
    held = ActivationGate(model, {name: Clamp(torch.arange(24))}, sevens)
    after = run(held, input_ids=ids)
    assert torch.equal(after[1], before[1]) and not torch.allclose(after[0], before[0])
    inside: list[Tensor] = []

    def elsewhere() -> None:
        inside.append(run(model, ids))

    with held.applied(held.decide(input_ids=ids)):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert torch.equal(inside[0], before)
    with pytest.raises(ValueError, match="`layer` must be the name of a module"):
        ActivationGate(model, {"nowhere": Clamp(torch.tensor([0]))})
    with pytest.raises(ValueError, match="`side` must be 'output' or 'input'"):
        ActivationGate(model, {name: Clamp(torch.tensor([0]))}, side="both")  # type: ignore[arg-type]
