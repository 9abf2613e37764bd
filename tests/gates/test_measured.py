"""The documentation's table of gates says what the benchmark has measured."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_is_the_file() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "gates.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "gates.md").read_text(encoding="utf-8").split("## How well they tell")[1]
    rows = [line.split(" | ")[1:] for line in page.splitlines() if line.startswith(("| `Nearest`", "| `linear_gate`"))]
    expected = [
        [f"{100 * row[name]:.1f}%" for name in ("forget", "paraphrased", "others")] + [f"{row['seconds']:.0f} |"]
        for row in measured["rows"].values()
    ]
    assert rows == expected
    assert set(measured["retrieval"]["forget"].values()) == {1.0}
    assert all(f"{100 * share:.1f}%" in page for share in measured["retrieval"]["paraphrased"].values())
