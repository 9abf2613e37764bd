"""The commands of the page on the command line, run one after the other as a new user would who copies them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import cli_models
import pytest
from typer.testing import CliRunner

from semu_cli import app

ROOT = Path(__file__).parents[2]
# A tiny pipeline learns nothing in two steps; that it runs is what is asked here.
FEW = {
    "unlearn": ["--max-steps", "2", "--samples-per-prompt", "2", "--num-inference-steps", "1"],
    "evaluate": ["--samples", "2", "--num-inference-steps", "1"],
    "attack": ["--samples", "2", "--num-inference-steps", "1"],
    "audit": ["--samples", "2", "--num-inference-steps", "1"],
}


def commands(page: str) -> list[list[str]]:
    """The page's lines that begin with `semu` and a verb."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if re.match(r"semu [a-z]", line)]
    return [shlex.split(line)[1:] for line in lines]


def test_the_page_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photos = cli_models.image_folder(Path("photos"))
    cli_models.classifier(Path("my-classifier"), photos)
    cli_models.language_model(Path("my-llm"))
    cli_models.facts(Path("facts.jsonl"), cli_models.FACTS[:1])
    cli_models.pipeline(Path("my-pipeline"))
    cli_models.image_folder(Path("held-out"), 3, seed=1)
    cli_models.image_folder(Path("kittens"), 3, seed=2)
    cli_models.image_folder(Path("reported"), 1)
    for seed, name in enumerate(("retrained", "shadow-1", "shadow-2"), 1):
        cli_models.classifier(Path(name), photos, seed=seed)
    cli_models.language_model(Path("my-llm-retrained"))
    for name in ("others", "weather"):
        cli_models.facts(Path(f"{name}.jsonl"), cli_models.FACTS[1:])
    cli_models.facts(Path("unseen.jsonl"), [{"question": "What?", "answer": "g h"}])
    Path("texts.txt").write_text("the sky")
    lines = commands("docs/cli.md")
    assert [line[:2] for line in lines if line[0] == "unlearn"] == [
        ["unlearn", "images"], ["unlearn", "images"], ["unlearn", "text"], ["unlearn", "concept"]
    ]  # fmt: skip
    for line in lines:
        few = FEW.get(line[0], []) if "my-pipeline" in line else []
        none = ["--time-limit", "0"] if line[0] in ("attack", "audit") else []  # all is read, and no attack begun
        result = CliRunner().invoke(app, [*line, *few, *none])
        assert result.exit_code == 0, (line, result.output, result.exception)
    reports = ("no-cats-report", "no-sky-report", "no-cat-report")
    for folder in ("my-classifier-without-cats", "no-sky-lora", "no-cat-lora", *reports):
        assert any(Path(folder).iterdir())


def test_the_readme_writes_flags_as_they_are() -> None:
    for line in commands("README.md"):
        flags = [word for word in line if word.startswith("--")]
        words = [word for word in line[:2] if not word.startswith("--")]
        shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"}).output
        assert flags and all(flag in shown for flag in flags), line


def test_the_table_names_every_verb() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for command in app.registered_commands:
        assert f"| `semu {command.name}` |" in page
