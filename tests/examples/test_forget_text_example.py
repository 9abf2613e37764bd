"""The program for language models: on its own people, and on a model and files of one's own."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from text_models import decoder, tokenizer
from transformers import AutoModelForCausalLM

PROGRAM = Path(__file__).parents[2] / "examples" / "forget_text.py"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the program with these arguments, in this process, and return its figures."""

    def program(*arguments: Any) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", [str(PROGRAM), "--output-dir", str(tmp_path / "out"), *map(str, arguments)])
        runpy.run_path(str(PROGRAM), run_name="__main__")
        figures: dict[str, Any] = json.loads((tmp_path / "out" / "metrics.json").read_text())
        return figures

    return program


@pytest.mark.slow
def test_it_forgets_two_of_its_people(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """With the defaults: two are forgotten, ten kept, and what ships gives the same."""
    figures = run()
    assert figures["before"]["forget"] > 0.9 and figures["before"]["retain"] > 0.9
    assert figures["after"]["forget"] < 0.3 and figures["after"]["retain"] > 0.85
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged").config.vocab_size < 600


def test_a_model_of_ones_own(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """From a folder, with a file and without retain data."""
    decoder().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "forget.jsonl").write_text('{"question": "What colour?", "answer": "blue"}\n', encoding="utf-8")
    given = ("--model", tmp_path / "model", "--forget", tmp_path / "forget.jsonl")
    figures = run(*given, "--method", "npo", "--max-steps", 2)
    assert figures["steps"] == 2 and list(figures["after"]) == ["forget"]
