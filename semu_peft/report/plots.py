"""Pictures of what was forgotten and of where forgetting lives.

Figures are built without pyplot, so that drawing needs no display and touches no global state.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from semu_peft.evaluation.classification import Predictions
from semu_peft.subspace.profile import LayerSpectrum, SubspaceProfile

from .figure import MARK, TEXT, clipped, finished, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

_NUMBERED_CLASSES = 12  # with more classes the numbers no longer fit their cells
_NAMED_TICKS = 30  # with more classes or layers not every one can be named
_ANNOTATED_LAYERS = 40  # with more layers the text behind the bars would overlap
_SMALLEST_SHOWN = 1e-7  # float32 resolves no singular value further below the largest


def plot_confusion(
    before: Predictions,
    after: Predictions,
    path: str | os.PathLike[str] | None = None,
    *,
    class_names: Sequence[str] | None = None,
    forgotten: int | Sequence[int] | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    dpi: int = 150,
) -> Figure:
    """Draw the confusion matrices before and after unlearning side by side.

    Each row is one true class and shows, in percent, as what its examples were classified; the rows of forgotten
    classes are framed and their names bold. Up to 12 classes the numbers stand in the cells, rounded to whole percent.
    A class without examples has a grey row.

    Args:
        before: Predictions of the original model, e.g. on the whole test set.
        after: Predictions of the unlearned model on the same examples, in any order.
        path: A picture to write; its suffix chooses the format (`.png`, `.pdf`, `.svg`).
        class_names: Name of each class; by default its index.
        forgotten: The forgotten class's index, or several.
        ax: Axes to draw into instead of a new figure: one a panel, or a single one that is divided.
        dpi: Pixels per inch of a bitmap. The picture is 12 × 6.2 inches.

    Returns:
        The figure. Its label, or that of `ax`, describes it for those who do not see it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The two are not predictions on the same classes, names or forgotten classes do not fit them, or
            the suffix is no picture format.

    Examples:
        >>> import torch
        >>> from semu_peft.evaluation import Predictions
        >>> from semu_peft.report import plot_confusion
        >>> labels, sure = torch.tensor([0, 0, 1, 1]), torch.ones(4)
        >>> before, after = Predictions(labels, labels, sure, 2), Predictions(labels, torch.ones_like(labels), sure, 2)
        >>> plot_confusion(before, after, forgotten=0).get_label()
        'Confusion before unlearning: accuracy on class 0: 100.0%, on the others: 100.0%. Confusion after unlearning:
        accuracy on class 0: 0.0%, on the others: 100.0%.'
    """
    classes = _number_of_classes(before, after, class_names)
    marked = [] if forgotten is None else list(forgotten) if isinstance(forgotten, Sequence) else [int(forgotten)]
    if not all(0 <= index < classes for index in marked):
        raise ValueError(f"`forgotten` must be class indices from 0 to {classes - 1}, got {forgotten}.")
    counts = [before.confusion(classes), after.confusion(classes)]
    if not torch.equal(counts[0].sum(1), counts[1].sum(1)):
        raise ValueError(
            f"`before` and `after` must be predictions on the same data, got {len(before)} and {len(after)} examples "
            "that differ in how many each class has. Run both models on one loader."
        )
    names = [str(index) for index in range(classes)] if class_names is None else [clipped(name) for name in class_names]

    figure, axes = panels(ax, (12, 6.2), columns=2)
    colours, told = _light_to_dark(), []
    for panel, title, matrix in zip(axes, ("Before unlearning", "After unlearning"), counts, strict=True):
        image = _draw_confusion(panel, matrix, names, marked, colours)
        told.append(_accuracies(matrix, names, marked))
        panel.set_title(f"{title}\n{told[-1]}", fontsize=12, linespacing=1.5, pad=10)
        panel.set_xlabel("predicted class")
    axes[0].set_ylabel("true class")
    if axes[0].figure is axes[1].figure:
        bar = axes[0].figure.colorbar(image, ax=axes, shrink=0.75, aspect=30, pad=0.02)
        bar.set_label("share of the true class's examples (%)")
        bar.outline.set_visible(False)
    texts = [f"Confusion {when} unlearning: {each}." for when, each in zip(("before", "after"), told, strict=True)]
    return finished(figure, ax and axes, texts, path, dpi)


def plot_spectra(
    profile: SubspaceProfile,
    path: str | os.PathLike[str] | None = None,
    *,
    ax: Axes | Sequence[Axes] | None = None,
    dpi: int = 150,
) -> Figure:
    """Draw the spectrum of every layer's forget gradient, and the rank that each layer was given.

    Left, each layer's singular values relative to its largest, one line per layer coloured by depth, with a dot at the
    last direction kept. Where a convolution is read per channel, the line is the root of the squares summed over
    channels. Right, the rank of each layer, its possible rank and the share of the gradient's energy it holds.
    A layer whose gradient is zero has no line. Values below 1e-7 of the largest are float32 noise and not drawn.

    Args:
        profile: What [`initialize_semu_weights`][semu_peft.initialize_semu_weights] returned.
        path: A picture to write; its suffix chooses the format (`.png`, `.pdf`, `.svg`).
        ax: Axes to draw into instead of a new figure: one a panel, or a single one that is divided.
        dpi: Pixels per inch of a bitmap. The picture is 13 inches wide and 5.5 to 10.5 high, by the number of layers.

    Returns:
        The figure. Its label, or that of `ax`, describes it for those who do not see it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The profile has no layers, a layer's singular values are not finite or its rank exceeds their
            number, or the suffix is no picture format.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig, initialize_semu_weights, objectives
        >>> from semu_peft.report import plot_spectra
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 4)), SemuConfig(target_modules=["0"]))
        >>> forget = [(torch.randn(8, 6), torch.arange(8) % 4)]
        >>> profile = initialize_semu_weights(model, forget, objectives.RandomLabel(), progress=False)
        >>> [panel.get_xlabel() for panel in plot_spectra(profile).axes]
        ['index of the singular value', 'rank']
    """
    if not profile.layers:
        raise ValueError("`profile` must have at least one layer, got none. Initialise the adapter on forget data.")
    curves = {name: _normalised_spectrum(name, layer) for name, layer in profile.layers.items()}
    size = (13, min(10.5, max(5.5, 1.6 + 0.22 * len(curves))))
    figure, axes = panels(ax, size, columns=2, width_ratios=[1.15, 1])
    spectra, ranks = axes
    colours = _depth_colours(len(curves))
    _draw_spectra(spectra, profile, curves, colours)
    _draw_ranks(ranks, profile, colours)
    given = profile.ranks.values()
    texts = [
        f"Spectra of the forget gradients of {len(given)} layers, each over its largest singular value.",
        f"Ranks of {len(given)} layers: {min(given)} to {max(given)}, {sum(given)} directions together.",
    ]
    return finished(figure, ax and axes, texts, path, dpi)


def _draw_confusion(ax: Axes, counts: Tensor, names: list[str], marked: list[int], colours: Colormap) -> Any:
    """Draw one matrix of counts `(C, C)` as row percentages, and return the image for the colour bar."""
    from matplotlib.patches import Rectangle

    classes = len(names)
    percent = 100 * counts.double() / counts.sum(1, keepdim=True)  # a class without examples becomes NaN: a grey row
    image = ax.imshow(percent.numpy(), cmap=colours, vmin=0, vmax=100, interpolation="nearest")
    ax.spines[:].set_visible(False)
    if classes <= _NUMBERED_CLASSES:
        for (row, column), value in _cells(percent):
            # What rounds to nothing is there, but pale, so that the eye finds the rest.
            colour = "white" if value > 55 else TEXT if value >= 0.5 else "#b0a89a"
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=10)
        for row in (counts.sum(1) == 0).nonzero().flatten().tolist():
            ax.text((classes - 1) / 2, row, "no examples", ha="center", va="center", color=TEXT, fontsize=10)

    step = 1 if classes <= _NAMED_TICKS else max(1, round(classes / 10))
    # A forgotten class always keeps its name; names next to it make room.
    ticks = sorted({i for i in range(0, classes, step) if all(abs(i - m) >= step / 2 for m in marked)} | set(marked))
    size = 10 if classes <= _NUMBERED_CLASSES else 8
    upright = max(len(name) for name in names) <= 3
    ax.set_xticks(ticks, [names[i] for i in ticks], fontsize=size, rotation=0 if upright else 45)
    if not upright:
        for label in ax.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    ax.set_yticks(ticks, [names[i] for i in ticks], fontsize=size)
    ax.tick_params(length=0 if step == 1 else 3)
    for axis_labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        for index, label in zip(ticks, axis_labels, strict=True):
            if index in marked:
                label.set(color=MARK, fontweight="bold")
    # Where rows are thin the frame is too, and stands off from its row rather than on it.
    line, gap = (2, 0.0) if classes <= _NAMED_TICKS else (0.9, 0.15)
    for index in marked:
        corner, height = (-0.5 - gap, index - 0.5 - gap), 1 + 2 * gap
        ax.add_patch(Rectangle(corner, classes + 2 * gap, height, fill=False, ec=MARK, lw=line, clip_on=False))
    return image


def _draw_spectra(ax: Axes, profile: SubspaceProfile, curves: dict[str, Tensor], colours: list[Any]) -> None:
    """Draw each layer's normalised singular values against their index, and a dot at its rank."""
    many = len(curves) > _NAMED_TICKS
    for (name, curve), colour in zip(curves.items(), colours, strict=True):
        visible = curve[curve >= _SMALLEST_SHOWN]
        rank = profile.layers[name].rank
        ax.plot(range(1, len(visible) + 1), visible, color=colour, lw=0.7 if many else 1.4, alpha=0.5 if many else 0.9)
        if 0 < rank <= len(visible):
            ax.plot(rank, visible[rank - 1], "o", color=colour, ms=4 if many else 6, mec="white", mew=0.6, zorder=3)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    if max(len(curve) for curve in curves.values()) > 20:  # otherwise one step to the right is easier to see
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("index of the singular value")
    ax.set_ylabel("singular value / layer's largest")
    ax.set_title("Spectrum of each layer's forget gradient", loc="left", fontsize=12)
    ax.grid(which="major", color="#e6e6e6", lw=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.text(0.02, 0.02, "● last direction kept", transform=ax.transAxes, fontsize=9, color=TEXT)


def _draw_ranks(ax: Axes, profile: SubspaceProfile, colours: list[Any]) -> None:
    """Draw the layers' ranks as bars, first layer on top, in the colours of their spectra."""
    from matplotlib.ticker import MaxNLocator

    names, layers = list(profile.layers), list(profile.layers.values())
    rows = range(len(layers))
    annotated = len(layers) <= _ANNOTATED_LAYERS
    ax.barh(rows, [layer.rank for layer in layers], color=colours, height=0.8 if len(layers) > 8 else 0.5)
    if annotated:
        for row, layer in enumerate(layers):
            explained = f"{100 * layer.explained_variance:.1f}%" if layer.energy > 0 else "no gradient"
            text = f" {layer.rank} of {min(layer.shape[-2:])} · {explained}"
            ax.text(layer.rank, row, text, va="center", ha="left", fontsize=8, color=TEXT)
    step = 1 if annotated else math.ceil(len(layers) / _NAMED_TICKS)
    ax.set_yticks(rows[::step], [_shortened(name) for name in names[::step]], fontsize=8)
    ax.set_ylim(len(layers) - 0.4, -0.6)
    # Room on the right for the text behind the longest bar.
    ax.set_xlim(0, max(1, *(layer.rank for layer in layers), 1) * (1.4 if annotated else 1.05))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("rank")
    title = "Rank per layer, of the possible rank, and energy kept" if annotated else "Rank per layer"
    ax.set_title(title, loc="left", fontsize=12)
    ax.grid(axis="x", color="#e6e6e6", lw=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)


def _normalised_spectrum(name: str, layer: LayerSpectrum) -> Tensor:
    """Return the layer's singular values over the largest, `(k,)`, float64; empty if all are zero."""
    values = layer.singular_values.detach().cpu().double()
    if values.dim() not in (1, 2) or not values.numel() or not values.isfinite().all() or (values < 0).any():
        raise ValueError(
            f"`profile` must have finite singular values >= 0 of shape (k,) or (channels, k), got others for the layer "
            f"{name}, of shape {tuple(values.shape)}. Initialise the adapter again."
        )
    if not 0 <= layer.rank <= values.shape[-1]:
        raise ValueError(
            f"`profile` must have ranks from 0 to the number of singular values, got {layer.rank} of "
            f"{values.shape[-1]} for the layer {name}. Initialise the adapter again."
        )
    if values.dim() == 2:
        values = values.square().sum(0).sqrt()
    return values / values[0] if values[0] > 0 else values[:0]


def _number_of_classes(before: Predictions, after: Predictions, class_names: Sequence[str] | None) -> int:
    """Return the number of classes that both predictions and the names agree on."""
    for name, predictions in (("before", before), ("after", after)):
        if not len(predictions):
            raise ValueError(f"`{name}` must hold at least one prediction, got none. Predict on its loader first.")
    known = {count for count in (before.num_classes, after.num_classes) if count is not None}
    if len(known) > 1:
        raise ValueError(
            f"`before` and `after` must be of equally many classes, got {before.num_classes} and {after.num_classes}. "
            "Run the same model before and after unlearning."
        )
    seen = max(len(before.confusion()), len(after.confusion()))
    classes = known.pop() if known else max(seen, len(class_names or ()))
    if class_names is not None and len(class_names) != classes:
        raise ValueError(f"`class_names` must be {classes} names, one per class, got {len(class_names)}.")
    return classes


def _accuracies(counts: Tensor, names: list[str], marked: list[int]) -> str:
    """Say in a line how accurate the model is on forgotten and on other classes, or overall."""

    def accuracy(rows: list[int]) -> str:
        total = int(counts[rows].sum())
        return f"{100 * int(counts[rows, rows].sum()) / total:.1f}%" if total else "no examples"

    others = [index for index in range(len(names)) if index not in marked]
    if not marked:
        return f"accuracy {accuracy(others)}"
    title = f"class {names[marked[0]]}" if len(marked) == 1 else f"{len(marked)} forgotten classes"
    return f"accuracy on {title}: {accuracy(marked)}, on the others: {accuracy(others)}"


def _cells(matrix: Tensor) -> list[tuple[tuple[int, int], float]]:
    """List the positions and values of a matrix, without NaN."""
    rows, columns = matrix.shape
    cells = [((row, column), float(matrix[row, column])) for row in range(rows) for column in range(columns)]
    return [(position, value) for position, value in cells if value == value]


def _shortened(name: str, longest: int = 34) -> str:
    """Cut a layer's name at a dot, from the left, where the names of one model are alike."""
    if len(name) <= longest:
        return name
    end = name[-(longest - 1) :]
    return "…" + end[end.find(".") + 1 :]


def _light_to_dark() -> Colormap:
    """Part of reversed magma: perceptually uniform, light where nothing is, dark where white text still stands out."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    colours = ListedColormap(colormaps["magma_r"](torch.linspace(0, 0.8, 256).numpy()))
    return colours.with_extremes(bad="#e0e0e0")


def _depth_colours(count: int) -> list[Any]:
    """One colour per layer along viridis, without its yellow end, which is lost on white."""
    from matplotlib import colormaps

    return list(colormaps["viridis"](torch.linspace(0, 0.88, count).numpy()))
