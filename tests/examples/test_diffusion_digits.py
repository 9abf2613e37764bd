"""The diffusion example runs as a program, and reads digits, image folders and parquet files."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

FOLDER = Path(__file__).parents[2] / "examples" / "diffusion_digits"


@pytest.fixture
def digit_data(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    import digit_data

    yield digit_data
    sys.modules.pop("digit_data")


def test_digits_at_two_sizes_are_the_same_images(digit_data: Any) -> None:
    train, test, names = digit_data.load_images(None, 8, 0)
    larger, _, _ = digit_data.load_images(None, 16, 0)
    assert len(train.images) + len(test.images) == len(load_digits().images) and names[3] == "three"
    assert train.images.shape[1:] == (1, 8, 8) and larger.images.shape[1:] == (1, 16, 16)
    assert torch.equal(train.labels, larger.labels) and 0 <= train.images.min() <= train.images.max() <= 1
    assert (torch.nn.functional.avg_pool2d(larger.images, 2) - train.images).abs().mean() < 0.1


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_own_images(form: str, digit_data: Any, tmp_path: Path) -> None:
    colours = {"cat": (255, 0, 0), "dog": (0, 0, 255)}
    rows = []
    for label, (name, colour) in enumerate(colours.items()):
        for number in range(10):
            picture = Image.new("RGB", (20, 20), colour)
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG")
            rows.append({"img": {"bytes": buffer.getvalue(), "path": None}, "label": label})
            if form == "folder":
                (tmp_path / name).mkdir(exist_ok=True)
                picture.save(tmp_path / name / f"{number}.png")
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    train, test, names = digit_data.load_images(tmp_path, None, 0)
    assert names == (list(colours) if form == "folder" else ["class0", "class1"])
    assert train.images.shape == (16, 3, 16, 16) and len(test.labels) == 4
    assert (train.images[train.labels == 0][:, 0] == 1).all() and (train.images[train.labels == 1][:, 2] == 1).all()
    with pytest.raises(SystemExit, match="--data"):
        digit_data.load_images(tmp_path / "missing", None, 0)


@pytest.mark.slow
def test_the_program_runs_and_every_route_draws_the_same(tmp_path: Path) -> None:
    def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", str(FOLDER / "forget_digit.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})

    quick = [
        "--train-steps",
        3,
        "--max-steps",
        2,
        "--samples",
        3,
        "--num-inference-steps",
        2,
        "--output-dir",
        tmp_path / "out",
    ]
    done = run(*quick)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert len(rows) == 8
    for kind in ("class", "text"):
        semu, lora = rows[f"{kind}-conditional, SEMU"], rows[f"{kind}-conditional, LoRA of equal size"]
        assert 0 < lora["trained"] <= semu["trained"] and semu["share"] < 1
    proofs = json.loads((tmp_path / "out" / "text_conditional" / "proofs.json").read_text())
    assert len(proofs) == 8
    for path in ("class_conditional/samples.png", "text_conditional/scales.png", "text_conditional/lora"):
        assert (tmp_path / "out" / path).exists()
    again = run("--models", tmp_path / "out", "--no-baselines", *quick[:-1], tmp_path / "again")
    assert again.returncode == 0, again.stderr[-2000:]
    assert len(json.loads((tmp_path / "again" / "metrics.json").read_text())) == 4
    wrong = run(*quick, "--forget-class", "ten")
    assert wrong.returncode == 1 and "--forget-class" in wrong.stderr
