"""A benchmark that goes on where it was interrupted does so for the same question alone."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "deep_forgetting.py"


@pytest.fixture(scope="module")
def benchmark() -> Any:

    spec = importlib.util.spec_from_file_location("deep_forgetting_of_digits", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_rows_of_other_classes_or_seeds_are_not_averaged_in(benchmark: Any, tmp_path: Path) -> None:
    path, asked = tmp_path / "rows.partial", {"classes": [3], "seeds": [0], "models": None}
    begun = benchmark.resumed(path, asked)
    begun["rows"]["a way"] = {"class 3, seed 0": {"seconds": 1.0}}
    benchmark.write(path, begun)
    assert benchmark.resumed(path, asked)["rows"] == begun["rows"]
    with pytest.raises(SystemExit, match=r"was made with .*\[0\].* got .*\[0, 1\].* Give another `--output`"):
        benchmark.resumed(path, {**asked, "seeds": [0, 1]})
    path.write_text(json.dumps(begun["rows"]))  # as it was written before settings stood in it
    with pytest.raises(SystemExit, match="other settings"):
        benchmark.resumed(path, asked)
