"""Settings by layer: a dictionary whose keys are names, name endings or regular expressions, as PEFT's patterns are."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

T = TypeVar("T")


def name_matches(name: str, pattern: str) -> bool:
    """Whether the pattern is this layer's name, the end of it, or a regular expression for either."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def match_pattern(patterns: Mapping[str, T], name: str) -> T | None:
    """The value of the first pattern that matches a layer's full name, or None."""
    return next((value for pattern, value in patterns.items() if name_matches(name, pattern)), None)


def unmatched(patterns: Collection[str], names: Collection[str]) -> list[str]:
    """The patterns that match none of the names."""
    return [key for key in sorted(patterns) if key not in names and not any(name_matches(name, key) for name in names)]


def requested_rank(patterns: Mapping[str, int], name: str, names: Collection[str]) -> int | None:
    """The rank that `rank_pattern` asks for a layer, or None where it leaves that to the data.

    Args:
        patterns: `SemuConfig.rank_pattern`.
        name: The layer's full name.
        names: All full names in the model: a pattern that is one of them means that layer or parameter alone.

    Examples:
        >>> from semu_peft.tuner.patterns import requested_rank
        >>> names = ["fc1", "head", "blocks.0.fc1", "blocks.0.head"]
        >>> [requested_rank({"fc1": 2, "(fc|conv)1": 4}, name, names) for name in names]
        [2, None, 4, None]
    """
    if name in patterns:
        return patterns[name]
    return match_pattern({key: rank for key, rank in patterns.items() if key not in names}, name)
