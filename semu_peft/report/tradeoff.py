"""The trade-off of a run: how much was forgotten for how much damage, step by step."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from semu_peft.training.unlearn import UnlearnResult

from .figure import COLOURS, DASHES, TEXT, finished, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LONGEST = 48  # signs of a line under the picture
_WORDS = {
    "answer_probability": "probability of what was forgotten",
    "forget_loss": "forget loss",
    "retain_loss": "retain loss",
    "loss": "loss",
    "kl": "KL of a step, nats",
}


def plot_tradeoff(
    results: UnlearnResult | Mapping[str, UnlearnResult],
    path: str | os.PathLike[str] | None = None,
    *,
    forgetting: str | None = None,
    damage: str = "damage",
    ax: Axes | None = None,
    dpi: int = 150,
) -> Figure:
    """Draw forgetting against damage over the steps of one or several runs; the dot is where a run was left.

    The damage is that of retain data, or of a run without any that of the other answers to the forget data.
    A run by natural gradients records both where it has a damage budget (`max_retain_kl`) or a choice to make
    (`choose`), which takes one of the points drawn, and where an objective asks the original anyway.

    Args:
        results: What [`unlearn`][semu_peft.training.unlearn.unlearn] returned, or several by name.
        path: A picture to write; its suffix chooses the format (`.png`, `.pdf`, `.svg`).
        forgetting: The entry of the history to draw upwards; lower is more forgotten. By default the probability of
            the answers, or where a run tells of none (a denoiser has no answers) the loss on the forget data.
        damage: The entry to draw to the right.
        ax: Axes to draw into instead of a new figure.
        dpi: Pixels per inch of a bitmap. The picture is 7 × 5 inches.

    Returns:
        The figure. Its label, or that of `ax`, describes it for those who do not see it.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `results` is something else.
        ValueError: There is no run, a history lacks one of the two entries, or the suffix is no picture format.

    Examples:
        >>> from semu_peft.report import plot_tradeoff
        >>> points = [{"damage": 0.0, "answer_probability": 0.9}, {"damage": 0.01, "answer_probability": 0.1}]
        >>> result = UnlearnResult(points, 1, 64, 81, 0.5, True, "the forget data are forgotten")
        >>> plot_tradeoff(result).get_label()
        'Probability of what was forgotten against damage: KL(original ‖ now) on the other answers to the forget data,
        nats. Ends at 0.1, for 0.01.'
    """
    by_name = _by_name(results)
    if forgetting is None:
        forgetting = forgetting_of(*by_name.values())
    if not by_name:
        raise ValueError("`results` must hold at least one run, got none. Give what `unlearn` returned.")
    figure, [panel] = panels(ax, (7, 5))
    ends = []
    for index, (name, result) in enumerate(by_name.items()):
        horizontal, vertical = _columns(result, name, damage, forgetting)
        look: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}
        panel.plot(horizontal, vertical, lw=1.5, marker=".", ms=4, label=name, **look)
        panel.plot(horizontal[-1:], vertical[-1:], color=look["color"], marker="o", ms=9)
        ends.append(f"{name or 'Ends'}{':' if name else ''} at {vertical[-1]:.3g}, for {horizontal[-1]:.3g}.")
    words = [_WORDS.get(key, key) for key in (forgetting, damage)]
    if damage == "damage":
        words[1] = _words_of_damage(list(by_name.values()))
    panel.set_xlabel(textwrap.fill(words[1], _LONGEST), color=TEXT)
    panel.set_ylabel(words[0], color=TEXT)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#e6e6e6", lw=0.8)
    if any(by_name):
        panel.legend(frameon=False)
    text = f"{words[0][0].upper()}{words[0][1:]} against {words[1]}. {' '.join(ends)}"
    return finished(figure, ax, text, path, dpi)


def plot_losses(
    results: UnlearnResult | Mapping[str, UnlearnResult],
    path: str | os.PathLike[str] | None = None,
    *,
    ax: Axes | None = None,
    dpi: int = 150,
) -> Figure:
    """Draw the losses over the steps of one or several runs, those on forget and on retain data where both are known.

    Args:
        results: What [`unlearn`][semu_peft.training.unlearn.unlearn] returned, or several by name.
        path: A picture to write; its suffix chooses the format (`.png`, `.pdf`, `.svg`).
        ax: Axes to draw into instead of a new figure.
        dpi: Pixels per inch of a bitmap. The picture is 7 × 5 inches.

    Returns:
        The figure. Its label, or that of `ax`, describes it for those who do not see it.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `results` is something else.
        ValueError: There is no run or no step, or the suffix is no picture format.

    Examples:
        >>> from semu_peft.report import plot_losses
        >>> steps = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.5}]
        >>> plot_losses(UnlearnResult(steps, 2, 64, 81, 0.5, True, "the loss no longer falls")).get_label()
        'Losses over the steps. Loss: 2 to 0.5.'
    """
    by_name = _by_name(results)
    lines = {
        " ".join(filter(None, [name, _WORDS[key]])): [entry[key] for entry in result.history if key in entry]
        for name, result in by_name.items()
        for key in _losses(result)
    }
    if not lines:
        raise ValueError("`results` must hold at least one run with a step, got none. Give what `unlearn` returned.")
    figure, [panel] = panels(ax, (7, 5))
    for index, (name, values) in enumerate(lines.items()):
        look: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}
        panel.plot(range(1, len(values) + 1), values, lw=1.5, marker=".", ms=4, label=name, **look)
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("step", color=TEXT)
    panel.set_ylabel("loss", color=TEXT)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#e6e6e6", lw=0.8)
    panel.legend(frameon=False)
    told = "; ".join(f"{name[0].upper()}{name[1:]}: {v[0]:.3g} to {v[-1]:.3g}" for name, v in lines.items())
    return finished(figure, ax, f"Losses over the steps. {told}.", path, dpi)


def is_of_retain_data(history: Iterable[Mapping[str, float]]) -> bool:
    """Whether a run's damage is that of retain data; without any it is that of the other answers to the forget data.

    Examples:
        >>> from semu_peft.report.tradeoff import is_of_retain_data
        >>> is_of_retain_data([{"loss": 1.0, "damage": 0.1}])
        False
    """
    return any("retain_loss" in entry for entry in history)


def is_in_nats(history: Iterable[Mapping[str, float]]) -> bool:
    """Whether a run's damage is a divergence of probabilities; a denoiser's is a squared error.

    Examples:
        >>> from semu_peft.report.tradeoff import is_in_nats
        >>> is_in_nats([{"loss": 1.0, "damage": 0.1, "answer_probability": 0.5}])
        True
    """
    return any("answer_probability" in entry for entry in history)


def _by_name(results: Any) -> dict[str, UnlearnResult]:
    if isinstance(results, UnlearnResult):
        return {"": results}
    if not isinstance(results, Mapping) or not all(isinstance(each, UnlearnResult) for each in results.values()):
        raise TypeError(
            f"`results` must be what `unlearn` returned, or a dictionary of several by name, got {results!r:.80}. "
            "Write `{'first': result, ...}`."
        )
    return dict(results)


def _words_of_damage(results: Sequence[UnlearnResult]) -> str:
    in_nats = all(is_in_nats(result.history) for result in results)
    others = "the other answers to" if in_nats else "the other conditions of"
    usual = {False: f"{others} the forget data", True: "retain data"}
    on = dict.fromkeys(result.damage_on or usual[is_of_retain_data(result.history)] for result in results)
    what = "KL(original ‖ now)" if in_nats else "distance from the original"
    return f"damage: {what} on {' or '.join(on)}{', nats' if in_nats else ''}"


def forgetting_of(*results: UnlearnResult) -> str:
    """The entry of all these runs that tells how much is forgotten.

    Args:
        *results: What [`unlearn`][semu_peft.training.unlearn.unlearn] returned.

    Examples:
        >>> from semu_peft.report.tradeoff import forgetting_of
        >>> forgetting_of(UnlearnResult([{"step": 1, "loss": 0.5}], 1, 64, 81, 0.5, True, "stopped by a callback"))
        'loss'
    """
    keys = "answer_probability", "forget_loss"
    return next((key for key in keys if all(_knows(result, key) for result in results)), "loss")


def has_losses(result: UnlearnResult) -> bool:
    """Whether `plot_losses` has something to draw of a run.

    Examples:
        >>> has_losses(UnlearnResult([{"step": 1, "damage": 0.1}], 1, 64, 81, 0.5, True, "stopped by a callback"))
        False
    """
    return bool(_losses(result))


def _losses(result: UnlearnResult) -> list[str]:
    """The two sides of the loss where most steps know them, else the loss; the last entry may know more than others."""
    both = ["forget_loss", "retain_loss"]
    return (
        both
        if all(_knows(result, key) for key in both)
        else ["loss"]
        if any("loss" in entry for entry in result.history)
        else []
    )


def _knows(result: UnlearnResult, key: str) -> bool:
    return sum(key in entry for entry in result.history) > len(result.history) / 2


def _columns(result: UnlearnResult, name: str, *keys: str) -> list[list[float]]:
    known = {each for entry in result.history for each in entry}
    missing = [key for key in keys if key not in known]
    if missing:
        raise ValueError(
            f"`results` must be runs whose history has {missing[0]!r}, got {sorted(known)} in the run {name!r}. "
            "Unlearn with `max_retain_kl`, or name two of these as `forgetting` and `damage`."
        )
    whole = [entry for entry in result.history if all(key in entry for key in keys)]
    if not whole:
        raise ValueError(
            f"`results` must be runs with steps that have both {' and '.join(map(repr, keys))}, got none in the run "
            f"{name!r}. Name two other entries as `forgetting` and `damage`."
        )
    return [[entry[key] for entry in whole] for key in keys]
