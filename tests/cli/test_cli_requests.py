"""`semu unlearn`: what it leaves beside the adapter, and what it refuses before anything is loaded or trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cli_models
import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from test_cli import semu

from semu_peft import SubspaceProfile


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("requests")
    images = cli_models.image_folder(folder / "photos", 2)
    model, adapter = cli_models.classifier(folder / "model", images), folder / "no-cats"
    how = ("--model", model, "--forget", images, "--forget-class", "cat", "--max-steps", 2, "--no-progress")
    semu("unlearn", "images", *how, "--output-dir", adapter)
    texts = cli_models.language_model(folder / "texts")
    facts = cli_models.facts(folder / "facts.jsonl", cli_models.FACTS[:1])
    return {"model": model, "adapter": adapter, "images": images, "texts": texts, "facts": facts}


def test_the_card_says_what_was_forgotten_and_how_that_was_measured(place: dict[str, Path]) -> None:
    card = ModelCard.load(place["adapter"] / "README.md")
    assert "Forgets the class `cat`, 2 images, by `delete`." in card.text and "Say here" not in card.text
    assert 'from_pretrained(base_model, "no-cats")' in card.text and card.data.model_name == "no-cats"
    values = {each.metric_name: each.metric_value for each in card.data.eval_results}
    record = json.loads((place["adapter"] / "unlearning.json").read_text())
    assert values["forget accuracy after"] == record["forget_accuracy"]["after"]
    assert set(values) == {f"{part} accuracy {at}" for part in ("forget", "retain") for at in ("before", "after")}


def test_the_spectra_are_beside_the_adapter(place: dict[str, Path]) -> None:
    ranks = json.loads((place["adapter"] / "unlearning.json").read_text())["ranks"]
    assert SubspaceProfile.load(place["adapter"] / "profile.safetensors").ranks == ranks


@pytest.mark.parametrize("name", ["", "a.b", "a/b", ".."])
def test_the_adapters_name_is_no_path(name: str, place: dict[str, Path], tmp_path: Path) -> None:
    how = ("--model", place["model"], "--forget", place["images"], "--adapter-name", name)
    error = semu("unlearn", "images", *how, "--output-dir", tmp_path / "out", code=2)["error"]
    assert f"`--adapter-name` must be a name without dots and slashes, got {name!r}" in error["message"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seconds", ["-3", "nan", "inf"])
def test_seconds_are_a_number_from_zero_on(seconds: str, place: dict[str, Path], tmp_path: Path) -> None:
    how = ("--model", place["model"], "--forget", place["images"], "--dry-run", f"--step-seconds={seconds}")
    assert (
        "`--step-seconds`"
        in semu("unlearn", "images", *how, "--output-dir", tmp_path / "o", code=2)["error"]["message"]
    )


@pytest.mark.parametrize(("layers", "words"), [("nolayer", "no layer's name is 'nolayer'"), ("(", "no regular expr")])
def test_layers_that_are_not_there_are_told_by_the_flag(
    layers: str, words: str, place: dict[str, Path], tmp_path: Path
) -> None:
    for kind, model, forget in (("images", "model", "images"), ("text", "texts", "facts")):
        how = ("--model", place[model], "--forget", place[forget], "--target-modules", layers)
        error = semu("unlearn", kind, *how, "--output-dir", tmp_path / "out", "--no-progress", code=2)["error"]
        assert "`--target-modules`" in error["message"] and words in error["message"]


def test_files_without_texts_are_named(place: dict[str, Path], tmp_path: Path) -> None:
    for name, content, words in (("a.jsonl", b"\xff\xfe\x00", "no text in UTF-8"), ("b.jsonl", b"", "is empty")):
        (tmp_path / name).write_bytes(content)
        how = ("--model", place["texts"], "--forget", tmp_path / name)
        message = semu("unlearn", "text", *how, "--output-dir", tmp_path / "out", code=2)["error"]["message"]
        assert "`--forget`" in message and name in message and words in message


def test_a_method_that_needs_wrong_answers_says_where(place: dict[str, Path], tmp_path: Path) -> None:
    how = ("--model", place["texts"], "--forget", place["facts"], "--method", "altpo")
    message = semu("unlearn", "text", *how, "--output-dir", tmp_path / "out", code=2)["error"]["message"]
    assert "in a column perturbed_answer" in message and "facts.jsonl" in message


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (["--forget", "a cat", "--retain", "a cat "], "`--retain`: 'a cat' is to be forgotten"),
        (["--forget", "a cat", "--anchor", "a cat"], "the same as --anchor"),
        (["--forget", ""], "the same as the empty prompt"),
    ],
)
def test_prompts_that_contradict_each_other(prompts: list[str], words: str, tmp_path: Path) -> None:
    error = semu("unlearn", "concept", "--model", "any", *prompts, "--output-dir", tmp_path / "out", code=2)["error"]
    assert words in error["message"]


def test_what_is_wrong_with_an_adapter_is_said_of_its_files(place: dict[str, Path], tmp_path: Path) -> None:
    settings, weights = "adapter_config.json", "adapter_model.safetensors"
    copies = {
        name: Path(shutil.copytree(place["adapter"], tmp_path / name)) for name in ("cut", "nan", "ranks", "lora")
    }
    path = copies["cut"] / weights
    path.unlink()  # a link, in the copy a file, beside the name that it is kept under
    path.write_bytes((place["adapter"] / weights).read_bytes()[:200])
    tensors = load_file(copies["nan"] / weights)
    core = next(name for name in tensors if name.endswith("semu_core"))
    save_file({**tensors, core: tensors[core] * float("nan")}, copies["nan"] / weights)
    for name, change in (("ranks", {"ranks": {"a": -1}}), ("lora", {"peft_type": "LORA"})):
        content = json.loads((copies[name] / settings).read_text())
        (copies[name] / settings).write_text(json.dumps({**content, **change}))
    for name, verb, words in (
        ("cut", "evaluate", "are damaged"), ("nan", "inspect", "that are not finite"),
        ("ranks", "inspect", "`ranks` must map layers to ranks"), ("ranks", "evaluate", "`ranks` must map layers"),
        ("lora", "evaluate", "`peft_type` 'SEMU', got 'LORA'"),
    ):  # fmt: skip
        how = ["--adapter", copies[name]]
        how += ["--model", place["model"], "--forget", place["images"], "--no-progress"] if verb == "evaluate" else []
        message = semu(verb, *how, code=1)["error"]["message"]
        assert words in message and str(copies[name]) in message
