"""The report: what it holds, what it says is missing, and that it shows no data and believes no name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import Mlp, vector_batches
from peft import get_peft_model

from semu_peft import SemuConfig, UnlearnResult, initialize_semu_weights, unlearn
from semu_peft.evaluation import (
    AttackReport,
    ErasureMetrics,
    ForgettingComparison,
    ForgettingMetrics,
    LanguageMetrics,
    MembershipInference,
    Predictions,
    PromptAttacks,
    TextRelearning,
    attack,
)
from semu_peft.objectives import Attacker, UniformDistribution
from semu_peft.report import Audit, audit, plot_attack, plot_losses, plot_tradeoff
from semu_peft.report.fingerprints import data_fingerprint, model_fingerprint
from semu_peft.report.measured import read_attacks, read_metrics, read_task, untested
from semu_peft.tuner.adapted import semu_layers

METRICS = ForgettingMetrics(99.0, 98.0, 97.0, 96.0, 20, 1000, membership_interval=(90.0, 100.0))
GOLD = ForgettingMetrics(100.0, 99.0, 98.0, 100.0, 1000, 1000)


@dataclasses.dataclass(frozen=True)
class Relearning:
    """As the attacks of classifiers give it."""

    attacker: str
    steps: tuple[int, ...]
    forget: tuple[float, ...]
    reference: Relearning | None = None

    @property
    def row(self) -> tuple[str, str, str]:
        return f"relearning: {self.attacker}", "0.0 → 90.0", "0.0 → 40.0" if self.reference else ""


@dataclasses.dataclass(frozen=True)
class Reported:
    results: tuple[Any, ...]
    not_run: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class NotRun:
    attack: str
    reason: str


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """A small model that has unlearned, with all that came of it."""
    torch.manual_seed(0)
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1", "fc2"], r=2))
    forget = vector_batches()
    profile = initialize_semu_weights(model, forget, UniformDistribution(), progress=False)
    result = unlearn(model, forget, UniformDistribution(), max_steps=3, progress=False)
    return {"model": model, "profile": profile, "training": result, "data": {"forget": forget}}


def test_an_empty_report_says_what_is_missing(tmp_path: Path) -> None:
    report = audit()
    page = report.to_markdown()
    for missing in (
        "The request was not given in words", "No data were given", "No metrics were given", "No attacks were given",
        "No model with a SEMU adapter was given", "No samples were given", "Neither a model nor data were given",
    ):  # fmt: skip
        assert missing in page
    assert len(report.contents["not_tested"]) == 13 and not report.pictures
    assert "can be switched off is not removal" in page and "relearning from a few examples" in page
    assert [path.name for path in report.write_all(tmp_path)] == ["report.json", "report.md", "report.html"]


def test_layers_norms_and_the_trained_share_are_those_of_the_model(trained: dict[str, Any]) -> None:
    report = audit("Forget them.", **trained)
    contents, model = report.contents, trained["model"]
    layers = semu_layers(model)
    assert [row["layer"] for row in contents["model"]["layers"]] == list(layers)
    for row in contents["model"]["layers"]:
        layer = layers[row["layer"]]
        dense = layer.get_delta_weight("default").detach()
        assert row["norm"] == pytest.approx(float(dense.norm()), rel=1e-5) and row["norm"] > 0
        relative = float(dense.norm() / layer.get_base_layer().weight.norm())
        assert row["relative_norm"] == pytest.approx(relative, rel=1e-5)
        assert row["rank"] == contents["spectra"][row["layer"]]["rank"] == trained["profile"].ranks[row["layer"]]
    cores = sum(layer.semu_core["default"].numel() for layer in layers.values())
    total = sum(parameter.numel() for parameter in Mlp().parameters())
    assert contents["share"] == {"trained": cores, "total": total, "percent": 100 * cores / total}
    assert contents["training"][0]["stop_reason"] == trained["training"].stop_reason
    sections = {picture.section for picture in report.pictures}
    assert sections == {"tradeoff", "layers"} and all(picture.text for picture in report.pictures)
    spectra, ranks = (picture.text for picture in report.pictures if picture.section == "layers")
    assert spectra.startswith("Spectra of the forget gradients of ") and ranks.startswith("Ranks of ")


def test_the_json_is_versioned_whole_and_comes_back(trained: dict[str, Any], tmp_path: Path) -> None:
    report = audit("Forget them.", metrics=METRICS, **trained)
    path = report.write(tmp_path / "new" / "report.json")
    read = json.loads(path.read_text())
    assert read["format"] == "semu_peft.Audit" and read["schema_version"] == 1
    assert read == report.contents
    loaded = Audit.load(path)
    assert loaded.contents == report.contents and loaded.to_html().count("<h2") == 11
    assert repr(loaded).startswith("Audit('What was forgotten': 1 measured, 0 attacks,")
    for wrong in ({**read, "schema_version": 2}, {"format": "semu_peft.Audit"}, [], {**read, "attacks": 3}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="`path` must be the JSON of a report of version 1"):
            Audit.load(path)


def test_data_are_digested_in_any_order_and_never_shown() -> None:
    images, labels = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    whole = data_fingerprint([(images, labels)])
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    assert whole == data_fingerprint([(images[order][:4], labels[order][:4]), (images[order][4:], labels[order][4:])])
    changed = images.clone()
    changed[3, 1] += 1e-6
    assert data_fingerprint([(changed, labels)]) != whole != data_fingerprint([(images[:5], labels[:5])])
    assert data_fingerprint([(images, labels.flip(0))]) != whole, "labels belong to their images"
    rows = [{"question": "Where does Jane Doe live?", "answer": "7 Elm Street"}, {"question": "a", "answer": "b"}]
    assert data_fingerprint(rows) == data_fingerprint(rows[::-1]) != data_fingerprint(rows[:1])
    report = audit(data={"forget": rows})
    assert report.contents["request"]["data"]["forget"]["examples"] == 2
    for single in ([(images, 3), (images, 4)], [{"image": images, "label": torch.tensor(3)}] * 2):
        assert data_fingerprint(single)["examples"] == 2, "rows of a data set, whose first dimension is of colours"
    for text in (report.to_json(), report.to_markdown(), report.to_html()):
        assert "Jane" not in text and "Elm" not in text


def test_paths_are_digested_as_sha256sum_does(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc")
    known = hashlib.sha256(b"abc").hexdigest()
    assert data_fingerprint(tmp_path / "a.txt") == {"files": 1, "sha256": known}
    assert data_fingerprint(tmp_path) != data_fingerprint(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match=r"`data\['forget'\]`: there is no file or folder"):
        audit(data={"forget": tmp_path / "none"})


def test_fingerprints_of_the_model_are_of_its_own_weights(trained: dict[str, Any], tmp_path: Path) -> None:
    model = trained["model"]
    torch.manual_seed(0)
    assert model_fingerprint(model) == model_fingerprint(Mlp()), "the adapter does not touch the weights"
    model.save_pretrained(tmp_path)
    settings = {"model": str(tmp_path), "further": {"files": [f"{tmp_path}/rows.jsonl"], "prompt": "a and/or b"}}
    report = audit(model=model, adapter_file=tmp_path, settings=settings)
    assert report.contents["settings"]["further"] == {"files": ["rows.jsonl"], "prompt": "a and/or b"}
    file = tmp_path / "adapter_model.safetensors"
    assert report.contents["adapter_file"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert audit(model=model, digest_weights=False).contents["model"]["sha256"] is None
    assert str(tmp_path) not in report.to_json()
    plain = audit(model=Mlp())
    assert plain.contents["model"]["layers"] == [] and plain.contents["model"]["adapter"] is None


def test_intervals_over_seeds_are_students() -> None:
    """Of 1, 2, 3 the mean is 2, the deviation 1, and t = 4.303: 2 ± 4.303 / √3."""
    runs = [ErasureMetrics(float(number), 90.0) for number in (1, 2, 3)]
    row = read_metrics({"SEMU": runs})["rows"][0]
    assert row["runs"] == 3
    value = row["values"]["forget accuracy"]
    assert value["value"] == 2 and value["source"] == "3 seeds"
    assert value["interval"] == pytest.approx([2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5])
    assert row["values"]["retain accuracy"]["interval"] == [90, 90]
    partly = read_metrics([{"a": 1.0}, {"a": 3.0, "b": 5.0}])["rows"][0]["values"]
    assert partly["b"] == {"value": 5.0, "interval": None, "source": None}, "also what the first seed does not know"


def test_intervals_that_a_result_has_stand_by_their_metric() -> None:
    values = read_metrics(METRICS)["rows"][0]["values"]
    assert values["membership inference"]["interval"] == [90, 100]
    assert values["unlearning accuracy"]["interval"] is None
    attack = read_metrics(MembershipInference(97.0, (2.0, 100.0), 98.0))["rows"][0]["values"]
    assert attack["share"]["interval"] == [2, 100] and attack["threshold share"]["interval"] is None


@pytest.mark.parametrize("number", [np.float32(1.5), np.float64(1.5), torch.tensor(1.5)])
def test_numbers_of_numpy_and_torch_are_numbers(number: Any) -> None:
    for metrics in (
        {"forget accuracy": number},
        {"SEMU": [{"forget accuracy": number}] * 2},
        ErasureMetrics(number, 9.0),
    ):
        value = next(iter(audit(metrics=metrics).contents["metrics"]["rows"][0]["values"].values()))["value"]
        assert value == 1.5 and type(value) is float


def test_numbers_of_a_diverged_model_are_written(tmp_path: Path) -> None:
    model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1", "fc2"], r=2, init_weights=False))
    list(semu_layers(model).values())[1].get_core("default").data.fill_(math.nan)
    interval = {"forget accuracy": math.nan, "forget_accuracy_interval": (math.nan, math.nan)}
    gone = TextRelearning("Adam", (0, 1), (math.nan, math.nan))
    for path in audit(model=model, metrics=interval, attacks=gone).write_all(tmp_path):
        assert path.read_text().count("nan") >= 3
    assert Audit.load(tmp_path / "report.json").contents["model"]["layers"][1]["norm"] == "nan"


def test_intervals_that_are_given_are_in_all_three_forms() -> None:
    """As `(value, low, high)`, in a field beside the value, or over seeds; of further sets of a utility too."""

    @dataclasses.dataclass(frozen=True)
    class Found:
        forget_accuracy: float
        forget_accuracy_test: float
        forget_accuracy_test_interval: tuple[float, float] | None
        utility: dict[str, tuple[float, float, float]]

    rows = {
        "original": {"forget accuracy": (99.5, 98.25, 100.0), "retain accuracy": 97.0},
        "SEMU": {"forget_accuracy": 1.5, "forget_accuracy_interval": [0.25, 2.75], "retain_accuracy": None},
        "class": Found(2.0, 4.0, (3.5, 4.5), {"facts": (0.5, 0.375, 0.625)}),
        "seeds": [{"forget accuracy": (1.0, 0.0, 9.0)}, {"forget accuracy": 1.0}],
    }
    report = audit(metrics=rows)
    values = [row["values"] for row in report.contents["metrics"]["rows"]]
    assert values[0]["forget accuracy"] == {"value": 99.5, "interval": [98.25, 100.0], "source": "given"}
    assert values[1] == {"forget accuracy": {"value": 1.5, "interval": [0.25, 2.75], "source": "examples"}}
    assert values[2]["forget accuracy"]["interval"] is None
    assert values[3]["forget accuracy"] == {"value": 1.0, "interval": [1.0, 1.0], "source": "2 seeds"}
    for text in (report.to_markdown(), report.to_html()):
        for shown in (
            "99.5 (98.25 to 100)",
            "1.5 (0.25 to 2.75)",
            "4 (3.5 to 4.5)",
            "0.5 (0.375 to 0.625)",
            "1 (1 to 1)",
        ):
            assert shown in text
        assert "In brackets, 95% intervals: over 2 seeds, over examples, as they were given." in text
        assert "There are no intervals" not in text
    curve = read_metrics(TextRelearning("Adam", (0, 1, 2), (0.5, 0.75, 0.25)))["rows"][0]["values"]
    assert not curve, "three points of a curve are no interval"
    alone = audit(metrics={"forget accuracy": (99.5, 98.25, 100.0), "retain accuracy": 97.0})
    assert alone.contents["metrics"]["rows"][0]["values"] == values[0], "one model's numbers, not models by name"
    assert "There are no intervals: one run each" in audit(metrics={"forget accuracy": 99.5}).to_markdown()
    diverged = audit(metrics=[{"loss": float("inf")}, {"loss": 1.0}]).to_markdown()
    assert "There are no intervals." in diverged and "one run each" not in diverged


def test_a_comparison_has_its_reference_and_gaps() -> None:
    page = audit(metrics=ForgettingComparison({"SEMU": METRICS, "gold": GOLD}, "gold")).to_markdown()
    assert "gold (reference)" in page and "average gap to the reference | 1.75 | 0" in page
    assert "No retrained model stands beside" not in page
    assert "96 (90 to 100)" in page and "95% intervals: over examples." in page


def test_attacks_of_any_class_are_rows_and_curves_are_drawn() -> None:
    gold = Relearning("SGD", (0, 5, 10), (0.0, 1.0, 40.0))
    given = Reported(
        (Relearning("SGD", (0, 5, 10), (0.0, 80.0, 90.0), gold), PromptAttacks({"plain": 0.3}, {"plain": 0.2})),
        (NotRun("membership: LiRA", "no shadow models were given"),),
    )
    report = audit(attacks=[given, TextRelearning("Adam", (0, 10), (0.01, 0.06), (0.01, 0.05)), METRICS])
    found = report.contents["attacks"]
    assert [each["attack"] for each in found] == [
        "relearning: SGD", "prompts (ROUGE-L recall)", "relearning: Adam", "ForgettingMetrics"
    ]  # fmt: skip
    assert found[0]["reference"] == "0.0 → 40.0" and found[0]["result"]["reference"]["forget"] == [0.0, 1.0, 40.0]
    assert {"test": "membership: LiRA", "reason": "no shadow models were given"} in report.contents["not_tested"]
    assert [picture.section for picture in report.pictures] == ["attacks", "attacks"], "percent and probability apart"
    assert "SGD: 0 to 90, reference 0 to 40" in report.pictures[0].text
    assert len(plot_attack(given.results[0]).axes[0].lines) == 2
    with pytest.raises(ValueError, match="`results` must be curves of one kind, got none"):
        plot_attack(given.results[1])


def test_two_pictures_side_by_side_have_a_text_each() -> None:
    right = torch.tensor([0, 0, 1, 1])
    before = Predictions(right, right, torch.ones(4), 2)
    after = Predictions(right, torch.ones_like(right), torch.ones(4), 2)
    assert [picture.text for picture in audit(predictions=(before, after), forgotten=0).pictures] == [
        "Confusion before unlearning: accuracy on class 0: 100.0%, on the others: 100.0%.",
        "Confusion after unlearning: accuracy on class 0: 0.0%, on the others: 100.0%.",
    ]


def test_percent_is_said_where_an_attack_is_in_percent() -> None:
    texts = [PromptAttacks({"plain": 0.3}), TextRelearning("Adam", (0, 10), (0.01, 0.06))]
    assert "What is known is in percent" not in audit(attacks=texts).to_markdown()
    page = audit(attacks=[*texts, Relearning("SGD", (0, 5), (0.0, 80.0))], samples=({"a": "b"}, {"a": "c"})).to_html()
    assert "What is known is in percent" in page and "3 attacks tried" in page
    assert "mean token probability" in page and "geometric mean" in page, "the metric of that name is another number"
    images = audit(metrics=METRICS, attacks=Relearning("SGD", (0, 5), (0.0, 80.0)))
    assert "What is known is in percent" in images.to_markdown() and "geometric" not in images.to_markdown()
    assert "1 model was measured and 1 attack tried." in audit(metrics=METRICS, attacks=texts[0]).to_markdown()


def test_the_report_of_all_attacks_is_taken_as_it_is() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    forget, retain = ([(torch.randn(30, 2) + at, torch.full((30,), at // 4))] for at in (0, 4))
    tried = attack(model, forget, retain, attackers=[Attacker(steps=5)], reference=model, progress=False)
    report = audit(attacks=tried)
    assert [each["attack"] for each in report.contents["attacks"]] == [name for name, _, _ in tried.rows]
    assert [picture.caption for picture in report.pictures] == ["Relearning", "Probes of inner layers"]
    missing = {each["test"]: each["reason"] for each in report.contents["not_tested"]}
    apart = {each["test"]: each["reason"] for each in report.contents["does_not_apply"]}
    assert {each.attack: each.reason for each in tried.not_run}.items() <= (missing | apart).items()
    assert list(apart) == ["logit lens", "lens: a few tokens of each layer", "adversarial prompts"]
    told = (
        "Made for others than a classifier, and not missing: logit lens, lens: a few tokens of each layer, adversarial "
        "prompts."
    )
    assert told in report.to_markdown()
    assert missing["several seeds"] == "no result was given"
    for there in (
        "retrained",
        "rounding",
        "relearning from a few",
        "probes",
        "stripping",
        "noise, flips",
        "paraphrases",
    ):
        assert not any(there in name for name, reason in missing.items() if reason == "no result was given"), there


def test_reports_of_several_models_are_rows_by_their_names() -> None:
    reports = {
        name: AttackReport(
            "language", (Relearning("SGD", (0, 5), (0.0, 80.0)),), (NotRun("prompts", "why"),), 1.0, True
        )
        for name in ("SEMU", "LoRA")
    }
    report = audit(attacks={**reports, "mine": METRICS})
    assert [each["attack"] for each in report.contents["attacks"]] == [
        "SEMU: relearning: SGD",
        "LoRA: relearning: SGD",
        "mine",
    ]
    assert report.contents["task"] == "language" and len(report.pictures) == 1
    assert [each["test"] for each in report.contents["not_tested"]].count("prompts") == 1


def test_what_was_not_tested_follows_from_what_was_given() -> None:
    def missing(metrics: Any = None, attacks: Any = None) -> list[str]:
        read, (tried, _) = read_metrics(metrics), read_attacks(attacks)
        return untested(read, tried, read_task(read, tried))

    everything = missing()
    assert len(everything) == 13
    classifier = missing(METRICS)
    assert "membership inference" not in classifier and "what the model keeps" not in classifier
    assert "changed inputs: noise, flips" in classifier
    assert not any("prompts" in each for each in classifier), "a classifier has none"
    language = missing(LanguageMetrics(probability=0.1), TextRelearning("Adam", (0, 1), (0.1, 0.2)))
    assert "relearning from a few examples" not in language and "changed inputs: noise, flips" not in language
    assert "other prompts: paraphrases, prefixes, many samples" in language
    assert any("retrained" in each for each in language)
    assert not any("retrained" in each for each in missing(ForgettingComparison({"gold": GOLD}, "gold")))
    assert "several seeds" not in missing([METRICS, METRICS])
    named = missing({"no retain data, made against relearning": {"forget accuracy": 1.0}, "gold, seed 1": {}})
    assert {"what the model keeps", "relearning from a few examples"} <= {*named}, "a model's name is no evidence"
    assert not any("retrained" in each for each in named)


def test_what_an_attack_names_as_not_run_is_missing_once_and_with_its_reason() -> None:
    def missing(task: str, *not_run: tuple[str, str]) -> dict[str, str]:
        tried = AttackReport(task, (), tuple(NotRun(*each) for each in not_run), 1.0, False)  # type: ignore[arg-type]
        contents = audit(attacks=tried).contents
        found = {each["test"]: each["reason"] for each in contents["not_tested"]}
        assert len(found) == len(contents["not_tested"])
        return found

    drawn = missing("diffusion")
    seeds = ("other seeds", "`--classifier` was not given")
    lens = ("logit lens", "it reads language models")
    few = ("lens: a few tokens of each layer", "it reads language models")
    weights = ("stripping, quantisation, relearning", "give `learn`")
    assert missing("diffusion", seeds, lens, few) == {
        name: reason for name, reason in drawn.items() if not name.startswith("other seeds")
    } | dict([seeds])
    assert len(missing("diffusion", weights)) == len(drawn) - 2, "three kinds of evidence, and one reason"
    written = missing("language", ("membership: confidence and threshold", "this is a language model"))
    assert written == missing("language"), "what was not run is for classifiers: membership of texts is still missing"
    assert dict([lens, few]).items() <= missing("language", lens, few).items()


def test_a_retrained_models_row_is_told_by_its_name() -> None:
    rows = {"original": {"rouge": 1.0}, "unlearned": {"rouge": 0.3}, "reference": {"rouge": 0.4}}
    report = audit("Forget it.", metrics=rows, data={"forget": __file__})
    page = report.to_markdown()
    assert "No retrained model" not in page and "| original | unlearned | reference |" in page and "| 1 file |" in page
    assert not any("retrained" in each["test"] for each in report.contents["not_tested"])
    del rows["reference"]
    assert "No retrained model" in audit("Forget it.", metrics=rows).to_markdown()


def test_points_that_are_nearly_alike_are_whole_under_the_top_of_their_curve() -> None:
    high = plot_attack(TextRelearning("Adam", (0, 9), (0.97, 0.98), (0.94, 0.93))).axes[0]
    assert high.get_ylim() == pytest.approx((0, 1.05 * 0.98))
    assert plot_attack(TextRelearning("Adam", (0, 9), (0.0, 0.0))).axes[0].get_ylim() == (0, 1)


def test_losses_are_drawn_where_no_damage_was_recorded(trained: dict[str, Any]) -> None:
    assert "Losses over the steps" in plot_losses(trained["training"]).get_label()
    alone = [{"loss": 3.0}, {"loss": 2.0}, {"loss": 1.0, "forget_loss": 1.0, "retain_loss": 0.0}]
    figure = plot_losses(UnlearnResult(alone, 3, 8, 4, 0.1, True, "done"))
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[3, 2, 1]]
    damage = [
        {"damage": 0.0, "answer_probability": 0.9, "retain_loss": 1.0},
        {"damage": 0.1, "answer_probability": 0.1},
    ]
    kept = UnlearnResult(damage, 1, 8, 4, 0.1, True, "done")
    report = audit(training={"first": kept, "second": trained["training"]})
    assert [picture.caption for picture in report.pictures] == ["Forgetting against damage", "Losses"]
    assert report.pictures[0].text.startswith("Probability of what was forgotten against damage"), "no class answers"
    denoiser = [{"damage": 0.0, "loss": 1.0}, {"damage": 0.1, "loss": 0.5}, {"damage": 0.1}]
    (picture,) = audit(training=UnlearnResult(denoiser, 1, 8, 4, 0.1, True, "done")).pictures
    assert picture.text.startswith("Loss against damage: distance from the original on the other conditions"), "no nats"
    assert "Ends at 0.5, for 0.1" in picture.text
    other = UnlearnResult(denoiser, 1, 8, 4, 0.1, True, "done")
    figure = plot_tradeoff({"one": kept, "other": other}, forgetting="damage")
    assert max(map(len, figure.axes[0].get_xlabel().split("\n"))) <= 48, "it is cut off where it is longer"
    apart = [{"damage": 0.0}, {"forget_loss": 1.0, "loss": 2.0}, {"forget_loss": 0.5, "loss": 1.0}]
    assert [each.caption for each in audit(training=UnlearnResult(apart, 1, 8, 4, 0.1, True, "done")).pictures] == [
        "Losses"
    ]
    without_losses = UnlearnResult([{"step": 1.0, "damage": 0.1}], 1, 8, 4, 0.1, True, "done")
    assert not audit(training=without_losses).pictures
    assert "what the model keeps" not in [each["test"] for each in report.contents["not_tested"]]
    of_other_answers = audit(training=without_losses).contents["not_tested"]
    assert "what the model keeps" in [each["test"] for each in of_other_answers], "there were no retain data"


HOSTILE = '<img src=x onerror="alert(1)">$\\frac|`"\'&\n# heading'


def test_no_name_becomes_html_or_markdown() -> None:
    said = Predictions(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.ones(2), 2)
    samples = {HOSTILE: torch.rand(2, 1, 8, 8)}
    report = audit(
        HOSTILE, title=HOSTILE, data={HOSTILE: vector_batches()}, settings={HOSTILE: HOSTILE},
        metrics={HOSTILE: {HOSTILE: 1.0}}, attacks={HOSTILE: Relearning(HOSTILE, (0, 1), (0.0, 1.0))},
        predictions=(said, said), class_names=[HOSTILE, "</svg><script>"], forgotten=[0, HOSTILE],
        samples=(samples, samples),
    )  # fmt: skip
    page = report.to_html()
    assert "<img src=x" not in page and "<script" not in page
    assert not re.search(r"<[^>]*\sonerror", re.sub(r'"[^"]*"', '""', page)), "no attribute of its own"
    assert page.count("</svg>") == page.count("<svg") == 3
    markdown = report.to_markdown()
    assert "\n# heading" not in markdown and "<img" not in markdown.replace("\\<", "")
    assert json.loads(report.to_json())["title"] == HOSTILE


@pytest.mark.parametrize("prompt", [HOSTILE, "Where does she live?"])
def test_texts_before_and_after_are_shown_as_they_were_written(prompt: str, tmp_path: Path) -> None:
    """Escaped, side by side in the order given; what is not to be forgotten is not marked."""
    before = {prompt: ["7 Elm Street\nin Oslo", HOSTILE], "Who?": "Bob & <b>Eve</b>"}
    after = {prompt: ["", "</td></table>&lt;i&gt; ~~no~~"], "Who?": "Bob"}
    report = audit(samples=(before, after), forgotten=prompt)
    page = report.to_html()
    table = page[page.index("What the model wrote") :].partition("</table>")[0]
    assert re.findall(r">([^<]*)</t[hd]>", table) == [
        "prompt", "before", "after",
        escape(f"{prompt} (to be forgotten)"), "7 Elm Street\nin Oslo", "(nothing)",
        escape(f"{prompt} (to be forgotten)"), escape(HOSTILE), "&lt;/td&gt;&lt;/table&gt;&amp;lt;i&amp;gt; ~~no~~",
        "Who?", "Bob &amp; &lt;b&gt;Eve&lt;/b&gt;", "Bob",
    ]  # fmt: skip
    assert "whoever may not read what was forgotten" in page and page.count("<table") == page.count("</table>")
    markdown = report.to_markdown()
    assert (
        "| Who? | Bob \\& \\<b\\>Eve\\</b\\> | Bob |" in markdown and "7 Elm Street in Oslo | (nothing) |" in markdown
    )
    assert "\\~\\~no\\~\\~" in markdown and "\n# heading" not in markdown
    loaded = Audit.load(report.write(tmp_path / "report.json"))
    assert loaded.contents["texts"] == [
        {"prompt": prompt, "forgotten": True, "before": before[prompt], "after": after[prompt]},
        {"prompt": "Who?", "forgotten": False, "before": [before["Who?"]], "after": [after["Who?"]]},
    ]
    assert loaded.to_html() == page and not report.pictures


def test_a_long_text_is_cut_in_the_page_and_whole_in_the_json() -> None:
    report = audit(samples=({"Who?": "x" * 5000}, {"Who?": "y" * 1000}))
    assert f">{'x' * 1000} … (and 4,000 characters; the JSON file has them)<" in report.to_html()
    assert f">{'y' * 1000}<" in report.to_html() and "x" * 5000 in report.to_json()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"request": 3}, TypeError, "`request` must be a text or None, got int"),
        ({"model": "model"}, TypeError, "`model` must be a model"),
        ({"data": [1]}, TypeError, "`data` must be a mapping"),
        ({"profile": {}}, TypeError, "`profile` must be a `SubspaceProfile`"),
        ({"training": [3]}, TypeError, "`training` must be an `UnlearnResult`"),
        ({"metrics": 3.0}, TypeError, "`metrics` must be results of an evaluation"),
        ({"metrics": {"SEMU": []}}, ValueError, "`metrics` must hold at least one result"),
        (
            {"metrics": {"forget accuracy": (1.0, 3.0, 2.0)}},
            ValueError,
            "`metrics` must give a value with its interval as",
        ),
        ({"attacks": 3}, TypeError, "`attacks` must be results of attacks, got int. Give what `attack`"),
        ({"attacks": "relearning"}, TypeError, "`attacks` must be results of attacks, got 'relearning'"),
        (
            {"attacks": [METRICS, None, {"mine": {"found": 3.0}}]},
            TypeError,
            "`attacks` must be results of attacks, .* dict",
        ),
        ({"attacks": {"mine": LanguageMetrics}}, TypeError, "`attacks` must be results of attacks, got type"),
        ({"predictions": 3}, TypeError, "`predictions` must be two `Predictions`"),
        ({"samples": ({"a": torch.rand(1, 1, 4, 4)}, {})}, ValueError, "`samples` must have the same rows"),
        ({"samples": 3}, TypeError, "`samples` must be two mappings, before and after, of images or of texts"),
        ({"samples": ({"a": "b"}, 3)}, TypeError, "`samples` must be two mappings, .* got int"),
        ({"samples": ({"a": "b"},)}, ValueError, r"`samples` must be two mappings, .* got 1 with rows \[\['a'\]\]"),
        ({"samples": ({}, {})}, ValueError, "`samples` must be two mappings"),
        (
            {"samples": ({"a": ["b", "c"]}, {"a": "d"})},
            ValueError,
            "`samples` must have as many texts .* 2 and 1 of 'a'",
        ),
        ({"samples": ({"a": []}, {"a": []})}, ValueError, "`samples` must have as many texts"),
        (
            {"samples": ({"a": [3]}, {"a": ["d"]})},
            TypeError,
            "`samples` must be a text or several in the row 'a', got int",
        ),
        ({"samples": ({"a": "b"}, {"a": torch.rand(1, 1, 4, 4)})}, TypeError, "`samples` must be images of every row"),
        (
            {"samples": ({"a cat": "b"}, {"a cat": "c"}), "forgotten": "cat"},
            ValueError,
            "`forgotten` must name rows of",
        ),
        ({"forgotten": 2.5}, TypeError, "`forgotten` must be an index, a name, or several of these, got 2.5"),
        ({"forgotten": [None]}, TypeError, "`forgotten` must be an index, a name, or several of these"),
        ({"adapter_file": "nowhere"}, FileNotFoundError, "`adapter_file`: there is no nowhere"),
        ({"adapter_name": "a.b"}, ValueError, "`adapter_name` must be a name without dots"),
    ],
)
def test_mistakes_are_named(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        audit(**given)


def test_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = audit("First.")
    report.write_all(tmp_path)
    (tmp_path / "other.txt").write_text("kept")
    monkeypatch.setattr(Audit, "to_html", lambda self: 1 / 0)
    for write in (lambda: audit("Second.").write_all(tmp_path), lambda: audit().write(tmp_path / "report.html")):
        with pytest.raises(ZeroDivisionError):
            write()
    assert "First." in (tmp_path / "report.md").read_text() and "First." in (tmp_path / "report.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.txt", "report.html", "report.json", "report.md"]
    with pytest.raises(ValueError, match="`path` must end in '.html', '.md' or '.json', got '.pdf'"):
        report.write(tmp_path / "report.pdf")
