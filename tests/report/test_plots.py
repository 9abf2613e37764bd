"""Pictures: that they are written whole, in the size promised, and show what they were given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from semu_peft.evaluation import Predictions
from semu_peft.linalg.factorize import SingularFactors
from semu_peft.report import plot_confusion, plot_spectra
from semu_peft.subspace.profile import LayerSpectrum, SubspaceProfile


def predictions(labels: list[int], predicted: list[int], num_classes: int | None = None) -> Predictions:
    return Predictions(torch.tensor(labels), torch.tensor(predicted), torch.zeros(len(labels)), num_classes)


def spectrum(values: list[Any], rank: int, shape: tuple[int, ...] = (8, 8)) -> LayerSpectrum:
    known = torch.tensor(values)
    bases = [known.new_zeros(*known.shape[:-1], size, rank) for size in shape[-2:]]
    return LayerSpectrum(SingularFactors(*bases, known, known.double().square().sum(-1)), rank, shape)


BEFORE = predictions([0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1], 2)
AFTER = predictions([1, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1], 2)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, so that a test can read back what they show (few pixels, for speed)."""
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **(kwargs | {"dpi": 20}))

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_confusion_is_a_readable_picture_of_the_stated_size(tmp_path: Path) -> None:
    path = tmp_path / "new" / "confusion.png"
    plot_confusion(BEFORE, AFTER, str(path), forgotten=0, dpi=50)
    picture = imread(path)
    assert picture.shape[:2] == (310, 600)
    assert np.unique(picture.reshape(-1, picture.shape[2]), axis=0).shape[0] > 20, "the picture is blank"
    assert list(path.parent.iterdir()) == [path]


def test_confusion_shows_row_percentages_and_marks_the_forgotten_class(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_confusion(BEFORE, AFTER, tmp_path / "c.png", class_names=["cat", "dog"], forgotten=0)
    before, after = drawn[0].axes[:2]
    np.testing.assert_allclose(before.images[0].get_array(), [[75, 25], [0, 100]])
    np.testing.assert_allclose(after.images[0].get_array(), [[0, 100], [0, 100]])
    assert before.images[0].get_clim() == after.images[0].get_clim() == (0, 100)
    assert [text.get_text() for text in before.texts] == ["75", "25", "0", "100"]
    assert "accuracy on class cat: 75.0%, on the others: 100.0%" in before.get_title()
    assert "accuracy on class cat: 0.0%, on the others: 100.0%" in after.get_title()
    assert [label.get_fontweight() for label in after.get_yticklabels()] == ["bold", "normal"]
    frame = after.patches[0]
    assert (frame.get_y(), frame.get_height(), frame.get_width()) == (-0.5, 1, 2)


def test_confusion_of_many_classes_has_no_numbers_but_names_the_forgotten(tmp_path: Path, drawn: list[Figure]) -> None:
    many = predictions(list(range(100)), list(range(100)))
    plot_confusion(many, many, tmp_path / "c.png", forgotten=[33, 71])
    ax = drawn[0].axes[0]
    assert not ax.texts
    assert {"33", "71", "0", "90"} <= {label.get_text() for label in ax.get_yticklabels()}
    assert len(ax.get_yticklabels()) < 15
    assert len(ax.patches) == 2
    assert "2 forgotten classes: 100.0%" in ax.get_title()


def test_a_class_without_examples_is_not_shown_as_zero(tmp_path: Path, drawn: list[Figure]) -> None:
    some = predictions([0, 2], [0, 1], 3)
    plot_confusion(some, some, tmp_path / "c.png")
    ax = drawn[0].axes[0]
    assert np.isnan(np.ma.filled(ax.images[0].get_array(), np.nan)[1]).all()
    assert "no examples" in [text.get_text() for text in ax.texts]
    assert "accuracy 50.0%" in ax.get_title()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"after": predictions([0, 1], [0, 1], 2)}, "got 6 and 2 examples that differ in how many"),
        ({"after": predictions([0, 0, 0, 0, 1, 1], [0] * 6, 3)}, "equally many classes, got 2 and 3"),
        ({"before": predictions([], [])}, "^`before` must hold at least one prediction"),
        ({"class_names": ["cat"]}, "`class_names` must be 2 names, one per class, got 1"),
        ({"class_names": ["cat", "dog", "eel"]}, "`class_names` must be 2 names, one per class, got 3"),
        ({"forgotten": 2}, "`forgotten` must be class indices from 0 to 1, got 2"),
        ({"path": "confusion"}, "`path` must end in .* picture format, got ''"),
        ({"path": "confusion.docx"}, "`path` must end in .* got '.docx'"),
    ],
)
def test_confusion_refuses_what_does_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    arguments = {"before": BEFORE, "after": AFTER, "path": "c.png"} | changes
    with pytest.raises(ValueError, match=message):
        plot_confusion(**(arguments | {"path": tmp_path / arguments["path"]}))
    assert not list(tmp_path.iterdir()), "a refused picture must leave no file"


def test_names_beyond_the_classes_seen_are_classes_too(tmp_path: Path, drawn: list[Figure]) -> None:
    unknown = predictions([0, 1], [0, 1])
    plot_confusion(unknown, unknown, tmp_path / "c.png", class_names=["cat", "dog", "eel"])
    assert drawn[0].axes[0].images[0].get_array().shape == (3, 3)


def test_spectra_are_a_readable_picture_of_the_stated_size(tmp_path: Path) -> None:
    layers = {f"layers.{i}.fc": spectrum([8.0, 4.0, 2.0, 1.0], 2) for i in range(3)}
    path = tmp_path / "spectra.png"
    plot_spectra(SubspaceProfile(layers, batches=1), path, dpi=40)
    assert imread(path).shape[:2] == (220, 520)
    assert list(tmp_path.iterdir()) == [path]


def test_spectra_show_normalised_values_and_ranks(tmp_path: Path, drawn: list[Figure]) -> None:
    layers = {
        "fc": spectrum([8.0, 4.0, 2.0, 0.0], 2),
        "conv": spectrum([[3.0, 0.3], [4.0, 0.4]], 1, shape=(2, 16, 2)),
        "dead": spectrum([0.0, 0.0], 1),
    }
    plot_spectra(SubspaceProfile(layers, batches=1), tmp_path / "s.png")
    spectra, ranks = drawn[0].axes[:2]
    fc, fc_rank, conv, conv_rank, dead = spectra.lines
    np.testing.assert_allclose(fc.get_ydata(), [1, 0.5, 0.25])  # a zero has no place on a log scale
    np.testing.assert_allclose(fc_rank.get_xydata(), [[2, 0.5]])
    np.testing.assert_allclose(conv.get_ydata(), [1, 0.1], rtol=1e-6)  # sqrt(9 + 16) = 5, sqrt(0.09 + 0.16) = 0.5
    np.testing.assert_allclose(conv_rank.get_xydata(), [[1, 1]])
    assert len(dead.get_ydata()) == 0
    assert spectra.get_yscale() == "log"
    assert [bar.get_width() for bar in ranks.patches] == [2, 1, 1]
    assert [label.get_text() for label in ranks.get_yticklabels()] == ["fc", "conv", "dead"]
    assert [text.get_text().strip() for text in ranks.texts] == [
        "2 of 8 · 95.2%",
        "1 of 2 · 99.0%",
        "1 of 8 · no gradient",
    ]
    assert ranks.yaxis_inverted(), "the first layer stands on top"
    assert [bar.get_facecolor() for bar in ranks.patches[:2]] == [
        (*line.get_color()[:3], 1.0) for line in (fc, conv)
    ], "bars are the legend of the lines"


def test_spectra_of_many_layers_name_only_some(tmp_path: Path, drawn: list[Figure]) -> None:
    layers = {f"model.layers.{i}.self_attn.projection_of_query": spectrum([2.0, 1.0], 1) for i in range(45)}
    plot_spectra(SubspaceProfile(layers, batches=1), tmp_path / "s.png")
    spectra, ranks = drawn[0].axes[:2]
    assert len(ranks.patches) == 45
    assert len(spectra.lines) == 90
    assert not ranks.texts
    labels = [label.get_text() for label in ranks.get_yticklabels()]
    assert len(labels) <= 30
    assert max(map(len, labels)) <= 34
    assert labels[0].startswith("…")
    assert labels[0].endswith("projection_of_query")
    assert drawn[0].get_size_inches()[1] == 10.5


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "`profile` must have at least one layer"),
        ({"fc": spectrum([1.0, float("nan")], 1)}, "finite singular values .* layer fc, of shape"),
        ({"fc": spectrum([1.0, -1.0], 1)}, "finite singular values >= 0"),
        ({"fc": spectrum([[[1.0]]], 1)}, r"of shape \(1, 1, 1\)"),
        ({"fc": spectrum([2.0, 1.0], 3)}, "got 3 of 2 for the layer fc"),
    ],
)
def test_spectra_refuse_malformed_profiles(tmp_path: Path, layers: dict[str, LayerSpectrum], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_spectra(SubspaceProfile(layers, batches=1), tmp_path / "s.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[report\]"'):
        plot_confusion(BEFORE, AFTER, tmp_path / "c.png")


def test_no_global_state_is_touched(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_confusion(BEFORE, AFTER, tmp_path / "c.png")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


@pytest.mark.slow
def test_importing_evaluation_and_report_pulls_in_no_extras() -> None:
    code = "import sys, semu_peft.report; print({'matplotlib', 'sklearn.svm', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
