"""What `semu` says in words: an honest estimate, a run that forgot nothing, and the command to type next."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any

import cli_models
import pytest
from test_cli import semu
from typer.testing import CliRunner

from semu_cli import app
from semu_cli.estimate import Estimate, Plan
from semu_cli.forget_concept import ConceptRequest


def estimated(seconds: float) -> str:
    return " ".join(Estimate(1000, 2, 64, 2, 10, 4000, 2000, seconds / 12, None, seconds).told().words)


def test_an_estimate_does_not_say_that_a_run_takes_no_time() -> None:
    assert "Time: at least 0.012 s, for 2 batches" in estimated(0.012) and "at 0.001 s a pass" in estimated(0.012)
    assert "Time: at least 24.0 s," in estimated(24.0) and "at 2 s a pass" in estimated(24.0)


def test_one_is_not_many() -> None:
    assert "Data: 1 example in 1 batch." in " ".join(Estimate(9, 1, 1, 1, 1, 9, 9, 1.0, None, 2.0).told().words)
    assert "for 1 batch and 1 step," in " ".join(Estimate(9, 1, 1, 1, 1, 9, 9, 1.0, None, 2.0).told().words)
    for number, said in ((1, "1 forget prompt, 1 retain."), (2, "2 forget prompts, 2 retain.")):
        plan = Plan({"model": "m"}, {"forget prompts": number, "retain": number})
        assert f"Data: {said}" in plan.told().words
    assert "Data: 64 examples in 2 batches." in estimated(24.0) and "2 batches and 10 steps" in estimated(24.0)


def test_a_run_that_forgot_nothing_says_so_and_the_next_command_keeps_the_template(tmp_path: Path) -> None:
    model, forget = cli_models.language_model(tmp_path / "a model"), cli_models.facts(
        tmp_path / "facts.jsonl", cli_models.FACTS[:1]
    )  # fmt: skip
    template = "Question: {question}\\nAnswer: {answer}"
    how = [
        "unlearn", "text", "--model", str(model), "--forget", str(forget), "--template", template, "--max-steps", "1",
        "--output-dir", str(tmp_path / "out"), "--no-progress",
    ]  # fmt: skip
    told = CliRunner().invoke(app, how)
    assert told.exit_code == 0, told.output
    said = " ".join(told.output.split())
    assert "1 text or answer. The tokens had" in said
    assert "Hardly anything was forgotten." in said and "write --template" not in said
    assert "Try this first: say what must stay, --retain others.jsonl. If that is not enough: " in said
    for flag in ("--neutral texts.txt", "--method"):
        assert flag in said[said.index("If that is not enough") :]
    assert "--explained-variance" not in said  # nearly all directions are free by default
    narrow = CliRunner().invoke(app, [*how, "--explained-variance", "0.9"]).output
    assert "keep more directions, --explained-variance 0.99" in " ".join(narrow.split())
    retain = cli_models.facts(tmp_path / "retain.jsonl", cli_models.FACTS[1:])
    bounded = CliRunner().invoke(app, [*how, "--retain", str(retain), "--max-retain-kl", "1e-12"]).output
    assert "Hardly anything was forgotten. Things to try: allow more damage" in " ".join(bounded.split()), bounded
    following = shlex.split(told.output[told.output.index("Next: ") + 6 :])
    assert following[following.index("--template") + 1] == template
    assert following[following.index("--model") + 1] == str(model)


def test_an_adapter_that_changes_nothing_is_told_where_it_is_shipped(tmp_path: Path) -> None:
    model, forget = cli_models.language_model(tmp_path / "model"), cli_models.facts(
        tmp_path / "facts.jsonl", cli_models.FACTS[:1]
    )  # fmt: skip
    how = ("unlearn", "text", "--model", model, "--forget", forget, "--no-progress")
    semu(*how, "--max-steps", 1, "--output-dir", tmp_path / "idle")  # no step lowers the loss
    semu(*how, "--retain", cli_models.facts(tmp_path / "retain.jsonl", cli_models.FACTS[1:]), "--max-steps", 3,
         "--output-dir", tmp_path / "busy")  # fmt: skip
    for verb in ("merge", "export"):
        for name in ("idle", "busy"):
            adapted = (verb, "--model", model, "--adapter", tmp_path / name, "--output-dir")
            assert semu(*adapted, tmp_path / f"{verb}-{name}")["changes_nothing"] == (name == "idle")
            told = CliRunner().invoke(app, list(map(str, [*adapted, tmp_path / f"{verb}-{name}-2"]))).output
            assert ("The adapter changes nothing: " in told and "still knows all that it knew." in told) == (
                name == "idle"
            )


def test_warnings_are_one_line_each_in_flags_and_in_the_json(tmp_path: Path) -> None:
    model, forget = cli_models.language_model(tmp_path / "model"), cli_models.facts(
        tmp_path / "facts.jsonl", cli_models.FACTS[:1]
    )  # fmt: skip
    how = ["unlearn", "text", "--model", model, "--forget", forget, "--max-steps", 1, "--no-progress", "--output-dir"]
    lines = [
        "`until_unseen` has nothing to compare with, as no unseen answers can be made of `--forget`: the run may go "
        "on far past that level. Give wrong answers (`perturbed_answer`), or fewer `--max-steps`.",
        "Nothing is held but what the model says of its own accord, which says little of answers of the same kind: "
        "others may be lost with those to be forgotten, so measure what is left of them. (The model was to be asked "
        "about others instead: `--forget` must have questions that name somebody, in two words or more, got none. Give "
        "`--retain`.)",
        "No step lowered the loss over the first batches of the run, so the adapter is as it was before. Give more "
        "examples in a batch, or a `learning_rate`, by which AdamW trains. (from Python: `semu_peft.unlearn`)",
    ]
    told = CliRunner().invoke(app, list(map(str, [*how, tmp_path / "out"])))
    assert told.exit_code == 0 and ".py:" not in told.output and "UserWarning" not in told.output
    for line in lines:
        assert f"semu unlearn text: warning: {line}\n" in told.output, told.output
    assert semu(*how, tmp_path / "out")["warnings"] == lines


def test_a_warning_that_recurs_is_said_once_and_one_before_a_failure_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        for at in range(3):
            warnings.warn("Give another `job`,\n or [bold]none[/].", stacklevel=at + 1)
        raise ValueError("`job` must be known.")

    monkeypatch.setattr("semu_cli.catalogue.zoo", fail)
    told = semu("methods", code=1)
    assert told["warnings"] == ["Give another `--job`, or [bold]none[/]."]
    assert told["error"]["message"].startswith("`--job` must be known.")


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
    for nothing in ("0", "-1", "nan"):
        no_budget = CliRunner().invoke(app, [*how, *forget, "--retain", str(data), "--max-retain-kl", nothing])
        assert no_budget.exit_code == 2 and "must be above zero" in " ".join(no_budget.output.split()), nothing
        assert not (tmp_path / "out").exists()
    held = CliRunner().invoke(
        app, [*how, *forget, "--retain", str(data), "--max-retain-kl", "1e-9", "--max-steps", "1"]
    )
    said = " ".join(held.output.split())
    assert held.exit_code == 0 and "Hardly anything was forgotten." in said, held.output
    assert "allow more damage, --max-retain-kl; train for longer, --max-steps" in said
    assert "--neutral" not in said and "--template" not in said


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_that_every_class_is_to_be_forgotten_is_told(dry_run: tuple[str, ...], tmp_path: Path) -> None:
    data = cli_models.image_folder(tmp_path / "photos", number=2)
    model = cli_models.classifier(tmp_path / "model", data)
    few, other = (tmp_path / name for name in ("few", "other"))
    for name in ("cat", "dog"):
        shutil.copytree(data / name, few / name)
    how = ("unlearn", "images", "--model", model, "--max-steps", 1, "--output-dir", other, *dry_run, "--no-progress")
    told = semu(*how, "--forget", data)["warnings"]
    begin = f"Every class of the model is to be forgotten: the folders in {data} name all of them, and there is no "
    assert any(each.startswith(f"{begin}`--forget-class`. Give one, ") for each in told), told
    for forget in (("--forget", data, "--forget-class", "cat"), ("--forget", few), ("--forget", data / "cat")):
        assert not any("Every class" in each for each in semu(*how, *forget)["warnings"])


def test_a_flat_folder_is_judged_by_what_the_original_saw_in_it(tmp_path: Path) -> None:
    """Not by what the model takes the images for that has forgotten them: it agrees with itself."""
    images = cli_models.image_folder(tmp_path / "photos")
    model, output = cli_models.classifier(tmp_path / "model", images), tmp_path / "no-cats"
    how = ("--model", model, "--forget", images / "cat", "--no-progress")
    semu("unlearn", "images", *how, "--output-dir", output)
    retained = ("--retain", images / "dog", "--reference", model)
    found = semu("evaluate", *how, *retained, "--adapter", output)["models"]
    assert {name: row["forget_accuracy"] for name, row in found.items()} == {
        "original": 100.0, "unlearned": 0.0, "reference": 100.0
    }  # fmt: skip
    assert {row["retain_accuracy"] for row in found.values()} == {100.0}
    attacked = semu("attack", *how, "--adapter", output)["attacks"]
    stripped = next(row["model"] for row in attacked if row["attack"].startswith("stripping"))
    assert stripped.startswith("forgotten 0.0 → 100.0 ")


def test_an_adapter_of_another_model_is_refused_in_flags(tmp_path: Path) -> None:
    images = cli_models.image_folder(tmp_path / "photos", 2)
    model, output = cli_models.classifier(tmp_path / "model", images), tmp_path / "no-cats"
    semu("unlearn", "images", "--model", model, "--forget", images / "cat", "--max-steps", 1, "--output-dir", output)
    other = cli_models.language_model(tmp_path / "other")
    for verb in ("merge", "export"):
        how = ("--model", other, "--adapter", output, "--output-dir", tmp_path / "out")
        told = semu(verb, *how, code=2)["error"]["message"]
        assert told.startswith(f"`--adapter`: {other} has no layer of {output}, which was made for {model} (")
        assert told.endswith("Give the model that it was made for as --model.") and not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_of_equal_layers_is_told_wherever_one_is_loaded(tmp_path: Path) -> None:
    images, adapter = cli_models.image_folder(tmp_path / "photos", 2), tmp_path / "no-cats"
    model, other = (cli_models.classifier(tmp_path / name, images, seed=seed) for seed, name in enumerate("ab"))
    how = ("--forget", images / "cat", "--no-progress")
    semu("unlearn", "images", "--model", model, *how, "--max-steps", 1, "--output-dir", adapter)
    judging = (*how, "--time-limit", 0)
    verbs: dict[str, tuple[object, ...]] = {
        "merge": ("--output-dir",), "export": ("--output-dir",), "evaluate": how, "attack": judging,
        "audit": (*judging, "--output-dir"),
    }  # fmt: skip
    for verb, more in verbs.items():
        for place in (other, model):
            where = [tmp_path / f"{verb}-{place.name}"] if "--output-dir" in more else []
            told = semu(verb, "--model", place, "--adapter", adapter, *more, *where)["warnings"]
            begin = f"{adapter} was made for {model}, and --model is {other}. An adapter belongs to the weights "
            assert [each.startswith(begin) for each in told] == ([True] if place == other else []), (verb, told)


def test_a_model_is_known_by_its_folder_and_elsewhere_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from semu_cli.bases import is_same_model

    for folder in ("gpt2", "elsewhere/gpt2"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to("gpt2")
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path / "gpt2")
    for same in ("gpt2", "./gpt2/", "link", "elsewhere/../gpt2", "openai-community/gpt2", "/moved/gpt2"):
        assert is_same_model(same, here) and is_same_model(here, same), same
    for another in ("elsewhere/gpt2", "distilgpt2", "gpt2/medium"):
        assert not is_same_model(another, here) and not is_same_model(here, another), another


def test_answers_are_no_neutral_texts(tmp_path: Path) -> None:
    model, facts = (
        cli_models.language_model(tmp_path / "model"),
        cli_models.facts(tmp_path / "a.jsonl", cli_models.FACTS),
    )
    how = ("evaluate", "--model", model, "--forget", facts, "--neutral", facts)
    told = semu(*how, code=2)["error"]
    assert told["kind"] == "usage" and told["message"].startswith(f"`--neutral` must be texts, got {facts} with")


def test_a_lora_of_a_pipeline_is_said_with_the_program_that_reads_it(tmp_path: Path) -> None:
    model, output = cli_models.pipeline(tmp_path / "pipeline"), tmp_path / "no-cats"
    few = ("--max-steps", 1, "--samples-per-prompt", 2, "--num-inference-steps", 1, "--no-progress")
    semu("unlearn", "concept", "--model", model, "--forget", "a cat", *few, "--output-dir", output)
    told = {}
    for to in ("lora", "diffusers", "kohya"):
        how = ["export", "--model", model, "--adapter", output, "--to", to, "--output-dir", tmp_path / to]
        told[to] = CliRunner().invoke(app, list(map(str, how))).output
    assert f"PeftModel.from_pretrained(pipe.unet, {str(tmp_path / 'lora')!r})" in told["lora"]
    assert "pipe.load_lora_weights" in told["diffusers"] and "ComfyUI" in told["kohya"]


def test_a_card_calls_the_adapter_and_its_model_as_the_user_did(tmp_path: Path) -> None:
    """Not as the temporary folder that it was written in; an adapter with a name of its own has a card as well."""
    images = cli_models.image_folder(tmp_path / "photos", 2)
    model, output = cli_models.classifier(tmp_path / "model", images), tmp_path / "no-cats"
    how = ("unlearn", "images", "--model", model, "--forget", images / "cat", "--max-steps", 1, "--no-progress")
    for seed, name in enumerate(("default", "cats")):
        semu(*how, "--output-dir", output, "--adapter-name", name, "--seed", seed)
        card = (output / "README.md").read_text()
        assert 'PeftModel.from_pretrained(base_model, "no-cats")' in card and "Model Card for Model ID" not in card
        assert f"An adapter that makes `{model.name}` forget." in card and str(tmp_path) not in card
    assert len(list(output.glob(".adapter_model.*"))) == 1, "the earlier weights do not stay behind"


def test_the_pipeline_of_a_concept_is_said_wherever_its_adapter_is(tmp_path: Path) -> None:
    model, output = cli_models.pipeline(tmp_path / "my-pipeline"), tmp_path / "no-cats"
    few = ("--samples-per-prompt", 2, "--num-inference-steps", 1, "--no-progress", "--output-dir", output)
    semu("unlearn", "concept", "--model", model, "--forget", "a cat", "--max-steps", 1, *few)
    assert semu("inspect", "--adapter", output)["base_model"] == str(model)
    card = (output / "README.md").read_text()
    assert "An adapter that makes `my-pipeline` forget." in card and str(tmp_path) not in card
    assert 'PeftModel.from_pretrained(base_model, "no-cats")' in card and "`pipe.unet`" in card
    judged = ("--model", model, "--adapter", output, "--forget", "a cat", "--samples", 1, "--num-inference-steps", 1)
    semu("audit", *judged, "--no-attacks", "--no-progress", "--output-dir", tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["model"]["name"] == "my-pipeline"  # and not "unet", the folder inside
    semu("export", "--model", model, "--adapter", output, "--to", "lora", "--output-dir", tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model)


def test_what_is_given_instead_is_told_of_the_method_that_gives_it() -> None:
    settings: dict[str, Any] = {each.name: None for each in dataclasses.fields(ConceptRequest)}
    settings |= {"forget": ["a cat"], "anchor": ["a dog"]}
    names = ("condition-matching", "negative-guidance")
    told = {name: ConceptRequest(**settings | {"method": name})._request for name in names}
    assert told["condition-matching"] == "Forgets `a cat`, and gives `a dog` instead."
    assert told["negative-guidance"] == "Forgets `a cat`."
