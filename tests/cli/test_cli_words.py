"""What `semu` says in words: an honest estimate, a run that forgot nothing, and the command to type next."""

from __future__ import annotations

import shlex
from pathlib import Path

import cli_models
from typer.testing import CliRunner

from semu_cli import app
from semu_cli.estimate import Estimate


def estimated(seconds: float) -> str:
    return " ".join(Estimate(1000, 2, 64, 2, 10, 4000, 2000, seconds / 12, None, seconds).told().words)


def test_an_estimate_does_not_say_that_a_run_takes_no_time() -> None:
    assert "Time: under a second, for 2 batches" in estimated(0.012) and "at 0.001 s a pass" in estimated(0.012)
    assert "Time: at least 24.0 s," in estimated(24.0) and "at 2 s a pass" in estimated(24.0)


def test_one_is_not_many() -> None:
    assert "Data: 1 example in 1 batch." in " ".join(Estimate(9, 1, 1, 1, 1, 9, 9, 1.0, None, 2.0).told().words)
    assert "for 1 batch and 1 step," in " ".join(Estimate(9, 1, 1, 1, 1, 9, 9, 1.0, None, 2.0).told().words)
    assert "Data: 64 examples in 2 batches." in estimated(24.0) and "2 batches and 10 steps" in estimated(24.0)


def test_a_run_that_forgot_nothing_says_so_and_the_next_command_keeps_the_template(tmp_path: Path) -> None:
    model, forget = cli_models.language_model(tmp_path / "a model"), cli_models.facts(
        tmp_path / "facts.jsonl", cli_models.FACTS[:1]
    )  # fmt: skip
    template = "Question: {question}\\nAnswer: {answer}"
    told = CliRunner().invoke(
        app,
        ["unlearn", "text", "--model", str(model), "--forget", str(forget), "--template", template, "--max-steps", "1",
         "--output-dir", str(tmp_path / "out"), "--no-progress"],
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    said = " ".join(told.output.split())
    assert "1 text or answer. The tokens had" in said
    assert "Hardly anything was forgotten." in said and "write --template" not in said
    for flag in ("--retain others.jsonl", "--neutral texts.txt", "--explained-variance 0.99", "--method"):
        assert flag in said[said.index("Things to try") :]
    following = shlex.split(told.output[told.output.index("Next: ") + 6 :])
    assert following[following.index("--template") + 1] == template
    assert following[following.index("--model") + 1] == str(model)


def test_images_that_are_both_to_be_forgotten_and_kept_are_refused(tmp_path: Path) -> None:
    data = cli_models.image_folder(tmp_path / "photos", number=2)
    model = cli_models.classifier(tmp_path / "model", data)
    how = ["unlearn", "images", "--model", str(model), "--output-dir", str(tmp_path / "out"), "--no-progress"]
    forget = ["--forget", str(data), "--forget-class", "cat"]
    refused = CliRunner().invoke(app, [*how, *forget, "--retain", str(data / "cat"), "--json"])
    assert (
        refused.exit_code == 2
        and "holds 2 of the images to be forgotten" in refused.output
        and not (tmp_path / "out").exists()
    )
    held = CliRunner().invoke(
        app, [*how, *forget, "--retain", str(data), "--max-retain-kl", "1e-9", "--max-steps", "1"]
    )
    said = " ".join(held.output.split())
    assert held.exit_code == 0 and "Hardly anything was forgotten." in said, held.output
    assert "allow more damage, --max-retain-kl" in said and "--neutral" not in said and "--template" not in said
