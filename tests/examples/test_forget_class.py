"""The main job runs as a program on digits, on an image folder and on a parquet file, and refuses bad input."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

from semu_peft import SubspaceProfile
from semu_peft.report import Audit

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = ["zero", "one", "two"]
PER_CLASS = 16


@pytest.fixture(scope="module", autouse=True)
def _example_modules() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.syspath_prepend(str(EXAMPLES))
        yield
    for name in ("forget_class", "image_data"):
        sys.modules.pop(name, None)


def digit_images() -> list[tuple[int, Image.Image]]:
    """The first few zeros, ones and twos, as grey images of 8 × 8 pixels."""
    digits = load_digits()
    return [
        (digit, Image.fromarray((image * 255 / 16).astype("uint8")))
        for digit in range(len(WORDS))
        for image in digits.images[digits.target == digit][:PER_CLASS]
    ]


def write_image_folder(folder: Path) -> Path:
    for number, (digit, image) in enumerate(digit_images()):
        (folder / WORDS[digit]).mkdir(parents=True, exist_ok=True)
        image.save(folder / WORDS[digit] / f"{number}.png")
    return folder


def write_parquet(path: Path) -> Path:
    rows = []
    for digit, image in digit_images():
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        rows.append({"img": {"bytes": buffer.getvalue(), "path": None}, "fine_label": digit})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_model(folder: Path, *, processor: bool = False) -> Path:
    """An untrained model of colour images that has names for its classes, in another order than the alphabet's."""
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        id2label=dict(enumerate(WORDS)), label2id={word: index for index, word in enumerate(WORDS)},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    if processor:
        # The processor that needs no torchvision; before transformers 5 it had the plain name.
        kind = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
        kind(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def run(output: Path, *options: str | Path, attack_seconds: str = "0") -> tuple[dict[str, Any], str]:
    """Run the program and return its table, after checking all that every run must have written."""
    command = [
        sys.executable, EXAMPLES / "forget_class.py", "--output-dir", output,
        "--attack-seconds", attack_seconds, *options,
    ]  # fmt: skip
    # A cache of its own, so that nothing is read from or left in the user's.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(output.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for picture in ("confusion.png", "spectra.png"):
        with Image.open(output / picture) as image:
            assert image.format == "PNG"
    profile = SubspaceProfile.load(output / "profile.safetensors")
    assert sum(profile.ranks.values()) > 0 and profile.batches > 0
    for folder in ("adapter", "lora"):
        assert (output / folder / "adapter_config.json").is_file()
        assert (output / folder / "adapter_model.safetensors").is_file()
    assert (output / "merged" / "model.safetensors").is_file()
    proofs = json.loads((output / "proofs.json").read_text())
    assert len(proofs) == 4 and max(proofs.values()) < 1e-4 and min(proofs.values()) == 0
    report = Audit.load(output / "report.json")
    assert report.contents["request"]["data"]["forget"]["examples"] > 0 and report.contents["share"]["percent"] < 10
    curves = sum("relearning" in each["attack"] or "probe" in each["attack"] for each in report.contents["attacks"]) > 0
    assert (output / "report.html").read_text().count("<svg") == (7 if curves else 5)
    assert (output / "report.md").is_file() and report.contents["not_tested"]
    assert str(output) in done.stdout and str(output) not in report.to_json()

    table = json.loads((output / "metrics.json").read_text())
    markdown = (output / "metrics.md").read_text()
    for name, row in table["rows"].items():
        assert name in markdown
        for metric in ("unlearning_accuracy", "retain_accuracy", "test_accuracy", "membership_inference"):
            assert 0 <= row[metric] <= 100
    adapted = [row for name, row in table["rows"].items() if name.startswith("SEMU")]
    assert len(adapted) == 2
    for row in adapted:
        assert 0 < row["trainable_parameters"] < 0.1 * row["total_parameters"]
        assert row["adapter_bytes"] > 0 and row["seconds"] > 0
    return table, done.stdout


def test_digits(tmp_path: Path) -> None:
    table, printed = run(tmp_path / "out", "--train-epochs", "1", attack_seconds="60")
    report = Audit.load(tmp_path / "out" / "report.json").contents
    tried = {each["attack"]: each for each in report["attacks"]}
    relearnt = [each for name, each in tried.items() if name.startswith("relearning")]
    assert len(relearnt) == 2 and all(each["result"]["reference"] for each in relearnt)
    assert {"quantisation: 4 bits a row", "linear probe"} <= set(tried)
    assert "membership with shadow models: LiRA and RMIA" in [each["test"] for each in report["not_tested"]]
    assert all(each["attack"] in printed for each in relearnt)
    assert list(table["rows"])[0] == "original" and list(table["rows"])[-1] == table["reference"] == "retrained"
    assert table["rows"]["retrained"]["unlearning_accuracy"] == 100  # it never saw the class
    assert table["rows"]["retrained"]["seconds"] > 0
    assert "average gap" in printed and "'3'" in printed


def test_image_folder_and_model(tmp_path: Path) -> None:
    data = write_image_folder(tmp_path / "photos")
    model = write_model(tmp_path / "model", processor=True)
    gold = write_model(tmp_path / "gold")
    options = [
        "--data",
        data,
        "--model",
        model,
        "--reference",
        gold,
        "--forget-class",
        "two",
        "--target-modules",
        "all-linear",
    ]
    table, printed = run(tmp_path / "out", *options)
    assert table["reference"] == "retrained" and table["rows"]["retrained"]["seconds"] is None
    assert f"'two' with its {PER_CLASS * 3 // 4} training images" in printed
    assert not (tmp_path / "out" / "original").exists()  # the model given is the base
    assert json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(model)


def test_parquet_without_a_reference(tmp_path: Path) -> None:
    data, model = write_parquet(tmp_path / "digits.parquet"), write_model(tmp_path / "model")
    table, printed = run(tmp_path / "out", "--data", data, "--model", model, "--forget-class", "1")
    assert table["reference"] is None and "retrained" not in table["rows"]
    assert "gap" not in printed and "'one'" in printed


# ---- without a process of its own: what is refused, and how classes are matched ----


@pytest.mark.parametrize(
    ("names", "known", "expected"),
    [
        (["one", "two", "zero"], WORDS, [1, 2, 0]),
        (["0", "1", "2"], WORDS, [0, 1, 2]),
        (["0", "1", "10", "2"], [f"LABEL_{i}" for i in range(11)], [0, 1, 10, 2]),
        (["cat", "dog"], ["LABEL_0", "LABEL_1"], [0, 1]),
    ],
)
def test_classes_are_matched_by_name_then_by_number(names: list[str], known: list[str], expected: list[int]) -> None:
    from image_data import match_classes

    model = SimpleNamespace(config=SimpleNamespace(id2label=dict(enumerate(known))))
    classes, shown = match_classes(names, model)
    assert classes == expected
    assert shown[expected[-1]] == (known[expected[-1]] if known == WORDS else names[-1])


def test_folders_called_train_and_test_are_the_split(tmp_path: Path) -> None:
    from image_data import read_images

    for part in ("train", "test"):
        write_image_folder(tmp_path / "data" / part)
    train, test, names = read_images(tmp_path / "data", seed=0)
    assert len(train) == len(test) == len(WORDS) * PER_CLASS
    assert names == sorted(WORDS) and train[0]["image"].size == (8, 8)


def bad_input(folder: Path) -> dict[str, tuple[list[Any], str]]:
    (folder / "nothing").mkdir()
    pq.write_table(pa.table({"text": ["a", "b"]}), folder / "text.parquet")
    few = folder / "few"
    for digit, image in digit_images()[::PER_CLASS]:
        (few / WORDS[digit]).mkdir(parents=True)
        image.save(few / WORDS[digit] / "only.png")
    animals = folder / "animals"
    for number, (digit, image) in enumerate(digit_images()):
        (animals / ["cat", "dog", "cow"][digit]).mkdir(parents=True, exist_ok=True)
        image.save(animals / ["cat", "dog", "cow"][digit] / f"{number}.png")
    data, model = write_image_folder(folder / "photos"), write_model(folder / "model")
    damaged = write_image_folder(folder / "damaged")
    for image_file in damaged.rglob("*.png"):
        image_file.write_bytes(image_file.read_bytes()[:40])
    (folder / "cut.parquet").write_bytes((folder / "text.parquet").read_bytes()[:-20])
    return {
        "no such path": (["--data", folder / "nowhere"], "nowhere is no folder"),
        "empty folder": (["--data", folder / "nothing"], "holds no readable images"),
        "no image column": (["--data", folder / "text.parquet"], "expected images and integer labels"),
        "damaged parquet": (["--data", folder / "cut.parquet"], "holds no readable parquet"),
        "damaged image": (["--data", damaged, "--forget-class", "two"], "cannot be read"),
        "too few": (["--data", few, "--forget-class", "two"], "too few"),
        "no class named": (["--data", data], "none of the classes"),
        "unknown class": (["--data", data, "--forget-class", "seven"], "'seven' is none of the classes ['one'"),
        "index too large": (["--forget-class", "10"], "'10' is none"),
        "no model": (["--model", folder / "nothing"], "no model folder"),
        "other classes": (["--data", animals, "--model", model, "--forget-class", "cat"], "are not those of --model"),
    }


@pytest.mark.parametrize(
    "case",
    ["no such path", "empty folder", "no image column", "damaged parquet", "damaged image", "too few",
     "no class named", "unknown class", "index too large", "no model", "other classes"],
)  # fmt: skip
def test_bad_input(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import forget_class

    options, message = bad_input(tmp_path)[case]
    monkeypatch.setattr(sys, "argv", ["forget_class.py", "--output-dir", str(tmp_path / "out"), *map(str, options)])
    with pytest.raises(SystemExit) as caught:
        forget_class.main()
    assert message in str(caught.value)
