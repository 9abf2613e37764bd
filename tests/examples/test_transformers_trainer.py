"""The Trainer example: the program as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_the_program(tmp_path: Path) -> None:
    """It forgets the digit, keeps the others, and writes the adapter and the merged model."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "transformers_trainer.py"), "--output_dir", str(tmp_path), "--use_cpu",
         "--disable_tqdm", "true"], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("unlearned"))
    forgotten, kept = (float(word.rstrip("%")) for word in line.split() if word.endswith("%"))
    assert forgotten < 5 and kept > 90
    assert (tmp_path / "adapter_config.json").is_file() and (tmp_path / "merged" / "config.json").is_file()
