"""`semu evaluate`, `attack` and `audit` of pipelines: what is drawn, what it is taken for, and what was not tried."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import cli_models
import pytest
import torch
import typer
from test_cli import semu
from typer.testing import CliRunner

from semu_cli import app, bases
from semu_cli.recognition import ByText, judge_of, named_class
from semu_peft import concept, evaluation
from semu_peft.concept import sampling

FEW = ("--samples", 2, "--num-inference-steps", 1, "--no-progress")
CAT, DOG = "a photo of a cat", "a photo of a dog"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    model, output = cli_models.pipeline(folder / "model"), folder / "no-cats"
    semu(
        "unlearn", "concept", "--model", model, "--forget", CAT, "--anchor", DOG, "--output-dir", output,
        "--max-steps", 2, "--samples-per-prompt", 2, "--num-inference-steps", 1, "--no-progress",
    )  # fmt: skip
    images = cli_models.image_folder(folder / "images")
    classifier = cli_models.classifier(folder / "classifier", images)
    return {"model": model, "adapter": output, "classifier": classifier, "images": images}


def how(place: dict[str, Path]) -> tuple[Any, ...]:
    return ("--model", place["model"], "--adapter", place["adapter"], "--forget", CAT, "--retain", DOG, *FEW)


def test_evaluate_says_what_a_classifier_recognises(place: dict[str, Path]) -> None:
    from diffusers import StableDiffusionPipeline

    from semu_peft.concept.sampling import sample_pipeline

    found = semu("evaluate", *how(place), "--classifier", place["classifier"])
    assert found["job"] == "concept" and list(found["models"]) == ["original", "unlearned"]
    pipe = StableDiffusionPipeline.from_pretrained(place["model"])
    pipe.set_progress_bar_config(disable=True)
    judge = judge_of(str(place["classifier"]), [CAT], [DOG], None)
    for part, prompt in (("forget", CAT), ("retain", DOG)):
        drawn = sample_pipeline(pipe, [prompt] * 2, seeds=[0, 1], num_inference_steps=1)
        expected = 100 * (judge(drawn).argmax(1) == judge.labels(prompt)).double().mean().item()
        assert found["models"]["original"][f"{part}_accuracy"] == expected
    losses = {name: row["forget_loss"] for name, row in found["models"].items()}
    assert losses["unlearned"] != losses["original"] and min(losses.values()) > 0


def test_nothing_is_drawn_that_nobody_looks_at(place: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a classifier `evaluate` has losses alone: of the pictures whose latents they are on."""
    monkeypatch.setattr("semu_peft.concept.sampling.sample_pipeline", None)
    found = semu("evaluate", *how(place))
    assert set(found["models"]["unlearned"]) == {"forget_loss", "retain_loss"}
    assert semu("evaluate", *how(place), "--dry-run")["plan"]["pictures"] == 4


def test_long_work_says_how_far_it_is(place: dict[str, Path]) -> None:
    given = [str(each) for each in how(place) if each != "--no-progress"]
    told = CliRunner().invoke(app, ["evaluate", *given, "--classifier", str(place["classifier"])]).output
    assert "original: pictures" in told and "unlearned: pictures" in told
    images = ["--model", str(place["classifier"]), "--forget", str(place["images"]), "--forget-class", "cat"]
    told = CliRunner().invoke(app, ["evaluate", *images]).output
    assert "model: forget images" in told and "model: retain images" in told
    assert "images" not in CliRunner().invoke(app, ["evaluate", *images, "--no-progress"]).output


def test_attack_draws_other_seeds_and_names_what_is_missing(place: dict[str, Path]) -> None:
    found = semu("attack", *how(place), "--time-limit", 0)
    missing = [each["attack"] for each in found["not_run"]]
    assert "other seeds" in missing and "adversarial prompts" in missing and not found["attacks"]


def test_an_audit_shows_samples_before_and_after(place: dict[str, Path], tmp_path: Path) -> None:
    given = ("--classifier", place["classifier"], "--no-attacks", "--request", "Forget cats.")
    semu("audit", *how(place), *given, "--output-dir", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["samples"] == [CAT, DOG]
    assert [row["name"] for row in report["metrics"]["rows"]] == ["original", "unlearned"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == 2 and f"{CAT} (to be forgotten)" in page
    assert "other seeds, each prompt with many" in [each["test"] for each in report["not_tested"]]


def test_an_audit_loads_each_pipeline_and_draws_each_prompt_once(
    place: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[bool] = []
    drawn: list[list[str]] = []
    load, draw = bases.pipeline, concept.concept_examples
    monkeypatch.setattr(
        "semu_cli.pictures.pipeline", lambda *given: loaded.append(given[1] is not None) or load(*given)
    )
    monkeypatch.setattr(
        "semu_peft.concept.concept_examples", lambda *given, **more: drawn.append(given[1]) or draw(*given, **more)
    )
    more = ("--reference", place["model"], "--related", "a kitten", "--time-limit", 0, "--output-dir", tmp_path)
    semu("audit", *how(place), *more)
    assert loaded == [False, True, False] and drawn == [[CAT], [DOG], ["a kitten"]]  # original, unlearned, reference


def test_a_dry_run_counts_the_pictures(place: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (*how(place), "--reference", place["model"], "--related", "a kitten", "--output-dir", tmp_path / "report")
    drawn: list[int] = []
    examples, sample, run = concept.concept_examples, sampling.sample_pipeline, evaluation.attack

    def latents(*arguments: Any, **options: Any) -> Any:
        found = examples(*arguments, **options)
        drawn.append(len(found))
        return found

    def pictures(pipe: Any, prompts: Any, **options: Any) -> Any:
        drawn.append(len(prompts))
        return sample(pipe, prompts, **options)

    def seeds_alone(model: Any, *_: Any, further: Any, **options: Any) -> Any:
        for each in further.values():
            each(model)
        return evaluation.AttackReport("diffusion", (), (), 0.0, False)

    monkeypatch.setattr("semu_peft.concept.concept_examples", latents)
    monkeypatch.setattr("semu_peft.concept.sampling.sample_pipeline", pictures)
    for more in ((), ("--classifier", place["classifier"])):
        plan = semu("audit", *given, *more, "--dry-run")["plan"]
        assert sum(drawn) == 3, "one of each prompt, to know what fits"
        assert ("other seeds" in plan["attacks"]) == bool(more) and not (tmp_path / "report").exists()
        drawn.clear()
        monkeypatch.setattr("semu_peft.evaluation.attack", functools.wraps(run)(seeds_alone))
        semu("audit", *given, *more)
        assert sum(drawn) == plan["pictures"]
        shutil.rmtree(tmp_path / "report")
        drawn.clear()
        monkeypatch.setattr("semu_peft.evaluation.attack", run)


def test_related_prompts_and_the_attackers_pictures_are_flags(
    place: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    run = evaluation.attack

    @functools.wraps(run)
    def spy(*arguments: Any, **options: Any) -> Any:
        given.update(options)
        return run(*arguments, **{**options, "time_limit": 0})

    monkeypatch.setattr("semu_peft.evaluation.attack", spy)
    found = semu("attack", *how(place), "--related", "a kitten", "--related", "a tiger", "--forget-examples", 1)
    assert sum(len(next(iter(batch.values()))) for batch in given["related"]) == 4  # two seeds of two prompts
    relearnt = [each["attack"] for each in found["not_run"] if each["attack"].startswith("relearning")]
    assert len(relearnt) == 4 and all(", 1 example, " in name for name in relearnt)  # of two rates, from either data


@pytest.mark.slow
def test_all_attacks_on_a_pipeline(place: dict[str, Path]) -> None:
    found = semu("attack", *how(place), "--classifier", place["classifier"], "--reference", place["model"])
    tried = {each["attack"].split(":")[0] for each in found["attacks"]}
    assert {"stripping", "quantisation", "relearning", "adversarial prompts", "other seeds"} <= tried
    assert all(each["reference"] for each in found["attacks"] if each["attack"].startswith("other seeds"))


def test_a_prompt_names_one_class_in_whole_words() -> None:
    names = {0: "cat, tabby", 1: "dog", 2: "catfish"}
    assert named_class("a Tabby on a sofa", names, "forget") == 0 and named_class("catfish", names, "retain") == 2
    for prompt, words in (("a horse", "no class"), ("a cat and a dog", "several classes")):
        with pytest.raises(typer.BadParameter, match=words):
            named_class(prompt, names, "forget")


def test_a_clip_model_tells_the_prompts_apart(tmp_path: Path) -> None:
    from matrix_models import clip, clip_inputs
    from transformers import BatchFeature

    torch.manual_seed(0)
    model, given = clip().eval(), clip_inputs()

    def processor(*, text: list[str], images: list[Any], **_: Any) -> BatchFeature:
        assert text == [CAT, DOG] and images[0].size == (16, 16)
        return BatchFeature({**given, "input_ids": given["input_ids"][:2], "pixel_values": torch.rand(3, 3, 8, 8)})

    judge = ByText(model, processor, {CAT: 0, DOG: 1})
    assert judge(torch.rand(3, 3, 16, 16)).shape == (3, 2) and int(judge.labels(DOG)) == 1
    model.save_pretrained(tmp_path)
    with pytest.raises(typer.BadParameter, match="--retain"):
        judge_of(str(tmp_path), [CAT], [], None)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--classifier", "absent"), "--classifier"),
        (("--forget", "a unicorn"), "unicorn"),
        (("--forget-class", "cow"), "cow"),
    ],
)
def test_mistakes_are_said_before_anything_is_drawn(more: tuple[str, ...], words: str, place: dict[str, Path]) -> None:
    given = more if "--classifier" in more else ("--classifier", place["classifier"], *more)
    assert words in semu("evaluate", *how(place), *given, code=2)["error"]["message"]


def test_a_configuration_file_may_hold_one_prompt(place: dict[str, Path], tmp_path: Path) -> None:
    settings = {"model": str(place["model"]), "forget": CAT, "time-limit": 0, "samples": 1, "num-inference-steps": 1}
    (tmp_path / "semu.json").write_text(json.dumps(settings))
    assert semu("attack", "--config", tmp_path / "semu.json", "--no-progress")["not_run"]


def test_files_are_given_once(tmp_path: Path, place: dict[str, Path]) -> None:
    twice = ("--forget", "photos", "--forget", "others")
    found = semu("evaluate", "--model", place["classifier"], *twice, code=2)
    assert "pipeline" in found["error"]["message"]
