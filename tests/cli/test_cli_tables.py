"""Tables of numbers in terminals of any width, and where no terminal is."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from semu_cli import app
from semu_cli.tables import Numbers

# As layers of a U-Net are called, and numbers as `semu inspect` has them.
NAMES = [f"down_blocks.0.attentions.{number}.transformer_blocks.0.attn2.to_k" for number in range(3)]
HEADS = ("shape", "rank of the correction", "‖ΔW‖", "energy")
ROWS = [(name, "1280×768", str(number), "0.06398", "16.1%") for number, name in enumerate(NAMES)]


def printed(width: int) -> str:
    written = io.StringIO()
    Console(file=written, width=width, soft_wrap=True).print(Numbers("layer", HEADS, ROWS))
    return written.getvalue()


@pytest.mark.parametrize("width", [20, 40, 60, 72, 80, 90, 100, 200])
def test_no_number_and_no_name_is_cut_at_any_width(width: int) -> None:
    shown = printed(width)
    assert "…" not in shown
    assert shown.count("1280×768") == shown.count("0.06398") == shown.count("16.1%") == len(NAMES)
    rows = [line for line in shown.splitlines() if line.startswith(("│", "┃"))]
    assert all(len(row) <= width for row in rows) and bool(rows) == (width >= 72)
    column = "".join(row.split("│")[1].strip() if "│" in row else "" for row in rows) or shown
    assert all(name in column for name in NAMES)  # in pieces, one below the other, or whole


def test_headings_are_wrapped_before_names() -> None:
    assert "rank of the correction" in printed(200) and "rank of the correction" not in printed(110)
    assert all(name in printed(110) for name in NAMES)


def test_what_is_no_terminal_gets_a_line_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from peft import get_peft_model

    from semu_peft import SemuConfig

    name = "transformer_blocks_with_a_name_that_does_not_end_" * 3
    model = torch.nn.Sequential()
    model.add_module(name, torch.nn.Linear(4, 3))
    get_peft_model(model, SemuConfig(target_modules=[name], r=2, init_weights=False)).save_pretrained(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    for more in ([], ["--json"]):  # then in words on stderr
        told = CliRunner().invoke(app, ["inspect", "--adapter", str(tmp_path), *more]).output
        lines = [line for line in told.splitlines() if line.startswith(f"│ {name}")]
        assert lines and re.fullmatch(rf"│ {name} │ 3×4 +│ 2 +│ \S+ +│ \S+ +│ \S+% +│", lines[0])
