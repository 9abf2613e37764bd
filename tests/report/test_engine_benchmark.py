"""The engine's benchmark on a GPU, tried where there is none: it measures, stops in time and completes its table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "engine" / "gpu.py"


def run(output: Path, *arguments: str) -> dict[str, dict[str, object]]:
    command = [
        sys.executable, str(SCRIPT), "--subjects", "unet-tiny", "--batches", "1", "--steps", "1", "--sketch-size", "8",
        "--backend", "eager", "--output", str(output), *arguments,
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    return json.loads(output.read_text())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a table of tiny models says nothing on a GPU")
def test_a_table_is_made_and_completed(tmp_path: Path) -> None:
    output = tmp_path / "engine_gpu.json"
    first = run(output)["unet-tiny"]
    assert len(first) == 4 + 8 + 1, "the floor and three extractions, eight steps, the table"
    ratio = first["exact, 1 batches"]["seconds"] / first["floor pass, 1 batches"]["seconds"]
    assert f"| extraction / floor, exact, 1 batches | {ratio:.2f} |" in "\n".join(first["table"])
    document = json.loads(output.read_text())
    del document["unet-tiny"]["semu step, rank 64, eager"]
    output.write_text(json.dumps(document))
    late = run(output, "--seconds", "0")["unet-tiny"]
    assert "semu step, rank 64, eager" not in late, "no time left"
    again = run(output)["unet-tiny"]
    assert "semu step, rank 64, eager" in again
    assert again["floor pass, 1 batches"] == first["floor pass, 1 batches"], "measured once"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a table of tiny models says nothing on a GPU")
def test_a_transformer_like_flux_is_measured_as_the_others(tmp_path: Path) -> None:
    measured = run(tmp_path / "engine_gpu.json", "--subjects", "flux-tiny", "--no-compile")["flux-tiny"]
    figures = {name: figure for name, figure in measured.items() if name != "table"}
    assert len(figures) == 4 + 4 and all("seconds" in figure for figure in figures.values())


@pytest.mark.slow
def test_operations_grow_with_the_layers_and_waits_do_not(tmp_path: Path) -> None:
    output = tmp_path / "operations.json"
    script = SCRIPT.with_name("operations.py")
    subprocess.run(
        [sys.executable, str(script), "--layers", "1", "3", "--output", str(output)], check=True, capture_output=True,
        timeout=200,
    )  # fmt: skip
    document = json.loads(output.read_text())
    for kind, (one, three, _) in ((kind, each.values()) for kind, each in document["counts"].items()):
        assert 0 < one["operations"] < three["operations"], kind
        if "layers of 96" in kind or "sketches" in kind:  # on the larger ones another block may be needed
            assert one["waits"] == three["waits"] and one["decompositions"] == three["decompositions"]
            assert (one["decompositions"] == 0) == ("again" in kind)
        if "step" in kind:
            assert one["waits"] == three["waits"] == one["decompositions"] == 0
    assert len(document["table"]) == 2 + len(document["counts"])
