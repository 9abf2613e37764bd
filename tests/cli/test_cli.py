"""`semu`: the three jobs end to end as a new user runs them, what is done with the result, and what machines read."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import cli_models
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from typer.testing import CliRunner

from semu_cli import app
from semu_cli.catalogue import METHODS
from semu_peft import SubspaceProfile, objectives


def semu(*arguments: object, code: int = 0) -> Any:
    """Run a verb with `--json`; returns what it wrote to stdout."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == code, (result.output, result.exception)
    # Older runners mix what goes to stderr into this.
    found, _ = json.JSONDecoder().raw_decode(result.stdout, result.stdout.index('{\n  "command"'))
    return found


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("images")
    data = cli_models.image_folder(folder / "data")
    return {"model": cli_models.classifier(folder / "model", data), "data": data, "adapter": folder / "no-cats"}


@pytest.fixture(scope="module")
def no_cats(images: dict[str, Path]) -> Any:
    """What `semu unlearn images` says."""
    return semu(
        "unlearn", "images", "--model", images["model"], "--forget", images["data"], "--forget-class", "cat",
        "--output-dir", images["adapter"], "--no-progress",
    )  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("text")
    return {
        "model": cli_models.language_model(folder / "model"),
        "forget": cli_models.facts(folder / "forget.jsonl", cli_models.FACTS[:1]),
        "retain": cli_models.facts(folder / "retain.jsonl", cli_models.FACTS[1:]),
        "folder": folder,
    }


def test_a_class_of_an_image_folder(images: dict[str, Path], no_cats: Any) -> None:
    assert no_cats["command"] == "unlearn images" and no_cats["status"] == "done" and no_cats["version"] == 1
    assert no_cats["forget_accuracy"] == {"before": 100.0, "after": 0.0}
    assert no_cats["retain_accuracy"] == {"before": 100.0, "after": 100.0}
    assert no_cats["examples"] == 6 and no_cats["training"]["trainable_parameters"] > 0
    measured = semu(*no_cats["next"].split()[1:])["models"]  # the command that it says comes next
    assert measured["original"]["forget_accuracy"] == 100 and measured["unlearned"]["forget_accuracy"] == 0
    assert measured["original"]["retain_accuracy"] == 100
    record = json.loads((images["adapter"] / "unlearning.json").read_text())
    assert record["settings"]["forget_class"] == "cat" and record["training"]["steps"] == no_cats["training"]["steps"]


def test_the_card_says_what_was_forgotten_and_not_where_the_model_lay(images: dict[str, Path], no_cats: Any) -> None:
    card = ModelCard.load(images["adapter"] / "README.md")
    assert "Forgets 6 images of the class `cat`. Trained by `semu unlearn images --method delete`" in card.text
    assert "Say here" not in card.text and str(images["model"].parent) not in str(card)
    results = {each.metric_name: each.metric_value for each in card.data.eval_results}
    assert results["forget accuracy before"] == 100 and results["forget accuracy after"] == 0
    assert card.data.model_name == "no-cats" and card.data.eval_results[0].task_type == "image-classification"


def test_the_spectra_lie_beside_the_adapter(images: dict[str, Path], no_cats: Any) -> None:
    profile = SubspaceProfile.load(images["adapter"] / "profile.safetensors")
    assert {name: layer.rank for name, layer in profile.layers.items()} == no_cats["ranks"]


def test_merge_and_export_give_the_adapters_outputs(images: dict[str, Path], no_cats: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageClassification

    how = ("--model", images["model"], "--adapter", images["adapter"])
    semu("merge", *how, "--output-dir", tmp_path / "merged")
    semu("export", *how, "--to", "lora", "--output-dir", tmp_path / "lora")
    modes = {file.stat().st_mode for file in (tmp_path / "merged").iterdir()}
    assert len(modes) == 1, "who may read the configuration may read the weights"

    def base(folder: Path) -> Any:
        return AutoModelForImageClassification.from_pretrained(folder).eval()

    pixels = torch.rand(3, 3, 8, 8)
    expected = PeftModel.from_pretrained(base(images["model"]), images["adapter"])(pixel_values=pixels).logits
    lora = PeftModel.from_pretrained(base(images["model"]), tmp_path / "lora")
    for shipped in (base(tmp_path / "merged"), lora):
        torch.testing.assert_close(shipped(pixel_values=pixels).logits, expected, rtol=1e-4, atol=1e-5)


def test_inspect_tells_what_is_in_the_folder(images: dict[str, Path], no_cats: Any) -> None:
    found = semu("inspect", "--adapter", images["adapter"])
    assert found["digest"] == "ok" and found["base_model"] == str(images["model"])
    assert {name: layer["rank"] for name, layer in found["layers"].items()} == no_cats["ranks"]
    assert sum(layer["energy"] for layer in found["layers"].values()) == pytest.approx(1)


def test_names_of_layers_are_whole_in_a_narrow_terminal(images: dict[str, Path], no_cats: Any) -> None:
    folder = str(images["adapter"])
    for verb in (["inspect", "--adapter", folder], ["compare", folder, folder]):
        shown = CliRunner().invoke(app, verb, env={"COLUMNS": "80"}).output
        rows = [line for line in shown.splitlines() if line.startswith("│")]
        assert all(any(name in row for row in rows) for name in no_cats["ranks"]) and max(map(len, rows)) <= 80


def test_inspect_fails_on_weights_that_were_changed(images: dict[str, Path], no_cats: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    name = "adapter_model.safetensors"
    weights = {key: 2 * tensor for key, tensor in load_file(images["adapter"] / name).items()}
    save_file(weights, tmp_path / name, metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_bytes((images["adapter"] / "adapter_config.json").read_bytes())
    assert "SHA-256" in semu("inspect", "--adapter", tmp_path, code=1)["digest"]


def test_attack_names_what_was_tried_and_what_was_not(images: dict[str, Path], no_cats: Any) -> None:
    how = ("--model", images["model"], "--adapter", images["adapter"], "--forget", images["data"])
    found = semu("attack", *how, "--forget-class", "cat", "--time-limit", 0, "--no-progress")
    assert not found["has_reference"] and found["attacks"] == []
    assert "stripping" in found["not_run"][0]["attack"]
    reasons = {each["attack"]: each["reason"] for each in found["not_run"]}  # the folder's other classes are retained
    assert reasons["membership: confidence and threshold"] == "it needs `--test`"


def test_what_was_not_run_is_asked_for_in_flags(images: dict[str, Path], no_cats: Any) -> None:
    how = ("--model", images["model"], "--adapter", images["adapter"], "--forget", images["data"] / "cat")
    told = CliRunner().invoke(app, ["attack", *map(str, how), "--time-limit", "0", "--no-progress"])
    assert "linear probes: `--retain` was not given\n" in told.output
    assert "threshold: it needs `--retain` and `--test`\n" in told.output
    assert "related data: `--related` was not given\n" in told.output
    assert "No retrained model was given, `--reference`:" in told.output


def test_attacks_are_told_in_a_table_and_in_verbs(images: dict[str, Path], no_cats: Any) -> None:
    how = ("--model", images["model"], "--adapter", images["adapter"], "--forget", images["data"] / "cat")
    told = CliRunner().invoke(app, ["attack", *map(str, how), "--no-progress"], env={"COLUMNS": "80"}).output
    rows = [line for line in told.splitlines() if line.startswith("│")]
    assert rows and max(map(len, rows)) <= 80 and "relearning" in told and "merge_and_unload" not in told
    beside = semu("attack", *how, "--reference", images["model"], "--no-progress")["attacks"]
    assert "`semu merge`" in next(row["model"] for row in beside if row["attack"].startswith("stripping"))
    assert [row["attack"] for row in beside if not row["reference"]] == ["stripping: the adapter switched off"]
    curve = next(row["result"] for row in beside if row["attack"].startswith("relearning"))
    assert curve["steps"][0] == 0 and len(curve["forget"]) == len(curve["reference"]["forget"]) == len(curve["steps"])


def test_an_audit_says_what_was_asked_done_and_not_tested(
    images: dict[str, Path], no_cats: Any, tmp_path: Path
) -> None:
    how = ("--model", images["model"], "--adapter", images["adapter"], "--forget", images["data"])
    asked = ("--forget-class", "cat", "--request", "Forget the cats.", "--no-attacks", "--no-progress")
    found = semu("audit", *how, *asked, "--output-dir", tmp_path)
    assert [Path(file).name for file in found["files"]] == ["report.json", "report.md", "report.html"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["request"]["text"] == "Forget the cats." and report["request"]["data"]["forget"]["files"] == 6
    accuracy = {row["name"]: row["values"]["forget accuracy"]["value"] for row in report["metrics"]["rows"]}
    assert accuracy == {"original": 100.0, "unlearned": 0.0}
    assert report["training"][0]["steps"] == no_cats["training"]["steps"]
    assert found["not_tested"] == report["not_tested"] and found["not_tested"]


@pytest.mark.parametrize(
    ("flag", "value", "job"),
    [
        ("--metrics", "probability", "text"),
        ("--classifier", "m", "concept"),
        ("--samples", "3", "concept"),
        ("--num-inference-steps", "2", "concept"),
    ],
)
def test_a_flag_that_is_for_other_models_is_not_ignored(
    images: dict[str, Path], flag: str, value: str, job: str
) -> None:
    arguments = ["evaluate", "--model", str(images["model"]), "--forget", str(images["data"]), flag, value]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert flag in result.output and f"it is for {job}, and" in result.output and "Leave it out." in result.output


def test_few_images_are_forgotten_and_no_other_class(tmp_path: Path) -> None:
    data = cli_models.image_folder(tmp_path / "photos", 4, noise=60)
    model = cli_models.classifier(tmp_path / "model", data)
    how = ("--model", model, "--forget", data, "--forget-class", "cat", "--no-progress")
    done = semu("unlearn", "images", *how, "--output-dir", tmp_path / "no-cats")
    assert done["forget_accuracy"]["after"] == 0 and done["retain_accuracy"] == {"before": 100.0, "after": 100.0}


def test_retained_images_hold_the_other_classes(images: dict[str, Path], no_cats: Any, tmp_path: Path) -> None:
    how = ("--model", images["model"], "--forget", images["data"], "--forget-class", "cat", "--no-progress")
    held = semu("unlearn", "images", *how, "--retain", images["data"], "--output-dir", tmp_path / "held")
    assert held["forget_accuracy"]["after"] == 0
    assert held["retain_accuracy"]["after"] >= max(90, no_cats["retain_accuracy"]["after"])


def test_a_flat_folder_is_forgotten_as_what_the_model_sees_in_it(images: dict[str, Path], tmp_path: Path) -> None:
    how = ("--model", images["model"], "--forget", images["data"] / "cat", "--no-progress")
    done = semu("unlearn", "images", *how, "--output-dir", tmp_path / "flat", "--adapter-name", "cats")
    assert done["forget_accuracy"] == {"before": 100.0, "after": 0.0}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in (tmp_path / "flat").iterdir()}


def test_single_images_are_known_as_unseen_ones_are(tmp_path: Path) -> None:
    """One image in four has another's label, which no model can know but by heart; the classes stay."""
    folders = {}
    for seed, name in enumerate(("photos", "unseen")):
        folders[name] = cli_models.image_folder(tmp_path / name, 8, noise=100, seed=seed)
        for number in ("0.png", "1.png"):
            pictures = [folders[name] / each / number for each in cli_models.CLASSES]
            held = [picture.read_bytes() for picture in pictures]
            for picture, content in zip(pictures, held[1:] + held[:1], strict=True):
                picture.write_bytes(content)
    model = cli_models.classifier(tmp_path / "model", folders["photos"])
    gone = tmp_path / "gone"
    for name in cli_models.CLASSES:
        (gone / name).mkdir(parents=True)
        for number in ("0.png", "2.png", "3.png", "4.png"):
            (folders["photos"] / name / number).replace(gone / name / number)
    how = ("--model", model, "--forget", gone, "--method", "unseen-confidence", "--no-progress")
    done = semu("unlearn", "images", *how, "--test", folders["unseen"], "--output-dir", tmp_path / "without")
    forgotten, others = done["forget_confidence"], done["test_confidence"]
    assert forgotten["before"] > 95 and others["before"] < 80
    assert abs(forgotten["after"] - others["before"]) < 5 and abs(others["after"] - others["before"]) < 5
    assert abs(done["test_accuracy"]["after"] - done["test_accuracy"]["before"]) < 5
    measured = semu(*shlex.split(done["next"])[1:])["models"]
    assert measured["unlearned"]["forget_accuracy"] == done["forget_accuracy"]["after"]

    (folders["unseen"] / "cat" / "again.png").symlink_to(gone / "cat" / "0.png")
    again = (*how, "--test", folders["unseen"], "--output-dir", tmp_path / "again")
    result = CliRunner().invoke(app, ["unlearn", "images", *map(str, again)], env={"COLUMNS": "200"})
    assert result.exit_code == 2 and "holds 1 of the images" in result.output and not (tmp_path / "again").exists()


def test_attack_on_a_language_model(text: dict[str, Path]) -> None:
    how = ("--model", text["model"], "--forget", text["forget"], "--retain", text["retain"])
    found = semu("attack", *how, "--time-limit", 0, "--no-progress")
    assert "prompts" in [each["attack"] for each in found["not_run"]]


def test_a_fact_of_a_language_model(text: dict[str, Path]) -> None:
    settings = text["folder"] / "semu.yaml"
    settings.write_text(f"model: {text['model']}\nforget: {text['forget']}\nretain: {text['retain']}\nmax-steps: 3\n")
    output = text["folder"] / "no-sky"
    done = semu("unlearn", "text", "--config", settings, "--max-steps", 30, "--output-dir", output, "--no-progress")
    assert 3 < done["training"]["steps"] <= 30  # the flag goes before the file
    assert done["token_probability"]["after"] < 0.5 * done["token_probability"]["before"]
    card = (output / "README.md").read_text()
    assert "Forgets 1 text or answer." in card and "token probability after" in card
    assert not any(part in card for part in cli_models.FACTS[0].values()), "a card is public"
    how = ("--model", text["model"], "--adapter", output, "--forget", text["forget"], "--metrics", "probability")
    measured = semu("evaluate", *how, "--no-progress")["models"]
    assert measured["unlearned"]["probability"] < 0.5 * measured["original"]["probability"]


def test_a_pipeline_of_half_precision(tmp_path: Path) -> None:
    """Whose text encoder would come in another one than its denoiser; merged it is what it was."""
    from diffusers import StableDiffusionPipeline

    model, output = cli_models.pipeline(tmp_path / "model"), tmp_path / "no-cats"
    StableDiffusionPipeline.from_pretrained(model).to(dtype=torch.float16).save_pretrained(model)
    few = ("--max-steps", 1, "--samples-per-prompt", 2, "--num-inference-steps", 1, "--no-progress")
    assert semu("unlearn", "concept", "--model", model, "--forget", "a cat", "--output-dir", output, *few)
    semu("merge", "--model", model, "--adapter", output, "--output-dir", tmp_path / "merged")
    for file in model.glob("*/*.safetensors"):
        written = load_file(tmp_path / "merged" / file.relative_to(model))
        assert {name: value.dtype for name, value in written.items()} == {
            name: value.dtype for name, value in load_file(file).items()
        }


def test_a_concept_of_a_pipeline(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    model, output = cli_models.pipeline(tmp_path / "model"), tmp_path / "no-cats"
    few = ("--max-steps", 2, "--samples-per-prompt", 2, "--num-inference-steps", 1, "--no-progress")
    prompts = ("--forget", "a photo of a cat", "--anchor", "a photo of a dog")
    how = ("unlearn", "concept", "--model", model, *prompts, "--output-dir", output, *few)
    tried = semu(*how, "--dry-run")["estimate"]
    passes = tried["step_seconds"] * (tried["batches"] + 2)
    assert not output.exists() and 0 < tried["sampling_seconds"] == pytest.approx(tried["seconds"] - passes)
    done = semu(*how)
    assert done["training"]["steps"] == 2
    card = (output / "README.md").read_text()
    assert "Forgets `a photo of a cat`, and gives `a photo of a dog` instead." in card and "loss after" in card
    assert "a photo of a cat" in semu("inspect", "--adapter", output)["forgotten"]
    held = semu(*how, "--preserve", 0)
    assert held["settings"]["preserve"] == 0 and held["training"]["history"][-1] != done["training"]["history"][-1]
    semu(*how)
    measured = semu(*shlex.split(done["next"])[1:], "--samples", 1, "--num-inference-steps", 1)["models"]
    assert set(measured["unlearned"]) == {"forget_loss", "retain_loss"}  # the anchor is what was to be kept
    adapted = ("--model", model, "--adapter", output, "--output-dir", f"{output}-lora")
    semu("export", *adapted, "--to", "diffusers")
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.load_lora_weights(f"{output}-lora")
    semu("merge", "--model", model, "--adapter", output, "--output-dir", tmp_path / "merged")
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "merged").unet
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for (name, weight), (_, other) in zip(
        merged.named_parameters(), pipe.unet.named_parameters(), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-6, msg=name)


def test_the_empty_prompt_is_held_beside_those_to_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import semu_peft.concept as concept

    given: dict[str, Any] = {}

    def examples(*_: Any, **settings: Any) -> Any:
        given.update(settings)
        raise ValueError("enough")

    monkeypatch.setattr(concept, "concept_examples", examples)
    how = ("unlearn", "concept", "--model", cli_models.pipeline(tmp_path / "model"), "--forget", "a cat")
    semu(*how, "--retain", "a dog", "--retain", "a car", "--output-dir", tmp_path / "out", code=1)
    assert given["retain"] == ["a dog", "a car", ""]  # guidance leads every picture away from what the empty one gives


def test_a_concept_that_stays_is_told_with_what_to_try() -> None:
    from semu_cli.forget_concept import _fell

    assert _fell([1.0] * 10 + [0.1] * 190) and _fell([1.0, 0.9])
    assert not _fell([1.0, 0.95]) and not _fell([0.5, 1.5] * 100)  # batches differ: one alone says nothing


def test_a_dry_run_estimates_and_writes_nothing(images: dict[str, Path], text: dict[str, Path]) -> None:
    how = ("--dry-run", "--max-steps", 10, "--output-dir", images["data"].parent / "nothing")
    of_images = semu("unlearn", "images", "--model", images["model"], "--forget", images["data"], *how)["estimate"]
    of_text = semu(
        "unlearn", "text", "--model", text["model"], "--forget", text["forget"], *how, "--step-seconds", 2.0
    )["estimate"]  # fmt: skip
    assert of_images["examples"] == 24 and of_images["batches"] == 1 and of_images["step_seconds"] > 0
    assert of_text["seconds"] == pytest.approx(2.0 * 11) and of_text["weight_bytes"] == 4 * of_text["parameters"]
    assert not (images["data"].parent / "nothing").exists()


def test_the_list_of_methods_is_what_the_verbs_take() -> None:
    from semu_peft.concept import erase
    from semu_peft.language import forget

    names = {job: {each.name for each in METHODS if each.job == job} for job in ("text", "concept")}
    assert names["text"] == {*forget._METHODS, forget._UNSEEN}
    assert names["concept"] == set(erase._METHODS)
    for method in METHODS:
        assert hasattr(objectives, method.objective), method


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["unlearn", "images"], "--model"),
        (["unlearn", "text", "--model", "m", "--forget", "absent.txt", "--output-dir", "o"], "absent.txt"),
        (["unlearn", "text", "--model", "m", "--forget", ".", "--method", "magic", "--output-dir", "o"], "npo"),
        (["unlearn", "images", "--model", ".", "--forget", ".", "--output-dir", "absent"], "config.json"),
        (["unlearn", "images", "--model", ".", "--forget", ".", "--test", ".", "--output-dir", "o"], "Give both"),
        (["merge", "--model", "m", "--adapter", "a", "--output-dir", "."], "not empty"),
        (["export", "--model", "m", "--adapter", "a", "--output-dir", "o", "--to", "onnx"], "kohya"),
        (["unlearn", "images", "--config", "absent.yaml"], "absent.yaml"),
        (["methods", "--job", "music"], "concept"),
        (["forget"], "No such command"),
    ],
)
def test_wrong_usage_has_its_exit_code_and_says_the_mend(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("not empty")
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert words in result.output and "Traceback" not in result.output
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.txt"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.toml", "max-steps = 3\ncolour = 1", "colour"),
        ("b.json", "[1]", "by name"),
        ("c.json", "{", "damaged"),
        ("d.yaml", "model: {a: 1}", "--model"),
        ("e.ini", "", ".toml"),
        ("f.yaml", "forget: [a.jsonl, b.jsonl]", "takes one value"),
        ("g.yaml", "max-steps: null", "got None"),
    ],
)
def test_a_configuration_file_with_a_mistake(name: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    result = CliRunner().invoke(app, ["unlearn", "text", "--config", str(tmp_path / name)], env={"COLUMNS": "200"})
    assert result.exit_code == 2 and words in result.output and result.output.count("--config") == 1


def test_an_unknown_class_is_told_with_those_there_are(images: dict[str, Path], tmp_path: Path) -> None:
    how = ("--model", images["model"], "--forget", images["data"], "--forget-class", "cow")
    found = semu("unlearn", "images", *how, "--output-dir", tmp_path / "out", code=2)
    assert found["status"] == "failed" and found["error"]["kind"] == "usage"
    assert "horse" in found["error"]["message"]


def test_a_failure_is_one_sentence_and_with_traceback_the_error(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    found = semu("inspect", "--adapter", tmp_path, code=1)
    assert found["status"] == "failed" and found["error"]["kind"] == "ValueError"
    result = CliRunner().invoke(app, ["inspect", "--adapter", str(tmp_path), "--traceback"])
    assert isinstance(result.exception, ValueError)


def test_help_and_completion_do_not_wait_for_torch() -> None:
    env = {**os.environ, "_SEMU_COMPLETE": "complete_bash", "COMP_WORDS": "semu unlearn i", "COMP_CWORD": "2"}
    program = "import sys; sys.argv = ['semu']; from semu_cli import main; main()"
    completed = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert completed.stdout.split() == ["images"]
    program = (
        "import sys; sys.argv = ['semu', 'unlearn', 'text', '--help']; from semu_cli import main\n"
        "try: main()\nfinally: assert not {'torch', 'peft', 'semu_peft'} & set(sys.modules)"
    )
    helped = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert helped.returncode == 0 and "--max-retain-kl" in helped.stdout, helped.stderr


def test_ctrl_c_has_its_exit_code(images: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("semu_peft.unlearn", stop)
    how = ("--model", images["model"], "--forget", images["data"], "--forget-class", "cat", "--no-progress")
    found = semu("unlearn", "images", *how, "--output-dir", tmp_path / "no-cats", code=130)
    assert found["error"]["kind"] == "stopped" and not (tmp_path / "no-cats").exists()


KILLED_WHILE_SAVING = """
import os
import peft.peft_model as module
save = module.safe_save_file
def kill(*given, **named):
    save(*given, **named)
    os.kill(os.getpid(), 9)
module.safe_save_file = kill
"""
KILLED_BEFORE_RENAMING = """
import os
from pathlib import Path
Path.rename = lambda *_: os.kill(os.getpid(), 9)
"""


KILLED_WHILE_RENAMING_OR_EXCHANGING = """
import os
from pathlib import Path
import semu_peft.files as files
files._exchanged = lambda *_: os.kill(os.getpid(), 9)
Path.rename = Path.replace = lambda *_: os.kill(os.getpid(), 9)
"""


def run_to_its_end(command: list[object], before: str = "") -> int:
    """Run `semu` in a process of its own, which `before` may end; returns its exit code."""
    program = [sys.executable, "-c", f"{before}\nfrom semu_cli import main\nmain()"]
    return subprocess.run([*program, *map(str, command), "--json"], capture_output=True).returncode


@pytest.mark.slow
def test_killed_while_a_pipeline_is_put_in_place_leaves_no_half_of_it(tmp_path: Path) -> None:
    model, adapter = cli_models.pipeline(tmp_path / "pipeline"), tmp_path / "no-cats"
    few = ("--max-steps", 1, "--samples-per-prompt", 2, "--num-inference-steps", 1, "--no-progress")
    semu("unlearn", "concept", "--model", model, "--forget", "a cat", *few, "--output-dir", adapter)
    for name, more in (("merge", ()), ("export", ("--to", "lora")), ("export", ("--to", "diffusers"))):
        output = tmp_path / "".join(["out", *more])
        writes = [name, "--model", model, "--adapter", adapter, *more, "--output-dir", output]
        killed = f"{KILLED_WHILE_RENAMING_OR_EXCHANGING}\nos.replace = Path.replace"  # of a single file
        assert run_to_its_end(writes, killed) == -9, writes
        assert not output.exists(), writes
        semu(*writes)
        assert any(output.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["text", "concept", "audit"])
def test_killed_while_it_is_put_in_place_leaves_the_older_one_whole(
    verb: str, images: dict[str, Path], no_cats: Any, text: dict[str, Path], tmp_path: Path
) -> None:
    """The verbs that write and are not in the test below; the others write nothing."""
    how: tuple[object, ...]
    if verb == "text":
        how = ("unlearn", "text", "--model", text["model"], "--forget", text["forget"], "--max-steps", 1)
    elif verb == "concept":
        model = cli_models.pipeline(tmp_path / "pipeline")
        few = ("--max-steps", 1, "--samples-per-prompt", 2, "--num-inference-steps", 1)
        how = ("unlearn", "concept", "--model", model, "--forget", "a cat", *few)
    else:
        how = ("audit", "--model", images["model"], "--adapter", images["adapter"], "--forget", images["data"],
               "--no-attacks")  # fmt: skip
    output = tmp_path / "out"
    writes = [*how, "--output-dir", output, "--no-progress"]
    assert run_to_its_end(writes, KILLED_WHILE_RENAMING_OR_EXCHANGING) == -9 and not output.exists()
    semu(*writes)
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    assert run_to_its_end(writes, KILLED_WHILE_RENAMING_OR_EXCHANGING) == -9
    assert {file.name for file in output.iterdir()} == set(before)
    assert all((output / name).read_bytes() == content for name, content in before.items())


@pytest.mark.slow
def test_killed_at_any_moment_leaves_whole_files(images: dict[str, Path], no_cats: Any, tmp_path: Path) -> None:
    from semu_peft.adapter.saved import inspect_adapter

    run = run_to_its_end
    output = tmp_path / "no-cats"
    data = ["--forget", images["data"], "--forget-class", "cat", "--no-progress"]
    forgets: list[object] = ["unlearn", "images", "--model", images["model"], *data, "--output-dir", output]
    assert run(forgets, KILLED_WHILE_SAVING) == -9 and not output.exists()
    assert run(forgets) == 0
    before = inspect_adapter(output)
    assert run(forgets, KILLED_WHILE_SAVING) == -9
    assert inspect_adapter(output) == before  # the older one, whole
    for name in ("merge", "export"):
        writes = [name, "--model", images["model"], "--adapter", output, "--output-dir", tmp_path / name]
        assert run(writes, KILLED_BEFORE_RENAMING) == -9 and not (tmp_path / name).exists()
        assert run(writes) == 0 and any((tmp_path / name).iterdir())
