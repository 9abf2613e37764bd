"""What every objective of language models must have in common, and each one's own equation."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from language_batches import LENGTHS, PROMPT, ROWS, Rows, both, forms, packed, padded, uniform
from models import gpt2, llama, t5
from peft import get_peft_model
from torch import Tensor, nn

from semu_peft import SemuConfig, initialize_semu_weights, unlearn
from semu_peft.objectives import (
    CEU,
    DPO,
    NPO,
    RMU,
    TPO,
    UNDIAL,
    WGA,
    AdaptiveRMU,
    CrossEntropy,
    FDivergence,
    FlatLogits,
    InvertedHinge,
    KLToOriginal,
    Objective,
    PreserveHiddenStates,
    PrimalDual,
    RandomLabel,
    Retain,
    SatImp,
    SimNPO,
    TokenSelective,
    UnseenAnswer,
    WeightedAscent,
    sequence_nll,
)
from semu_peft.objectives.tokens import read_tokens
from semu_peft.objectives.wrappers import one_step

OBJECTIVES: dict[str, Objective] = {
    "npo": NPO(),
    "simnpo": SimNPO(),
    "dpo": DPO(),
    "tpo": TPO(),
    "flat": FDivergence(),
    "kl": KLToOriginal(),
    "undial": UNDIAL(),
    "ceu": CEU(),
    "wga": WGA(),
    "satimp": SatImp(),
    "flat_logits": FlatLogits(),
    "unseen_answer": UnseenAnswer(torch.tensor([3.0, 4.0, 5.0])),
    "rmu": RMU(1),
    "adaptive_rmu": AdaptiveRMU(0),
    "hidden_states": PreserveHiddenStates(0),
    "selective": TokenSelective(NPO()) + TokenSelective(CrossEntropy(), selected=False),
    "primal_dual": PrimalDual(CrossEntropy(), limit=1.0),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def adapted(make: Any = llama, **options: Any) -> Any:
    """A tiny model with an adapter that is not at its start."""
    torch.manual_seed(0)
    base = make().eval()
    return get_peft_model(base, SemuConfig(target_modules="all-linear", r=2, init_weights=False, **options)).eval()


# ---- the reading of tokens ----


def test_sequences_are_rows_or_packed() -> None:
    """Every form counts the same tokens, each in its own sequence, and nothing is predicted across a border."""
    model = adapted()
    expected = read_tokens(model, padded("right"))
    counts = [length - PROMPT for length in LENGTHS]
    assert expected.sequences.bincount().tolist() == counts
    for batch in forms().values():
        tokens = read_tokens(model, batch)
        assert torch.equal(tokens.labels, expected.labels) and torch.equal(tokens.sequences, expected.sequences)
        torch.testing.assert_close(tokens.logits, expected.logits, rtol=1e-5, atol=1e-6)
    everything = [read_tokens(model, form) for form in (padded("left", prompt=0), packed(prompt=0))]
    assert all(tokens.sequences.bincount().tolist() == [length - 1 for length in LENGTHS] for tokens in everything)
    torch.testing.assert_close(everything[0].logits, everything[1].logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fill", [0, 1])
def test_position_ids_of_padded_rows(fill: int) -> None:
    """Positions that a generation loop makes of the mask split no sequence, whatever they say at the padding."""
    model, batch = adapted(), padded("left", more=2)
    places = (batch["attention_mask"].cumsum(1) - 1).masked_fill(batch["attention_mask"] == 0, fill)
    tokens = read_tokens(model, {**batch, "position_ids": places})
    expected = read_tokens(model, padded("right"))
    assert torch.equal(tokens.sequences, expected.sequences) and torch.equal(tokens.labels, expected.labels)


def test_a_row_without_an_answer_is_no_sequence() -> None:
    """Its number goes to the next, so that means are over what there is."""
    batch = padded("right")
    batch["labels"][1] = -100
    tokens = read_tokens(adapted(), batch)
    assert tokens.sequences.bincount().tolist() == [3, 4]
    assert tokens.means(torch.ones(7)).tolist() == [1.0, 1.0]


# ---- every objective ----


@every_objective
@pytest.mark.parametrize("make", [llama, gpt2])
def test_padding_and_packing_change_nothing(name: str, make: Any) -> None:
    """Neither the side nor the amount of padding, nor labels that stand at it, nor rows packed into one.

    With rotary positions and with absolute ones.
    """
    model, objective = adapted(make), OBJECTIVES[name]
    losses = {form: copy.deepcopy(objective)(model, batch).item() for form, batch in forms().items()}
    assert losses == pytest.approx(dict.fromkeys(losses, losses["right"]), rel=2e-5, abs=1e-7)


@every_objective
def test_each_reaches_the_adapter_alone(name: str) -> None:
    """A finite float32 scalar whose gradient goes to the cores, also in bfloat16 and in an encoder-decoder."""
    for model in (adapted(), adapted().to(torch.bfloat16), adapted(t5)):
        loss = copy.deepcopy(OBJECTIVES[name])(model, both(padded))
        assert loss.shape == () and loss.isfinite() and loss.dtype == torch.float32
        loss.backward()
        reached = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters() if p.requires_grad]
        assert any(reached) and all(p.grad is None for p in model.parameters() if not p.requires_grad)


@every_objective
def test_evaluate_is_the_call_and_tells_what_it_read(name: str) -> None:
    """What natural gradients need: a value that stays, for what was prepared, and outputs with their graph."""
    model, batch, objective = adapted(), both(padded), copy.deepcopy(OBJECTIVES[name])
    called = copy.deepcopy(objective)(model, batch)
    prepared = objective.prepare(model, batch)
    first, second = (objective.evaluate(model, batch, prepared) for _ in range(2))
    assert first.loss.item() == second.loss.item() == pytest.approx(called.item(), rel=1e-6)
    assert objective.distribution is not None and first.outputs
    assert all(output.values.requires_grad and output.values.dtype == torch.float32 for output in first.outputs)
    if objective.minimum is not None:
        assert first.loss >= objective.minimum


@every_objective
def test_the_original_is_the_model_without_its_adapter(name: str) -> None:
    """Or the frozen model that is given; both say the same."""
    objective = copy.deepcopy(OBJECTIVES[name])
    if not hasattr(objective, "reference"):
        return
    model = adapted()
    expected = objective(model, both(padded))
    torch.manual_seed(0)
    objective.reference = llama().eval()
    torch.testing.assert_close(objective(model, both(padded)), expected)


@pytest.mark.parametrize("name", ["npo", "dpo", "wga", "unseen_answer", "rmu"])
def test_natural_gradients_train_by_it(name: str) -> None:
    """The loss falls over a few steps, beside a retain term of its own."""
    torch.manual_seed(0)
    model = get_peft_model(llama().eval(), SemuConfig(target_modules="all-linear"))
    forget, objective = [both(padded)], copy.deepcopy(OBJECTIVES[name])
    keep = PreserveHiddenStates(1) if name == "rmu" else KLToOriginal()
    initialize_semu_weights(model, forget, objective, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that AdamW takes over
        result = unlearn(model, forget, objective, retain=Retain([padded(seed=9)], keep), max_steps=6, progress=False)
    first, last = result.history[0], result.history[-1]
    assert last["loss"] < first["loss"] and last["forget_loss"] < first["forget_loss"]


def test_a_budget_is_measured_on_the_answers_alone() -> None:
    """Without retain data: the second answers of DPO are to change."""
    torch.manual_seed(0)
    model, forget = get_peft_model(llama().eval(), SemuConfig(target_modules="all-linear")), [both(padded)]
    initialize_semu_weights(model, forget, DPO(), progress=False)
    result = unlearn(model, forget, DPO(), max_retain_kl=0.02, max_steps=6, progress=False)
    assert max(entry["damage"] for entry in result.history) <= 0.02
    assert result.history[-1]["answer_probability"] < result.history[0]["answer_probability"]


# ---- one equation after the other ----


LOG2 = math.log(2)


def divergence(q: list[float], p: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))


LOWERED = [1 / 10, 3 / 10, 3 / 10, 3 / 10]  # uniform with the true token's logit lowered by log 3
BY_HAND: dict[str, tuple[Objective, float]] = {
    "undial": (
        UNDIAL(beta=math.log(3), reference=uniform),
        sum(divergence(LOWERED, [p, *[(1 - p) / 3] * 3]) for p in (1 / 2, 1 / 4, 1 / 8)) / 3,
    ),
    "ceu": (CEU(), -math.log(3 / 4)),
    "ceu, with the first": (CEU(ignore_first=0), -math.log(1 / 2 * 3 / 4 * 7 / 8) / 3),
    "wga": (WGA(beta=2.0), (1 / 4 + 1 / 16 + 1 / 64) / 2 / 3),
    "satimp": (SatImp(), sum(p**5 / 5 - p**6 / 6 for p in (1 / 2, 1 / 4, 1 / 8)) / 3),
    "plain ascent": (WeightedAscent(beta=0.0), -6 * LOG2 / 3),
    "ascent that waits": (WeightedAscent(beta=0.0, beta2=1.0), (-6 * LOG2 - 7 / 8) / 3),  # log p − p
    "flat_logits": (
        FlatLogits(),
        sum((math.log(high) - (math.log(p) + 3 * math.log((1 - p) / 3)) / 4) ** 2 for p, high in
            [(1 / 2, 1 / 2), (1 / 4, 1 / 4), (1 / 8, 7 / 24)]) / 3,
    ),
    "unseen_answer": (
        UnseenAnswer(torch.tensor([1.0, 2.0, 3.0]), reference=Rows()),
        ((1.5 - 1.5 * LOG2) ** 2 + (2.5 - 3 * LOG2) ** 2) / 2,
    ),
    "unseen_answer, unlikely enough": (
        UnseenAnswer(torch.tensor([1.0, 1.0, 1.0, 2.1]), reference=Rows()), (1.825 - 1.825) ** 2
    ),
    "kl": (KLToOriginal(reference=uniform), sum(divergence([1 / 4] * 4, [p, *[(1 - p) / 3] * 3])
                                                for p in (1 / 2, 1 / 4, 1 / 8)) / 3),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_two_answers_by_hand(name: str) -> None:
    """Means over the three tokens that count, or over the two answers."""
    objective, expected = BY_HAND[name]
    objective.shift_labels = False  # type: ignore[attr-defined]
    assert objective(Rows(), ROWS).item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_kl_to_the_original() -> None:
    """Zero at the original, whatever the labels are; elsewhere the divergence of every token that counts."""
    model, batch = adapted(), padded("right")
    with model.disable_adapter():
        before = read_tokens(model, batch).logits.log_softmax(-1)
    after = read_tokens(model, batch).logits.log_softmax(-1)
    expected = (before.exp() * (before - after)).sum(-1).mean()
    torch.testing.assert_close(KLToOriginal()(model, batch), expected)
    torch.manual_seed(0)
    start = get_peft_model(llama().eval(), SemuConfig(target_modules="all-linear"))
    assert KLToOriginal()(start, batch).item() == pytest.approx(0, abs=1e-6)


def test_second_answers_are_no_business_of_the_model() -> None:
    """Keys of other objectives do not reach a model that does not know them."""
    batch = {**both(padded), "token_mask": padded()["labels"] > 5}
    torch.testing.assert_close(CrossEntropy()(adapted(), batch), CrossEntropy()(adapted(), padded()))


@pytest.mark.parametrize(("beta", "beta2"), [(0.0, 0.0), (1.0, 0.0), (0.5, 0.0), (5.0, 1.0), (0.0, 2.0), (0.7, 1.5)])
def test_weighted_ascent_is_the_gradient_of_its_value(beta: float, beta2: float) -> None:
    """The gradient is the paper's, with its weight held fixed, and the value is what has that gradient."""
    logits = torch.tensor([[2.0, -1.0, 0.5], [-1.0, 3.0, 0.0], [9.0, 0.0, 0.0]], dtype=torch.float64)
    model, batch = nn.Identity(), torch.tensor([0, 0, 0])
    objective, z = WeightedAscent(beta=beta, beta2=beta2), logits.requires_grad_()
    (gradient,) = torch.autograd.grad(objective(model, (z, batch)), z)
    log_p = z.log_softmax(-1)[:, 0]
    weight = (log_p.exp() ** beta * (1 - log_p.exp()) ** beta2).detach()
    (expected,) = torch.autograd.grad((weight * log_p).mean(), z)
    torch.testing.assert_close(gradient, expected)
    with torch.no_grad():
        step = 1e-4 * torch.tensor([[1.0, -0.5, 0.2], [0.3, 1.0, -1.0], [-1.0, 0.1, 0.4]], dtype=torch.float64)
        ahead, behind = (objective(model, (logits + sign * step, batch)) for sign in (1, -1))
    assert (ahead - behind).item() / 2 == pytest.approx((gradient * step).sum().item(), rel=1e-5)


def test_ceu_has_the_gradient_of_a_target_held_fixed() -> None:
    """Cross entropy to the model's own prediction without the true token, as the paper writes it."""
    model = Rows()
    (gradient,) = torch.autograd.grad(CEU(ignore_first=0, shift_labels=False)(model, ROWS), model.logits)
    logits, labels = model.logits[[0, 0, 1], [0, 1, 0]], torch.zeros(3, dtype=torch.long)
    target = logits.detach().scatter(1, labels[:, None], float("-inf")).softmax(-1)
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target), model.logits)
    torch.testing.assert_close(gradient, expected)


def test_ceu_needs_a_token_after_the_first() -> None:
    """It says so where no answer has one."""
    with pytest.raises(ValueError, match=r"`ignore_first` must leave.*got 2 with answers of up to 2 tokens"):
        CEU(ignore_first=2, shift_labels=False)(Rows(), ROWS)


def test_flat_logits_are_read_at_the_predictions() -> None:
    """The mask is shifted with the labels: what counts is the position that predicts an answer's token."""
    logits = torch.zeros(1, 3, 2)
    logits[0, 1] = torch.tensor([4.0, 0.0])  # predicts the last token
    logits[0, 2] = torch.tensor([100.0, 0.0])  # predicts nothing
    labels = torch.tensor([[-100, -100, 1]])
    assert FlatLogits(shift_labels=True)(nn.Identity(), (logits, labels)).item() == 4.0


# ---- unseen answers ----


def test_likelihoods_of_answers() -> None:
    """Means over an answer's tokens, the model left as it was; the same for every form of the batches."""
    model = adapted().train()
    found = {form: sequence_nll(model, [batch], progress=False) for form, batch in forms().items()}
    assert model.training and all(p.grad is None for p in model.parameters())
    tokens = read_tokens(model.eval(), padded())
    expected = torch.stack([part.mean() for part in tokens.nll().split([3, 1, 4])]).detach()
    for each in found.values():
        torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="`batches` must give at least one batch"):
        sequence_nll(model, [], progress=False)


def test_unseen_answers_end_where_they_should() -> None:
    """Each answer is led to the likelihood of its rank: nothing pulls where it is there, nor where it is beyond."""
    model = adapted()
    known = sequence_nll(model, [padded()], progress=False)
    with model.disable_adapter():
        order = sequence_nll(model, [padded()], progress=False).argsort()
    unseen = torch.tensor([0.5, 3.0, 9.0])
    objective = UnseenAnswer(unseen)
    targets = objective.prepare(model, padded())
    assert torch.equal(targets[order], torch.quantile(unseen, torch.tensor([1 / 6, 1 / 2, 5 / 6])))
    expected = (targets - known).clamp(min=0).square().mean()
    assert objective(model, padded()).item() == pytest.approx(expected.item(), rel=1e-5)
    assert UnseenAnswer(known.min() - torch.ones(4))(model, padded()) == 0


def test_unseen_answers_are_ranked_among_all_that_are_to_be_forgotten() -> None:
    """With the likelihoods of all of them the target of an answer is the same in a batch of its own."""
    model, batch = adapted(), padded()
    with model.disable_adapter():
        known = sequence_nll(model, [batch], progress=False)
    unseen = torch.tensor([0.5, 3.0, 9.0])
    together = UnseenAnswer(unseen).prepare(model, batch)
    among = UnseenAnswer(unseen, forget_nll=known)
    torch.testing.assert_close(among.prepare(model, batch), together)
    for row in range(len(known)):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        torch.testing.assert_close(among.prepare(model, alone), together[row : row + 1])
    with pytest.raises(ValueError, match="`forget_nll` must hold a number for each forget example, got 0"):
        UnseenAnswer(unseen, forget_nll=torch.tensor([]))


@pytest.mark.parametrize("nll", [torch.tensor([]), torch.tensor([1.0, float("nan")]), torch.tensor([-1.0])])
def test_likelihoods_that_are_none(nll: Tensor) -> None:
    """Empty, NaN or negative."""
    with pytest.raises(ValueError, match="`nll` must be finite numbers from 0 on"):
        UnseenAnswer(nll)
    with pytest.raises(TypeError, match="`nll` must be a tensor"):
        UnseenAnswer([1.0])  # type: ignore[arg-type]


# ---- on some tokens, and under a limit ----


def test_token_selective_is_the_objective_on_its_tokens() -> None:
    """The two halves are disjoint and together the whole; an answer without such tokens is left out."""
    model, batch = adapted(), padded()
    tokens = read_tokens(model, batch)
    even = tokens.labels % 2 == 0
    assert 0 < even.sum() < len(even)
    halves = [TokenSelective(CrossEntropy(), selected=selected)(model, batch) for selected in (True, False)]
    torch.testing.assert_close(halves, [tokens.nll()[even].mean(), tokens.nll()[~even].mean()])
    total = (halves[0] * even.sum() + halves[1] * (~even).sum()) / len(even)
    torch.testing.assert_close(total, CrossEntropy()(model, batch))
    hinge = TokenSelective(InvertedHinge())
    assert hinge.minimum == 0.0 and hinge.distribution == "categorical"


def test_token_masks_that_cannot_be_used() -> None:
    """None there, or of another shape."""
    plain = {name: value for name, value in padded().items() if name != "token_mask"}
    for batch in (plain, (torch.zeros(1, 2), torch.zeros(1))):
        with pytest.raises(TypeError, match="A batch must be a mapping with 'token_mask', got"):
            TokenSelective(CrossEntropy())(adapted(), batch)
    with pytest.raises(ValueError, match=r"`token_mask` must have the shape of `labels`, \(3, 6\), got \(3, 5\)"):
        TokenSelective(CrossEntropy())(adapted(), {**plain, "token_mask": torch.ones(3, 5)})
    with pytest.raises(ValueError, match="`token_mask` must hold true or false, got numbers from 0.5 to 0.5"):
        TokenSelective(CrossEntropy())(adapted(), {**plain, "token_mask": torch.full((3, 6), 0.5)})
    with pytest.raises(TypeError, match="`selected` must be True or False"):
        TokenSelective(CrossEntropy(), selected="no")  # type: ignore[arg-type]


def test_primal_dual_follows_its_limit() -> None:
    """Up by the rate times what is over, never below zero, from the end of the warm-up; saved; not by looking on."""
    over, under = (torch.zeros(1, 2), torch.tensor([0])), (torch.tensor([[50.0, 0.0]]), torch.tensor([0]))
    objective, model = PrimalDual(CrossEntropy(), limit=0.5, rate=2.0, multiplier=0.5, warmup=1), nn.Identity()
    assert objective(model, over).item() == pytest.approx(0.5 * (LOG2 - 0.5))
    assert objective.multiplier == 0.5  # warming up
    with torch.no_grad():
        objective(model, over)
    assert objective.multiplier == 0.5
    objective(model, over)
    assert objective.multiplier == pytest.approx(0.5 + 2 * (LOG2 - 0.5))
    saved = objective.state_dict()
    multiplier, prepared = objective.prepare(model, under)  # what natural gradients call: the step is by the old one
    assert multiplier == saved["multiplier"] and objective.multiplier == 0.0
    value = objective.evaluate(model, under, (multiplier, prepared))
    assert value.loss.item() == pytest.approx(multiplier * -0.5) and value.outputs[0].weight == multiplier
    again = PrimalDual(CrossEntropy(), limit=0.5, rate=2.0, multiplier=0.5, warmup=1)
    again.load_state_dict(saved)
    assert again.multiplier == multiplier and again.steps == 2


@pytest.mark.filterwarnings("error:The loss ended")  # higher, but at a higher multiplier
def test_primal_dual_in_a_run() -> None:
    """PDU as a composition: the multiplier rises while the retain loss is over its limit."""
    model, keep = adapted(), PrimalDual(CrossEntropy(), limit=0.1)
    retain = Retain([padded(seed=9)], keep)
    unlearn(model, [padded()], FlatLogits(), retain=retain, max_steps=4, learning_rate=1e-3, progress=False)
    assert keep.multiplier > 1 and keep.steps == 4


@pytest.mark.parametrize("options", [{"learning_rate": 1e-6}, {}], ids=["AdamW", "natural"])
def test_primal_dual_takes_a_step_with_the_optimiser(options: dict[str, Any]) -> None:
    """Acceptance: one for all batches that gradients accumulate over, by the mean of their losses."""
    model, kept = adapted(), [padded(seed=seed) for seed in range(3)]
    before = [CrossEntropy()(model, batch).item() for batch in kept]
    keep = PrimalDual(CrossEntropy(), limit=0.0, rate=1.0, multiplier=0.0)
    several = {"gradient_accumulation_steps": 3, "max_steps": 1, "progress": False, **options}
    unlearn(model, [padded()] * 3, NPO(), retain=Retain(kept, keep), **several)
    assert keep.steps == 1 and keep.multiplier == pytest.approx(sum(before) / 3, rel=1e-5)


def test_a_step_of_several_batches_that_fails_has_not_been() -> None:
    """Its losses are not counted with those of the next; and within it a state that is put back takes them along."""
    keep, model, batch = PrimalDual(CrossEntropy(), limit=0.5), nn.Identity(), (torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(RuntimeError), one_step():
        keep(model, batch)
        raise RuntimeError
    assert keep.steps == 0 and keep.state_dict() == PrimalDual(CrossEntropy(), limit=0.5).state_dict()
    with one_step():
        keep(model, batch)
        now = keep.state_dict()
        keep(model, (torch.tensor([[50.0, 0.0]]), torch.tensor([0])))  # as a rule that looks at the step again
        keep.load_state_dict(now)
    assert keep.steps == 1 and keep.multiplier == pytest.approx(1 + LOG2 - 0.5)


def test_what_has_a_state_but_does_not_draw_is_looked_at_once() -> None:
    """Of natural gradients, the batches on which start and end are compared are evaluated again for draws alone."""
    prepared = []

    class Watched(PrimalDual):
        def prepare(self, model: nn.Module, batch: Any) -> Any:
            prepared.append(batch)
            return super().prepare(model, batch)

    model, keep = adapted(), Watched(CrossEntropy(), limit=0.1)
    unlearn(model, [padded()], NPO(), retain=Retain([padded(seed=9)], keep), max_steps=1, progress=False)
    assert len(prepared) == 2  # to compare, and for the step


def test_a_composition_draws_where_a_part_does() -> None:
    drawn, steady = RandomLabel(), CrossEntropy()
    for make in (TokenSelective, lambda inner: PrimalDual(inner, limit=0.1), lambda inner: inner + CrossEntropy()):
        assert make(drawn).is_random and not make(steady).is_random
    assert not PrimalDual(steady, limit=0.1).is_steady and not TokenSelective(PrimalDual(steady, limit=0.1)).is_steady
