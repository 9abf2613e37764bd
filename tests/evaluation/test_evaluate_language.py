"""All measures of a language model in one call, kept in a folder by measurement."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from answer_models import FACTS, FORGET, decoder, word_tokenizer
from models import Snapshot
from peft.tuners.tuners_utils import BaseTunerLayer

from semu_peft import SemuConfig
from semu_peft.evaluation import (
    LanguageMetrics,
    evaluate_language,
    forget_quality,
    generate_answers,
    neutral_kl,
    privacy_leakage,
    rouge_l,
    score_answers,
    score_texts,
    separation,
    text_membership,
    truth_ratio,
)
from semu_peft.evaluation.auc import mean_interval
from semu_peft.evaluation.cached import model_digest
from semu_peft.report.measured import plain, read_metrics

QUIET = {"progress": False, "max_new_tokens": 6}
UTILITY = {"retain": FORGET[:2], "world_facts": FACTS}
NEUTRAL = ["Ada lives in Rome", "the Paris of Eve"]


def test_every_number_is_made_of_its_parts() -> None:
    model, tokenizer = decoder(), word_tokenizer()
    before = Snapshot.of(model)
    found = evaluate_language(
        model, tokenizer, FORGET, utility=UTILITY, neutral=NEUTRAL, reference=decoder(seed=1), batch_size=2, **QUIET
    )
    before.assert_same(model)

    def nll(row: dict, answer: str) -> float:
        return score_answers(model, tokenizer, [(row["question"], answer)], progress=False).nll.item()

    ratios = [
        math.exp(nll(row, row["paraphrased_answer"]) - sum(nll(row, wrong) for wrong in row["perturbed_answer"]) / 2)
        for row in FORGET
    ]
    assert found.truth_ratios == pytest.approx(ratios, rel=1e-4)
    assert found.truth_ratio == pytest.approx(sum(min(r, 1 / r) for r in ratios) / 3, rel=1e-4)
    assert found.probability == pytest.approx(sum(math.exp(-nll(row, row["answer"])) for row in FORGET) / 3, rel=1e-4)
    written = generate_answers(model, tokenizer, [row["question"] for row in FORGET], **QUIET)
    assert found.rouge == pytest.approx(rouge_l([row["answer"] for row in FORGET], written).recall.mean().item())

    shares = []
    for row in FACTS:  # no paraphrase: the probability is that among the options
        right, wrong = nll(row, row["answer"]), [nll(row, answer) for answer in row["perturbed_answer"]]
        shares.append(math.exp(-right) / (math.exp(-right) + sum(math.exp(-each) for each in wrong)))
    assert found.utility["world_facts probability"] == pytest.approx(sum(shares) / 2, rel=1e-4)
    plain = sum(math.exp(-nll(row, row["answer"])) for row in FORGET[:2]) / 2
    assert found.utility["retain probability"] == pytest.approx(plain, rel=1e-4)
    assert len(found.utility) == 6 and found.neutral_kl > 0
    drift = neutral_kl(
        model, tokenizer, [{"text": text} for text in NEUTRAL], reference=decoder(seed=1), progress=False
    )
    assert found.neutral_kl == pytest.approx(drift.kl)


def test_means_have_the_intervals_of_rows_drawn_again() -> None:
    model, tokenizer = decoder(), word_tokenizer()
    found = evaluate_language(model, tokenizer, FORGET, utility=UTILITY, **QUIET)
    probabilities = score_answers(model, tokenizer, FORGET, progress=False).probability
    assert found.probability_interval == mean_interval(probabilities)
    ratios = torch.tensor([min(ratio, 1 / ratio) for ratio in found.truth_ratios], dtype=torch.float64)
    assert found.truth_ratio_interval == mean_interval(ratios)
    shown = read_metrics(found)["rows"][0]["values"]  # as a report shows them
    names = ("probability", "rouge", "truth ratio", "paraphrased probability", "extraction strength",
             "exact memorisation")  # fmt: skip
    for name in names:
        low, high = shown[name]["interval"]
        assert low <= shown[name]["value"] <= high and shown[name]["source"] == "examples", name
    assert {name for name, each in shown.items() if each["interval"]} == {*names}
    assert "interval" not in repr(found)
    one, both = FORGET[:1], ["probability", "membership"]
    alone = evaluate_language(model, tokenizer, one, holdout=one, metrics=both, **QUIET)
    assert alone.probability_interval is None, "one row, drawn again, is that row"
    low, high = alone.membership_interval["loss"]
    assert low < alone.membership["loss"] == 0.5 < high


def test_a_model_that_has_diverged_has_no_interval() -> None:
    model = decoder()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    found = evaluate_language(model, word_tokenizer(), FORGET, metrics=["probability"], **QUIET)
    assert math.isnan(found.probability) and found.probability_interval is None


def test_gold_gives_the_forget_quality() -> None:
    tokenizer, names = word_tokenizer(), ["truth_ratio"]
    gold = evaluate_language(decoder(seed=1), tokenizer, FORGET, metrics=names, **QUIET)
    found = evaluate_language(decoder(), tokenizer, FORGET, metrics=["forget_quality"], gold=gold, **QUIET)
    assert found.forget_quality == forget_quality(found.truth_ratios, gold.truth_ratios)
    assert gold.against(gold).forget_quality == 1.0 and found.privacy_leakage is None
    assert repr(found).startswith("LanguageMetrics(truth ratio 0.") and "forget quality" in repr(found)
    with pytest.raises(ValueError, match="`gold` must have been measured on the same forget rows"):
        found.against(LanguageMetrics(probability=0.1))
    alone = evaluate_language(decoder(), tokenizer, FORGET, metrics=["probability"], gold=gold, **QUIET)
    assert alone.forget_quality is None  # it was not asked for


def test_membership_beside_gold_gives_the_privacy_leakage(tmp_path: Path) -> None:
    tokenizer, options = word_tokenizer(), {"metrics": ["truth_ratio", "membership"], "holdout": FACTS, **QUIET}
    gold = evaluate_language(decoder(seed=1), tokenizer, FORGET, **options)
    found = evaluate_language(decoder(), tokenizer, FORGET, gold=gold, output_dir=tmp_path, **options)
    direct = text_membership(decoder(), tokenizer, FORGET, FACTS, progress=False)
    assert found.membership == {attack: result.auc for attack, result in direct.items()}
    assert found.membership_interval == {attack: result.interval for attack, result in direct.items()}
    low, high = found.membership_interval["loss"]
    assert low < found.membership["loss"] < high  # each set is of several answers, which are drawn again
    assert found.privacy_leakage == privacy_leakage(found.membership["min_k"], gold.membership["min_k"])
    options["metrics"] = ["membership"]
    only = evaluate_language(decoder(), tokenizer, FORGET, gold=gold, **options)
    assert (only.privacy_leakage, only.forget_quality) == (found.privacy_leakage, None)
    options["metrics"] = "privacy_leakage"
    assert evaluate_language(decoder(), tokenizer, FORGET, gold=gold, **options) == only
    options["metrics"] = ["membership"]
    kept = json.loads((tmp_path / "membership.json").read_text())["value"]
    assert {attack: each["auc"] for attack, each in kept.items()} == found.membership
    again = evaluate_language(decoder(), tokenizer, FORGET, gold=gold, output_dir=tmp_path, **options)
    assert again.membership_interval == found.membership_interval and again == only
    report = read_metrics({"unlearned": found})["rows"][0]["values"]
    for attack, bounds in found.membership_interval.items():
        told = report[f"membership: {attack.replace('_', ' ')}"]
        assert told == {"value": found.membership[attack], "interval": list(bounds), "source": "examples"}
    assert not any(name.startswith("membership interval") for name in report)
    apart = replace(gold, membership={"min_k": 1.0})  # as of a few texts of another kind
    assert math.isnan(found.against(apart).privacy_leakage) and found.against(apart).forget_quality is not None


def test_measurements_are_kept_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = decoder(), word_tokenizer()
    options = {"utility": UTILITY, "output_dir": tmp_path, **QUIET}
    first = evaluate_language(model, tokenizer, FORGET, metrics=["probability", "rouge"], **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["forget_answers.json", "forget_rouge.json"]
    calls = []
    monkeypatch.setattr(type(model), "forward", counted(type(model).forward, calls))
    again = evaluate_language(model, tokenizer, FORGET, metrics=["probability", "rouge"], **options)
    assert again == first and not calls
    every = evaluate_language(model, tokenizer, FORGET, **options)  # goes on with what is missing
    assert calls and every.probability == first.probability and every.model_utility is not None
    evaluate_language(model, tokenizer, FORGET, batch_size=1, **options)
    calls.clear()
    evaluate_language(model, tokenizer, FORGET, **options)
    assert not calls


def counted(forward, calls: list):
    def run(self, *args, **kwargs):
        calls.append(self)
        return forward(self, *args, **kwargs)

    return run


def test_other_data_are_measured_anew_and_another_model_is_refused(tmp_path: Path) -> None:
    tokenizer, options = word_tokenizer(), {"metrics": ["probability"], "output_dir": tmp_path, **QUIET}
    every = evaluate_language(decoder(), tokenizer, FORGET, **options)
    fewer = evaluate_language(decoder(), tokenizer, FORGET[:1], **options)
    assert fewer.probability != every.probability
    assert evaluate_language(decoder(), tokenizer, FORGET, template="{question} {answer}", **options) != every
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }} {% endfor %}"
    assert evaluate_language(decoder(), tokenizer, FORGET, **options) != every
    with pytest.raises(ValueError, match="`output_dir` must be a folder of this model alone"):
        evaluate_language(decoder(seed=1), tokenizer, FORGET, **options)
    saved = json.loads((tmp_path / "forget_answers.json").read_text())
    assert saved["format"] == "semu_peft.measurement" and len(saved["value"]["nll"]) == 3


def test_an_offloaded_model_is_told_by_the_weights_that_are_elsewhere(tmp_path: Path) -> None:
    options = {"metrics": ["probability"], "output_dir": tmp_path, **QUIET}
    whole = evaluate_language(decoder(), word_tokenizer(), FORGET, **options)
    assert evaluate_language(cpu_offload(decoder(), torch.device("cpu")), word_tokenizer(), FORGET, **options) == whole
    with pytest.raises(ValueError, match="`output_dir` must be a folder of this model alone"):
        evaluate_language(cpu_offload(decoder(seed=1), torch.device("cpu")), word_tokenizer(), FORGET, **options)


def test_another_model_is_refused_by_sets_named_as_on_the_hub_too(tmp_path: Path) -> None:
    options = {"utility": {"org/kept": FORGET}, "metrics": ["model_utility"], "max_new_tokens": 2, **QUIET}
    evaluate_language(decoder(), word_tokenizer(), FORGET, output_dir=tmp_path, **options)
    with pytest.raises(ValueError, match="`output_dir` must be a folder of this model alone"):
        evaluate_language(decoder(seed=1), word_tokenizer(), FORGET, output_dir=tmp_path, **options)


def test_the_kl_to_another_reference_is_measured_anew(tmp_path: Path) -> None:
    options = {"metrics": ["neutral_kl"], "neutral": NEUTRAL, "output_dir": tmp_path, **QUIET}
    found = [
        evaluate_language(decoder(), word_tokenizer(), FORGET, reference=decoder(seed=seed), **options).neutral_kl
        for seed in (1, 2, 0)
    ]
    assert len({*found}) == 3 and found[2] == pytest.approx(0, abs=1e-6)


def test_a_damaged_file_is_measured_again(tmp_path: Path) -> None:
    options = {"metrics": ["probability"], "output_dir": tmp_path, **QUIET}
    first = evaluate_language(decoder(), word_tokenizer(), FORGET, **options)
    (tmp_path / "forget_answers.json").write_text('{"format": "semu')
    assert evaluate_language(decoder(), word_tokenizer(), FORGET, **options) == first


def test_switching_an_adapter_off_makes_another_model(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(decoder(), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    options = {"metrics": ["probability"], "output_dir": tmp_path, **QUIET}
    evaluate_language(model, word_tokenizer(), FORGET, **options)
    with model.disable_adapter(), pytest.raises(ValueError, match="`output_dir`"):
        evaluate_language(model, word_tokenizer(), FORGET, **options)


@pytest.mark.parametrize("kind", ["semu", "lora"])
def test_another_scale_makes_another_model(tmp_path: Path, kind: str) -> None:
    """Which is in no state dict; of an adapter that is not active it is of no account."""
    from peft import LoraConfig, get_peft_model

    chosen = {"target_modules": ["q_proj"], "r": 2}
    config = SemuConfig(**chosen) if kind == "semu" else LoraConfig(**chosen, init_lora_weights=False)
    model = get_peft_model(decoder(), config)
    model.add_adapter("other", config)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    first = model_digest(model)
    for layer in layers:
        layer.set_scale("other", 0.5)
    assert model_digest(model) == first
    options = {"metrics": ["probability"], "output_dir": tmp_path, **QUIET}
    evaluate_language(model, word_tokenizer(), FORGET, **options)
    for layer in layers:
        layer.set_scale("default", 0.0)
    with pytest.raises(ValueError, match="other adapters, scales or gates"):
        evaluate_language(model, word_tokenizer(), FORGET, **options)
    model.merge_adapter(["default"])
    assert model_digest(model) != first


def test_another_gate_makes_another_model() -> None:
    """At the same weights: by its settings, what it has learnt, and its class."""
    from semu_peft.gates import Classifier, ForbiddenAnswers, Intervention, LinearScorer

    torch.manual_seed(0)
    scorers = LinearScorer(4), LinearScorer(4)
    with torch.no_grad():
        scorers[1].bias.add_(1)
    model = decoder()
    gates = [Classifier(scorers[0]), Classifier(scorers[0], threshold=0.9), Classifier(scorers[1])]
    made = [model_digest(Intervention(model, gate)) for gate in gates]
    assert len({*made}) == 3 and made[0] == model_digest(Intervention(decoder(), Classifier(scorers[0])).train())
    silenced = [model_digest(ForbiddenAnswers(model, gates[0], answer)) for answer in ([[5]], [[6]])]
    assert len({*made, *silenced}) == 5


def test_diverged_models_have_numbers_that_say_so() -> None:
    model = decoder()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    found = evaluate_language(model, word_tokenizer(), FORGET, metrics=["probability"], **QUIET)
    assert math.isnan(found.probability)


def test_a_diverged_model_is_told_whole() -> None:
    """Everything that can be measured, with NaN for what cannot, in text and in JSON too; also beside gold."""
    options = {"utility": UTILITY, "neutral": NEUTRAL, "reference": decoder(), "holdout": FACTS, **QUIET}
    gold = evaluate_language(decoder(seed=1), word_tokenizer(), FORGET, **options)
    model = decoder()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    found = evaluate_language(model, word_tokenizer(), FORGET, gold=gold, **options)
    names = ("probability", "truth_ratio", "forget_quality", "model_utility", "neutral_kl", "privacy_leakage", "rouge",
             "fluency", "exact_memorisation", "extraction_strength", "paraphrased_probability")  # fmt: skip
    for name in names:
        assert math.isnan(getattr(found, name)), name
    assert len(found.utility) == 6 and all(map(math.isnan, found.utility.values()))
    assert found.rouge_interval is None and found.exact_memorisation_interval is None
    assert all(map(math.isnan, found.membership.values())) and {*found.membership} == {*gold.membership}
    assert found.membership_interval == {} and math.isnan(gold.against(found).forget_quality)
    assert found.row()["model utility"] == found.row()["forget quality"] == "nan"
    json.dumps(plain(found), allow_nan=False)
    shown = read_metrics({"unlearned": found})["rows"][0]["values"]
    assert shown["rouge"]["value"] == plain(found.rouge) == "nan"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metrics": ["bleu"]}, "`metrics` must be among"),
        ({"metrics": ["model_utility"]}, "`metrics` has 'model_utility', which needs `utility`"),
        ({"metrics": ["neutral_kl"]}, "needs `neutral`"),
        ({"metrics": ["membership"]}, "needs `holdout`"),
        ({"metrics": ["privacy_leakage"]}, "'privacy_leakage', which needs `holdout`"),
        (
            {"metrics": ["privacy_leakage"], "holdout": FACTS},
            "'privacy_leakage', which needs `gold` with its membership",
        ),
        ({"metrics": ["forget_quality"]}, "'forget_quality', which needs `gold` with its truth ratio"),
        ({"metrics": ["forget_quality"], "gold": LanguageMetrics(0.1)}, "needs `gold` with its truth ratio"),
        ({"utility": {"forget": FACTS}}, "`utility` must name its sets otherwise .* got a set named 'forget'"),
        ({"neutral": [("who", "Ada")]}, "`neutral` must hold at least one text, and plain texts alone"),
        ({"forget": [("who", "Ada")], "metrics": ["truth_ratio"]}, "needs `perturbed_answer`"),
        ({"forget": FACTS, "metrics": ["paraphrased_probability"]}, "needs `paraphrased_answer` and"),
        ({"forget": []}, "`forget` must hold at least one question"),
        ({"holdout": ["a text"]}, "`holdout` must be what `forget` is, answers to questions, got plain texts"),
        ({"forget": ["a text"], "holdout": FACTS}, "`holdout` must be what `forget` is, plain texts, got answers to"),
        ({"holdout": ["a text"], "metrics": ["membership"]}, "`holdout` must be what `forget` is"),
    ],
)
def test_mistakes_of_the_call(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        evaluate_language(decoder(), word_tokenizer(), **{"forget": FORGET, **QUIET, **options})


def test_mistakes_of_the_call_are_said_before_anything_is_measured(tmp_path: Path) -> None:
    options = {"output_dir": tmp_path / "measured", **QUIET}
    with pytest.raises(TypeError, match=r"`gold` must be the `LanguageMetrics` .* `gold=evaluate_language\(gold_model"):
        evaluate_language(decoder(), word_tokenizer(), FORGET, gold=decoder(seed=1), **options)
    with pytest.raises(TypeError, match=r"`utility` must be a mapping of sets by name, got .* `{\"retain\": rows}`"):
        evaluate_language(decoder(), word_tokenizer(), FORGET, utility=[FORGET], **options)
    gold = LanguageMetrics(truth_ratios=(0.5,))
    with pytest.raises(ValueError, match=r"`gold` must .* the same forget rows, .* got 1 truth ratios and 3 here"):
        evaluate_language(decoder(), word_tokenizer(), FORGET, gold=gold, **options)
    assert not options["output_dir"].exists()


def test_membership_of_plain_texts_is_that_of_what_is_read() -> None:
    """Every token of a text counts, by the same attacks as of answers; where it is not asked for nothing is refused."""
    model, tokenizer = decoder(), word_tokenizer()
    texts, others = ["Ada lives in Rome", "the Paris of Eve"], ["Eve lives in Paris", "Rome of Ada"]
    found = evaluate_language(model, tokenizer, texts, holdout=others, **QUIET)
    losses = [score_texts(model, tokenizer, part, progress=False).nll for part in (texts, others)]
    assert found.membership["loss"] == separation(*losses).auc
    assert list(found.membership) == ["loss", "zlib", "min_k", "min_k_plus_plus"]
    alone = evaluate_language(model, tokenizer, texts, holdout=FACTS, metrics=["probability"], **QUIET)
    assert alone.probability == found.probability
    with pytest.raises(ValueError, match="`holdout` must have a question to each answer"):
        text_membership(model, tokenizer, FORGET, others, progress=False)


def test_pairs_are_enough_for_what_needs_no_wrong_answers() -> None:
    pairs = [(row["question"], row["answer"]) for row in FORGET]
    found = evaluate_language(decoder(), word_tokenizer(), pairs, **QUIET)
    assert found.probability is not None and found.truth_ratio is None
    assert truth_ratio([0.0], [[0.0]]).item() == 1.0


def test_a_paraphrase_is_of_all_rows_or_of_none() -> None:
    """Of none, the truth ratio is that of the plain answers; one that is missing is named."""
    plain = [{name: value for name, value in row.items() if name != "paraphrased_answer"} for row in FORGET]
    found = evaluate_language(decoder(), word_tokenizer(), plain, **QUIET)
    assert found.paraphrased_probability is None and found.truth_ratio is not None
    same = [{**row, "paraphrased_answer": row["answer"]} for row in FORGET]
    expected = evaluate_language(decoder(), word_tokenizer(), same, **QUIET)
    assert found.truth_ratios == pytest.approx(expected.truth_ratios)
    assert expected.paraphrased_probability == pytest.approx(found.probability)
    some = [FORGET[0], plain[1], FORGET[2]]
    words = r"`{}\[1\]` must have `paraphrased_answer`, as 2 of the 3 rows of `{}` do, got none"
    for metrics in (None, ["forget_quality"], ["paraphrased_probability"]):
        with pytest.raises(ValueError, match=words.format("forget", "forget")):
            evaluate_language(decoder(), word_tokenizer(), some, metrics=metrics, **QUIET)
    with pytest.raises(ValueError, match=words.format("retain", "retain")):
        evaluate_language(
            decoder(), word_tokenizer(), FORGET, utility={"retain": some}, metrics="model_utility", **QUIET
        )
    probability = evaluate_language(decoder(), word_tokenizer(), some, metrics=["probability"], **QUIET).probability
    assert probability == pytest.approx(found.probability)  # which asks for none


def test_what_is_kept_may_come_without_wrong_answers() -> None:
    plain = [{"question": row["question"], "answer": row["answer"]} for row in FORGET[:2]]
    found = evaluate_language(decoder(), word_tokenizer(), FORGET, utility={**UTILITY, "plain": plain}, **QUIET)
    assert found.utility["plain probability"] == pytest.approx(found.utility["retain probability"])
    assert "plain truth_ratio" not in found.utility and len(found.utility) == 8
    assert found.model_utility is None and "plain rouge 0." in repr(found)
    with pytest.raises(ValueError, match="needs `perturbed_answer` in the rows of `plain`"):
        evaluate_language(
            decoder(), word_tokenizer(), FORGET, utility={"plain": plain}, metrics="model_utility", **QUIET
        )


def test_plain_texts_are_read_where_no_question_can_be_asked() -> None:
    model, tokenizer, texts = decoder(), word_tokenizer(), ["Ada lives in Rome", "the Paris of Eve"]
    found = evaluate_language(model, tokenizer, texts, utility={"kept": texts[:1]}, **QUIET)
    scores = score_texts(model, tokenizer, texts, progress=False)
    assert found.probability == pytest.approx(scores.probability.mean().item())
    assert found.exact_memorisation is not None and found.rouge is None and found.fluency is None
    assert found.membership == {} and list(found.utility) == ["kept probability"]
    with pytest.raises(ValueError, match="`metrics` has 'rouge', which needs questions in `forget`"):
        evaluate_language(model, tokenizer, texts, metrics=["rouge"], **QUIET)
    with pytest.raises(ValueError, match="`forget` must have a question to each answer"):
        evaluate_language(model, tokenizer, [*texts, FORGET[0]], **QUIET)
