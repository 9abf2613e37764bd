"""`semu unlearn` refuses what it cannot do before the work, names the flag, and says the mend."""

from __future__ import annotations

from pathlib import Path

import cli_models
import pytest
from test_cli import semu

from semu_cli.estimate import Estimate


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("usage")
    return {
        "text": cli_models.language_model(folder / "llm"),
        "concept": cli_models.pipeline(folder / "pipeline"),
        "facts": cli_models.facts(folder / "facts.jsonl", cli_models.FACTS),
    }


def refused(place: dict[str, Path], job: str, output: Path, *flags: object) -> str:
    """What is said of these flags; nothing is written."""
    told = semu("unlearn", job, "--model", place[job], *flags, "--output-dir", output, "--no-progress", code=2)["error"]
    assert told["kind"] == "usage" and not output.exists()
    return str(told["message"])


@pytest.mark.parametrize(
    ("content", "words"), [(b"\xff\xfe\x00\x01", "is no text in UTF-8"), (b"", "is empty. Give a file")]
)
def test_a_file_that_holds_no_texts(content: bytes, words: str, place: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    told = refused(place, "text", tmp_path / "out", "--forget", path)
    assert told.startswith(f"`--forget`: {path} ") and words in told


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", '{"text": "a"}\n{"text" "b"}', "line 2 must be one array, or one object a line"),
        ("rows.jsonl", '{"question": "Who?", "answer": 5}', "`answer` must be a text, got int"),
        ("rows.csv", "question,answer", "must end with one of .json"),
    ],
)
def test_a_file_that_cannot_be_read(
    name: str, content: str, words: str, place: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    told = refused(place, "text", tmp_path / "out", "--forget", path)
    assert told.startswith("`--forget") and words in told


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_layers_that_the_model_lacks_are_told_with_some_that_it_has(
    dry_run: tuple[str, ...], place: dict[str, Path], tmp_path: Path
) -> None:
    flags = ("--forget", place["facts"], "--target-modules", "nolayer", *dry_run)
    told = refused(place, "text", tmp_path / "out", *flags)
    assert told.startswith("`--target-modules`: 'nolayer' names no layer") and "There are " in told
    assert "proj" in told, "a layer's name"


def test_a_method_that_lacks_its_data_says_which(place: dict[str, Path], tmp_path: Path) -> None:
    told = refused(place, "text", tmp_path / "out", "--forget", place["facts"], "--method", "altpo")
    assert told.startswith("`--method altpo` needs wrong answers") and "`perturbed_answer`" in told


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "../up"])
def test_a_name_that_no_module_or_folder_can_have(name: str, place: dict[str, Path], tmp_path: Path) -> None:
    told = refused(place, "text", tmp_path / "out", "--forget", place["facts"], "--adapter-name", name)
    assert told.startswith("`--adapter-name` must be letters") and repr(name) in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1"])
def test_seconds_that_no_step_can_take(seconds: str, place: dict[str, Path], tmp_path: Path) -> None:
    flags = ("--forget", place["facts"], "--dry-run", "--step-seconds", seconds)
    assert "`--step-seconds` must be a number of seconds of 0 or more" in refused(place, "text", tmp_path / "o", *flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--forget", " "), "`--forget` must be a prompt"),
        (("--forget", "a cat", "--anchor", "a cat"), "`--anchor` must be another prompt"),
        (("--forget", "a cat", "--retain", "a dog", "--retain", "a cat"), "`--retain` must be another prompt"),
    ],
)
def test_prompts_that_contradict_each_other(
    flags: tuple[str, ...], words: str, place: dict[str, Path], tmp_path: Path
) -> None:
    assert refused(place, "concept", tmp_path / "out", *flags).startswith(words)


def test_steps_of_a_run_that_stops_by_itself_are_a_lower_bound() -> None:
    told = " ".join(Estimate(9, 1, 1, 1, None, 9, 9, 1.0, None, 2.0).told().words)
    assert "Time: at least 2.0 s, for 1 batch and at least 1 step (it stops by itself)" in told


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        ("inspect", (), "--adapter"),
        ("inspect", ("--adapter", "a", "--strange"), "--strange"),
        ("unlearn text", ("--max-steps", 0), "--max-steps"),
        ("unlearn text", ("--config", "absent.yaml"), "absent.yaml cannot be read"),
    ],
)
def test_a_line_that_cannot_be_read_is_told_to_machines_too(
    command: str, flags: tuple[object, ...], words: str
) -> None:
    told = semu(*command.split(), *flags, code=2)
    assert told["command"] == command and told["status"] == "failed"
    assert told["error"]["kind"] == "usage" and words in told["error"]["message"]


def test_a_model_of_speech_is_no_language_model(place: dict[str, Path], tmp_path: Path) -> None:
    from text_models import tokenizer
    from transformers import WhisperConfig

    WhisperConfig(architectures=["WhisperForConditionalGeneration"]).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    told = refused({"text": tmp_path / "model"}, "text", tmp_path / "out", "--forget", place["facts"])
    assert told.startswith("`--model` must be a language model that AutoModelForSeq2SeqLM reads, got Whisper")
