"""The model card: numbers and words put into it, again and again, beside what somebody wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import LocalEntryNotFoundError
from models import Mlp
from peft import LoraConfig, get_peft_model

from semu_peft import SemuConfig, update_model_card
from semu_peft.evaluation import ForgettingMetrics

CARD = "README.md"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = SemuConfig(target_modules=["fc1"], r=2, init_weights=False)
    get_peft_model(Mlp(), config).save_pretrained(tmp_path / "forget-ships")
    return tmp_path / "forget-ships"


def index(folder: Path) -> dict[str, float]:
    """The numbers as the Hub reads them, out of the file's metadata."""
    [entry] = ModelCard.load(folder / CARD).data.to_dict()["model-index"]
    assert entry["name"] == "forget-ships"
    return {metric["name"]: metric["value"] for result in entry["results"] for metric in result["metrics"]}


def test_the_card_says_how_to_load_with_and_without_us(folder: Path) -> None:
    card = ModelCard.load(folder / CARD)
    assert card.data.library_name == "peft" and {"semu", "machine-unlearning"} <= set(card.data.tags)
    assert "Importing `semu_peft` is what registers the method" in card.text
    assert "save_as_lora(model" in card.text and "Say here what was forgotten" in card.text
    assert "[More Information Needed]" not in card.text


def test_a_base_model_is_named_as_on_the_hub_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def card_of(base: str) -> ModelCard:
        model = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"], r=2, init_weights=False))
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(tmp_path / "adapter")
        card = ModelCard.load(tmp_path / "adapter" / CARD)
        (tmp_path / "adapter" / CARD).unlink()
        return card

    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-llm").mkdir()
    for place in (str(tmp_path / "elsewhere" / "my-llm"), "my-llm", "./models/my-llm"):
        card = card_of(place)
        assert card.data.base_model is None and not any("my-llm" in tag for tag in card.data.tags)
        assert "makes `my-llm` forget" in card.text and str(tmp_path) not in str(card)
    assert card_of("somebody/their-llm").data.base_model == "somebody/their-llm"


def test_metrics_become_a_table_and_the_model_index(folder: Path) -> None:
    returned = update_model_card(
        folder, description="Forgets *ships*.", metrics={"unlearning accuracy": 98.5, "retain|accuracy": 97},
        dataset="CIFAR-10, ships", task="image-classification", license="apache-2.0",
    )  # fmt: skip
    card = ModelCard.load(folder / CARD)
    assert str(card) == str(returned)
    assert index(folder) == {"unlearning accuracy": 98.5, "retain|accuracy": 97}
    result = card.data.eval_results[0]
    assert (result.task_type, result.dataset_type, result.metric_type) == (
        "image-classification", "cifar-10-ships", "unlearning_accuracy"
    )  # fmt: skip
    assert card.data.license == "apache-2.0" and "Forgets *ships*." in card.text and "Say here" not in card.text
    assert "| unlearning accuracy | 98.5 | CIFAR-10, ships |" in card.text and "retain\\|accuracy" in card.text


def test_what_is_said_again_is_replaced_and_the_rest_kept(folder: Path) -> None:
    update_model_card(folder, description="First.", metrics={"UA": 90.0, "TA": 80.0})
    path = folder / CARD
    path.write_text(path.read_text() + "\nMy own words.\n")
    update_model_card(folder, metrics={"UA": 95.0})
    card = path.read_text()
    assert index(folder) == {"TA": 80.0, "UA": 95.0}
    assert "First." in card and "My own words." in card and card.count("| metric |") == 1 and "| UA | 90 |" not in card
    update_model_card(folder, description="Second <!-- hidden -->.")
    card = path.read_text()
    assert "First." not in card and "Second &lt;!-- hidden" in card and "| UA | 95 |" in card
    get_peft_model(Mlp(), SemuConfig(target_modules=["fc1"], r=2, init_weights=False)).save_pretrained(folder)
    assert index(folder) == {"TA": 80.0, "UA": 95.0} and "My own words." in path.read_text(), "saved again"
    before = path.read_text()
    update_model_card(folder)
    assert path.read_text() == before


def test_a_card_of_somebodys_own_gets_a_place_at_its_end(folder: Path) -> None:
    (folder / CARD).write_text("---\ntags:\n- ours\n---\n# Our model\n\nBuilt in Gdańsk.\n", encoding="utf-8")
    update_model_card(folder, description="Forgets ships.")
    update_model_card(folder, description="Forgets all ships.")
    card = ModelCard.load(folder / CARD)
    assert card.text.strip().startswith("# Our model\n\nBuilt in Gdańsk.\n\n## What was forgotten")
    assert card.text.count("Forgets") == 1 and set(card.data.tags) == {"ours", "semu", "machine-unlearning"}


def test_transformers_blank_card_and_no_card_are_filled(folder: Path) -> None:
    """What `PushToHubMixin.push_to_hub` saves over ours."""
    blank = ModelCard.from_template(ModelCardData(tags=[], library_name="transformers"), model_description="This is …")
    blank.save(folder / CARD)
    for _ in range(2):
        update_model_card(folder)
        card = ModelCard.load(folder / CARD)
        assert card.data.library_name == "peft" and "# SEMU adapter" in card.text and "of 1 layers" in card.text
        (folder / CARD).unlink()


def test_an_evaluation_s_result_or_results_of_ones_own(folder: Path) -> None:
    update_model_card(folder, metrics=ForgettingMetrics(99.0, 98.0, 97.0, 96.0, 20, 1000))
    assert index(folder)["unlearning accuracy"] == 99 and "membership interval" not in index(folder)
    own = EvalResult("text-generation", "locuslab/TOFU", "TOFU", "rouge", 0.3, metric_name="ROUGE-L")
    update_model_card(folder, metrics=[own])
    assert index(folder)["ROUGE-L"] == 0.3 and index(folder)["unlearning accuracy"] == 99


def test_numbers_of_numpy_are_written_as_numbers(folder: Path) -> None:
    """scikit-learn's accuracies are such, and the Hub refuses a card with an object in it."""
    own = EvalResult("other", "data", "data", "mia", np.float64(0.25), metric_name="MIA")
    update_model_card(folder, metrics={"UA": np.float64(98.5), "TA": np.float32(97.5), "images": np.int64(20)})
    update_model_card(folder, metrics=[own])
    assert index(folder) == {"UA": 98.5, "TA": 97.5, "images": 20, "MIA": 0.25}
    assert "numpy" not in (folder / CARD).read_text()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"metrics": 3}, TypeError, "`metrics` must be numbers by name"),
        ({"metrics": {"UA": "high"}}, TypeError, "`metrics` must be numbers by name"),
        ({"description": 3}, TypeError, "`description` must be a text or None"),
        ({"adapter": 3}, TypeError, "`adapter` must be a path"),
    ],
)
def test_mistakes_leave_the_card_as_it_was(
    folder: Path, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = (folder / CARD).read_bytes()
    with pytest.raises(error, match=message):
        update_model_card(**{"adapter": folder, "license": "mit", **given})
    assert (folder / CARD).read_bytes() == before


def test_another_adapter_or_none_is_refused(tmp_path: Path) -> None:
    get_peft_model(Mlp(), LoraConfig(target_modules=["fc1"])).save_pretrained(tmp_path / "lora")
    (tmp_path / "empty").mkdir()
    for name in ("lora", "empty"):
        with pytest.raises(ValueError, match="`adapter` must be a saved SEMU adapter"):
            update_model_card(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a repository"):
        update_model_card(str(tmp_path / "nowhere"))


def test_a_hub_that_cannot_be_asked_is_not_taken_for_one_without_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LocalEntryNotFoundError):
        update_model_card("me/forget-ships-that-nobody-has")
