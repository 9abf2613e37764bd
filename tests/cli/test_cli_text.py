"""`semu` on files of text: columns by other names, what is to be kept without wrong answers, and templates."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import cli_models
import pytest
from typer.testing import CliRunner

from semu_cli import app
from semu_cli.text_file import columns_of

QUESTION, ANSWER = "What colour is the sky?", "blue"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_models.language_model(tmp_path_factory.mktemp("text") / "model")


@pytest.fixture(scope="module")
def renamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fact under names that no data set has."""
    return cli_models.facts(tmp_path_factory.mktemp("data") / "renamed.jsonl", [{"q": QUESTION, "a": ANSWER}])


def semu(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == code, (result.output, result.exception)
    found, _ = json.JSONDecoder().raw_decode(result.stdout, result.stdout.index('{\n  "command"'))
    return found


def test_columns_by_other_names_are_asked_for_in_flags_and_read(model: Path, renamed: Path, tmp_path: Path) -> None:
    how = ("--model", model, "--forget", renamed)
    writes = ("unlearn", "text", *how, "--max-steps", 1, "--output-dir", tmp_path / "out", "--no-progress")
    error = semu(*writes, code=2)["error"]
    assert error["kind"] == "usage" and "columns a, q," in error["message"]
    assert "`--columns question=NAME,answer=NAME`" in error["message"] and not (tmp_path / "out").exists()
    done = semu(*writes, "--columns", "question=q,answer=a")
    assert done["examples"] == 1 and "--columns question=q,answer=a" in done["next"]
    assert done["settings"]["columns"] == "question=q,answer=a"


def test_columns_mean_the_same_to_every_verb(model: Path, renamed: Path, tmp_path: Path) -> None:
    plain = cli_models.facts(tmp_path / "plain.jsonl", [{"question": QUESTION, "answer": ANSWER}])
    settings = tmp_path / "semu.yaml"
    settings.write_text(f"forget: {renamed}\ncolumns: question=q, answer=a\n")
    few = ("--model", model, "--metrics", "probability", "--no-progress")
    found = semu("evaluate", *few, "--config", settings)["models"]
    assert found == semu("evaluate", *few, "--forget", plain)["models"]
    tried = semu("attack", "--model", model, "--config", settings, "--time-limit", 0, "--no-progress")
    assert "prompts" in [each["attack"] for each in tried["not_run"]]  # its rows are known as questions


@pytest.mark.parametrize("columns", ["question", "question=", "=q", "question=q,question=p"])
def test_columns_that_are_no_pairs(columns: str) -> None:
    import typer

    with pytest.raises(typer.BadParameter, match="must be like question=prompt,answer=reply"):
        columns_of(columns)


def test_what_is_kept_needs_no_wrong_answers(model: Path, tmp_path: Path) -> None:
    forget = cli_models.facts(tmp_path / "forget.jsonl", cli_models.FACTS[:1])
    retain = cli_models.facts(tmp_path / "retain.jsonl", cli_models.FACTS[1:])
    how = ("--model", model, "--forget", forget, "--retain", retain, "--no-progress")
    row = semu("evaluate", *how)["models"]["model"]
    assert set(row["utility"]) == {"retain probability", "retain rouge"} and row["utility"]["retain probability"] > 0.5
    assert row["model_utility"] is None  # a mean over three measures is not to be had of two
    shown = CliRunner().invoke(app, ["evaluate", *map(str, how)], env={"COLUMNS": "200"})
    assert "retain probability" in shown.output
    asked = semu("evaluate", *how, "--metrics", "model_utility", code=2)["error"]["message"]
    assert "`perturbed_answer` in the rows of `--retain`" in asked


def test_questions_that_no_model_knew_give_membership(model: Path, tmp_path: Path) -> None:
    forget = cli_models.facts(tmp_path / "forget.jsonl", cli_models.FACTS)
    others = [{"question": "What?", "answer": "g h"}, {"question": "How?", "answer": "a e"}]
    test = cli_models.facts(tmp_path / "test.jsonl", others)
    how = ("--model", model, "--forget", forget, "--test", test, "--metrics", "membership", "--no-progress")
    row = semu("evaluate", *how)["models"]["model"]
    assert row["membership"]["min_k"] == 1  # it learnt the one alone, of which two questions do not make sure
    assert row["membership_interval"]["min_k"] == pytest.approx([0.342, 1], abs=1e-3)


def test_help_and_reader_agree_on_templates() -> None:
    from semu_peft.language.encode import DEFAULT_TEMPLATE

    for verb in (["unlearn", "text"], ["evaluate"], ["attack"], ["audit"]):
        page = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "250"}).output
        shown = " ".join(page.replace("│", " ").split())
        assert "'Q: {question}\\nA: {answer}'" in shown and repr(DEFAULT_TEMPLATE) in shown
        assert "{prompt}" not in shown


def test_a_plain_text_is_forgotten_measured_and_reported(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the sky is blue")
    adapter, few = tmp_path / "out", ("--max-steps", 1, "--no-progress")
    done = semu("unlearn", "text", "--model", model, "--forget", text, "--output-dir", adapter, *few)
    measured = semu(*shlex.split(done["next"])[1:], "--no-progress")["models"]
    assert 0 < measured["original"]["probability"] < 1 and measured["unlearned"]["probability"] is not None
    how = ("--model", model, "--adapter", adapter, "--forget", text, "--no-attacks", "--no-progress")
    assert semu("audit", *how, "--output-dir", tmp_path / "report")["files"]


def test_the_librarys_words_for_a_mistake_name_the_flag(model: Path, tmp_path: Path) -> None:
    forget = cli_models.facts(tmp_path / "forget.jsonl", cli_models.FACTS)
    how = ("--model", model, "--forget", forget, "--no-progress")
    assert "which needs `--test`" in semu("evaluate", *how, "--metrics", "membership", code=2)["error"]["message"]
    assert "which needs `--retain`" in semu("evaluate", *how, "--metrics", "model_utility", code=2)["error"]["message"]


@pytest.mark.parametrize(
    ("verb", "flag", "value", "expected"),
    [
        (("evaluate",), "--metrics", "bleu", "must be among ['probability', "),
        (("evaluate",), "--template", "Q: {question}", "{question} and, after it, {answer}, got 'Q: {question}'."),
        (("attack",), "--template", "{answer}\\n{question}", "got '{answer}\\n{question}'."),
        (("unlearn", "text"), "--template", "Q", "got 'Q'. Write 'Question: {question}\\nAnswer: {answer}'."),
        (("unlearn", "text"), "--explained-variance", 0, "above 0 and at most 1, got 0. Take 0.9"),
    ],
)
def test_a_wrong_flag_is_refused_before_a_model_is_loaded(
    verb: tuple[str, ...], flag: str, value: object, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("a model was loaded")

    for module in ("answers", "forget_text"):
        monkeypatch.setattr(f"semu_cli.{module}.language_model", loaded)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    output = () if verb in (("evaluate",), ("attack",)) else ("--output-dir", tmp_path / "out")
    forget = cli_models.facts(tmp_path / "forget.jsonl", cli_models.FACTS)
    error = semu(*verb, "--model", tmp_path, "--forget", forget, *output, flag, value, code=2)["error"]
    assert error["kind"] == "usage" and error["message"].startswith(f"`{flag}` ") and expected in error["message"]


def test_a_fact_that_is_both_to_be_forgotten_and_kept_is_refused(model: Path, tmp_path: Path) -> None:
    forget = cli_models.facts(tmp_path / "forget.jsonl", cli_models.FACTS[:1])
    every = cli_models.facts(tmp_path / "every.jsonl", cli_models.FACTS)
    how = ("--model", model, "--forget", forget, "--retain", every, "--output-dir", tmp_path / "out")
    assert "holds 1 of the rows to be forgotten, 'blue'" in semu("unlearn", "text", *how, code=2)["error"]["message"]


def test_a_model_in_half_precision_works_in_float32_on_a_cpu_and_is_written_as_it_was(
    model: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from semu_cli.bases import device, language_model

    half = AutoModelForCausalLM.from_pretrained(model).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "half")
    working = language_model(str(tmp_path / "half"))[0]
    assert working.dtype == (torch.float32 if device() == "cpu" else torch.bfloat16)
    forget = cli_models.facts(tmp_path / "forget.jsonl", cli_models.FACTS[:1])
    how = ("--model", tmp_path / "half", "--output-dir")
    semu("unlearn", "text", *how, tmp_path / "out", "--forget", forget, "--max-steps", 2, "--no-progress")
    semu("merge", *how, tmp_path / "merged", "--adapter", tmp_path / "out")
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_answers_are_shown_where_they_are_asked_for(model: Path, tmp_path: Path) -> None:
    """By default a report has no text of the data; with the flag, the first questions and what is said to them."""
    forget = cli_models.facts(tmp_path / "forget.jsonl", [*cli_models.FACTS[:1] * 2, *cli_models.FACTS[1:]])
    sky = cli_models.facts(tmp_path / "sky.jsonl", cli_models.FACTS[:1])
    others = cli_models.facts(tmp_path / "others.jsonl", cli_models.FACTS[1:])
    adapter, where = tmp_path / "no-sky", ("--model", model, "--forget", forget, "--no-progress")
    how = ("--model", model, "--forget", sky, "--retain", others, "--max-steps", 30, "--no-progress")
    semu("unlearn", "text", *how, "--output-dir", adapter)
    audited = ("audit", *where, "--adapter", adapter, "--no-attacks", "--output-dir")
    semu(*audited, tmp_path / "silent")
    for file in (tmp_path / "silent").iterdir():
        assert not any(part in file.read_text() for fact in cli_models.FACTS for part in fact.values())
    semu(*audited, tmp_path / "shown", "--show-answers", 1)
    report = json.loads((tmp_path / "shown" / "report.json").read_text())
    (row,) = report["texts"]
    assert row["prompt"] == QUESTION and row["before"] == [ANSWER] != row["after"] and row["forgotten"]
    assert report["settings"]["judging: show_answers"] == 1
    semu(*audited, tmp_path / "all", "--show-answers", 9)
    texts = json.loads((tmp_path / "all" / "report.json").read_text())["texts"]
    assert [each["prompt"] for each in texts] == [each["question"] for each in cli_models.FACTS]


def test_texts_that_answer_nothing_are_not_shown(model: Path, tmp_path: Path) -> None:
    text, adapter = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("the sky is blue")
    where = ("--model", model, "--forget", text, "--no-progress")
    semu("unlearn", "text", *where, "--output-dir", adapter, "--max-steps", 1)
    audited = ("audit", *where, "--adapter", adapter, "--output-dir", tmp_path / "report", "--show-answers", 2)
    told = semu(*audited, code=2)["error"]["message"]
    assert told.startswith("`--show-answers` needs questions") and not (tmp_path / "report").exists()
