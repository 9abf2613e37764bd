"""All attacks in one call: what fits is run, what does not is named, and the model is what it was."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from answer_models import FACTS, decoder, word_tokenizer
from answer_models import FORGET as QUESTIONS
from diffusion_models import text_unet
from models import CLASSES, Mlp, Snapshot, image_batches, llama, t5, vector_batches
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from semu_peft import SemuConfig, gates, initialize_semu_weights
from semu_peft.evaluation import (
    AttackReport,
    Predictions,
    PromptSearch,
    RelearningCurve,
    attack,
    flipped_inputs,
    lira_scores,
    noisy_inputs,
    predict,
    score_attack,
    search_prompt,
    stripping,
    text_membership,
)
from semu_peft.evaluation.attack_report import Compared
from semu_peft.evaluation.knowledge import LossOfOriginal, task_of
from semu_peft.language import text_examples
from semu_peft.objectives import Attacker, CrossEntropy, DenoisingLoss, NoiseSchedule
from semu_peft.report.measured import plain

FORGET, RETAIN, TEST = (vector_batches(2, 10, seed=seed) for seed in (1, 2, 3))
SHORT = [Attacker("sgd", 0.05, steps=3, forget_examples=5)]
SCHEDULE = NoiseSchedule(torch.linspace(1, 0.1, 10), torch.linspace(0, 1, 10), torch.arange(10))


def adapted(net: nn.Module | None = None, targets: Any = Mlp.targets, batches: Any = FORGET) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(Mlp() if net is None else net, SemuConfig(target_modules=targets, r=2))
    initialize_semu_weights(model, batches, CrossEntropy(), progress=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.5 * torch.randn_like(parameter))
    return model


def text(seed: int = 0) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 32, (6, 7), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]


def concept(seed: int = 0) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(seed)
    condition = {"encoder_hidden_states": torch.randn(1, 6, 8, generator=draw).expand(4, 6, 8)}
    return [{"latents": torch.randn(4, 4, 8, 8, generator=draw), "condition": condition}]


def test_a_classifier() -> None:
    model, gold = adapted(), Mlp()
    before = Snapshot.of(model), Snapshot.of(gold)
    shadow = [tuple(predict(Mlp(), data, progress=False) for data in (FORGET, TEST)) for _ in range(3)]
    report = attack(
        model, FORGET, RETAIN, TEST, reference=gold, related=RETAIN, attackers=SHORT, shadow=shadow,
        further={"of my own": lambda given: 42}, progress=False,
    )  # fmt: skip
    for snapshot, attacked in zip(before, (model, gold), strict=True):
        snapshot.assert_same(attacked)
    names = [name for name, _, _ in report.rows]
    assert [name.partition(":")[0] for name in names] == [
        "stripping", "quantisation", "quantisation", "relearning", "relearning", "inputs", "inputs", "linear probe",
        "membership", "membership", "membership", "membership", "of my own",
    ]  # fmt: skip
    asked_of_one = [name for name, _, other in report.rows if not other]
    assert asked_of_one == ["stripping: the adapter switched off", "of my own"]
    for name in ("log odds, without shadow models", "LiRA", "RMIA"):
        found = next(each for each in report.results if getattr(each, "attack", None) == name)
        assert found.row[2] == found.reference._found() != found.row[1], "gold is another model, and scored itself"
    odds = [predict(gold, data, progress=False).log_odds for data in (FORGET, TEST)]
    outside = [torch.stack([pair[side].log_odds for pair in shadow]) for side in (0, 1)]
    scores = [lira_scores(own, others) for own, others in zip(odds, outside, strict=True)]
    lira = next(each for each in report.results if getattr(each, "attack", None) == "LiRA")
    assert lira.reference == score_attack(*scores, attack="LiRA")
    reasons = {each.attack: each.reason for each in report.not_run}
    few = "lens: a few tokens of each layer"
    assert reasons.keys() == {"inputs: flipped", "logit lens", few, "adversarial prompts"}
    assert "| of my own | 42 | – |" in str(report) and "Not run:" in str(report)


def test_what_an_attack_says_stays_in_its_row() -> None:
    report = AttackReport("language", (Compared("Jane | Joe", "one\ntwo | three"),), (), 1.0, True)
    assert str(report).splitlines()[2:] == ["| Jane \\| Joe | one two \\| three | – |"]


def test_a_probe_that_has_too_few_examples_is_named() -> None:
    few = [(FORGET[0][0][:3], FORGET[0][1][:3])]
    report = attack(adapted(), few, RETAIN, attackers=SHORT, progress=False)
    assert "at least 4" in {each.attack: each.reason for each in report.not_run}["linear probes"]
    assert report.results


def test_language_models_and_denoisers() -> None:
    model = adapted(llama(), ["q_proj", "down_proj"], text())
    report = attack(model, text(), text(1), attackers=SHORT, progress=False)
    assert report.task == "language"
    assert [type(result).__name__ for result in report.results] == [
        "Stripping", "QuantizationAttack", "QuantizationAttack", "RelearningCurve", "Probes", "Probes",
        "LensAttack",
    ]  # fmt: skip
    assert "prompt_attacks" in {each.attack: each.reason for each in report.not_run}["prompts"]
    assert "No retrained model was given" in report.to_markdown()

    unet = text_unet()
    wrapped = get_peft_model(unet, SemuConfig(target_modules=["to_k", "to_v"], r=2))
    loss = DenoisingLoss(SCHEDULE)
    initialize_semu_weights(wrapped, concept(), loss, progress=False)
    report = attack(wrapped, concept(), learn=loss, attackers=SHORT, prompt_steps=2, progress=False)
    assert report.task == "diffusion"
    kinds = [type(result).__name__ for result in report.results]
    assert kinds[-1] == "PromptSearch" and "RelearningCurve" in kinds
    assert report.results[0].forget == (100.0, 100.0), "nothing was trained: it knows as much as the original"
    curve = next(each for each in report.results if isinstance(each, RelearningCurve))
    assert curve.half == (curve.forget[0] + 100) / 2 and curve.half != 50
    own = attack(
        wrapped, concept(), learn=loss, attackers=SHORT, prompt_steps=2, measure=lambda *_: 12.0, progress=False
    )
    assert next(each for each in own.results if isinstance(each, RelearningCurve)).half == 50
    missing = attack(wrapped, concept(), attackers=SHORT, progress=False)
    assert not missing.results and "DenoisingLoss" in missing.not_run[0].reason


def reasons_of(report: Any) -> dict[str, str]:
    return {each.attack: each.reason for each in report.not_run}


def test_membership_without_shadow_models_has_an_area_with_its_interval() -> None:
    model = Mlp()
    report = attack(model, FORGET, test=TEST, attackers=[], progress=False)
    (found,) = (each for each in report.results if type(each).__name__ == "ShadowMembership")
    odds = [predict(model, data, progress=False).log_odds for data in (FORGET, TEST)]
    assert found.auc == score_attack(*odds).auc and found.interval[0] < found.auc < found.interval[1]
    assert found.row[2] == "", "there is no reference"
    assert reasons_of(report)["membership: confidence and threshold"] == "it needs `retain`"
    bare = [tuple(replace(each, log_odds=None) for each in (predict(Mlp(), side, progress=False),) * 2)
            for side in (FORGET, FORGET)]  # fmt: skip
    report = attack(model, FORGET, test=TEST, attackers=[], shadow=bare, progress=False)
    assert "`log_odds`" in reasons_of(report)["membership: LiRA"]
    assert any(name == "membership: RMIA" for name, _, _ in report.rows)


def test_membership_of_texts() -> None:
    """The same areas as by questions and answers; zlib needs the tokenizer, and gold is read alike."""
    model, gold, tokenizer = decoder(), decoder(seed=1), word_tokenizer()
    forget, test = (list(text_examples(tokenizer, rows).loader(2, shuffle=False)) for rows in (QUESTIONS, FACTS))
    report = attack(
        model, forget, test=test, reference=gold, attackers=[], tokenizer=tokenizer, measure=lambda *_: 0.0,
        progress=False,
    )  # fmt: skip
    (found,) = (each for each in report.results if type(each).__name__ == "TextMembership")
    by_answers = text_membership(model, tokenizer, QUESTIONS, FACTS, reference=gold, progress=False)
    assert {name: each.auc for name, each in found.found.items()} == {
        name: pytest.approx(each.auc) for name, each in by_answers.items()
    }
    assert (
        found.reference["min_k"].auc == text_membership(gold, tokenizer, QUESTIONS, FACTS, progress=False)["min_k"].auc
    )
    assert list(found.found) == ["loss", "zlib", "min_k", "min_k_plus_plus", "reference"]
    assert "Min-K%++" in found.row[1] and "zlib" in found.row[2] and "less the reference's" not in found.row[2]
    told = plain(found)
    assert told["found"]["loss"]["interval"] == list(found.found["loss"].interval)

    without = attack(model, forget, test=test, attackers=[], measure=lambda *_: 0.0, progress=False)
    assert "`tokenizer` was not given" in reasons_of(without)["membership of texts: zlib"]
    assert any(name == "membership of texts" for name, _, _ in without.rows)
    assert (
        "`test` was not given"
        in reasons_of(attack(model, forget, attackers=[], measure=lambda *_: 0.0, progress=False))[
            "membership of texts"
        ]
    )


def test_an_encoder_decoder_has_no_lens_and_is_attacked_otherwise() -> None:
    report = attack(t5(), text(), test=text(1), attackers=SHORT, progress=False)
    assert report.task == "language"
    for name in ("logit lens", "lens: a few tokens of each layer"):
        assert "decoders alone" in reasons_of(report)[name]
    assert not [reason for reason in reasons_of(report).values() if "it failed" in reason]
    assert report.rows[-1][0] == "membership of texts"


def test_an_attack_that_fails_takes_no_other_with_it() -> None:
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"], r=2, init_weights=False, modules_to_save=["head"]))
    asked: list[nn.Module] = []

    def mine(attacked: nn.Module) -> float:
        asked.append(attacked)
        return 1 / 0

    report = attack(
        model, FORGET, RETAIN, reference=Mlp(), attackers=SHORT, further={"mine": mine, "after it": lambda _: 42},
        progress=False,
    )  # fmt: skip
    reasons = reasons_of(report)
    assert reasons["mine"] == "it failed: ZeroDivisionError: division by zero" and asked == [model]
    for bits in (8, 4):
        told = reasons[f"quantisation: {bits} bits"]
        assert told.startswith("it failed: ValueError: `model` has modules") and "merge_and_unload" in told
    names = [name.partition(":")[0] for name, _, _ in report.rows]
    assert names == ["stripping", "relearning", "inputs", "inputs", "linear probe", "after it"]
    assert "- mine: it failed" in report.to_markdown()


def test_what_only_the_reference_cannot_stand_is_told_of_the_model() -> None:
    other = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, CLASSES))
    model = adapted()
    alone, beside = (
        attack(model, FORGET, RETAIN, attackers=[], reference=reference, progress=False) for reference in (None, other)
    )
    probe, alone_probe = (
        next(each for each in report.results if type(each).__name__ == "Probes") for report in (beside, alone)
    )
    assert probe == alone_probe and probe.reference == ()
    reason = reasons_of(beside)["linear probes, of the reference"]
    assert reason.startswith("it could not be attacked, and what is told is of this model alone: ValueError")
    assert "`reference` must have the layers that are read of the model, got none of the name 'fc1'" in reason
    assert [row[0] for row in beside.rows] == [row[0] for row in alone.rows]
    assert beside.rows[1][2], "rounding asks for no layers of the same names"


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    report = attack(adapted(), FORGET, RETAIN, TEST, reference=Mlp(), attackers=SHORT, progress=False)
    for name in ("linear probes", "membership: confidence and threshold"):
        assert 'pip install ".[evaluation]"' in reasons_of(report)[name]
    assert "relearning" in report.to_markdown() and len(report.results) >= 6


def test_an_interrupt_is_no_failed_attack() -> None:
    def stop(_: nn.Module) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attack(Mlp(), FORGET, attackers=[], further={"stop": stop}, progress=False)


def test_attacks_of_one_name_are_all_run() -> None:
    """Two attackers may be alike in words, and an attack of one's own may be called as one that is here."""
    alike = [Attacker("sgd", 0.05, steps=2, batch_size=size) for size in (2, 5)]
    report = attack(
        adapted(), FORGET, attackers=alike, further={"stripping": lambda _: "mine"}, measure=lambda *_: 1.0,
        progress=False,
    )  # fmt: skip
    names = [name.partition(":")[0] for name, _, _ in report.rows]
    assert names.count("relearning") == 2 and names.count("stripping") == 2


def test_one_attacker_needs_no_list() -> None:
    report = attack(Mlp(), FORGET, attackers=SHORT[0], progress=False)
    assert sum(name.startswith("relearning") for name, _, _ in report.rows) == 1


def test_when_the_time_is_over_the_rest_is_named() -> None:
    report = attack(adapted(), FORGET, RETAIN, attackers=SHORT, time_limit=0.0, progress=False)
    assert not report.results
    assert sum("the time limit of 0 s" in each.reason for each in report.not_run) == 7


def test_stripping_takes_a_model_from_behind_its_gate() -> None:
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"], r=2, init_weights=False)).eval()
    batch = [(torch.randn(8, 6), torch.randint(4, (8,)))]
    with model.disable_adapter():
        bare = float((model(batch[0][0]).argmax(-1) == batch[0][1]).float().mean()) * 100
    for served, name in (
        (gates.gated(model, lambda base, x: {"default": torch.ones(len(x))}), "'default'"),
        (gates.ActivationGate(model, {"fc2": gates.Clamp(torch.arange(8))}), "ActivationGate"),
    ):
        found = stripping(served, batch)
        assert not found.is_removal and "a gate hides and does not remove" in repr(found) and name in repr(found)
        if name == "'default'":
            assert found.forget[1] == pytest.approx(bare)


def test_stripping_says_what_switching_off_gives() -> None:
    net = Mlp().eval()
    known = predict(net, FORGET, progress=False).accuracy
    model = adapted(copy.deepcopy(net))
    found = stripping(model, FORGET)
    assert found.adapters == ("default",) and found.forget[1] == known and "merge" in repr(found)
    assert found.row[2] == "", "no reference has an adapter to switch off, and none was given"
    merged = stripping(model.merge_and_unload(), FORGET)
    assert merged.is_removal and merged.forget[0] == pytest.approx(found.forget[0])


def test_stripping_takes_off_all_requests_and_not_what_the_model_knows_by() -> None:
    """Of requests in a row the last one alone is trained; the model may know its task by an adapter of its own."""
    net = Mlp().eval()
    task = get_peft_model(net, LoraConfig(target_modules=Mlp.targets, r=4, init_lora_weights=False), "task")
    known = [(inputs, task(inputs).argmax(1)) for inputs, _ in FORGET]
    config = SemuConfig(target_modules=Mlp.targets, r=2, init_weights=False)
    model = get_peft_model(task.base_model.model, config, "first")
    model.add_adapter("second", config)
    model.base_model.set_adapter(["first", "second"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".second" in name)
        parameter.data.mul_(10 if "semu_core" in name else 1)
    found = stripping(model, known)
    assert found.forget[0] < 100 and found.forget[1] == 100 and found.adapters == ("first", "second")


def test_inputs_are_changed_and_labels_are_not() -> None:
    class Leftmost(nn.Module):
        """Takes the brighter half for the class."""

        def forward(self, pixel_values: Tensor) -> Tensor:
            return pixel_values.mean((1, 2)).unflatten(1, (2, -1)).mean(2)

    images = torch.zeros(6, 3, 8, 8)
    images[..., :4] = 1.0
    batch = [{"pixel_values": images, "labels": torch.ones(6).long()}]
    assert flipped_inputs(Leftmost(), batch).forget == (0.0, 100.0)
    quiet, loud = (noisy_inputs(Leftmost(), batch, scale=scale).forget for scale in (0.01, 30.0))
    assert quiet == (0.0, 0.0) and loud[1] > 0
    with pytest.raises(ValueError, match="floating-point inputs"):
        noisy_inputs(llama(), text())
    with pytest.raises(ValueError, match="forget"):
        flipped_inputs(Mlp(), FORGET)


def test_a_searched_prompt_beats_the_concepts_own_and_repeats() -> None:
    unet, loss = text_unet(), DenoisingLoss(SCHEDULE, seed=4)
    before, state = Snapshot.of(unet), loss.state_dict()
    found = search_prompt(
        unet, concept(), loss, steps=15, learning_rate=0.1, seeds=(0, 1), original=unet, progress=False
    )
    before.assert_same(unet)
    assert torch.equal(loss.state_dict()["generator"], state["generator"])
    assert min(found.found) < found.prompted == found.known and found.back is None
    assert "how much is back is not told, as the prompt's loss is less than 5% above" in repr(found)
    again = search_prompt(unet, concept(), loss, steps=15, learning_rate=0.1, seeds=(0, 1), progress=False)
    assert again.found == found.found
    assert found.embedding.shape == (1, 6, 8)
    with pytest.raises(ValueError, match="text embedding"):
        search_prompt(unet, [{"latents": torch.zeros(1, 4, 8, 8), "condition": {}}], loss)


def test_little_that_was_forgotten_is_not_told_as_thousands_of_percent() -> None:
    assert PromptSearch(prompted=1.1838, found=(1.1732,), known=1.1833).back is None
    assert PromptSearch(prompted=1.0499, found=(0.9,), known=1.0).back is None
    assert PromptSearch(prompted=1.06, found=(1.03,), known=1.0).back == pytest.approx(50.0)
    assert "not told" not in repr(PromptSearch(prompted=1.0499, found=(0.9,)))


def test_a_search_that_has_diverged_hides_no_other() -> None:
    found = PromptSearch(prompted=2.0, found=(float("nan"), 1.5), known=1.0)
    assert found.best == 1.5 and found.back == 50 and "1.5000 under the best of 2" in repr(found)


def test_what_a_denoiser_knows_is_measured_with_the_same_draws() -> None:
    loss = DenoisingLoss(SCHEDULE)
    unet = text_unet()
    assert LossOfOriginal(loss, unet)(copy.deepcopy(unet), concept()) == 100.0
    assert LossOfOriginal(loss, unet)(text_unet(seed=5), concept()) != 100.0


def test_the_task_is_told_by_batches_model_and_loss() -> None:
    assert task_of(Mlp(), FORGET[0]) == "classification"
    assert task_of(llama(), text()[0]) == "language"
    assert task_of(nn.Identity(), image_batches()[0], DenoisingLoss(SCHEDULE)) == "diffusion"


def _said(labels: Tensor) -> Predictions:
    return Predictions(labels, labels, torch.full(labels.shape, 0.5), CLASSES)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("model", None), ("reference", 5), ("forget", []), ("forget", 5), ("retain", "x"), ("time_limit", -1.0),
        ("seed", "x"), ("progress", 1), ("further", [1]), ("further", {"a": 3}), ("attackers", [1]), ("attackers", 1),
        ("shadow", 1), ("shadow", [1]), ("shadow", [(1, 2)]), ("shadow", [()]), ("measure", 5),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_is_run(argument: str, value: Any) -> None:
    asked: list[Any] = []
    arguments = {"further": {"mine": asked.append}, "model": Mlp(), "forget": FORGET, "progress": False}
    with pytest.raises((ValueError, TypeError), match=f"^`{argument}` must"):
        attack(**arguments | {argument: value})
    assert not asked


@pytest.mark.parametrize("attackers", [None, SHORT])
def test_as_many_examples_are_for_the_attackers_that_are_chosen(attackers: Any) -> None:
    if attackers is not None:
        with pytest.raises(ValueError, match="^`forget_examples` must be left out beside `attackers`, got 3"):
            attack(Mlp(), FORGET, attackers=attackers, forget_examples=3, progress=False)
        return
    with pytest.raises(ValueError, match="^`forget_examples` must"):
        attack(Mlp(), FORGET, forget_examples=0, progress=False)
    report = attack(Mlp(), FORGET, forget_examples=3, time_limit=0, progress=False)
    relearnt = [each.attack for each in report.not_run if each.attack.startswith("relearning: ")]
    assert len(relearnt) >= 4 and all(", 3 examples" in name for name in relearnt)


def test_a_dry_run_names_what_would_be_run_and_runs_nothing() -> None:
    ran: list[Any] = []
    given = {
        "reference": Mlp(),
        "related": RETAIN,
        "further": {"mine": ran.append},
        "measure": lambda *_: ran.append(1),
    }
    said = [predict(Mlp(), side, progress=False) for side in (FORGET, TEST)]
    more = {"shadow": [tuple(said)], "forget_examples": 3, "progress": False, **given}
    dry = attack(adapted(), FORGET, RETAIN, TEST, dry_run=True, **more)
    late = attack(adapted(), FORGET, RETAIN, TEST, time_limit=0, **more)
    assert not ran and not dry.results and dry.has_reference
    timed = [each.attack for each in late.not_run if each.reason.startswith("the time limit")]
    assert list(dry.planned) == timed and {"mine", "membership: LiRA", "quantisation: 4 bits"} <= set(timed)
    assert "relearning: SGD 0.01, 3 examples, 50 steps" in timed
    assert dry.not_run == tuple(each for each in late.not_run if each.attack not in timed) and not late.planned
    assert "Would be run:\n\n- stripping\n" in dry.to_markdown() and "Would be run" not in late.to_markdown()
    with pytest.raises(TypeError, match="`dry_run`"):
        attack(Mlp(), FORGET, dry_run=1)


def test_no_seeds_are_named() -> None:
    with pytest.raises(ValueError, match="`seeds` must hold at least one"):
        search_prompt(nn.ReLU(), concept(), CrossEntropy(), seeds=())
    with pytest.raises(ValueError, match="`seeds` must hold at least one"):
        noisy_inputs(Mlp(), vector_batches(1), seeds=())
