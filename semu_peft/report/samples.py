"""Pictures of samples: grids before and after at equal seeds, during training, and along the adapter's scale."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from semu_peft.arguments import check_kind
from semu_peft.concept.sampling import sample_pipeline
from semu_peft.tuner.adapted import semu_layers

from .figure import MARK, TEXT, clipped, finished, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Images = Mapping[str, Tensor]
Texts = Mapping[str, Sequence[str]]
Samples = tuple[Images, Images] | tuple[Texts, Texts]

_INCHES = 0.75  # a sample's width


def plot_samples(
    rows: Mapping[str, Tensor],
    path: str | os.PathLike[str] | None = None,
    *,
    marked: Sequence[str] = (),
    title: str | None = None,
    ax: Axes | None = None,
    dpi: int = 150,
) -> Figure:
    """Draw samples in rows, one row per condition.

    Args:
        rows: Images `(N, channels, height, width)` in [0, 1] by the row's name; one or three channels.
        path: A picture to write; its suffix chooses the format.
        marked: Names of rows to stand out, the forgotten ones.
        title: A line above.
        ax: Axes to draw into instead of a new figure; they are divided.
        dpi: Pixels per inch of a bitmap.

    Returns:
        The figure. Its label, or that of `ax`, describes it for those who do not see it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is no row, images have another shape, or the suffix is no picture format.

    Examples:
        >>> import torch
        >>> from semu_peft.report import plot_samples
        >>> rows = {"a cat": torch.rand(4, 3, 8, 8), "a dog": torch.rand(4, 3, 8, 8)}
        >>> plot_samples(rows, marked=["a cat"]).get_label()
        'Samples of a cat (to be forgotten), a dog.'
    """
    _check_rows(rows)
    return _draw({"": rows}, path, marked, title, ax, dpi)


def plot_before_after(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    path: str | os.PathLike[str] | None = None,
    *,
    marked: Sequence[str] = (),
    title: str | None = None,
    ax: Axes | None = None,
    dpi: int = 150,
) -> Figure:
    """Draw samples of the same conditions and seeds before (left) and after (right) unlearning.

    Args:
        before: Images `(N, channels, height, width)` in [0, 1] of the original model, by the row's name.
        after: Images of the unlearned model, with the same rows.
        path: A picture to write; its suffix chooses the format.
        marked: Names of rows to stand out, the forgotten ones.
        title: A line above.
        ax: Axes to draw into instead of a new figure; they are divided.
        dpi: Pixels per inch of a bitmap.

    Returns:
        The figure. Its label, or that of `ax`, describes it for those who do not see it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The two sides differ in their rows, there is no row, images have another shape, or the suffix is no
            picture format.

    Examples:
        >>> import torch
        >>> from semu_peft.report import plot_before_after
        >>> before = {"a cat": torch.rand(2, 3, 8, 8), "a dog": torch.rand(2, 3, 8, 8)}
        >>> after = before | {"a cat": torch.rand(2, 3, 8, 8)}
        >>> plot_before_after(before, after, marked=["a cat"]).get_label()
        'Samples before and after of a cat (to be forgotten), a dog.'
    """
    _check_rows(before)
    _check_rows(after)
    if list(before) != list(after):
        raise ValueError(
            f"`before` and `after` must have the same rows, got {list(before)} and {list(after)}. Sample the same "
            "conditions from both models."
        )
    return _draw({"before": before, "after": after}, path, marked, title, ax, dpi)


def plot_scales(
    model: nn.Module,
    sample: Callable[[], Mapping[str, Tensor]],
    path: str | os.PathLike[str] | None = None,
    *,
    scales: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5),
    marked: Sequence[str] = (),
    title: str | None = None,
    ax: Axes | None = None,
    dpi: int = 150,
    adapter_name: str = "default",
) -> Figure:
    """Draw the same samples at several scales of the adapter: from the original model (0) over the trained one (1) on.

    Args:
        model: The model with the adapter; its scales are afterwards what they were.
        sample: Draws samples with fixed seeds: one image `(channels, height, width)`, or the first of several, for each
            name.
        path: A picture to write.
        scales: The scales, one column each.
        marked: Names of rows to stand out.
        title: A line above.
        ax: Axes to draw into instead of a new figure; they are divided.
        dpi: Pixels per inch of a bitmap.
        adapter_name: The adapter.

    Returns:
        The figure. Its label, or that of `ax`, describes it for those who do not see it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The model has no such adapter, `sample` draws no images, or the suffix is no picture format.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from semu_peft import SemuConfig
        >>> from semu_peft.report import plot_scales
        >>> config = SemuConfig(target_modules=["0"], r=2, init_weights=False)
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), config)
        >>> def sample():  # a generator whose images the adapter changes
        ...     return {"a cat": model(torch.ones(1, 64)).detach().sigmoid().view(1, 1, 8, 8)}
        >>> plot_scales(model, sample, scales=(0.0, 0.5, 1.0)).get_label()
        'Samples at 0, 0.5, 1 of a cat.'
    """
    layers = semu_layers(model, adapter_name).values()
    before = [layer.scaling[adapter_name] for layer in layers]
    columns: dict[str, list[Tensor]] = {}
    try:
        for scale in scales:
            for layer in layers:
                layer.set_scale(adapter_name, scale)
            for name, images in sample().items():
                columns.setdefault(name, []).append(images[0] if images.dim() == 4 else images)
    finally:
        for layer, scale in zip(layers, before, strict=True):
            layer.set_scale(adapter_name, scale)
    rows = {name: torch.stack(images) for name, images in columns.items()}
    _check_rows(rows)
    return _draw({"": rows}, path, marked, title, ax, dpi, [f"{scale:g}" for scale in scales])


@dataclass
class SampleGrids:
    """Write a grid of samples whenever it is called with a pipeline and a step, always with the same seeds.

    Made for [`Preview`][semu_peft.concept.preview.Preview], as in `Preview(pipe, SampleGrids(...))`: the first call,
    before training, is the left half of all later grids.

    Args:
        folder: Where `step-00000.png` and so on are written.
        forget: Prompts to forget, marked in the grids.
        retain: Prompts to keep.
        samples: Images per prompt.
        seed: Seed of the first image of each prompt; the next has the next seed.
        settings: What the pipeline takes beside: `num_inference_steps`, `guidance_scale`, `height` …

    Examples:
        >>> from semu_peft.report import SampleGrids
        >>> grids = SampleGrids("grids", forget=["a photo of a cat"], samples=2, settings={"num_inference_steps": 20})
        >>> grids.seed  # of the first image of each prompt, at every step
        0
    """

    folder: str | os.PathLike[str]
    forget: Sequence[str]
    retain: Sequence[str] = ()
    samples: int = 4
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first: dict[str, Tensor] = {}

    def __call__(self, pipe: Any, step: int) -> Path:
        """Sample, write the grid of this step, and return its path."""
        prompts = [*self.forget, *self.retain]
        flat = [prompt for prompt in prompts for _ in range(self.samples)]
        seeds = [self.seed + number for _ in prompts for number in range(self.samples)]
        images = sample_pipeline(pipe, flat, seeds=seeds, **self.settings).split(self.samples)
        rows = {prompt or "(no prompt)": part for prompt, part in zip(prompts, images, strict=True)}
        path = Path(self.folder) / f"step-{step:05d}.png"
        marked = [prompt or "(no prompt)" for prompt in self.forget]
        if not self.first:
            self.first = rows
            plot_samples(rows, path, marked=marked, title="before")
        else:
            plot_before_after(self.first, rows, path, marked=marked, title=f"step {step}")
        return path


def read_samples(samples: Any) -> tuple[tuple[Images, Images] | None, tuple[Texts, Texts] | None]:
    """Samples before and after as images or as texts, several of each row; the other of the two is `None`.

    Args:
        samples: Two mappings by the row's name, of images `(N, channels, height, width)`, or of a text or several.

    Raises:
        TypeError: They are not two mappings, or some are neither images nor texts.
        ValueError: The two sides differ in their rows or in the number of a row's texts, or there is none.

    Examples:
        >>> from semu_peft.report.samples import read_samples
        >>> read_samples(({"Where does she live?": "7 Elm Street"}, {"Where does she live?": "I do not know."}))[1]
        ({'Where does she live?': ['7 Elm Street']}, {'Where does she live?': ['I do not know.']})
    """
    if samples is None:
        return None, None
    wanted = "two mappings, before and after, of images or of texts by the row's name"
    mend = "Write `({'a prompt': ['what it wrote']}, {'a prompt': ['what it writes']})`, or give tensors of images."
    check_kind("samples", samples, (tuple, list), wanted, mend)
    for side in samples:
        check_kind("samples", side, Mapping, wanted, mend)
    if len(samples) != 2 or not samples[0]:
        raise ValueError(f"`samples` must be {wanted}, got {len(samples)} with rows {[*map(list, samples)]}. {mend}")
    before, after = samples
    if list(before) != list(after):
        raise ValueError(
            f"`samples` must have the same rows before and after, got {list(before)} and {list(after)}. Sample the "
            "same conditions from both models."
        )
    if all(isinstance(row, Tensor) for side in samples for row in side.values()):
        return (before, after), None
    texts = [{str(name): [row] if isinstance(row, str) else row for name, row in side.items()} for side in samples]
    for name, *rows in zip(texts[0], texts[0].values(), texts[1].values(), strict=True):
        for row in rows:
            check_kind("samples", row, (list, tuple), f"images of every row or texts of every row, so {name!r}", mend)
            for text in row:
                check_kind("samples", text, str, f"a text or several in the row {name!r}", mend)
        if not 0 < len(rows[0]) == len(rows[1]):
            raise ValueError(
                f"`samples` must have as many texts before as after, got {len(rows[0])} and {len(rows[1])} of "
                f"{name!r}. Let both models write equally often."
            )
    return None, (texts[0], texts[1])


def _check_rows(rows: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(images.shape) for name, images in rows.items()}
    if not rows or any(len(shape) != 4 or shape[1] not in (1, 3) or not shape[0] for shape in shapes.values()):
        raise ValueError(f"Rows must be one or more images (N, 1 or 3, height, width), got {shapes}.")


def _draw(
    blocks: Mapping[str, Mapping[str, Tensor]],
    path: str | os.PathLike[str] | None,
    marked: Sequence[str],
    title: str | None,
    ax: Axes | None,
    dpi: int,
    columns: Sequence[str] | None = None,
) -> Figure:
    """Draw blocks of rows side by side, each row as one strip of images."""
    names = list(next(iter(blocks.values())))
    widest = max(len(images) for rows in blocks.values() for images in rows.values())
    label = 0.5 + 0.08 * max(len(clipped(name, 40)) for name in names)
    heading = 0.3 * (bool(title) + (len(blocks) > 1 or columns is not None)) + 0.1
    size = (label + len(blocks) * (widest * _INCHES + 0.15), len(names) * _INCHES + heading)
    figure, axes = panels(ax, size, len(names), len(blocks))
    for column, (block, rows) in enumerate(blocks.items()):
        for row, name in enumerate(names):
            panel = axes[row * len(blocks) + column]
            strip = _strip(rows[name], widest)
            panel.imshow(strip.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            panel.set_yticks([])
            panel.set_xticks([])
            panel.spines[:].set_visible(False)
            if column == 0:
                mark: dict[str, Any] = {"color": MARK, "fontweight": "bold"} if name in marked else {"color": TEXT}
                panel.set_ylabel(clipped(name, 40), rotation=0, ha="right", va="center", fontsize=9, **mark)
            if row == 0 and block:
                panel.set_title(block, fontsize=10, color=TEXT)
            if row == 0 and columns is not None:
                step = strip.shape[1] / widest
                panel.set_xticks([(number + 0.5) * step for number in range(widest)], columns, fontsize=8)
                panel.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    if title and ax is None:
        figure.suptitle(title, fontsize=11)
    shown = ", ".join(f"{name} (to be forgotten)" if name in marked else name for name in names)
    how = " and ".join(filter(None, blocks)) or (f"at {', '.join(columns)}" if columns else "")
    return finished(figure, ax and axes, f"Samples {how}{' ' if how else ''}of {shown}.", path, dpi)


def _strip(images: Tensor, count: int) -> Tensor:
    """Images side by side, `(height, width, channels)`, with a thin gap, filled up with white to `count`."""
    images = images.detach().float().cpu().clamp(0, 1)
    gap = max(1, images.shape[-1] // 16)
    padded = nn.functional.pad(images, (0, gap, 0, gap), value=1.0)
    missing = padded.new_ones(count - len(padded), *padded.shape[1:])
    return torch.cat([padded, missing]).permute(2, 0, 3, 1).flatten(1, 2)
