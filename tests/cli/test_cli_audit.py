"""`semu audit`: what its report has of a run and of a machine, and what stops it before anything is measured."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import cli_models
import pytest
from test_cli import semu

from semu_cli import bases, text_file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("audit")
    data, adapter = cli_models.image_folder(folder / "photos"), folder / "no-cats"
    model = cli_models.classifier(folder / "model", data)
    how = ("--model", model, "--forget", data, "--forget-class", "cat", "--no-progress")
    semu("unlearn", "images", *how, "--output-dir", adapter)
    return {
        "folder": folder, "model": model, "data": data, "adapter": adapter,
        "test": cli_models.image_folder(folder / "test", 3, seed=1),
        "reference": cli_models.classifier(folder / "never-knew", data, seed=1),
    }  # fmt: skip


def how(place: dict[str, Path], *more: object) -> tuple[object, ...]:
    where = ("--model", place["model"], "--adapter", place["adapter"], "--forget", place["data"])
    return (*where, "--forget-class", "cat", "--no-progress", *more)


@pytest.fixture(scope="module")
def report(place: dict[str, Path]) -> Any:
    (place["data"] / "cat" / "notes.txt").write_text("no image")
    more = ("--test", place["test"], "--reference", place["reference"], "--time-limit", 1, "--seed", 3)
    semu("audit", *how(place, *more, "--output-dir", place["folder"] / "report"))
    return json.loads((place["folder"] / "report" / "report.json").read_text())


def test_a_report_names_no_folder_of_a_machine(place: dict[str, Path], report: Any) -> None:
    assert report["settings"]["forget"] == "photos" and report["settings"]["output_dir"] == "no-cats"
    for file in (place["folder"] / "report").iterdir():
        assert str(place["folder"]) not in file.read_text()


def test_a_report_has_digests_of_all_that_was_measured_on(place: dict[str, Path], report: Any, tmp_path: Path) -> None:
    data = report["request"]["data"]
    assert data["forget"]["files"] == 7 and data["forget_test"]["files"] == 3
    assert data["forget"]["examples"] == 6 and data["forget_test"]["examples"] == 3
    assert data["retain"]["examples"] == 18 and data["test"]["examples"] == 9  # the other three classes
    digest = report["settings"]["judging: SHA-256 of the weights of reference"]
    assert len(digest) == 64 and digest != report["model"]["sha256"]
    other = shutil.copytree(place["data"], tmp_path / "photos")
    shutil.copy(other / "dog" / "0.png", other / "dog" / "1.png")
    more = ("--no-attacks", "--output-dir", tmp_path / "report", "--forget", other)
    semu("audit", "--model", place["model"], "--adapter", place["adapter"], "--forget-class", "cat", *more)
    changed = json.loads((tmp_path / "report" / "report.json").read_text())["request"]["data"]
    assert changed["forget"] == data["forget"] and changed["retain"] != data["retain"]


def test_a_report_says_how_it_was_judged(report: Any) -> None:
    told = {name.removeprefix("judging: "): value for name, value in report["settings"].items()}
    assert told["batch_size"] == 32 and told["time_limit"] == 1 and told["reference"] == "never-knew"
    assert report["settings"]["judging: seed"] == 3 and report["settings"]["seed"] == 0


def test_a_report_has_intervals(report: Any) -> None:
    values = next(row["values"] for row in report["metrics"]["rows"] if row["name"] == "unlearned")
    assert values["forget accuracy"]["interval"][1] == pytest.approx(39.03, abs=0.01)
    low, high = values["membership inference"]["interval"]
    assert low <= values["membership inference"]["value"] <= high
    assert values["test accuracy"]["value"] == 100 and values["forgotten test accuracy"]["value"] == 0


def test_what_to_do_is_said_in_verbs(report: Any) -> None:
    stripped = next(row["found"] for row in report["attacks"] if row["attack"].startswith("stripping"))
    assert "`semu merge`" in stripped and "merge_and_unload" not in stripped


def test_spectra_are_shown_where_the_profile_lies_beside_the_adapter(place: dict[str, Path], tmp_path: Path) -> None:
    from peft import get_peft_model

    from semu_cli.bases import classifier
    from semu_cli.image_folder import read_images
    from semu_peft import SemuConfig, initialize_semu_weights, objectives

    adapter = shutil.copytree(place["adapter"], tmp_path / "no-cats")
    layers = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    base = classifier(str(place["model"]))
    images = read_images(place["data"], base, only="cat").loader(64)
    adapted: Any = get_peft_model(base, SemuConfig(target_modules=layers))
    initialize_semu_weights(adapted, images, objectives.DecoupledDistillation(), progress=False).save(
        adapter / "profile.safetensors"
    )
    where = how({**place, "adapter": adapter}, "--no-attacks", "--output-dir", tmp_path / "report")
    semu("audit", *where)
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {row["layer"] for row in found["model"]["layers"]} == set(found["spectra"])
    assert "Spectra of the forget gradients" in " ".join(each["caption"] for each in found["pictures"])


def loads(monkeypatch: pytest.MonkeyPatch, kind: str) -> list[tuple[str, bool, int]]:
    """Which models are loaded: the folder's name, whether with an adapter, and how many are in memory by then."""
    found: list[tuple[str, bool, int]] = []
    there: list[weakref.ref[Any]] = []
    load = getattr(bases, kind.rpartition(".")[2])

    def spy(model: str, adapter: Path | None = None) -> Any:
        gc.collect()
        found.append((Path(model).name, adapter is not None, sum(each() is not None for each in there)))
        loaded = load(model, adapter)
        there.append(weakref.ref(loaded[0] if isinstance(loaded, tuple) else loaded))
        return loaded

    monkeypatch.setattr(kind, spy)
    return found


@pytest.mark.parametrize("attacks", [("--time-limit", 0), ("--no-attacks",)])
def test_an_audit_loads_each_model_once_and_one_shadow_at_a_time(
    attacks: tuple[object, ...], place: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadows = [shutil.copytree(place["reference"], tmp_path / f"shadow-{number}") for number in (1, 2)]
    found = loads(monkeypatch, "semu_cli.recognised.classifier")
    beside = ("--reference", place["reference"], *(part for each in shadows for part in ("--shadow", each)))
    semu("audit", *how(place, "--test", place["test"], *beside, *attacks, "--output-dir", tmp_path / "report"))
    assert found == [
        ("model", False, 0), ("model", True, 1), ("never-knew", False, 2), ("shadow-1", False, 3),
        ("shadow-2", False, 3),
    ]  # fmt: skip
    settings = json.loads((tmp_path / "report" / "report.json").read_text())["settings"]
    digests = {name: value for name, value in settings.items() if "SHA-256" in name}
    assert len(digests) == 3 and len(set(digests.values())) == 1  # shadows are copies of the reference here


def test_an_audit_of_texts_loads_each_model_and_reads_each_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cli_models.language_model(tmp_path / "model")
    other = shutil.copytree(model, tmp_path / "never-knew")
    forget = cli_models.facts(tmp_path / "forget.jsonl", cli_models.FACTS)
    neutral = tmp_path / "neutral.txt"
    neutral.write_text("the sky is blue")
    where = ("--model", model, "--forget", forget, "--no-progress")
    semu("unlearn", "text", *where, "--output-dir", tmp_path / "out", "--max-steps", 1)
    found, read = loads(monkeypatch, "semu_cli.answers.language_model"), []
    read_texts = text_file.read_texts
    monkeypatch.setattr("semu_cli.answers.read_texts", lambda *given: read.append(given[1]) or read_texts(*given))
    more = ("--neutral", neutral, "--reference", other, "--time-limit", 0, "--output-dir", tmp_path / "report")
    semu("audit", *where, "--adapter", tmp_path / "out", *more)
    assert found == [("model", False, 0), ("model", True, 1), ("never-knew", False, 1)]  # the original is let go
    assert read == ["forget", "neutral"]
    told = json.loads((tmp_path / "report" / "report.json").read_text())["request"]["data"]
    assert {role: (each["files"], each["examples"]) for role, each in told.items()} == {
        "forget": (1, 2), "neutral": (1, 1)
    }  # fmt: skip
    assert "| forget | 2 examples |" in (tmp_path / "report" / "report.md").read_text()


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: object) -> None:
        raise AssertionError("it was measured")

    monkeypatch.setattr("semu_cli.recognised.Recognised.measured", measured)


@pytest.mark.usefixtures("unmeasured")
def test_a_report_is_not_put_among_other_files(place: dict[str, Path]) -> None:
    for folder in (place["data"], place["adapter"]):
        told = semu("audit", *how(place, "--output-dir", folder), code=2)["error"]["message"]
        assert told == f"`--output-dir`: {folder} has other files in it. Choose a new folder."


def test_an_older_report_is_written_over(place: dict[str, Path], report: Any) -> None:
    semu("audit", *how(place, "--no-attacks", "--output-dir", place["folder"] / "report"))


@pytest.mark.usefixtures("unmeasured")
def test_plots_that_cannot_be_drawn_are_said_first(
    place: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [each for each in sys.modules if each.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = semu("audit", *how(place, "--output-dir", tmp_path / "report"), code=1)["error"]["message"]
    assert told.startswith("Plots need matplotlib: run `pip install")


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    "change", [{"steps": "three"}, {"history": [{"loss": "low"}]}, {"history": ["low"]}, {"seconds": None}]
)
def test_a_damaged_record_is_said_first(place: dict[str, Path], change: dict[str, Any], tmp_path: Path) -> None:
    adapter = shutil.copytree(place["adapter"], tmp_path / "no-cats")
    record = json.loads((adapter / "unlearning.json").read_text())
    record["training"] |= change
    (adapter / "unlearning.json").write_text(json.dumps(record))
    where = how({**place, "adapter": adapter}, "--output-dir", tmp_path / "report")
    told = semu("audit", *where, code=1)["error"]["message"]
    assert f"{adapter / 'unlearning.json'} is damaged" in told and "Remove it, or copy it again." in told


def test_a_step_without_a_number_is_no_damage(place: dict[str, Path], tmp_path: Path) -> None:
    """JSON has no NaN: `semu unlearn` wrote null for the loss of such a step."""
    adapter = shutil.copytree(place["adapter"], tmp_path / "no-cats")
    record = json.loads((adapter / "unlearning.json").read_text())
    record["training"]["history"][0]["loss"] = None
    (adapter / "unlearning.json").write_text(json.dumps(record))
    where = how({**place, "adapter": adapter}, "--no-attacks", "--output-dir", tmp_path / "report")
    semu("audit", *where)
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert found["training"][0]["history"][0]["loss"] == "nan"
