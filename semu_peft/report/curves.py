"""Curves of attacks: what comes back while somebody trains the model, and what each layer still tells a probe."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .figure import COLOURS, DASHES, TEXT, clipped, finished, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AXES = {
    "relearning": ("steps of the attacker", "known again"),
    "probe": ("layer, from the input on", "read by a probe"),
}


@dataclass(frozen=True)
class AttackCurve:
    """An attack as a curve, beside the same attack on a reference.

    Attributes:
        name: The attack.
        kind: `"relearning"`, over steps, or `"probe"`, over layers.
        across: The steps, or the layers' positions.
        found: Of the model.
        reference: Of the reference; empty without one.
        unit: Of the values.

    Examples:
        >>> from semu_peft.evaluation import TextRelearning
        >>> from semu_peft.report.curves import AttackCurve
        >>> AttackCurve.of(TextRelearning("Adam 0.0001", (0, 10), (0.01, 0.06), (0.01, 0.05)))
        AttackCurve(name='Adam 0.0001', kind='relearning', across=(0, 10), found=(0.01, 0.06), reference=(0.01, 0.05),
        unit='probability')
    """

    name: str
    kind: str
    across: tuple[float, ...]
    found: tuple[float, ...]
    reference: tuple[float, ...] = ()
    unit: str = "%"

    @classmethod
    def of(cls, result: Any, name: str = "") -> AttackCurve | None:
        """Read an attack's result; `None` where it is no curve."""
        steps: Any = getattr(result, "steps", None)
        layers: Any = getattr(result, "layers", None)
        for part, unit in (("forget", "%"), ("probability", "probability")):
            found: Any = getattr(result, part, None)
            if _fit(steps, found):
                beside = getattr(result, "reference", None) or getattr(result, "gold", ())
                reference = getattr(beside, part, beside)
                title = name or getattr(result, "attacker", type(result).__name__)
                return cls(str(title), "relearning", tuple(steps), tuple(found), _as_curve(reference, steps), unit)
        found = getattr(result, "found", None)
        if _fit(layers, found):
            title = name or getattr(result, "kind", type(result).__name__)
            reference = _as_curve(getattr(result, "reference", ()), layers)
            return cls(str(title), "probe", tuple(range(len(layers))), tuple(found), reference)
        return None


def plot_attack(
    results: Any | Sequence[Any],
    path: str | os.PathLike[str] | None = None,
    *,
    ax: Axes | None = None,
    dpi: int = 150,
) -> Figure:
    """Draw attacks of one kind: relearning over its steps, or probes over the layers; thin and pale the reference's.

    Args:
        results: What relearning or probing returned, or [`AttackCurve`][semu_peft.report.curves.AttackCurve]; one or
            several.
        path: A picture to write; its suffix chooses the format.
        ax: Axes to draw into instead of a new figure.
        dpi: Pixels per inch of a bitmap. The picture is 7 × 5 inches.

    Returns:
        The figure. Its label, or that of `ax`, describes it for those who do not see it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: None of the results is a curve, they are of several kinds, or the suffix is no picture format.

    Examples:
        >>> from semu_peft.evaluation import TextRelearning
        >>> from semu_peft.report import plot_attack
        >>> relearnt = TextRelearning("Adam 0.0001, 20 examples", (0, 10), (0.01, 0.06), (0.01, 0.05))
        >>> plot_attack(relearnt).get_label()
        'Known again over the steps of the attacker. Adam 0.0001, 20 examples: 0.01 to 0.06, reference 0.01 to 0.05.'
    """
    curves = read_curves(results if isinstance(results, (list, tuple)) else [results])
    kinds = sorted({(curve.kind, curve.unit) for curve in curves})
    if len(kinds) != 1:
        raise ValueError(
            f"`results` must be curves of one kind, got {kinds or 'none'}. Give what `relearn_text` or another attack "
            "over steps or layers returned, each kind by itself."
        )
    (kind, unit) = kinds[0]
    figure, [panel] = panels(ax, (7, 5))
    from matplotlib.ticker import MaxNLocator

    told = [_draw(panel, curve, number) for number, curve in enumerate(curves)]
    across, up = _AXES[kind]
    panel.set_xlabel(across, color=TEXT)
    panel.set_ylabel(f"{up} ({unit})", color=TEXT)
    # From nothing on, and with room above: values that are nearly alike leave a margin too narrow for their points.
    top = panel.dataLim.y1  # infinite where nothing is a number
    panel.set_ylim(0, 1.05 * top if 0 < top < float("inf") else 1)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#e6e6e6", lw=0.8)
    panel.legend(frameon=False, fontsize=8)
    where = "over the steps of the attacker" if kind == "relearning" else "layer by layer"
    return finished(figure, ax, f"{up[0].upper()}{up[1:]} {where}. {' '.join(told)}", path, dpi)


def read_curves(results: Iterable[Any]) -> list[AttackCurve]:
    """The curves among some results."""
    read = [result if isinstance(result, AttackCurve) else AttackCurve.of(result) for result in results]
    return [curve for curve in read if curve is not None]


def _draw(panel: Axes, curve: AttackCurve, number: int) -> str:
    look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
    panel.plot(curve.across, curve.found, lw=1.8, marker="o", ms=4, label=clipped(curve.name, 48), **look)
    told = f"{curve.name}: {curve.found[0]:.3g} to {curve.found[-1]:.3g}"
    if curve.reference:
        label = "the reference under the same attack" if number == 0 else None
        panel.plot(curve.across, curve.reference, lw=1, alpha=0.6, marker="x", ms=5, label=label, **look)
        told += f", reference {curve.reference[0]:.3g} to {curve.reference[-1]:.3g}"
    return f"{told}."


def _fit(across: Any, found: Any) -> bool:
    return isinstance(across, (list, tuple)) and isinstance(found, (list, tuple)) and 0 < len(across) == len(found)


def _as_curve(values: Any, across: Sequence[Any]) -> tuple[float, ...]:
    return tuple(values) if _fit(across, values) else ()
