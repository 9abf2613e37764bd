"""Gaps to the retrained model, the table, and the file it is kept in."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semu_peft.evaluation import ForgettingComparison, ForgettingMetrics
from semu_peft.files import written_whole

GOLD = ForgettingMetrics(100.0, 91.7, 87.6, 100.0, trainable_parameters=270_000, total_parameters=270_000)
SEMU = ForgettingMetrics(
    98.6, 90.4, 85.8, 100.0, 54, 270_054, forgotten_test_accuracy=1.5, seconds=12.34, adapter_bytes=20_480
)
ORIGINAL = ForgettingMetrics(5.8, 91.1, 86.3, 19.4, trainable_parameters=0, total_parameters=270_000)

percent = st.floats(0, 100)
metrics = st.builds(
    ForgettingMetrics,
    percent,
    percent,
    percent,
    percent,
    trainable_parameters=st.integers(0, 10**9),
    total_parameters=st.integers(0, 10**12),
    forgotten_test_accuracy=st.none() | percent,
    seconds=st.none() | st.floats(0, 1e9),
    adapter_bytes=st.none() | st.integers(0, 10**12),
)


def comparison() -> ForgettingComparison:
    return ForgettingComparison({"retrained": GOLD, "original": ORIGINAL, "SEMU": SEMU}, reference="retrained")


def test_gaps_by_hand() -> None:
    gaps = SEMU.gaps(GOLD)
    assert list(gaps) == ["unlearning_accuracy", "retain_accuracy", "test_accuracy", "membership_inference"]
    assert list(gaps.values()) == pytest.approx([-1.4, -1.3, -1.8, 0])
    assert SEMU.average_gap(GOLD) == pytest.approx((1.4 + 1.3 + 1.8 + 0) / 4)
    assert ORIGINAL.average_gap(GOLD) == pytest.approx((94.2 + 0.6 + 1.3 + 80.6) / 4)


@given(metrics, metrics)
def test_average_gap_is_a_distance(one: ForgettingMetrics, other: ForgettingMetrics) -> None:
    assert one.average_gap(one) == 0
    assert 0 <= one.average_gap(other) == other.average_gap(one) <= 100


def test_trainable_share() -> None:
    assert SEMU.trainable_share == pytest.approx(100 * 54 / 270_054)
    assert ForgettingMetrics(0, 0, 0, 0, 0, 0).trainable_share == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("unlearning_accuracy", -0.1),
        ("test_accuracy", 100.1),
        ("membership_inference", float("nan")),
        ("forgotten_test_accuracy", 101),
        ("seconds", float("inf")),
        ("adapter_bytes", -1),
    ],
)
def test_impossible_metrics_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^`{name}` must be .*, got {value}"):
        dataclasses.replace(SEMU, **{name: value})


def test_plain_text_table() -> None:
    lines = str(comparison()).splitlines()
    assert lines[0].split("  ")[0].strip() == "model"
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[:-1]]
    assert cells[0][1:] == [
        *("UA", "RA", "TA", "MIA", "forgotten TA", "average gap", "trained", "trained %", "bytes", "seconds")
    ]
    assert cells[2] == [
        *("retrained (reference)", "100.00", "91.70", "87.60", "100.00", "-", "0.00", "270,000", "100", "-", "-")
    ]
    assert cells[3] == ["original", "5.80", "91.10", "86.30", "19.40", "-", "44.17", "0", "0", "-", "-"]
    assert cells[4] == [*("SEMU", "98.60", "90.40", "85.80", "100.00", "1.50", "1.12", "54", "0.02", "20,480", "12.3")]
    assert len({len(line) for line in lines[:-1]}) == 1, "every line of the table must be equally wide"
    assert "'retrained'" in lines[-1]


def test_columns_that_no_row_has_are_left_out() -> None:
    table = str(ForgettingComparison({"gold": GOLD, "original": ORIGINAL}, "gold"))
    for title in ("bytes", "seconds", "forgotten TA"):
        assert title not in table
    timed = dataclasses.replace(ORIGINAL, seconds=0.0)
    assert "seconds" in str(ForgettingComparison({"gold": GOLD, "original": timed}, "gold"))


def test_markdown_table() -> None:
    lines = ForgettingComparison({"gold": GOLD, "a\n|b": SEMU}, "gold").to_markdown().splitlines()
    assert lines[0].startswith("| model | UA | RA | TA | MIA |")
    assert lines[1].startswith("| --- | ---: | ---: |")
    assert lines[3].startswith("| a \\|b | 98.60 | 90.40 | 85.80 | 100.00 |")
    assert len({line.replace("\\|", "").count("|") for line in lines[:4]}) == 1
    assert lines[4] == ""


@settings(max_examples=30)
@given(st.dictionaries(st.text(), metrics, min_size=1, max_size=4), st.data())
def test_what_is_saved_is_what_is_loaded(rows: dict[str, ForgettingMetrics], data: st.DataObject) -> None:
    saved = ForgettingComparison(rows, reference=data.draw(st.sampled_from(list(rows))))
    with TemporaryDirectory() as folder:
        loaded = ForgettingComparison.load(saved.save(Path(folder) / "new folder" / "comparison.json"))
    assert loaded == saved
    assert list(loaded.rows) == list(rows)


def test_saving_leaves_nothing_but_the_file(tmp_path: Path) -> None:
    path = comparison().save(str(tmp_path / "comparison.json"))
    assert list(tmp_path.iterdir()) == [path]
    assert json.loads(path.read_text())["reference"] == "retrained"


def test_an_interrupted_write_keeps_the_file_before_it(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("whole")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as temporary:
        temporary.write_text("ha")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "whole"


def test_rows_are_metrics_of_one_model_each() -> None:
    """Or printing them would say that a `dict` has no such attribute."""
    one = ForgettingMetrics(1.0, 2.0, 3.0, 4.0, 5, 6)
    strange: list[Any] = [[one] * 2, {"unlearning_accuracy": 1.0}]
    for row in strange:
        with pytest.raises(TypeError, match=r"^`rows\['a'\]` must be what `evaluate_forgetting` returned, got "):
            ForgettingComparison({"a": row}, "a")
    with pytest.raises(TypeError, match="^`rows` must be metrics by name, got list"):
        ForgettingComparison(strange[0], "a")


def test_a_missing_reference_is_named() -> None:
    with pytest.raises(ValueError, match=r"^`reference` must be one of the rows \['SEMU'\], got 'gold'"):
        ForgettingComparison({"SEMU": SEMU}, reference="gold")
    changed = comparison()
    del changed.rows["retrained"]
    with pytest.raises(ValueError, match="^`reference` must be .* got 'retrained'"):
        str(changed)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"format": "another", "reference": "a", "rows": {}}',
        '{"format": "semu_peft.ForgettingComparison", "reference": "a", "rows": {"a": {"unknown": 1}}}',
        '{"format": "semu_peft.ForgettingComparison", "reference": "a", "rows": {}}',
    ],
)
def test_files_that_are_no_comparison(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="must be a file that `ForgettingComparison.save` wrote, got .*broken.json"):
        ForgettingComparison.load(path)
    path.write_bytes(b"\xff" + content.encode())
    with pytest.raises(ValueError, match="must be a file that `ForgettingComparison.save` wrote"):
        ForgettingComparison.load(path)
    with pytest.raises(FileNotFoundError):
        ForgettingComparison.load(tmp_path / "absent.json")
