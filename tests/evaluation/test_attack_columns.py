"""The benchmarks' columns of attacks, on images that stand for CIFAR-10's; the methods' own rows would take minutes."""

from __future__ import annotations

import copy
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import CLASSES, Mlp
from peft import get_peft_model
from PIL import Image
from torch.utils.data import TensorDataset

from semu_peft import SemuConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def write_images(folder: Path, split: str, number: int) -> None:
    """Ten classes of coloured noise as CIFAR-10's parquet files have them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, rows = np.random.default_rng(number), []
    for index in range(10 * number):
        colour = np.array([25 * (index % 10), 128, 255 - 25 * (index % 10)])
        pixels = np.clip(colour + rng.integers(-20, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        rows.append({"image": {"bytes": stream.getvalue()}, "label": index % 10})
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")


def lines_of(printed: str, heading: str) -> dict[str, list[str]]:
    """The table under a heading: cells by the name of the row."""
    lines = printed.splitlines()
    start = next(number for number, line in enumerate(lines) if heading in line)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 :] if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows}


def test_an_adapter_is_attacked_as_the_merged_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import attack_columns

    sides = [TensorDataset(torch.randn(12, 6), torch.randint(CLASSES, (12,))) for _ in range(4)]
    model: Any = get_peft_model(Mlp(), SemuConfig(target_modules=["fc1", "head"], r=2, init_weights=False))
    found = attack_columns.attacked(model, *sides, seed=0)
    again = attack_columns.attacked(copy.deepcopy(model).merge_and_unload(), *sides, seed=0)
    assert found == again
    lines = attack_columns.table({"SEMU": {"one": found, "two": again}}).splitlines()
    assert {line.count("|") for line in lines} == {len(attack_columns.HEADS) + 2}
    curve = {"steps": [0, 5, 50], "forget": [0.0, 60.0, 90.0], "retain": [80.0, 70.0, 40.0], "steps_to_half": 5}
    never, known = {**curve, "forget": [0.0, 0.0, 30.0], "steps_to_half": None}, {**curve, "steps_to_half": 0}
    found["relearning"] = [curve | {"area": 50.0}, curve | {"steps_to_half": None, "area": 50.0}]
    again["relearning"] = [never | {"area": 10.0}, known | {"area": 20.0}]
    line = attack_columns.table({"SEMU": {"two": again, "one": found}}).splitlines()[2]
    assert line.startswith("| SEMU | 5, >50 | 30.0 | 40.0 | rest lost, 0 | 35.0 | 40.0 |")


@pytest.mark.slow
def test_cifar10_carries_attack_columns(tmp_path: Path) -> None:
    for split, number in (("train", 30), ("test", 6)):
        write_images(tmp_path / "data", split, number)
    command = [
        sys.executable, BENCHMARKS / "cifar10" / "run.py", "--data", tmp_path / "data", "--task", "class",
        "--classes", 3, "--cache", tmp_path / "cache", "--attacks", "--only", "no method", "--output", tmp_path,
    ]  # fmt: skip
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = lines_of(done.stdout, "half back after, SGD 0.01")
    assert list(rows) == ["retrained (gold)", "original (do nothing)"]
    for cells in rows.values():
        assert len(cells) == 11 and all(re.fullmatch(r">?\d+|rest lost", cells[number]) for number in (0, 3))
        assert all(0 <= float(cell) <= 100 for number, cell in enumerate(cells) if number not in (0, 3))
    found = json.loads((tmp_path / "cifar10_class_attacks.json").read_text())
    assert list(found["attacks"]) == list(found["rows"]) == list(rows)
    refused = subprocess.run(
        [str(word) for word in [*command, "--task", "random"]], capture_output=True, text=True, timeout=100
    )
    assert refused.returncode == 2 and "--task class" in refused.stderr


# In a process of its own: the folders of benchmarks have modules of one name.
CHECKS = """
import dataclasses, json, sys
from pathlib import Path
from run import GOLD, ResultFile
from semu_peft.evaluation import ForgettingMetrics

def refused(act, words):
    try:
        act()
    except SystemExit as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)

path = Path(sys.argv[1], "results.json")
gold = ForgettingMetrics(100.0, 85.0, 81.0, 99.0, trainable_parameters=0, total_parameters=9)
ResultFile(path, {}, adds=False).enter(GOLD, "class 0", gold, None)
second = ResultFile(path, {}, adds=True)
second.enter(GOLD, "class 3", gold, None)
second.enter("SEMU", "class 3", gold, None)
assert list(second.rows) == [GOLD, "SEMU"] and list(second.rows[GOLD]) == ["class 0", "class 3"]
refused(lambda: second.enter(GOLD, "class 0", dataclasses.replace(gold, retain_accuracy=11.0), None), "other models")
assert second.rows[GOLD]["class 0"] == gold
path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": "another"}))
refused(lambda: ResultFile(path, {}, adds=True), "has rows of another with")
ResultFile(path, {}, adds=False).enter(GOLD, "class 3", gold, None)
assert list(ResultFile(path, {}, adds=True).rows[GOLD]) == ["class 3"]
"""


@pytest.mark.slow
def test_rows_of_other_models_or_machines_are_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHECKS, str(tmp_path)]
    done = subprocess.run(command, cwd=BENCHMARKS / "cifar10", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
