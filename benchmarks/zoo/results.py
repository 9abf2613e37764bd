"""Results of several cases: their means, and the file that they are in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from semu_peft.files import written_whole


def mean(by_case: dict[str, dict[str, Any]], *keys: str) -> float | None:
    values = []
    for each in by_case.values():
        value: Any = each
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            return None
        values.append(float(value))
    return sum(values) / len(values) if values else None


def gap(found: Mapping[str, Any], gold: Mapping[str, Any], names: Collection[str]) -> float:
    """Mean absolute difference to the retrained model, in points."""
    return sum(abs(found[name] - gold[name]) for name in names) / len(names)


def plain(value: Any) -> Any:
    """As JSON has it: no infinities."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return None if value == float("inf") else value


def write(path: Path, document: Any) -> None:
    """Write a file of results whole, or not at all."""
    with written_whole(path) as file:
        file.write_text(json.dumps(plain(document), indent=1, ensure_ascii=False) + "\n")
