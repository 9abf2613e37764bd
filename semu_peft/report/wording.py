"""Values of a report as a person reads them: numbers, lists, metrics with their intervals, names of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def shown(value: Any) -> str:
    """A number, a text or a list of them.

    Examples:
        >>> from semu_peft.report.wording import shown
        >>> shown(0.123456), shown(12345), shown(["a", True])
        ('0.1235', '12,345', 'a, yes')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,d}"
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"
    if isinstance(value, Mapping):
        kind = value.get("type")
        parts = [f"{key}={shown(each)}" for key, each in value.items() if key != "type" and each is not None]
        return f"{kind}({', '.join(parts)})" if kind else ", ".join(parts) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value)) or "none"
    return str(value)


def measured(value: Mapping[str, Any] | None) -> str:
    """A metric with its interval, where it has one.

    Examples:
        >>> from semu_peft.report.wording import measured
        >>> measured({"value": 2.0, "interval": [1.5, 2.5]}), measured(None)
        ('2 (1.5 to 2.5)', '–')
    """
    if value is None or value["value"] is None:
        return "–"
    interval = value["interval"]
    beside = f" ({shown(interval[0])} to {shown(interval[1])})" if interval else ""
    return f"{shown(value['value'])}{beside}"


def model_name(name: str, reference: str | None) -> str:
    """A model's name as a column's heading; of the reference it says that it is.

    Examples:
        >>> from semu_peft.report.wording import model_name
        >>> model_name("gold", "gold")
        'gold (reference)'
    """
    return f"{name} (reference)" if name == reference and name.lower() != "reference" else name
