"""`semu evaluate` and `semu attack`: on which data, beside which models, and what is said before anything is loaded."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import cli_models
import pytest
import torch
from test_cli import semu
from typer.testing import CliRunner

from semu_cli import app, bases
from semu_peft import evaluation
from semu_peft.objectives.attackers import Attacker

UNSEEN = 3  # images of each class that no model was trained on


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("attack")
    data, adapter = cli_models.image_folder(folder / "data"), folder / "no-cats"
    model = cli_models.classifier(folder / "model", data)
    how = ("--model", model, "--forget", data, "--forget-class", "cat", "--no-progress")
    semu("unlearn", "images", *how, "--output-dir", adapter)
    return {
        "model": model, "data": data, "adapter": adapter,
        "test": cli_models.image_folder(folder / "test", UNSEEN, seed=1),
        "shadow": cli_models.classifier(folder / "shadow", data, seed=1),
    }  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("text")
    return {
        "model": cli_models.language_model(folder / "model"),
        "forget": cli_models.facts(folder / "forget.jsonl", cli_models.FACTS[:1]),
        "related": cli_models.facts(folder / "related.jsonl", cli_models.FACTS[1:]),
    }


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the library's `attack` was given; it runs nothing."""
    found: dict[str, Any] = {}
    run = evaluation.attack

    @functools.wraps(run)
    def spy(model: Any, forget: Any, *arguments: Any, **options: Any) -> Any:
        found.update(options, forget=forget)
        return run(model, forget, *arguments, **{**options, "time_limit": 0})

    monkeypatch.setattr("semu_peft.evaluation.attack", spy)
    return found


def how(place: dict[str, Path], *more: object) -> tuple[object, ...]:
    where = ("--model", place["model"], "--adapter", place["adapter"], "--forget", place["data"])
    return (*where, "--forget-class", "cat", "--no-progress", *more)


def labels(batches: Any) -> list[int]:
    return torch.cat([batch["labels"] for batch in batches]).tolist()


def test_test_accuracy_is_of_the_classes_that_were_kept(place: dict[str, Path]) -> None:
    rows = semu("evaluate", *how(place, "--test", place["test"]))["models"]
    assert rows["unlearned"]["test_accuracy"] == 100 and rows["unlearned"]["forgotten_test_accuracy"] == 0
    assert rows["original"]["forgotten_test_accuracy"] == 100


def test_accuracies_and_membership_have_intervals(place: dict[str, Path]) -> None:
    row = semu("evaluate", *how(place, "--test", place["test"]))["models"]["unlearned"]
    z = 1.96**2 / 6  # Wilson's of 0 of 6 images, in closed form: 0 to z / (1 + z)
    assert row["forget_accuracy_interval"] == pytest.approx([0, 100 * z / (1 + z)])
    low, high = row["membership_inference_interval"]
    assert low <= row["membership_inference"] <= high


def test_relearning_is_measured_on_images_that_the_attacker_has_not(
    place: dict[str, Path], given: dict[str, Any]
) -> None:
    semu("attack", *how(place, "--test", place["test"]))
    assert labels(given["forget_test"]) == [0] * UNSEEN and set(labels(given["test"])) == {1, 2, 3}


def test_related_data_shadow_models_and_the_attackers_examples_are_flags(
    place: dict[str, Path], given: dict[str, Any]
) -> None:
    shadows = ("--shadow", place["shadow"], "--shadow", place["model"])
    related = ("--related", place["data"] / "dog")
    found = semu("attack", *how(place, "--test", place["test"], *shadows, *related, "--forget-examples", 4))
    assert set(labels(given["related"])) == {1}
    assert [len(side) for side in given["shadow"][0]] == [6, 3 * UNSEEN] and len(given["shadow"]) == 2
    names = [each["attack"] for each in found["not_run"]]
    relearnt = [name for name in names if name.startswith("relearning: ")]
    related = [name for name in names if name.startswith("relearning from related data: ")]
    assert len(relearnt) == len(related) >= 4 and all(", 4 examples" in name for name in (*relearnt, *related))
    assert {"membership: LiRA", "membership: RMIA"} <= set(names)


def test_relearning_from_related_data_is_told_apart(place: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    short = Attacker("sgd", 1e-2, steps=1)
    monkeypatch.setattr("semu_peft.evaluation.attacks.usual_attackers", lambda *_, **__: [short])
    found = semu("attack", *how(place, "--related", place["data"] / "dog", "--forget-examples", 4))["attacks"]
    names = [each["attack"] for each in found if each["attack"].startswith("relearning")]
    assert names == ["relearning: SGD 0.01, 4 examples", "relearning: SGD 0.01, 4 examples, related data"]


def test_as_many_examples_as_usual_are_the_usual_attackers(place: dict[str, Path], text: dict[str, Path]) -> None:
    for where in (how(place), ("--model", text["model"], "--forget", text["forget"], "--no-progress")):
        usual, told = (
            [each["attack"] for each in semu("attack", *where, "--time-limit", 0, *more)["not_run"]]
            for more in ((), ("--forget-examples", 20))
        )
        assert usual == told


def test_related_texts(text: dict[str, Path], given: dict[str, Any]) -> None:
    where = ("--model", text["model"], "--forget", text["forget"], "--no-progress")
    found = semu("attack", *where, "--related", text["related"], "--forget-examples", 1)
    relearnt = [each["attack"] for each in found["not_run"] if each["attack"].startswith("relearning: ")]
    assert len(given["related"]) == 1 and len(relearnt) == 2 and all(", 1 example, " in name for name in relearnt)


def test_membership_of_texts_is_asked_for_in_flags(text: dict[str, Path]) -> None:
    where = ("--model", text["model"], "--forget", text["forget"], "--no-progress", "--time-limit", 0)
    reasons = {each["attack"]: each["reason"] for each in semu("attack", *where)["not_run"]}
    assert reasons["membership of texts"].startswith("`--test` was not given")


def test_membership_of_texts_has_all_that_it_needs(text: dict[str, Path], given: dict[str, Any]) -> None:
    where = ("--model", text["model"], "--forget", text["forget"], "--no-progress")
    not_run = [each["attack"] for each in semu("attack", *where, "--test", text["related"])["not_run"]]
    assert len(given["test"]) == 1 and given["tokenizer"] is not None
    assert "membership of texts" in not_run and "membership of texts: zlib" not in not_run  # the time alone is lacking


def test_neutral_texts_are_compared_with_the_original(text: dict[str, Path], tmp_path: Path) -> None:
    neutral, adapter = tmp_path / "texts.txt", tmp_path / "no-sky"
    neutral.write_text("the sky is blue")
    where = ("--model", text["model"], "--forget", text["forget"], "--no-progress")
    semu("unlearn", "text", *where, "--retain", text["related"], "--output-dir", adapter, "--max-steps", 30)
    kl = ("--neutral", neutral, "--metrics", "neutral_kl")
    rows = semu("evaluate", *where, "--adapter", adapter, "--reference", text["model"], *kl)["models"]
    assert rows["original"]["neutral_kl"] == rows["reference"]["neutral_kl"] == 0 < rows["unlearned"]["neutral_kl"]
    assert "give --adapter" in semu("evaluate", *where, *kl, code=2)["error"]["message"]


def test_a_dry_run_says_what_would_be_tried_and_loads_no_other_model(
    place: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = ("--test", place["test"], "--shadow", place["shadow"], "--reference", place["model"])
    given = how(place, *beside, "--related", place["data"] / "dog", "--forget-examples", 4)
    late = semu("attack", *given, "--time-limit", 0)["not_run"]
    loaded: list[tuple[str, bool]] = []
    load = bases.classifier
    monkeypatch.setattr(
        "semu_cli.recognised.classifier",
        lambda model, adapter=None: loaded.append((model, adapter is not None)) or load(model, adapter),
    )
    found = semu("attack", *given, "--dry-run")
    plan = found["plan"]
    assert set(loaded) == {(str(place["model"]), False), (str(place["model"]), True)} and len(loaded) == 2
    timed = [each["attack"] for each in late if each["reason"].startswith("the time limit")]
    assert plan["attacks"] == timed and {"membership: LiRA", "membership: RMIA"} <= set(timed)
    assert plan["not_run"] == [each for each in late if each["attack"] not in timed]
    assert found["dry_run"] and not plan["measures"]
    assert plan["examples"] == {"forget": 6, "retain": 18, "test": 9, "forget_test": 3, "related": 6}
    assert list(plan["models"]) == ["original", "unlearned", "reference", "shadow 1, one at a time"]
    told = CliRunner().invoke(app, ["attack", *map(str, given), "--dry-run"]).output
    assert f"Would try {len(timed)} attacks, with fewer" in told and "fewer:\n- stripping\n" in told
    assert "Time: unknown" in told


def test_a_dry_run_of_measuring_names_all_that_is_measured(
    place: dict[str, Path], text: dict[str, Path], tmp_path: Path
) -> None:
    facts = ("--model", text["model"], "--forget", text["forget"], "--retain", text["related"], "--no-progress")
    for given in (how(place, "--test", place["test"]), how(place), (*facts, "--test", text["related"])):
        plan = semu("evaluate", *given, "--dry-run")["plan"]
        row = next(reversed(semu("evaluate", *given)["models"].values()))
        there = [name for name, value in row.items() if value not in (None, {}, []) and not name.endswith("interval")]
        told = {"utility": "model utility"}  # what it is the mean of is told where it is not to be had
        measured = {told.get(name, name.replace("_", " ")) for name in there}
        assert set(plan["measures"]) == measured and not plan["attacks"]
        assert plan["weight_bytes"] >= 4 * plan["parameters"] > 0
    folder = tmp_path / "report"
    audited = semu("audit", *how(place, "--dry-run", "--output-dir", folder))["plan"]
    assert audited["measures"] and audited["attacks"] and not folder.exists()
    assert not semu("audit", *how(place, "--dry-run", "--no-attacks", "--output-dir", folder))["plan"]["attacks"]


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("semu_cli.recognised.classifier", loaded)


@pytest.mark.usefixtures("unloaded")
def test_a_model_to_compare_with_is_looked_at_first(
    place: dict[str, Path], text: dict[str, Path], tmp_path: Path
) -> None:
    settings = json.loads((place["model"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "id2label": {"0": "rose", "1": "tulip"}}))
    for flag in ("--reference", "--shadow"):
        more = ("--test", place["test"], flag)
        for model, words in (
            ("absent", "there is no folder of that name here"),
            (text["model"], "must be a model of images as --model is"),
            (tmp_path, "has no class 'cat'"),
        ):
            told = semu("attack", *how(place, *more, model), code=2)["error"]["message"]
            assert told.startswith(f"`{flag}`") and words in told


@pytest.mark.usefixtures("unloaded")
def test_shadow_models_need_images_that_nobody_knew(place: dict[str, Path], text: dict[str, Path]) -> None:
    told = semu("attack", *how(place, "--shadow", place["shadow"]), code=2)["error"]["message"]
    assert told.startswith("`--shadow`") and "give --test as well" in told
    where = ("--model", text["model"], "--forget", text["forget"], "--shadow", text["model"])
    assert "it is for images, and" in semu("attack", *where, code=2)["error"]["message"]


@pytest.mark.usefixtures("unloaded")
def test_a_package_that_is_missing_is_said_first(place: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    told = semu("evaluate", *how(place, "--test", place["test"]), code=1)["error"]["message"]
    assert told.startswith("Membership attacks need scikit-learn: run `pip install")
