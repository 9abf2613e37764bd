"""What is damaged, missing or not to be written is said by its name, before the work and not after it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cli_models
import pytest
from test_cli import semu

from semu_cli.bases import check_place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("damaged")
    images = cli_models.image_folder(folder / "photos", 2)
    model, adapter = cli_models.classifier(folder / "model", images), folder / "no-cats"
    how = ("--model", model, "--forget", images / "cat", "--max-steps", 1, "--no-progress")
    semu("unlearn", "images", *how, "--output-dir", adapter)
    return {"model": model, "adapter": adapter, "images": images}


def merged(model: Path, adapter: Path, output: Path, code: int) -> str:
    found = semu("merge", "--model", model, "--adapter", adapter, "--output-dir", output, code=code)
    assert not output.exists()
    return str(found["error"]["message"])


def test_an_adapter_that_is_not_whole_is_named(place: dict[str, Path], tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(place["adapter"], tmp_path / "a"))
    (adapter / "adapter_config.json").write_text("{")
    told = merged(place["model"], adapter, tmp_path / "out", 1)
    assert told.startswith(f"{adapter / 'adapter_config.json'} is damaged (") and "again" in told
    (adapter / "adapter_model.safetensors").unlink()
    told = merged(place["model"], adapter, tmp_path / "out", 2)
    assert told.startswith(f"`--adapter`: there is no adapter_model.safetensors in {adapter}.")
    told = semu("compare", place["adapter"], adapter, code=2)["error"]["message"]
    assert told.startswith("`second`: there is no adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ranks": "x"}, "`ranks` must map layer names to ranks of 0 or more, got 'x'"),
        ({"ranks": {"classifier": -1}}, "`ranks` must map layer names to ranks of 0 or more"),
        ({"ranks": {"classifier": True}}, "`ranks` must map layer names to ranks of 0 or more"),
        ({"peft_type": "LORA"}, "`peft_type` 'SEMU', got 'LORA'"),
    ],
)
def test_a_configuration_that_is_no_adapters_is_named(
    change: dict[str, object], words: str, place: dict[str, Path], tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(place["adapter"], tmp_path / "a"))
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for told in (
        merged(place["model"], adapter, tmp_path / "out", 1),
        semu("inspect", "--adapter", adapter, code=1)["error"]["message"],
    ):
        assert told.startswith(str(path)) and words in told and "again" in told


def test_weights_that_are_damaged_are_named_with_those_kept(place: dict[str, Path], tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(place["adapter"], tmp_path / "a"))
    weights, [kept] = adapter / "adapter_model.safetensors", list(adapter.glob(".adapter_model.*"))
    whole = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(whole[:5])
    told = merged(place["model"], adapter, tmp_path / "out", 1)
    assert told.startswith(f"{weights} is damaged (") and f"copy {kept.name} over it" in told
    shutil.copy(kept, weights)
    assert semu("inspect", "--adapter", adapter)["digest"] == "ok"  # the mend that it said


def test_numbers_that_are_none_are_named(place: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = Path(shutil.copytree(place["adapter"], tmp_path / "a"))
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(name for name in tensors if name.endswith("semu_core"))
    save_file({**tensors, key: tensors[key] * float("nan")}, path, metadata={"format": "pt"})
    told = semu("inspect", "--adapter", adapter, code=1)["error"]["message"]
    assert told.startswith(f"{path} is damaged: {key!r} must have finite numbers")


def test_a_model_whose_weights_are_damaged_is_named(place: dict[str, Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(place["model"], tmp_path / "m"))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    told = merged(model, place["adapter"], tmp_path / "out", 1)
    assert told.startswith(f"Weights of {model} are damaged (") and "again" in told


@pytest.mark.parametrize("verb", ["unlearn", "merge", "export", "audit"])
def test_a_place_that_cannot_be_written_is_told_before_the_work(
    verb: str, place: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    adapted = ("--model", place["model"], "--adapter", place["adapter"])
    how = {
        "unlearn": ("unlearn", "images", "--model", place["model"], "--forget", place["images"]),
        "audit": ("audit", *adapted, "--forget", place["images"]),
    }.get(verb, (verb, *adapted))
    for output, words in ((file, "notes.txt"), (file / "deep" / "er", f"would be inside {file}, a file")):
        told = semu(*how, "--output-dir", output, code=2)["error"]
        assert told["kind"] == "usage" and words in told["message"] and "Choose" in told["message"]
    assert file.read_text() == "mine"


def test_a_folder_that_only_others_may_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    check_place(tmp_path / "new" / "folder")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the administrator may write anywhere
    with pytest.raises(typer.BadParameter, match=f"nothing may be written to {tmp_path}"):
        check_place(tmp_path / "new" / "folder")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_an_old_code_page_does_not_end_the_program(encoding: str, place: dict[str, Path]) -> None:
    """As on Windows, where output is written to a file."""
    run = [sys.executable, "-c", "from semu_cli import main; main()", "inspect", "--adapter", str(place["adapter"])]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    shown = subprocess.run(run, capture_output=True, env=environment)
    assert shown.returncode == 0, shown.stderr.decode(errors="replace")
    assert ("‖ΔW‖" in shown.stdout.decode(encoding)) == (encoding == "utf-8")
    told = subprocess.run([*run, "--json"], capture_output=True, env=environment).stdout.decode(encoding)
    assert json.loads(told)["base_model"] == str(place["model"])
